"""A folder against a trainer's dialect, without the trainer: what its loader would do with the files that are there.

Names, shapes, files, config and tokenizer are read from headers; the backbone's names and shapes are compared with
what the class in config.json asks for (`converters.heads.whole`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converter.converters.heads.detect import detect, is_encoders_own
from converter.converters.heads.model import Linear, Mlp, Reading
from converter.converters.heads.read import read, values
from converter.converters.heads.whole import MISSHAPEN, MISSING, MISTYPED, UNEXPECTED, judge
from converter.core.checkpoint import Checkpoint
from converter.core.context import MAX_READ, Context
from converter.diagnostic import Command
from converter.dialects.known import Target
from converter.dialects.spec import HeadSpec, Role
from converter.errors import ConvertError
from converter.examine.verify.check import Check, fails, holds, note
from converter.examine.verify.config import check_config, check_normaliser, check_tokens
from converter.families.family import family, hidden_size
from converter.families.words import OUTPUT_PREFIXES, input_embedding
from converter.text import fold, show

_CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForImageClassification")
_ROLES: tuple[Role, ...] = ("critic", "reward", "actor")


@dataclass
class Verdict:
    """What a loader makes of a folder; `reading` is the folder as it reads it, None where it can't."""

    checks: list[Check] = field(default_factory=list)
    reading: Reading | None = None


def is_classifier_of_its_own(checkpoint: Checkpoint) -> bool:
    """True for a classifier whose head no trainer's dialect has: BERT's dense layer before its output, T5's, or one
    with several labels for each token, of which a critic has one.
    """
    listed = checkpoint.config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    if checkpoint.origin.kind != "model" or not first.endswith(_CLASSIFIERS):
        return False
    found = judge(checkpoint)
    is_nobodys = found.dialect is None or bool(_labels_of_tokens(checkpoint))
    is_of_class = is_nobodys and found.wanted is not None and found.wanted.name == first
    # Of an encoder no other head can be meant: what its class lacks is missing.
    return is_of_class and (not found.codes or is_encoders_own(checkpoint))


def _labels_of_tokens(checkpoint: Checkpoint) -> int:
    """How many labels each token has, where they are several; else 0."""
    found = judge(checkpoint)
    if found.wanted is None or not found.wanted.name.endswith("ForTokenClassification"):
        return 0
    heads = [s for n, s in found.wanted.saved.items() if found.wanted.is_outside(n) and len(s) == 2]
    return heads[-1][0] if heads and heads[-1][0] > 1 else 0


def check_own_class(checkpoint: Checkpoint, target: Target, context: Context, *, remedy: Command) -> Verdict:
    """A classifier as transformers' own class loads it: names, shapes and the tokenizer."""
    checks = _names(checkpoint, target, context, remedy, head_fails=False)
    first = show(checkpoint.config["architectures"][0])
    labels = _labels_of_tokens(checkpoint)
    how = f"with {labels} labels for each token" if labels else "more than one linear layer"
    text = f"the head is {first}'s own, {how}: transformers loads it, no trainer's critic does"
    # No encoder finds its token by the padding.
    tokens = [c for c in check_tokens(checkpoint, target) if c.code != "pad-token-missing"]
    return Verdict([note("head", "head-of-its-class", text), *checks, *tokens])


def check_for(checkpoint: Checkpoint, target: Target, context: Context, *, remedy: Command) -> Verdict:
    """Everything that the dialect says of a folder's content; `remedy` is the command that makes what it reads."""
    verdict = Verdict()
    checks = verdict.checks
    checks += _files(checkpoint, target, remedy)
    if target.role == "actor":
        checks += _actor(checkpoint, remedy)
    else:
        verdict.reading = _head(checkpoint, target, context, checks, remedy)
    checks += _names(checkpoint, target, context, remedy, head_fails=any(c.outcome == "fails" for c in checks))
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
    if any(n.startswith(OUTPUT_PREFIXES) for n in checkpoint.tensors) or kind.tied:
        return [holds("head", "output embedding there" if not kind.tied else "output embedding tied to the input's")]
    found = judge(checkpoint)
    if found.wanted is not None and MISSING not in found.codes:  # under a name of the class's own
        return [holds("head", f"everything there that {show(found.wanted.name)} asks for, the output embedding too")]
    text = "there is no output embedding (lm_head): the policy would start with a random one"
    return [fails("head", "lm-head-missing", text, remedy.with_options("--base", "BASE"))]


# The backbone


_FAILS: dict[str, Callable[[str, Command], Check]] = {
    MISSING: lambda text, remedy: fails("backbone", "backbone-missing", text, remedy),
    UNEXPECTED: lambda text, remedy: fails("backbone", "backbone-unknown", text, remedy),
    MISSHAPEN: lambda text, remedy: fails("backbone", "backbone-shape", text, remedy),
    MISTYPED: lambda text, remedy: fails("backbone", "backbone-type", text, remedy),
}


def _names(
    checkpoint: Checkpoint, target: Target, context: Context, remedy: Command, *, head_fails: bool
) -> list[Check]:
    """Every tensor against what the class in config.json asks for; an unknown family fails without consent.

    Args:
        head_fails: what is wrong with the head is said already, and not said again.
    """
    found = judge(checkpoint)
    if found.unknown:
        outcome = note if "family-unknown" in context.allow else fails
        return [outcome("backbone", "family-unknown", found.unknown)]
    checks = []
    outside = found.wanted.is_outside if found.wanted is not None else (lambda _: False)
    codes = [c for c in found.codes if not (head_fails and all(map(outside, found.names(c))))]
    for code in codes:
        text = found.words(code)
        if code == MISSING and target.dialect.container == "torch":
            text += "; they would be uninitialised memory"
        checks.append(_FAILS[code](text, remedy))
    if not found.codes:
        count = found.comparison.asked
        assert found.wanted is not None
        words = f"{count} tensors, names and shapes as {found.wanted.name} asks for ({found.wanted.source})"
        checks.append(holds("backbone", words))
    return checks


def _backbone(reading: Reading, target: Target, remedy: Command) -> list[Check]:
    """What a trainer's loader does with the embeddings and without an output embedding."""
    stored = {n: t.info.shape for n, t in reading.checkpoint.tensors.items()}
    found = _vocabulary(stored, target, remedy)
    embeddings = [n for n in stored if n.startswith(OUTPUT_PREFIXES)]
    spec = target.dialect.head_of(target.role)
    if spec is not None and spec.lm_head and not embeddings and not reading.family.tied:
        text = f"there is no lm_head: {target.words} starts it at random; values don't depend on it, a policy does"
        found.append(note("backbone", "lm-head-missing", text, remedy.with_options("--base", "BASE")))
    return found


def _vocabulary(stored: Mapping[str, tuple[int, ...]], target: Target, remedy: Command) -> list[Check]:
    """The embedding's rows against the multiple to which a loader resizes before it reads the file."""
    embedding, multiple = input_embedding(stored), target.dialect.vocab_multiple
    if multiple <= 1 or embedding is None or stored[embedding][0] % multiple == 0:
        return []
    text = f"{stored[embedding][0]} embedding rows are not a multiple of {multiple}, to which the loader resizes"
    return [fails("backbone", "vocabulary", text, remedy)]


def role_of(checkpoint: Checkpoint, offered: frozenset[Role]) -> Role:
    """The role that a folder says it has: by its class, where the trainer has it; else reward, else what there is."""
    listed = checkpoint.config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    guess: Role = "critic" if first.endswith(("CriticModel", "ForTokenClassification")) else "reward"
    if guess in offered or not offered:
        return guess
    return min(offered, key=_ROLES.index)
