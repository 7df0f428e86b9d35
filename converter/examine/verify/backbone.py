"""A backbone of any size: its parameters are computed from lazy tensors when a module needs them.

transformers builds the module without memory for parameters. Before a module with parameters of its own runs, they are
read, merged or gathered as their lazy tensors say, and cast; after it they are dropped, unless all of them fit into
`held` bytes. Of large embeddings only the rows of the tokens at hand are computed, and of stacked experts only those
that tokens go to.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from converter.converters.heads.model import Reading
from converter.core.compute.device import repeatable
from converter.core.compute.evaluate import Evaluator
from converter.core.files.reading import InputFiles
from converter.core.tensors.nodes import LazyTensor, rows
from converter.errors import Refused
from converter.families.live_names import find_places
from converter.families.words import OUTPUT_PREFIXES
from converter.text import fold, show

LARGE = 1 << 27
"""Bytes of a parameter beyond which only what is asked for of it is computed."""


@dataclass(frozen=True)
class Piece:
    """A lazy tensor, and the element of a parameter, counted row-major, at which it begins."""

    value: LazyTensor
    start: int


class Backbone:
    """`AutoModel` of a reading, in fp32 or fp64; it runs on the CPU, or on the device of a name, as `cuda:0`.

    Attributes:
        parameters: how many there are.
        is_held: they stay in memory once they were computed.
    """

    def __init__(self, reading: Reading, dtype: torch.dtype, *, held: int, device: str | None = None) -> None:
        self._reading = reading
        self._dtype = dtype
        self._device = None if device is None else torch.device(device)
        self._evaluator: Evaluator | None = None
        self.model = built(reading, dtype)
        self._pieces = _pieces(reading, self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.is_held = self.parameters * dtype.itemsize <= held
        self._is_filled = False
        self._send_buffers()
        if not self.is_held:
            for prefix, module in self.model.named_modules():
                own = {k: f"{prefix}.{k}".removeprefix(".") for k, p in module._parameters.items() if p is not None}
                if own:
                    _Lender(self, module, own).attach()

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor, *, counts_padding: bool = False) -> torch.Tensor:
        """The last hidden states `[n, t, h]` of token ids `[n, t]`, as a head gets them.

        Args:
            counts_padding: positions are counted from the row's begin, padding included, as transformers' own classes
                do where nobody hands them positions.
        """
        columns = torch.arange(ids.shape[-1]).expand_as(ids)
        positions = columns if counts_padding else (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        # A padding token before all others attends to nothing, which is NaN where softmax is taken in fp32 under a mask
        # of fp64, and from there in every score: rows begin with their tokens, which keep their positions.
        leading = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        turned = (columns + leading) % ids.shape[-1]
        ids, mask, positions = (each.gather(-1, turned) for each in (ids, mask, positions))
        ids, mask, positions = (each.to(self._device) for each in (ids, mask, positions))
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        more = {"position_ids": positions} if takes_positions else {}
        with InputFiles(self._reading.checkpoint.inputs) as files, torch.no_grad(), self._as_on_every_run():
            self._evaluator = Evaluator(files)
            try:
                if self.is_held and not self._is_filled:
                    self._fill()
                hidden: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, **more).last_hidden_state
                found = hidden.to("cpu")
            except (NotImplementedError, RuntimeError) as error:
                if "meta" not in str(error):
                    raise
                # A module took another's parameters without running it.
                what = f"transformers' {type(self.model).__name__} can't be run a module at a time: {show(error)}"
                raise Refused("backbone-unloadable", what, where=show(self._reading.checkpoint.origin.asked)) from None
            finally:
                self._evaluator = None
        back = (columns - leading) % columns.shape[-1]
        return found.gather(1, back.unsqueeze(-1).expand_as(found))

    def _as_on_every_run(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._device is None else repeatable()

    def _send_buffers(self) -> None:
        """Tables that transformers computed; parameters are sent as they are made."""
        for module in self.model.modules():
            for key, value in module._buffers.items():
                module._buffers[key] = None if value is None else value.to(self._device)

    def _fill(self) -> None:
        """Every parameter, for good; one that has several names is computed once."""
        made: dict[int, torch.nn.Parameter] = {}
        for prefix, module in self.model.named_modules():
            for key, empty in list(module._parameters.items()):
                if empty is None:
                    continue
                if id(empty) not in made:
                    value = self.whole(f"{prefix}.{key}".removeprefix("."), tuple(empty.shape))
                    made[id(empty)] = torch.nn.Parameter(value, requires_grad=False)
                module._parameters[key] = made[id(empty)]
        self._is_filled = True

    def whole(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A parameter's value."""
        value = torch.empty(shape, dtype=self._dtype)
        flat = value.view(-1)
        for piece in self._pieces[name]:
            count = piece.value.info.numel
            flat.narrow(0, piece.start, count).copy_(self._computed(piece.value).reshape(-1))
        return value.to(self._device)

    def row(self, name: str, shape: tuple[int, ...], index: int) -> torch.Tensor:
        """`value[index]` of a parameter, without the rest of it."""
        value = torch.empty(shape[1:], dtype=self._dtype)
        width = value.numel()
        first, last = index * width, (index + 1) * width
        for piece in self._pieces[name]:
            begin, end = max(piece.start, first), min(piece.start + piece.value.info.numel, last)
            if begin < end:
                part = _elements(piece.value, begin - piece.start, end - piece.start)
                value.view(-1).narrow(0, begin - first, end - begin).copy_(self._computed(part).reshape(-1))
        return value.to(self._device)

    def _computed(self, value: LazyTensor) -> torch.Tensor:
        assert self._evaluator is not None
        return self._evaluator.evaluate(value, {})


