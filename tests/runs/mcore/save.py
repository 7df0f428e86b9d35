"""Puts tiny models into megatron-core's GPTModel on CPU and saves them as trainers do, each beside its oracle.

Needs `torch`, `transformers` and `megatron-core` (`pip install --no-deps megatron-core`). Starts one process a rank:

    python tests/runs/mcore/save.py OUT --case qwen3 --tp 2 --pp 2
    python tests/runs/mcore/save.py OUT --case qwen3 --tp 2 --format torch

`OUT/hf` is the oracle: the model of transformers whose weights were put into GPTModel by `models.py`. With TP, PP
and EP 1 the logits of both are compared too. Layers are as megatron-core writes them: stacked, but for block specs.
Many runs in one start of all ranks, `{NAME: ARGUMENTS}`, those that are there left alone:

    python tests/runs/mcore/save.py OUT --many RUNS.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from delta_net import block, on_rank
from models import LAYERS, PADDED, built, in_megatron, next_tokens, transformer_config

from ranks import expert_tp, join, launch, place, ranks_for, sizes_of

ITERATION = 10
_LOCAL_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_LOCAL_EXPERT = re.compile(r"\.local_experts\.(\d+)\.")


def work(out: Path, asked: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    place(asked)
    theirs = built(asked.case, layers=asked.layers)
    with contextlib.suppress(FileExistsError):
        out.mkdir(parents=True)
    if dist.get_rank() == 0:
        # A copy: rounding the model would round its frequencies of positions too.
        rounded = copy.deepcopy(theirs).to(torch.bfloat16 if asked.dtype == "bf16" else torch.float32)
        for name, buffer in rounded.named_buffers():
            if name.endswith("e_score_correction_bias"):  # which transformers keeps in fp32, as Megatron does
                buffer.data = buffer.data.float()
        rounded.save_pretrained(out / "hf")
        if asked.case.endswith("-mtp"):
            add_next_tokens(out / "hf" / "model.safetensors", next_tokens(asked.case, layers=asked.layers))
    dist.barrier()
    whole = _whole(out, theirs.config, asked)
    chunks = model_chunks(theirs.config, asked)
    for chunk in chunks:
        _fill(chunk, whole, asked)
    is_whole = asked.tp * asked.pp * asked.ep == 1 and dist.get_rank() == 0
    if is_whole and not asked.critic and not hasattr(theirs.config, "kv_lora_rank"):
        asked.logits = _compare_logits(chunks[0], theirs, theirs.config)
    for chunk in chunks:
        chunk.to(torch.bfloat16 if asked.dtype == "bf16" else torch.float32)
    folder = out / f"iter_{ITERATION:07d}"
    if asked.format == "torch":
        _save_by_rank(folder, chunks, theirs.config, asked)
    else:
        _save_sharded(folder, chunks, theirs.config, asked)
    dist.barrier()
    if dist.get_rank() == 0:
        (out / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        _describe(out, asked)
    dist.barrier()


def add_next_tokens(file: Path, extra: dict[str, Any]) -> None:
    """A layer more, with copies of the embeddings as models are published, in the dtype of the others."""
    from safetensors.torch import load_file, save_file

    held = load_file(file)
    dtype = held["model.norm.weight"].dtype
    added = {n: t.float() if n.endswith("correction_bias") else t.to(dtype) for n, t in extra.items()}
    (stem,) = {n.partition(".enorm")[0] for n in extra if ".enorm" in n}
    added[f"{stem}.embed_tokens.weight"] = held["model.embed_tokens.weight"].clone()
    added[f"{stem}.shared_head.head.weight"] = held["lm_head.weight"].clone()
    save_file(held | added, file, {"format": "pt"})


def _whole(out: Path, config: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """The oracle's tensors as Megatron's modules hold them; a critic's head in place of the output."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import load_file, save_file

    held = load_file(out / "hf" / "model.safetensors")
    whole = in_megatron(held, config)
    if asked.critic:
        generator = torch.Generator().manual_seed(5)
        head = {"weight": torch.randn(asked.critic, config.hidden_size, generator=generator).bfloat16()}
        if asked.head_bias:
            head["bias"] = torch.randn(asked.critic, generator=generator).bfloat16()
        whole = {n: t for n, t in whole.items() if n != "output_layer.weight"}
        whole |= {f"output_layer.{n}": t for n, t in head.items()}
        dist.barrier()
        if dist.get_rank() == 0:
            save_file({n: t.to(held["model.norm.weight"].dtype) for n, t in head.items()}, out / "head.safetensors")
        dist.barrier()
    return whole


