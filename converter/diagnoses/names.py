"""Tensor names that no loader looks for: wrappers, unmerged LoRA, flat shards, other trainers' prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.context import Context
from converter.diagnoses.model import HERE, LOST, Case, Finding, diagnosis, folded

WRAPPER = re.compile(
    r"(?:^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module|_forward_module)\."
)
_UNMERGED = re.compile(r"\.(?:base_layer\.|lora_(?:A|B|embedding_A|embedding_B)\b|modules_to_save\.|original_module\.)")
_TRAINERS = {
    "pretrained_model.": "TRL's wrapper with a value head",
    "policy.": "TRL's PPO wrapper",
    "value_model.": "TRL's PPO wrapper",
    "rwtransformer.": "DeepSpeed-Chat's reward model",
    "rwtranrsformer.": "DeepSpeed-Chat's reward model, before its name was spelt right",
}


def repair_command(case: Case, more: str = "") -> str:
    """The command that mends what is wrong in the folder itself."""
    return f"rlhf-convert repair {case.path} {case.out('fixed')}{more}"


@diagnosis("names-wrapped", "model")
def names_wrapped(case: Case, context: Context) -> Iterable[Finding]:
    """Names hold what torch.compile, DDP, FSDP or activation checkpointing put into them (_orig_mod., module.,
    _fsdp_wrapped_module.): loaders find none of them and go on with RANDOM weights, or stop at missing keys.
    """
    wrapped = tuple(n for n in case.shapes if WRAPPER.search(n))
    if wrapped:
        marks = sorted({m[0].strip(".") for n in wrapped if (m := WRAPPER.search(n))})
        text = f"{len(wrapped)} of {len(case.shapes)} names hold a wrapper's part: {', '.join(marks)}"
        shown, command = folded(case, wrapped), repair_command(case)
        yield Finding("names-wrapped", "error", text, wrapped, shown, HERE, ("mend-names",), "safe", command)


@diagnosis("lora-unmerged", "model")
def lora_unmerged(case: Case, context: Context) -> Iterable[Finding]:
    """A full model with LoRA's wrappers still in it (base_layer, lora_A, lora_B): saved by a trainer that neither
    merged nor split. transformers drops the LoRA tensors, or does not find the base ones; vLLM stops with a KeyError.
    The adapter can be split from its base, or merged with the lora_alpha of the training script.
    """
    inside = tuple(n for n in case.shapes if _UNMERGED.search(n))
    if inside:
        text = (
            f"{len(inside)} of {len(case.shapes)} tensors are parts of LoRA layers that were neither merged "
            f"nor split off"
        )
        yield Finding(
            "lora-unmerged", "error", text, inside, folded(case, inside), HERE, ("split-lora",), "unsafe",
            repair_command(case, " --lora-alpha N"),
        )  # fmt: skip


@diagnosis("fsdp-flat", "model", "weights", "training")
def fsdp_flat(case: Case, context: Context) -> Iterable[Finding]:
    """Names with _flat_param: FSDP's local state dict. The shards are flat, and what they were before is in no file.
    Save with the sharded or the full state-dict type.
    """
    flat = tuple(n for n in case.shapes if "_flat_param" in n)
    if flat:
        text = f"{len(flat)} tensors are FSDP's flat parameters: their names and shapes were not saved"
        yield Finding("fsdp-flat", "error", text, flat, folded(case, flat), LOST)


@diagnosis("names-of-a-trainer", "model")
def names_of_a_trainer(case: Case, context: Context) -> Iterable[Finding]:
    """All names begin with a trainer's own prefix. That trainer loads them; transformers finds none of them and makes
    everything RANDOM, with a warning at most.
    """
    for prefix, whose in _TRAINERS.items():
        found = tuple(n for n in case.shapes if n.startswith(prefix))
        if found and not (case.trainer == "deepspeed-chat" and prefix.startswith("rwtrans")):
            text = f"{len(found)} of {len(case.shapes)} names begin with `{prefix}`: {whose}"
            command = f"rlhf-convert critic-to-rm {case.path} {case.out('converted')} --to trl"
            yield Finding(
                "names-of-a-trainer", "error", text, found, folded(case, found), HERE, ("remap-head",), "safe", command
            )


@diagnosis("names-doubled", "model")
def names_doubled(case: Case, context: Context) -> Iterable[Finding]:
    """A prefix stands in the names twice or three times (model.model.model.): a save of a wrapped model by a function
    that put its own prefix before them again. Loaders find nothing.
    """
    prefix = re.compile(r"^((?:\w+\.)+?)\1")
    found = tuple(n for n in case.shapes if (m := prefix.match(n)) and m[1] not in ("decoder.", "encoder."))
    if found and len(found) >= len(case.shapes) - 2:
        text = f"{len(found)} of {len(case.shapes)} names have their prefix more than once"
        shown, command = folded(case, found), repair_command(case)
        yield Finding("names-doubled", "error", text, found, shown, HERE, ("mend-names",), "safe", command)


@diagnosis("names-in-memory", "model")
def names_in_memory(case: Case, context: Context) -> Iterable[Finding]:
    """The text model of a multi-modal one is named as newer or older versions of transformers have it
    (model.language_model. against language_model.model.). A version that knows the other spelling only makes the whole
    text model, or the whole image tower, RANDOM, with a warning at most; vLLM stops with a KeyError.
    """
    if "text_config" not in case.config and "vision_config" not in case.config:
        return
    new = tuple(
        n for n in case.shapes if n.startswith(("model.language_model.", "model.visual.", "model.vision_tower."))
    )
    old = tuple(n for n in case.shapes if n.startswith(("language_model.model.", "visual.", "vision_tower.")))
    if new and old:
        text = f"{len(new)} names are as in transformers from 4.52 on, {len(old)} as before: no version finds both"
        both = (*new, *old)
        yield Finding("names-in-memory", "error", text, both, folded(case, both), HERE, ("mend-names",), "unsafe")


DIAGNOSES = (
    names_wrapped,
    lora_unmerged,
    fsdp_flat,
    names_of_a_trainer,
    names_doubled,
    names_in_memory,
)
