"""A folder against a trainer's dialect, without the trainer: what its loader would do with the files that are there.

Names, shapes, files, config and tokenizer are read from headers; the backbone's names and shapes are compared with
those of the model that transformers builds from the config, on the meta device, where transformers knows the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from converter.converters.heads.detect import detect
from converter.converters.heads.model import Linear, Mlp, Reading
from converter.converters.heads.read import OUTPUT_EMBEDDINGS, read, values
from converter.core.checkpoint import Checkpoint
from converter.core.context import MAX_READ, Context
from converter.diagnostic import Command
from converter.dialects.known import Target
from converter.dialects.spec import HeadSpec, Role
from converter.errors import ConvertError
from converter.examine.verify.check import Check, fails, holds, note
from converter.examine.verify.config import check_config, check_normaliser, check_tokens
from converter.families.family import family, hidden_size
from converter.text import fold, show

_ROLES: tuple[Role, ...] = ("critic", "reward", "actor")


@dataclass
class Verdict:
    """What a loader makes of a folder; `reading` is the folder as it reads it, None where it can't."""

    checks: list[Check] = field(default_factory=list)
    reading: Reading | None = None


def check_for(checkpoint: Checkpoint, target: Target, context: Context, *, remedy: Command) -> Verdict:
    """Everything that the dialect says of a folder's content; `remedy` is the command that makes what it reads."""
    verdict = Verdict()
    checks = verdict.checks
    checks += _files(checkpoint, target, remedy)
    if target.role == "actor":
        checks += _actor(checkpoint, remedy)
    else:
        verdict.reading = _head(checkpoint, target, context, checks, remedy)
    reading = verdict.reading
    if reading is not None:
        checks += _backbone(reading, target, remedy)
        checks += check_normaliser(reading, target)
    checks += check_config(checkpoint, target, remedy)
    checks += check_tokens(checkpoint, target)
    return verdict


# Files


def _files(checkpoint: Checkpoint, target: Target, remedy: Command) -> list[Check]:
    """The container, the number of files, the folder below."""
    dialect, found = target.dialect, []
    stored = checkpoint.origin.stored_format
    if dialect.container == "torch" and stored == "safetensors":
        text = f"{target.words} reads pytorch_model.bin alone, and the weights are safetensors: it would load nothing"
        found.append(fails("files", "container", text, remedy))
    files = sorted({*checkpoint.shards.values()})
    if dialect.one_file and len(files) > 1:
        text = f"{target.words} reads no sharded folder, and there are {len(files)} files: {fold(files)}"
        found.append(fails("files", "sharded", text, remedy))
    if dialect.subfolder and checkpoint.subfolder != dialect.subfolder:
        text = f"{target.words} looks for weights in {dialect.subfolder}/, where there are none"
        found.append(fails("files", "subfolder", text, remedy))
    return found


# The head


def _head(
    checkpoint: Checkpoint, target: Target, context: Context, checks: list[Check], remedy: Command
) -> Reading | None:
    spec = target.dialect.head_of(target.role)
    if spec is None:
        return None
    try:
        reading = read(checkpoint, target.dialect, context)
    except ConvertError as error:
        checks.append(fails("head", error.code, _instead(checkpoint, target, spec, error.what), remedy))
        return None
    checks += _head_shape(reading, target, spec, context, remedy)
    return reading


def _instead(checkpoint: Checkpoint, target: Target, spec: HeadSpec, what: str) -> str:
    """What is wrong with the head, what the loader does about it, and whose head it is."""
    try:
        other = detect(checkpoint)
    except ConvertError:
        other = None
    owner = f"; this is {other.dialect.about}'s folder ({other.reason})" if other is not None else ""
    return f"{what}. {target.words} would go on with a head that is {spec.missing}{owner}"


def _head_shape(reading: Reading, target: Target, spec: HeadSpec, context: Context, remedy: Command) -> list[Check]:
    head = reading.head
    if head is None:
        return [fails("head", "head-missing", f"there is no head, and {target.words} needs one", remedy)]
    found: list[Check] = []
    names = fold(reading.stored)
    if spec.kind == "mlp" and isinstance(head, Mlp):
        units, hidden = head.first.rows, hidden_size(reading.checkpoint.config)
        if spec.width and hidden and units != spec.width * hidden:
            text = f"{names}: {units} hidden units, and {target.words} builds {spec.width * hidden}; its loader raises"
            found.append(fails("head", "head-shape", text, remedy))
    if head.rows != 1 and not target.serves.labels:
        text = f"{names} has {head.rows} rows, and {target.words} builds one: its loader raises a size mismatch"
        found.append(fails("head", "head-rows", text, remedy))
    hidden = hidden_size(reading.checkpoint.config)
    weight = head.weight if isinstance(head, Linear) else head.first.weight
    if hidden is not None and weight.info.shape[-1] != hidden:
        text = f"{names} is {list(weight.info.shape)}, and the hidden size is {hidden}: the loader raises"
        found.append(fails("head", "head-shape", text, remedy))
    found += _head_bias(reading, target, spec, context, remedy)
    found += _head_numbers(reading, context)
    if found and any(c.outcome == "fails" for c in found):
        return found
    dtype = weight.info.dtype.value
    return [holds("head", f"{names} {list(weight.info.shape)} {dtype}, as {target.words} names it"), *found]


