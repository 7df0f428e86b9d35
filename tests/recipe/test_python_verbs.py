"""Every verb as a function of `converter`: bytes and findings as from the command line, and nothing is printed."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import converter
from converter.cli import main
from converter.cli.tell.diff import to_json
from converter.shipped import shipped
from fake_hub import FakeHub, running
from hub_here import client_of, commits, on_disk, published, run

BASE, ADAPTER, RUN = "tiny-qwen2-base", "tiny-reward-adapter", "tiny-reward-run"
BROKEN = f"{RUN}/checkpoint-4"
REPO = "me/rm"

WRITING: dict[str, tuple[list[str], Callable[[], Any]]] = {
    "merge_lora": (
        ["merge-lora", ADAPTER, "cli", "--base", BASE, "--numerics", "peft"],
        lambda: converter.merge_lora(ADAPTER, "py", base=BASE, numerics="peft"),
    ),
    "merge_lora into two files in fp32": (
        ["merge-lora", ADAPTER, "cli", "--base", BASE, "--max-shard-size", "400KB", "--dtype", "fp32", "-j", "1"],
        lambda: converter.merge_lora(
            Path(ADAPTER), Path("py"), base=BASE, max_shard_size=400_000, dtype="fp32", jobs=1
        ),
    ),
    "gather": (
        ["gather", RUN, "cli", "--base", BASE, "--emit", "merged"],
        lambda: converter.gather(RUN, "py", base=BASE, emit="merged"),
    ),
    "gather an adapter": (["gather", BROKEN, "cli"], lambda: converter.gather(BROKEN, "py")),
    "convert": (
        ["convert", ADAPTER, "cli", "--to", "openrlhf", "--role", "reward", "--base", BASE],
        lambda: converter.convert(ADAPTER, "py", to="openrlhf", role="reward", base=BASE),
    ),
    "convert what has lost tensors": (
        ["convert", BROKEN, "cli", "--to", "trl", "--role", "reward", "--weights-from", RUN, "--base", BASE],
        lambda: converter.convert(BROKEN, "py", to="trl", role="reward", weights_from=RUN, base=BASE),
    ),
    "rm_to_critic": (
        ["rm-to-critic", "rm", "cli", "--to", "verl"],
        lambda: converter.rm_to_critic("rm", "py", to="verl"),
    ),
    "rm_to_critic with a fresh head": (
        ["rm-to-critic", BASE, "cli", "--to", "trl", "--init-head", "normal", "--seed", "7"],
        lambda: converter.rm_to_critic(BASE, "py", to="trl", init_head="normal", seed=7),
    ),
    "critic_to_rm": (
        ["critic-to-rm", "critic", "cli", "--to", "trl", "--from", "verl"],
        lambda: converter.critic_to_rm("critic", "py", to="trl", from_="verl"),
    ),
    "repair": (["repair", BROKEN, "cli"], lambda: converter.repair(BROKEN, "py")),
    "reshard": (
        ["reshard", BASE, "cli", "--max-shard-size", "200KB"],
        lambda: converter.reshard(BASE, "py", max_shard_size="200KB"),
    ),
    "run": (
        ["run", "merge-reward-lora", "cli", "--input", f"source={BASE}", "--input", f"adapter={ADAPTER}"],
        lambda: converter.run("merge-reward-lora", "py", inputs={"source": BASE, "adapter": ADAPTER}),
    ),
    "plan and write": (
        ["run", "merge-reward-lora", "cli", "--input", f"source={BASE}", "--input", f"adapter={ADAPTER}"],
        lambda: converter.write(converter.plan("merge-reward-lora", inputs={"source": BASE, "adapter": ADAPTER}), "py"),
    ),
    "write what a verb planned": (
        ["gather", RUN, "cli", "--base", BASE, "--emit", "merged"],
        lambda: converter.write(converter.gather(RUN, "py", base=BASE, emit="merged", dry_run=True)),
    ),
}


@pytest.fixture(autouse=True)
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """The shipped checkpoints, a reward model and a critic, in the current folder."""
    for folder in (shipped("fixtures"), models):
        for each in folder.iterdir():
            (tmp_path / each.name).symlink_to(each)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, fixtures = tmp_path_factory.mktemp("models"), shipped("fixtures")
    rm, critic = str(folder / "rm"), str(folder / "critic")
    assert main(["merge-lora", str(fixtures / ADAPTER), rm, "--base", str(fixtures / BASE), "-q"]) == 0
    assert main(["rm-to-critic", rm, critic, "--to", "verl", "-q"]) == 0
    return folder


@pytest.fixture
def silent(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], None]]:
    """Asserts that nothing was printed since the command line spoke; forget that with `capfd`."""

    def check() -> None:
        printed = capfd.readouterr()
        assert (printed.out, printed.err) == ("", "")

    yield check
    check()


def answer(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the command line prints as JSON."""
    main([*arguments, "--json"])
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


