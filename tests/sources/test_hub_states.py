"""Trainers' states, broken folders and copies on a Hub: gathered, repaired, verified and examined where they lie."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from converter.errors import UsageError
from converter.shipped import shipped
from converter.sources.hub import mirror as hub_mirror
from converter.sources.hub.names import as_reference, below, hub_name
from fake_hub import FakeHub, Fault, running
from hub_here import client_of, commits, on_disk, published, run
from places import RUNS

FIXTURES = shipped("fixtures")
RUN, BASE = "org/run", "org/tiny-qwen2-base"
STATES = ["zero/runs/lora-z3-n2", "zero/runs/reward-z2-n2", "dcp/runs/accelerate-n2", "verl_saves/runs/critic-fsdp1-n3"]
KINDS = ("zero", "dcp", "verl_saves")
EVERY = sorted(f"{k}/runs/{p.parent.name}" for k in KINDS for p in (RUNS / k / "runs").glob("*/fixture.json"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, as a repository has them."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def whole(folder: Path) -> dict[str, bytes]:
    """What was written, but for the receipt, which names where the input is from."""
    files = on_disk(folder)
    assert json.loads(files.pop("rlhf-convert.json"))
    return files


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(hub_mirror, "SMALL", 100)  # the shards here are small, and shall be read in parts
    with running(FakeHub()) as server, client_of(server, tmp_path / "home"):
        server.add(RUN, tree(FIXTURES / "tiny-reward-run"))
        server.add(BASE, tree(FIXTURES / "tiny-qwen2-base"))
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The same run and base as folders."""
    for name in ("tiny-reward-run", "tiny-qwen2-base"):
        shutil.copytree(FIXTURES / name, tmp_path / "here" / name)
    return tmp_path / "here"


def expect_gathered_alike(hub: FakeHub, name: str, tmp_path: Path) -> None:
    local = Path(shutil.copytree(RUNS / name, tmp_path / "local"))
    hub.add("org/state", tree(local))
    options = ["--lora-alpha", "16"] if "lora" in name else []
    one = run("gather", local, "one", *options)
    two = run("gather", "org/state", "two", *options)
    assert (one.returncode, two.returncode) == (one.returncode, one.returncode), two.stderr
    if one.returncode:
        assert two.stderr.split()[:2] == one.stderr.split()[:2]
        return
    assert whole(Path("two")) == whole(Path("one"))
    inputs = json.loads((Path("two") / "rlhf-convert.json").read_text())["inputs"]
    assert inputs["source"]["name"].startswith("org/state")
    assert inputs["source"]["revision"] == hub.repos["org/state"].branches["main"][-1].oid
    assert not (tmp_path / "home" / "hub").exists()


@pytest.mark.parametrize("name", STATES)
def test_a_state_on_the_hub_is_gathered_as_the_same_folder_is(hub: FakeHub, tmp_path: Path, name: str) -> None:
    expect_gathered_alike(hub, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in EVERY if n not in STATES])
def test_every_state_on_the_hub_is_gathered_as_the_same_folder_is(hub: FakeHub, tmp_path: Path, name: str) -> None:
    expect_gathered_alike(hub, name, tmp_path)


@pytest.mark.parametrize(
    "name",
    [f"{RUN}", f"{RUN}@main", f"hf://{RUN}", f"hf://{RUN}/checkpoint-4", f"hf://{RUN}@main/checkpoint-4/global_step4"],
)
def test_a_state_is_found_wherever_in_the_repository_the_name_points(hub: FakeHub, here: Path, name: str) -> None:
    inner = name.removeprefix("hf://").removeprefix(RUN).removeprefix("@main")
    assert run("gather", f"{here}/tiny-reward-run{inner}", "one").returncode == 0
    ran = run("gather", name, "two")
    assert ran.returncode == 0, ran.stderr
    assert whole(Path("two")) == whole(Path("one"))


def test_a_state_at_a_revision_is_that_one_s(hub: FakeHub, here: Path) -> None:
    first = hub.repos[RUN].branches["main"][-1].oid
    hub.add(RUN, dict.fromkeys(tree(FIXTURES / "tiny-reward-run"), b"other"))
    assert run("gather", f"{here}/tiny-reward-run", "one").returncode == 0
    for out, words in (("two", [f"{RUN}@{first}"]), ("three", [RUN, "--revision", first])):
        ran = run("gather", words[0], out, *words[1:])
        assert ran.returncode == 0, ran.stderr
        assert whole(Path(out)) == whole(Path("one"))


