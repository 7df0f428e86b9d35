"""What `reshard --world-size` does: a trainer's state of N ranks, written for M, with what lies beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from converter.core.checkpoint import SideFile
from converter.core.files.names import MODEL_CONFIG, RECEIPT, TRAINER_STATE
from converter.core.files.opening import Identity, identity
from converter.core.formats.torch_file import read_torch_file
from converter.core.formats.weight_file import PICKLED_SUFFIXES
from converter.diagnostic import Command
from converter.errors import Refused, UsageError
from converter.publish.outputs import is_remote
from converter.recipe.options import Going, WriteOptions
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.conversion import memory_of
from converter.recipe.verbs.knobs import Effort, Where, optional, options_of
from converter.recipe.verbs.pieces import threads
from converter.recipe.verbs.run_state import place_of
from converter.sources.beside import find_beside
from converter.sources.dcp.files import kind_here
from converter.sources.deepspeed.resharding.parts import data_ranks
from converter.sources.deepspeed.resharding.plan import MAX_RANKS, plan_resharding
from converter.sources.deepspeed.resharding.universal import plan_universal
from converter.sources.deepspeed.state import read_shards
from converter.sources.deepspeed.whole import ranks_in_all
from converter.sources.finding import kind_of
from converter.sources.hub.names import as_reference
from converter.sources.locate import resolve
from converter.sources.resharded import Resharded
from converter.sources.survey import file_names
from converter.text import fold, show
from converter.version import __version__

if TYPE_CHECKING:
    from converter.core.writer.write import Receipt

UNIVERSAL = "universal"
LAYOUTS = ("full", "sharded")
"""accelerate's under FSDP."""
STATE_TARGETS = (UNIVERSAL, *LAYOUTS)
_OF_TRAINER = re.compile(
    rf"{re.escape(TRAINER_STATE)}|scheduler\.pt|rng_state(?:_(\d{{1,6}}))?\.pth|scaler\.pt|random_states_(\d{{1,6}})\.pkl"
    r"|(?:scheduler|sampler|dl_state_dict)(?:_\d{1,4})?\.bin|custom_checkpoint_\d{1,4}\.pkl",
    re.ASCII,
)
"""What transformers' Trainer and accelerate read beside the shards when they go on; random states are one rank's."""
_STATE = re.compile(r"(?:pytorch_model_fsdp|optimizer)(?:_\d{1,4})?(?:_rank\d{1,6})?\.bin", re.ASCII)
_LEFT = re.compile(r".*\.(?:safetensors|bin)|optimizer\.pt", re.ASCII)


@dataclass(frozen=True)
class ReshardRequest:
    """What the user asked for; what isn't given stays as it is."""

    src: str
    world_size: int | None = None
    tag: str | None = None
    stage: int | None = None
    to: str | None = None


@dataclass(frozen=True, kw_only=True)
class ReshardedState:
    """A trainer's state planned for other ranks, and once it is written, its receipt.

    Attributes:
        made: the plan, and what was found: ranks before and after, the stage, what keeps the batch.
        out: where it goes; None where nothing was to be written.
        receipt: what the run did; None before it is written, and after a dry run.
    """

    made: Resharded
    options: WriteOptions
    out: Path | None = None
    receipt: Receipt | None = None

    @property
    def next(self) -> str:
        """How the trainer is told to go on from there."""
        path = "OUT" if self.out is None else str(self.out)
        ranks = "1 rank" if self.made.ranks == 1 else f"{self.made.ranks or 'any number of'} ranks"
        if TRAINER_STATE in self.made.plan.side_files:
            setting = self.made.goes_on.partition(",")[0] + " and " if not self.made.ranks else ""
            return f"your launch line on {ranks} with {setting}--resume_from_checkpoint {path}"
        return f"on {ranks}: {self.made.goes_on.replace('{out}', path)}"


class StateWriting(Effort, total=False):
    """Keyword arguments of `reshard_state` beside its own: see `WriteOptions`."""

    revision: str | None
    token: str | None
    keep_code: bool
    dry_run: bool
    on_plan: Callable[[ReshardedState], None] | None


def reshard_state(
    src: Where,
    out: Where | None = None,
    *,
    world_size: int | None = None,
    stage: int | None = None,
    tag: str | None = None,
    to: str | None = None,
    **writing: Unpack[StateWriting],
) -> ReshardedState:
    """Rewrite the state of a training run so that it goes on with another number of ranks.

    Args:
        src: a run, one of its checkpoints, or the folder of shards in that.
        out: the folder to write; None: only plan.
        world_size: ranks that are to go on; None: as many as before.
        stage: of ZeRO, 1, 2 or 3, or 0 for one file without it; None: that of the run.
        to: `universal`: DeepSpeed's universal checkpoint, which loads on any number of ranks; `full` or `sharded`:
            what accelerate saved under FSDP in its other layout.
        tag: which checkpoint of the run; None: what its tracker says.
        writing: see `StateWriting`.

    Raises:
        UsageError: no such folder or tag, several to choose from, numbers that can't be.
        Refused: see `plan_state`; or the output can't be written; nothing is on the disk.
        VerificationFailed: what was written is not what it should be; it is not published.
    """
    options, going = options_of(WriteOptions, writing)
    _expect_state_options(optional(out), options)
    asked = ReshardRequest(str(src), world_size, tag, stage, to)
    with allowing(options.allow_name):
        return _resharded(asked, None if out is None else Path(out).expanduser(), options, going)


