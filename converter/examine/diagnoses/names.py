"""Tensor names that no loader looks for: wrappers, unmerged LoRA, flat shards, other trainers' prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.core.context import Context
from converter.diagnostic import Severity
from converter.dialects.known import dialects
from converter.examine.diagnoses.aims import is_transformers_4
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis, folded
from converter.families.disk_names import MemoryForm, memory_form
from converter.families.words import IN_PEFT, INNER_WRAPPERS, LORA_MATRIX_WORD, OUTER_WRAPPERS
from converter.text import show

WRAPPER = re.compile(rf"(?:^|\.)(?:{'|'.join(INNER_WRAPPERS)})\.|^(?:{'|'.join(OUTER_WRAPPERS)})\.")
_ONE = re.compile(r"^(?P<layer>.+\.experts)\.\d+\.\w+(?:\.weight)?$", re.ASCII)
_FUSED = re.compile(
    r"^(?P<layer>.+\.experts)\.(?:gate_up_proj|down_proj|gate_proj|up_proj|w[123])(?:\.weight)?$", re.ASCII
)
_UNMERGED = re.compile(rf"\.(?:(?:{'|'.join(IN_PEFT)})\.|(?:{LORA_MATRIX_WORD})\b)")


@diagnosis("names-wrapped", "model")
def names_wrapped(case: Case, context: Context) -> Iterable[Finding]:
    """Names hold what torch.compile, DDP, FSDP or activation checkpointing put into them (_orig_mod., module.,
    _fsdp_wrapped_module.): loaders find none of them and go on with RANDOM weights, or stop at missing keys.
    """
    wrapped = tuple(n for n in case.shapes if WRAPPER.search(n))
    if wrapped:
        marks = sorted({m[0].strip(".") for n in wrapped if (m := WRAPPER.search(n))})
        text = f"{len(wrapped)} of {len(case.shapes)} names hold a wrapper's part: {', '.join(marks)}"
        shown, command = folded(case, wrapped), case.repair()
        yield Finding(
            code="names-wrapped",
            severity="error",
            text=text,
            tensors=wrapped,
            evidence=shown,
            recoverability=HERE,
            fix=("fix-names",),
            applicability="safe",
            next=command,
        )


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
            code="lora-unmerged",
            severity="error",
            text=text,
            tensors=inside,
            evidence=folded(case, inside),
            recoverability=HERE,
            fix=("split-lora",),
            applicability="unsafe",
            next=case.repair("--lora-alpha", "N"),
        )  # fmt: skip


@diagnosis("fsdp-flat", "model", "weights", "training")
def fsdp_flat(case: Case, context: Context) -> Iterable[Finding]:
    """Names with _flat_param: FSDP's local state dict. The shards are flat, and what they were before is in no file.
    Save with the sharded or the full state-dict type.
    """
    flat = tuple(n for n in case.shapes if "_flat_param" in n)
    if flat:
        text = f"{len(flat)} tensors are FSDP's flat parameters: their names and shapes were not saved"
        yield Finding(
            code="fsdp-flat",
            severity="error",
            text=text,
            tensors=flat,
            evidence=folded(case, flat),
            recoverability=LOST,
        )


@diagnosis("names-of-a-trainer", "model")
def names_of_a_trainer(case: Case, context: Context) -> Iterable[Finding]:
    """All names begin with a trainer's own prefix. That trainer loads them; transformers finds none of them and makes
    everything RANDOM, with a warning at most.
    """
    for dialect, prefix, whose in [(d, *each) for d in dialects().values() for each in d.wrapped]:
        found = tuple(n for n in case.shapes if n.startswith(prefix))
        reads_it = prefix == dialect.backbone and any(s.trainer == case.trainer for s in dialect.serves)
        if found and not reads_it:
            text = f"{len(found)} of {len(case.shapes)} names begin with `{prefix}`: {whose}"
            command = case.command("critic-to-rm", "--to", "trl", out="converted")
            yield Finding(
                code="names-of-a-trainer",
                severity="error",
                text=text,
                tensors=found,
                evidence=folded(case, found),
                recoverability=HERE,
                fix=("remap-head",),
                applicability="safe",
                next=command,
            )


_TWICE_BY_DESIGN = frozenset({"shieldgemma2"})
"""Model types whose names begin with `model.model.`: a class around a whole model."""


@diagnosis("names-doubled", "model")
def names_doubled(case: Case, context: Context) -> Iterable[Finding]:
    """A prefix stands in the names twice or three times (model.model.model.), or one that is not theirs before them
    (model.lm_head, PEFT's base_model.model.): a save of a wrapped model by a function that put its own prefix before
    them again. Loaders find nothing of it.
    """
    if any(_UNMERGED.search(n) for n in case.shapes) or str(case.config.get("model_type")) in _TWICE_BY_DESIGN:
        return
    plain = case.plain
    found = tuple(n for n in plain.changed if not WRAPPER.search(n))
    if found:
        text = (
            f"{len(found)} of {len(case.shapes)} names have a prefix that is not theirs: "
            f"{show(found[0])} is {show(plain.names[found[0]])}"
        )
        shown, command = folded(case, found), case.repair()
        yield Finding(
            code="names-doubled",
            severity="error",
            text=text,
            tensors=found,
            evidence=shown,
            recoverability=HERE,
            fix=("fix-names",),
            applicability="safe",
            next=command,
        )


@diagnosis("names-in-memory", "model")
def names_in_memory(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors are named as transformers has them in memory (model.language_model., model.visual., experts stacked into
    one tensor), not as its save_pretrained names them (language_model.model., visual., experts one by one): what
    torch.save(model.state_dict()) or a merge of FSDP's shards leaves. transformers 5 loads either; versions 4, and
    engines that look for the names on disk, stop with a KeyError or make the whole text model, the image tower or the
    experts RANDOM. Where both forms lie in one folder no older version finds all, and what is there twice may differ.
    """
    if str(case.config.get("model_type")) in _TWICE_BY_DESIGN:
        return
    form = _form(case)
    if form is None or not (form.renamed or form.apart):
        yield from _both_spellings(case)
        return
    stacks = {n: next(iter(parts)) for n, parts in form.apart.items() if n not in _stacks_twice(case, form)}
    made = {**form.renamed, **stacks}
    if not made:
        return
    named, twice = tuple(made), _twice(case, form)
    first, disk = next(iter(made.items()))
    text = f"{len(named)} of {len(case.shapes)} tensors are named as in memory: {show(first)} is {show(disk)} on disk"
    if twice:
        text += f"; {len(twice)} are there under both names, and what counts depends on the loader"
    elif form.on_disk:
        text += f"; {form.on_disk} others are named as on disk: versions of transformers before 5 do not find both"
    elif not is_transformers_4(case.target):
        text += "; transformers 5 loads either, others look for the names on disk"
    is_serious = bool(twice or form.on_disk or is_transformers_4(case.target))
    yield _disk_names(case, "names-in-memory", "error" if is_serious else "cosmetic", text, named)


@diagnosis("experts-twice", "model")
def experts_twice(case: Case, context: Context) -> Iterable[Finding]:
    """A layer's experts are there one by one and fused into one tensor (transformers 5 fuses them when it loads): two
    saves in one folder, perhaps with different values. transformers 5 stops at them; which form counts elsewhere
    depends on the loader, and one that knows the other form only makes RANDOM experts. `repair` keeps them once, one by
    one, if the values are equal, and refuses if they differ.
    """
    single = {m["layer"]: n for n in case.shapes if (m := _ONE.match(n))}
    fused = {m["layer"]: n for n in case.shapes if (m := _FUSED.match(n))}
    both = {fused[layer]: single[layer] for layer in sorted(single.keys() & fused.keys())}
    form = _form(case) if fused else None
    if form is not None:
        both |= _stacks_twice(case, form)
    if both:
        names = tuple(n for pair in both.items() for n in pair)
        text = f"experts are stored one by one and fused ({len(both)} stacks): what counts depends on the loader"
        if form is not None and form.apart and not form.unclear:
            yield _disk_names(case, "experts-twice", "error", text, names)
        else:
            yield Finding(
                code="experts-twice", severity="error", text=text, tensors=names, evidence=folded(case, names)
            )


def _form(case: Case) -> MemoryForm | None:
    """What is named as in memory, wrappers taken off; None where that can't be told."""
    return memory_form({n: case.survey.entries[raw].tensor for raw, n in case.plain.names.items()}, case.config)


def _twice(case: Case, form: MemoryForm) -> list[str]:
    """Names in memory of tensors that are there under their names on disk too."""
    plain = {n for n in case.shapes if n not in form.renamed}
    return [n for n, disk in form.renamed.items() if disk in plain]


def _stacks_twice(case: Case, form: MemoryForm) -> dict[str, str]:
    """Stacks of experts of which one at least is there by itself, with that one."""
    plain = frozenset(case.shapes)
    found = {stack: next((d for d in parts if d in plain), "") for stack, parts in form.apart.items()}
    return {stack: one for stack, one in found.items() if one}


def _disk_names(case: Case, code: str, severity: Severity, text: str, names: tuple[str, ...]) -> Finding:
    shown, command = folded(case, names), case.repair()
    return Finding(
        code=code,
        severity=severity,
        text=text,
        tensors=names,
        evidence=shown,
        recoverability=HERE,
        fix=("fix-disk-names",),
        applicability="safe",
        next=command,
    )


def _both_spellings(case: Case) -> Iterable[Finding]:
    """Both spellings of a multi-modal model whose class the table of names does not have: no rename is proved."""
    if "text_config" not in case.config and "vision_config" not in case.config:
        return
    new = tuple(
        n for n in case.shapes if n.startswith(("model.language_model.", "model.visual.", "model.vision_tower."))
    )
    old = tuple(n for n in case.shapes if n.startswith(("language_model.model.", "visual.", "vision_tower.")))
    if new and old:
        text = f"{len(new)} names are as in transformers from 4.52 on, {len(old)} as before: no version 4 finds both"
        both = (*new, *old)
        yield Finding(
            code="names-in-memory",
            severity="error",
            text=text,
            tensors=both,
            evidence=folded(case, both),
            recoverability=HERE,
        )