def test_the_screen_of_a_gather_names_the_hub_and_no_folder_of_ours(hub: FakeHub, tmp_path: Path) -> None:
    ran = run("gather", RUN, "out", "-v")
    assert ran.returncode == 0, ran.stderr
    assert f"hf://{RUN}/checkpoint-4/global_step4" in ran.stdout
    assert str(tmp_path / "home") not in ran.stdout + ran.stderr + (Path("out") / "rlhf-convert.json").read_text()


def test_a_state_goes_from_hub_to_hub(hub: FakeHub, here: Path) -> None:
    assert run("gather", f"{here}/tiny-reward-run", "one").returncode == 0
    ran = run("gather", RUN, "hf://me/out")
    assert ran.returncode == 0, ran.stderr
    files = published(hub, "me/out")
    assert files.pop("README.md")
    assert files.pop("rlhf-convert.json")
    assert files == whole(Path("one"))
    assert commits(hub, "me/out") == 1


CHECKPOINT = f"hf://{RUN}/checkpoint-4"
VERBS = {
    "repair": (["repair"], [CHECKPOINT], ["--base", BASE], []),
    "repair from elsewhere": (["repair"], ["alone"], ["--weights-from", RUN, "--base", BASE], []),
    "convert": (["convert"], [CHECKPOINT], ["--base", BASE], ["--to", "openrlhf", "--role", "reward"]),
    "critic": (["rm-to-critic"], [CHECKPOINT], ["--base", BASE], ["--to", "openrlhf"]),
    "merge": (["merge-lora"], ["hf://org/adapter"], ["--base", BASE], []),
    "both": (["gather"], [RUN], ["--base", BASE], ["--emit", "both"]),
}


def local_of(word: str, here: Path) -> str:
    word = word.replace("hf://", "").replace("org/adapter", str(FIXTURES / "tiny-reward-adapter"))
    return word.replace(RUN, f"{here}/tiny-reward-run").replace(BASE, f"{here}/tiny-qwen2-base")


@pytest.mark.parametrize("name", VERBS)
def test_what_a_verb_makes_of_models_on_the_hub_is_what_it_makes_of_the_folders(
    hub: FakeHub, here: Path, name: str
) -> None:
    hub.add("org/adapter", tree(FIXTURES / "tiny-reward-adapter"))
    Path("alone").mkdir()
    for path in (FIXTURES / "tiny-reward-run" / "checkpoint-4").iterdir():
        if path.is_file():
            shutil.copy(path, "alone")
    verb, source, places, more = VERBS[name]
    words = [local_of(w, here) for w in (*source, "one", *places, *more)]
    assert run(*verb, *words).returncode == 0, run(*verb, *words).stderr
    ran = run(*verb, *source, "two", *places, *more)
    assert ran.returncode == 0, ran.stderr
    assert whole(Path("two")) == whole(Path("one"))
    if name == "both":
        assert whole(Path("two-adapter")) == whole(Path("one-adapter"))


@pytest.fixture
def converted(hub: FakeHub, here: Path) -> str:
    """A reward model on the Hub that was made of the run."""
    words = [f"{here}/tiny-reward-run/checkpoint-4", "--base", f"{here}/tiny-qwen2-base", "--to", "openrlhf"]
    assert run("convert", words[0], "rm", *words[1:], "--role", "reward").returncode == 0
    hub.add("org/rm", on_disk(Path("rm")))
    return "org/rm"


@pytest.mark.parametrize("against", [[], ["--against", CHECKPOINT + "/global_step4", "--base", BASE]])
def test_a_model_on_the_hub_is_verified_as_the_folder_is(hub: FakeHub, converted: str, against: list[str]) -> None:
    hub.sent_bytes = 0
    there = run("verify", converted, "--for", "openrlhf", "--role", "reward", *against)
    assert there.returncode == 0, there.stdout + there.stderr
    here = run("verify", "rm", "--for", "openrlhf", "--role", "reward", *against)
    lines, own = (
        [x for x in ran.stdout.splitlines()[1:-8] if x.split()[1] not in ("bytes", "numbers")] for ran in (there, here)
    )
    assert lines == own  # all but the receipt's checksums and the values, for which every byte would be fetched
    assert "their values were not read" in there.stdout
    assert "--reward.model_name_or_path org/rm" in there.stdout