def _elements(value: LazyTensor, start: int, stop: int) -> LazyTensor:
    """A stretch of whole rows of a tensor: a row of an embedding, or one expert of a stack."""
    if stop - start == value.info.numel:
        return value
    width = value.info.numel // value.info.shape[0]
    assert start % width == 0
    assert stop % width == 0
    return rows(value, start // width, stop // width)


class _Lender:
    """Gives one module its own parameters while it runs."""

    def __init__(self, backbone: Backbone, module: torch.nn.Module, names: Mapping[str, str]) -> None:
        self._backbone = backbone
        self._module = module
        self._names = names
        self._empty = {key: module._parameters[key] for key in names}

    def attach(self) -> None:
        """From now on it has them while it runs, and not otherwise."""
        self._module.register_forward_pre_hook(lambda module, args: self._lend())
        self._module.register_forward_hook(lambda module, args, out: self._drop(), always_call=True)

    def _lend(self) -> None:
        own: dict[str, Any] = self._module._parameters
        for key, name in self._names.items():
            empty = self._empty[key]
            assert empty is not None
            is_looked_up = isinstance(self._module, torch.nn.Embedding)
            if empty.nbytes > LARGE and (is_looked_up or empty.ndim > 2):
                own[key] = OnDemand.of(empty, functools.partial(self._backbone.row, name, tuple(empty.shape)))
            else:
                value = self._backbone.whole(name, tuple(empty.shape))
                own[key] = torch.nn.Parameter(value, requires_grad=False)

    def _drop(self) -> None:
        self._module._parameters.update(self._empty)


class OnDemand(torch.Tensor):
    """A tensor whose rows are computed when an embedding looks them up, or when one of them is taken by its index."""

    _row: Callable[[int], torch.Tensor]

    @staticmethod
    def of(empty: torch.Tensor, row: Callable[[int], torch.Tensor]) -> OnDemand:
        """One of the shape and dtype of a tensor without memory."""
        made = torch.Tensor._make_subclass(OnDemand, empty.detach())
        made._row = row
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding and isinstance(args[1], OnDemand):
            wanted, places = torch.unique(args[0], return_inverse=True)
            found = torch.stack([args[1]._row(i) for i in wanted.tolist()])
            return torch.nn.functional.embedding(places, found)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], OnDemand):
            index = args[1]
            if isinstance(index, torch.Tensor) and index.ndim == 0 and not index.is_floating_point():
                index = int(index)
            if isinstance(index, int):
                return args[0]._row(index)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _pieces(reading: Reading, model: torch.nn.Module) -> dict[str, list[Piece]]:
    """Of what each parameter is made; persistent buffers are filled at once.

    Raises:
        Refused: names or shapes are not the model's (`backbone-unloadable`).
    """
    where = show(reading.checkpoint.origin.asked)
    tensors = {n: t for n, t in reading.checkpoint.tensors.items() if not n.startswith(OUTPUT_PREFIXES)}
    parameters = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    buffers = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    places = find_places(
        tensors,
        {**parameters, **{n: tuple(b.shape) for n, b in buffers.items()}},
        classes=[c.__name__ for c in type(model).__mro__],
        prefix=reading.family.prefix or "",
        config=config,
    )
    if places.changed or places.unexpected:
        other = [*places.changed, *places.unexpected]
        what = f"transformers' model has no place for {len(other)} tensors as they are: {fold(other)}"
        raise Refused("backbone-unloadable", what, where=where)
    found: dict[str, list[Piece]] = {}
    with InputFiles(reading.checkpoint.inputs) as files:
        for name, place in places.found.items():
            tensor = tensors[name]
            if tensor.info.shape != place.shape:
                what = f"{show(name)} has another shape than transformers' model"
                shapes = (str(list(place.shape)), str(list(tensor.info.shape)))
                raise Refused("backbone-unloadable", what, where=where, expected=shapes[0], got=shapes[1])
            if place.name in buffers:
                buffers[place.name].copy_(Evaluator(files).evaluate(tensor, {}))
            else:
                found.setdefault(place.name, []).append(Piece(tensor, place.start))
    count = {n: sum(p.value.info.numel for p in pieces) for n, pieces in found.items()}
    own = dict(model.named_parameters(remove_duplicate=False))
    lost = [n for n, p in own.items() if count.get(n, 0) != p.numel() and not _has_twin(n, own, count)]
    if lost:
        what = f"nothing is there for {len(lost)} parameters of transformers' model: {fold(lost)}"
        raise Refused("backbone-unloadable", what, where=where)
    for name, parameter in own.items():
        if name not in found:
            found[name] = next(found[n] for n, p in own.items() if p is parameter and n in found)
    return found


