"""What `push` does: checks first, then one commit, then a comparison with what is there."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.core.files.names import ADAPTER_CONFIG, CARD, MODEL_CONFIG, RECEIPT
from converter.core.files.opening import read_limited
from converter.diagnostic import Command, Steps
from converter.errors import ConvertError, Refused, UsageError
from converter.recipe.verbs.allowing import allowing
from converter.recipe.verbs.knobs import Where
from converter.text import show

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter
    from converter.publish.manifest import LocalFile, Manifest
    from converter.publish.push import Pushed
    from converter.publish.requests import Destination

MAX_CARD = 5_000_000
"""Bytes of a README.md that is extended."""


@dataclass(frozen=True)
class PushRequest:
    """What the user asked for."""

    folder: str
    repo_id: str
    token: str | None = None
    public: bool = False
    revision: str = "main"
    create_pr: bool = False
    message: str | None = None
    keep_code: bool = False
    dry_run: bool = False
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Push:
    """A folder that is to be, or was, pushed.

    Attributes:
        destination: the repository and its branch.
        account: whose token it is; None in a dry run, which asks nobody.
        files: what is sent, the card included; `left_out` what is not.
        manifest: the files with their digests; None before they are read.
        pushed: the commit; None before it is made, and after a dry run.
    """

    destination: Destination
    account: str | None
    files: tuple[LocalFile, ...]
    left_out: tuple[str, ...]
    manifest: Manifest | None = None
    pushed: Pushed | None = None


def push(
    folder: Where,
    repo: str,
    *,
    token: str | None = None,
    public: bool = False,
    revision: str = "main",
    create_pr: bool = False,
    commit_message: str | None = None,
    keep_code: bool = False,
    dry_run: bool = False,
    allow: Sequence[str] = (),
    allow_name: Sequence[str] = (),
    reporter: Reporter | None = None,
    on_plan: Callable[[Push], None] | None = None,
    client_bars: bool = False,
) -> Push:
    """Push a folder to the Hub as one commit, checked before and compared after; it can be repeated after any failure.

    Args:
        folder: a model or an adapter.
        repo: `owner/name`, or `owner/name@branch`.
        public: make a new repository public.
        revision: branch to commit to.
        create_pr: open a pull request instead of a commit.
        keep_code: push .py files too.
        dry_run: check and list; send nothing.
        allow: codes of refusals that the user consents to; the card says so.
        reporter: hears of the files twice: as they are read, and as they are sent.
        on_plan: called once all is checked, before gigabytes are read.
        client_bars: leave huggingface_hub's own progress bars as they are, rather than off.

    Raises:
        UsageError: the arguments are the wrong way round, or name no repository.
        Refused: doctor finds errors, or the receipt is of other files, without consent; the Hub says no.
    """
    codes = (allow,) if isinstance(allow, str) else tuple(allow)
    request = PushRequest(
        str(folder), repo, token, public, revision, create_pr, commit_message, keep_code, dry_run, codes
    )
    with allowing(allow_name), contextlib.nullcontext() if client_bars else _without_bars():
        return _push(request, reporter, on_plan)


def _push(asked: PushRequest, reporter: Reporter | None, on_plan: Callable[[Push], None] | None) -> Push:
    from converter.core.writer.reporter import Silent
    from converter.publish.manifest import files_to_push, manifest
    from converter.publish.outputs import STALE, repository
    from converter.publish.push import check_destination, expect_no_stale, make_repository
    from converter.publish.push import push as send
    from converter.publish.requests import Destination

    asked, folder = _read_the_right_way(asked), Path(asked.folder).expanduser()
    repo_id, branch = repository(asked.repo_id, asked.revision)
    consents, without = _preflight(asked, folder)
    files, left_out = files_to_push(folder, keep_code=asked.keep_code)
    where = Destination(
        repo_id, asked.token, asked.public, branch, asked.create_pr,
        asked.message or f"Upload {repo_id.rpartition('/')[2]} with rlhf-convert", STALE in asked.allow,
    )  # fmt: skip
    me, there = None, ""
    if not asked.dry_run:
        # All that the Hub may refuse comes before gigabytes are read.
        me = check_destination(where)
        expect_no_stale([f.name for f in files], make_repository(where), where)
        there = _card_there(asked, where, next((f for f in files if f.name == CARD), None), consents)
    files = _with_card(files, asked, folder, consents, there, without)
    found = Push(where, me, tuple(files), tuple(left_out))
    if on_plan is not None:
        on_plan(found)
    told = reporter or Silent()
    told.start(sum(f.size for f in files), len(files))
    found = dataclasses.replace(found, manifest=manifest(files, left_out, told=told.advance))
    if asked.dry_run or found.manifest is None:
        return found
    return dataclasses.replace(found, pushed=send(found.manifest, where, reporter=told))


def expect_writable(repo: str, *, token: str | None = None) -> str:
    """Whose token it is, which has to be able to write to a repository of that name.

    Raises:
        UsageError, Refused: see `converter.publish.push.check_destination`.
    """
    from converter.publish.outputs import repository
    from converter.publish.push import check_destination
    from converter.publish.requests import Destination

    repo_id, branch = repository(repo, "main")
    return check_destination(Destination(repo_id, token, revision=branch))


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The client's progress bars off: a library prints nothing."""
    client: Any = import_module("huggingface_hub.utils")
    before = client.are_progress_bars_disabled()
    client.disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            client.enable_progress_bars()


