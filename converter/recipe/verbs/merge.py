"""What `merge-lora` does: a recipe from plain values, and arguments given the wrong way round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from converter.core.files.names import ADAPTER_CONFIG, MODEL_CONFIG, RECEIPT
from converter.diagnostic import Command
from converter.errors import ConvertError, UsageError
from converter.recipe.options import WriteOptions
from converter.recipe.recipe import MOST_ENTRIES, SOURCE, Probe, Recipe, Step
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import Conversion, convert_recipe
from converter.recipe.verbs.knobs import Where, Writing, optional, options_of
from converter.recipe.verbs.pieces import cast_steps, output
from converter.sources.hub.names import is_on_hub
from converter.sources.locate import resolve
from converter.sources.opening import InputSpec, input_spec


@dataclass(frozen=True)
class MergeRequest:
    """What the user asked for."""

    adapter: str
    base: str | None = None
    more: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    numerics: str = "best"
    base_is_residual: bool = False
    lora_alpha: float | None = None
    combine: str = "sum"
    density: float | None = None
    svd_rank: int = 0
    seed: int = 0
    dequantize: bool = False
    requantize: str | None = None
    probe: str | None = None
    pairs: int = MOST_ENTRIES
    against_base: str | None = None


def merge_lora(
    adapter: Where,
    out: Where | None = None,
    *,
    base: Where | None = None,
    adapters: Sequence[Where] = (),
    weights: Sequence[float] = (),
    numerics: str = "best",
    base_is_residual: bool = False,
    lora_alpha: float | None = None,
    combine: str = "sum",
    density: float | None = None,
    svd_rank: int = 0,
    seed: int = 0,
    dequantize: bool = False,
    requantize: str | None = None,
    probe: Where | None = None,
    pairs: int = MOST_ENTRIES,
    against_base: Where | None = None,
    **writing: Unpack[Writing],
) -> Conversion:
    """Merge one or more LoRA adapters into their base model; a reward-model adapter gives a reward model.

    Args:
        adapter: a folder or a name on the Hub.
        out: the folder to write, `hf://owner/name` or `s3://bucket/folder`; None: only plan.
        base: None: the one that the adapter records.
        adapters: more adapters (`--adapter`), and `weights` one number for each, the first one's included.
        numerics: `best` rounds once; `peft` is bit-identical to PEFT's merge.
        base_is_residual: the base is the residual model that a PiSSA or OLoRA start saved.
        lora_alpha: lora_alpha of training, where adapter_config.json records none or 0.
        combine: `sum`, which is exact, or a way of PEFT's `add_weighted_adapter`: `cat`, `linear`, `svd`, `ties`,
            `magnitude_prune`, `dare_linear`, `dare_ties`; with `density`, `svd_rank` and `seed`.
        dequantize: make a quantised base's weights whole first.
        requantize: `same` writes adapted weights of a quantised base back in their own format (FP8 in blocks, MXFP4).
        probe: preference pairs or texts, on which the merge is compared with what was trained: the adapter over the
            dequantised weights of a quantised base, unrounded. The figures are notes, and in the receipt under `probe`.
        pairs: how many of them, the first ones.
        against_base: another base that the adapter may have been trained over: a merge into it is measured too.
        writing: see `Writing`.

    Raises:
        UsageError: arguments the wrong way round (`arguments-swapped`), or not one weight for each adapter (`usage`).
        Refused: the merge is refused, or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    request = MergeRequest(
        str(adapter), optional(base), tuple(map(str, adapters)), tuple(weights), numerics, base_is_residual, lora_alpha,
        combine, density, svd_rank, seed, dequantize, requantize, optional(probe), pairs, optional(against_base),
    )  # fmt: skip
    with allowing(options.allow_name):
        refuse_swapped(request, optional(out))
        recipe = merge_recipe(request, options)
        return convert_recipe(recipe, optional(out), options, going, lambda p: Conversion(prepared=p, options=options))


