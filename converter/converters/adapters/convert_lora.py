"""`convert-lora`: a LoRA adapter as another program reads it: names, layouts of experts, one rank, other files.

Every update is what it was. What a program has no place for is refused by name; nothing is left out.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from converter.converters.adapters import expert_pairs
from converter.converters.adapters.expert_pairs import Joined, named, padded, put_together, scaled, taken_apart
from converter.converters.adapters.layouts import Layout, find_layout
from converter.converters.adapters.pairs import Pair, PlainLora, read_pairs, with_ranks
from converter.converters.adapters.peft_config import PEFT_VERSION
from converter.converters.adapters.tinker import as_tinker
from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import read_modules
from converter.converters.merge.foreign_adapters import plain_names
from converter.converters.merge.methods import mlx
from converter.core.checkpoint import Checkpoint, Input
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps, as_argument
from converter.errors import Refused, UsageError
from converter.text import fold, show

_IN_LAYER = re.compile(r"^.*?\.?(?:layers|h|blocks)\.\d+\.(?P<rest>.+)$", re.ASCII)
_LOST = ("trainable_token_indices", "lora_bias", "ensure_weight_tying")
_SELECTORS = ("exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class ConvertLora:
    """Give the LoRA adapter that flows through the form that a program reads.

    Attributes:
        target: `peft`, `peft@0.13`, `transformers@4`, `vllm`, `mlx` or `tinker`.
        base: the model that it is over; needed for factors of experts.
    """

    name: ClassVar[str] = "convert-lora"

    target: str
    base: Input | None = None

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The adapter in the other form.

        Raises:
            UsageError: no such target (`usage`), or experts and no base (`base-needed`).
            Refused: it is not plain LoRA (`not-plain-lora`), or the target has no place for what it holds
                (`adapter-not-for-target`).
        """
        layout = find_layout(self.target)
        where = show(checkpoint.origin.asked)
        held, said = plain_names(checkpoint.tensors, where)
        for words in said:
            context.note("info", "adapter-names", f"adapter names: {words}")
        adapter = checkpoint.replace(tensors=held)
        found = _of_mlx(adapter) if adapter.config.get("peft_type") == mlx.PEFT_TYPE else read_pairs(adapter)
        self._expect_places(found, adapter, layout)
        joined = self._experts(found, adapter, layout)
        pairs: Sequence[Pair] = joined.pairs
        if layout.one_rank:
            pairs = _of_one_rank(pairs, context)
        if layout.is_mlx:
            return self._written(checkpoint, *_as_mlx(pairs, adapter.config), stem="adapters")
        config = _config(adapter.config, pairs, joined.parameters, layout)
        if layout.is_tinker:
            every = {"target_modules": "all-linear"}
            return self._written(checkpoint, as_tinker(pairs, where), config | every)
        out = {key: t for p in pairs for key, t in zip(p.keys, (p.a, p.b), strict=True)} | dict(found.rest)
        return self._written(checkpoint, out, config)

    def _written(
        self, checkpoint: Checkpoint, out: Mapping[str, LazyTensor], config: Mapping[str, Any], stem: str = ""
    ) -> Checkpoint:
        aside = {} if self.base is None else {self.base.origin.path: "only its names, shapes and config were needed"}
        inputs = {} if self.base is None else dict(self.base.inputs)
        return checkpoint.replace(
            tensors=dict(out),
            config=dict(config),
            config_bytes=None,
            shards={},
            metadata={"format": "pt"},
            stem=stem,
            set_aside={**checkpoint.set_aside, **aside},
            inputs={**inputs, **checkpoint.inputs},
        )

    def _expect_places(self, found: PlainLora, adapter: Checkpoint, layout: Layout) -> None:
        """Refuse what the target has no place for.

        Raises:
            Refused: `adapter-not-for-target`.
        """
        where = show(adapter.origin.asked)
        merge = Command("merge-lora", (as_argument(adapter.origin.asked), "MERGED"))
        if found.rest and not layout.whole:
            what = f"{layout.name} reads factors alone, and the adapter holds tensors beside them: {fold(found.rest)}"
            raise Refused("adapter-not-for-target", what, where=where, next=merge)
        lost = [key for key in _LOST if adapter.config.get(key)] if layout.fields is not None else []
        if lost:
            what = f"{layout.name} does not know `{lost[0]}`, which is set"
            raise Refused("adapter-not-for-target", what, where=where, facts={"field": lost[0]}, next=merge)
        outside = [p.module for p in found.pairs if not _IN_LAYER.match(p.module)]
        if outside and not layout.outside:
            what = f"{layout.name} has LoRA inside of the layers alone, and the adapter has some on {fold(outside)}"
            raise Refused("adapter-not-for-target", what, where=where, next=merge)

    def _experts(self, found: PlainLora, adapter: Checkpoint, layout: Layout) -> Joined:
        """The pairs with those of experts in the target's layout."""
        needing = expert_pairs.of_experts(found.pairs)
        if not needing:
            return Joined(found.pairs, ())
        if self.base is None:
            what = f"{fold(needing)} are of experts, and only their base says what each is called"
            step = Steps(Again(("--base", "BASE")), ", the model that the adapter is over")
            raise UsageError("base-needed", what, where=show(adapter.origin.asked), next=step)
        apart = taken_apart(found, adapter, self.base)
        if layout.name == "peft":
            return put_together(apart, self.base, adapter.config)
        if layout.is_mlx:
            what = "mlx-lm keeps the experts of a layer in one tensor of its own, which is not written here"
            raise Refused("adapter-not-for-target", what, where=show(adapter.origin.asked))
        return Joined(apart, ())