def model_chunks(config: Any, asked: argparse.Namespace) -> list[Any]:
    """This rank's GPTModel, or one a virtual stage."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )

    settings = transformer_config(config, asked)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", 10000.0)}
    found = []
    for stage in range(asked.vpp or 1):
        virtual = stage if asked.vpp else None
        if asked.vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(stage)
        if isinstance(getattr(settings, "moe_layer_freq", 1), list):
            spec = get_gpt_decoder_block_spec(
                settings, use_transformer_engine=False, normalization="RMSNorm", vp_stage=virtual
            )
        else:
            spec = get_gpt_layer_local_spec(
                settings.num_moe_experts, False, settings.qk_layernorm, settings.multi_latent_attention,
                normalization="RMSNorm",
            )  # fmt: skip
        if config.model_type == "qwen3_next":
            count = config.num_hidden_layers // asked.pp
            first = parallel_state.get_pipeline_model_parallel_rank() * count
            spec = block(settings, spec, first, count)
        extra: dict[str, Any] = {} if virtual is None else {"vp_stage": virtual}
        if getattr(settings, "mtp_num_layers", None):
            extra["mtp_block_spec"] = get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
        edges = {"ignore_virtual": False} if asked.vpp is None else {"ignore_virtual": False, "vp_stage": virtual}
        last = parallel_state.is_pipeline_last_stage(**edges)
        model = GPTModel(
            settings, spec, getattr(asked, "padded", PADDED), 64, parallel_output=False,
            pre_process=parallel_state.is_pipeline_first_stage(**edges), post_process=last,
            share_embeddings_and_output_weights=config.tie_word_embeddings and not asked.critic,
            position_embedding_type="rope", rotary_base=rope["rope_theta"],
            rotary_percent=getattr(config, "partial_rotary_factor", None) or rope.get("partial_rotary_factor", 1.0),
            **extra,
        )  # fmt: skip
        if asked.critic and last:
            model.output_layer = torch.nn.Linear(config.hidden_size, asked.critic, bias=asked.head_bias)
        found.append(model)
    return found


def _fill(model: Any, whole: dict[str, Any], asked: argparse.Namespace) -> None:
    """This rank's slices of every tensor."""
    import torch
    from megatron.core import parallel_state

    rank, expert_rank = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    expert_tp_rank = parallel_state.get_expert_tensor_parallel_rank()
    for name, parameter in (*model.named_parameters(), *(b for b in model.named_buffers() if "expert_bias" in b[0])):
        key = name
        if found := _LOCAL_LAYER.match(key):
            number = model.decoder.layers[int(found[1])].layer_number - 1
            key = f"decoder.layers.{number}." + key[found.end() :]
        key = key.replace(".mtp_model_layer.", ".transformer_layer.")
        if found := _LOCAL_EXPERT.search(key):
            here = len(
                [
                    n
                    for n in whole
                    if key.replace(found[0], ".local_experts.#.") == _LOCAL_EXPERT.sub(".local_experts.#.", n)
                ]
            )
            expert = int(found[1]) + expert_rank * here // asked.ep
            key = key.replace(found[0], f".local_experts.{expert}.")
        if key not in whole and key == "output_layer.weight":
            key = "embedding.word_embeddings.weight"
        tensor = whole[key].float()
        is_expert = ".local_experts." in key
        at, count = (expert_tp_rank, expert_tp(asked)) if is_expert else (rank, asked.tp)
        tensor = sliced(key, tensor, tuple(parameter.shape), at, count)
        assert tensor.shape == parameter.shape, (key, tensor.shape, parameter.shape)
        with torch.no_grad():
            parameter.copy_(tensor)


