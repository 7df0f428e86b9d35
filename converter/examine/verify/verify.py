"""Every check of `verify`, in order: what is asked, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.core.checkpoint import DELTA, Checkpoint
from converter.core.context import Context
from converter.core.files import sparse
from converter.core.writer.reporter import Reporter, Silent
from converter.diagnostic import Command, Next, Steps, as_argument, quoted
from converter.dialects.known import Target, target
from converter.dialects.spec import Role
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.verify.check import Check, failed, fails, note
from converter.families.words import CAUSAL_CLASSES
from converter.text import show

if TYPE_CHECKING:
    from converter.converters.heads.model import Reading

_OUTPUTS_TOKENS = (*CAUSAL_CLASSES, "ForImageTextToText", "ForMultimodalLM")
"""Ends of the names of classes that an actor is of."""


MOST_PAIRS = 200
"""Pairs of `--probe` that are scored unless more are asked for."""


def _untold(text: str) -> None:
    """Nothing."""


@dataclass(frozen=True)
class VerifyRequest:
    """What the user asked to be verified."""

    folder: str
    trainer: str | None = None
    role: Role | None = None
    against: str | None = None
    source: str | None = None
    base: str | None = None
    live: bool = False
    python: str | None = None
    probe: str | None = None
    most_pairs: int = MOST_PAIRS
    allow: tuple[str, ...] = ()
    device: str = "cpu"
    told: Callable[[str], None] = _untold
    reporter: Reporter = field(default_factory=Silent)


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        aim: the trainer and role that it was verified for.
        checks: what was looked at, in order.
        table: of `probe`: each pair with its rewards.
    """

    aim: Target
    checks: tuple[Check, ...]
    table: tuple[dict[str, Any], ...] = ()

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that fail."""
        return tuple(failed(self.checks))

    @property
    def holds(self) -> bool:
        """True where no check fails."""
        return not self.failed


def examine(asked: VerifyRequest) -> Verified:
    """Every check that was asked for.

    Raises:
        UsageError: the folder is not there, or no trainer is known for it.
    """
    from converter.sources.locate import resolve
    from converter.sources.opening import input_spec, open_checkpoint

    try:
        checkpoint = open_checkpoint(input_spec(asked.folder), token=None, keep_code=False)
    except UsageError:
        raise
    except ConvertError as error:
        if error.code == "path-missing" or error.code.startswith(("hub-", "download-", "cache-")):
            raise  # it was not looked at
        # What no tool can open, no trainer loads: the verdict is that it fails, and why.
        text = f"{error.where}: {error.what}" if error.where else error.what
        return Verified(_aim(asked, None), (fails("files", error.code, text, error.next),))
    aim = _aim(asked, checkpoint)
    root = resolve(asked.folder, in_parts=True).path
    if asked.live:
        _expect_here(asked.folder, root)
    return _all_checks(asked, aim, checkpoint, root)


def _expect_here(folder: str, root: Path) -> None:
    """A trainer's loader opens files by itself: they have to be on the disk.

    Raises:
        Refused: the folder is read from the Hub in parts (`live-needs-folder`).
    """
    from converter.sources.hub.names import as_reference, hub_name
    from converter.sources.survey import snapshot_of

    if not any(root.is_relative_to(each) for each in sparse.folders):
        return
    named, found = hub_name(as_reference(folder)), snapshot_of(root)
    assert named is not None
    assert found is not None
    here = f"./{named.repo_id.rpartition('/')[2]}"
    download = Command("download", (named.repo_id, "--revision", found[1], "--local-dir", here), program="hf")
    inner = f"{here}/{named.folder}" if named.folder else here
    raise Refused(
        "live-needs-folder",
        "--live loads files with the trainer's own code, and these are on the Hub",
        where=show(folder),
        next=Steps(download, f", and then the same command with {quoted(inner)}"),
    )


def _aim(asked: VerifyRequest, checkpoint: Checkpoint | None) -> Target:
    """The trainer and role: as asked, else what the folder itself says."""
    from converter.converters.heads.detect import detect
    from converter.examine.verify.dialect import role_of

    trainer = asked.trainer
    if _as_itself(asked, checkpoint):
        return target("transformers", "reward")
    if trainer is None:
        found = None if checkpoint is None or checkpoint.origin.kind != "model" else detect(checkpoint)
        trainer = "transformers" if found is None else (found.dialect.serves[0].trainer if found.dialect.serves else "")
        if not trainer:
            what = "no trainer loads this as it is"
            raise UsageError("trainer-unclear", what, where=show(asked.folder), expected="--for TRAINER")
    if asked.role is not None:
        return target(trainer, asked.role)
    if asked.trainer is None and trainer == "transformers" and checkpoint is not None and _is_headless(checkpoint):
        return target(trainer, "actor")
    if checkpoint is not None and _is_actor_of(trainer, checkpoint):
        return target(trainer, "actor")
    return target(trainer, "reward" if checkpoint is None else role_of(checkpoint, _roles_of(trainer)))


def _as_itself(asked: VerifyRequest, checkpoint: Checkpoint | None) -> bool:
    """True where nobody is asked for, and the folder is a classifier that transformers' own class alone loads."""
    from converter.converters.heads.detect import detect
    from converter.examine.verify.dialect import is_classifier_of_its_own

    if asked.trainer is not None or asked.role is not None or checkpoint is None:
        return False
    if not is_classifier_of_its_own(checkpoint):
        return False
    try:
        found = detect(checkpoint)
    except ConvertError:
        return True
    return found is None or found.dialect.class_says


