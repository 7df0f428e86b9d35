"""Logits of hidden states, a stretch of the vocabulary at a time: transformers' own class around its output embedding.

What a class does after its output embedding (a cap, a scale) is done by the class: its backbone is asked for nothing,
it hands over the hidden states that are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from converter.converters.heads.model import Reading
from converter.core.compute.evaluate import Evaluator
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor, rows
from converter.errors import Refused
from converter.examine.verify.backbone import built
from converter.families.words import OUTPUT, input_embedding
from converter.text import show

STRETCH = 1 << 27
"""Bytes of the output embedding that are held at a time."""


class Outputs:
    """What makes logits of a model's hidden states, in fp32 or fp64."""

    def __init__(self, reading: Reading, dtype: torch.dtype) -> None:
        self._reading = reading
        self._dtype = dtype
        tensors = reading.checkpoint.tensors
        name = next((n for n in tensors if OUTPUT.search(n)), None) or input_embedding(tensors)
        if name is None:
            raise _unmeasured(reading, "it has no output embedding")
        self._weight: LazyTensor = tensors[name]
        self._bias = tensors.get(f"{name.removesuffix('.weight')}.bias") if OUTPUT.search(name) else None
        self._model = built(reading, dtype, _class_of(reading))
        self._head = self._model.get_output_embeddings()
        body = self._model.base_model
        if body is self._model or not isinstance(self._head, torch.nn.Linear):
            raise _unmeasured(reading, "its class has no linear output on top of a backbone")
        self._hidden: torch.Tensor | None = None
        body.forward = self._as_backbone
        self.vocabulary = self._weight.info.shape[0]

    def __call__(self, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
        """`[n, h]` to `[n, v]`, for one stretch of the vocabulary after the other."""
        height = max(1, STRETCH // (self._weight.info.shape[1] * self._dtype.itemsize))
        with InputFiles(self._reading.checkpoint.inputs) as files:
            evaluator = Evaluator(files)
            for start in range(0, self.vocabulary, height):
                yield self._stretch(evaluator, hidden, start, min(start + height, self.vocabulary))

    @torch.no_grad()  # here, since around a generator's `yield` it would hold for whoever takes what is yielded
    def _stretch(self, evaluator: Evaluator, hidden: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        self._head._parameters["weight"] = self._part(evaluator, self._weight, start, stop)
        if self._bias is not None:
            self._head._parameters["bias"] = self._part(evaluator, self._bias, start, stop)
        self._hidden = hidden.to(self._dtype)[None]
        tokens = torch.zeros(self._hidden.shape[:2], dtype=torch.long)
        try:
            found: torch.Tensor = self._model(input_ids=tokens).logits[0]
        except (NotImplementedError, RuntimeError, TypeError) as error:
            raise _unmeasured(self._reading, f"its class can't be run from hidden states: {error}") from None
        return found

    def _part(self, evaluator: Evaluator, value: LazyTensor, start: int, stop: int) -> torch.nn.Parameter:
        found = evaluator.evaluate(rows(value, start, stop), {}).to(self._dtype)
        return torch.nn.Parameter(found, requires_grad=False)

    def _as_backbone(self, *args: Any, **knobs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        return MoeModelOutputWithPast(last_hidden_state=self._hidden)


def _class_of(reading: Reading) -> Any:
    """The class that config.json names."""
    import transformers

    listed = reading.checkpoint.config.get("architectures")
    name = listed[0] if isinstance(listed, list) and listed else ""
    found = getattr(transformers, str(name), None)
    if found is None:
        raise _unmeasured(reading, f"transformers has no class {show(name)}")
    return found


def _unmeasured(reading: Reading, why: str) -> Refused:
    return Refused("probe-unmeasured", f"logits can't be computed: {why}", where=show(reading.checkpoint.origin.asked))
