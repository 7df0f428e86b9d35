"""`inspect`: what a folder holds, whole or broken, from headers alone and at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from big_headers import llama_70b
from converter.shipped import shipped
from oracle.command import listing, run

FIXTURES = shipped("fixtures")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("tiny-qwen2-base", "tiny-reward-adapter"):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_on_one_screen(here: Path) -> None:
    ran = run("inspect", "./tiny-qwen2-base")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "./tiny-qwen2-base: model, Qwen2ForCausalLM (qwen2)",
        "weights  130 K parameters in 27 tensors, bf16, 262 KB in 2 files",
        "shape    layers 2, hidden 64, vocabulary 384",
        "head     lm_head.weight (384, 64) bf16",
        "layers   model.layers.{0..1}: 12 tensors each",
        "files    chat_template.jinja, generation_config.json, tokenizer.json, tokenizer_config.json",
        "saved by transformers 5.23.0",
        "faults   none found in headers and configs",
        "Next:    rlhf-convert reshard ./tiny-qwen2-base ./tiny-qwen2-base-resharded --max-shard-size 5GB",
    ]


def test_an_adapter_on_one_screen(here: Path) -> None:
    ran = run("inspect", "./tiny-reward-adapter")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        "./tiny-reward-adapter: adapter, LoRA r=8 alpha=16 SEQ_CLS",
        "base     tiny-qwen2-base, here",
        "weights  17.2 K parameters in 29 tensors, fp32 and bf16, 72.3 KB in 1 file",
        "targets  14 modules: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        "whole    1 tensor: base_model.model.score.weight",
        "layers   base_model.model.model.layers.{0..1}: 14 tensors each",
        "files    chat_template.jinja, tokenizer.json, tokenizer_config.json",
        "saved by peft 0.21.2",
        "faults   none found in headers and configs",
        "Next:    rlhf-convert merge-lora ./tiny-reward-adapter ./tiny-reward-adapter-merged",
    ]


def test_an_adapter_without_its_base_at_hand_asks_for_it(here: Path) -> None:
    shutil.rmtree(here / "tiny-qwen2-base")
    ran = run("./tiny-reward-adapter")
    assert ran.code == 0
    assert "base tiny-qwen2-base, neither here nor in the Hub's cache" in ran.text
    assert ran.out.splitlines()[-1].endswith("rlhf-convert doctor ./tiny-reward-adapter")


def test_a_merged_reward_model_shows_its_head_and_label(here: Path) -> None:
    assert run("merge-lora", "tiny-reward-adapter", "rm").code == 0
    out = run("rm").out.splitlines()
    assert out[0] == "rm: model, Qwen2ForSequenceClassification (qwen2), 1 label"
    assert "head     score.weight (1, 64) bf16" in out


def test_a_head_is_shown_with_its_dialect_and_its_normalisation(here: Path) -> None:
    assert run("merge-lora", "tiny-reward-adapter", "rm").code == 0
    config = json.loads((here / "rm" / "config.json").read_text()) | {"mean": 0.5, "std": 2.0}
    (here / "rm" / "config.json").write_text(json.dumps(config))
    out = run("inspect", "rm").out.splitlines()
    assert "         read as hf-seqcls: score.weight [1, 64], architectures Qwen2ForSequenceClassification" in out
    assert "         rewards are normalised: mean 0.5, std 2" in out


def test_what_a_folder_records_of_its_makers_is_shown(here: Path) -> None:
    folder = here / "tiny-reward-adapter"
    (folder / "README.md").write_text("---\ntags:\n- trl\n- reward-trainer\n---\n# A model\n- unsloth\n")
    (folder / "trainer_state.json").write_text("{}")
    out = run("inspect", "tiny-reward-adapter").out.splitlines()
    made = "transformers' Trainer (trainer_state.json), trl (tag of its README.md), peft 0.21.2"
    assert f"saved by {made}" in out


def test_what_is_missing_beside_the_weights_is_said(here: Path) -> None:
    for file in (here / "tiny-qwen2-base").glob("tokenizer*"):
        file.unlink()
    (here / "tiny-qwen2-base" / "generation_config.json").unlink()
    out = run("inspect", "tiny-qwen2-base").out.splitlines()
    assert "files    chat_template.jinja; no tokenizer, no generation_config.json" in out


def test_findings_fit_80_columns(here: Path) -> None:
    shutil.copytree(FIXTURES / "tiny-reward-run", here / "run")
    out = run("inspect", "run/checkpoint-4").out.splitlines()
    begin = next(n for n, text in enumerate(out) if text.startswith("ERROR"))
    end = next(n for n, text in enumerate(out) if text.startswith("Next"))
    assert "24 of 29 tensors are torch.Size([0])" in out[begin]
    assert all(len(text) < 80 for text in out[begin : end - 1])


def test_json_says_the_same(here: Path) -> None:
    found = json.loads(run("inspect", "tiny-qwen2-base", "--json").out)
    assert found == {
        "version": 1,
        "path": "tiny-qwen2-base",
        "revision": None,
        "detected": "model",
        "source": "hf",
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "peft_type": None,
        "base": None,
        "parameters": 129_600,
        "tensors": 27,
        "dtypes": ["BF16"],
        "files": {"model-00001-of-00002.safetensors": 148152, "model-00002-of-00002.safetensors": 113840},
        "heads": {"lm_head.weight": [384, 64]},
        "saved_by": ["transformers 5.23.0"],
        "side_files": ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
        "not_compared": None,
        "findings": [],
    }


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda root: (root / "model-00002-of-00002.safetensors").unlink(), "shard-missing"),
        (lambda root: cut(root / "model-00001-of-00002.safetensors"), "model-00001-of-00002.safetensors"),
        (lambda root: (root / "config.json").write_text("{"), "config.json"),
        (lambda root: (root / "config.json").write_text('{"a": 1, "a": 2}'), "appears twice"),
        (lambda root: (root / "config.json").unlink(), "config-missing"),
    ],
)
def test_a_broken_model_is_described_and_exits_1(here: Path, harm, words: str) -> None:
    harm(here / "tiny-qwen2-base")
    before = listing(here)
    ran = run("inspect", "tiny-qwen2-base")
    assert ran.code == 1
    assert "ERROR" in ran.out
    assert words in ran.out
    assert "Next:" not in ran.out
    assert listing(here) == before
    assert [
        f for f in json.loads(run("inspect", "tiny-qwen2-base", "--json").out)["findings"] if f["severity"] == "error"
    ]


def test_a_path_that_does_not_exist_is_told_with_what_is_there(here: Path) -> None:
    ran = run("./tiny-qwen-base")
    assert (ran.code, ran.out) == (3, "")
    assert "tiny-qwen2-base" in ran.err


def test_a_folder_that_is_neither_is_told_with_what_it_holds(here: Path) -> None:
    (here / "notes").mkdir()
    (here / "notes" / "todo.txt").write_text("")
    ran = run("inspect", "notes")
    assert ran.code == 2
    assert "todo.txt" in ran.err


def test_a_folder_above_names_what_lies_in_it(here: Path) -> None:
    ran = run("inspect", ".")
    assert ran.code == 0
    assert "./tiny-qwen2-base (hf)" in ran.out
    assert "./tiny-reward-adapter (peft)" in ran.out


def test_a_hub_id_that_is_not_cached_is_not_asked_for_where_downloads_are_off(here: Path) -> None:
    ran = run("inspect", "acme/none")
    assert ran.code == 3
    assert "neither a folder here nor in the Hub's cache, and downloads are off" in ran.text
    assert "hf download acme/none" in ran.err


def test_inspecting_the_headers_of_a_70b_model_imports_none_of_the_slow_libraries(tmp_path: Path) -> None:
    """How long it takes is for `benchmarks/startup.py` to say."""
    model = llama_70b(tmp_path / "model")
    program = (
        "import sys; from converter.cli import main; code = main(sys.argv[1:]); "
        "slow = {'torch', 'transformers', 'peft', 'numpy', 'safetensors', 'pydantic', 'huggingface_hub', 'yaml'}; "
        "found = sorted(slow & set(sys.modules)); print(*found, end='', file=sys.stderr); sys.exit(code or len(found))"
    )
    command = [sys.executable, "-c", program, "inspect", str(model)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
