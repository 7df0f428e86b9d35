"""`diff` by value: against torch's own arithmetic, over shardings, prefixes, dtypes and broken inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from converter.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=16, dtype="float32"
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def copy(model: Path, change: Any, name: str = "b") -> Path:
    out = model.parent / name
    out.mkdir()
    for file in model.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "model.safetensors")
    save_file(change(dict(tensors)), out / "model.safetensors", metadata={"format": "pt"})
    return out


def compared(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    code = main(["diff", str(a), str(b), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def test_one_model_in_other_shards_is_equal(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM.from_pretrained(model).save_pretrained(model.parent / "b", max_shard_size="2KB")
    assert len(list((model.parent / "b").glob("*.safetensors"))) > 2
    code, found = compared(model, model.parent / "b", capsys)
    assert (code, found["equal"], found["tensors"]) == (0, True, [])


def test_a_change_is_measured_as_torch_measures_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    before = load_file(model / "model.safetensors")[name]
    after = before + torch.randn(before.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    other = copy(model, lambda t: t | {name: after})
    code, found = compared(model, other, capsys)
    assert code == 1
    (entry,) = found["tensors"]
    delta = after.double() - before.double()
    assert (entry["a"], entry["status"]) == (name, "changed")
    assert entry["relative"] == pytest.approx(float(delta.norm() / before.double().norm()), rel=1e-12)
    assert entry["largest"] == float(delta.abs().max())


def test_rounding_alone_is_told_from_a_change(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    half = copy(model, lambda t: {n: v.bfloat16() for n, v in t.items()})
    code, found = compared(model, half, capsys)
    assert code == 1
    assert {e["status"] for e in found["tensors"]} == {"rounded"}
    assert found["dtypes"]["lm_head.weight"] == ["float32", "bfloat16"]


def test_names_missing_extra_and_of_other_shape_are_listed(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["model.norm.weight"]
        return tensors | {"score.weight": torch.ones(1, 8), "lm_head.weight": torch.ones(17, 8)}

    code, found = compared(model, copy(model, change), capsys)
    assert code == 1
    assert (found["missing"], found["extra"]) == (["model.norm.weight"], ["score.weight"])
    assert [(e["a"], e["status"]) for e in found["tensors"]] == [("lm_head.weight", "shape")]


def test_a_prefix_on_one_side_is_found_or_given(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy(model, lambda t: {f"_orig_mod.module.{n}": v for n, v in t.items()})
    code, found = compared(model, other, capsys)
    assert (code, found["equal"], found["prefixes"]) == (0, True, ["", "_orig_mod.module."])
    code, found = compared(model, other, capsys, "--ignore-prefix", "_orig_mod.module.")
    assert (code, found["equal"]) == (0, True)


def test_values_that_are_not_finite_are_counted_and_equal_nans_are_equal(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.norm.weight"
    odd = torch.tensor([float("nan"), float("inf"), 1, 1, 1, 1, 1, 1])
    one = copy(model, lambda t: t | {name: odd}, "one")
    assert compared(one, copy(model, lambda t: t | {name: odd.clone()}, "two"), capsys)[1]["equal"]
    code, found = compared(model, one, capsys)
    assert code == 1
    assert [(e["a"], e["nonfinite"]) for e in found["tensors"]] == [(name, 2)]


def test_configs_and_side_files_count(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy(model, lambda t: t)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 5, "transformers_version": "0"}))
    (other / "tokenizer.json").write_text("{}")
    code, found = compared(model, other, capsys)
    assert code == 1
    assert found["config"] == {"rope_theta": [config.get("rope_theta"), 5]}
    assert found["side_files"] == {"tokenizer.json": "only in B"}


def test_the_screen_puts_the_largest_change_first(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {n: v * (1.5 if "norm.weight" in n and "layers.1" in n else 1.001) for n, v in tensors.items()}

    assert main(["diff", str(model), str(copy(model, change))]) == 1
    lines = capsys.readouterr().out.splitlines()
    first = lines[next(i for i, line in enumerate(lines) if line.startswith("changed")) + 1]
    assert first.split()[0] == "5.00e-01"
    assert "layers.1" in first


def test_an_input_that_is_broken_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy(model, lambda t: t)
    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-1])
    assert main(["diff", str(model), str(other)]) == 3
    assert "REFUSED" in capsys.readouterr().err


ODD = {
    "infinities of both signs": (
        [float("inf"), 1.0],
        [float("-inf"), 1.0],
        torch.float32,
        {"nonfinite": 1, "differing": 1},
    ),
    "zeros of both signs": ([0.0, 1.0], [-0.0, 1.0], torch.float32, {"largest": 0.0, "differing": 1}),
    "integers past fp64": ([2**60, 1], [2**60 + 1, 1], torch.int64, {"largest": 1.0, "differing": 1}),
    "complex numbers": ([1 + 1j, 1], [1 - 1j, 1], torch.complex64, {"largest": 2.0, "differing": 1}),
    "fp8": ([1.0, 2.0], [1.0, 4.0], torch.float8_e4m3fn, {"largest": 2.0, "differing": 1}),
}


@pytest.mark.parametrize("name", ODD)
def test_a_change_that_an_fp64_norm_does_not_show_is_counted(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, dtype, expected = ODD[name]
    for file, values in (("a", one), ("b", two)):
        save_file({"w": torch.tensor(values).to(dtype)}, tmp_path / f"{file}.safetensors")
    code, found = compared(tmp_path / "a.safetensors", tmp_path / "b.safetensors", capsys)
    (entry,) = found["tensors"]
    assert (code, {k: entry[k] for k in expected}) == (1, expected)


def test_a_zero_of_another_sign_is_told_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, value in (("a", 0.0), ("b", -0.0)):
        save_file({"w": torch.tensor([value, 2.0])}, tmp_path / f"{file}.safetensors")
    assert main(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    assert "1 equal in value and not in their bits" in capsys.readouterr().out


def test_a_prefix_that_makes_two_names_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file, value in (("a", 1.0), ("b", 2.0)):
        save_file({"x.w": torch.ones(2), "w": torch.full((2,), value)}, tmp_path / f"{file}.safetensors")
    files = [str(tmp_path / f"{f}.safetensors") for f in "ab"]
    assert main(["diff", *files, "--ignore-prefix", "x."]) == 2
    assert "rename-collision" in capsys.readouterr().err


def test_a_file_that_holds_no_weights_is_not_taken_for_its_folder(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diff", str(model / "config.json"), str(model)]) == 2
    assert "path-not-a-folder" in capsys.readouterr().err


def test_tensors_that_one_side_has_lost_are_listed_and_the_others_compared(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = "model.layers.0.mlp.up_proj.weight"
    other = copy(model, lambda t: {**t, lost: torch.empty(0), "model.norm.weight": t["model.norm.weight"] * 2})
    code, found = compared(model, other, capsys)
    assert (code, found["lost"], found["missing"]) == (1, [[], [lost]], [lost])
    assert [e["a"] for e in found["tensors"]] == ["model.norm.weight"]
    assert str(found["broken"][1]).startswith("zero3-empty-tensors: 1 of 21 tensors")
    assert compared(other, other, capsys)[0] == 1  # two that lost the same may have been different


def test_the_json_of_a_comparison_has_these_keys(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = compared(model, copy(model, lambda t: {n: v * 2 for n, v in t.items()}), capsys)
    assert set(found) == {
        "version", "equal", "prefixes", "read", "tied", "lost", "broken", "tensors", "equal_tensors", "dtypes",
        "missing", "extra", "config", "side_files",
    }  # fmt: skip
    keys = {"a", "b", "status", "relative", "largest", "nonfinite", "differing"}
    assert all(set(entry) == keys for entry in found["tensors"])
