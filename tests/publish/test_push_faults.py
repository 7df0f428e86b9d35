"""`push` where every request fails once, or from one on; and what must never be seen: two commits, a half, a token."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fake_hub import TOKEN, FakeHub, Fault, running
from hub_here import client_of, commits, on_disk, published, run

REPO = "me/rm"
CANARY = "hf_" + "Canary7Canary7Canary7"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weight files that go in parts, and a config."""
    folder = tmp_path_factory.mktemp("push-faults") / "model"
    folder.mkdir()
    torch.manual_seed(0)
    (folder / "config.json").write_text('{"architectures": ["TheirsForCausalLM"], "model_type": "theirs"}')
    names: dict[str, str] = {}
    for number in (1, 2):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({f"model.w{number}": torch.randn(64, 100)}, folder / file, metadata={"format": "pt"})
        names[f"model.w{number}"] = file
    index = {"metadata": {"total_size": 51200}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub(multipart=20_000)) as server, client_of(server, tmp_path):
        yield server


def expect_whole(hub: FakeHub, model: Path, branch: str = "main") -> None:
    files = published(hub, REPO, branch)
    assert files.pop("README.md")
    assert files == on_disk(model)


def pull_requests(hub: FakeHub) -> list[str]:
    return [b for b in hub.repos[REPO].branches if b.startswith("refs/pr/")]


def fail_each(model: Path, home: Path, kind: str, count: int, *options: str) -> tuple[int, int]:
    """Push once for every request, which fails; how many requests there are, and how often the first run gave up."""
    gave_up = 0
    for number in itertools.count():
        (home / f"{number}").mkdir()
        with running(FakeHub(multipart=20_000)) as hub, client_of(hub, home / f"{number}"):
            hub.faults = [Fault(".", kind, count, skip=number)]
            ran = run("push", model, REPO, *options)
            if hub.faults[0].count == count:
                return number, gave_up
            if ran.returncode != 0:
                gave_up += 1
                assert ran.returncode == 3, (number, ran.stderr)
                made = commits(hub, REPO) if REPO in hub.repos else 0
                if made:  # nothing, or all of it
                    expect_whole(hub, model)
                hub.faults.clear()
                ran = run("push", model, REPO, *options)
            assert ran.returncode == 0, (number, ran.stderr)
            if "--create-pr" in options:
                assert commits(hub, REPO) == 0, number
                assert len(pull_requests(hub)) == 1, (number, hub.log)
                expect_whole(hub, model, "refs/pr/1")
            else:
                assert commits(hub, REPO) == 1, number
                expect_whole(hub, model)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("kind", ["lost", pytest.param("corrupt", marks=pytest.mark.slow)])
def test_whichever_request_fails_one_whole_commit_is_there_after_at_most_one_more_run(
    model: Path, tmp_path: Path, kind: str
) -> None:
    requests, gave_up = fail_each(model, tmp_path, kind, 1)
    assert requests > 20
    assert gave_up == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "500", "503", "429", "408", "short"])
def test_a_passing_fault_of_any_request_is_not_seen(model: Path, tmp_path: Path, kind: str) -> None:
    assert fail_each(model, tmp_path, kind, 1)[1] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["400", "401", "403", "404", "409", "412"])
def test_a_no_to_any_request_is_made_good_by_the_same_command(model: Path, tmp_path: Path, kind: str) -> None:
    fail_each(model, tmp_path, kind, 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["drop", "lost", "503", "401"])
def test_whenever_the_hub_goes_away_one_whole_commit_is_there_once_it_is_back(
    model: Path, tmp_path: Path, kind: str
) -> None:
    requests, gave_up = fail_each(model, tmp_path, kind, 999)
    assert requests == gave_up


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lost", "drop", "500", "403"])
def test_whichever_request_is_refused_there_is_one_pull_request(model: Path, tmp_path: Path, kind: str) -> None:
    fail_each(model, tmp_path, kind, 1, "--create-pr")