def _read_the_right_way(asked: PushRequest) -> PushRequest:
    """What was asked for, with a folder that is there.

    Raises:
        UsageError: the arguments are the wrong way round (`arguments-swapped`).
        Refused: there is no such folder (`path-missing`).
    """
    if Path(asked.folder).expanduser().is_dir():
        return asked
    if Path(asked.repo_id).expanduser().is_dir():
        what = f"{show(asked.repo_id)} is the folder and {show(asked.folder)} the repository"
        command = Command("push", (asked.repo_id, asked.folder))
        raise UsageError("arguments-swapped", what, next=command)
    from converter.sources.hub.names import is_on_hub

    there = None
    if is_on_hub(asked.folder):
        command = Command("reshard", (asked.folder, f"hf://{asked.repo_id.removeprefix('hf://')}"))
        there = Steps("from Hub to Hub: ", command)
    raise Refused("path-missing", f"there is no folder {show(asked.folder)!r}", next=there)


def _card_there(asked: PushRequest, where: Destination, own: LocalFile | None, consents: dict[str, str]) -> str:
    """The card that the repository has, which is extended; the folder's takes its place with consent only.

    Raises:
        Refused: both have one, of different texts (`hub-card-differs`).
    """
    from converter.core.context import Context
    from converter.publish.card import own_text
    from converter.publish.push import card_there

    there = card_there(where)
    if own is None or not own_text(there):
        return there
    here = read_limited(own.path, limit=MAX_CARD, root=own.path.parent).decode("utf-8", "replace")
    if own_text(here) in own_text(there):
        return there
    context = Context(frozenset(asked.allow))
    context.consent(
        Refused(
            "hub-card-differs",
            "the repository has a README.md, and the folder another: its text would be lost",
            where=show(where.repo_id),
            next="copy the text that you want into the folder's, or remove the folder's",
        )
    )
    consents.update(context.consents)
    return ""


def _preflight(asked: PushRequest, folder: Path) -> tuple[dict[str, str], str]:
    """What doctor and the receipt say: consents that were needed and given, by code, and why nothing was compared.

    Raises:
        Refused: an error without consent, under the finding's own code.
    """
    from converter.core.context import Context
    from converter.examine.doctor import DoctorRequest, examine, file_of
    from converter.examine.verify.receipt import check_receipt
    from converter.sources.opening import input_spec, open_checkpoint

    context = Context(frozenset(asked.allow))
    report = examine(DoctorRequest(asked.folder))
    for finding in report.findings:
        if finding.severity == "error":
            where = show(folder / file_of(finding, report.case))
            context.consent(Refused(finding.code, finding.text, where=where, next=finding.next))
    spec = input_spec(asked.folder)
    for check in check_receipt(
        folder, frozenset(report.case.shapes), lambda: open_checkpoint(spec, token=None, keep_code=False).tensors
    ):
        if check.outcome == "fails":
            context.consent(Refused(check.code, check.text, where=show(asked.folder), next=check.next))
    return dict(context.consents), report.not_compared


def _with_card(
    files: list[LocalFile], asked: PushRequest, folder: Path, consents: Mapping[str, str], there: str, without: str
) -> list[LocalFile]:
    """The files with the card: made from the receipt, or the folder's own with our section in it."""
    from converter.publish.card import CardFacts, base_models, model_card
    from converter.publish.manifest import LocalFile
    from converter.publish.outputs import repository
    from converter.publish.push import licence_of

    receipt = _read_json(folder / RECEIPT)
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file()
    config = _read_json(folder / (ADAPTER_CONFIG if is_adapter else MODEL_CONFIG))
    total = sum(f.size for f in files if f.name.endswith((".safetensors", ".bin", ".pt")))
    if not total:
        what = "none of the files that are pushed holds weights: this is neither a model nor an adapter"
        look = Command("doctor", (asked.folder,))
        raise Refused("weights-missing", what, where=show(asked.folder), next=Steps(look, " says what it is"))
    facts = CardFacts(
        repository(asked.repo_id, "main")[0], receipt, config, is_adapter, total, consents=consents,
        checks=None if is_adapter else _checks(asked, receipt), not_compared=without,
    )  # fmt: skip
    bases = base_models(facts)
    if bases and not asked.dry_run:
        facts = dataclasses.replace(facts, licence=licence_of(bases[0], asked.token))
    own = next((f for f in files if f.name == CARD), None)
    existing = there
    if own is not None and not there:
        existing = read_limited(own.path, limit=MAX_CARD, root=folder).decode("utf-8", "replace")
    content = model_card(facts, existing).encode()
    card = LocalFile(CARD, folder / CARD, len(content), content)
    return sorted([f for f in files if f.name != CARD] + [card], key=lambda f: f.name)


def _checks(asked: PushRequest, receipt: Mapping[str, Any]) -> tuple[str, tuple[tuple[str, bool], ...]] | None:
    """What `verify` says of the folder, for the trainer that it was made for, else for the one that its files name."""
    from converter.examine.verify.verify import VerifyRequest, examine
    from converter.publish.card import made_for

    aim = made_for(receipt)
    name = None if aim is None else f"{aim.serves.trainer}@{aim.version}".rstrip("@")
    try:
        found = examine(VerifyRequest(asked.folder, name, None if aim is None else aim.role))
    except ConvertError:
        return None
    checks = tuple((c.text, c.outcome != "fails") for c in found.checks if c.label != "receipt")
    return f"{found.aim.words} as {found.aim.role}", checks


def _read_json(path: Path) -> dict[str, Any]:
    from converter.core.files.strict_json import load_json

    if not path.is_file():
        return {}
    value = load_json(path, root=path.parent, allow_nan=True)
    return value if isinstance(value, dict) else {}
