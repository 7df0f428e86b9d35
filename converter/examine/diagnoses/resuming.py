"""Whether a run goes on with another number of ranks: as it is, after a command, or not."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from converter.core.context import Context
from converter.core.files.names import TRAINER_STATE
from converter.errors import ConvertError, UsageError
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis
from converter.examine.diagnoses.moments import expect_optimizer
from converter.sources.dcp.files import kind_here
from converter.sources.finding import find_place, kind_of
from converter.text import format_size, show

if TYPE_CHECKING:
    from converter.sources.resharded import Resharded

_ANY = {
    "dcp": "a torch distributed checkpoint, which torch cuts as it loads",
    "deepspeed_universal": "DeepSpeed's universal checkpoint, which is cut as it is loaded",
    "megatron": "Megatron's, which loads under other parallel sizes where it was saved as torch_dist",
}


@diagnosis("resume-on", "training", "model", "adapter", "run", "weights", "unread")
def resume_on(case: Case, context: Context) -> Iterable[Finding]:
    """What `--resume-on M` asks: whether the run goes on with M ranks. Files of torch's distributed checkpoints and of
    runs without ZeRO load on any number; DeepSpeed's ZeRO and verl's FSDP have a file a rank, and `reshard
    --world-size` rewrites them with masters, moments, steps and schedules, bit by bit. Where that can't be done the
    reason is named, and `gather` still gives the weights.
    """
    ranks = case.resume_on
    if ranks is None:
        return
    words = "1 rank" if ranks == 1 else f"{ranks} ranks"
    try:
        yield _found(case, ranks, words)
    except ConvertError as why:
        yield Finding(
            code="resume-on",
            severity="error",
            text=f"the run can't go on with {words}: {why.what}",
            evidence=(why.where,) if why.where else (),
            next=why.next,
        )


def _found(case: Case, ranks: int, words: str) -> Finding:
    """What is to be done, if anything.

    Raises:
        ConvertError: there is no state of a trainer, or it can't be cut for other ranks.
    """
    kind = kind_of(case.root)
    if kind != "verl":
        place = find_place(case.root, case.asked)
        kind = kind_of(place.folder)
        if kind in _ANY and kind_here(place.folder) != "ranks":
            if kind == "dcp":
                expect_optimizer(place.folder)
            return _as_it_is(case, place.folder, words, _ANY[kind], kind)
    made = _planned(case, ranks, kind)
    if made is None or made.ranks_before == ranks:
        why = f"{words} saved it" if made or _saved_by(case, kind) == ranks else "every rank's state is whole"
        return _as_it_is(case, case.root, words, why, kind)
    command = case.command("reshard", "--world-size", str(ranks), out=f"on-{ranks}")
    out = case.out(f"on-{ranks}")
    is_trainers = made.stage is not None and (_folder(case).parent / TRAINER_STATE).is_file()
    goes_on = f"--resume_from_checkpoint {out}" if is_trainers else made.goes_on.replace("{out}", out)
    return Finding(
        code="resume-on",
        severity="changes-numbers",
        text=f"{made.ranks_before} ranks saved the run, and its trainer refuses {words}: `reshard` writes the state "
        f"for them, {format_size(made.plan.total_bytes)}, with masters, moments and schedules. Then: {goes_on}",
        recoverability=HERE,
        fix=("reshard",),
        applicability="safe",
        next=command,
    )


def _saved_by(case: Case, kind: str | None) -> int | None:
    """How many ranks saved a run of DeepSpeed's."""
    if kind != "deepspeed":
        return None
    from converter.sources.deepspeed.state import read_shards
    from converter.sources.deepspeed.whole import ranks_in_all

    return ranks_in_all(read_shards(_folder(case)))


def _folder(case: Case) -> Path:
    """The trainer's shards."""
    return find_place(case.root, case.asked).folder


def _planned(case: Case, ranks: int, kind: str | None) -> Resharded | None:
    """The state planned for other ranks; None where each rank has all of it."""
    if kind == "verl":
        from converter.sources.verl.step import plan_verl

        return plan_verl(case.root, case.asked, ranks, tag=None)
    if kind == "dcp":
        from converter.sources.dcp.resharding import plan_ranks

        return plan_ranks(_folder(case), ranks, side_files={}, inputs={})
    if kind != "deepspeed":
        raise UsageError("no-shards", "no state of a trainer is here: weights alone begin a run, and resume none")
    from converter.sources.deepspeed.resharding.parts import data_ranks
    from converter.sources.deepspeed.resharding.plan import plan_resharding
    from converter.sources.deepspeed.state import read_shards
    from converter.sources.deepspeed.whole import ranks_in_all

    shards = read_shards(_folder(case))
    if ranks_in_all(shards) == ranks and (ranks != shards.ranks or shards.experts):
        return None
    data_ranks(shards, ranks)
    return None if shards.stage == 0 else plan_resharding(shards, ranks, side_files={}, inputs={})


def _as_it_is(case: Case, folder: Path, words: str, why: str, kind: str | None) -> Finding:
    is_trainers = (folder.parent / TRAINER_STATE).is_file() or (folder / TRAINER_STATE).is_file()
    flags = {
        "verl": "trainer.resume_mode=auto, or trainer.resume_from_path",
        "deepspeed_universal": 'with "load_universal": true under "checkpoint" in DeepSpeed\'s settings',
    }
    how = flags.get(kind or "", "--resume_from_checkpoint" if is_trainers else "load it as it was saved")
    return Finding(
        code="resume-on",
        severity="cosmetic",
        text=f"the run goes on with {words} as it is ({why}): {how}",
        evidence=(show(folder.name),),
    )
