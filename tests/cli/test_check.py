"""`check` in a pipeline: which checkpoints paths stand for, and findings as machines read them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from sarif_pydantic import Sarif

from converter.cli import main
from converter.shipped import shipped

ROOT = Path(__file__).resolve().parents[2]
BASE, RUN = (shipped("fixtures") / name for name in ("tiny-qwen2-base", "tiny-reward-run"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound model, a run with a broken checkpoint, and a folder that is neither."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(BASE, root / "models" / "sound & <whole>")
    shutil.copytree(RUN, root / "runs" / "rm")
    shutil.copytree(BASE, root / ".hidden" / "model")
    (root / "site").mkdir()
    (root / "site" / "config.json").write_text('{"theme": "dark"}')
    return root


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["check", *arguments])
    return code, capsys.readouterr().out


def folders(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    found = json.loads(check(capsys, *arguments, "--json")[1])
    return [each["path"] for each in found["folders"]]


@pytest.fixture(autouse=True)
def here(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)


def test_a_folder_stands_for_all_checkpoints_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, screen = check(capsys, ".")
    assert code == 1
    lines = screen.splitlines()
    assert lines[0] == "models/sound & <whole>: sound"
    assert lines[1].startswith("runs/rm/checkpoint-4: ERROR zero3-empty-tensors: 24 of 29 tensors are torch.Size([0])")
    assert lines[2:] == ["2 checkpoints examined, 1 with findings that count"]


def test_a_file_stands_for_its_folder_and_a_checkpoint_is_examined_once(capsys: pytest.CaptureFixture[str]) -> None:
    model = "models/sound & <whole>"
    assert folders(capsys, f"{model}/config.json", f"{model}/tokenizer.json", model) == [model]
    assert folders(capsys, "site/config.json") == []
    assert check(capsys, "site/config.json") == (0, "no checkpoint in site/config.json\n")


def test_what_counts_is_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(check(capsys, "runs", "--json", "--ignore", "zero3-empty-tensors")[1])["folders"][0]
    codes = {f["code"] for f in found["findings"]}
    assert codes
    assert "zero3-empty-tensors" not in codes
    assert check(capsys, "models", "--fail-on", "cosmetic")[0] == 0


@pytest.mark.parametrize(
    "words", [["nowhere"], ["models", "--for", "nobody"], ["models", "--ignore", "no-such-code"], []]
)
def test_a_question_that_makes_no_sense_is_a_usage_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert check(capsys, *words)[0] == 2


def test_sarif_is_what_its_schemas_own_models_take(capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    code, text = check(capsys, ".", "--format", "sarif")
    assert code == 1
    run = Sarif.model_validate_json(text).runs[0]
    rules = {rule.id: rule for rule in run.tool.driver.rules}
    worst = next(r for r in run.results if r.rule_id == "zero3-empty-tensors")
    assert worst.level.value == "error"
    assert "torch.Size([0])" in worst.message.text
    assert worst.message.text.endswith("\nNext: rlhf-convert repair runs/rm/checkpoint-4 runs/rm/checkpoint-4-fixed")
    assert "ZeRO-3" in rules["zero3-empty-tensors"].full_description.text
    file = worst.locations[0].physical_location.artifact_location.uri
    assert (repository / file).is_file()


def test_a_path_in_sarif_is_an_address(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "a b#c")
    (tmp_path / "a b#c" / "model.safetensors").write_bytes(b"")
    os.chdir(tmp_path)
    result = json.loads(check(capsys, ".", "--format", "sarif")[1])["runs"][0]["results"][0]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a%20b%23c/config.json"


def test_junit_has_a_case_for_each_finding_and_one_for_what_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = check(capsys, ".", "--format", "junit", "--fail-on", "error")
    assert code == 1
    suites = {s.get("name"): s for s in ElementTree.fromstring(text)}
    sound = suites["models/sound & <whole>"]
    assert (sound.get("tests"), sound.get("failures"), sound[0].get("name"), len(sound[0])) == ("1", "0", "doctor", 0)
    broken = suites["runs/rm/checkpoint-4"]
    assert broken.get("failures") == "1"
    failure = broken[0].find("failure")
    assert failure is not None
    assert (broken[0].get("name"), failure.get("type")) == ("zero3-empty-tensors", "error")
    assert "torch.Size([0])" in str(failure.text)


def test_a_document_goes_to_a_file_and_the_verdict_to_the_screen(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "found.json"
    assert main(["check", "models", "--format", "json", "--output", str(file)]) == 0
    assert json.loads(file.read_text())["failed"] == 0
    assert "1 checkpoint examined, 0 with findings that count" in capsys.readouterr().err


def test_the_hook_takes_the_files_that_checkpoints_have(repository: Path) -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text())
    changed = ["models/m/config.json", "a/adapter_config.json", "m/model.safetensors.index.json", "m/x.safetensors"]
    others = ["package.json", "site/theme.json", "src/bin/tool.py", "myconfig.json"]
    for hook in hooks:
        assert {"id", "name", "entry", "language", "files"} <= set(hook)
        pattern = re.compile(hook["files"])
        assert [bool(pattern.search(f)) for f in (*changed, *others)] == [True] * 4 + [False] * 4
        words = hook["entry"].split()
        line = [sys.executable, "-m", "converter", *words[1:], "runs/rm/checkpoint-4/adapter_config.json"]
        done = subprocess.run(line, cwd=repository, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "zero3-empty-tensors" in done.stdout


def test_the_hooks_are_a_manifest_to_pre_commit_and_the_action_one_to_its_schema() -> None:
    """Judged by pre-commit itself, and by the schema of GitHub's actions that check-jsonschema ships."""
    hooks = [sys.executable, "-m", "pre_commit", "validate-manifest", str(ROOT / ".pre-commit-hooks.yaml")]
    schema = ["--builtin-schema", "vendor.github-actions"]
    action = [sys.executable, "-m", "check_jsonschema", *schema, str(ROOT / "action.yml")]
    for line in (hooks, action):
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_pre_commit_runs_the_hook_on_what_a_commit_changes(tmp_path: Path) -> None:
    """`pre-commit try-repo`, as a hook is tried: a broken checkpoint stops the commit, a sound one passes."""
    here, hooks = tmp_path / "here", tmp_path / "hooks"
    for root in (here, hooks):
        root.mkdir()
        subprocess.run(["git", "init", "-q", str(root)], check=True)
    shutil.copy(ROOT / ".pre-commit-hooks.yaml", hooks)
    named = ["-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run(["git", "-C", str(hooks), "add", "."], check=True)
    subprocess.run(["git", "-C", str(hooks), *named, "commit", "-qm", "hooks"], check=True)
    shutil.copytree(BASE, here / "sound")
    shutil.copytree(RUN / "checkpoint-4", here / "broken", ignore=shutil.ignore_patterns("global_step4"))
    (tmp_path / "rlhf-convert").write_text(f'#!/bin/sh\nexec {sys.executable} -m converter "$@"\n')
    (tmp_path / "rlhf-convert").chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PRE_COMMIT_HOME": str(tmp_path / "kept")}
    line = [sys.executable, "-m", "pre_commit", "try-repo", str(hooks), "rlhf-convert-check-system", "--verbose"]
    said = {}
    for name in ("sound", "broken"):
        subprocess.run(["git", "-C", str(here), "add", name], check=True)
        done = subprocess.run(
            [*line, "--files", *(str(p.relative_to(here)) for p in (here / name).rglob("*") if p.is_file())],
            cwd=here,
            env=os.environ | path,
            capture_output=True,
            text=True,
            check=False,
        )
        said[name] = (done.returncode, done.stdout)
    assert said["sound"][0] == 0, said["sound"]
    assert "sound: sound" in said["sound"][1]
    assert said["broken"][0] == 1, said["broken"]
    assert "zero3-empty-tensors" in said["broken"][1]


def test_the_action_runs_what_it_says(repository: Path, tmp_path: Path) -> None:
    """Its second step, with the program that is installed here in place of the one that its first step installs."""
    action: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text())
    step = action["runs"]["steps"][1]
    home = tmp_path / "rlhf-convert" / "bin"
    home.mkdir(parents=True)
    (home / "rlhf-convert").write_text(f'#!/bin/sh\nexec {sys.executable} -m converter "$@"\n')
    (home / "rlhf-convert").chmod(0o755)
    given = {name: str(field["default"]) for name, field in action["inputs"].items()}
    given |= {"paths": "models runs", "sarif": "found.sarif"}
    named = re.compile(r"\$\{\{ inputs\.([\w-]+) \}\}")
    values = {key: given[match[1]] for key, value in step["env"].items() if (match := named.fullmatch(value))}
    assert values.keys() == step["env"].keys()
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        cwd=repository,
        env=os.environ | values | {"RUNNER_TEMP": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "zero3-empty-tensors" in done.stdout
    results = json.loads((repository / "found.sarif").read_text())["runs"][0]["results"]
    assert any(r["ruleId"] == "zero3-empty-tensors" for r in results)
