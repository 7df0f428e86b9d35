"""Draws adapters over bases that vendors' own code quantised, as `draw_sixteen_bits.py` does over plain ones.

    python draw_quantised.py FOLDER SEED FIRST COUNT --vendors /envs/quantisers/lib/python3.11/site-packages

Run by this project's Python. Families are others than the fixtures'. Every matrix of the layers is quantised by
bitsandbytes (NF4, int8), compressed-tensors (packed int4, FP8), transformers (FP8 in blocks, MXFP4), or drawn as codes
and dequantised by GPTQModel or AutoAWQ. `base` is the quantised folder; PEFT's adapter is made over, and the live
model is, the vendor's dequantised values. `judge_sixteen_bits.py` judges.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

import draw_adapters as drawn
import quantise_with_vendors as vendors
from drawn_families import ATTENTION, MLP, TEXT, Family

Parts = dict[str, torch.Tensor]
Made = tuple[Parts, torch.Tensor]
SIZE = 16


def _text(config: str, targets: tuple[str, ...] = (*ATTENTION, *MLP), **more: Any) -> Family:
    return Family((config, TEXT | more), targets, targets[-1:], ("embed_tokens", "lm_head"))


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}
FAMILIES = {
    "mistral": _text("MistralConfig", head_dim=8),
    "gemma2": _text("Gemma2Config", head_dim=8),
    "gemma3": _text("Gemma3TextConfig", head_dim=8),
    "granite": _text("GraniteConfig", residual_multiplier=0.7, logits_scaling=2.0),
    "olmo2": _text("Olmo2Config"),
    "cohere": _text("CohereConfig", logit_scale=0.5),
    "starcoder2": _text("Starcoder2Config", (*ATTENTION, "c_fc", "c_proj")),
    "stablelm": _text("StableLmConfig"),
    "glm4": _text("Glm4Config", (*ATTENTION, "gate_up_proj", "down_proj"), head_dim=8),
    "smollm3": _text("SmolLM3Config", no_rope_layers=[1, 0]),
    "helium": _text("HeliumConfig", head_dim=8),
    "phi": _text("PhiConfig", ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")),
    "nemotron": _text("NemotronConfig", (*ATTENTION, "up_proj", "down_proj"), head_dim=8),
    "ernie4_5": _text("Ernie4_5Config", head_dim=8),
    "seed_oss": _text("SeedOssConfig", head_dim=8),
    "olmoe": _text("OlmoeConfig", ATTENTION, num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "qwen2_moe": _text("Qwen2MoeConfig", ATTENTION, num_experts=4, shared_expert_intermediate_size=16, **EXPERTS),
    "deepseek_v3": _text(
        "DeepseekV3Config", ("q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"), num_key_value_heads=4, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=2,
        topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=1, n_shared_experts=1),
    "gpt_oss": Family(
        ("GptOssConfig", TEXT | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                                 "intermediate_size": 32, "layer_types": ["full_attention"] * 2}),
        ATTENTION, ("o_proj",), ("embed_tokens", "lm_head"),
        parameters=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")),
}  # fmt: skip
KINDS = (*["LoraConfig"] * 8, "LoKrConfig", "IA3Config", "OFTConfig", "HRAConfig", "MissConfig", "VeraConfig",
         "DeloraConfig", "GraloraConfig", "C3AConfig", "RandLoraConfig")  # fmt: skip

# Vendors


def nf4(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, compress_statistics=draw.random() < 0.5, quant_type="nf4")
    parts = {f"{module}.weight": codes}
    parts |= {f"{module}.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    return parts, _flat(dequantize_4bit, codes, state)


def _flat(dequantise: Any, codes: torch.Tensor, state: Any) -> torch.Tensor:
    """As one run of blocks: the vendor's CPU kernel misreads rows that are no whole number of them."""
    shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
    return dequantise(codes, state).view(shape)


