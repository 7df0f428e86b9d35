"""Tensors against what the class in config.json asks for: missing, mis-shaped and left over; a rank's own slices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from converter.converters.heads.detect import Detected, detect
from converter.converters.heads.whole import (
    MISSHAPEN,
    MISSING,
    MISTYPED,
    UNEXPECTED,
    Judgement,
    is_of_another_class,
    rows_of_vocabulary,
)
from converter.core.context import Context
from converter.core.files.names import MODEL_CONFIG
from converter.diagnostic import Command, Next, Steps, as_argument
from converter.errors import ConvertError
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, Near, diagnosis, folded
from converter.examine.diagnoses.siblings import from_siblings
from converter.families.expected import Expected
from converter.sources.hf import broken
from converter.sources.rank_folders import ranks_in

_IN_A_LAYER = re.compile(r"(?:^|\.)\d+\.", re.ASCII)

_NOT_ALL_READ = (broken.OF_FILES - {"index-conflict", "tensor-twice"}) | frozenset(
    {"shard-missing", "index-phantom", "weights-missing", "no-tensors", "input-unreadable", "input-not-a-file"}
)
"""Faults of files that hide tensors: what is not read is not missing."""

_OTHER_MATTERS = ("_flat_param", ".base_layer.", ".lora_", ".modules_to_save.", ".original_module.")


def is_read_whole(case: Case) -> bool:
    """True where no file hides tensors: only there a name that nobody saw is a name that is missing."""
    return not any(f.code in _NOT_ALL_READ for f in case.survey.faults)


def judgement_of(case: Case) -> Judgement | None:
    """The model's tensors, judged; None where they can't be: no tensors, no config, LoRA in between."""
    if case.kind != "model" or not case.shapes or not case.config:
        return None
    if any(mark in name for name in case.shapes for mark in _OTHER_MATTERS):
        return None
    return case.judgement


def is_vocabulary_alone(case: Case) -> bool:
    """True where the rows of the embeddings are all that differs from config.json, and they are not a rank's half."""
    found = judgement_of(case)
    if found is None or found.unknown:
        return True
    wrong = found.comparison.misshapen
    rows = case.text_config.get("vocab_size")
    named = [n for n, (_, asked) in wrong.items() if asked[:1] == (rows,)]
    is_of_embeddings = any(not _IN_A_LAYER.search(n) for n in named)
    return is_of_embeddings and rows_of_vocabulary(wrong, named)