def _has_twin(name: str, own: Mapping[str, torch.Tensor], count: Mapping[str, int]) -> bool:
    """True where the parameter has another name, under which it is whole."""
    return any(p is own[name] and count.get(n) == p.numel() for n, p in own.items() if n != name)


def built(reading: Reading, dtype: torch.dtype, kind: Any = None) -> Any:
    """`AutoModel`, or another class, without memory for parameters; buffers are what it computes for them.

    Raises:
        Refused: transformers doesn't build such a model (`backbone-unloadable`).
    """
    from transformers import AutoConfig, AutoModel

    config = reading.checkpoint.config
    settings = {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype")}
    try:
        known = AutoConfig.for_model(reading.family.kind, **settings)
        known._experts_implementation = "eager"
        known.use_cache = False
        with _without_memory():
            make = AutoModel.from_config if kind is None else kind._from_config
            model = make(known, attn_implementation="eager")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        where = show(reading.checkpoint.origin.asked)
        raise Refused("backbone-unloadable", f"transformers builds no such model: {show(error)}", where=where) from None
    return model.to(dtype).eval()


@contextlib.contextmanager
def _without_memory() -> Iterator[None]:
    """Parameters of modules that are built meanwhile are on the meta device; buffers are not."""
    register = torch.nn.Module.register_parameter

    def without(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None:
            self._parameters[name] = torch.nn.Parameter(param.to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = without  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