_NOT_HERE = ("dtype", "max_shard_size", "layout", "link_unchanged", "device")
_DEFAULTS = WriteOptions()


def _expect_state_options(out: str | None, options: WriteOptions) -> None:
    wrong = [f"--{name.replace('_', '-')}" for name in _NOT_HERE if getattr(options, name) != getattr(_DEFAULTS, name)]
    if wrong:
        raise UsageError("usage", f"{wrong[0]} has no meaning with --world-size: a trainer's state is kept as it is")
    if is_remote(out):
        raise UsageError("usage", "a trainer's state is written to a folder of this machine")


def _resharded(asked: ReshardRequest, out: Path | None, options: WriteOptions, going: Going) -> ReshardedState:
    from converter.core.writer import preflight
    from converter.core.writer.reporter import Silent
    from converter.core.writer.write import write

    if going.executor is not None:
        raise UsageError("usage", "executor= is for checkpoints of models; a run's state is written in this process")
    memory = memory_of(options)
    if out is not None:
        preflight.check_target(out, (), overwrite=options.overwrite)
    made = plan_state(asked, revision=options.revision, token=options.token, keep_code=options.keep_code)
    planned = ReshardedState(made=made, options=options, out=out)
    if going.on_plan is not None:
        going.on_plan(planned)
    if out is None or going.dry_run:
        preflight.memory_limit(made.plan, memory)
        if out is not None:
            preflight.check_target(out, made.plan.inputs, overwrite=options.overwrite)
            preflight.check_space(made.plan, out)
        return planned
    given: dict[str, Any] = {"overwrite": options.overwrite, "resume": options.resume, "verify": options.verify}
    reporter = going.reporter or Silent()
    receipt = write(made.plan, out, jobs=options.jobs or threads(), memory=memory, reporter=reporter, **given)
    return dataclasses.replace(planned, receipt=receipt)


def plan_state(asked: ReshardRequest, *, revision: str | None, token: str | None, keep_code: bool) -> Resharded:
    """The plan that the arguments mean.

    Raises:
        UsageError: no such folder or tag, several to choose from, a number of ranks that can't be.
        Refused: a trainer's state that isn't cut by ranks (`reshard-any-ranks`), or that isn't read (`reshard-kind`);
            see `plan_resharding`.
    """
    if asked.to not in (None, UNIVERSAL, *LAYOUTS) or (asked.to is not None and asked.stage is not None):
        what = (
            f"--stage has no meaning with --to {asked.to}"
            if asked.to in (UNIVERSAL, *LAYOUTS)
            else f"no --to {show(str(asked.to))}"
        )
        raise UsageError("usage", what, expected=", ".join((UNIVERSAL, *LAYOUTS)))
    if asked.world_size is not None and not 1 <= asked.world_size <= MAX_RANKS:
        raise UsageError(
            "usage", f"--world-size {asked.world_size} is not a number of ranks", expected=f"1 to {MAX_RANKS}"
        )
    root = resolve(asked.src, revision=revision, token=token, whole=True).path
    if asked.to in LAYOUTS:
        return _with_provenance(_plan_layout(root, asked, keep_code=keep_code), asked.to)
    if kind_of(root) == "verl":
        return _with_provenance(_plan_verl(root, asked))
    place, _ = place_of(root, as_reference(asked.src), tag=asked.tag, part=None)
    if kind_here(place.folder) == "ranks" and asked.world_size is not None and asked.stage is None:
        from converter.sources.dcp.resharding import plan_ranks

        files, read, left = _beside(place.folder, asked.world_size, keep_code=keep_code)
        planned = plan_ranks(place.folder, asked.world_size, side_files=files, inputs=read)
        return _with_provenance(dataclasses.replace(planned, said=(*planned.said, *left)))
    _expect_zero(kind_of(place.folder), place.folder, asked)
    shards = read_shards(place.folder)
    ranks = asked.world_size or ranks_in_all(shards)
    if shards.stage == 0:
        data_ranks(shards, ranks)
        raise _any_ranks("without ZeRO every rank has the whole state, in one file", place.folder)
    if place.folder != root:
        shards.said.insert(0, f"tag {show(place.folder.name)}: {place.why}")
    side_files, inputs, said = _beside(place.folder.parent, ranks, keep_code=keep_code)
    if asked.to == UNIVERSAL:
        made = plan_universal(shards, asked.world_size, side_files=side_files, inputs=inputs)
    else:
        made = plan_resharding(shards, ranks, stage=asked.stage, side_files=side_files, inputs=inputs)
    return _with_provenance(dataclasses.replace(made, said=(*made.said, *said)))


