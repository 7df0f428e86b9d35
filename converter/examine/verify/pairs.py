"""Preference pairs scored: a table, the share of pairs in the right order, and what a drift from the source is due to.

Sequences are scored whole and without padding's influence, in batches; a model that memory does not hold is read once a
batch. What every step of a comparison needs are the hidden states at two tokens of each sequence: all else is the head.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.converters.heads.model import Reading
from converter.dialects.spec import Pooling
from converter.examine.verify.check import Check, holds, note, spread
from converter.examine.verify.pairs_file import Pair, Pairs
from converter.examine.verify.values import Reference, apply_head, padded, pooled, scored_column
from converter.text import format_duration, show

if TYPE_CHECKING:
    import torch

MOST_TOKENS = 2048
"""Tokens of a sequence that are kept, the last ones."""

BATCH_TOKENS = 2048
"""Tokens, padding included, of one pass through a model."""

CAUSES = ("template", "base", "head", "normalisation", "pad token")
"""What may move a score, in the order in which it is exchanged, the source's for ours."""

PADDING = "padding side"
"""What may move it besides, where the tokenizers pad on other sides: each model's own padding, at both ends."""

_PADDING_FELT = 1e-5
"""Of a model's spread: what padding moves less is the rounding of another shape of batch."""

_EXACT = 1e-9
_CONFIDENCE = 1.959964
"""Standard deviations on either side of a normal distribution's 95 %."""
_DRAWS = 1000
"""Resamplings of the interval of a rank correlation."""

Told = Callable[[str], None]


@dataclass(frozen=True)
class Scored:
    """A side of the comparison: a model, its tokenizer and where it scores."""

    reference: Reference
    tokenizer: Any
    pooling: Pooling
    pad: int | None

    def column(self, ids: Sequence[int]) -> int:
        """Where a sequence without padding is scored."""
        return scored_column(ids, [1] * len(ids), self.pooling, self.pad)


def scored(reading: Reading, pooling: Pooling, *, device: str | None = None) -> Scored:
    """A side, ready to score: the model, which runs on a device or the CPU, and the tokenizer in its folder."""
    from transformers import AutoTokenizer

    from converter.sources.hub.mirror import bring_texts

    bring_texts(Path(reading.checkpoint.origin.path))
    tokenizer = AutoTokenizer.from_pretrained(reading.checkpoint.origin.path, local_files_only=True)
    pad = reading.checkpoint.config.get("pad_token_id")
    return Scored(Reference(reading, device=device), tokenizer, pooling, pad if isinstance(pad, int) else None)


def check_pairs(
    found: Pairs, here: Scored, there: Scored | None, *, is_rounded: bool = False, told: Told = lambda text: None
) -> tuple[list[Check], list[dict[str, Any]]]:
    """The checks, and the table's rows.

    Args:
        is_rounded: the bases differ by rounding to another dtype alone.
        told: hears, a line at a time, how far it is.
    """
    pairs = found.pairs
    steps = _steps(pairs, here, there, told)
    if there is not None and padding_side(here) != padding_side(there):
        steps = [_padded(pairs, there), *steps, _padded(pairs, here)]
    ours, theirs = steps[-1], steps[0]
    table = [
        {"prompt": _short(p), "chosen": c, "rejected": r, "margin": c - r}
        for p, c, r in zip(pairs, ours[::2], ours[1::2], strict=True)
    ]
    checks = [holds("pairs", _accuracy(ours, found.total)), *_subsets(pairs, ours)]
    if there is not None:
        for row, c, r in zip(table, theirs[::2], theirs[1::2], strict=True):
            row |= {"source_chosen": c, "source_rejected": r}
        checks += _drift(steps, is_rounded=is_rounded)
    return checks, table


def _accuracy(scores: Sequence[float], total: int) -> str:
    """The share of pairs in the right order, with Wilson's interval."""
    n = len(scores) // 2
    right = sum(c > r for c, r in zip(scores[::2], scores[1::2], strict=True))
    z, share = _CONFIDENCE**2 / n, right / n
    middle, half = (share + z / 2) / (1 + z), math.sqrt(z * (share * (1 - share) + z / 4)) / (1 + z)
    margins = [c - r for c, r in zip(scores[::2], scores[1::2], strict=True)]
    of = f"{n} pairs" if n == total else f"the first {n} of {total} pairs"
    low, high = 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
    return (
        f"{right} of {of} in the right order: {100 * share:.1f} %, 95 % interval {low:.1f} to {high:.1f} %; "
        f"mean margin {sum(margins) / n:.4g}"
    )


