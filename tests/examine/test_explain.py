"""`explain` against messages that the libraries themselves print, a log as it is written, and hostile lines."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaModel
from transformers.utils import logging as transformers_logging

from converter.cli import main
from converter.examine.explanations.log import MESSAGES, match, read

TINY = LlamaConfig(
    hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, num_labels=1
)


def named(text: str) -> list[str]:
    return [seen.message.code for seen, new in read([text.encode()]) if new]


def printed_by_transformers(load: object) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = transformers_logging.get_logger("transformers")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        load()  # type: ignore[operator]
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(level)
    return stream.getvalue()


def test_what_transformers_prints_of_a_missing_head_means_a_random_head(tmp_path: Path) -> None:
    LlamaModel(TINY).save_pretrained(tmp_path)
    text = printed_by_transformers(lambda: LlamaForSequenceClassification.from_pretrained(tmp_path))
    assert "score.weight" in text
    assert "head-missing-report" in named(text)


def test_what_transformers_prints_of_a_sound_model_is_not_explained(tmp_path: Path) -> None:
    LlamaForSequenceClassification(TINY).save_pretrained(tmp_path)
    text = printed_by_transformers(lambda: LlamaForSequenceClassification.from_pretrained(tmp_path))
    assert named(text) == []


def error_of_torch(saved: torch.Tensor, into: nn.Module) -> str:
    with pytest.raises(RuntimeError) as raised:
        into.load_state_dict({"weight": saved})
    return str(raised.value)


def test_an_empty_tensor_in_the_file_and_an_empty_model_are_told_apart() -> None:
    layer, empty = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    empty.weight = nn.Parameter(torch.empty(0))
    assert named(error_of_torch(torch.empty(0), layer))[1:] == ["size-mismatch-empty-file"]
    assert named(error_of_torch(torch.ones(3, 4), empty))[1:] == ["size-mismatch-empty-model"]
    assert named(error_of_torch(torch.ones(2, 4), layer))[1:] == ["size-mismatch"]


OLD_TEXTS = {
    "head-newly-initialised": "Some weights of CriticModel were not initialized from the model checkpoint at ./rm "
    "and are "
    "newly initialized: ['score.weight']",
    "weights-newly-initialised": "Some weights of LlamaForCausalLM were not initialized from the model checkpoint "
    "at x and "
    "are newly initialized: ['model.layers.0.mlp.up_proj.weight']",
    "weights-not-used": "Some weights of the model checkpoint at x were not used when initializing "
    "LlamaForSequenceClassification: ['lm_head.weight']",
    "labels-mismatch": "size mismatch for base_model.model.score.lora_B.default.weight: copying a param with shape "
    "torch.Size([1, 8]) from checkpoint, the shape in current model is torch.Size([2, 8]).",
    "vocabulary-mismatch": "size mismatch for model.embed_tokens.weight: copying a param with shape torch.Size([32001, "
    "4096]) from checkpoint, the shape in current model is torch.Size([32000, 4096]).",
    "adapter-keys-missing": "Found missing adapter keys while loading the checkpoint: "
    "['base_model.model.x.lora_A.weight']",
    "tokens-need-padding": "ValueError: Cannot handle batch sizes > 1 if no padding token is defined.",
    "no-weight-file": "OSError: Error no file named pytorch_model.bin, model.safetensors, found in directory ./out.",
    "not-a-repository": "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
    "'namespace/repo_name': 'saves/Qwen2/lora'.",
    "zero-files-unexpected": "ValueError: Expected 1 of '*_optim_states.pt' under './global_step9' but found 4 files.",
    "zero-stage-unknown": "ValueError: unknown zero stage 1",
    "zero-consumed": "ValueError: consumed 255381772 numels out of 255381776 - something is wrong",
    "header-incomplete": "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer",
    "zip-damaged": "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    "shared-memory": "RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk",
    "gradient-checkpointing": "`use_cache=True` is incompatible with gradient checkpointing. Setting "
    "`use_cache=False`.",
    "probabilities-not-finite": "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
}


def test_the_errors_that_the_readme_quotes_are_known_though_they_are_cut_short() -> None:
    assert named("Some weights of CriticModel were not initialized: ['score.weight']") == ["head-newly-initialised"]
    assert named("Some weights were not initialized: ['model.norm.weight']") == ["weights-newly-initialised"]
    assert named("size mismatch for score.weight ...") == ["size-mismatch-cut"]


@pytest.mark.parametrize("name", OLD_TEXTS)
def test_messages_that_users_report_are_known(name: str) -> None:
    assert named(OLD_TEXTS[name]) == [name]


def test_every_message_has_a_key_that_its_pattern_needs_and_points_to_codes_that_exist() -> None:
    from converter.recipe.verbs.explain import known_codes

    for name, text in OLD_TEXTS.items():
        message = next(m for m in MESSAGES if m.code == name)
        assert any(k in text for k in message.keys)
    assert len({m.code for m in MESSAGES}) == len(MESSAGES)
    known = set(known_codes())
    for message in MESSAGES:
        unknown = set(message.codes) - known
        assert not unknown, (message.code, unknown)


def test_colours_carriage_returns_and_prefixes_of_ranks_do_not_hide_a_message() -> None:
    text = "\x1b[33m(CriticWorker pid=7)\x1b[0m size mismatch for score.weight: copying a param with shape "
    text += "torch.Size([0]) from checkpoint, the shape in current model is torch.Size([1, 8])."
    assert named(f"12%|#   | 3/40\r{text}\r\n13%") == ["size-mismatch-empty-file"]


def test_a_line_of_megabytes_and_bytes_that_are_no_text_are_read_without_harm() -> None:
    blocks = [b"x" * (1 << 20)] * 4 + [b"\n\xff\xfe\x00unknown zero stage 1\n"]
    assert [s.message.code for s, _ in read(blocks)] == ["zero-stage-unknown"]


def test_a_hostile_line_is_shown_escaped() -> None:
    found = match("unknown zero stage 1 \x1b]0;owned\x07")
    assert found is not None
    seen = next(read([b"unknown zero stage 1 \x1b]0;owned\x07"]))[0]
    assert "\x1b" not in seen.example
    assert "\x07" not in seen.example


def test_the_exit_code_is_0_unless_fail_on_asks_for_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "train.log"
    log.write_text(OLD_TEXTS["gradient-checkpointing"] + "\n" + OLD_TEXTS["head-newly-initialised"] + "\n")
    assert main(["explain", str(log)]) == 0
    shown = capsys.readouterr().out
    assert shown.index("ERROR head-newly-initialised (line 2)") < shown.index(
        "harmless gradient-checkpointing (line 1)"
    )
    assert main(["explain", str(log), "--fail-on", "error", "--json"]) == 1
    value = json.loads(capsys.readouterr().out)
    assert [(m["name"], m["line"]) for m in value["messages"]] == [
        ("head-newly-initialised", 2),
        ("gradient-checkpointing", 1),
    ]
    log.write_text(OLD_TEXTS["gradient-checkpointing"])
    assert main(["explain", str(log), "--fail-on", "error"]) == 0
    assert main(["explain", str(log), "--fail-on", "cosmetic"]) == 1


def test_a_log_that_is_still_written_ends_the_job_at_the_first_bad_line() -> None:
    ours = [sys.executable, "-m", "converter", "explain", "-", "--fail-on", "error"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        run.stdin.write("step 1\n" + OLD_TEXTS["head-newly-initialised"] + "\n")
        run.stdin.flush()  # and stays open, as tail -f's would
        assert run.wait(timeout=60) == 1
        assert "head-newly-initialised (line 2)" in run.stdout.read()
        run.stdin.close()


def test_a_code_prints_its_explanation_and_a_misspelt_one_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "index-phantom"]) == 0
    assert "no shard holds" in capsys.readouterr().out
    assert main(["explain", "index-fantom"]) == 2
    assert "rlhf-convert explain index-phantom" in capsys.readouterr().err


def test_a_folder_is_sent_to_doctor_and_an_unknown_text_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", str(tmp_path)]) == 2
    assert "rlhf-convert doctor" in capsys.readouterr().err
    assert main(["explain", ""]) == 2
    assert "the text is empty" in capsys.readouterr().err
    spaced = tmp_path / "it's here"
    spaced.mkdir()
    assert main(["explain", str(spaced)]) == 2
    assert f"rlhf-convert doctor {shlex.quote(str(spaced))}" in capsys.readouterr().err
    assert main(["explain", "a sentence that nobody prints"]) == 0
    assert "not a message that is known here" in capsys.readouterr().out


def test_a_number_in_a_table_is_no_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "kl 0.02 | MISSING nothing here", "--json"]) == 0
    assert "0.02 is not in the checkpoint" not in capsys.readouterr().out
