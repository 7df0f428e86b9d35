"""The vocabulary reconciled: embeddings, config and tokenizer of one height, as the user says.

Training pads embeddings to a multiple of 8, 64 or 128, added tokens make them grow, and engines stop where the config
says another number than the embeddings have. Rows that no token has can be cut, and rows that none will have can be
added; both are asked for by name, and a row that a token has is never cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.names import ADDED_TOKENS, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from converter.core.side_files import side_json
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused, UsageError
from converter.families.words import INPUT_MODULES, NOT_TEXT, OTHER_INPUT_MODULES, OTHER_OUTPUT_MODULES, OUTPUT_MODULES
from converter.text import fold, show

MOST_ROWS = 100_000_000

_SURE = frozenset((*INPUT_MODULES, *OUTPUT_MODULES))
_MODULES = _SURE | {*OTHER_INPUT_MODULES, *OTHER_OUTPUT_MODULES}
"""Modules that may have a row for each token; those that are not sure are told by their height."""

_LEAVES = ("weight", "bias")
_NOT_TEXT = (*NOT_TEXT, "position")


@dataclass(frozen=True)
class Vocabulary:
    """Give input and output embeddings and the config one vocabulary.

    Rows are cut with `--allow vocabulary-trim`, and added, zero-filled, with `--allow vocabulary-padding`.

    Attributes:
        to: `rows`: the config says as many as the embeddings have; `tokenizer`: the embeddings have a row for each of
            the tokenizer's tokens, and no more; a number: that many rows.
    """

    name: ClassVar[str] = "vocabulary"

    to: Literal["rows", "tokenizer"] | int

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with one vocabulary.

        Raises:
            UsageError: an adapter, or a number of rows that no vocabulary has (`usage`).
            Refused: no embedding is known by its name (`vocabulary-unknown`), heights that differ where the config
                shall follow (`vocab-mismatch`), no tokenizer to count by (`tokenizer-unknown`), a token whose row
                would be cut (`vocabulary-in-use`), or no consent (`vocabulary-trim`, `vocabulary-padding`).
        """
        if checkpoint.origin.kind == "adapter":
            what = "an adapter has the vocabulary of its base; reconcile the merged model"
            raise UsageError(
                "usage",
                what,
                where=show(checkpoint.origin.asked),
                next=Command("merge-lora", (checkpoint.origin.asked, "OUT")),
            )
        held = vocabulary_tensors(checkpoint)
        if not held:
            what = "no embedding is known by its name, so its rows can't be told from others"
            raise Refused("vocabulary-unknown", what, where=show(checkpoint.origin.asked))
        if self.to == "rows":
            return with_rows_in_config(checkpoint, context)
        _expect_no_other(held, checkpoint)
        wanted = self._wanted(checkpoint)
        longer = [n for n, t in held.items() if t.info.shape[0] > wanted]
        shorter = [n for n, t in held.items() if t.info.shape[0] < wanted]
        if longer:
            _expect_unused(checkpoint, wanted, context)
            _consent("vocabulary-trim", "cuts {} rows of", longer, held, wanted, checkpoint, context)
        if shorter:
            _consent("vocabulary-padding", "adds {} zero-filled rows to", shorter, held, wanted, checkpoint, context)
        new = {n: _of_height(held[n], wanted) if n in held else t for n, t in checkpoint.tensors.items()}
        return with_rows_in_config(checkpoint.replace(tensors=new), context)

    def _wanted(self, checkpoint: Checkpoint) -> int:
        if isinstance(self.to, int):
            if not 0 < self.to <= MOST_ROWS:
                raise UsageError(
                    "usage", f"{self.to} is not a number of tokens", expected="rows, tokenizer or a number"
                )
            return self.to
        count = tokens_of(checkpoint.side_files)
        if count is None:
            raise _no_tokenizer(checkpoint)
        return count