def _subsets(pairs: Sequence[Pair], scores: Sequence[float]) -> list[Check]:
    """The share of each part of a benchmark, in the order in which they come."""
    right: dict[str, list[bool]] = {}
    for pair, chosen, rejected in zip(pairs, scores[::2], scores[1::2], strict=True):
        if pair.subset:
            right.setdefault(pair.subset, []).append(chosen > rejected)
    return [
        holds("subset", f"{show(name)}: {sum(of)} of {len(of)}, {100 * sum(of) / len(of):.1f} %")
        for name, of in right.items()
    ]


# Scores


def tokens(tokenizer: Any, prompt: Any, answer: str) -> list[int]:
    """Ids of a prompt with its answer: by the chat template where there is one, else one text after the other."""
    if prompt is not None and getattr(tokenizer, "chat_template", None):
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        found = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
        ids = tokenizer(found, add_special_tokens=False)["input_ids"]
    else:
        text = "\n".join(m["content"] for m in prompt) if isinstance(prompt, list) else prompt or ""
        ids = tokenizer(text + answer)["input_ids"]
    return list(ids)[-MOST_TOKENS:]


def scores_of(side: Scored, sequences: Sequence[Sequence[int]], told: Told) -> list[float]:
    """The value of each sequence where the side scores it."""
    return _values(side, side, _states(side, sequences, [side], told)[:, 0])


def _steps(pairs: Sequence[Pair], here: Scored, there: Scored | None, told: Told) -> list[list[float]]:
    """Scores as one thing after the other is exchanged, the source's for ours; without a source, ours alone.

    Each has the chosen and the rejected answer of every pair, in turn.
    """
    texts = [(p.prompt, answer) for p in pairs for answer in (p.chosen, p.rejected)]
    own = [tokens(here.tokenizer, *each) for each in texts]
    if there is None:
        (last,) = _states(here, own, [here], told).unbind(1)
        return [_values(here, here, last)]
    given = [tokens(there.tokenizer, *each) for each in texts]
    before, last = _states(here, own, [there, here], told).unbind(1)
    (first,) = _states(there, given, [there], told).unbind(1)
    again = first if given == own else _states(there, own, [there], told)[:, 0]
    return [
        _values(there, there, first),
        _values(there, there, again),
        _values(there, there, before),
        _values(here, there, before),
        _values(here, here, before),
        _values(here, here, last),
    ]


def padding_side(side: Scored) -> str:
    """Where a tokenizer pads a batch: `left` or `right`."""
    return str(getattr(side.tokenizer, "padding_side", "right"))


