"""Tied embeddings: what the config says, what is stored, and whether both agree."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.core.context import Context
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.config import architecture, is_classifier
from converter.examine.diagnoses.places import heads_among
from converter.text import show

_OUTPUTS = ("lm_head.weight", "embed_out.weight")
_INPUTS = ("model.embed_tokens.weight", "transformer.wte.weight", "gpt_neox.embed_in.weight", "embed_tokens.weight")
_INPUT = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight$")
_LAYER = re.compile(r"\.\d+\.", re.ASCII)


def _ties(case: Case) -> bool | None:
    """What the config says of tying; None where it says nothing, and the class's default counts."""
    for config in (case.config, case.text_config):
        value = config.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None


def _pair(case: Case) -> tuple[str | None, str | None]:
    stored = {n: i for n, i in case.shapes.items() if i.numel}
    return next((n for n in _INPUTS if n in stored), None), next((n for n in _OUTPUTS if n in stored), None)


@diagnosis("output-embedding-missing", "model")
def output_embedding_missing(case: Case, context: Context) -> Iterable[Finding]:
    """The config says that the output embedding is a tensor of its own (tie_word_embeddings false), and the file has
    none: the loader makes a RANDOM one and says so in one line of its report. Either the base model ties them, and the
    flag got lost, or the tensor was not saved.
    """
    _, outputs = _pair(case)
    inputs = _input(case)
    is_causal = architecture(case).endswith(("ForCausalLM", "LMHeadModel"))
    if is_causal and _ties(case) is False and inputs and outputs is None and not _is_named_otherwise(case, inputs):
        text = f"tie_word_embeddings is false and there is no output embedding; {show(inputs)} is there"
        yield Finding(
            code="output-embedding-missing",
            severity="error",
            text=text,
            tensors=(inputs,),
            evidence=folded(case, [inputs]),
            recoverability="from the base model",
        )


def _input(case: Case) -> str | None:
    """The input embedding. Under a name of another class only where no head says that this is a reward model, as
    DeepSpeed-Chat's, whose config names the language model that it began as.
    """
    inputs, _ = _pair(case)
    if inputs is not None or heads_among(case.shapes):
        return inputs
    size = case.text_config.get("vocab_size")
    if not isinstance(size, int):
        return None
    named = (n for n, i in case.shapes.items() if _INPUT.search(n) and len(i.shape) == 2 and i.shape[0] >= size)
    return next(named, None)


def _is_named_otherwise(case: Case, inputs: str) -> bool:
    """True where another matrix with a row for each token lies outside of the layers, such as `head.weight`."""
    rows = case.shapes[inputs].shape[0]
    found = (n for n, i in case.shapes.items() if len(i.shape) == 2 and i.shape[0] == rows and n != inputs)
    return any(not _LAYER.search(n) for n in found)


@diagnosis("tied-copies", "model")
def tied_copies(case: Case, context: Context) -> Iterable[Finding]:
    """The config ties input and output embedding, and both are stored. Where they are equal, some engines stop at the
    second one (`KeyError: 'lm_head.weight'`), and it only takes room. Where they differ, loaders throw the stored
    output embedding away and use the input's: what was trained is lost without a word. `--deep` compares them.
    """
    inputs, outputs = _pair(case)
    if _ties(case) is not True or inputs is None or outputs is None or is_classifier(case):
        return
    a, b = case.survey.entries[inputs].tensor, case.survey.entries[outputs].tensor
    pair = (inputs, outputs)
    command = case.repair()
    if a.info != b.info or (case.deep and not context.equal(a, b)):
        text = f"tie_word_embeddings is true, and {show(outputs)} differs from {show(inputs)}: loaders throw it away"
        yield Finding(
            code="tied-copies",
            severity="changes-numbers",
            text=text,
            tensors=pair,
            evidence=folded(case, pair),
            recoverability=HERE,
            fix=("mend-ties",),
            applicability="unsafe",
            next=command.with_options("--allow", "untie"),
        )  # fmt: skip
    else:
        said = "equal" if case.deep else "whether they are equal is seen with --deep"
        text = f"tie_word_embeddings is true, and {show(outputs)} is stored beside {show(inputs)}; {said}"
        yield Finding(
            code="tied-copies",
            severity="cosmetic",
            text=text,
            tensors=pair,
            evidence=folded(case, pair),
            recoverability=HERE,
            fix=("mend-ties",),
            applicability="safe",
            next=command,
        )


@diagnosis("output-embedding-in-classifier", "model")
def output_embedding_in_classifier(case: Case, context: Context) -> Iterable[Finding]:
    """A reward model or critic keeps the language model's output embedding. Loaders say `weights not used:
    ['lm_head.weight']`, which is harmless; it takes room, and some engines stop at it.
    """
    _, outputs = _pair(case)
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


DIAGNOSES = (output_embedding_missing, tied_copies, output_embedding_in_classifier)
