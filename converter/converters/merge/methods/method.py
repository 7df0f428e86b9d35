"""What a PEFT method is: the names of its tensors, the fields of its config, and how its update is planned.

A method is a file with a value of this type, and one line in the group `rlhf_convert.methods`. It says how an update
is computed as a kernel's name, inputs and parameters; torch is imported by the kernel's body, when values are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.methods.fields import COMMON, Field
from converter.converters.merge.orientation import is_conv1d
from converter.converters.merge.patterns import matching
from converter.core.tensors.dtypes import TensorInfo
from converter.core.tensors.kernel_specs import KernelSpec, Param, Params
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.text import show

Release = tuple[int, int]
"""The first two numbers of a version."""


@dataclass(frozen=True)
class AdapterConfig:
    """`adapter_config.json`, checked field by field for one method.

    Attributes:
        fields: what the method's and the common fields were read as.
        release: of PEFT, which saved it; None where nothing says which.
        is_inferred: no word of the config gives the release, but which fields it has.
    """

    method: Method
    fields: Mapping[str, Any]
    release: Release | None = None
    is_inferred: bool = False

    @property
    def is_older(self) -> bool:
        """True where PEFT before 0.14 saved it, whose arithmetic was another one in two places."""
        return self.is_inferred and self.release is not None and self.release < (0, 14)

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that were trained and saved whole."""
        saved: tuple[str, ...] = self.fields["modules_to_save"]
        return saved

    @property
    def token_indices(self) -> Mapping[str, tuple[int, ...]]:
        """Rows that were trained, per embedding module name; the key `""` stands for the input embedding."""
        indices: Mapping[str, tuple[int, ...]] = (
            self.fields.get("token_indices") or self.fields["trainable_token_indices"]
        )
        return indices

    @property
    def bias(self) -> str:
        """Which biases were trained: `none`, `all` or `lora_only`."""
        return str(self.fields["bias"])

    @property
    def task_type(self) -> str | None:
        """`SEQ_CLS` and so on, where the config says it."""
        task: str | None = self.fields["task_type"]
        return task

    @property
    def ensure_weight_tying(self) -> bool:
        """True where what was trained on one side of a tie belongs to both."""
        return bool(self.fields["ensure_weight_tying"])