def _padded(pairs: Sequence[Pair], side: Scored) -> list[float]:
    """Scores of a model as its own tokenizer pads a pair: the shorter answer to the length of the longer one.

    Who scores at the last token that is not padding is transformers' own class, which counts positions from the row's
    begin; the others hand positions over, counted without padding. To a model without embeddings of positions only
    distances matter, which padding leaves as they are.
    """
    modules = (name.removesuffix(".weight").rpartition(".")[2] for name in side.reference.reading.checkpoint.tensors)
    counts = side.pooling == "last-non-pad" and any(m == "wpe" or "position" in m for m in modules)
    found: list[float] = []
    for pair in pairs:
        rows = [tokens(side.tokenizer, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
        batch = padded(rows, side.pad or 0)[padding_side(side)]
        values = side.reference.values(batch, side.reference.hidden(batch, counts_padding=counts))
        found += pooled(values, batch, side.pooling, side.pad).tolist()
    return found


def _values(head: Scored, normaliser: Scored, hidden: torch.Tensor) -> list[float]:
    found = apply_head(head.reference.head, normaliser.reference.normaliser, hidden)[..., 0]
    return [float(v) for v in found.tolist()]


def _states(side: Scored, sequences: Sequence[Sequence[int]], scorers: Sequence[Scored], told: Told) -> torch.Tensor:
    """`[n, len(scorers), h]`, fp64: hidden states of each sequence where each of the scorers looks."""
    import torch

    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    batches = list(batches_of(order, sequences))
    backbone = side.reference.backbone
    if not backbone.is_held:
        total = sum(map(len, sequences))
        told(
            f"scoring {len(sequences)} sequences of {total} tokens with {backbone.parameters / 1e9:.1f} G parameters, "
            f"which are read {len(batches)} times"
        )
    found: dict[int, torch.Tensor] = {}
    begun = time.monotonic()
    for batch in batches:
        ids = padded([sequences[i] for i in batch], side.pad or 0)["right"]
        hidden = side.reference.hidden(ids)
        for row, i in enumerate(batch):
            found[i] = hidden[row, [each.column(sequences[i]) for each in scorers]].clone()
        if not backbone.is_held:
            spent = time.monotonic() - begun
            left = spent * (len(sequences) - len(found)) / len(found)
            told(
                f"{len(found)} of {len(sequences)} sequences, {format_duration(spent)}, "
                f"about {format_duration(left)} to go"
            )
    return torch.stack([found[i] for i in range(len(sequences))])


def batches_of(order: Sequence[int], sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Sequences of like lengths, together no longer than `BATCH_TOKENS` once they are padded."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(sequences[i]) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# Drift


def _drift(steps: Sequence[Sequence[float]], *, is_rounded: bool) -> list[Check]:
    """How far scores moved, and each cause's part."""
    ours, theirs = steps[-1], steps[0]
    moved = _largest(ours, theirs)
    width = spread(theirs) or 1.0
    is_padded = len(steps) > len(CAUSES) + 1
    if moved <= (_PADDING_FELT if is_padded else _EXACT) * width:
        return [holds("drift", f"scores are the source's: they differ by {moved:.2g} at most")]
    n = len(ours) // 2
    margins = [[c - r for c, r in zip(s[::2], s[1::2], strict=True)] for s in (ours, theirs)]
    flips = sum((a > 0) != (b > 0) for a, b in zip(*margins, strict=True))
    shift = sum(a - b for a, b in zip(*margins, strict=True)) / n
    parts = _parts(steps, width)
    names = {"base": "rounding of the base to another dtype"} if is_rounded else {}
    listed = ", ".join(f"{names.get(c, c)} {size:.3g}" for c, size in parts.items() if size > _EXACT * width)
    rank, low, high = _rank_correlation(ours, theirs)
    text = (
        f"scores moved by {moved:.3g} at most, of a spread of {width:.3g}; {flips} of {n} pairs changed order; margins "
        f"moved by {shift:.3g} on average; rank correlation {rank:.4f}, 95 % interval {low:.4f} to {high:.4f}. "
        f"Due to: {listed or 'rounding'}"
    )
    is_small = moved <= 2**-6 * width and not flips
    return [note("drift", "drift-rounding" if is_small else "drift", text)]


def _parts(steps: Sequence[Sequence[float]], width: float) -> dict[str, float]:
    """How far each cause moved a score at the most; padding stands at both ends, where it was looked at."""
    inner = steps if len(steps) == len(CAUSES) + 1 else steps[1:-1]
    parts = {c: _largest(a, b) for c, a, b in zip(CAUSES, inner[:-1], inner[1:], strict=True)}
    if inner is not steps:
        felt = max(_largest(steps[0], steps[1]), _largest(steps[-2], steps[-1]))
        parts[PADDING] = felt if felt > _PADDING_FELT * width else 0.0
    return parts


def _largest(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _rank_correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's, with the interval of a bootstrap of fixed seed."""
    import torch

    x, y = (torch.tensor(_ranks(v), dtype=torch.float64) for v in (a, b))
    draws = torch.randint(len(x), (_DRAWS, len(x)), generator=torch.Generator().manual_seed(0))
    found = sorted(_correlation(x[d], y[d]) for d in draws)
    return _correlation(x, y), found[round(0.025 * (_DRAWS - 1))], found[round(0.975 * (_DRAWS - 1))]


def _correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float((x * x).sum().sqrt() * (y * y).sum().sqrt())
    return max(-1.0, min(1.0, float((x * y).sum()) / size)) if size else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    order = sorted(values)
    places: dict[float, list[int]] = {}
    for place, value in enumerate(order):
        places.setdefault(value, []).append(place)
    return [sum(places[v]) / len(places[v]) for v in values]


# Screen


def _short(pair: Pair) -> str:
    prompt = pair.chosen if pair.prompt is None else pair.prompt
    return show(prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=True), 60)


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