def test_a_head_on_the_hub_that_is_not_finite_fails_though_other_values_are_not_fetched(
    hub: FakeHub, converted: str
) -> None:
    (file,) = (f for f in Path("rm").glob("*.safetensors") if "score.weight" in load_file(f))
    tensors = load_file(file)
    save_file(tensors | {"score.weight": tensors["score.weight"] * math.nan}, file, {"format": "pt"})
    hub.add("org/harmed", on_disk(Path("rm")))
    ran = run("verify", "org/harmed", "--for", "openrlhf", "--role", "reward", "--json")
    assert ran.returncode == 4
    failed = [check for check in json.loads(ran.stdout)["checks"] if check["outcome"] == "fails"]
    assert [check["code"] for check in failed] == ["nonfinite"]


def test_pairs_are_scored_by_a_model_on_the_hub(hub: FakeHub, converted: str) -> None:
    Path("pairs.jsonl").write_text(json.dumps({"prompt": "Hello", "chosen": "Good day.", "rejected": "Go."}) + "\n")
    probe = ("--for", "openrlhf", "--probe", "pairs.jsonl", "--json")
    there, here = (run("verify", name, *probe) for name in (converted, "rm"))
    assert there.returncode == here.returncode == 0, there.stdout + there.stderr
    assert json.loads(there.stdout)["pairs"] == json.loads(here.stdout)["pairs"] != []


def test_a_live_check_of_a_model_on_the_hub_says_how_to_bring_it_here(hub: FakeHub, converted: str) -> None:
    ran = run("verify", converted, "--for", "openrlhf", "--live", "--python", "python3")
    assert ran.returncode == 3
    commit = hub.repos[converted].branches["main"][-1].oid
    assert f"hf download org/rm --revision {commit} --local-dir ./rm" in " ".join(ran.stderr.split())


def test_a_model_that_can_not_be_asked_for_is_no_model_that_fails(hub: FakeHub) -> None:
    ran = run("verify", "org/modle", "--for", "openrlhf")
    assert ran.returncode == 3
    assert "hub-download" in ran.stderr


def test_doctor_takes_every_folder_from_the_hub(hub: FakeHub, converted: str, here: Path) -> None:
    there = run("doctor", CHECKPOINT, "--base", BASE, "--weights-from", RUN, "--with-actor", BASE, "--json")
    where = f"{here}/tiny-reward-run/checkpoint-4"
    base = f"{here}/tiny-qwen2-base"
    local = run(
        "doctor", where, "--base", base, "--weights-from", f"{here}/tiny-reward-run", "--with-actor", base, "--json"
    )
    assert there.returncode == local.returncode == 1, there.stderr
    one, two = json.loads(there.stdout), json.loads(local.stdout)
    assert [f["code"] for f in one["findings"]] == [f["code"] for f in two["findings"]]
    assert one["near"] == [{"path": f"hf://{RUN}/checkpoint-4/global_step4", "source": "deepspeed"}]


def test_the_command_that_doctor_prints_for_a_model_on_the_hub_runs(hub: FakeHub) -> None:
    shown = run("doctor", CHECKPOINT, "--base", BASE, "--for", "openrlhf").stdout
    command = next(x for x in shown.splitlines() if "rlhf-convert convert" in x).partition("rlhf-convert ")[2].split()
    command[2] = "out"
    ran = run(*command, *([] if "--base" in command else ["--base", BASE]))
    assert ran.returncode == 0, ran.stderr


def test_a_run_in_the_cache_in_part_is_read_from_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    """A trainer's `from_pretrained` leaves an adapter in the cache, and none of the shards below it."""
    hub.add("org/mixed", tree(FIXTURES / "tiny-reward-run" / "checkpoint-4"))
    commit = hub.repos["org/mixed"].branches["main"][-1].oid
    snapshot = tmp_path / "home" / "hub" / "models--org--mixed" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text(commit)
    for path in (FIXTURES / "tiny-reward-run" / "checkpoint-4").iterdir():
        if path.is_file():
            shutil.copy(path, snapshot)
    ran = run("gather", "org/mixed", "out")
    assert ran.returncode == 0, ran.stderr


def test_an_output_is_the_whole_of_a_repository(hub: FakeHub) -> None:
    ran = run("gather", RUN, "hf://me/rm/folder")
    assert ran.returncode == 2
    assert "hub-repo-id" in ran.stderr