@dataclass(frozen=True)
class Site:
    """A module of an adapter, and the tensors of the base that it is over.

    Attributes:
        target: the name on disk of the module's weight, for messages and for its orientation.
        base: tensors of the base's module by their last name: `weight`, `bias` where there is one, and so on.
        model_config: the base's config.json.
        weight: the factor that the user gave for this adapter's update; 1 unless the method is linear.
        numerics: `best` or `peft`.
        where: the adapter, for messages.
        shared: tensors that the adapter has once for all modules, by the names that the method declares.
        peers: the base's weight of every module that the adapter has factors for, for methods whose random
            projections are drawn once over all of them.
        is_parameter: PEFT reaches the weight as a bare parameter, and rounds an update to its dtype before adding it.
        turned: the base has the matrix `[in, out]`, or not; None where names and shapes say it.
        below: the tensors of `base` themselves, for an update that reads more than the tensor that it changes.
    """

    module: Module
    config: AdapterConfig
    target: str
    base: Mapping[str, TensorInfo]
    model_config: Mapping[str, Any]
    weight: float
    numerics: str
    where: str
    shared: Mapping[str, LazyTensor] = field(default_factory=dict)
    peers: Mapping[str, TensorInfo] = field(default_factory=dict)
    is_parameter: bool = False
    turned: bool | None = None
    below: Mapping[str, LazyTensor] = field(default_factory=dict)

    @property
    def is_conv1d(self) -> bool:
        """True where the family stores the weight `[in, out]`; for square weights the shapes do not tell."""
        if self.turned is not None:
            return self.turned
        return is_conv1d(self.target, self.model_config)

    def field(self, key: str) -> Any:
        """What a field of the config was read as."""
        return self.config.fields[key]

    def matched(self, patterns: str, key: str) -> Any:
        """What a field of patterns has for this module, by its name in memory; else the field `key`."""
        return matching(self.field(patterns), self.module.name, self.field(key))

    def expect_one_rule(self, what: str, trained: float, now: float, advice: str) -> None:
        """Go on where PEFT computes now what it computed when this adapter was trained.

        Raises:
            Refused: they differ (`adapter-ambiguous`).
        """
        if trained != now:
            raise Refused(
                "adapter-ambiguous",
                f"adapter_config.json is as PEFT before 0.14 saved it, and {what} of {show(self.module.name)} is "
                "another since then: what it was trained with, and what PEFT computes now, differ",
                where=self.where,
                expected=f"{trained:g}, as it was trained",
                got=f"{now:g}, as PEFT computes now",
                next=advice,
            )

    @property
    def is_turned(self) -> bool:
        """True for a matrix that is stored `[in, out]`."""
        return len(self.base["weight"].shape) == 2 and self.is_conv1d

    @property
    def sides(self) -> tuple[int, int]:
        """Outputs and inputs of the weight; a convolution's kernel counts with its inputs."""
        first, *rest = self.base["weight"].shape
        return (rest[0], first) if self.is_turned else (first, prod(rest))

    def params(self, leaf: str = "weight", **more: Param) -> dict[str, Param]:
        """Parameters of a kernel over one of the base's tensors."""
        out = self.base[leaf].dtype.value
        return {"numerics": self.numerics, "out": out, "transposed": self.is_turned, "weight": self.weight, **more}

    def linear(self) -> tuple[int, int]:
        """Outputs and inputs of a layer that is a matrix.

        Raises:
            Refused: it is not (`adapter-shape`).
        """
        shape = self.base["weight"].shape
        if len(shape) != 2:
            raise self.misfit(shape, f"factors of {self.config.method.title}, which is of linear layers")
        return self.sides

    def shaped(self, name: str, *shape: int) -> LazyTensor:
        """A factor that the module must have, in the shape that it must have.

        Raises:
            Refused: it is missing (`adapter-incomplete`) or has another shape (`adapter-shape`).
        """
        return self.fitting(name, self.take(name), *shape)

    def fitting(self, name: str, tensor: LazyTensor, *shape: int) -> LazyTensor:
        """A tensor that must have that shape.

        Raises:
            Refused: it has another (`adapter-shape`).
        """
        if tensor.info.shape != shape:
            raise self.misfit(self.base["weight"].shape, f"{name} {list(tensor.info.shape)} instead of {list(shape)}")
        return tensor

    def common(self, name: str) -> LazyTensor:
        """A tensor that the adapter must have once for all modules.

        Raises:
            Refused: it is missing (`adapter-incomplete`).
        """
        if name not in self.shared:
            raise Refused("adapter-incomplete", f"`base_model.{name}` is missing", where=self.where)
        return self.shared[name]

    def nothing_beside(self, *names: str) -> None:
        """Refuse factors of the method that have no place in this layer beside those.

        Raises:
            Refused: there is one (`adapter-incomplete`).
        """
        others = self.module.factors.keys() - set(names)
        if others:
            raise self.incomplete(f"{show(min(others))} has no place in this layer")

    def expect_rank(self, expected: int, got: int) -> None:
        """Refuse a factor of another rank than the config's.

        Raises:
            Refused: it has another (`adapter-rank`).
        """
        if got != expected:
            raise Refused(
                "adapter-rank",
                f"the rank of {show(self.module.name)} is not the one in adapter_config.json",
                where=self.where,
                expected=f"r = {expected}",
                got=f"r = {got} in the tensor",
            )

    def take(self, name: str) -> LazyTensor:
        """A factor that the module must have.

        Raises:
            Refused: it is missing (`adapter-incomplete`).
        """
        if name not in self.module.factors:
            switch = self.config.method.switch
            raise self.incomplete(f"{name} is missing" + (f", and {switch} is set" if switch else ""))
        return self.module.factors[name]

    def incomplete(self, what: str) -> Refused:
        """The refusal of a module whose factors are not what the method needs."""
        return Refused("adapter-incomplete", f"{show(self.module.name)}: {what}", where=self.where)

    def misfit(self, base: tuple[int, ...], got: str) -> Refused:
        """The refusal of factors whose shapes do not fit the base's tensor."""
        return Refused(
            "adapter-shape",
            f"the factors of {show(self.module.name)} do not fit the base weight",
            where=self.where,
            expected=f"factors of a weight {list(base)}",
            got=got,
            next=Steps("name the base that the adapter was trained on: ", Again(("--base", "DIR"))),
        )


