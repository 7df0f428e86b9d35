"""What `reshard --world-size` does: a trainer's state of N ranks, planned for M, with what lies beside it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

from converter.core.checkpoint import SideFile
from converter.core.files.names import MODEL_CONFIG, RECEIPT
from converter.core.files.opening import Identity, identity
from converter.core.formats.torch_file import read_torch_file
from converter.core.formats.weight_file import PICKLED_SUFFIXES
from converter.diagnostic import Command
from converter.errors import Refused, UsageError
from converter.recipe.verbs.run_state import place_of
from converter.sources.beside import find_beside
from converter.sources.deepspeed.resharding.plan import MAX_RANKS, Resharded, plan_resharding
from converter.sources.deepspeed.state import read_shards
from converter.sources.finding import kind_of
from converter.sources.hub.names import as_reference
from converter.sources.locate import resolve
from converter.sources.survey import file_names
from converter.text import fold, show
from converter.version import __version__

TRAINER_STATE = "trainer_state.json"
_OF_TRAINER = re.compile(rf"{re.escape(TRAINER_STATE)}|scheduler\.pt|rng_state(?:_(\d{{1,6}}))?\.pth", re.ASCII)
"""What transformers' Trainer reads beside the shards when it goes on; random states are those of one rank each."""
_LEFT = re.compile(r".*\.(?:safetensors|bin)|optimizer\.pt", re.ASCII)


@dataclass(frozen=True)
class ReshardRequest:
    """What the user asked for."""

    src: str
    world_size: int
    tag: str | None = None


def plan_state(asked: ReshardRequest, *, revision: str | None, token: str | None, keep_code: bool) -> Resharded:
    """The plan that the arguments mean.

    Raises:
        UsageError: no such folder or tag, several to choose from, a number of ranks that can't be.
        Refused: a trainer's state that isn't cut by ranks (`reshard-any-ranks`), or that isn't read (`reshard-kind`);
            see `plan_resharding`.
    """
    if not 1 <= asked.world_size <= MAX_RANKS:
        raise UsageError(
            "usage", f"--world-size {asked.world_size} is not a number of ranks", expected=f"1 to {MAX_RANKS}"
        )
    root = resolve(asked.src, revision=revision, token=token, whole=True).path
    place, _ = place_of(root, as_reference(asked.src), tag=asked.tag, part=None)
    _expect_zero(kind_of(place.folder), place.folder, asked.src)
    shards = read_shards(place.folder)
    if shards.stage == 0:
        raise _any_ranks("without ZeRO every rank has the whole state, in one file", place.folder)
    if place.folder != root:
        shards.said.insert(0, f"tag {show(place.folder.name)}: {place.why}")
    side_files, inputs, said = _beside(place.folder.parent, asked.world_size, keep_code=keep_code)
    made = plan_resharding(shards, asked.world_size, side_files=side_files, inputs=inputs)
    provenance = {
        "version": __version__,
        "recipe": {"reshard": {"world-size": asked.world_size}},
        "inputs": {"source": {"kind": "training", "name": place.folder.resolve().name, "header_digest": shards.digest}},
    }
    plan = dataclasses.replace(made.plan, provenance=provenance)
    return dataclasses.replace(made, plan=plan, said=(*made.said, *said))


def _expect_zero(kind: str | None, folder: Path, asked: str) -> None:
    if kind == "dcp":
        raise _any_ranks("this is a checkpoint of torch.distributed.checkpoint, which torch cuts as it loads", folder)
    if kind != "deepspeed":
        is_model = kind in ("hf", "peft", None)
        raise Refused(
            "reshard-kind",
            "--world-size is for the state of a trainer, which lies in a file a rank, and this is "
            + (f"none ({kind})" if is_model else f"of a kind that isn't cut anew yet ({kind})"),
            where=show(folder),
            expected="a folder such as global_step500 of DeepSpeed, its parent, or the run's folder",
            next=Command("gather", (asked, "OUT")) if not is_model else None,
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
        if match is None or (match[1] is not None and int(match[1]) >= ranks):
            left += [name] if match is not None or _LEFT.fullmatch(name) else []
            continue
        path = folder / name
        if name.endswith(PICKLED_SUFFIXES):
            read_torch_file(path, root=folder)  # what loads it unpickles it: refused where it names foreign code
        files[name] = SideFile(source=str(path.absolute()))
        inputs[str(path.absolute())] = identity(path)
    files.pop(RECEIPT, None)
    said = [f"not carried along: {fold(left)}"] if left else []
    return files, inputs, said
