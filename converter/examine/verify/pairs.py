"""Preference pairs scored: a table, the share of pairs in the right order, and what a drift from the source is due to.

Each pair is a line of JSON with `prompt`, `chosen` and `rejected`, strings; prompts may be lists of chat messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.converters.heads.model import Reading
from converter.dialects.spec import Pooling
from converter.errors import UsageError
from converter.examine.verify.check import Check, holds, note, spread
from converter.examine.verify.values import Batch, Reference, padded, pooled
from converter.text import show

MOST_PAIRS = 200
"""Pairs that are scored; a table of more says no more."""

MOST_TOKENS = 2048
"""Tokens of a pair that are kept, the last ones."""


@dataclass(frozen=True)
class Pair:
    """One comparison."""

    prompt: Any
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Scored:
    """A side of the comparison: a model, its tokenizer and where it scores."""

    reference: Reference
    tokenizer: Any
    pooling: Pooling
    pad: int | None


def read_pairs(path: Path) -> list[Pair]:
    """The file's pairs, the first `MOST_PAIRS`.

    Raises:
        UsageError: a line that is no such object (`probe-line`), or none at all (`probe-empty`).
    """
    pairs: list[Pair] = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                value = json.loads(text)
                pairs.append(Pair(value["prompt"], _answer(value["chosen"]), _answer(value["rejected"])))
            except (ValueError, KeyError, TypeError):
                expected = '{"prompt": ..., "chosen": "...", "rejected": "..."}'
                raise UsageError(
                    "probe-line", "not a pair", where=f"{show(path)}, line {number}", expected=expected
                ) from None
            if len(pairs) == MOST_PAIRS:
                break
    if not pairs:
        raise UsageError("probe-empty", "there are no pairs", where=show(path))
    return pairs


def _answer(value: Any) -> str:
    """An answer's text; a list of messages ends with it."""
    if isinstance(value, list):
        value = value[-1]["content"]
    if not isinstance(value, str):
        raise TypeError
    return value


def scored(reading: Reading, pooling: Pooling) -> Scored:
    """A side, ready to score: the model in fp64 and the tokenizer in its folder."""
    from transformers import AutoTokenizer

    from converter.sources.hub.mirror import bring_texts

    bring_texts(Path(reading.checkpoint.origin.path))
    tokenizer = AutoTokenizer.from_pretrained(reading.checkpoint.origin.path, local_files_only=True)
    pad = reading.checkpoint.config.get("pad_token_id")
    return Scored(Reference(reading), tokenizer, pooling, pad if isinstance(pad, int) else None)


def check_pairs(pairs: Sequence[Pair], here: Scored, there: Scored | None) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and the table's rows."""
    ours = _scores(pairs, here)
    table = [
        {"prompt": _short(p.prompt), "chosen": c, "rejected": r, "margin": c - r}
        for p, (c, r) in zip(pairs, ours, strict=True)
    ]
    right = sum(c > r for c, r in ours)
    text = f"{right} of {len(pairs)} pairs in the right order ({100 * right / len(pairs):.1f} %)"
    checks = [holds("pairs", text)]
    if there is not None:
        theirs = _scores(pairs, there)
        for row, (c, r) in zip(table, theirs, strict=True):
            row |= {"source_chosen": c, "source_rejected": r}
        checks += _drift(pairs, here, there, _flat(ours), _flat(theirs))
    return checks, table


def _flat(scores: Sequence[tuple[float, float]]) -> list[float]:
    return [v for pair in scores for v in pair]


def _scores(pairs: Sequence[Pair], side: Scored) -> list[tuple[float, float]]:
    """Rewards of chosen and rejected answers, each sequence on its own."""
    return [
        (_score(side, tokens(side, p.prompt, p.chosen)), _score(side, tokens(side, p.prompt, p.rejected)))
        for p in pairs
    ]