@dataclass(frozen=True)
class Start:
    """What the start of training did to the base's tensor before anything was trained: a kernel over that tensor."""

    kernel: KernelSpec
    params: Params


@dataclass(frozen=True)
class Region:
    """A part of a tensor of the base: rows `[start, stop)` of its matrix, or of one expert's in a stack of them."""

    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True)
class Update:
    """What an adapter does to one tensor of a module: a kernel over the base's tensor and the adapter's.

    Attributes:
        inputs: of the kernel, after the base's own tensor.
        params: of the kernel. `out` is the dtype that the result is rounded to, where the kernel rounds.
        leaf: which of the module's tensors changes.
        start: applied to the base's tensor first.
        joins: several adapters' updates of this kernel are one call of it, and so are rounded once: their inputs stand
            one after another, parameters that are tuples likewise, and all other parameters have to agree.
        scale: a factor of the whole update; where it is 0 nothing changes.
        region: the part of the tensor that it is of; None for all of it.
        weighted: the two numbers that make the scale: the user's weight, and the method's own.
    """

    kernel: KernelSpec
    inputs: tuple[LazyTensor, ...]
    params: Params
    leaf: str = "weight"
    start: Start | None = None
    joins: bool = False
    scale: float = 1.0
    region: Region | None = None
    weighted: tuple[float, float] = (1.0, 1.0)


def only_the_weight(module: Module) -> tuple[str, ...]:
    """Most methods change the weight of a module, which the base must have."""
    return ("weight",)


@dataclass(frozen=True)
class Method:
    """A PEFT method, or a variant of one.

    Attributes:
        title: in users' words.
        peft_type: what `adapter_config.json` calls it.
        factors: names of its tensors for a module, without `.weight`: `lora_A`.
        update: the updates that a module's factors are, for the tensors in `Site.base`. It checks shapes, and refuses.
        fields: of its config, beside the common ones. A field that is set and not here stops the merge.
        switch: the field that, once set, makes this variant of the type out of the plain one; empty for the plain one.
        shared: names of tensors that it has once for the model (`base_model.vera_A`).
        pairs: factors that mean something only together.
        zeros: factors that begin as zeros: where all of them still are, nothing was trained.
        training: those of its factors that only training reads; they are left out, and the receipt says so.
        is_linear: an update can be weighted (`--weight`): twice the factor is twice the update.
        leaves: which of a module's tensors the base must have.
        layers: which layers it is of, for the documents.
        remark: what a user has to know of its merge, for the documents.
        kernels: those that no other package registers; found by name like all others.
    """

    title: str
    peft_type: str
    factors: tuple[str, ...]
    update: Callable[[Site], tuple[Update, ...]]
    fields: Mapping[str, Field] = field(default_factory=dict)
    switch: str = ""
    shared: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    zeros: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    is_linear: bool = True
    leaves: Callable[[Module], tuple[str, ...]] = only_the_weight
    layers: str = "Linear"
    remark: str = ""
    kernels: tuple[KernelSpec, ...] = ()

    @property
    def all_fields(self) -> Mapping[str, Field]:
        """The method's fields and those that every config has."""
        return {**COMMON, **self.fields}