def _plan_layout(root: Path, asked: ReshardRequest, *, keep_code: bool) -> Resharded:
    """accelerate's state under FSDP in the other layout."""
    from converter.sources.dcp.resharding import find_state, plan_fsdp

    if asked.world_size is not None:
        what = f"--world-size has no meaning with --to {asked.to}, which loads on any number of ranks"
        raise UsageError("usage", what, where=show(asked.src))
    state = find_state(root, asked.src, asked.tag)
    if state is None:
        raise Refused(
            "reshard-kind",
            f"--to {asked.to} is for what accelerate saved under FSDP, and this is none",
            where=show(asked.src),
            expected="a folder with pytorch_model_fsdp_0/ or pytorch_model_fsdp.bin, or the run's folder",
        )
    side_files, inputs, said = _beside(state.folder, MAX_RANKS, keep_code=keep_code)
    to: Literal["full", "sharded"] = "full" if asked.to == "full" else "sharded"
    made = plan_fsdp(state, to, side_files=side_files, inputs=inputs)
    return dataclasses.replace(made, said=(*made.said, *said))


def _plan_verl(root: Path, asked: ReshardRequest) -> Resharded:
    from converter.sources.verl.step import plan_verl

    if asked.stage is not None or asked.to is not None or asked.world_size is None:
        given = "--stage" if asked.stage is not None else "--to universal"
        what = (
            "say --world-size"
            if given == "--to universal" and asked.to is None
            else f"{given} is DeepSpeed's, and this is verl's"
        )
        raise UsageError("usage", what, where=show(asked.src))
    return plan_verl(root, asked.src, asked.world_size, tag=asked.tag)


def _with_provenance(made: Resharded, to: str | None = None) -> Resharded:
    asked: dict[str, object] = {"to": to} if to is not None else {"world-size": made.ranks}
    asked |= {} if made.stage is None else {"stage": made.stage}
    provenance = {
        "version": __version__,
        "recipe": {"reshard": asked},
        "inputs": {"source": {"kind": "training", "name": made.tag, "header_digest": made.digest}},
    }
    return dataclasses.replace(made, plan=dataclasses.replace(made.plan, provenance=provenance))


def _expect_zero(kind: str | None, folder: Path, asked: ReshardRequest) -> None:
    if kind == "dcp":
        raise _any_ranks("this is a checkpoint of torch.distributed.checkpoint, which torch cuts as it loads", folder)
    if kind == "deepspeed_universal" and asked.to is None:
        return
    if kind == "deepspeed_universal":
        what = "this is a universal checkpoint, which DeepSpeed cuts as it loads it with `load_universal`"
        raise _any_ranks(what, folder)
    if kind != "deepspeed":
        is_model = kind in ("hf", "peft", None)
        raise Refused(
            "reshard-kind",
            "--world-size is for the state of a trainer, which lies in a file a rank, and this is "
            + (f"none ({kind})" if is_model else f"of a kind that isn't cut anew yet ({kind})"),
            where=show(folder),
            expected="a folder such as global_step500 of DeepSpeed, its parent, or the run's folder",
            next=Command("gather", (asked.src, "OUT")) if not is_model else None,
        )


def _any_ranks(what: str, folder: Path) -> Refused:
    return Refused(
        "reshard-any-ranks",
        f"{what}: it loads on any number of ranks as it is",
        where=show(folder),
        next="resume from it on as many ranks as you like",
    )


def _beside(folder: Path, ranks: int, *, keep_code: bool) -> tuple[dict[str, SideFile], dict[str, Identity], list[str]]:
    """Files beside the tag that whoever resumes reads: config, tokenizer, the trainer's own; and what is left there."""
    found = find_beside([folder], keep_code=keep_code)
    files: dict[str, SideFile] = dict(found.files)
    inputs = dict(found.inputs)
    if found.config_bytes is not None:
        files[MODEL_CONFIG] = SideFile(content=found.config_bytes)
    left: list[str] = []
    for name in sorted(file_names(folder)):
        match = _OF_TRAINER.fullmatch(name)
        rank = None if match is None else match[1] or match[2]
        if match is None or (rank is not None and int(rank) >= ranks):
            left += [name] if match is not None or (_LEFT.fullmatch(name) and not _STATE.fullmatch(name)) else []
            continue
        path = folder / name
        if name.endswith((*PICKLED_SUFFIXES, ".pkl")):
            read_torch_file(path, root=folder)  # what loads it unpickles it: refused where it names foreign code
        files[name] = SideFile(source=str(path.absolute()))
        inputs[str(path.absolute())] = identity(path)
    files.pop(RECEIPT, None)
    said = [f"not carried along: {fold(left)}"] if left else []
    return files, inputs, said