def sliced(key: str, tensor: Any, shape: tuple[int, ...], rank: int, tp: int) -> Any:
    import torch

    if tuple(tensor.shape) == shape:
        return tensor
    if (parts := on_rank(key, tensor, rank, tp)) is not None:
        return parts
    if key.endswith(("linear_fc1.weight", "linear_fc1.bias")):
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    (dim,) = [d for d in range(tensor.ndim) if tensor.shape[d] != shape[d]]
    return tensor.chunk(tp, dim)[rank]


def _compare_logits(model: Any, theirs: Any, config: Any) -> float:
    """Both models say the same of the same tokens: the weights were put where they mean what they meant."""
    import torch

    tokens = torch.arange(12).reshape(2, 6) * 5 % config.vocab_size
    positions = torch.arange(6).expand(2, 6)
    mask = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        ours = model.eval()(tokens, positions, mask)[..., : config.vocab_size]
        wanted = theirs(tokens).logits
    difference = (ours - wanted).abs().max().item()
    assert difference < 1e-5 * max(1.0, wanted.abs().max().item()), f"the logits differ by {difference}"
    return float(difference)


def _arguments(config: Any, asked: argparse.Namespace) -> argparse.Namespace:
    """`args` as Megatron-LM's training script keeps them, as far as anything reads them."""
    import torch

    settings = transformer_config(config, asked)
    kept = {
        n: getattr(settings, n)
        for n in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
            "normalization", "add_qkv_bias", "add_bias_linear", "qk_layernorm", "moe_ffn_hidden_size",
            "moe_layer_freq", "multi_latent_attention", "tensor_model_parallel_size", "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size",
            "attention_backend", "rotary_interleaved", "q_lora_rank", "kv_lora_rank", "qk_pos_emb_head_dim",
            "num_layers_in_first_pipeline_stage",
        )
        if hasattr(settings, n)
    }  # fmt: skip
    return argparse.Namespace(
        **kept, group_query_attention=True, num_experts=settings.num_moe_experts, params_dtype=torch.bfloat16,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings, swiglu=True,
        padded_vocab_size=getattr(asked, "padded", PADDED), make_vocab_size_divisible_by=16,
        position_embedding_type="rope",
        apply_layernorm_1p=settings.layernorm_zero_centered_gamma,
    )  # fmt: skip


def _save_sharded(folder: Path, chunks: list[Any], config: Any, asked: argparse.Namespace) -> None:
    """As `megatron.training.checkpointing` does with `--ckpt-format torch_dist`."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": ITERATION}
    if not asked.no_args:
        state["args"] = _arguments(config, asked)
    for number, chunk in enumerate(chunks):
        prefix = "" if len(chunks) == 1 else str(number)
        state[f"model{prefix}"] = chunk.sharded_state_dict(metadata=replicas())
        if asked.critic and "output_layer.weight" not in state[f"model{prefix}"] and hasattr(chunk, "output_layer"):
            add_head(state[f"model{prefix}"], chunk)
        if asked.optimizer:
            for which, scale in (("exp_avg", 0.5), ("exp_avg_sq", 0.25), ("fp32_param", 1.0)):

                def moment(tensor: Any, which: str = which, scale: float = scale) -> Any:
                    if not isinstance(tensor, ShardedTensor | ShardedTensorFactory) or tensor.data is None:
                        return tensor
                    value = tensor.data.detach().float() * scale
                    return make_sharded_optimizer_tensor(tensor, value, f"optimizer.state.{which}")

                every = chunk.sharded_state_dict(metadata=replicas())
                held = {k: v for k, v in every.items() if not k.endswith("_extra_state")}
                state[f"optimizer{prefix}.{which}"] = dict_list_map_inplace(moment, held)
    dist_checkpointing.save(state, str(folder))


def replicas() -> dict[str, Any]:
    """What newer versions ask to be told of who has the same values."""
    from megatron.core import parallel_state

    return {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def add_head(state: dict[str, Any], chunk: Any) -> None:
    """A bare Linear: what verl's, Megatron-Bridge's and AReaL's value heads are."""
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    held = chunk.output_layer.state_dict(prefix="output_layer.", keep_vars=True)
    state.update(make_sharded_tensors_for_checkpoint(held, "", {}, ()))


