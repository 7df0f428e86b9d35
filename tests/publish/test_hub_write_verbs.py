"""Every verb that writes, to `hf://owner/name`: one commit, equal to what it writes to a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.dialects.known import trainers
from converter.shipped import shipped
from fake_hub import FakeHub, running
from hub_here import client_of, commits, published, run

FIXTURES = shipped("fixtures")
REPO = "me/out"
BASE = ["--base", "{here}/tiny-qwen2-base"]
VERBS = {
    "merge-lora": ["merge-lora", "{here}/tiny-reward-adapter", "OUT", *BASE],
    "gather": ["gather", "{here}/tiny-reward-run", "OUT"],
    "gather merged": ["gather", "{here}/tiny-reward-run", "OUT", *BASE, "--emit", "merged"],
    "repair": ["repair", "{here}/tiny-reward-run/checkpoint-4", "OUT", *BASE],
    "fix": ["repair", "{here}/wrapped", "OUT"],
    "reshard": ["reshard", "{here}/tiny-qwen2-base", "OUT", "--max-shard-size", "60KB"],
    "reshard fp32": ["reshard", "{here}/tiny-qwen2-base", "OUT", "--dtype", "fp32"],
    "run": ["run", "{here}/recipe.yaml", "OUT"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    with running(FakeHub()) as server, client_of(server, tmp_path / "home"):
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    for name in ("tiny-reward-run", "tiny-qwen2-base", "tiny-reward-adapter"):
        shutil.copytree(FIXTURES / name, here / name)
    shutil.copytree(here / "tiny-qwen2-base", here / "wrapped")
    config = json.loads((here / "wrapped" / "config.json").read_text())
    config["architectures"] = ["FSDPQwen2ForCausalLM"]
    (here / "wrapped" / "config.json").write_text(json.dumps(config))
    recipe = f"version: 1\ninputs:\n  source: {here}/tiny-qwen2-base\nsteps:\n  - cast: {{dtype: float16}}\n"
    (here / "recipe.yaml").write_text(recipe)
    return here


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def expect_equal(hub: FakeHub, tmp_path: Path, words: list[str]) -> None:
    local = run(*(w.replace("OUT", str(tmp_path / "local")) for w in words))
    ran = run(*(w.replace("OUT", f"hf://{REPO}") for w in words))
    assert ran.returncode == local.returncode, ran.stderr
    if local.returncode:
        assert REPO not in hub.repos or commits(hub, REPO) == 0
        return
    files = published(hub, REPO)
    assert files.pop("README.md").startswith(b"---\n")
    wanted = tree(tmp_path / "local")
    receipts = [json.loads(each.pop("rlhf-convert.json")) for each in (files, wanted)]
    assert files == wanted
    assert receipts[0] == receipts[1]
    assert commits(hub, REPO) == 1
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", VERBS)
def test_what_a_verb_writes_to_the_hub_is_what_it_writes_to_a_folder(
    hub: FakeHub, here: Path, tmp_path: Path, name: str
) -> None:
    expect_equal(hub, tmp_path, [w.replace("{here}", str(here)) for w in VERBS[name]])


SOME = ("llamafactory", "colossalchat")


@pytest.mark.parametrize("role", ["reward", "critic"])
@pytest.mark.parametrize("trainer", [t if t in SOME else pytest.param(t, marks=pytest.mark.slow) for t in trainers()])
def test_what_is_made_for_a_trainer_is_the_same_on_the_hub(
    hub: FakeHub, here: Path, tmp_path: Path, trainer: str, role: str
) -> None:
    words = ["convert", f"{here}/tiny-reward-adapter", "OUT", "--base", f"{here}/tiny-qwen2-base"]
    expect_equal(hub, tmp_path, [*words, "--to", trainer, "--role", role])


@pytest.mark.slow
@pytest.mark.parametrize("trainer", trainers())
def test_what_was_made_for_a_trainer_is_read_back_from_the_hub(
    hub: FakeHub, here: Path, tmp_path: Path, trainer: str
) -> None:
    words = ["convert", f"{here}/tiny-reward-adapter", "OUT", "--base", f"{here}/tiny-qwen2-base"]
    made = run(*(w.replace("OUT", "made") for w in words), "--to", trainer, "--role", "critic")
    if made.returncode:
        return
    hub.add("org/made", tree(Path("made")))
    for verb, more in (("critic-to-rm", ["--to", "trl", "--from", trainer]), ("verify", ["--for", trainer])):
        out = [[], []] if verb == "verify" else [["one"], ["two"]]
        here_ran, there_ran = run(verb, "made", *out[0], *more), run(verb, "org/made", *out[1], *more)
        assert there_ran.returncode == here_ran.returncode, there_ran.stdout + there_ran.stderr
    if Path("one").exists():
        one, two = tree(Path("one")), tree(Path("two"))
        assert one.pop("rlhf-convert.json") != two.pop("rlhf-convert.json")
        assert one == two


def test_what_to_type_after_a_conversion_to_the_hub_is_the_check_and_the_launch_line(hub: FakeHub, here: Path) -> None:
    words = ["convert", f"{here}/tiny-reward-adapter", f"hf://{REPO}", "--base", f"{here}/tiny-qwen2-base"]
    ran = run(*words, "--to", "openrlhf", "--role", "reward", "--json")
    check, launch, *_ = json.loads(ran.stdout)["next"]
    assert launch == f"python -m openrlhf.cli.train_ppo_ray --reward.model_name_or_path {REPO}"
    checked = run(*check.split()[1:])
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("name", ["merge-lora", "gather"])
def test_push_to_hub_after_a_verb_publishes_its_folder(hub: FakeHub, here: Path, tmp_path: Path, name: str) -> None:
    words = [w.replace("{here}", str(here)).replace("OUT", "made") for w in VERBS[name]]
    ran = run(*words, "--push-to-hub", REPO)
    assert ran.returncode == 0, ran.stderr
    files = published(hub, REPO)
    files.pop("README.md")
    assert files == tree(Path("made"))
    assert commits(hub, REPO) == 1
