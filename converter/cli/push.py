"""`rlhf-convert push`: checks first, then one commit, then a comparison with what is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.cli.options import Reading
from converter.errors import Refused, UsageError, fold, show
from converter.files import read_limited
from converter.report import line, next_lines
from converter.sizes import format_size

if TYPE_CHECKING:
    from converter.hub import LocalFile, Manifest

MAX_CARD = 5_000_000
"""Bytes of a README.md that is extended."""


@dataclass(frozen=True)
class Pushing:
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


def push(asked: Pushing, options: Reading) -> int:
    """Push a folder.

    Raises:
        UsageError: the arguments are the wrong way round, or no folder is there.
        Refused: doctor finds errors, or the receipt is of other files, without consent; the Hub says no.
    """
    from converter.cli.hub_output import STALE
    from converter.hub import Destination, check_destination, files_to_push, manifest
    from converter.hub import push as send

    folder = _folder(asked)
    consents = _preflight(asked, folder)
    files, left_out = files_to_push(folder, keep_code=asked.keep_code)
    where = Destination(
        asked.repo_id, asked.token, asked.public, asked.revision, asked.create_pr,
        asked.message or f"Upload {asked.repo_id.rpartition('/')[2]} with rlhf-convert", STALE in asked.allow,
    )  # fmt: skip
    sink = options.sink
    me = None if asked.dry_run else check_destination(where)
    files = _with_card(files, asked, folder, consents)
    wanted = manifest(files, left_out, told=lambda _: None)
    sink.screen(_plan(asked, wanted, me))
    if asked.dry_run:
        sink.screen(["dry run: nothing sent"])
        sink.json(_json(wanted, None, ()))
        return 0
    pushed = send(wanted, where, told=lambda name: sink.tell(f"sending {show(name)}"))
    sent = f"{len(pushed.sent)} of {len(wanted.files)} files sent" if pushed.sent else "all was there already"
    sink.screen(
        [
            line("checked", f"{len(wanted.files)} files: path, size and digest as here; {sent}"),
            line("pushed", pushed.url),
            *next_lines([f"rlhf-convert inspect {asked.repo_id}"]),
        ]
    )
    sink.json(_json(wanted, pushed.url, pushed.sent))
    return 0


def _folder(asked: Pushing) -> Path:
    folder = Path(asked.folder).expanduser()
    if folder.is_dir():
        return folder
    if Path(asked.repo_id).expanduser().is_dir():
        what = f"{show(asked.repo_id)} is the folder and {show(asked.folder)} the repository"
        raise UsageError("arguments-swapped", what, next=f"rlhf-convert push {asked.repo_id} {asked.folder}")
    raise Refused("path-missing", f"there is no folder {show(asked.folder)!r}")


def _preflight(asked: Pushing, folder: Path) -> dict[str, str]:
    """What doctor and the receipt say; consents that were needed and given, by code.

    Raises:
        Refused: an error without consent, under the finding's own code.
    """
    from converter.context import Context
    from converter.doctor import Asked, examine, file_of
    from converter.verify_receipt import check_receipt

    context = Context(frozenset(asked.allow))
    report = examine(Asked(asked.folder))
    for finding in report.findings:
        if finding.severity == "error":
            where = show(folder / file_of(finding, report.case))
            context.consent(Refused(finding.code, finding.message, where=where, next=finding.next))
    for check in check_receipt(folder, frozenset(report.case.shapes)):
        if check.outcome == "fails":
            context.consent(Refused(check.code, check.text, where=show(asked.folder)))
    return dict(context.consents)


def _with_card(files: list[LocalFile], asked: Pushing, folder: Path, consents: Mapping[str, str]) -> list[LocalFile]:
    """The files with the card: made from the receipt, or the folder's own with our section in it."""
    from converter.card import CardFacts, base_models, model_card
    from converter.hub import CARD, LocalFile, licence_of

    receipt = _read_json(folder / "rlhf-convert.json")
    is_adapter = (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    config = _read_json(folder / ("adapter_config.json" if is_adapter else "config.json"))
    total = sum(f.size for f in files if f.name.endswith((".safetensors", ".bin", ".pt")))
    facts = CardFacts(asked.repo_id, receipt, config, is_adapter, total, consents=consents)
    bases = base_models(facts)
    if bases and not asked.dry_run:
        facts = dataclasses.replace(facts, licence=licence_of(bases[0], asked.token))
    own = next((f for f in files if f.name == CARD), None)
    existing = ""
    if own is not None:
        existing = read_limited(own.path, limit=MAX_CARD, root=folder).decode("utf-8", "replace")
    content = model_card(facts, existing).encode()
    card = LocalFile(CARD, folder / CARD, len(content), content)
    return sorted([f for f in files if f.name != CARD] + [card], key=lambda f: f.name)


def _read_json(path: Path) -> dict[str, Any]:
    from converter.strict_json import load_json

    if not path.is_file():
        return {}
    value = load_json(path, root=path.parent, allow_nan=True)
    return value if isinstance(value, dict) else {}


def _plan(asked: Pushing, wanted: Manifest, me: str | None) -> list[str]:
    how = "public" if asked.public else "private, if it is new"
    to = f"{show(asked.repo_id)} ({how})" + (f", as {show(me)}" if me else "")
    lines = [line("to", to), line("files", f"{len(wanted.files)}, {format_size(wanted.total_bytes)}")]
    lines += [line("", f"{show(f.name)}  {format_size(f.size)}") for f in wanted.files[:20]]
    if len(wanted.files) > 20:
        lines.append(line("", f"and {len(wanted.files) - 20} more"))
    if wanted.left_out:
        lines.append(line("left out", fold([show(n) for n in wanted.left_out])))
    return lines


def _json(wanted: Manifest, url: str | None, sent: tuple[str, ...]) -> dict[str, Any]:
    return {
        "url": url,
        "sent": list(sent),
        "files": [{"path": f.name, "size": f.size, "sha256": wanted.digests[f.name][0]} for f in wanted.files],
        "left_out": list(wanted.left_out),
    }
