"""`rlhf-convert push`: checks first, then one commit, then a comparison with what is there."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.lines import line, next_lines
from converter.cli.options import Reading
from converter.core.files.names import ADAPTER_CONFIG, CARD, MODEL_CONFIG, RECEIPT
from converter.core.files.opening import read_limited
from converter.diagnostic import Command, Steps
from converter.errors import ConvertError, Refused, UsageError
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.cli.sink import Sink
    from converter.core.writer.reporter import Reporter
    from converter.publish.manifest import LocalFile, Manifest
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


def push(asked: PushRequest, options: Reading) -> int:
    """Push a folder.

    Raises:
        UsageError: the arguments are the wrong way round, or no folder is there.
        Refused: doctor finds errors, or the receipt is of other files, without consent; the Hub says no.
    """
    from converter.cli.progress import progress
    from converter.publish.manifest import files_to_push, manifest
    from converter.publish.outputs import STALE, repository
    from converter.publish.push import check_destination, expect_no_stale, make_repository
    from converter.publish.push import push as send
    from converter.publish.requests import Destination

    asked, folder = _read_the_right_way(asked), Path(asked.folder).expanduser()
    repo_id, branch = repository(asked.repo_id, asked.revision)
    consents = _preflight(asked, folder)
    files, left_out = files_to_push(folder, keep_code=asked.keep_code)
    where = Destination(
        repo_id, asked.token, asked.public, branch, asked.create_pr,
        asked.message or f"Upload {repo_id.rpartition('/')[2]} with rlhf-convert", STALE in asked.allow,
    )  # fmt: skip
    sink = options.sink
    me, there = None, ""
    if not asked.dry_run:
        # All that the Hub may refuse comes before gigabytes are read.
        me = check_destination(where)
        expect_no_stale([f.name for f in files], make_repository(where), where)
        there = _card_there(asked, where, next((f for f in files if f.name == CARD), None), consents)
    files = _with_card(files, asked, folder, consents, there)
    sink.screen(_plan(asked, where, files, left_out, me))
    with progress(sink) as reporter:
        reporter.start(sum(f.size for f in files), len(files))
        wanted = manifest(files, left_out, told=reporter.advance)
    if asked.dry_run:
        sink.screen(["dry run: nothing sent"])
        sink.json(_json(wanted, None, ()))
        return 0
    with _sending(sink) as reporter:
        pushed = send(wanted, where, reporter=reporter)
    sent = f"{len(pushed.sent)} of {len(wanted.files)} files sent" if pushed.sent else "all was there already"
    sink.screen(
        [
            line("checked", f"{len(wanted.files)} files: path, size and digest as here; {sent}"),
            line("pushed", pushed.url),
            *next_lines([Command("inspect", (f"hf://{repo_id}" + ("" if branch == "main" else f"@{branch}"),))]),
        ]
    )
    sink.json(_json(wanted, pushed.url, pushed.sent))
    return 0


@contextmanager
def _sending(sink: Sink) -> Iterator[Reporter]:
    """What tells how far it is: our bar or lines, and not the client's.

    Where files go by chunks (xet) they are not read through us: on a terminal the client's bars then say how far each
    is, and our lines which are there.
    """
    import huggingface_hub

    from converter.cli.progress import Lines, progress

    client: Any = import_module("huggingface_hub.utils")
    by_chunks = find_spec("hf_xet") is not None and not huggingface_hub.constants.HF_HUB_DISABLE_XET
    if sink.quiet or sink.as_json or not sys.stderr.isatty() or not by_chunks:
        client.disable_progress_bars()
        with progress(sink) as reporter:
            yield reporter
    else:
        yield Lines(sink)


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


def _preflight(asked: PushRequest, folder: Path) -> dict[str, str]:
    """What doctor and the receipt say; consents that were needed and given, by code.

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
    return dict(context.consents)


def _with_card(
    files: list[LocalFile], asked: PushRequest, folder: Path, consents: Mapping[str, str], there: str
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
    facts = CardFacts(
        repository(asked.repo_id, "main")[0], receipt, config, is_adapter, total, consents=consents,
        checks=None if is_adapter else _checks(asked, receipt),
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


def _plan(
    asked: PushRequest, where: Destination, files: list[LocalFile], left_out: list[str], me: str | None
) -> list[str]:
    how = "public" if asked.public else "private"
    to = f"{show(where.repo_id)} ({how}, if it is new)" + (f", as {show(me)}" if me else "")
    to += f", branch {show(where.revision)}" if where.revision != "main" else ""
    lines = [line("to", to), line("files", f"{len(files)}, {format_size(sum(f.size for f in files))}")]
    lines += [line("", f"{show(f.name)}  {format_size(f.size)}") for f in files[:20]]
    if len(files) > 20:
        lines.append(line("", f"and {len(files) - 20} more"))
    if left_out:
        lines.append(line("left out", fold([show(n) for n in left_out])))
    return lines


def _json(wanted: Manifest, url: str | None, sent: tuple[str, ...]) -> dict[str, Any]:
    return {
        "url": url,
        "sent": list(sent),
        "files": [{"path": f.name, "size": f.size, "sha256": wanted.digests[f.name][0]} for f in wanted.files],
        "left_out": list(wanted.left_out),
    }