def _is_headless(checkpoint: Checkpoint) -> bool:
    """True for a language model, of texts or of images too: it was never meant to have a head, so none is missing."""
    from converter.converters.heads.detect import detect

    listed = checkpoint.config.get("architectures")
    first = str(listed[0]) if isinstance(listed, list) and listed else ""
    is_language_model = first.endswith(_OUTPUTS_TOKENS)
    if checkpoint.origin.kind == "training":
        return is_language_model  # what it holds beside is seen once it is gathered
    return checkpoint.origin.kind == "model" and is_language_model and detect(checkpoint) is None


def _is_actor_of(trainer: str, checkpoint: Checkpoint) -> bool:
    """True for a language model where the trainer has actors, and nothing in the config speaks of a reward model."""
    if checkpoint.origin.kind != "model" or "actor" not in _roles_of(trainer):
        return False
    return not any(checkpoint.config.get(key) for key in _OF_HEADS) and _is_headless(checkpoint)


_OF_HEADS = ("num_labels", "id2label", "label2id", "problem_type", "value_head_prefix")
"""Fields that a config has of a model with a head: where the head is gone, that is a fault and no other role."""


def _roles_of(trainer: str) -> frozenset[Role]:
    from converter.dialects.known import dialects

    name = trainer.partition("@")[0]
    return frozenset(r for d in dialects().values() for s in d.serves if s.trainer == name for r in s.roles)


def _all_checks(asked: VerifyRequest, aim: Target, checkpoint: Checkpoint, root: Path) -> Verified:
    from converter.examine.verify.dialect import check_for, check_own_class
    from converter.examine.verify.odd import check_values
    from converter.examine.verify.receipt import (
        check_other_receipt,
        check_receipt,
        check_source,
        has_fresh_head,
        is_receipt,
    )

    context = Context(frozenset(asked.allow))
    if checkpoint.origin.kind != "model":
        is_reward = checkpoint.config.get("task_type") == "SEQ_CLS" or asked.trainer is not None
        merge = Command("merge-lora", (as_argument(asked.folder), "OUT"))
        is_plain = checkpoint.origin.kind == "adapter" and not is_reward
        remedy: Next = merge if is_plain else _remedy(asked, aim)
        if checkpoint.origin.kind == "training" and asked.trainer is None and asked.role is None:
            remedy = Command("gather", (as_argument(asked.folder), "OUT"))
        if checkpoint.origin.kind == DELTA:
            remedy = "apply-delta adds it to the model that it was made from"
        kinds = {"adapter": "an adapter", DELTA: "the difference of two models"}
        text = f"this is {kinds.get(checkpoint.origin.kind, 'a training state')}, not a model"
        return Verified(aim, (fails("files", "not-a-model", text, remedy),))
    is_itself = _as_itself(asked, checkpoint)
    check = check_own_class if is_itself else check_for
    verdict = check(checkpoint, aim, context, remedy=_remedy(asked, aim))
    stored = {**checkpoint.tensors, **{n: t for held in checkpoint.beside.values() for n, t in held.items()}}
    inferred = _inferred(checkpoint) if asked.trainer and asked.role is None and aim.role == "actor" else ()
    checks = [*inferred, *verdict.checks, *check_receipt(root, frozenset(stored), lambda: stored)]
    checks += check_values(asked.folder, root, asked.reporter)
    reading, there, is_rounded = verdict.reading, None, False
    table: list[dict[str, Any]] = []
    if asked.against is not None and is_receipt(asked.against):
        checks += check_other_receipt(asked.against, root, stored)
    elif asked.against is not None:
        from converter.examine.verify.against import check_against, compare_backbones

        is_actor = aim.role == "actor"
        here = _headless(checkpoint, context) if is_itself or (reading is None and is_actor) else reading
        if here is None:
            text = f"the head can't be read, so nothing was compared with {show(asked.against)}"
            checks.append(fails("against", "not-compared", text, _remedy(asked, aim)))
        else:
            there, digest = _source(asked, context, headless=is_itself)
            checks += check_source(root, digest, asked.against)
            is_fresh = not is_actor and there.head is None and has_fresh_head(root)
            compared = compare_backbones(here, there, context, outputs=is_itself or is_actor, reporter=asked.reporter)
            is_rounded = compared.is_rounded
            checks += check_against(here, there, aim, compared, fresh=is_fresh, whole=is_itself)
    if asked.live:
        from converter.examine.verify.live import check_live

        assert asked.python is not None
        checks += check_live(root, checkpoint, reading, aim, asked.python, allow=frozenset(asked.allow))
    if asked.probe is not None:
        more, table = _pairs(asked, aim, reading, there, is_rounded=is_rounded)
        checks += more
    return Verified(aim, tuple(checks), tuple(table))


