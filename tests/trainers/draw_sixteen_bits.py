"""Draws adapters over bf16 and fp16 bases, as `draw_adapters.py` does over fp32 ones, by whatever PEFT runs this.

    python draw_sixteen_bits.py FOLDER SEED FIRST COUNT [FAMILY ...]

The adapter is trained in fp32 (PEFT's own choice) or in the base's dtype. What the live model says is computed in fp32
from the stored values, which is exact: base and adapter are 16-bit numbers that are widened. A case gets a folder with
`base`, `adapter`, `live.safetensors` (inputs and logits), `truth` (PEFT's merge in fp32 of the widened model), `peft`
(its merge in the base's dtype, where it makes one) and `case.json`.
"""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

import draw_adapters as drawn
from drawn_families import FAMILIES

DTYPES = ("bfloat16", "bfloat16", "float16")


def make(folder: Path, seed: int, number: int, families: list[str]) -> dict[str, Any]:
    """One case: draws it, makes it, and says what came of it."""
    draw = random.Random(f"16:{seed}:{number}")
    name = draw.choice([f for f in families if hasattr(transformers, FAMILIES[f].config[0])])
    family = FAMILIES[name]
    lacks = {"TrainableTokensConfig"} if not family.embedding else set()
    kind = draw.choice([k for k in drawn.KINDS if hasattr(peft, k) and k not in (*lacks, *drawn.PROMPTS)])
    generator = torch.Generator().manual_seed(number + 7)
    dtype = draw.choice(DTYPES)
    case: dict[str, Any] = {"family": name, "kind": kind, "peft": peft.__version__, "dtype": dtype,
                            "transformers": transformers.__version__}  # fmt: skip
    is_reward = family.reward and draw.random() < 0.2
    case["task"] = "SEQ_CLS" if is_reward else family.task
    base = drawn.save_base(folder / "base", family, draw, generator, case, getattr(torch, dtype))
    auto = "AutoModelForSequenceClassification" if is_reward else family.auto
    labels = {"num_labels": 1, "pad_token_id": 0} if is_reward else {}

    def load(is_wide: bool) -> Any:
        torch.manual_seed(number)
        model = getattr(transformers, auto).from_pretrained(base, torch_dtype=getattr(torch, dtype), **labels)
        return (model.float() if is_wide else model).eval()

    inputs = drawn.inputs_of(name)
    kept = {f"input.{k}": v for k, v in inputs.items()}
    if not is_reward:
        kept["base"] = drawn.say(load(True), inputs)
    model = load(False)
    config = drawn.config_of(kind, family, case["task"], draw, model)
    case["settings"] = {k: v for k, v in config.to_dict().items() if v and k not in ("peft_type", "peft_version")}
    case["adapter_dtype"] = draw.choice(["float32", dtype])
    wrapped = _wrap(model, config, {"autocast_adapter_dtype": case["adapter_dtype"] == "float32"}, inputs)
    drawn.fill(wrapped, kind, generator)
    out = folder / "adapter"
    out.mkdir()
    wrapped.eval().save_pretrained(out, safe_serialization=draw.random() < 0.8)
    case["file"] = next(p.name for p in out.iterdir() if p.name.startswith("adapter_model"))
    kept["live"] = drawn.say(wrapped.float(), inputs)
    try:
        loaded = peft.PeftModel.from_pretrained(load(False), out).float().eval()
        kept["loaded"] = drawn.say(loaded, inputs)
        merged = peft.PeftModel.from_pretrained(load(False), out).float().eval().merge_and_unload()
        kept["merged"] = drawn.say(merged, inputs)
        merged.save_pretrained(folder / "truth")
        peft.PeftModel.from_pretrained(load(False), out).merge_and_unload().save_pretrained(folder / "peft")
    except Exception as error:
        case["not_merged"] = f"{type(error).__name__}: {error}"[:300]
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, folder / "live.safetensors")
    return case


def _wrap(model: Any, config: Any, options: dict[str, Any], inputs: dict[str, Any]) -> Any:
    known = inspect.signature(peft.get_peft_model).parameters
    wrapped = peft.get_peft_model(model, config, **{k: v for k, v in options.items() if k in known})
    if getattr(config, "init_lora_weights", None) == "eva":
        widened = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        peft.initialize_lora_eva_weights(wrapped, [widened], show_progress_bar=False)
    return wrapped


if __name__ == "__main__":
    sys.exit(drawn.main(make))