def int8(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    codes, scale, _ = int8_vectorwise_quant(weight.to(torch.float16))
    parts = {f"{module}.weight": codes, f"{module}.SCB": scale, f"{module}.weight_format": torch.tensor(0).byte()}
    return parts, int8_vectorwise_dequant(codes, scale).to(weight.dtype)


def fp8_blocks(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
    blocks = weight.float().unflatten(1, (-1, SIZE)).unflatten(0, (-1, SIZE))
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = (codes.float() * scale[:, None, :, None]).reshape(weight.shape).to(weight.dtype)
    return {f"{module}.weight": codes.reshape(weight.shape), f"{module}.weight_scale_inv": scale}, whole


def compressed(form: str, **weights: Any) -> Callable[[str, torch.Tensor, random.Random], Made]:
    def make(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        args = QuantizationArgs(**weights)
        grouped = weight.reshape(-1, args.group_size or weight.shape[1])
        scale, _ = calculate_qparams(grouped.amin(1), grouped.amax(1), args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(form)
        state = {"weight": weight, "weight_scale": scale.to(weight.dtype).reshape(weight.shape[0], -1)}
        held = dict(compressor.compress(state, scheme))
        whole = compressor.decompress(dict(held), scheme)["weight"].to(weight.dtype)
        return {f"{module}.{k}": v for k, v in held.items() if isinstance(v, torch.Tensor)}, whole

    return make


def _codes(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    codes = torch.randint(0, 16, (columns, rows), generator=generator)
    zeros = torch.randint(1, 16, (columns // SIZE, rows), generator=generator)
    scales = (torch.rand(columns // SIZE, rows, generator=generator) + 0.5) * float(weight.float().std()) / 6
    return codes, zeros, scales.to(torch.float16)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": SIZE, "sym": False, "checkpoint_format": "gptq"}


def gptq(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
    codes, zeros, scales = _codes(weight, torch.Generator().manual_seed(draw.getrandbits(32)))
    group = torch.arange(weight.shape[1]) // SIZE
    parts = {"qweight": vendors.words(codes, 4, 0), "qzeros": vendors.words(zeros - 1, 4, 1), "scales": scales,
             "g_idx": group.to(torch.int32)}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        save_file({f"m.{k}": v for k, v in parts.items()}, f"{scratch}/gptq.safetensors")
        convert = _bare("gptqmodel", "utils.model_dequant", "utils", "quantization").convert_gptq_file
        whole = convert(Path(scratch, "gptq.safetensors"), weight.dtype, GPTQ, "cpu")["m.weight"]
    return {f"{module}.{k}": v for k, v in parts.items()}, whole


def awq(module: str, weight: torch.Tensor, draw: random.Random) -> Made:
    codes, zeros, scales = _codes(weight, torch.Generator().manual_seed(draw.getrandbits(32)))
    package = _bare("awq", "utils.packing_utils", "utils")
    order = tuple(package.AWQ_ORDER)
    parts = {"qweight": vendors.words(codes, 4, 1, order), "qzeros": vendors.words(zeros, 4, 1, order),
             "scales": scales}  # fmt: skip
    whole = package.dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, SIZE).T
    return {f"{module}.{k}": v for k, v in parts.items()}, whole.to(weight.dtype)


def _bare(package: str, of: str, *inner: str) -> Any:
    """A module without what its package imports, which PEFT, asking what is installed, does not find afterwards."""
    found = vendors.bare(package, *(f"{package}.{n}" for n in inner), of=f"{package}.{of}")
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        del sys.modules[name]
    return found


_BNB = {"quant_method": "bitsandbytes"}
_INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": SIZE, "symmetric": True}
_FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}


def _compressed_config(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FORMATS: dict[str, tuple[Callable[[str, torch.Tensor, random.Random], Made], dict[str, Any]]] = {
    "nf4": (nf4, _BNB | {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "int8": (int8, _BNB | {"load_in_8bit": True}),
    "gptq": (gptq, GPTQ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": SIZE, "zero_point": True, "version": "gemm"}),
    "int4": (compressed("pack-quantized", **_INT4), _compressed_config("pack-quantized", _INT4)),
    "fp8-channel": (compressed("float-quantized", **_FP8), _compressed_config("float-quantized", _FP8)),
    "fp8-blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [SIZE, SIZE]}),
}


def mxfp4(folder: Path, whole: Path, draw: random.Random) -> None:
    """Experts of gpt-oss as codes and exponents, dequantised by transformers."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    quantised: Parts = {}
    plain: Parts = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantised[name] = plain[name] = value
            continue
        count, inputs, outputs = value.shape
        blocks = torch.randint(0, 256, (count, outputs, inputs // 32, 16), generator=generator).byte()
        scales = torch.randint(122, 126, (count, outputs, inputs // 32), generator=generator).byte()
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=value.dtype).contiguous()
    _write(folder, quantised, {"quant_method": "mxfp4"})
    _write(whole, plain, None)


def quantise(folder: Path, whole: Path, form: str, draw: random.Random) -> None:
    """Every matrix of the layers, but routers."""
    make, config = FORMATS[form]
    quantised: Parts = {}
    plain: Parts = {}
    for name, value in load_file(folder / "model.safetensors").items():
        is_matrix = (
            value.dim() == 2 and re.search(r"\blayers\.", name) and not re.search(r"(?:gate|router)\.weight$", name)
        )
        if not is_matrix or any(n % SIZE for n in value.shape):
            quantised[name] = plain[name] = value
            continue
        parts, plain[name] = make(name.removesuffix(".weight"), value, draw)
        quantised |= parts
    _write(folder, quantised, config)
    _write(whole, plain, None)


def _write(folder: Path, tensors: Parts, config: dict[str, Any] | None) -> None:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps(value | ({"quantization_config": config} if config else {})))


# Cases


def make(folder: Path, seed: int, number: int) -> dict[str, Any]:
    """One case: draws it, makes it, and says what came of it."""
    draw = random.Random(f"quantised:{seed}:{number}")
    name = draw.choice(sorted(FAMILIES))
    family = FAMILIES[name]
    form = "mxfp4" if name == "gpt_oss" else draw.choice(sorted(FORMATS))
    kind = draw.choice([k for k in KINDS if name != "gpt_oss" or k == "LoraConfig"])
    generator = torch.Generator().manual_seed(number + 7)
    dtype = draw.choice(["bfloat16", "bfloat16", "float16"])
    case: dict[str, Any] = {"family": name, "kind": kind, "peft": peft.__version__, "dtype": dtype, "quantised": form,
                            "transformers": transformers.__version__, "task": "CAUSAL_LM"}  # fmt: skip
    base = folder / "base"
    drawn.save_base(base, family, random.Random(0), generator, case, getattr(torch, dtype))
    shutil.copytree(base, folder / "whole")
    if form == "mxfp4":
        mxfp4(base, folder / "whole", draw)
    else:
        quantise(base, folder / "whole", form, draw)

    def load() -> Any:
        auto = transformers.AutoModelForCausalLM
        return auto.from_pretrained(folder / "whole", dtype=getattr(torch, dtype)).eval()

    inputs = drawn.inputs_of(name)
    model = load()
    config = drawn.config_of(kind, family, "CAUSAL_LM", draw, model)
    case["settings"] = {k: v for k, v in config.to_dict().items() if v and k not in ("peft_type", "peft_version")}
    wrapped = peft.get_peft_model(model, config)
    drawn.fill(wrapped, kind, generator)
    wrapped.eval().save_pretrained(folder / "adapter")
    case |= {"adapter_dtype": "float32", "file": "adapter_model.safetensors"}
    kept = {f"input.{k}": v for k, v in inputs.items()} | {"live": drawn.say(wrapped.float(), inputs)}
    try:
        loaded = peft.PeftModel.from_pretrained(load(), folder / "adapter").float().eval()
        kept["loaded"] = drawn.say(loaded, inputs)
        merged = loaded.merge_and_unload()
        kept["merged"] = drawn.say(merged, inputs)
        merged.save_pretrained(folder / "truth")
        peft.PeftModel.from_pretrained(load(), folder / "adapter").merge_and_unload().save_pretrained(folder / "peft")
    except Exception as error:
        case["not_merged"] = f"{type(error).__name__}: {error}"[:300]
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, folder / "live.safetensors")
    return case


def main() -> int:
    """Make the cases that were asked for; one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name in ("seed", "first", "count"):
        parser.add_argument(name, type=int)
    parser.add_argument("--vendors", type=Path, required=True)
    asked = parser.parse_args()
    for each in ("is_gptqmodel_available", "is_auto_awq_available", "is_auto_gptq_available", "is_bnb_available"):
        getattr(peft.import_utils, each, bool)()  # PEFT remembers that they are not there
    sys.path.append(str(asked.vendors))
    importlib.invalidate_caches()
    drawn.quiet()
    for number in range(asked.first, asked.first + asked.count):
        home = asked.folder / f"{number:05d}"
        home.mkdir(parents=True)
        try:
            case = make(home, asked.seed, number)
        except Exception as error:
            shutil.rmtree(home)
            at = traceback.format_exc().strip().splitlines()[-3].strip()
            print(
                json.dumps({"number": number, "not_made": f"{type(error).__name__}: {error}"[:200], "at": at}),
                flush=True,
            )
            continue
        (home / "case.json").write_text(json.dumps(case, default=str, indent=1))
        print(
            json.dumps({"number": number, "made": f"{case['family']} {case['quantised']} {case['kind']}"}), flush=True
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