def tokens(side: Scored, prompt: Any, answer: str) -> list[int]:
    """Ids of a prompt with its answer: by the chat template where there is one, else one text after the other."""
    tokenizer = side.tokenizer
    if getattr(tokenizer, "chat_template", None):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": str(prompt)}]
        found = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer(found, add_special_tokens=False)["input_ids"]
    else:
        text = prompt if isinstance(prompt, str) else "\n".join(str(m.get("content", "")) for m in prompt)
        ids = tokenizer(text + answer)["input_ids"]
    return list(ids)[-MOST_TOKENS:]


def _score(side: Scored, ids: Sequence[int]) -> float:
    return float(side.reference.rewards(_single(ids, side.pad), side.pooling, side.pad)[0])


def _single(ids: Sequence[int], pad: int | None) -> Batch:
    return padded([ids], pad or 0)["right"]


def _drift(
    pairs: Sequence[Pair], here: Scored, there: Scored, ours: Sequence[float], theirs: Sequence[float]
) -> list[Check]:
    """How far scores moved, and each cause's part: one thing is exchanged after the other, the source's for ours."""
    moved = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    width = spread(theirs) or 1.0
    flips = sum((a > b) != (c > d) for a, b, c, d in zip(ours[::2], ours[1::2], theirs[::2], theirs[1::2], strict=True))
    text = (
        f"scores moved by {moved:.3g} at most, of a spread of {width:.3g}; {flips} of {len(pairs)} pairs changed order"
    )
    if moved <= 1e-9 * width:
        return [holds("drift", f"scores are the source's: they differ by {moved:.2g} at most")]
    parts = _parts(pairs, here, there)
    listed = ", ".join(f"{cause} {size:.3g}" for cause, size in parts.items() if size > 1e-9 * width)
    small = moved <= 2**-6 * width and not flips
    return [note("drift", "drift-rounding" if small else "drift", f"{text}. Due to: {listed or 'rounding'}")]


def _parts(pairs: Sequence[Pair], here: Scored, there: Scored) -> Mapping[str, float]:
    """The largest change of a score by template, base, head, normalisation and pad token, in this order."""
    parts = dict.fromkeys(("template", "base", "head", "normalisation", "pad token"), 0.0)
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            steps = _steps(here, there, pair.prompt, answer)
            for cause, before, after in zip(parts, steps, steps[1:], strict=False):
                parts[cause] = max(parts[cause], abs(after - before))
    return parts


def _steps(here: Scored, there: Scored, prompt: Any, answer: str) -> list[float]:
    """A score as one thing after the other is exchanged: ids, hidden states, head, normalisation, scored token."""
    from converter.examine.verify.values import apply_head

    first = _single(tokens(there, prompt, answer), there.pad)
    second = _single(tokens(here, prompt, answer), here.pad)
    a, b = there.reference, here.reference
    own, new = a.hidden(second), b.hidden(second)

    def at(values: Any, batch: Batch, side: Scored) -> float:
        return float(pooled(values[..., 0], batch, side.pooling, side.pad)[0])

    return [
        at(apply_head(a.head, a.normaliser, a.hidden(first)), first, there),
        at(apply_head(a.head, a.normaliser, own), second, there),
        at(apply_head(a.head, a.normaliser, new), second, there),
        at(apply_head(b.head, a.normaliser, new), second, there),
        at(apply_head(b.head, b.normaliser, new), second, there),
        at(apply_head(b.head, b.normaliser, new), second, here),
    ]


def _short(prompt: Any) -> str:
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=True)
    return show(text, 60)


def table_lines(table: Sequence[Mapping[str, Any]], most: int = 10) -> list[str]:
    """The table for a screen, the first rows."""
    with_source = "source_chosen" in table[0]
    head = (
        f"  {'chosen':>10} {'rejected':>10} {'margin':>10}"
        + (f" {'source':>10}" * 2 if with_source else "")
        + "  prompt"
    )
    lines = [head]
    for row in table[:most]:
        numbers = [row["chosen"], row["rejected"], row["margin"]]
        numbers += [row["source_chosen"], row["source_rejected"]] if with_source else []
        lines.append("  " + " ".join(f"{n:>10.4g}" for n in numbers) + f"  {row['prompt']}")
    return lines + ([f"  and {len(table) - most} more (--json has all)"] if len(table) > most else [])