@pytest.mark.parametrize("skip", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))])
@pytest.mark.parametrize("verb", ["push", "reshard"])
def test_bytes_that_change_on_their_way_to_the_hub_are_sent_again(
    hub: FakeHub, model: Path, verb: str, skip: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.faults = [Fault("PUT", "spoilt", 1, skip=skip)]
    words = ("push", model, REPO) if verb == "push" else ("reshard", model, f"hf://{REPO}")
    ran = run(*words)
    if hub.faults[0].count == 0 and ran.returncode:
        ran = run(*words)
    assert ran.returncode == 0, ran.stderr
    files = published(hub, REPO)
    assert all(files[p.name] == p.read_bytes() for p in model.glob("*.safetensors"))
    assert commits(hub, REPO) == 1


def test_a_pull_request_is_not_made_twice(hub: FakeHub, model: Path) -> None:
    hub.faults = [Fault("POST .*/commit/", "lost", 1)]
    first = run("push", model, REPO, "--create-pr")
    again = run("push", model, REPO, "--create-pr")
    assert again.returncode == 0, again.stderr
    assert len(pull_requests(hub)) == 1
    assert "discussions/1" in first.stdout
    assert "discussions/1" in again.stdout


def test_an_answer_to_the_last_try_that_is_lost_is_not_called_nothing(hub: FakeHub, model: Path) -> None:
    hub.faults = [Fault("POST .*/commit/", "lost", 1), Fault("GET .*/revision/", "drop", 999, skip=2)]
    ran = run("push", model, REPO)
    if ran.returncode:
        assert "nothing was published" not in ran.stderr
    hub.faults.clear()
    assert run("push", model, REPO).returncode == 0
    assert commits(hub, REPO) == 1


@pytest.mark.slow
def test_killed_at_any_time_the_next_run_finishes_with_one_commit(hub: FakeHub, model: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment()
    chance = random.Random(0)
    for _ in range(12):
        child = subprocess.Popen([sys.executable, "-m", "converter", "push", str(model), REPO, "-q"], env=env)
        time.sleep(chance.uniform(0.3, 1.6))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert REPO not in hub.repos or commits(hub, REPO) <= 1
        if REPO in hub.repos and commits(hub, REPO):
            expect_whole(hub, model)
            hub.repos.pop(REPO)
    assert run("push", model, REPO).returncode == 0
    expect_whole(hub, model)
    assert commits(hub, REPO) == 1


# What is refused before anything is read


@pytest.fixture
def huge(model: Path, tmp_path: Path) -> Path:
    """A file of 40 GB, of which the header is on the disk: to take its digest is a minute's work."""
    folder = tmp_path / "huge"
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    size = 40_000_000_000
    header = json.dumps({"model.a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    return folder


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault("whoami", "401", 99), "hub-token"),
        (Fault("repos/create", "403", 99), "hub-forbidden"),
        (Fault("auth-check/write", "403", 99), "hub-forbidden"),
    ],
)
def test_what_the_hub_will_refuse_is_known_before_the_files_are_read(
    hub: FakeHub, huge: Path, fault: Fault, code: str
) -> None:
    hub.faults = [fault]
    began = time.monotonic()
    ran = run("push", huge, REPO)
    assert ran.returncode == 3
    assert code in ran.stderr
    assert time.monotonic() - began < 10
    assert not hub.requests("^PUT|preupload|/commit/")


def test_weights_of_another_model_are_known_before_the_files_are_read(hub: FakeHub, huge: Path) -> None:
    hub.add(REPO, {"pytorch_model.bin": b"theirs"})
    ran = run("push", huge, REPO)
    assert ran.returncode == 3
    assert "hub-stale-weights" in ran.stderr


@pytest.mark.parametrize("name", [f"hf://{REPO}@beta", f"{REPO}@beta"])
def test_a_repository_may_be_named_with_its_branch(hub: FakeHub, model: Path, name: str) -> None:
    ran = run("push", model, name)
    assert ran.returncode == 0, ran.stderr
    assert commits(hub, REPO) == 0
    expect_whole(hub, model, "beta")


# The card that is there


def test_a_card_on_the_hub_is_extended_where_the_folder_has_none(hub: FakeHub, model: Path) -> None:
    hub.add(REPO, {"README.md": b"---\nlicense: mit\n---\n\n# Mine\n\nWritten on the Hub.\n"})
    for _ in range(2):
        assert run("push", model, REPO).returncode == 0
        card = published(hub, REPO)["README.md"].decode()
        assert "Written on the Hub." in card
        assert "license: mit" in card
        assert card.count("How this was made") == 1
    assert commits(hub, REPO) == 2


def test_a_card_on_the_hub_gives_way_to_the_folder_s_with_consent_only(
    hub: FakeHub, model: Path, tmp_path: Path
) -> None:
    hub.add(REPO, {"README.md": b"# Theirs\n"})
    folder = Path(shutil.copytree(model, tmp_path / "mine"))
    (folder / "README.md").write_text("# Mine\n")
    ran = run("push", folder, REPO)
    assert ran.returncode == 3
    assert "hub-card-differs" in ran.stderr
    assert commits(hub, REPO) == 1
    assert run("push", folder, REPO, "--allow", "hub-card-differs").returncode == 0
    card = published(hub, REPO)["README.md"].decode()
    assert "# Mine" in card
    assert "# Theirs" not in card
    assert run("push", folder, REPO).returncode == 0


# Progress


def test_progress_is_told_in_bytes_on_stderr(hub: FakeHub, model: Path) -> None:
    ran = run("push", model, REPO)
    assert "model-00001-of-00002.safetensors  25.7 KB" in ran.stderr
    quiet = run("push", model, "me/other", "-q")
    assert quiet.stdout + quiet.stderr == ""


def test_on_a_terminal_a_bar_shows_bytes_and_there_is_none_of_the_client_s(hub: FakeHub, model: Path) -> None:
    terminal, child_s = os.openpty()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment() | {"TERM": "xterm"}
    line = [sys.executable, "-m", "converter", "push", str(model), REPO]
    child = subprocess.Popen(line, env=env, stdout=subprocess.DEVNULL, stderr=child_s)
    os.close(child_s)
    said = b""
    while True:
        try:
            said += os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
    os.close(terminal)
    assert child.wait() == 0, said
    assert b"kB" in said
    assert b"%|" not in said
    expect_whole(hub, model)


# The token

SLOW = pytest.mark.slow
SAID = [
    ("option", ["--json"]),
    pytest.param("environment", ["-v"], marks=SLOW),
    pytest.param("file", [], marks=SLOW),
]


@pytest.mark.parametrize(("where", "more"), SAID)
def test_a_token_is_in_no_output_no_receipt_and_no_card(
    hub: FakeHub, model: Path, tmp_path: Path, where: str, more: list[str]
) -> None:
    from huggingface_hub import constants

    given = {"option": ["--token", CANARY], "environment": [], "file": []}[where]
    env = {"HF_TOKEN": CANARY if where == "environment" else "", "RLHF_CONVERT_DEBUG": "1"}
    Path(constants.HF_TOKEN_PATH).write_text(CANARY if where == "file" else "")
    faults = [
        [],
        [Fault("whoami", "401", 9)],
        [Fault("whoami", "echo", 9)],
        [Fault("preupload", "403", 9)],
        [Fault("PUT", "drop", 999)],
        [Fault("commit/", "503", 999)],
    ]
    hub.tokens.add(CANARY)
    for each in faults:
        hub.faults = each
        for words in (["push", model, REPO], ["reshard", model, "hf://me/other"], ["reshard", model, tmp_path / "o"]):
            more_here = more + (["--push-to-hub", "me/third", "--overwrite"] if words[2] == tmp_path / "o" else [])
            ran = run(*words, *given, *more_here, **env)
            assert CANARY not in ran.stdout + ran.stderr, words
    assert commits(hub, REPO) == 1
    for repo in hub.repos:
        assert CANARY.encode() not in b"".join(published(hub, repo).values())
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p != Path(constants.HF_TOKEN_PATH)]
    assert all(CANARY.encode() not in p.read_bytes() for p in written)


@pytest.mark.parametrize("token", ["hf_with\x01control1234567", "hf_with\u00e9accent1234567", "hf_2\nlines12345678901"])
def test_a_token_that_can_not_be_sent_is_refused_and_not_shown(hub: FakeHub, model: Path, token: str) -> None:
    for words in (["push", model, REPO], ["reshard", "org/x", "hf://me/x"]):
        ran = run(*words, "--token", token, RLHF_CONVERT_DEBUG="1")
        assert ran.returncode == 3
        for part in (token, "control1234567", "accent1234567", "lines12345678901"):
            assert part not in ran.stdout + ran.stderr


@pytest.mark.usefixtures("hub")
def test_what_is_said_of_a_full_disk_has_no_token_in_it(huge: Path, tmp_path: Path) -> None:
    with (huge / "model.safetensors").open("r+b") as file:
        size = 1 << 43
        header = json.dumps({"model.a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    for form in (["--token", TOKEN], [f"--token={TOKEN}"]):
        ran = run("reshard", huge, tmp_path / "out", *form)
        assert ran.returncode == 3
        assert "on the Hub (hf://...)" in " ".join(ran.stderr.split())
        assert "token" not in ran.stderr