def _of_mlx(adapter: Checkpoint) -> PlainLora:
    """The pairs of an adapter of mlx-lm, whose factors are `[in, r]` and `[r, out]`."""
    config = read_adapter_config(adapter)
    pairs: list[Pair] = []
    for name, module in read_modules(adapter.tensors, show(adapter.origin.asked)).modules.items():
        factors = module.factors
        if set(factors) != {"lora_a", "lora_b"} or any(len(t.info.shape) != 2 for t in factors.values()):
            what = f"{show(name)} has {fold([*factors, *module.whole])}, and lora_a and lora_b are expected"
            raise Refused("adapter-incomplete", what, where=show(adapter.origin.asked))
        a, b = (scaled(factors[part], turned=True) for part in ("lora_a", "lora_b"))
        pairs.append(named(name, a, b, config.fields["mlx_scale"]))
    return PlainLora(config, tuple(pairs), {})


def _of_one_rank(pairs: Sequence[Pair], context: Context) -> list[Pair]:
    """The pairs at the largest rank, filled with zeros, and at one scale; B makes up for a scale of its own."""
    rank = max(p.rank for p in pairs)
    scale = Counter(p.scale for p in pairs).most_common(1)[0][0]
    if others := [p.module for p in pairs if p.scale != scale]:
        text = f"{len(others)} modules have a scale of their own, which is in their lora_B now: {fold(others)}"
        context.note("changes-numbers", "scale-folded", text)
    if more := [p.module for p in pairs if p.rank != rank]:
        text = f"{len(more)} modules of a lower rank are filled with zeros to {rank}: {fold(more)}"
        context.note("info", "rank-filled", text)
    return [
        dataclasses.replace(
            p,
            a=padded(p.a, 0, 0, rank - p.rank),
            b=padded(scaled(p.b, p.scale / scale), 1, 0, rank - p.rank),
            rank=rank,
            scale=scale,
        )
        for p in pairs
    ]


def _as_mlx(pairs: Sequence[Pair], config: Mapping[str, Any]) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """mlx-lm's tensors and options; `num_layers` -1 is all layers, and one without a pair begins without effect."""
    out: dict[str, LazyTensor] = {}
    for p in pairs:
        out |= {f"{p.module}.lora_a": scaled(p.a, turned=True), f"{p.module}.lora_b": scaled(p.b, turned=True)}
    keys = sorted({match["rest"] for p in pairs if (match := _IN_LAYER.match(p.module))})
    parameters = {"rank": pairs[0].rank, "scale": pairs[0].scale, "dropout": 0.0, "keys": keys}
    model = config.get("base_model_name_or_path")
    return out, {"fine_tune_type": "lora", "model": model, "num_layers": -1, "lora_parameters": parameters}


_PEFT_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "lora_dropout": 0.0,
    "modules_to_save": None, "use_dora": False, "use_rslora": False,
}  # fmt: skip


def _config(
    config: Mapping[str, Any], pairs: Sequence[Pair], parameters: Sequence[str], layout: Layout
) -> dict[str, Any]:
    """PEFT's config for the pairs: names of modules as they are now, and no field that the target does not know."""
    is_foreign = config.get("peft_type") == mlx.PEFT_TYPE
    kept = {k: config[k] for k in ("base_model_name_or_path", "task_type") if k in config} if is_foreign else config
    made = {**_PEFT_CONFIG, **kept, "peft_type": "LORA", "init_lora_weights": True}
    modules = [p.module for p in pairs if not p.is_stacked]
    named_so = config.get("target_modules")
    is_selected = any(config.get(key) for key in _SELECTORS) or not isinstance(named_so, list)
    had_experts = bool(config.get("target_parameters")) or any(".experts." in f".{m}." for m in modules)
    if is_selected or had_experts or parameters:
        made |= {"target_modules": modules} | dict.fromkeys(_SELECTORS)
    if layout.one_rank:
        made["use_rslora"] = False
    made.pop("target_parameters", None)
    made.pop("peft_version", None)
    if parameters:
        made |= {"target_parameters": list(parameters), "peft_version": PEFT_VERSION}
    made = with_ranks(made, pairs)
    if layout.fields is not None:
        made = {k: v for k, v in made.items() if k in layout.fields}
    return made