def vocabulary_tensors(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Input and output embeddings and output biases, by name: one row for each token.

    A module is known by its name; a classifier's `decoder.weight` or an audio tower's embedding is not one of them, as
    its height is neither the config's vocabulary nor that of the input embedding.
    """
    named = {n: t for n, t in checkpoint.tensors.items() if _is_named_so(n) and len(t.info.shape) in (1, 2)}
    inputs = [t for n, t in named.items() if _module(n) in INPUT_MODULES]
    heights = {t.info.shape[0] for t in inputs if len(t.info.shape) == 2}
    heights |= {s for s in (text_config(checkpoint.config).get("vocab_size"),) if isinstance(s, int)}
    return {n: t for n, t in named.items() if _module(n) in _SURE or t.info.shape[0] in heights}


def _expect_no_other(held: Mapping[str, LazyTensor], checkpoint: Checkpoint) -> None:
    """No tensor outside of the layers is as high as the vocabulary, and of an unknown name: it may have to follow.

    Raises:
        Refused: there is one (`vocabulary-unknown`).
    """
    heights = {t.info.shape[0] for t in held.values()}
    others = [
        n
        for n, t in checkpoint.tensors.items()
        if n not in held and t.info.shape and t.info.shape[0] in heights and _is_of_text(n)
    ]
    if others:
        what = f"{fold(others)} may have a row for each token too, and the name is not known"
        raise Refused("vocabulary-unknown", what, where=show(checkpoint.origin.asked))


def _module(name: str) -> str:
    return name.split(".")[-2]


def _is_named_so(name: str) -> bool:
    parts = name.split(".")
    if len(parts) < 2 or parts[-1] not in _LEAVES or parts[-2] not in _MODULES:
        return False
    return _is_of_text(name)


def _is_of_text(name: str) -> bool:
    """True for tensors outside of the layers and of other towers than the text model."""
    return not any(word in name for word in _NOT_TEXT) and not any(p.isdigit() for p in name.split("."))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that has the vocabulary: the text model's, where there are several."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" in nested else config


def with_rows_in_config(checkpoint: Checkpoint, context: Context, *, consent: bool = False) -> Checkpoint:
    """The checkpoint whose `vocab_size` is the height of its embeddings.

    Args:
        consent: the user has to consent to the change (`vocabulary-rows`).

    Raises:
        Refused: embeddings of different heights (`vocab-mismatch`), or no consent.
    """
    rows = {n: t.info.shape[0] for n, t in vocabulary_tensors(checkpoint).items()}
    if len(set(rows.values())) != 1:
        what = f"the embeddings have different numbers of rows: {sorted(set(rows.values()))} in {fold(rows)}"
        advice = Steps(Again(("--vocab", "N")), " gives all of them N rows")
        raise Refused("vocab-mismatch", what, where=show(checkpoint.origin.asked), next=advice)
    (count,) = set(rows.values())
    config = text_config(checkpoint.config)
    said = config.get("vocab_size")
    if said == count:
        context.note("info", "fixed", f"vocab_size: {count}, as many as the embeddings have rows")
        return checkpoint
    if consent:
        what = f"config.json says vocab_size {show(said)}, and the embeddings have {count} rows"
        context.consent(Refused("vocabulary-rows", what, where=show(checkpoint.origin.asked)))
    context.note("changes-numbers", "fixed", f"vocab_size: {show(said)} becomes {count}")
    new = dict(checkpoint.config)
    if config is not checkpoint.config:
        new["text_config"] = {**config, "vocab_size": count}
    if config is checkpoint.config or new.get("vocab_size") == said:
        new["vocab_size"] = count
    return checkpoint.replace(config=new)


def _of_height(tensor: LazyTensor, rows: int) -> LazyTensor:
    shape = tensor.info.shape
    if shape[0] >= rows:
        return tensors.narrow(tensor, 0, 0, rows)
    added = TensorInfo(tensor.info.dtype, (rows - shape[0], *shape[1:]))
    return tensors.concat((tensor, tensors.Filled(added, 0)), 0)


def _consent(
    code: str,
    verb: str,
    names: list[str],
    held: Mapping[str, LazyTensor],
    wanted: int,
    checkpoint: Checkpoint,
    context: Context,
) -> None:
    """Stop without consent; with it the receipt says how many rows came or went."""
    counts = sorted({abs(held[n].info.shape[0] - wanted) for n in names})
    what = f"a vocabulary of {wanted} {verb.format(' and '.join(map(str, counts)))} {fold(names)}"
    context.consent(Refused(code, what, where=show(checkpoint.origin.asked)))
    context.note("changes-numbers", code, what)


def _expect_unused(checkpoint: Checkpoint, wanted: int, context: Context) -> None:
    """No token has a row that is cut.

    Raises:
        Refused: one has (`vocabulary-in-use`), or nothing says which tokens there are (`tokenizer-unknown`).
    """
    where = show(checkpoint.origin.asked)
    used = {f"{key} {i}": i for key, i in _special_tokens(checkpoint.config)}
    count = tokens_of(checkpoint.side_files)
    if count is not None:
        used[f"the tokenizer's last token, {count - 1}"] = count - 1
    beyond = [name for name, i in used.items() if i >= wanted]
    if beyond:
        what = f"a vocabulary of {wanted} rows has none for {', '.join(show(b) for b in beyond[:3])}"
        raise Refused("vocabulary-in-use", what, where=where, expected=f"at least {max(used.values()) + 1} rows")
    if count is None:
        context.consent(_no_tokenizer(checkpoint))


def _no_tokenizer(checkpoint: Checkpoint) -> Refused:
    return Refused(
        "tokenizer-unknown",
        "neither tokenizer.json nor vocab.json is there, so nothing says which rows are tokens'",
        where=show(checkpoint.origin.asked),
        next="put the model's tokenizer.json beside it",
    )


def _special_tokens(config: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    """Token numbers that a config names: `eos_token_id`, `image_token_index` and their like."""
    for key, value in config.items():
        if key in ("text_config", "generation_config") and isinstance(value, dict):
            yield from _special_tokens(value)
        if key.endswith(("_token_id", "_token_index")):
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, int) and not isinstance(each, bool):
                    yield key, each


def tokens_of(files: Mapping[str, SideFile]) -> int | None:
    """How many rows a tokenizer needs: one more than its largest number; None where no file says that."""
    return tokens_in(lambda name: side_json(files, name))


def tokens_in(read: Callable[[str], Mapping[str, Any]]) -> int | None:
    """The same, by what reads a JSON file of the folder; of one that is not there it reads nothing."""
    whole = read(TOKENIZER)
    model = whole.get("model")
    table = model.get("vocab") if isinstance(model, Mapping) else read(VOCABULARY)
    numbers = [len(table) - 1] if isinstance(table, list) and table else []
    if isinstance(table, Mapping):
        numbers += [i for i in table.values() if isinstance(i, int)]
    if not numbers:
        return None
    added = whole.get("added_tokens")
    numbers += (
        [e["id"] for e in added if isinstance(e, dict) and isinstance(e.get("id"), int)]
        if isinstance(added, list)
        else []
    )
    numbers += [i for i in read(ADDED_TOKENS).values() if isinstance(i, int)]
    listed = read(TOKENIZER_CONFIG).get("added_tokens_decoder")
    numbers += [int(i) for i in listed if str(i).isdecimal() and len(i) < 10] if isinstance(listed, dict) else []
    return max(numbers) + 1