@diagnosis("tensors-missing", "model")
def tensors_missing(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors that the class in config.json asks for are in no file: a save that filtered too much, a merge that lost a
    module, one file of several without its index. transformers makes them RANDOM and lists them among `newly
    initialized`; vLLM and SGLang may start with memory that nobody wrote. `repair` fills them from the run's shards or
    from a proved copy; from the base model only where it is proved that training never changed them.
    """
    found = judgement_of(case)
    if found is not None and is_read_whole(case):
        yield from _finding(case, found, MISSING)


@diagnosis("tensors-misshapen", "model")
def tensors_misshapen(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors have other shapes than config.json implies. Where each is 1/n of what is asked for, the folder is one
    rank of n: tensor parallelism (AutoTP, vLLM's and Megatron's ranks) or FSDP saved its own slices as if they were the
    model. Never cut or pad a config to such shapes: the other ranks' files are the rest of the model.
    """
    found = judgement_of(case)
    if found is not None and not (found.comparison.misshapen and is_vocabulary_alone(case)):
        yield from _finding(case, found, MISSHAPEN)


@diagnosis("tensors-unexpected", "model")
def tensors_unexpected(case: Case, context: Context) -> Iterable[Finding]:
    """Tensors have names that nothing in the class asks for: a prefix of somebody's own class (`llm.`, `net.`), a head
    that the class lacks, leftovers of another model. Loaders pass over them, and where the model's own names are behind
    a prefix everything starts at RANDOM.
    """
    found = judgement_of(case)
    if found is not None:
        yield from _finding(case, found, UNEXPECTED)


@diagnosis("tensors-mistyped", "model")
def tensors_mistyped(case: Case, context: Context) -> Iterable[Finding]:
    """Weights are stored as integers, truths or narrow floats, and neither config.json (quantization_config) nor a
    scale beside them says what they stand for: a quantised file under a plain config, or a cast that went wrong.
    transformers reports nothing, and copies the numbers into the model's own type.
    """
    found = judgement_of(case)
    if found is not None:
        yield from _finding(case, found, MISTYPED)


@diagnosis("family-unknown", "model")
def family_unknown(case: Case, context: Context) -> Iterable[Finding]:
    """Neither our formulas nor the installed transformers know the class in config.json (remote code, a newer release):
    names and shapes are not checked, and nobody here can say that the folder is whole.
    """
    found = judgement_of(case)
    if found is not None and found.unknown and not found.refused:
        yield Finding(code="family-unknown", severity="cosmetic", text=found.unknown)


@diagnosis("config-refused", "model")
def config_refused(case: Case, context: Context) -> Iterable[Finding]:
    """The installed transformers knows the class in config.json and stops while it builds the model: numbers that do
    not fit each other (heads that do not divide the hidden size), a value of the wrong type, a dtype that torch lacks,
    an activation or a rotary embedding that is none. Or model_type is not there, is unknown, or is of another class
    than `architectures` names, and AutoModel goes by it: it stops, or loads the weights into another model, in part at
    random. Nothing loads such a folder as what it is, and names and shapes can't be checked.
    Take config.json from the base model or another checkpoint.
    """
    found = judgement_of(case)
    if found is not None and found.refused:
        yield Finding(code="config-refused", severity="error", text=found.unknown, evidence=(MODEL_CONFIG,))


def head_of_another_class(case: Case) -> Detected | None:
    """Whose head it is, where config.json names another class."""
    found = judgement_of(case)
    if found is None or found.wanted is None or found.dialect is not None:
        return None
    try:
        detected = detect(case.checkpoint)
    except ConvertError:
        return None
    if detected is None or not is_of_another_class(detected.dialect, case.config, found.wanted, case.shapes):
        return None
    return detected


def _finding(case: Case, found: Judgement, code: str) -> Iterator[Finding]:
    names = found.names(code)
    if not names or (found.wanted is not None and _is_of_head(case, found.wanted, names)):
        return
    near = _place(case)
    command: Next | None = None
    if code != UNEXPECTED:
        base = ("--base", case.base.folder) if case.base is not None else ()
        source = ("--weights-from", near.argument) if near is not None else ()
        known = case.command("repair", *source, *base, out="fixed")
        command = known if source or base else from_siblings(case, names)
    recoverability = LOST if near is None else f"from {near.asked}"
    if code == MISSHAPEN and found.slices is not None and len(ranks_in(case.root.parent)) == found.slices.ranks:
        command, recoverability = Command("gather", (as_argument(str(case.root.parent)), "OUT")), HERE
    elif found.prefix or code in (UNEXPECTED, MISTYPED) or (code == MISSING and found.comparison.is_renamed):
        command, recoverability = Steps("every tensor is listed by ", case.command("inspect", "--tensors")), ""
    yield Finding(
        code=code,
        severity="error",
        text=found.words(code),
        tensors=names,
        evidence=folded(case, names),
        recoverability=recoverability,
        fix=("fill",),
        applicability="display-only",
        next=command,
    )


def _is_of_head(case: Case, wanted: Expected, names: Iterable[str]) -> bool:
    """True where the names are those of a head that is another class's, which is a finding of its own."""
    return all(map(wanted.is_outside, names)) and head_of_another_class(case) is not None


def _place(case: Case) -> Near | None:
    return next(iter(case.training_near()), None)