def _head_bias(reading: Reading, target: Target, spec: HeadSpec, context: Context, remedy: Command) -> list[Check]:
    """A bias where the loader has none is left out without a word, and every score shifts by it."""
    head = reading.head
    if not isinstance(head, Linear) or head.bias is None:
        if spec.bias == "always" and isinstance(head, Linear):
            return [note("head", "head-bias-missing", f"there is no bias; {target.words} starts it at zero")]
        return []
    keeps = spec.bias == "always" or (spec.bias == "config" and bool(reading.checkpoint.config.get("bias")))
    if keeps:
        return []
    shift = values(head.bias, context) if head.bias.info.nbytes <= MAX_READ else ()
    if all(v == 0 for v in shift):
        return [note("head", "head-bias-ignored", f"the head has a bias of zero, which {target.words} ignores")]
    text = (
        f"{target.words} has no bias and ignores this one: every score shifts by {', '.join(f'{-v:g}' for v in shift)}"
    )
    return [fails("head", "head-bias", text, remedy)]


def _head_numbers(reading: Reading, context: Context) -> list[Check]:
    """A head that isn't finite is broken; one of zeros was never trained."""
    for name, tensor in reading.stored.items():
        if not name.endswith("weight") or tensor.info.nbytes > MAX_READ or not tensor.info.numel:
            continue
        try:
            numbers = values(tensor, context)
        except ConvertError:
            continue
        if not all(map(math.isfinite, numbers)):
            return [fails("head", "nonfinite", f"{show(name)} holds values that are not finite")]
        if not any(numbers) and not isinstance(reading.head, Mlp):
            return [note("head", "head-zero", f"{show(name)} is zero everywhere: a fresh head, not a trained one")]
    return []


def _actor(checkpoint: Checkpoint, remedy: Command) -> list[Check]:
    kind = family(checkpoint.config)
    if any(n.startswith(OUTPUT_EMBEDDINGS) for n in checkpoint.tensors) or kind.tied:
        return [holds("head", "output embedding there" if not kind.tied else "output embedding tied to the input's")]
    text = "there is no output embedding (lm_head): the policy would start with a random one"
    return [fails("head", "lm-head-missing", text, remedy.with_options("--base", "BASE"))]


# The backbone


def _backbone(reading: Reading, target: Target, remedy: Command) -> list[Check]:
    """Names and shapes against those of the model that transformers builds from this config."""
    found: list[Check] = []
    prefix = reading.family.prefix
    stored = {n: t.info.shape for n, t in reading.checkpoint.tensors.items()}
    embeddings = [n for n in stored if n.startswith(OUTPUT_EMBEDDINGS)]
    spec = target.dialect.head_of(target.role)
    if spec is not None and spec.lm_head and not embeddings and not reading.family.tied:
        text = f"there is no lm_head: {target.words} starts it at random; values don't depend on it, a policy does"
        found.append(note("backbone", "lm-head-missing", text, remedy.with_options("--base", "BASE")))
    if prefix is None:
        text = f"transformers doesn't know {reading.family.words()}: names are not compared"
        return [*found, note("backbone", "family-unknown", text)]
    wanted = expected_backbone(reading.checkpoint.config)
    if wanted is None:
        text = f"{reading.family.words()} is renamed on loading: names are not compared"
        return [*found, note("backbone", "family-renamed", text)]
    own = {n.removeprefix(prefix): s for n, s in stored.items() if n not in embeddings}
    missing = [prefix + n for n in wanted if n not in own]
    unknown = [
        prefix + n for n in own if n not in wanted and not n.endswith((".inv_freq", ".masked_bias", ".attn.bias"))
    ]
    other = [prefix + n for n, s in own.items() if n in wanted and wanted[n] != s]
    if missing:
        text = f"{len(missing)} of {len(wanted)} backbone tensors are missing: {fold(missing)}; {_silently(target)}"
        found.append(fails("backbone", "backbone-missing", text, remedy))
    if unknown:
        text = f"{len(unknown)} tensors belong to nothing that {target.words} builds: {fold(unknown)}"
        found.append(fails("backbone", "backbone-unknown", text, remedy))
    if other:
        first = other[0].removeprefix(prefix)
        text = f"{fold(other)}: {list(own[first])} in the file, {list(wanted[first])} in the model: size mismatch"
        found.append(fails("backbone", "backbone-shape", text, remedy))
    if not (missing or unknown or other):
        named = target.dialect.backbone.replace("{P}", prefix)
        found.insert(0, holds("backbone", f"{len(own)} tensors, `{named}*`, names and shapes as the model's"))
    rows = next((s[0] for n, s in own.items() if n.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if target.dialect.vocab_multiple > 1 and rows is not None and rows % target.dialect.vocab_multiple:
        text = f"{rows} embedding rows are no multiple of {target.dialect.vocab_multiple}, to which the loader resizes"
        found.append(fails("backbone", "vocabulary", text, remedy))
    return found


def _silently(target: Target) -> str:
    return "they would be uninitialised memory" if target.dialect.container == "torch" else "they would be random"


def expected_backbone(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of `AutoModel` for a config, without its prefix; None where files have other names than it."""
    import torch
    from transformers import AutoConfig, AutoModel

    kind = family(config).kind
    try:
        if _is_renamed(kind):
            return None
        known = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
        with torch.device("meta"):
            model = AutoModel.from_config(known)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    kept = {n: tuple(t.shape) for n, t in model.named_parameters()}
    kept |= {n: tuple(t.shape) for n, t in model.state_dict().items()}
    return kept


def _is_renamed(kind: str) -> bool:
    """Whether transformers changes this family's names while it loads (experts that are fused, for one)."""
    try:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    except ImportError:
        return False
    return bool(get_checkpoint_conversion_mapping(kind))


def role_of(checkpoint: Checkpoint, offered: frozenset[Role]) -> Role:
    """The role that a folder says it has: by its class, where the trainer has it; else reward, else what there is."""
    listed = checkpoint.config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    guess: Role = "critic" if first.endswith(("CriticModel", "ForTokenClassification")) else "reward"
    if guess in offered or not offered:
        return guess
    return min(offered, key=_ROLES.index)
