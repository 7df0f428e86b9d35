"""`watch`: what it posts, and to whom; what wakes it, and where nothing can."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from converter.cli import main
from converter.cli.tell.posting import post
from converter.recipe.verbs.waiting import Notified, Polling, file_system_of, is_shared, waiting
from places import REPOSITORY
from schemas import faults_of

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
BROKEN = REPOSITORY / "fixtures" / "tiny-reward-run" / "checkpoint-4"
SECRET = "s3cr3t-t0ken"


class Receiver:
    """A server on loopback that keeps what it is sent, and answers as it is told."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer, self.delay = 200, 0.0
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.paths.append(self.path)
                receiver.headers.append(dict(self.headers))
                receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                time.sleep(receiver.delay)
                self.send_response(receiver.answer)
                if receiver.answer == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST  # noqa: N815 - the name is http.server's

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


def watch(run: Path, *more: str) -> int:
    timing = ["--once", "--interval", "0.05", "--settle", "0.15", "--state", str(run.parent / "state")]
    return main(["watch", str(run), *timing, *more])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    shutil.copytree(BROKEN, tmp_path / "run" / "checkpoint-4")
    shutil.copytree(BASE, tmp_path / "run" / "checkpoint-5")
    return tmp_path / "run"


def test_each_checkpoint_is_posted_as_json_prints_it_and_the_key_reaches_the_receiver_alone(
    run: Path, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    assert watch(run, "--json", "--post", f"http://me:{SECRET}@{receiver.host}/hook?key={SECRET}") == 1
    out, err = capfd.readouterr()
    assert receiver.bodies == [json.loads(line) for line in out.splitlines()]
    assert [b["verdict"] for b in receiver.bodies] == ["error", "sound"]
    assert [fault for b in receiver.bodies for fault in faults_of("watch", b)] == []
    assert receiver.paths == [f"/hook?key={SECRET}"] * 2
    assert receiver.headers[0]["Content-Type"] == "application/json"
    assert receiver.headers[0]["Authorization"].startswith("Basic ")
    assert SECRET not in out + err


def test_a_bug_at_one_checkpoint_does_not_end_the_watch_of_the_others(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from converter.recipe.verbs import doctor as verb

    honest = verb.doctor

    def doctor(folder: str, **knobs: Any) -> Any:
        if folder.endswith("-4"):
            raise ZeroDivisionError("of a checkpoint that nobody foresaw")
        return honest(folder, **knobs)

    monkeypatch.setattr(verb, "doctor", doctor)
    assert watch(run) == 1
    told = capfd.readouterr().out.splitlines()
    assert (
        told[0]
        == f"{run}/checkpoint-4: not examined: a bug in doctor: ZeroDivisionError: of a checkpoint that nobody foresaw"
    )
    assert told[1] == f"{run}/checkpoint-5: sound"


@pytest.mark.parametrize("answer", [500, 404, 302])
def test_an_answer_that_is_an_error_is_one_line_and_the_watch_goes_on(
    answer: int, run: Path, receiver: Receiver, capfd: pytest.CaptureFixture[str]
) -> None:
    receiver.answer = answer
    assert watch(run, "--post", f"http://{receiver.host}/{SECRET}") == 1
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 2
    told = [line for line in err.splitlines() if line.startswith("--post")]
    assert told == [f"--post: {receiver.host} answered {answer}"] * 2
    assert SECRET not in err
    assert len(receiver.paths) == 2  # nobody was followed elsewhere


def test_a_receiver_that_is_not_there_or_hangs_is_given_up(receiver: Receiver) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert post(f"http://127.0.0.1:{port}/{SECRET}", {}) == f"127.0.0.1:{port}: Connection refused"
    receiver.delay = 1.0
    began = time.monotonic()
    assert post(f"http://{receiver.host}/{SECRET}", {}, timeout=0.1) == f"{receiver.host}: no answer in time"
    assert time.monotonic() - began < 0.9


@pytest.mark.parametrize("url", ["", "ftp://host/x", "host/x", "http://", "http://host:port/", "file:///etc/passwd"])
def test_what_is_no_address_is_refused_before_anything_is_watched(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path), "--once", "--post", url]) == 2
    assert "post-url" in capsys.readouterr().err


def test_the_kernel_tells_of_a_change_at_once(tmp_path: Path) -> None:
    with waiting(tmp_path, "inotify") as waiter:
        assert isinstance(waiter, Notified)
        timer = threading.Timer(0.2, (tmp_path / "new").write_text, ("x",))
        timer.start()
        began = time.monotonic()
        waiter.wait(20.0)
        assert time.monotonic() - began < 10
        timer.join()
        began = time.monotonic()
        time.sleep(0.6)
        waiter.wait(0.0)
        began = time.monotonic()
        waiter.wait(0.2)
        assert time.monotonic() - began >= 0.15


def test_looks_are_taken_where_they_are_asked_for(tmp_path: Path) -> None:
    with waiting(tmp_path, "poll") as waiter:
        assert isinstance(waiter, Polling)


MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
server:/runs /mnt/my\\040runs nfs4 rw 0 0
s3 /mnt/bucket fuse.s3fs rw 0 0
/dev/vda /mnt/my\\040runs/local ext4 rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", "overlay"),
        ("/mnt/my runs/a", "nfs4"),
        ("/mnt/my runs/local/a", "ext4"),
        ("/mnt/my runsandmore", "overlay"),
        ("/mnt/bucket", "fuse.s3fs"),
    ],
)
def test_a_file_system_is_that_of_the_nearest_mount(path: str, kind: str) -> None:
    assert file_system_of(path, MOUNTS) == kind


def test_a_folder_of_this_machine_is_not_shared(tmp_path: Path) -> None:
    assert not is_shared(tmp_path)