def _save_by_rank(folder: Path, chunks: list[Any], config: Any, asked: argparse.Namespace) -> None:
    """As Megatron does with `--ckpt-format torch`: ranks of the first replica write one file each."""
    import torch
    from megatron.core import parallel_state as ranks

    if ranks.get_expert_data_parallel_rank() != 0 if asked.ep > 1 else ranks.get_data_parallel_rank() != 0:
        return
    name = f"mp_rank_{ranks.get_tensor_model_parallel_rank():02d}"
    if asked.pp > 1:
        name += f"_{ranks.get_pipeline_model_parallel_rank():03d}"
    if asked.ep > 1:
        name += f"_{ranks.get_expert_model_parallel_rank():03d}"
    state: dict[str, Any] = {"checkpoint_version": 3.0, "iteration": ITERATION, "args": _arguments(config, asked)}
    for number, chunk in enumerate(chunks):
        state["model" if len(chunks) == 1 else f"model{number}"] = chunk.state_dict_for_save_checkpoint()
    (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / name / "model_optim_rng.pt")


def _describe(out: Path, asked: argparse.Namespace) -> None:
    from importlib.metadata import version

    record = {
        "case": asked.case, "tp": asked.tp, "pp": asked.pp, "ep": asked.ep, "vpp": asked.vpp, "dtype": asked.dtype,
        "per_layer": asked.per_layer, "format": asked.format, "critic": asked.critic, "head_bias": asked.head_bias,
        "optimizer": asked.optimizer, "layers": asked.layers, "padded": PADDED, "args": not asked.no_args,
        "etp": expert_tp(asked), "first_stage": asked.first_stage, "logits": asked.logits,
        "versions": {p: version(p) for p in ("torch", "transformers", "megatron-core")},
    }  # fmt: skip
    (out / "fixture.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case")
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    for name in ("vpp", "etp", "first-stage"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--per-layer", action="store_true")
    parser.add_argument("--format", choices=("torch_dist", "torch"), default="torch_dist")
    parser.add_argument("--critic", type=int, default=0, metavar="ROWS")
    parser.add_argument("--head-bias", action="store_true")
    parser.add_argument("--optimizer", action="store_true")
    parser.add_argument("--no-args", action="store_true")
    parser.add_argument("--many", type=Path, metavar="JSON")
    parser.add_argument("--worker", action="store_true")
    parser.set_defaults(logits=None)
    return parser


def _runs(asked: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Runs that are not saved yet, by their folders below OUT."""
    if asked.many is None:
        return {"": asked}
    named: dict[str, list[str]] = json.loads(asked.many.read_text())
    every = {name: _parser().parse_args([str(asked.out / name), *given]) for name, given in named.items()}
    left = {name: run for name, run in every.items() if not (run.out / "fixture.json").is_file()}
    return dict(sorted(left.items(), key=lambda pair: sizes_of(pair[1])))


def main() -> None:
    """Read the command line."""
    asked = _parser().parse_args()
    if asked.worker:
        warnings.simplefilter("ignore")
        join()
        for run in _runs(asked).values():
            work(run.out, run)
        return
    failed = []
    for run in (r for r in _runs(asked).values() if r.out.exists() and (asked.many is None or r.out != asked.out)):
        shutil.rmtree(run.out)
    while left := _runs(asked):
        if launch(max(ranks_for(r) for r in left.values()), sys.argv):
            break
        (first, *_) = _runs(asked)
        failed.append(first)
        print(f"NOT SAVED: {first}", flush=True)
        if asked.many is None:
            break
        asked.many.write_text(json.dumps({n: v for n, v in json.loads(asked.many.read_text()).items() if n != first}))
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