def merge_recipe(asked: MergeRequest, options: WriteOptions) -> Recipe:
    """The recipe that the arguments mean.

    Raises:
        UsageError: not one weight for each adapter, or two ways to write a quantised base (`usage`).
    """
    adapters = {"adapter": input_spec(asked.adapter, options.revision)}
    adapters |= {f"adapter-{n}": input_spec(path) for n, path in enumerate(asked.more, 2)}
    if asked.weights and len(asked.weights) != len(adapters):
        raise UsageError(
            "usage",
            "give one --weight for each adapter, in order",
            expected=str(len(adapters)),
            got=str(len(asked.weights)),
        )
    fields: dict[str, Any] = {"adapters": list(adapters), "numerics": asked.numerics}
    if asked.weights:
        fields["weights"] = list(asked.weights)
    if asked.base_is_residual:
        fields["base-is-residual"] = True
    if asked.lora_alpha is not None:
        fields["lora-alpha"] = asked.lora_alpha
    chosen = {"combine": asked.combine, "density": asked.density, "svd-rank": asked.svd_rank, "seed": asked.seed}
    default = {"combine": "sum", "density": None, "svd-rank": 0, "seed": 0}
    fields |= {key: value for key, value in chosen.items() if value != default[key]}
    base = InputSpec(base_of="adapter") if asked.base is None else input_spec(asked.base)
    if asked.requantize is not None:
        fields["requantize"] = asked.requantize
    if asked.dequantize and asked.requantize is not None:
        raise UsageError("usage", "--dequantize writes whole weights, --requantize quantised ones: give one of them")
    if asked.against_base is not None and asked.probe is None:
        raise UsageError("usage", "--against-base names a base that --probe measures; there is no --probe")
    others, probe = {}, None
    if asked.probe is not None:
        others = {} if asked.against_base is None else {"against-base": input_spec(asked.against_base)}
        probe = Probe(asked.probe, asked.pairs, next(iter(others), None))
    first = (Step("dequantize", {}),) if asked.dequantize else ()
    steps = (*first, Step("merge-lora", fields), *cast_steps(options))
    inputs = {SOURCE: base, **adapters, **others}
    return Recipe(inputs, steps, output(options), file="merge-lora", probe=probe)


def refuse_swapped(asked: MergeRequest, out: str | None) -> None:
    """Recognise a base model given as the adapter, or an adapter given as the base, by what the folders hold.

    Raises:
        UsageError: with the corrected command (`arguments-swapped`).
    """
    first = _kind(asked.adapter)
    given_base = None if asked.base is None else _kind(asked.base)
    if first == "model":
        what = f"{asked.adapter} is a model, not an adapter"
        if given_base == "adapter" and asked.base is not None:
            raise _swapped(what, merge_command(asked.base, out, asked.adapter))
        if out is not None and _kind(out) == "adapter":
            raise _swapped(f"{what}; {out} is the adapter", merge_command(out, None, asked.adapter))
        raise _swapped(what, merge_command("ADAPTER", out, asked.adapter))
    is_foreign_model = out is not None and _kind(out) == "model" and not (Path(out).expanduser() / RECEIPT).is_file()
    if first == "adapter" and asked.base is None and out is not None and is_foreign_model:
        raise _swapped(
            f"{out} is a model that is there already, not an output", merge_command(asked.adapter, None, out)
        )
    if given_base == "adapter":
        raise _swapped(f"{asked.base} is an adapter, not a base model", merge_command(asked.adapter, out, "BASE"))


def _kind(text: str) -> str | None:
    folder = Path(text).expanduser()
    if is_on_hub(text):
        try:
            folder = resolve(text, in_parts=True).path
        except ConvertError:
            return None  # whoever opens it says why
    elif folder.is_file():
        folder = folder.parent
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    return "model" if (folder / MODEL_CONFIG).is_file() else None


def _swapped(what: str, command: Command) -> UsageError:
    return UsageError("arguments-swapped", what, expected="merge-lora ADAPTER OUT --base BASE", next=command)


def merge_command(adapter: str, out: str | None, base: str) -> Command:
    """The command with its arguments the right way round."""
    return Command("merge-lora", (adapter, out or "OUT", "--base", base))
