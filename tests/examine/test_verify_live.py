"""`verify --live` runs a loader in another Python and believes only what that loader holds in memory."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from converter.cli import main
from converter.dialects.known import probe_of, probed
from converter.examine.verify.live import PROBES, scrubbed
from verify_folders import codes, copy, make_rm, rewrite, text_of, verify


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that transformers saved."""
    return make_rm(tmp_path_factory.mktemp("rm") / "rm")


def test_what_transformers_holds_is_what_the_folder_says(
    rm: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["--for", "transformers", "--role", "reward", "--live", "--python", sys.executable]
    code, found = verify(capsys, str(rm), *asked)
    texts = " ".join(c["text"] for c in found["checks"])
    assert (code, codes(found)) == (0, set())
    assert "head equal: score.weight" in texts
    assert "20 backbone tensors equal" in texts
    assert "12 rewards on right- and left-padded batches" in texts


@pytest.mark.slow
def test_a_head_that_transformers_starts_at_random_is_told_in_its_own_words(
    rm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = copy(rm, tmp_path / "wrong")
    rewrite(wrong, lambda t: t.update({"value_head.weight": t.pop("score.weight")}))
    asked = ["--for", "transformers", "--role", "reward", "--live", "--python", sys.executable]
    code, found = verify(capsys, str(wrong), *asked)
    assert (code, {"head-missing", "live-head"} <= codes(found)) == (4, True)
    assert "score.weight | MISSING" in text_of(found, "live-head")


@pytest.mark.slow
def test_a_shape_that_transformers_refuses_is_told_in_its_own_words(
    rm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = copy(rm, tmp_path / "wrong")
    rewrite(wrong, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:8].clone()}))
    asked = ["--for", "transformers", "--role", "reward", "--live", "--python", sys.executable]
    code, found = verify(capsys, str(wrong), *asked)
    assert (code, {"backbone-shape", "live-refused"} <= codes(found)) == (4, True)
    assert "model.norm.weight" in text_of(found, "live-refused")


def test_code_in_the_folder_does_not_run_unless_it_is_allowed(
    rm: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hostile = copy(rm, tmp_path / "hostile")
    ran = tmp_path / "ran"
    (hostile / "modeling.py").write_text(f"open({str(ran)!r}, 'w')\n")
    code = main(["verify", str(hostile), "--for", "transformers", "--live", "--python", sys.executable])
    assert (code, ran.exists()) == (3, False)
    assert "remote-code" in capsys.readouterr().err


def test_a_python_that_is_not_there_is_a_usage_error(
    rm: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["verify", str(rm), "--for", "transformers", "--live", "--python", "/no/such/python"]) == 2
    assert "python-missing" in capsys.readouterr().err


def test_a_trainer_gets_no_token_no_home_and_no_proxy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "HTTPS_PROXY", "PYTHONPATH", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    given = scrubbed(str(tmp_path))
    assert "secret" not in given.values()
    assert (given["HOME"], given["HF_HUB_OFFLINE"]) == (str(tmp_path), "1")


def test_a_probe_imports_nothing_of_this_package_and_every_trainer_that_is_named_has_one() -> None:
    scripts = sorted(PROBES.glob("*.py"))
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.partition(".")[0] == "converter"], script.name
    assert {s.name for s in scripts} == {"probe_common.py", *(probe_of(name) for name in probed())}
