"""Faults of a tokenizer's files that a load of the model does not show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from converter.core.context import Context
from converter.core.files import sparse
from converter.diagnostic import Severity
from converter.examine.diagnoses.case import Case, Finding, diagnosis
from converter.examine.token_faults import TokenFault, text_rows, token_faults


def _found(case: Case, code: str) -> list[TokenFault]:
    def find(case: Case) -> list[TokenFault]:
        if not case.deep and any(case.root.is_relative_to(each) for each in sparse.folders):
            return []  # of a model on the Hub headers are read, and no file of 17 MB
        rows = text_rows(case.shapes) if case.kind == "model" else None
        return list(token_faults(case.names, lambda name: _read(case, name), case.text_config, rows))

    return [each for each in case.once("token faults", find) if each.code == code]


def _read(case: Case, name: str) -> Mapping[str, Any]:
    error = case.json_error(name)
    if error is not None:
        raise error
    return case.json(name)


@diagnosis("tokenizer-broken", "model", "adapter")
def tokenizer_broken(case: Case, context: Context) -> Iterable[Finding]:
    """The tokenizer's files are no tokenizer: one is cut or no JSON, or tokenizer_config.json lies alone, without the
    file that has the vocabulary (tokenizer.json, tokenizer.model, vocab.json). transformers 5 makes a tokenizer of two
    tokens of the latter and says nothing. Copy the files of the base model or of another checkpoint. Of a model on the
    Hub the files are read under --deep.
    """
    for each in _found(case, "tokenizer-broken"):
        yield Finding(code="tokenizer-broken", severity="error" if each.is_serious else "cosmetic", text=each.text)


@diagnosis("tokens-without-rows", "model")
def tokens_without_rows(case: Case, context: Context) -> Iterable[Finding]:
    """The tokenizer has tokens for which the embedding has no row: tokens were added and the embedding was not resized,
    or the weights are those of a checkpoint before. A text with such a token stops with `index out of range in self`,
    on a GPU with `device-side assert triggered`. A special token that the vocabulary lacks is added by the load itself,
    and an end-of-text number beyond the vocabulary ends no answer. A few tokens that no setting names may be another
    model's, of images where this one has none, and a tokenizer of another size belongs to small models for tests:
    both are named and are no fault.
    """
    for each in _found(case, "tokens-without-rows"):
        severity: Severity = "changes-numbers" if each.is_serious else "cosmetic"
        yield Finding(code="tokens-without-rows", severity=severity, text=each.text)