def content(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", WRITING)
def test_a_verb_writes_the_bytes_that_the_command_line_writes_and_prints_nothing(
    case: str, capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    arguments, call = WRITING[case]
    said = answer(capfd, *arguments)
    done = call()
    silent()
    assert content("py") == content("cli")
    assert isinstance(done, converter.Conversion)
    assert done.receipt is not None
    assert dict(done.receipt.content) == said["receipt"] == json.loads(Path("py/rlhf-convert.json").read_bytes())
    assert [n.code for n in done.notes] == [n["code"] for n in said["notes"]]
    assert str(done.out) == "py"
    again = converter.run(done.recipe, "again")  # a result's recipe is the same conversion
    assert again.plan.fingerprint == done.plan.fingerprint
    assert converter.diff("again", "py").is_equal


def test_both_outputs_of_a_run_are_those_of_the_command_line(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    said = answer(capfd, "gather", RUN, "cli", "--base", BASE, "--emit", "both")
    done = converter.gather(RUN, "py", base=BASE, emit="both")
    silent()
    assert done.adapter is not None
    assert done.adapter.receipt is not None
    assert content("py") == content("cli")
    assert content("py-adapter") == content("cli-adapter")
    assert dict(done.adapter.receipt.content) == said["adapter"]["receipt"]


def test_without_an_output_nothing_is_written_and_the_plan_is_the_one_of_a_dry_run(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    said = answer(capfd, "merge-lora", ADAPTER, "out", "--base", BASE, "--dry-run")
    before = sorted(p.name for p in Path().iterdir())
    planned = converter.merge_lora(ADAPTER, base=BASE)
    silent()
    assert planned.receipt is None
    assert planned.plan.fingerprint == said["fingerprint"]
    assert dict(planned.plan.counts) == said["counts"]
    assert {f["file"] for f in said["files"]} == {s.file for s in planned.plan.shards}
    assert planned.checkpoint["score.weight"].info.shape == (1, planned.checkpoint.config["hidden_size"])
    assert sorted(p.name for p in Path().iterdir()) == before


def test_a_plan_of_a_checkpoint_is_written_by_the_same_function(silent: Callable[[], None]) -> None:
    receipt = converter.write(
        converter.make_plan(converter.open(BASE), context=converter.Context()), "out", jobs=2, memory="1GB"
    )
    assert receipt.reread == len(converter.open("out"))
    assert converter.diff(BASE, "out").is_equal
    with pytest.raises(converter.Refused, match="exists") as caught:
        converter.write(converter.make_plan(converter.open(BASE), context=converter.Context()), "out")
    assert caught.value.code == "output-exists"


def test_a_folder_in_which_nothing_is_wrong_is_not_written(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    said = answer(capfd, "repair", BASE, "cli")
    found = converter.repair(BASE, "py")
    assert isinstance(found, converter.Sound)
    assert (found.what, [list(each) for each in found.left]) == (said["what"], said["left"])
    assert not Path("py").exists()


def test_shards_without_a_weight_file_are_gathered_by_repair(silent: Callable[[], None]) -> None:
    found = converter.repair(f"{BROKEN}/global_step4", "repaired")
    assert isinstance(found, converter.Gathered)
    converter.gather(f"{BROKEN}/global_step4", "gathered")
    assert content("repaired") == content("gathered")


def test_inspect_says_what_the_command_line_says(capfd: pytest.CaptureFixture[str], silent: Callable[[], None]) -> None:
    for folder in (BASE, ADAPTER, BROKEN, "rm", f"{BROKEN}/global_step4"):
        said = answer(capfd, "inspect", folder)
        found = converter.inspect(folder)
        silent()
        assert found.kind == said["detected"], folder
        assert found.parameters == said["parameters"]
        assert {n: list(shape) for n, shape in found.heads.items()} == said["heads"]
        assert list(found.saved_by) == said["saved_by"]
        assert len(found.survey.entries) == said["tensors"]
        assert [f.to_json() for f in found.findings] == said["findings"]


def test_doctor_finds_what_the_command_line_finds(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    said = answer(capfd, "doctor", BROKEN, "--for", "openrlhf", "--deep", "--base", BASE)
    found = converter.doctor(BROKEN, for_="openrlhf", deep=True, base=BASE)
    silent()
    assert [f.to_json() for f in found.findings] == said["findings"]
    assert found.worst() == "error"
    first = found.findings[0]
    assert converter.doctor(BROKEN, ignore=first.code, for_="openrlhf", deep=True, base=BASE).findings[0] != first


def test_verify_checks_what_the_command_line_checks(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    pairs = ("--against", ADAPTER, "--base", BASE)
    for folder, trainer in (("rm", "openrlhf"), (BASE, "verl")):
        said = answer(capfd, "verify", folder, "--for", trainer, "--role", "reward", *pairs)
        found = converter.verify(folder, for_=trainer, role="reward", against=ADAPTER, base=BASE)
        silent()
        assert [c.to_json() for c in found.checks] == said["checks"]
        assert found.holds is said["verified"]
        assert found.holds is (folder == "rm")


def test_diff_finds_what_the_command_line_finds(capfd: pytest.CaptureFixture[str], silent: Callable[[], None]) -> None:
    said = answer(capfd, "diff", BASE, "rm")
    found = converter.diff(BASE, "rm")
    silent()
    assert json.loads(json.dumps(to_json(found.difference))) == {k: v for k, v in said.items() if k != "version"}
    assert not found.is_equal
    assert [p.a for p in found.pairs if p.status == "changed"] == [
        each["a"] for each in said["tensors"] if each["status"] == "changed"
    ]


def test_explain_says_what_the_command_line_says(capfd: pytest.CaptureFixture[str], silent: Callable[[], None]) -> None:
    said = answer(capfd, "explain", "head-base-lost")
    code = converter.explain("head-base-lost")
    silent()
    assert isinstance(code, converter.Explanation)
    assert (code.code, code.text, code.zh) == (said["code"], said["text"], said["zh"])
    text = (
        "Some weights of Qwen2ForSequenceClassification were not initialized from the model checkpoint at x and are "
        "newly initialized: ['score.weight']"
    )
    said = answer(capfd, "explain", text)
    pasted = converter.explain(text)
    silent()
    assert isinstance(pasted, converter.Messages)
    assert [s.message.code for s in pasted.found] == [m["name"] for m in said["messages"]] == ["head-newly-initialised"]
    Path("train.log").write_text(f"step 1\n{text}\nstep 2\n")
    log = converter.explain(Path("train.log"))
    assert isinstance(log, converter.Messages)
    assert [(s.line, s.count) for s in log.found] == [(2, 1)]


def test_push_commits_the_bytes_that_the_command_line_commits(
    tmp_path: Path, models: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "rm", "folder")
    with running(FakeHub()) as hub, client_of(hub, tmp_path):
        assert run("push", "folder", REPO).returncode == 0
        by_command = published(hub, REPO)
    capfd.readouterr()
    with running(FakeHub()) as hub, client_of(hub, tmp_path), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's, about itself
        dry = converter.push("folder", REPO, dry_run=True)
        assert (dry.pushed, REPO in hub.repos) == (None, False)
        done = converter.push("folder", REPO)
        by_function = published(hub, REPO)
        assert commits(hub, REPO) == 1
        assert hub.repos[REPO].private
    assert capfd.readouterr() == ("", "")
    assert {n: c for n, c in by_function.items() if n != "README.md"} == on_disk(Path("folder"))
    assert by_function == by_command
    assert done.pushed is not None
    assert re.search(rf"/{REPO}/commit/[0-9a-f]{{40}}$", done.pushed.url)
    assert set(done.pushed.sent) == set(by_function) == {f.name for f in done.files}


def test_what_is_wrong_is_raised_with_the_code_that_the_command_line_prints(
    capfd: pytest.CaptureFixture[str], silent: Callable[[], None]
) -> None:
    calls: list[tuple[list[str], Callable[[], Any], type[converter.ConvertError]]] = [
        (["merge-lora", BASE, "out"], lambda: converter.merge_lora(BASE, "out"), converter.UsageError),
        (["gather", BASE, "out"], lambda: converter.gather(BASE, "out"), converter.UsageError),
        (
            ["convert", BASE, "out", "--to", "verl", "--role", "critic"],
            lambda: converter.convert(BASE, "out", to="verl", role="critic"),
            converter.Refused,
        ),
        (["reshard", BASE, "rm"], lambda: converter.reshard(BASE, "rm"), converter.Refused),
        (["inspect", "nowhere"], lambda: converter.inspect("nowhere"), converter.Refused),
        (["doctor", BASE, "--for", "x"], lambda: converter.doctor(BASE, for_="x"), converter.UsageError),
        (["diff", BASE, ADAPTER], lambda: converter.diff(BASE, ADAPTER), converter.UsageError),
        (["explain", "no-such-code"], lambda: converter.explain("no-such-code"), converter.UsageError),
        (["verify", "rm", "--python", "p"], lambda: converter.verify("rm", python="p"), converter.UsageError),
        (["push", "nowhere", REPO], lambda: converter.push("nowhere", REPO), converter.Refused),
        (["run", "no-such", "out"], lambda: converter.run("no-such", "out"), converter.UsageError),
    ]
    for arguments, call, kind in calls:
        said = answer(capfd, *arguments)["error"]
        with pytest.raises(kind) as caught:
            call()
        silent()
        assert (caught.value.code, caught.value.exit_code) == (said["code"], said["exit_code"]), arguments
        assert not Path("out").exists()


def test_a_reporter_and_the_plan_are_told_and_can_stop_a_run_before_its_first_byte(silent: Callable[[], None]) -> None:
    class Enough(Exception):
        pass

    @dataclasses.dataclass
    class Told:
        total: int = 0
        advanced: int = 0

        def start(self, total_bytes: int, shards: int) -> None:
            self.total = total_bytes

        def advance(self, count: int, tensor: str) -> None:
            self.advanced += count

        def shard_done(self, file: str, size: int, resumed: bool) -> None: ...

        def checking(self, what: str) -> None: ...

    def stop(planned: converter.Conversion) -> None:
        raise Enough(planned.plan.total_bytes)

    with pytest.raises(Enough):
        converter.reshard(BASE, "out", on_plan=stop)
    assert not Path("out").exists()
    told = Told()
    done = converter.reshard(BASE, "out", reporter=told)
    assert told.total == done.plan.total_bytes
    assert told.advanced > 0


def test_a_mistyped_keyword_is_no_silence() -> None:
    with pytest.raises(TypeError):
        converter.reshard(BASE, "out", max_shards="2")  # type: ignore[call-arg]
    with pytest.raises(converter.UsageError, match="layout"):
        converter.reshard(BASE, "out", layout="packed")
    assert not Path("out").exists()


VERBS = (
    "open", "load", "merge_lora", "gather", "convert", "rm_to_critic", "critic_to_rm", "repair", "reshard", "inspect",
    "doctor", "verify", "diff", "explain", "push", "plan", "write",
)  # fmt: skip


def test_every_verb_is_public_and_importing_the_package_loads_nothing_heavy() -> None:
    assert set(VERBS) <= set(converter.__all__) == set(dir(converter))
    for name in converter.__all__:
        assert getattr(converter, name).__doc__ or name == "__version__"
    code = (
        "import sys; before = set(sys.modules); import converter; found = set(sys.modules) - before; "
        "assert not [m for m in found if m.startswith('converter.') and m != 'converter.version'], found; "
        f"[getattr(converter, n) for n in {VERBS}]; "
        "assert not {'torch', 'transformers', 'peft', 'numpy', 'typer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