def _inferred(checkpoint: Checkpoint) -> tuple[Check, ...]:
    """That nobody asked for an actor: a reward model whose head was lost without a trace looks the same."""
    listed = checkpoint.config.get("architectures")
    named = show(listed[0]) if isinstance(listed, list) and listed else "a model"
    return (note("role", "role-inferred", f"{named} without a head is an actor; a reward model or critic: --role"),)


def _headless(checkpoint: Checkpoint, context: Context) -> Reading:
    """A model without a head, under its own names."""
    from converter.converters.heads.detect import HEADLESS
    from converter.converters.heads.read import read
    from converter.dialects.known import dialects

    return read(checkpoint, dialects()[HEADLESS], context)


def _remedy(asked: VerifyRequest, aim: Target) -> Command:
    """The command that makes a folder which this trainer loads."""
    to = asked.trainer or aim.serves.trainer
    return Command("convert", (as_argument(asked.against or asked.folder), "OUT", "--to", to, "--role", aim.role))


def _source(asked: VerifyRequest, context: Context, *, headless: bool = False) -> tuple[Reading, str]:
    """The source, read in its own dialect, and the digest of its headers: a model, an adapter or a trainer's state.

    Args:
        headless: its head is a part of the model like any other.
    """
    from converter.converters.gather.gather import Gather
    from converter.converters.heads.detect import HEADLESS, Detected, detect
    from converter.converters.heads.fit import Wishes
    from converter.converters.heads.from_adapter import with_adapter
    from converter.converters.heads.read import read
    from converter.dialects.known import dialects, spoken
    from converter.sources.opening import input_spec, open_checkpoint, open_recorded_base

    assert asked.against is not None
    source = open_checkpoint(input_spec(_shards(asked.against)), token=None, keep_code=False)
    digest = source.origin.header_digest
    base = None
    if asked.base is not None:
        is_run = source.origin.kind == "training"
        base = open_checkpoint(input_spec(asked.base), token=None, keep_code=False, config_alone=is_run)
    if source.origin.kind == "adapter":
        wishes = Wishes("refuse", "fold", None, (), "none", 0)
        source = with_adapter(base or open_recorded_base(source, keep_code=False), source, wishes, context)
    elif source.origin.kind == "training":
        source = Gather(emit="merged", base=base)(source, context)
    if headless:
        return read(source, dialects()[HEADLESS], context), digest
    if asked.source is not None:
        return read(source, spoken(asked.source)[0], context), digest
    found = detect(source) or Detected(dialects()[HEADLESS], "no head")
    return read(source, found.dialect, context), digest


def _shards(src: str) -> str:
    """The folder that is meant by a run's: where the shards are."""
    from converter.sources.finding import find_place, source_kind
    from converter.sources.hub.names import as_reference, below
    from converter.sources.locate import resolve

    root = resolve(src, in_parts=True).path
    if source_kind(root) in ("model", "adapter"):
        return src
    return below(src, root, find_place(root, as_reference(src)).folder)


def _pairs(
    asked: VerifyRequest, aim: Target, reading: Reading | None, there: Reading | None, *, is_rounded: bool
) -> tuple[list[Check], list[dict[str, Any]]]:
    from converter.core.compute.device import chosen
    from converter.examine.verify.pairs import check_pairs, scored
    from converter.examine.verify.pairs_file import read_pairs

    assert asked.probe is not None
    pairs = read_pairs(asked.probe, asked.most_pairs)
    if reading is None or reading.head is None:
        what = "the head can't be read" if aim.role != "actor" else "an actor has no head"
        return [fails("pairs", "not-compared", f"{what}, so no pair was scored", _remedy(asked, aim))], []
    place = chosen(asked.device)
    if place is None and asked.device not in ("cpu", "auto"):
        asked.told(f"--device {asked.device}: no CUDA device answers here, so pairs are scored on the CPU")
    try:
        here = scored(reading, aim.dialect.pooling, device=place)
        other = None
        if there is not None and there.head is not None:
            other = scored(there, there.dialect.pooling, device=place)
        return check_pairs(pairs, here, other, is_rounded=is_rounded, told=asked.told)
    except Refused as error:
        return [fails("pairs", error.code, f"no pair was scored: {error.what}", error.next)], []
