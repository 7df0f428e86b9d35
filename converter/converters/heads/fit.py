"""A head brought into the form that a target has, exactly, or refused with the constant that would be lost.

What is exact: a rename; a zero bias added; one row of several; `mean` and `std` folded into weight and bias; a linear
head as two hidden units of a ReLU MLP, since `relu(x) - relu(-x) = x`; a narrower MLP padded with zeros. What isn't:
a bias or a mean where the target has no place for either, an MLP as one layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from converter.converters.heads.model import Head, Linear, Mlp, Normaliser, Reading
from converter.converters.heads.read import values
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.kernel_specs import HEAD_NORMAL, HEAD_ROWS, Param
from converter.core.tensors.nodes import Filled, LazyTensor
from converter.diagnostic import Again, Steps
from converter.dialects.known import Target
from converter.dialects.spec import HeadSpec
from converter.errors import Refused, UsageError

BiasWish = Literal["refuse", "drop", "into-mean"]
NormaliserWish = Literal["fold", "drop"]
Init = Literal["none", "zeros", "normal"]


@dataclass(frozen=True)
class Wishes:
    """What the user chose where there is a choice."""

    bias: BiasWish = "refuse"
    normaliser: NormaliserWish = "fold"
    label: int | None = None
    label_weights: tuple[float, ...] = ()
    init: Init = "none"
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """A head as the target stores it: tensors by the end of their names, and what config.json says of it."""

    tensors: Mapping[str, LazyTensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: int = 1


def fit(reading: Reading, target: Target, spec: HeadSpec, wishes: Wishes, context: Context) -> Fitted:
    """The head of a reading in the target's form.

    Raises:
        Refused: there is no exact form and the user chose none (`head-bias`, `head-labels`, `head-not-linear`).
        UsageError: a label that the head doesn't have (`usage`).
    """
    assert reading.head is not None
    return _Fit(reading, target, spec, wishes, context).result(reading.head)


@dataclass(frozen=True)
class _Rows:
    """`(C @ W + shift) / divisor`, row by row."""

    coefficients: tuple[tuple[float, ...], ...]
    shift: tuple[float, ...]
    divisor: tuple[float, ...]

    def picked(self) -> int | None:
        """The first row where rows are taken as they are, one after another; else None."""
        if any(self.shift) or any(d != 1 for d in self.divisor):
            return None
        starts = [row.index(1) for row in self.coefficients if max(row) == 1 == sum(map(abs, row))]
        whole = len(starts) == len(self.coefficients)
        return starts[0] if whole and starts == list(range(starts[0], starts[0] + len(starts))) else None

    def of(self, tensor: LazyTensor, *, shifted: bool) -> LazyTensor:
        """The rows of a weight, or with the shift those of a bias."""
        rows = self if shifted else _Rows(self.coefficients, (0.0,) * len(self.shift), self.divisor)
        if (start := rows.picked()) is not None:
            return tensors.narrow(tensor, 0, start, len(rows.coefficients))
        params = {
            "coefficients": tuple(float(c) for row in rows.coefficients for c in row),
            "shift": rows.shift,
            "divisor": rows.divisor,
            "out": tensor.info.dtype.value,
        }
        return tensors.apply(HEAD_ROWS, [tensor], params)

    def constants(self, bias: tuple[float, ...]) -> list[float]:
        """The rows of a bias as numbers."""
        sums = [sum(c * b for c, b in zip(row, bias, strict=True)) for row in self.coefficients]
        return [(s + shift) / d for s, shift, d in zip(sums, self.shift, self.divisor, strict=True)]


@dataclass
class _Fit:
    reading: Reading
    target: Target
    spec: HeadSpec
    wishes: Wishes
    context: Context
    config: dict[str, Any] = field(default_factory=dict)

    def result(self, head: Head) -> Fitted:
        normaliser = self._kept(self.reading.normaliser)
        if self.spec.kind == "mlp":
            found = self._as_mlp(head, normaliser)
            return Fitted(found, self.config)
        if isinstance(head, Mlp):
            head = self._as_linear(head)
        linear = self._linear(head, normaliser)
        parts = {"weight": linear.weight} | ({} if linear.bias is None else {"bias": linear.bias})
        return Fitted(parts, self.config, linear.rows)

    # mean and std

    def _kept(self, normaliser: Normaliser | None) -> Normaliser | None:
        """The normaliser that must be folded into the head; None where config.json keeps it, or it is dropped."""
        if normaliser is None:
            return None
        if self.wishes.normaliser == "drop":
            text = f"{normaliser.keys} are left out: scores come out as the head gives them"
            self.context.note("changes-numbers", "normaliser-dropped", text)
            return None
        kind = self.target.dialect.normaliser
        stays = kind != "none" and kind == self.reading.dialect.normaliser
        if kind == "none" or not (stays or self.target.serves.keeps_mean) or self._is_combined():
            return normaliser
        if kind == "mean-var" and self.target.role != "reward":
            # safe-rlhf normalises no critic, whatever its config says.
            return normaliser
        self._write_normaliser(normaliser.mean, normaliser.std)
        if not self.target.serves.keeps_mean:
            text = (
                f"mean and std stay in config.json, where {self.target.words} reads uninitialised memory in their "
                "place (transformers 5): leave reward normalisation off"
            )
            self.context.note("changes-numbers", "normaliser-lost", text)
        return None

    def _is_combined(self) -> bool:
        return self.wishes.label is not None or bool(self.wishes.label_weights)

    def _write_normaliser(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        if self.target.dialect.normaliser == "mean-std":
            self.config |= {"mean": mean[0], "std": std[0]}
        else:
            var = [s * s for s in std]
            self.config |= {"do_normalize": True, "normalizer_type": "RunningMeanStd", "mean": list(mean), "var": var}

    # Linear heads

    def _linear(self, head: Linear, normaliser: Normaliser | None) -> Linear:
        """Rows chosen, the normaliser folded in, the bias where the target wants it."""
        rows = self._rows(head.rows, normaliser)
        if normaliser is not None:
            text = f"{normaliser.keys} are folded into the head: the score is divided by std, with mean taken off"
            self.context.note("info", "normaliser-folded", text)
        weight = rows.of(head.weight, shifted=False)
        return Linear(weight, self._bias(rows, head, weight))

    def _rows(self, count: int, normaliser: Normaliser | None) -> _Rows:
        mean = normaliser.mean if normaliser else (0.0,) * count
        std = normaliser.std if normaliser else (1.0,) * count
        if len(mean) != count:
            what = f"{len(mean)} means go with a head of {count} rows"
            raise Refused(
                "normaliser", what, next=Steps("take them out of config.json, or ", Again(("--normaliser", "drop")))
            )
        unit = tuple(tuple(float(i == j) for j in range(count)) for i in range(count))
        weights, label = self.wishes.label_weights, self.wishes.label
        if weights:
            if len(weights) != count:
                raise UsageError(
                    "usage", f"--label-weights takes a number for each of {count} rows, not {len(weights)}"
                )
            scaled = tuple(w / s for w, s in zip(weights, std, strict=True))
            shift = -math.fsum(w * m / s for w, m, s in zip(weights, mean, std, strict=True))
            return _Rows((scaled,), (shift,), (1.0,))
        if label is not None:
            if not 0 <= label < count:
                raise UsageError("usage", f"--label takes one of 0 to {count - 1}, not {label}")
            return _Rows((unit[label],), (-mean[label],), (std[label],))
        if count > 1 and not self.target.serves.labels:
            raise self._several(count)
        return _Rows(unit, tuple(-m for m in mean), tuple(std))

    def _several(self, count: int) -> Refused:
        options: tuple[str, ...] = ("--label", "1")
        does = " takes a row"
        if count == 2:
            options, does = ("--label-weights=-1,1",), " gives the difference of the two logits"
        return Refused(
            "head-labels",
            f"the head has {count} rows, and {self.target.words} takes one value for each token",
            expected="one row, or a fixed sum of rows",
            next=Steps(Again(options), f"{does}; --label-weights W0,W1,... gives any sum"),
        )

    def _bias(self, rows: _Rows, head: Linear, weight: LazyTensor) -> LazyTensor | None:
        has_place = self.spec.bias == "always" or (self.spec.bias == "config" and (head.bias or any(rows.shift)))
        if self.spec.bias == "config":
            self.config["bias"] = bool(has_place)
        if has_place:
            if head.bias is not None:
                return rows.of(head.bias, shifted=True)
            return _literal(weight.info.dtype, rows.constants((0.0,) * head.rows))
        known = (0.0,) * head.rows if head.bias is None else values(head.bias, self.context)
        constants = rows.constants(known)
        if any(constants):
            self._settle_bias(constants, weight)
        elif head.bias is not None:
            self.context.note("info", "head-bias-zero", "the head's bias is zero: nothing is lost without it")
        return None

    def _settle_bias(self, constants: list[float], weight: LazyTensor) -> None:
        """A constant that the target has no place for: refused, dropped or written as a mean, as the user chose."""
        shown = ", ".join(f"{c:.6g}" for c in constants)
        if self.wishes.bias == "drop":
            text = f"the head's constant {shown} is dropped: every score is lower by it; rankings and differences stay"
            self.context.note("changes-numbers", "head-bias", text)
        elif self.wishes.bias == "into-mean":
            self._into_mean(constants)
        else:
            what = f"the head adds {shown} to every score, and {self.target.words} has no place for it"
            raise Refused(
                "head-bias",
                f"{what}{self._spread(constants, weight)}",
                expected=self._bias_ways(),
                next=Again(("--bias", "drop")),
            )

    def _into_mean(self, constants: list[float]) -> None:
        if self.target.dialect.normaliser != "mean-std" or not self.target.serves.keeps_mean or len(constants) != 1:
            raise Refused(
                "bias-into-mean",
                f"{self.target.words} doesn't keep mean and std of config.json: under transformers 5 they are "
                "uninitialised memory, and others don't know them",
                expected="--bias drop: shifts every score by the constant",
                next=Again(("--bias", "drop")),
            )
        mean, std = self.config.get("mean", 0.0), self.config.get("std", 1.0)
        self.config |= {"mean": mean - constants[0], "std": std}
        text = (
            f"the head's constant {constants[0]:.6g} is written as mean {self.config['mean']:.6g} and std {std:.6g}: "
            "it counts only with reward normalisation on (--normalize_reward)"
        )
        self.context.note("changes-numbers", "head-bias", text)

    def _spread(self, constants: list[float], weight: LazyTensor) -> str:
        """How large the constant is beside what is known of scores."""
        known = self.reading.normaliser
        if known is not None and len(known.std) == 1:
            return f"; scores spread by {known.std[0]:.6g} (std), so it is {abs(constants[0]) / known.std[0]:.3g} of it"
        if isinstance(weight, tensors.Apply) or weight.info.nbytes > 1 << 20:
            return ""
        norm = math.sqrt(math.fsum(v * v for v in values(weight, self.context)))
        return f"; the weight's norm, by which scores spread, is {norm:.4g}"

    def _bias_ways(self) -> str:
        ways = ["--bias drop (shifts every score; rankings, differences and mean-free advantages stay)"]
        if self.target.dialect.normaliser == "mean-std" and self.target.serves.keeps_mean:
            ways.append("--bias into-mean (kept where reward normalisation is on)")
        return "; ".join([*ways, "or a target with a bias: --to trl-valuehead, --to llamafactory"])

    # MLPs

    def _as_mlp(self, head: Head, normaliser: Normaliser | None) -> dict[str, LazyTensor]:
        """`{0,2}.{weight,bias}` of a ReLU MLP with as many hidden units as the target has."""
        if isinstance(head, Mlp):
            rows = self._rows(head.rows, normaliser)
            hidden = head.first.weight.info.shape[1]
            second = rows.of(head.second.weight, shifted=False)
            bias = rows.of(head.second.bias, shifted=True) if head.second.bias is not None else None
            return self._padded(head.first, Linear(second, bias), self.spec.width * hidden or head.first.rows)
        linear = self._linear_with_bias(head, normaliser)
        hidden, dtype = linear.weight.info.shape[1], linear.weight.info.dtype
        minus = _Rows(((-1.0,),), (0.0,), (1.0,)).of(linear.weight, shifted=False)
        first = Linear(tensors.concat([linear.weight, minus], 0), Filled(TensorInfo(dtype, (2,)), 0.0))
        pair = tensors.concat([Filled(TensorInfo(dtype, (1, 1)), v) for v in (1.0, -1.0)], 1)
        text = "the linear head is written as two hidden units, x and -x, of the ReLU MLP: exact"
        self.context.note("info", "head-embedded", text)
        return self._padded(first, Linear(pair, linear.bias), self.spec.width * hidden)

    def _linear_with_bias(self, head: Linear, normaliser: Normaliser | None) -> Linear:
        rows = self._rows(head.rows, normaliser)
        weight = rows.of(head.weight, shifted=False)
        return Linear(weight, self._bias(rows, head, weight))

    def _padded(self, first: Linear, second: Linear, units: int) -> dict[str, LazyTensor]:
        """Hidden units that are added have no weight in the second layer: they change nothing."""
        missing = units - first.rows
        if missing < 0:
            what = f"the head has {first.rows} hidden units, and {self.target.words} has {units}"
            raise Refused("head-units", what)
        assert first.bias is not None
        assert second.bias is not None
        dtype, hidden = first.weight.info.dtype, first.weight.info.shape[1]
        if missing:
            self._say_units(missing)
        more = self._more_units(dtype, missing, hidden)
        return {
            "0.weight": tensors.concat([first.weight, *more], 0),
            "0.bias": tensors.concat([first.bias, *_zeros(first.bias.info.dtype, (missing,))], 0),
            "2.weight": tensors.concat([second.weight, *_zeros(second.weight.info.dtype, (1, missing))], 1),
            "2.bias": second.bias,
        }

    def _more_units(self, dtype: DType, count: int, hidden: int) -> list[LazyTensor]:
        if self.wishes.init == "normal" and count:
            return [normal((count, hidden), dtype, self.wishes.seed)]
        return _zeros(dtype, (count, hidden))

    def _say_units(self, count: int) -> None:
        if self.wishes.init == "normal":
            text = f"{count} unused hidden units have normal weights from seed {self.wishes.seed}, and no effect yet"
            self.context.consents["init-head"] = text
        else:
            text = f"{count} unused hidden units are zero and never learn; --init-head normal lets them, at no effect"
        self.context.note("info", "head-units", text)

    def _as_linear(self, head: Mlp) -> Linear:
        """The linear head that an MLP holds as a pair of units, x and -x; any other MLP is refused."""
        found = unembedded(head, self.context)
        if found is None:
            raise Refused(
                "head-not-linear",
                f"the head is an MLP of {head.first.rows} hidden units, and {self.target.words} has one linear layer: "
                "no weights give the same numbers",
                next=Steps(
                    Again(("--to", "trlx")),
                    ", whose head is an MLP too; or ",
                    Again(("--init-head", "zeros")),
                    " for a fresh critic",
                ),
            )
        self.context.note("info", "head-unembedded", "the MLP is a linear head, written as two units: exact")
        return found


def unembedded(head: Mlp, context: Context) -> Linear | None:
    """The linear head in two hidden units w and -w with weights 1 and -1, the others without effect; else None."""
    if head.second.weight.info.nbytes > 1 << 20 or head.first.bias is None or head.rows != 1:
        return None
    second = values(head.second.weight, context)
    used = [i for i, v in enumerate(second) if v != 0]
    if [second[i] for i in used] != [1.0, -1.0]:
        return None
    plus, minus = (tensors.narrow(head.first.weight, 0, i, 1) for i in used)
    offsets = [values(tensors.narrow(head.first.bias, 0, i, 1), context)[0] for i in used]
    is_pair = all(p == -m for p, m in zip(values(plus, context), values(minus, context), strict=True))
    return Linear(plus, head.second.bias) if is_pair and offsets == [0.0, 0.0] else None


def fresh(hidden: int, dtype: DType, wishes: Wishes) -> Linear:
    """A head that the user asked for: zeros, or normal with variance 1 / (h + 1), as trainers draw theirs."""
    if wishes.init == "zeros":
        return Linear(Filled(TensorInfo(dtype, (1, hidden)), 0.0))
    return Linear(normal((1, hidden), dtype, wishes.seed))


def normal(shape: tuple[int, ...], dtype: DType, seed: int) -> LazyTensor:
    """Normal numbers with variance 1 / (h + 1), from a seed."""
    std = 1 / math.sqrt(shape[-1] + 1)
    params: dict[str, Param] = {"seed": seed, "std": std, "shape": shape, "out": dtype.value}
    return tensors.apply(HEAD_NORMAL, [], params)


def _zeros(dtype: DType, shape: tuple[int, ...]) -> list[LazyTensor]:
    info = TensorInfo(dtype, shape)
    return [Filled(info, 0.0)] if info.numel else []


def _literal(dtype: DType, numbers: list[float]) -> LazyTensor:
    if len(set(numbers)) == 1:
        return Filled(TensorInfo(dtype, (len(numbers),)), numbers[0])
    return tensors.concat([Filled(TensorInfo(dtype, (1,)), n) for n in numbers], 0)
