"""Adapter folders: what is read, what is refused, and how an ungathered ZeRO-3 save is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from converter.core.checkpoint import Checkpoint
from converter.core.files.opening import identity
from converter.core.formats.safetensors_io import build_header
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.errors import ConvertError, Refused, UsageError
from converter.sources.hf import peft

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"


def weights(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    infos = [(name, TensorInfo(DType.F32, shape)) for name, shape in shapes.items()]
    path.write_bytes(build_header(infos, {"format": "pt"}) + bytes(sum(i.nbytes for _, i in infos)))


def sound(layers: int = 2) -> dict[str, tuple[int, ...]]:
    return {KEY.format(n, side): shape for n in range(layers) for side, shape in (("A", (3, 48)), ("B", (83, 3)))}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 3}')
    weights(folder / WEIGHTS, sound())
    return folder


def opened(folder: Path) -> Checkpoint:
    return peft.SOURCE.open(folder, asked="./adapter")


def refused(folder: Path) -> ConvertError:
    assert peft.SOURCE.survey(folder).error() is not None
    with pytest.raises(Refused) as caught:
        opened(folder)
    return caught.value


def test_an_adapter_is_read_by_its_header(adapter: Path) -> None:
    checkpoint = opened(adapter)
    assert {n: t.info.shape for n, t in checkpoint.tensors.items()} == sound()
    assert checkpoint.config == {"peft_type": "LORA", "r": 3}
    assert checkpoint.config_bytes == (adapter / CONFIG).read_bytes()
    assert (checkpoint.origin.kind, checkpoint.origin.name, checkpoint.origin.asked) == (
        "adapter",
        "adapter",
        "./adapter",
    )
    assert set(checkpoint.shards.values()) == {WEIGHTS}
    assert checkpoint.ties == ()
    assert peft.SOURCE.survey(adapter).faults == []


def test_every_file_of_an_adapter_is_among_the_inputs(adapter: Path) -> None:
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "README.md").write_text("# a card")
    checkpoint = opened(adapter)
    assert checkpoint.inputs == {str(adapter / n): identity(adapter / n) for n in (CONFIG, WEIGHTS, "tokenizer.json")}
    assert list(checkpoint.side_files) == ["tokenizer.json"]


def test_a_file_inside_the_adapter_is_no_adapter(adapter: Path) -> None:
    assert peft.SOURCE.detect(adapter / WEIGHTS) is None


# ZeRO-3


def test_empty_tensors_are_named_as_a_zero3_save_with_count_names_and_shapes(adapter: Path) -> None:
    weights(adapter / WEIGHTS, sound(28) | {KEY.format(n, "B"): (0,) for n in range(28) if n != 5})
    error = refused(adapter)
    assert error.code == "zero3-empty-tensors"
    assert "27 of 56 tensors are torch.Size([0])" in error.what
    assert "up_proj.lora_B.weight" in error.what
    assert "ZeRO-3" in error.what
    assert "(83, 3)" in error.what
    assert "--weights-from" in str(error.next)


def test_an_adapter_of_empty_tensors_only_is_a_zero3_save_too(adapter: Path) -> None:
    weights(adapter / WEIGHTS, dict.fromkeys(sound(), (0,)))
    error = refused(adapter)
    assert error.code == "zero3-empty-tensors"
    assert "4 of 4" in error.what


def test_a_factor_with_one_dimension_gone_is_as_empty(adapter: Path) -> None:
    weights(adapter / WEIGHTS, sound() | {KEY.format(0, "B"): (0, 3)})
    assert refused(adapter).code == "zero3-empty-tensors"


# What is refused


def _text(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04")


REFUSED: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "config-missing": (lambda f: (f / CONFIG).unlink(), "adapter-config-missing", (CONFIG, "rank and alpha")),
    "config-cut": (_text(CONFIG, '{"r": 8'), "json-malformed", (CONFIG,)),
    "config-key-twice": (_text(CONFIG, '{"r": 8, "r": 16}'), "json-malformed", (CONFIG, "`r` appears twice")),
    "config-is-a-list": (_text(CONFIG, "[]"), "json-malformed", (CONFIG, "no JSON object")),
    "config-links-out": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).symlink_to("/etc/passwd")),
        "input-outside",
        (CONFIG,),
    ),
    "weights-missing": (lambda f: (f / WEIGHTS).unlink(), "weights-missing", (WEIGHTS,)),
    "weights-pickled-and-cut": (_pickled, "file-truncated", ("adapter_model.bin", "cut short")),
    "weights-empty-file": (_text(WEIGHTS, ""), "safetensors-not", (WEIGHTS, "empty file")),
    "weights-without-tensors": (lambda f: weights(f / WEIGHTS, {}), "adapter-empty", (WEIGHTS, "no tensor")),
    "weights-cut": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]),
        "file-truncated",
        (WEIGHTS, "cut short"),
    ),
    "weights-lfs-pointer": (
        _text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 77\n"),
        "file-truncated",
        (WEIGHTS, "git-lfs pointer", "77 bytes"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_broken_adapter_is_refused_by_name(name: str, adapter: Path) -> None:
    change, code, words = REFUSED[name]
    change(adapter)
    peft.SOURCE.survey(adapter)
    with pytest.raises(Refused) as caught:
        opened(adapter)
    assert caught.value.code == code
    for word in words:
        assert word in str(caught.value)


def test_a_runs_folder_gets_its_adapters_listed(adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (100, 200):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / CONFIG).write_text("{}")
    (run / "final" / "adapter").mkdir(parents=True)
    (run / "final" / "adapter" / CONFIG).write_text("{}")
    assert peft.SOURCE.detect(run) is None
    with pytest.raises(UsageError) as caught:
        peft.SOURCE.open(run, asked="./run/")
    assert caught.value.exit_code == 2
    assert caught.value.expected == "./run/checkpoint-100, ./run/checkpoint-200, ./run/final/adapter"


# What is accepted with a remark


def test_a_whole_model_beside_the_adapter_is_told(adapter: Path) -> None:
    weights(adapter / "model.safetensors", {"w": (2,)})
    assert set(opened(adapter).tensors) == set(sound())
    assert [(f.code, f.severity) for f in peft.SOURCE.survey(adapter).faults] == [
        ("adapter-and-model", "cosmetic"),
        ("stray-weights", "cosmetic"),
    ]


def test_weights_that_nothing_reads_are_told_and_training_state_is_not(adapter: Path) -> None:
    weights(adapter / "former.safetensors", {"v_head.summary.weight": (1, 48)})
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin"):
        (adapter / name).touch()
    faults = peft.SOURCE.survey(adapter).faults
    assert [f.code for f in faults] == ["stray-weights"]
    assert "former.safetensors" in faults[0].text
    assert "optimizer" not in faults[0].text
    assert "rng_state" not in faults[0].text


def test_config_of_an_adapter_travels_as_a_value(adapter: Path) -> None:
    value = {"r": 3, "rank_pattern": {"up_proj": 8}, "base_model_name_or_path": "größe/модель"}
    (adapter / CONFIG).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert opened(adapter).config == value
