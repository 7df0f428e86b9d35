"""`to-megatron`: a model as a `torch_dist` checkpoint of megatron-core, which loads on any TP, PP and EP ranks.

Names are those of modules of TransformerEngine, which runs on GPUs use. Layers that are alike are stacked, as
megatron-core asks for them then; others have their numbers. Values are those of the model, copied; rows that pad the
vocabulary are zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from converter.converters.megatron_ranks import Modules, Ranks, by_rank
from converter.core.checkpoint import MODEL, Checkpoint, SideFile
from converter.core.context import Context
from converter.core.formats.pickle_values import Built, Global
from converter.core.formats.pickle_writer import write_pickle
from converter.core.formats.torch_zip_writer import tensorless
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Command
from converter.errors import Refused, UsageError
from converter.families.megatron.formulas import SizeError, Sizes, sizes_of
from converter.families.megatron.names import placed
from converter.families.megatron.next_tokens import as_mtp, copies, count
from converter.families.megatron.recorded import arguments
from converter.families.megatron.rows import NOT_WRITTEN, OUTPUT, OUTPUT_BIAS, ROWS, Row
from converter.families.megatron.writing import filed, is_homogeneous, pieces, stacked
from converter.families.ties import is_tied
from converter.text import fold, show

DIVISOR = 128
"""Source: the default of `--make-vocab-size-divisible-by`, megatron/training/arguments.py of core_v0.16.1."""
RELEASE = "release"
TRACKER = "latest_checkpointed_iteration.txt"
_HEAD = {"score.weight": OUTPUT, "score.bias": OUTPUT_BIAS}
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MANIFEST = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ToMegatron:
    """Write a model for megatron-core.

    Attributes:
        tp: tensor-parallel ranks that the vocabulary is padded for, as Megatron pads it.
        pp, ep, etp: stages, expert-parallel ranks, and ranks over which an expert's matrices are split (None: `tp`). A
            `torch_dist` checkpoint only records them: any others load it.
        apart: keep layers apart though they are alike, for runs with a list as `moe_layer_freq` or with block specs.
        layout: `torch_dist`, or `legacy`: a file for each rank, which loads on these ranks alone.
        modules: of `legacy`, whose names are those of modules: which of Megatron's classes load it.
    """

    name: ClassVar[str] = "to-megatron"
    lays_out: ClassVar[bool] = True

    tp: int = 1
    apart: bool = False
    pp: int = 1
    ep: int = 1
    etp: int | None = None
    layout: Literal["torch_dist", "legacy"] = "torch_dist"
    modules: Modules = "transformer-engine"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The same values under Megatron's names, in its folders.

        Raises:
            UsageError: not a number of ranks (`usage`).
            Refused: no whole model (`megatron-shape`), a family or tensors that the table lacks (`megatron-family`,
                `megatron-keys`), or that config.json contradicts (`megatron-config`).
        """
        ranks = self._ranks()
        where = show(checkpoint.origin.asked)
        rows, sizes = _table(checkpoint, where)
        held, head = _with_head(checkpoint, context, where)
        dropped = {**checkpoint.dropped, **_without_copies(held, checkpoint, context)}
        checkpoint = checkpoint.replace(dropped=dropped)
        step = DIVISOR * self.tp
        vocabulary = -(-sizes.vocabulary // step) * step
        made = filed(held, rows, sizes, vocabulary=vocabulary)
        _expect_filed(made.unknown, made.lacking, made.misfits, checkpoint, where)
        # Read back by the other direction of the table: no name may come back another, or not at all.
        back = placed(made.tensors, rows, sizes)
        if back.tensors.keys() != held.keys() or back.unknown or back.misfits or back.twice:
            lost = sorted(held.keys() ^ back.tensors.keys())
            raise Refused("megatron-keys", f"{fold(lost)} would not come back as they went", where=where)
        keyed = as_mtp(made.tensors, sizes.layers)
        recorded = arguments(
            checkpoint.config, sizes, tp=ranks.tp, pp=ranks.pp, ep=ranks.ep, etp=ranks.etp, divisor=DIVISOR,
            padded=vocabulary,
        )  # fmt: skip
        if vocabulary > sizes.vocabulary:
            text = f"the vocabulary is padded from {sizes.vocabulary} to {vocabulary} rows, with zeros"
            context.note("info", "vocabulary-padding", text)
        beside = {**checkpoint.side_files, TRACKER: SideFile(content=RELEASE.encode())}
        if self.layout == "legacy":
            try:
                files = by_rank(keyed | head, recorded, ranks, self.modules, layers=sizes.layers)
            except ValueError as error:
                raise Refused("megatron-shape", f"the model can't be split so: {error}", where=where) from None
            trees = {f"{RELEASE}/{file}": tree for file, tree in files.items()}
            tensors = keyed | head
            return checkpoint.replace(
                tensors=tensors, shards={}, ties=(), container="trees", trees=trees, side_files=beside
            )
        is_stacked = is_homogeneous(keyed) and not self.apart
        tensors = (stacked(keyed) if is_stacked else keyed) | head
        return checkpoint.replace(
            tensors=tensors,
            shards={},
            ties=(),
            container="distcp",
            subfolder=RELEASE,
            boxes={key: pieces(key, is_stacked=is_stacked) for key in tensors},
            side_files={**beside, **_beside(recorded)},
        )

    def _ranks(self) -> Ranks:
        etp = self.tp if self.etp is None else self.etp
        for word, many in (("tensor", self.tp), ("pipeline", self.pp), ("expert", self.ep), ("expert-tensor", etp)):
            if not 1 <= many <= 1024:
                what = f"{many} is not a number of {word}-parallel ranks"
                raise UsageError("usage", what, expected="1 to 1024")
        if self.tp % etp:
            what = f"an expert's matrices can't be split over {etp} of {self.tp} tensor-parallel ranks"
            raise UsageError("usage", what, expected=f"--etp 1 or {self.tp}")
        return Ranks(self.tp, self.pp, self.ep, etp)


def _table(checkpoint: Checkpoint, where: str) -> tuple[tuple[Row, ...], Sizes]:
    """The family's rows and the sizes."""
    if checkpoint.origin.kind != MODEL or checkpoint.beside or checkpoint.subfolder:
        is_one = checkpoint.origin.kind == MODEL
        what = "weights lie in files of their own" if is_one else "it is an adapter"
        raise Refused(
            "megatron-shape",
            f"one model's tensors are written for Megatron, and here {what}",
            where=where,
            next=None if is_one else Command("merge-lora", (checkpoint.origin.asked, "OUT")),
        )
    kind = checkpoint.config.get("model_type")
    rows = ROWS.get(str(kind))
    if rows is None or str(kind) in NOT_WRITTEN:
        reason = f": {NOT_WRITTEN[str(kind)]}" if str(kind) in NOT_WRITTEN else ""
        raise Refused(
            "megatron-family",
            f"a model of the type {show(kind)} is not written for Megatron{reason}",
            where=where,
            expected=", ".join(sorted(ROWS.keys() - NOT_WRITTEN.keys())),
            next="let the trainer load the model by its own bridge (Megatron-Bridge, mbridge)",
        )
    try:
        return rows, sizes_of(checkpoint.config)
    except SizeError as error:
        raise Refused("megatron-config", f"config.json is not of this model: {error}", where=where) from None


def _with_head(
    checkpoint: Checkpoint, context: Context, where: str
) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The model without a head of labels, and that under the key of the output layer, whose place it has."""
    held = dict(checkpoint.tensors)
    head = {ours: held.pop(theirs) for theirs, ours in _HEAD.items() if theirs in held}
    if head and _LM_HEAD in held:
        what = "it has a head of labels and an output embedding, and Megatron's output layer is one of them"
        raise Refused("megatron-shape", what, where=where)
    if _LM_HEAD in held and is_tied(checkpoint.config):
        if not context.equal(held[_LM_HEAD], held[_EMBEDDING]):
            what = "config.json ties the embeddings, and the two that are stored differ"
            raise Refused("megatron-config", what, where=where, next=Command("doctor", (checkpoint.origin.asked,)))
        del held[_LM_HEAD]
    return held, head


def _without_copies(held: dict[str, LazyTensor], checkpoint: Checkpoint, context: Context) -> dict[str, str]:
    """Take out the embeddings that layers for multi-token prediction have again; the reason by name."""
    dropped: dict[str, str] = {}
    layers = checkpoint.config.get("num_hidden_layers")
    if not count(checkpoint.config) or type(layers) is not int:
        return dropped
    for name, whole in copies(held, layers).items():
        if whole not in held or not context.equal(held[name], held[whole]):
            what = f"{show(name)} differs from {show(whole)}, and Megatron has one tensor for both"
            raise Refused("megatron-keys", what, where=show(checkpoint.origin.asked))
        del held[name]
        dropped[name] = f"a copy of {show(whole)}, which Megatron has once"
    return dropped


def _expect_filed(
    unknown: list[str], lacking: list[str], misfits: Mapping[str, str], checkpoint: Checkpoint, where: str
) -> None:
    kind = show(checkpoint.config.get("model_type"))
    if unknown:
        what = f"{len(unknown)} tensors have no place in a {kind} of Megatron's: {fold(unknown)}"
        raise Refused("megatron-keys", what, where=where)
    if lacking:
        what = f"{len(lacking)} tensors are missing that Megatron has in one with others: {fold(lacking)}"
        raise Refused("megatron-keys", what, where=where)
    if misfits:
        told = "; ".join(f"{show(k)}: {why}" for k, why in [*misfits.items()][:4])
        raise Refused("megatron-config", f"config.json is not of this model: {told}", where=where)


def _beside(recorded: Mapping[str, Any]) -> dict[str, SideFile]:
    """What Megatron's loader reads before it reads a tensor."""
    args = Built(Global("argparse", "Namespace"), (), is_new=True)
    args.state = dict(recorded)
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
    return {
        f"{RELEASE}/common.pt": SideFile(content=tensorless(write_pickle(common, reference=lambda identity: identity))),
        f"{RELEASE}/metadata.json": SideFile(content=json.dumps(_MANIFEST).encode()),
    }
