"""A real Trainer has each checkpoint examined right after it is saved, and strict training stops at a bad one."""

from __future__ import annotations

import json
import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from converter.examine.doctor import diagnoses
from converter.integrations import BrokenCheckpoint, examine_after_save
from converter.integrations.after_save import Examination
from converter.integrations.settings import SETTINGS
from converter.integrations.transformers import CheckpointDoctor


class Ungathered(Trainer):
    """Saves as ZeRO-3 does without gathering: what another rank holds is `torch.Size([0])` in the file."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        file = Path(str(output_dir)) / "model.safetensors"
        held = load_file(file)
        save_file({n: t[:0].reshape(0) if "mlp" in n else t for n, t in held.items()}, file, metadata={"format": "pt"})


def trainer(kind: type[Trainer], out: Path, doctor: CheckpointDoctor) -> Trainer:
    """Two steps on eight rows, a checkpoint after each."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    rows = [{"input_ids": torch.arange(4) + i, "labels": torch.arange(4) + i} for i in range(8)]
    arguments = TrainingArguments(
        str(out), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return kind(model=model, args=arguments, train_dataset=rows, callbacks=[doctor])


def test_a_sound_run_is_trained_to_its_end_with_a_line_for_each_checkpoint(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    doctor = CheckpointDoctor()
    run = trainer(Trainer, tmp_path / "run", doctor)
    run.train()
    assert run.state.global_step == 2
    assert [Path(e.folder).name for e in doctor.examined] == ["checkpoint-1", "checkpoint-2"]
    lines = sorted(r.getMessage().partition(" (")[0] for r in logged)
    assert lines == [f"{tmp_path}/run/checkpoint-1: sound", f"{tmp_path}/run/checkpoint-2: sound"]
    assert all(e.error() is None for e in doctor.examined)


def test_strict_training_stops_at_the_first_broken_save_with_the_weights_in_memory_and_what_to_set(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    run = trainer(Ungathered, tmp_path / "run", CheckpointDoctor(strict=True))
    with pytest.raises(BrokenCheckpoint) as stopped:
        run.train()
    assert run.state.global_step == 1
    assert stopped.value.code == "broken-checkpoint"
    assert stopped.value.where == str(tmp_path / "run" / "checkpoint-1")
    assert "zero3-empty-tensors" in stopped.value.what
    assert "stage3_gather_16bit_weights_on_model_save: true" in str(stopped.value.next)
    assert all(p.numel() for p in run.model.parameters())
    assert [r.levelname for r in logged if r.name == "converter.integrations"] == ["ERROR"]
    # What the message promises: what is in memory can be saved whole now, and is sound.
    run.model.save_pretrained(tmp_path / "rescued")
    examine_after_save(tmp_path / "rescued", strict=True)


def test_without_strict_a_broken_save_is_named_and_training_goes_on(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    doctor = CheckpointDoctor()
    run = trainer(Ungathered, tmp_path / "run", doctor)
    run.train()
    assert run.state.global_step == 2
    assert [[f["code"] for f in e.findings if f["severity"] == "error"] for e in doctor.examined] == [
        ["zero3-empty-tensors"]
    ] * 2
    assert sum("ERROR zero3-empty-tensors" in r.getMessage() for r in logged) == 2


def test_a_folder_that_is_not_there_is_never_taken_for_a_sound_one(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="could not be examined") as raised:
        examine_after_save(tmp_path / "gone", strict=True)
    assert raised.value.code == "checkpoint-not-examined"


def test_a_doctor_that_does_not_end_is_given_up_and_is_no_all_clear(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"did not end in 0\.01 s"):
        examine_after_save(tmp_path, strict=True, timeout=0.01)


def test_an_interrupted_examination_is_not_reported_as_sound(tmp_path: Path, logged: list[logging.LogRecord]) -> None:
    class Stop(BaseException):
        """As KeyboardInterrupt, after which `subprocess` leaves the child for Python to collect, with a warning."""

    def interrupt(_number: int, _frame: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop):
            examine_after_save(tmp_path, strict=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    (line,) = [r.getMessage() for r in logged if r.name == "converter.integrations"]
    assert line == f"{tmp_path}: not examined: the examination has not ended"


def test_an_examination_that_still_runs_is_no_all_clear(tmp_path: Path) -> None:
    running = Examination(str(tmp_path))
    assert running.glance.word == "not examined"
    assert running.error() is not None


@pytest.mark.parametrize("printed", [b"[]", b"{}", b"3", b'{"findings": []}', b"\xff\xfe{}", b'{"error": "no"}'])
def test_what_is_not_doctors_report_is_no_all_clear(
    printed: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere" / "converter"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("")
    (other / "__main__.py").write_text(f"import os; os.write(1, {printed!r}); os.write(2, b'odd \\xff')")
    monkeypatch.setenv("PYTHONPATH", str(other.parent))
    with pytest.raises(BrokenCheckpoint, match="nothing that is understood: odd"):
        examine_after_save(tmp_path, strict=True)


def test_a_trainers_loader_is_asked_too(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.ones(8, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(BrokenCheckpoint, match="no trainer is named `opnrlhf`"):
        examine_after_save(tmp_path, strict=True, for_="opnrlhf")


def test_other_ranks_return_at_once_and_start_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    before = threading.active_count()
    assert examine_after_save(tmp_path / "gone", strict=True) is None
    assert threading.active_count() == before


def test_every_setting_is_for_a_code_that_doctor_finds() -> None:
    assert set(SETTINGS) <= set(diagnoses())
