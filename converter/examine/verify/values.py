"""What a folder's model says: hidden states by transformers, the head on top as its dialect defines it.

This is the yardstick that loaders and other folders are compared with: fp64 for small models, which are held in memory,
fp32 for larger ones, whose parameters are read when they are needed (see `backbone`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converter.converters.heads.model import Head, Linear, Normaliser, Reading
from converter.core.compute.evaluate import Evaluator
from converter.core.files.opening import Identity
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.spec import Pooling
from converter.errors import Refused

if TYPE_CHECKING:
    import torch

SMALL_PARAMETERS = 100_000_000
"""Models with no more parameters are run in fp64, where they take 0.8 GB; others in fp32."""

HELD = 1 << 30
"""Bytes of parameters that stay in memory; a model that fits is read once."""

PROBE_ROWS = 6
PROBE_LENGTH = 12
_SEED = 20


@dataclass(frozen=True)
class Batch:
    """Token ids `[n, t]` and the attention mask of the same shape."""

    input_ids: tuple[tuple[int, ...], ...]
    attention_mask: tuple[tuple[int, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """As a probe reads it."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


Batches = Mapping[str, Batch]


def is_small(reading: Reading) -> bool:
    """Whether the model is run in fp64."""
    return sum(t.info.numel for t in reading.checkpoint.tensors.values()) <= SMALL_PARAMETERS


def probe_batches(config: Mapping[str, Any]) -> dict[str, Batch]:
    """The same random sequences padded on either side; no token is the pad or EOS token, so that loaders agree."""
    import random

    vocabulary = _text(config, "vocab_size") or 32
    limit = _text(config, "max_position_embeddings", "n_positions") or PROBE_LENGTH
    special = {config.get("pad_token_id"), config.get("bos_token_id")}
    eos = config.get("eos_token_id")
    special |= set(eos) if isinstance(eos, list) else {eos}
    allowed = [i for i in range(min(vocabulary, 50_000)) if i not in special]
    draw = random.Random(_SEED)  # noqa: S311 - the same tokens each time, not secrets
    lengths = [max(2, min(limit, PROBE_LENGTH) - 2 * i) for i in range(PROBE_ROWS)]
    rows = [[draw.choice(allowed) for _ in range(n)] for n in lengths]
    pad = config.get("pad_token_id")
    return padded(rows, pad if isinstance(pad, int) else 0)


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Batch]:
    """`right` and `left`: the rows padded on that side to the longest."""
    width = max(len(r) for r in rows)

    def side(left: bool) -> Batch:
        fill = [(pad,) * (width - len(r)) for r in rows]
        ids = [(*f, *r) if left else (*r, *f) for r, f in zip(rows, fill, strict=True)]
        mask = [
            (*(0,) * len(f), *(1,) * len(r)) if left else (*(1,) * len(r), *(0,) * len(f))
            for r, f in zip(rows, fill, strict=True)
        ]
        return Batch(tuple(ids), tuple(mask))

    return {"right": side(False), "left": side(True)}


def _text(config: Mapping[str, Any], *keys: str) -> int | None:
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, Mapping) else {}):
        for key in keys:
            if isinstance(each.get(key), int):
                return int(each[key])
    return None


class Reference:
    """A model: `values` are per token, `rewards` those at the token that a loader would score."""

    def __init__(self, reading: Reading, *, held: int = HELD, device: str | None = None) -> None:
        import torch

        from converter.examine.verify.backbone import Backbone

        if reading.head is None:
            raise Refused("head-missing", "a model without a head has no values")
        self.reading = reading
        dtype = torch.float64 if is_small(reading) else torch.float32
        self.backbone = Backbone(reading, dtype, held=held, device=device)
        with InputFiles(reading_inputs(reading)) as files:
            self.head = fp64(reading.head, Evaluator(files))
        self.normaliser = reading.normaliser

    def hidden(self, batch: Batch, *, counts_padding: bool = False) -> torch.Tensor:
        """The last hidden states `[n, t, h]` in fp64, as the backbone gives them to a head."""
        import torch

        ids, mask = torch.tensor(batch.input_ids), torch.tensor(batch.attention_mask)
        return self.backbone(ids, mask, counts_padding=counts_padding).double()

    def values(self, batch: Batch, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """`[n, t]`: the first row of the head at every position, normalised as the dialect says."""
        states = self.hidden(batch) if hidden is None else hidden
        found: torch.Tensor = apply_head(self.head, self.normaliser, states)[..., 0]
        return found

    def rewards(self, batch: Batch, pooling: Pooling, pad: int | None) -> torch.Tensor:
        """`[n]`: the value at the scored token."""
        return pooled(self.values(batch), batch, pooling, pad)


def reading_inputs(reading: Reading) -> Mapping[str, Identity]:
    """Files of a reading with their identities, so that one that changes meanwhile is noticed."""
    return reading.checkpoint.inputs


def fp64(head: Head, evaluator: Evaluator) -> tuple[tuple[Any, Any], ...]:
    """Each layer's weight and bias in fp64."""
    import torch

    layers = (head,) if isinstance(head, Linear) else (head.first, head.second)
    found = []
    for layer in layers:
        weight = evaluator.evaluate(layer.weight, {}).to(torch.float64)
        bias = None if layer.bias is None else evaluator.evaluate(layer.bias, {}).to(torch.float64)
        found.append((weight, bias))
    return tuple(found)


def apply_head(layers: tuple[tuple[Any, Any], ...], normaliser: Normaliser | None, hidden: Any) -> Any:
    """`[..., h]` to `[..., rows]`."""
    import torch

    for number, (weight, bias) in enumerate(layers):
        hidden = torch.nn.functional.linear(hidden.relu() if number else hidden, weight, bias)
    if normaliser is not None:
        hidden = (hidden - torch.tensor(normaliser.mean)) / torch.tensor(normaliser.std)
    return hidden


def pooled(values: torch.Tensor, batch: Batch, pooling: Pooling, pad: int | None) -> torch.Tensor:
    """The value of each row at the token that a loader scores."""
    import torch

    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    columns = [scored_column(ids, mask, pooling, pad) for ids, mask in rows]
    return values[torch.arange(len(columns)), torch.tensor(columns)]


def scored_column(ids: Sequence[int], mask: Sequence[int], pooling: Pooling, pad: int | None) -> int:
    """The token of a row that a loader scores."""
    attended = [i for i, on in enumerate(mask) if on]
    if pooling == "last-non-pad" and pad is not None:
        attended = [i for i, token in enumerate(ids) if token != pad] or attended
    return attended[-1]


def lazy_head(head: Head) -> list[LazyTensor]:
    """Every tensor of a head."""
    layers = [head] if isinstance(head, Linear) else [head.first, head.second]
    return [t for layer in layers for t in (layer.weight, layer.bias) if t is not None]
