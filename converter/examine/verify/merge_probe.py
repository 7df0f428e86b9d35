"""How far merges are from the model that was trained: logits, or rewards, on a user's own texts.

What was trained is the adapter over its base as the run computed it: the base's values in the model's dtype (of a
quantised base the dequantised ones, as QLoRA multiplies by them), plus the update, which is not rounded. A merge rounds
the sum, and over another base it adds the update to other values. All models are lazy tensors: nothing is written, and
one that memory does not hold is computed a module at a time. Activations are fp32 or fp64.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.converters.heads.detect import HEADLESS, detect
from converter.converters.heads.model import Reading
from converter.converters.heads.read import read
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.quantised.whole import found_in, whole
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.side_files import is_tokenizer_file
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import cast
from converter.core.writer.plan import config_content
from converter.dialects.known import dialects
from converter.dialects.spec import Pooling
from converter.errors import Refused
from converter.examine.verify.pairs import Scored, batches_of, scores_of, tokens
from converter.examine.verify.texts_file import Asked, read_asked
from converter.examine.verify.values import HELD, Reference, is_small, padded
from converter.text import format_duration, show

if TYPE_CHECKING:
    import torch

Told = Callable[[str], None]


@dataclass(frozen=True)
class MergeProbe:
    """A merge, and what it is compared on.

    Attributes:
        file: pairs or texts, and `most` how many of them.
        merge: the step, with its adapters.
        source: the base as it lies; `base`: as the step gets it.
        other: another base that the adapter may have been trained over.
        result: what is written.
        device: what the models run on, as `cuda:0`; None: the CPU.
    """

    file: str
    most: int
    merge: MergeLora
    source: Checkpoint
    base: Checkpoint
    result: Checkpoint
    other: Checkpoint | None = None
    allow: frozenset[str] = frozenset()
    device: str | None = None


@dataclass(frozen=True)
class Measured:
    """What was found: sentences for the screen and the receipt, and the figures behind them."""

    texts: tuple[str, ...]
    figures: Mapping[str, Any]


def measure(asked: MergeProbe, told: Told) -> Measured:
    """Compare the merge, and the one into the other base where there is one, with what was trained.

    Raises:
        UsageError: the file is not one of pairs or texts (see `read_asked`).
        Refused: the model is neither a language model nor a reward model that is run here (`probe-unmeasured`,
            `backbone-unloadable`).
    """
    found = read_asked(asked.file, asked.most)
    context = Context(asked.allow)
    is_over_other = asked.other is not None and not _is_quantised(asked.source) and _is_quantised(asked.other)
    over = asked.other if is_over_other and asked.other is not None else asked.source
    base = over if is_over_other else asked.base
    plain = dataclasses.replace(asked.merge, numerics="best", requantize=None)
    sides = {"trained": plain(_wide(_whole(base, context)), context), "merge": _whole(asked.result, context)}
    if asked.other is not None:
        sides["other"] = plain(_whole(asked.other, context), context)
    readings = {name: _reading(side, context) for name, side in sides.items()}
    is_quantised = _is_quantised(over)
    words = "the dequantised weights of " if is_quantised else ""
    figures: dict[str, Any] = {
        "entries": len(found.texts) // (2 if found.is_pairs else 1),
        "trained_over": "against-base" if is_over_other else "base",
        "is_quantised": is_quantised,
    }
    with tempfile.TemporaryDirectory(prefix="rlhf-convert-probe-") as scratch:
        tokenizer = _tokenizer(asked, Path(scratch))
        run = _rewards if readings["trained"].head is not None else _logits
        drifts = run(readings, tokenizer, found, told, asked.device)
    figures |= {"tokens": drifts.tokens, **drifts.figures}
    names = {"merge": "this merge"}
    if asked.other is not None:
        names["other"] = f"a merge into {show(asked.other.origin.asked)}"
    where, how = show(over.origin.asked), "QLoRA" if is_quantised else "LoRA"
    size = f"{found.words}, {drifts.tokens} tokens"
    texts = [f"measured on {size}, against the adapter over {words}{where}, unrounded, as {how} trains it"]
    texts += [f"{names[side]}: {drifts.sentence(side)}" for side in names]
    if asked.other is not None:
        near, far = sorted(names, key=drifts.distance)
        ratio = drifts.distance(far) / max(drifts.distance(near), 1e-30)
        by = f", by {ratio:.2g} times" if 1.05 < ratio < 1e6 else ""
        same = drifts.distance(far) == drifts.distance(near)
        texts.append(
            "both are as near to what was trained" if same else f"nearer to what was trained: {names[near]}{by}"
        )
        figures["nearer"] = "" if same else near
    return Measured(tuple(texts), figures)


# The models


def _is_quantised(checkpoint: Checkpoint) -> bool:
    return bool(found_in(checkpoint).weights)


def _whole(checkpoint: Checkpoint, context: Context) -> Checkpoint:
    """The same model with whole weights, where some are quantised."""
    found = found_in(checkpoint)
    return whole(checkpoint, found, context).after if found.method else checkpoint


def _wide(checkpoint: Checkpoint) -> Checkpoint:
    """The same values in fp32, so that what is added to them is not rounded."""
    wide = {n: cast(t, DType.F32) if t.info.dtype in _HALVES else t for n, t in checkpoint.tensors.items()}
    return checkpoint.replace(tensors=wide)


_HALVES = (DType.BF16, DType.F16)


def _reading(checkpoint: Checkpoint, context: Context) -> Reading:
    found = detect(checkpoint)
    return read(checkpoint, dialects()[HEADLESS] if found is None else found.dialect, context)


def _tokenizer(asked: MergeProbe, scratch: Path) -> Any:
    """The one that goes into the output.

    Raises:
        Refused: there is none (`probe-unmeasured`).
    """
    from transformers import AutoTokenizer

    from converter.sources.hub.mirror import bring_texts

    held = {n: f for n, f in asked.result.side_files.items() if is_tokenizer_file(n)}
    for folder in {Path(f.source).parent for f in held.values() if f.source is not None}:
        bring_texts(folder)
    for name, file in held.items():
        place = scratch / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(Path(file.source).read_bytes() if file.source is not None else file.content or b"")
    (scratch / "config.json").write_bytes(config_content(asked.result))
    try:
        return AutoTokenizer.from_pretrained(scratch, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"no tokenizer goes into the output that transformers loads: {show(error, 200)}"
        raise Refused("probe-unmeasured", what, where=show(asked.source.origin.asked)) from None


# Rewards


@dataclass(frozen=True)
class Drifts:
    """How far each side is from what was trained."""

    tokens: int
    figures: Mapping[str, Mapping[str, float]]
    sentences: Mapping[str, str]
    measure: str

    def sentence(self, side: str) -> str:
        """What the screen says of a side."""
        return self.sentences[side]

    def distance(self, side: str) -> float:
        """The figure by which sides are ordered."""
        return self.figures[side][self.measure]


def _rewards(readings: Mapping[str, Reading], tokenizer: Any, found: Asked, told: Told, device: str | None) -> Drifts:
    scores: dict[str, list[float]] = {}
    count = 0
    for name, reading in readings.items():
        pooling: Pooling = reading.dialect.pooling
        pad = reading.checkpoint.config.get("pad_token_id")
        reference = Reference(reading, held=HELD // len(readings), device=device)
        side = Scored(reference, tokenizer, pooling, pad if isinstance(pad, int) else None)
        ids = [tokens(tokenizer, *text) for text in found.texts]
        count = sum(map(len, ids))
        scores[name] = scores_of(side, ids, told)
    trained = scores.pop("trained")
    figures, sentences = {}, {}
    for name, own in scores.items():
        moved = [abs(a - b) for a, b in zip(own, trained, strict=True)]
        figures[name] = made = {"max": max(moved), "mean": sum(moved) / len(moved)}
        sentences[name] = f"rewards moved by {made['mean']:.2g} on average, {made['max']:.2g} at most"
        if found.is_pairs:
            ours, theirs = _margins(own), _margins(trained)
            flipped = sum((a > 0) != (b > 0) for a, b in zip(ours, theirs, strict=True))
            shift = sum(a - b for a, b in zip(ours, theirs, strict=True)) / len(ours)
            made |= {"pairs_flipped": flipped, "margin_shift": shift, "margin": sum(theirs) / len(theirs)}
            sentences[name] += (
                f"; {flipped} of {len(ours)} pairs changed order; margins moved by {shift:+.2g} on average, which were "
                f"{made['margin']:.3g}"
            )
    return Drifts(count, figures, sentences, "mean")


def _margins(scores: Sequence[float]) -> list[float]:
    return [c - r for c, r in zip(scores[::2], scores[1::2], strict=True)]


# Logits


def _logits(readings: Mapping[str, Reading], tokenizer: Any, found: Asked, told: Told, device: str | None) -> Drifts:
    import torch

    from converter.examine.verify.backbone import Backbone
    from converter.examine.verify.outputs import Outputs

    dtype = torch.float64 if is_small(readings["trained"]) else torch.float32
    bodies = {n: Backbone(r, dtype, held=HELD // len(readings), device=device) for n, r in readings.items()}
    outputs = {n: Outputs(r, dtype) for n, r in readings.items()}
    texts = [tokens(tokenizer, *text) for text in found.texts]
    texts = [ids for ids in texts if ids]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    parts = list(batches_of(order, texts))
    sums = {n: _Sums() for n in readings if n != "trained"}
    large = next((b for b in bodies.values() if not b.is_held), None)
    if large is not None:
        told(
            f"probe: {sum(map(len, texts))} tokens through {len(bodies)} models of {large.parameters / 1e9:.1f} G "
            f"parameters, each computed {len(parts)} times"
        )
    begun, done = time.monotonic(), 0
    for batch in parts:
        rows = padded([texts[i] for i in batch], 0)["right"]
        ids, mask = torch.tensor(rows.input_ids), torch.tensor(rows.attention_mask)
        hidden = {n: body(ids, mask)[mask.bool()] for n, body in bodies.items()}
        of_batch = {n: _OfBatch(int(mask.sum())) for n in sums}
        for stretches in zip(*(outputs[n](hidden[n]) for n in readings), strict=True):
            by_name = dict(zip(readings, stretches, strict=True))
            for name, own in of_batch.items():
                own.add(by_name["trained"].double(), by_name[name].double())
        for name, own in of_batch.items():
            sums[name].add(own)
        done += len(batch)
        if large is not None:
            spent = time.monotonic() - begun
            left = format_duration(spent * (len(texts) - done) / done)
            told(f"probe: {done} of {len(texts)} texts, {format_duration(spent)}, about {left} to go")
    return Drifts(
        sum(map(len, texts)),
        {n: s.figures() for n, s in sums.items()},
        {n: s.sentence() for n, s in sums.items()},
        "kl_mean",
    )


class _OfBatch:
    """Sums over the vocabulary, a stretch at a time, for each token: what a divergence is made of."""

    def __init__(self, count: int) -> None:
        import torch

        self.low = torch.full((2, count), -torch.inf, dtype=torch.float64)
        self.total = torch.zeros((2, count), dtype=torch.float64)
        self.first = torch.zeros((2, count), dtype=torch.long)
        self.cross = torch.zeros(count, dtype=torch.float64)
        self.moved, self.squares, self.moved_squares, self.seen = 0.0, 0.0, 0.0, 0

    def add(self, trained: torch.Tensor, own: torch.Tensor) -> None:
        """Take `[n, v]` of both into the sums."""
        import torch

        difference = trained - own
        for side, logits in enumerate((trained, own)):
            top, at = logits.max(-1)
            self.first[side] = torch.where(top > self.low[side], at + self.seen, self.first[side])
            low = torch.maximum(self.low[side], top)
            shrink = (self.low[side] - low).exp()
            weights = (logits - low[:, None]).exp()
            self.total[side] = self.total[side] * shrink + weights.sum(-1)
            if side == 0:
                self.cross = self.cross * shrink + (weights * difference).sum(-1)
            self.low[side] = low
        self.moved = max(self.moved, float(difference.abs().max()))
        self.squares += float((trained * trained).sum())
        self.moved_squares += float((difference * difference).sum())
        self.seen += logits.shape[-1]

    def divergences(self) -> torch.Tensor:
        """`[n]`: the Kullback-Leibler divergence of each token's distribution from the trained one."""
        logs = self.low + self.total.log()
        return (self.cross / self.total[0] - logs[0] + logs[1]).clamp(min=0)