def test_a_folder_that_the_repository_has_not_is_told_with_those_that_it_has(hub: FakeHub) -> None:
    ran = run("inspect", f"hf://{RUN}/checkpoint-5")
    assert ran.returncode == 3
    assert "checkpoint-4" in ran.stderr


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://a/b", ("a/b", None, "")),
        ("hf://a/b@v1", ("a/b", "v1", "")),
        ("a/b@v1", ("a/b", "v1", "")),
        ("hf://a/b/c/d", ("a/b", None, "c/d")),
        ("hf://a/b@v1/c/d/", ("a/b", "v1", "c/d")),
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3", "")),
        ("hf://a/b@refs/pr/3/c", ("a/b", "refs/pr/3", "c")),
        ("hf://a/b@x%2Fy/c", ("a/b", "x/y", "c")),
    ],
)
def test_a_name_on_the_hub_is_read_as_its_client_reads_it(text: str, parts: tuple[str, str | None, str]) -> None:
    named = hub_name(text)
    assert named == parts
    assert hub_name(as_reference(text)) == parts


@pytest.mark.parametrize(
    "text", ["hf://a/b/../c", "hf://a/b//c", "hf://a/b/./c", "hf://a/b@/c", "hf://a/b\0c/d", "hf://a/b/c\0"]
)
def test_a_folder_on_the_hub_never_leads_out_of_its_repository(text: str) -> None:
    with pytest.raises(UsageError):
        hub_name(text)


def test_a_folder_below_another_is_written_as_the_user_would() -> None:
    root = Path("/x/snapshots/c")
    assert below("a/b@v1", root, root / "d" / "e") == "hf://a/b@v1/d/e"
    assert below("hf://a/b/d", root / "d", root / "e") == "hf://a/b/e"
    assert below("./here", root, root / "d") == "./here/d"


def test_a_base_that_an_adapter_records_is_named_in_the_command_and_not_fetched_unasked(hub: FakeHub) -> None:
    files = tree(FIXTURES / "tiny-reward-adapter")
    config = json.loads(files["adapter_config.json"]) | {"base_model_name_or_path": BASE}
    hub.add("org/adapter", files | {"adapter_config.json": json.dumps(config).encode()})
    for words in (["inspect", "org/adapter"], ["merge-lora", "org/adapter", "out"]):
        ran = run(*words)
        out = "out" if words[0] == "merge-lora" else "./adapter-merged"
        assert f"rlhf-convert merge-lora org/adapter {out} --base {BASE}" in ran.stdout + ran.stderr
        assert not hub.requests(BASE)
    assert run("merge-lora", "org/adapter", "out", "--base", BASE).returncode == 0


REASONS = {
    "org/nothing": ([], "no such model", "private model"),
    f"{BASE}@nothing": ([], "no such revision", "%2F"),
    BASE: ([Fault("resolve", "gated", 99)], "gated", "accept its terms"),
}


@pytest.mark.parametrize("name", REASONS)
def test_why_a_model_can_not_be_had_is_told_with_what_to_do(hub: FakeHub, name: str) -> None:
    hub.faults, what, advice = REASONS[name]
    for words in (["inspect", name], ["doctor", name], ["verify", name, "--for", "trl"], ["reshard", name, "out"]):
        ran = run(*words)
        assert ran.returncode == 3, words
        assert what in ran.stderr
        assert advice in ran.stderr
        assert ran.stdout == ""


def test_a_base_and_an_adapter_on_the_hub_the_wrong_way_round_are_recognised(hub: FakeHub) -> None:
    hub.add("org/adapter", tree(FIXTURES / "tiny-reward-adapter"))
    ran = run("merge-lora", BASE, "out", "--base", "org/adapter")
    assert ran.returncode == 2
    assert f"rlhf-convert merge-lora org/adapter out --base {BASE}" in ran.stderr


def test_pickled_weights_on_the_hub_are_converted_as_the_folder_is(hub: FakeHub, here: Path) -> None:
    """A `.bin` of several records: its directory lies at its end."""
    import torch
    from safetensors.torch import load_file

    folder = here / "tiny-qwen2-base"
    tensors = {n: t for p in folder.glob("*.safetensors") for n, t in load_file(p).items()}
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    hub.add("org/pickled", tree(folder))
    for words in (["inspect"], ["doctor"]):
        assert run(*words, "org/pickled").returncode == run(*words, folder).returncode
    assert run("reshard", folder, "one").returncode == 0
    ran = run("reshard", "org/pickled", "two")
    assert ran.returncode == 0, ran.stderr
    assert whole(Path("two")) == whole(Path("one"))


def test_a_repository_with_thousands_of_other_files_is_listed_and_none_of_them_is_read(hub: FakeHub) -> None:
    files = tree(FIXTURES / "tiny-qwen2-base")
    hub.add("org/many", files | {f"logs/{n // 100}/{n}.txt": b"x" for n in range(1000)})
    hub.sent_bytes = 0
    ran = run("inspect", "org/many")
    assert ran.returncode == 0, ran.stderr
    assert not hub.requests("resolve/.*/logs/")
