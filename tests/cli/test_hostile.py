"""Every hostile input ends as it should: nothing of it runs, nothing is left behind, and the file at fault is named."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.cases import Case, model
from hostile.everything import CASES
from hostile.healthy import CASES as HEALTHY
from hostile.watched import Ended, Watcher
from places import IMPORTED
from selected import one_in


@pytest.fixture(scope="session")
def watcher() -> Iterator[Watcher]:
    """One for each worker."""
    with Watcher() as started:
        yield started


def seen(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything below a folder, with what would change if it were touched."""
    found: dict[str, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        link = os.readlink(path) if path.is_symlink() else ""
        size = 0 if path.is_dir() else status.st_size
        found[str(path.relative_to(folder))] = (status.st_mode, size, status.st_mtime_ns, status.st_ino, link)
    return found


def expect_clean(ended: Ended) -> None:
    """What holds for every command, whatever it was given."""
    assert ended.attempts == (), ended
    assert ended.code not in (70, -14), f"{ended.line}: exit {ended.code} after {ended.seconds:.1f} s\n{ended.text}"
    assert ended.code >= 0, f"{ended.line}: killed by signal {-ended.code}"
    assert "Traceback" not in ended.text, ended.text
    assert "hf_canary_of_a_token" not in ended.text
    odd = {c for c in ended.text if c != "\n" and not c.isprintable()}
    assert not odd, f"{ended.line}: unprintable characters {odd} in\n{ended.text}"
    long = max(map(len, ended.text.splitlines()), default=0)
    assert len(ended.text) < 20_000, f"{ended.line}: prints {len(ended.text)} characters"
    assert long < 4_000, f"{ended.line}: prints a line of {long} characters"


@pytest.mark.parametrize("case", one_in(3, HEALTHY, name=lambda c: c.name))
def test_healthy_input_passes_the_same_watch(case: Case, tmp_path: Path, watcher: Watcher) -> None:
    expect(case, tmp_path, watcher)


FIRST = {case.row: case for case in reversed(CASES)}
BY_DEFAULT = [
    case if at % 12 == 1 or case is FIRST[case.row] else pytest.param(case, marks=pytest.mark.slow)
    for at, case in enumerate(CASES)
]
"""A twelfth of them, at least one of each row of SECURITY.md's table."""


@pytest.mark.parametrize("case", BY_DEFAULT, ids=lambda c: f"{c.row}-{c.name}")
def test_hostile_input_is_refused_or_harmless(case: Case, tmp_path: Path, watcher: Watcher) -> None:
    expect(case, tmp_path, watcher)


def expect(case: Case, tmp_path: Path, watcher: Watcher) -> None:
    """Build a case, run its commands, and hold them to it."""
    folder = tmp_path / "case"
    folder.mkdir()
    case.build(folder)
    before = seen(folder)
    for ended in watcher.run(case.lines, folder=folder, closed=case.closed):
        expect_clean(ended)
        assert ended.code in case.codes(ended.line), f"{ended.line}: exit {ended.code}\n{ended.text}"
        if not case.harmless:
            flat = " ".join(ended.text.split())
            # What `repair` can find nowhere it names by tensor; `verify` gives its verdict in words, codes in its JSON.
            is_lost = ended.line.startswith("repair") and "tensors-lost" in flat
            assert is_lost or case.file in flat, f"{ended.line}: {case.file} is not named in\n{ended.text}"
            said = ended.line.startswith("verify") or any(words in flat for words in case.says.split("|"))
            assert is_lost or said, f"{ended.line}: nothing of {case.says} in\n{ended.text}"
    after = seen(folder)
    left = {n for n in after if n not in before}
    if case.harmless:
        assert not [n for n in left if n.partition("/")[0] not in ("out", "out2")], left
        assert not [n for n in left if Path(n).name in case.absent], left
    else:
        # Exit code 4: what was written is wrong, is kept as OUT.partial and named, and did not become OUT.
        kept = 4 in case.exits.get("reshard", ())
        assert not [n for n in left if not (kept and n.startswith("out.partial"))], left
    changed = [n for n in before if after.get(n) != before[n]]
    assert not changed


def test_there_are_cases_for_every_row_that_an_input_can_be() -> None:
    rows = {case.row for case in CASES}
    # 4 is below, 22 changes files while they are read, 23 is part of every case, 26 and 27 need a Hub.
    assert rows == set(range(1, 26)) - {4, 22, 23}
    assert len({case.name for case in CASES}) == len(CASES) >= 150
    assert len(HEALTHY) >= 20


ATTEMPTS = {
    "starts-a-program": "import os; os.system('touch canary')",
    "starts-a-process": "import subprocess; subprocess.run(['touch', 'canary'])",
    "unpickles": "import pickle; pickle.loads(b'cposix\\nsystem\\n.')",
    "imports": "import planted_module",
    "reads-a-secret": "open('/etc/passwd').close()",
    "writes-beside": "open('canary', 'w').close()",
    "writes-into-the-input": "open('m/canary', 'w').close()",
    "opens-what-is-closed": "open('m/training_args.bin', 'rb').close()",
    "connects": "import socket; socket.create_connection(('127.0.0.1', 9))",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_the_watch_sees_an_attack_that_works(attempt: str, tmp_path: Path) -> None:
    """The same hook, in a process that does what no command may do."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "training_args.bin").write_bytes(b"")
    (tmp_path / "planted_module.py").write_text("")
    program = (
        "import sys; from pathlib import Path; from hostile.watched import note_attempts\n"
        "seen = []\n"
        "note_attempts(Path('.'), ['training_args.bin'], seen)\n"
        f"try:\n    exec({ATTEMPTS[attempt]!r})\nexcept (RuntimeError, OSError): pass\n"
        "sys.exit(0 if len(seen) == 1 else 1)"
    )
    places = os.pathsep.join(map(str, [*IMPORTED, tmp_path]))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": places}, check=False
    )
    assert done.returncode == 0
    assert not (tmp_path / "canary").exists()


def test_files_of_the_working_folder_are_no_modules_of_the_program(tmp_path: Path) -> None:
    """Row 4: the folder of a stranger's model holds modules under the names that we import."""
    model(tmp_path)
    for name in (
        "json",
        "typer",
        "yaml",
        "torch",
        "safetensors",
        "converter",
        "sitecustomize",
        "usercustomize",
        "re",
        "rich",
    ):
        for folder in (tmp_path, tmp_path / "m"):
            (folder / f"{name}.py").write_text("open('canary', 'w').close()\nraise SystemExit(99)")
    script = Path(sys.executable).with_name("rlhf-convert")
    for folder, path in ((tmp_path, "m"), (tmp_path / "m", ".")):
        done = subprocess.run([script, "doctor", path], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert not (folder / "canary").exists()


BETWEEN = (" ", "'", "a", "(", "0, ", ".a", "[]", "1/", ": ", "','")
"""What a line is filled with, besides the key itself."""


def test_no_line_of_a_log_keeps_the_patterns_of_explain_busy() -> None:
    """Each filling with a third of the keys, each key with a third of the fillings."""
    assert busy_patterns(every=3) == []


@pytest.mark.slow
def test_no_line_of_any_filling_keeps_the_patterns_of_explain_busy() -> None:
    assert busy_patterns(every=1) == []


def busy_patterns(*, every: int) -> list[tuple[str, str, str]]:
    """Patterns that take more than a fifth of a second over a line."""
    from converter.examine.explanations.lines import MAX_LINE
    from converter.examine.explanations.log import MESSAGES

    slow = []
    for number, (message, key) in enumerate((m, k) for m in MESSAGES for k in m.keys):
        for between in [key, *BETWEEN][number % every :: every]:
            # A pattern is tried only on a line that holds one of its keys: at its start, its end, all over.
            filling = between * (MAX_LINE // len(between))
            for line in ((key + filling)[:MAX_LINE], (filling + key)[-MAX_LINE:], ((key + between) * 2000)[:MAX_LINE]):
                begun = time.process_time()
                message.regex.search(line)
                if time.process_time() - begun > 0.2:
                    slow.append((message.code, key, between))
    return slow
