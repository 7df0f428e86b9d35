"""What doctor prints: width, data, the catalogue; and how little it opens and imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from big_headers import llama_70b
from converter.cli import main
from converter.examine.diagnoses.case import SEVERITIES
from converter.examine.diagnoses.catalogue import FROM_USAGE, ROWS, covered, table
from converter.examine.doctor import DoctorRequest, diagnoses, examine
from converter.shipped import shipped
from doctored import RUN, codes, edit, finding, serious, store

LETTERS = {"A": 18, "B": 16, "C": 19, "D": 16, "E": 8, "F": 5}


def test_the_catalogue_has_every_row_and_every_code_in_it_is_a_diagnosis() -> None:
    assert list(ROWS) == [f"{letter}{n}" for letter, count in LETTERS.items() for n in range(1, count + 1)]
    known = diagnoses()
    assert {c for row in ROWS.values() for c in row.codes} - set(known) == FROM_USAGE
    assert len(covered()) == 74
    assert all(bool(row.codes) != bool(row.unseen) for row in ROWS.values())
    assert len(table()) == 2 + 82


def test_every_diagnosis_of_ours_explains_itself_with_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    for code, each in diagnoses().items():
        assert len(each.doc) > 30, code
    assert main(["explain", "head-named-otherwise"]) == 0
    assert "RANDOM" in capsys.readouterr().out


def test_json_has_the_documented_form(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(causal, vocab_size=31)
    assert main(["doctor", str(causal), "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert list(value) == ["version", "path", "detected", "source", "why", "for", "near", "not_compared", "findings"]
    assert (value["version"], value["path"], value["detected"]) == (1, str(causal), "model")
    forms: dict[str, Any] = {
        "code": str, "severity": str, "message": str, "tensors": list, "evidence": list, "recoverability": str,
        "fix": list, "applicability": str, "next": (str, type(None)),
    }  # fmt: skip
    for each in value["findings"]:
        assert {k: isinstance(v, forms[k]) for k, v in each.items()} == dict.fromkeys(forms, True)
        assert each["severity"] in SEVERITIES
        assert each["applicability"] in ("safe", "unsafe", "display-only")
        assert len(each["evidence"]) <= 3
    assert [f["code"] for f in value["findings"]] == ["vocabulary-rows"]


def test_errors_are_data_as_well(causal: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(causal), "--for", "nobody", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown-trainer"


def test_lines_fit_into_80_columns_but_for_names_and_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(RUN / "reward" / "checkpoint-2", tmp_path / "rm")
    store(tmp_path / "rm", lambda t: {**t, "value_head.weight": torch.ones(1, 8), "score.bias": torch.ones(1)})
    edit(tmp_path / "rm", vocab_size=7)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "./rm", "--for", "trl-valuehead"]) == 1
    lines = capsys.readouterr().out.splitlines()
    long = [line for line in lines if len(line) > 80 and "rlhf-convert " not in line]
    assert long == []
    assert sum(line.startswith("ERROR") for line in lines) == 2


def test_ignored_codes_are_left_out_and_fail_on_decides_the_exit(causal: Path) -> None:
    edit(causal, vocab_size=31)
    assert main(["doctor", str(causal), "--ignore", "vocabulary-rows"]) == 0
    edit(causal, vocab_size=32, drop=("architectures",))
    assert main(["doctor", str(causal)]) == 0
    assert main(["doctor", str(causal), "--fail-on", "cosmetic"]) == 1


SPY = """
import sys
opened = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        name = args[0] if isinstance(args[0], str) else args[0].decode()
        if name.startswith({root!r}):
            opened.append(name)
sys.addaudithook(hook)
from converter.cli import main
code = main(["doctor", {root!r}])
banned = {{"torch", "numpy", "transformers", "peft", "safetensors"}} & set(sys.modules)
print("SPY", code, sorted(banned), len(opened), len(set(opened)))
"""


def test_a_folder_of_70_billion_parameters_takes_its_headers_and_no_torch(tmp_path: Path) -> None:
    root = str(llama_70b(tmp_path / "big"))
    run = subprocess.run([sys.executable, "-c", SPY.format(root=root)], capture_output=True, text=True, check=True)
    code, rest = run.stdout.split("SPY ")[1].split(" ", 1)
    banned, opened, distinct = rest.rsplit(maxsplit=2)
    assert (code, banned) == ("0", "[]")
    # 30 shards, their index and the config; the first shard once more for its metadata.
    assert int(distinct) <= 36
    assert int(opened) <= 44


def test_experts_in_both_forms_are_an_error(causal: Path) -> None:
    many = {f"model.layers.0.mlp.experts.{n}.gate_proj.weight": torch.ones(2, 2) for n in range(2)}
    store(causal, lambda t: {**t, **many})
    assert serious(codes(causal)) == {"tensors-unexpected"}
    store(causal, lambda t: {**t, "model.layers.0.mlp.experts.gate_up_proj": torch.ones(2, 2, 2)})
    assert serious(codes(causal)) == {"experts-twice", "tensors-unexpected"}


def test_a_header_without_a_format_is_mentioned(causal: Path) -> None:
    file = causal / "model.safetensors"
    save_file(load_file(file), file)
    assert codes(causal) == {"format-missing": "cosmetic"}
    assert str(finding(causal, "format-missing").next) == f"rlhf-convert reshard {causal} {causal}-fixed"


def test_a_rope_scaling_that_the_base_has_and_the_model_lost_changes_numbers(causal: Path, tmp_path: Path) -> None:
    base = shutil.copytree(causal, tmp_path / "base")
    assert codes(causal, base=str(base)) == {}
    for key in ("rope_scaling", "rope_parameters"):
        scaled = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "rope_theta": 10000.0}
        edit(base, drop=("rope_scaling", "rope_parameters"))
        edit(base, **{key: scaled})
        assert codes(causal, base=str(base)) == {"rope-lost": "changes-numbers"}
        unread = {"rope-of-transformers-5": "cosmetic"} if key == "rope_parameters" else {}
        assert codes(base, base=str(base)) == unread


def test_the_story_of_an_empty_reward_adapter_ends_in_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """doctor, the command that it prints, and transformers on the result."""
    import shlex

    from transformers import AutoModelForSequenceClassification

    shutil.copytree(RUN / "reward" / "checkpoint-2", tmp_path / "rm")
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", "./rm", "--for", "trl"]) == 1
    printed = capsys.readouterr().out
    (command,) = [line.removeprefix("Next:").strip() for line in printed.splitlines() if "rlhf-convert " in line]
    assert command == "rlhf-convert convert ./rm ./rm-converted --to trl --role reward"
    assert main(shlex.split(command)[1:]) == 0
    _, found = AutoModelForSequenceClassification.from_pretrained("./rm-converted", output_loading_info=True)
    assert not any(found.values())
    assert serious({f.code: f.severity for f in examine(DoctorRequest("./rm-converted", target="trl")).findings}) <= {
        "loader-changes",
        "pad-token-missing",
    }


def test_an_adapter_without_its_base_at_hand_is_not_called_sound_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(shipped("fixtures") / "tiny-reward-adapter", tmp_path / "adapter")
    assert main(["doctor", str(adapter)]) == 0
    assert capsys.readouterr().out.endswith("; not compared with a base, exit 0\n")
    assert main(["doctor", str(adapter), "--base", str(shipped("fixtures") / "tiny-qwen2-base")]) == 0
    assert "not compared" not in capsys.readouterr().out
