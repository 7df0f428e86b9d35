"""Tied embeddings: what the config says, what is stored, and whether both agree."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.converters.heads.whole import MISSING
from converter.core.context import Context
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.config import architecture, is_classifier
from converter.examine.diagnoses.places import heads_among
from converter.examine.diagnoses.whole import is_read_whole, judgement_of
from converter.families.ties import Tie, is_output, is_said, stored_pair, tie_word, ties, version
from converter.families.words import DECODER_CLASSES, OUTPUTS, input_embedding
from converter.text import show

_LAYER = re.compile(r"\.\d+\.", re.ASCII)


@diagnosis("output-embedding-missing", "model")
def output_embedding_missing(case: Case, context: Context) -> Iterable[Finding]:
    """The config says that the output embedding is a tensor of its own (tie_word_embeddings false), and the file has
    none: the loader makes a RANDOM one and says so in one line of its report. Either the base model ties them, and the
    flag got lost, or the tensor was not saved.
    """
    stored = [n for n, i in case.shapes.items() if i.numel]
    inputs, outputs = stored_pair(stored, case.config)
    inputs = inputs or _input(case)
    if not architecture(case).endswith(DECODER_CLASSES) or tie_word(case.config) is not False:
        return
    if not is_read_whole(case):
        return
    if outputs is not None or heads_among(case.shapes) or any(is_output(n) for n in stored):
        return
    if inputs is not None and not _is_named_otherwise(case, inputs):
        text = f"tie_word_embeddings is false and there is no output embedding; {show(inputs)} is there"
        found = judgement_of(case)
        lacks = [] if found is None or found.wanted is None else filter(found.wanted.is_outside, found.names(MISSING))
        text += "".join(f", and {show(n)} is not" for n in lacks)
        yield Finding(
            code="output-embedding-missing",
            severity="error",
            text=text,
            tensors=(inputs,),
            evidence=folded(case, [inputs]),
            recoverability="from the base model",
        )


def _input(case: Case) -> str | None:
    """The input embedding under a name of another class, unless a head says that this is a reward model, as
    DeepSpeed-Chat's, whose config names the language model that it began as.
    """
    size = case.text_config.get("vocab_size")
    if heads_among(case.shapes) or not isinstance(size, int):
        return None
    return input_embedding(n for n, i in case.shapes.items() if len(i.shape) == 2 and i.shape[0] >= size)


def _is_named_otherwise(case: Case, inputs: str) -> bool:
    """True where another matrix with a row for each token lies outside of the layers, such as `head.weight`."""
    rows = case.shapes[inputs].shape[0]
    found = (n for n, i in case.shapes.items() if len(i.shape) == 2 and i.shape[0] == rows and n != inputs)
    return any(not _LAYER.search(n) for n in found)


@diagnosis("tied-copies", "model")
def tied_copies(case: Case, context: Context) -> Iterable[Finding]:
    """The model ties input and output embedding, and both are stored. Where they are equal, some engines stop at the
    second one (`KeyError: 'lm_head.weight'`), and it only takes room. Where they differ, loaders differ: transformers 5
    keeps both, transformers 4 drops the output embedding and uses the input's without a word. `--deep` compares them.
    """
    if is_classifier(case):
        return
    stored = [n for n, i in case.shapes.items() if i.numel]
    for tie in ties(stored, case.config):
        first, *rest = (n for n in tie.names if n in stored)
        for other in rest:
            yield from _copies(case, context, tie, first, other)


def _copies(case: Case, context: Context, tie: Tie, first: str, other: str) -> Iterable[Finding]:
    a, b = case.survey.entries[first].tensor, case.survey.entries[other].tensor
    pair, command = (first, other), case.repair()
    silent = "config.json does not mention tie_word_embeddings, and its model type ties"
    why = "tie_word_embeddings is true" if is_said(case.config) else silent
    if tie_word(case.config) is False and case.text_config.get("tie_word_embeddings") is True:
        why = "tie_word_embeddings is false, and true in text_config"
    if a.info != b.info or (case.deep and not context.equal(a, b)):
        if tie.older:  # else every release keeps both
            text = (
                f"{why}, and {show(other)} differs from {show(first)}: "
                f"transformers 5 keeps both, transformers 4 drops {show(other)}"
            )
            measured = f"measured with transformers {version()} and {version(older=True)}"
            yield Finding(
                code="tied-copies",
                severity="changes-numbers",
                text=text,
                tensors=pair,
                evidence=(*folded(case, pair), measured),
                recoverability=HERE,
                fix=("fix-ties",),
                applicability="unsafe",
                next=command.with_options("--allow", "untie"),
            )
    elif tie.newer:
        said = "equal" if case.deep else "whether they are equal is seen with --deep"
        text = f"{why}, and {show(other)} is stored beside {show(first)}; {said}"
        yield Finding(
            code="tied-copies",
            severity="cosmetic",
            text=text,
            tensors=pair,
            evidence=folded(case, pair),
            recoverability=HERE,
            fix=("fix-ties",),
            applicability="safe",
            next=command,
        )


@diagnosis("output-embedding-in-classifier", "model")
def output_embedding_in_classifier(case: Case, context: Context) -> Iterable[Finding]:
    """A reward model or critic keeps the language model's output embedding. Loaders say `weights not used:
    ['lm_head.weight']`, which is harmless; it takes room, and some engines stop at it.
    """
    outputs = next((n for n in OUTPUTS if n in case.shapes and case.shapes[n].numel), None)
    if outputs is not None and is_classifier(case):
        text = f"{show(outputs)} has no place in {show(architecture(case))}; loaders say `weights not used`"
        yield Finding(
            code="output-embedding-in-classifier",
            severity="cosmetic",
            text=text,
            tensors=(outputs,),
            evidence=folded(case, [outputs]),
            recoverability=HERE,
        )