class _Sums:
    """The same over all batches."""

    def __init__(self) -> None:
        self.count, self.changed = 0, 0
        self.divergence, self.largest = 0.0, 0.0
        self.moved, self.squares, self.moved_squares = 0.0, 0.0, 0.0

    def add(self, batch: _OfBatch) -> None:
        """Take a batch into the sums."""
        found = batch.divergences()
        self.count += len(found)
        self.changed += int((batch.first[0] != batch.first[1]).sum())
        self.divergence += float(found.sum())
        self.largest = max(self.largest, float(found.max()))
        self.moved = max(self.moved, batch.moved)
        self.squares += batch.squares
        self.moved_squares += batch.moved_squares

    def figures(self) -> dict[str, float]:
        """As the receipt has them."""
        relative = (self.moved_squares / self.squares) ** 0.5 if self.squares else 0.0
        return {
            "kl_mean": self.divergence / self.count, "kl_max": self.largest, "logits_relative": relative,
            "logits_max": self.moved, "first_changed": self.changed, "tokens": self.count,
        }  # fmt: skip

    def sentence(self) -> str:
        """As the screen says it."""
        found = self.figures()
        return (
            f"KL {found['kl_mean']:.2g} a token on average, {found['kl_max']:.2g} at most; logits moved by "
            f"{100 * found['logits_relative']:.2g} %, {found['logits_max']:.2g} at most; the likeliest token is "
            f"another at {self.changed} of {self.count}"
        )
