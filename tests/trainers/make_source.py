"""Writes a reward or critic model with a trainer's own save code; run by that trainer's Python.

    PY make_source.py KIND BASE OUT HEAD.json

BASE is a causal model saved by transformers; HEAD.json holds the head's `weight`, `bias`, `mean` and `std`, which are
put into the model that the trainer's own loader builds.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "converter" / "examine" / "verify" / "probes"))

from probe_common import stand_in_for  # noqa: E402


def _fill(layer: Any, head: dict[str, Any]) -> None:
    import torch

    layer.weight.data = torch.tensor(head["weight"], dtype=layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data = torch.tensor(head["bias"], dtype=layer.bias.dtype)


def hf_seqcls(base: str, out: str, head: dict[str, Any]) -> None:
    """transformers' own class."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    _fill(model.score, head)
    model.save_pretrained(out)


def hf_tokcls(base: str, out: str, head: dict[str, Any]) -> None:
    """What verl's critic is: transformers' token classification."""
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(base, num_labels=1)
    _fill(model.score, head)
    model.save_pretrained(out)


def openrlhf(base: str, out: str, head: dict[str, Any]) -> None:
    """OpenRLHF's class; the two calls by which `save_model` writes a gathered model, and train_rm's head prefix."""
    stand_in_for("flash_attn", "ring_flash_attn", "deepspeed", "ray", "vllm", "torchdata", "bitsandbytes")
    import torch
    from openrlhf.models import get_llm_for_sequence_regression
    from openrlhf.utils import utils

    utils.convert_to_torch_dtype = lambda name: torch.float32
    model = get_llm_for_sequence_regression(base, "reward", attn_implementation="eager", init_value_head=True)
    _fill(model.score, head)
    model.config.value_head_prefix = "score"
    if "mean" in head:
        model.config.mean, model.config.std = head["mean"], head["std"]
    model.save_pretrained(out)
    model.config.to_json_file(Path(out) / "config.json")


def openrlhf_old(base: str, out: str, head: dict[str, Any]) -> None:
    """The layout of OpenRLHF up to 0.5.3, by 0.5.5 with the head's name of then; no prefix in the config."""
    stand_in_for("flash_attn", "ring_flash_attn", "deepspeed", "ray", "vllm", "torchdata", "bitsandbytes")
    from openrlhf.models import get_llm_for_sequence_regression

    model = get_llm_for_sequence_regression(base, "reward", bf16=False, value_head_prefix="value_head")
    _fill(model.value_head, head)
    model.save_pretrained(out)
    model.config.to_json_file(Path(out) / "config.json")


def trl_vhead(base: str, out: str, head: dict[str, Any]) -> None:
    """TRL's wrapper and its `save_pretrained`."""
    from trl import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    _fill(model.v_head.summary, head)
    model.save_pretrained(out)


def llamafactory(base: str, out: str, head: dict[str, Any]) -> None:
    """LLaMA-Factory's callback after training: the head moves to value_head.safetensors."""
    stand_in_for("av", "gradio", "librosa", "modelscope", "ray", "sse_starlette", "fastapi", "uvicorn", "PIL")
    from llamafactory.train.callbacks import fix_valuehead_checkpoint
    from safetensors.torch import save_file
    from trl import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(base)
    _fill(model.v_head.summary, head)
    Path(out).mkdir()
    state = {k.removeprefix("pretrained_model."): v for k, v in model.state_dict().items()}
    save_file(state, Path(out) / "model.safetensors", metadata={"format": "pt"})
    model.pretrained_model.config.save_pretrained(out)
    fix_valuehead_checkpoint(model, out, safe_serialization=True)


def skyrl(base: str, out: str, head: dict[str, Any]) -> None:
    """SkyRL's class and its `save_pretrained`."""
    stand_in_for("flash_attn", "ray", "vllm", "torchdata", "bitsandbytes", "sglang", "deepspeed")
    if sys.version_info < (3, 12):
        import typing

        import typing_extensions

        typing.TypedDict = typing_extensions.TypedDict
    from skyrl.backends.skyrl_train.workers.model_wrapper import get_llm_for_sequence_regression

    model = get_llm_for_sequence_regression(base, "critic", bf16=False)
    _fill(model.value_head, head)
    model.save_pretrained(out)


def safe_rlhf(base: str, out: str, head: dict[str, Any]) -> None:
    """safe-rlhf's score model, as rewardbench ships it; normalised where the head has a mean."""
    stand_in_for("fastchat", "bitsandbytes", "wandb", "trl", "tiktoken", "black", "flake8")
    import torch
    from rewardbench.models.beaver import LlamaForScore

    more: dict[str, Any] = {"bias": "bias" in head}
    if "mean" in head:
        more |= {"do_normalize": True, "normalizer_type": "RunningMeanStd"}
    model = LlamaForScore.from_pretrained(base, **more)
    _fill(model.score_head, head)
    if "mean" in head:
        model.normalizer.set_mean_var(torch.tensor([head["mean"]]), torch.tensor([head["std"] ** 2]))
    model.save_pretrained(out, safe_serialization=True)


def ultrarm(base: str, out: str, head: dict[str, Any]) -> None:
    """UltraRM's class, as rewardbench ships it."""
    stand_in_for("fastchat", "bitsandbytes", "wandb", "trl", "tiktoken", "black", "flake8")
    from rewardbench.models.openbmb import LlamaRewardModel

    model = LlamaRewardModel.from_pretrained(base)
    _fill(model.regression_head, head)
    model.save_pretrained(out, safe_serialization=True)


def inf_orm(base: str, out: str, head: dict[str, Any]) -> None:
    """INF-ORM's class with its two layers, as rewardbench ships it; the head stays random."""
    stand_in_for("fastchat", "bitsandbytes", "wandb", "trl", "tiktoken", "black", "flake8")
    from rewardbench.models.inform import INFORMForSequenceClassification

    INFORMForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(out, safe_serialization=True)


MAKERS = {
    each.__name__: each
    for each in (
        hf_seqcls, hf_tokcls, openrlhf, openrlhf_old, trl_vhead, llamafactory, skyrl, safe_rlhf, ultrarm, inf_orm,
    )
}  # fmt: skip


def main() -> None:
    """Make one folder, with the base's tokenizer beside the model."""
    kind, base, out, head = sys.argv[1:5]
    MAKERS[kind](base, out, json.loads(Path(head).read_text(encoding="utf-8")))
    for file in Path(base).glob("*token*"):
        shutil.copy(file, out)


if __name__ == "__main__":
    main()
