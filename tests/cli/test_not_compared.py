"""An all-clear is a claim: where names and shapes were compared with nothing, every verb that looks says so."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

import converter
from converter.cli import main
from converter.integrations import examine_after_save
from converter.shipped import shipped
from doctored import edit
from places import RUNS

BASE, ADAPTER = (shipped("fixtures") / name for name in ("tiny-qwen2-base", "tiny-reward-adapter"))


def no_base(folder: Path) -> None:
    shutil.copytree(ADAPTER, folder)
    edit(folder, "adapter_config.json", base_model_name_or_path="somebody/not-on-this-machine")


def base_that_is_cut(folder: Path) -> None:
    no_base(folder)
    base = shutil.copytree(BASE, folder.parent / ".base-that-is-cut")
    (base / "model.safetensors").write_bytes(b"")
    edit(folder, "adapter_config.json", base_model_name_or_path=str(base))


def prompts(folder: Path) -> None:
    no_base(folder)
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8, "token_dim": 32, "task_type": "CAUSAL_LM"}
    edit(folder, "adapter_config.json", base_model_name_or_path=str(BASE), **config)
    save_file({"prompt_embeddings": torch.ones(8, 32)}, folder / "adapter_model.safetensors", {"format": "pt"})


def newer_family(folder: Path) -> None:
    shutil.copytree(BASE, folder)
    edit(folder, architectures=["Qwen9ForCausalLM"], model_type="qwen9")


def without_class(folder: Path) -> None:
    shutil.copytree(BASE, folder)
    edit(folder, drop=("architectures",))


NOT_COMPARED: dict[Callable[[Path], None], str] = {
    no_base: "not compared with a base",
    base_that_is_cut: "not compared with a base: ",
    prompts: "not compared with a base: peft-type-unmergeable",
    newer_family: "names and shapes not checked: family unknown (",
    without_class: "what is not in the backbone is not checked: config.json names no class of transformers",
}


@pytest.fixture(scope="module", params=NOT_COMPARED, ids=lambda f: f.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param.__name__) / "it"
    request.param(folder)
    return folder, NOT_COMPARED[request.param]


def data(capsys: pytest.CaptureFixture[str], *command: str) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    value: dict[str, Any] = json.loads(capsys.readouterr().out)
    return value


def test_screens_end_with_why_nothing_was_compared(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = made
    for command in (["doctor"], ["repair", "--dry-run"], ["check"]):
        assert main([*command, str(folder)]) == 0
        screen = capsys.readouterr().out
        assert words in screen, command
        assert ": sound" not in screen
    assert "1 checkpoint examined, 0 with findings that count, 1 not compared with what a load asks for" in screen


def test_data_and_results_have_the_same_reason(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = made
    why = converter.doctor(folder).not_compared
    assert why.startswith(words)
    assert data(capsys, "doctor", str(folder))["not_compared"] == why
    assert data(capsys, "inspect", str(folder))["not_compared"] == why
    (checked,) = data(capsys, "check", str(folder))["folders"]
    assert (checked["verdict"], checked["not_compared"]) == ("not compared", why)
    looking = ["--once", "--settle", "0.1", "--interval", "0.05", "--state", str(folder.parent / "seen")]
    watched = data(capsys, "watch", str(folder.parent), *looking)
    assert (watched["verdict"], watched["not_compared"]) == ("not compared", why)
    repaired = data(capsys, "repair", str(folder), "--dry-run")
    assert (repaired["healthy"], repaired["not_compared"]) == (False, why)


def test_machines_that_show_findings_show_it(made: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, words = made
    assert main(["check", str(folder), "--format", "junit"]) == 0
    suite = ElementTree.fromstring(capsys.readouterr().out)[0]
    skipped = suite.find("testcase/skipped")
    assert skipped is not None
    assert str(skipped.get("message")).startswith(words)
    assert (suite.get("tests"), suite.get("skipped"), suite.get("failures")) == ("1", "1", "0")
    assert main(["check", str(folder), "--format", "sarif"]) == 0
    results = json.loads(capsys.readouterr().out)["runs"][0]["results"]
    (result,) = [r for r in results if r["ruleId"] == "not-compared"]
    assert result["level"] == "note"
    assert result["message"]["text"].startswith(words)


def test_a_run_that_saved_an_adapter_without_its_base_is_warned(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    no_base(tmp_path / "it")
    running = examine_after_save(tmp_path / "it", strict=True, rank=0)
    assert running is not None
    assert running.not_compared == "not compared with a base"
    assert [(r.levelname, r.getMessage()) for r in logged] == [
        ("WARNING", f"{tmp_path / 'it'}: no finding; not compared with a base")
    ]


def test_shards_are_sound_where_what_gather_makes_of_them_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose class wraps the model: without its config nothing says which names a load asks for."""
    run = shutil.copytree(RUNS / "zero" / "wrapped_runs" / "dschat-z3-n2", tmp_path / "run")
    (checked,) = data(capsys, "check", str(run))["folders"]
    assert (checked["verdict"], checked["not_compared"]) == ("sound", None)
    for config in run.rglob("config.json"):
        config.unlink()
    (checked,) = data(capsys, "check", str(run))["folders"]
    assert (checked["verdict"], checked["failed"]) == ("not compared", None)
    assert checked["not_compared"].startswith("names and shapes not compared with a model: there is no config.json")


def test_a_model_of_a_known_family_is_compared_and_so_is_an_adapter_over_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    edit(adapter, "adapter_config.json", base_model_name_or_path=str(BASE))
    checked = data(capsys, "check", str(BASE), str(adapter))["folders"]
    assert [(each["verdict"], each["not_compared"]) for each in checked] == [("sound", None)] * 2
    assert data(capsys, "repair", str(BASE), "--dry-run")["healthy"] is True
