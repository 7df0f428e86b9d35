"""`make-delta`, `apply-delta`: torch's differences and sums; what differs in more than values is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import converter
from converter.cli import main
from converter.errors import Refused, UsageError
from places import REPOSITORY

BASE = REPOSITORY / "fixtures" / "tiny-qwen2-base"
ADAPTER = REPOSITORY / "fixtures" / "tiny-reward-adapter"
Values = dict[str, torch.Tensor]


def values(folder: Path) -> Values:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def changed(folder: Path, change: Any) -> None:
    for file in folder.glob("*.safetensors"):
        save_file({n: change(n, t) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models that training made of the shipped base."""
    made = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("tuned") / f"tuned-{seed}"
        shutil.copytree(BASE, folder)
        noise = torch.Generator().manual_seed(seed)

        def moved(_: str, t: torch.Tensor, noise: torch.Generator = noise) -> torch.Tensor:
            return (t.float() + 0.01 * torch.randn(t.shape, generator=noise)).to(t.dtype)

        changed(folder, moved)
        made.append(folder)
    return made


@pytest.fixture(scope="module")
def deltas(tuned: list[Path]) -> list[Path]:
    made = [folder.with_name(f"delta-{n}") for n, folder in enumerate(tuned)]
    for folder, delta in zip(tuned, made, strict=True):
        assert main(["make-delta", str(BASE), str(folder), str(delta), "-q"]) == 0
    return made


def expect_equal(found: Values, wanted: Values) -> None:
    assert set(found) == set(wanted)
    assert [n for n in wanted if found[n].dtype != wanted[n].dtype or not torch.equal(found[n], wanted[n])] == []


def test_a_difference_is_torchs_in_fp32(tuned: list[Path], deltas: list[Path]) -> None:
    base = values(BASE)
    expect_equal(values(deltas[0]), {n: t.float() - base[n].float() for n, t in values(tuned[0]).items()})


def test_a_difference_added_to_its_base_is_the_tuned_model_bit_by_bit(
    tuned: list[Path], deltas: list[Path], tmp_path: Path
) -> None:
    assert main(["apply-delta", str(BASE), str(deltas[0]), str(tmp_path / "again"), "-q"]) == 0
    expect_equal(values(tmp_path / "again"), values(tuned[0]))
    assert (tmp_path / "again" / "config.json").read_bytes() == (BASE / "config.json").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(loaded.state_dict()["model.norm.weight"], values(tuned[0])["model.norm.weight"])


def test_several_differences_are_added_with_their_weights_and_rounded_once(deltas: list[Path], tmp_path: Path) -> None:
    converter.apply_delta(BASE, deltas, tmp_path / "sum", weights=(0.5, -2.0))
    one, two = (values(d) for d in deltas)
    base, found = values(BASE), values(tmp_path / "sum")
    wanted = {n: (t.float() + 0.5 * one[n] - 2.0 * two[n]).to(t.dtype) for n, t in base.items()}
    # torch's sum in fp32 and ours in fp64 may round to neighbours of bf16 where the sum lies between them.
    far = [n for n in wanted if not torch.allclose(found[n].float(), wanted[n].float(), rtol=2**-7, atol=0)]
    wide = {
        n: (t.double() + 0.5 * one[n].double() - 2.0 * two[n].double()).to(t.dtype) for n, t in values(BASE).items()
    }
    assert far == []
    expect_equal(found, wide)


def test_a_cast_on_the_way_rounds_once(tuned: list[Path], tmp_path: Path) -> None:
    converter.make_delta(BASE, tuned[0], tmp_path / "delta", dtype="bf16")
    base = values(BASE)
    expect_equal(
        values(tmp_path / "delta"),
        {n: (t.double() - base[n].double()).to(torch.bfloat16) for n, t in values(tuned[0]).items()},
    )


def test_a_difference_is_no_model_for_any_loader_and_holds_no_path(deltas: list[Path]) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        AutoModelForCausalLM.from_pretrained(deltas[0])
    assert not (deltas[0] / "config.json").exists()
    told = json.loads((deltas[0] / "delta_config.json").read_text())
    assert told["base"]["name"] == "tiny-qwen2-base"
    for file in ("delta_config.json", "rlhf-convert.json"):
        assert str(deltas[0].parent) not in (deltas[0] / file).read_text()


def test_inspect_and_doctor_know_a_difference(deltas: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(deltas[0]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detected"] == "delta"
    assert main(["inspect", str(deltas[0])]) == 0
    assert "delta" in capsys.readouterr().out


def test_a_difference_in_several_files_is_read_back(tuned: list[Path], tmp_path: Path) -> None:
    size = ["--max-shard-size", "300KB", "-q"]
    assert main(["make-delta", str(BASE), str(tuned[0]), str(tmp_path / "delta"), *size]) == 0
    assert (tmp_path / "delta" / "delta.safetensors.index.json").is_file()
    converter.apply_delta(BASE, tmp_path / "delta", tmp_path / "again")
    expect_equal(values(tmp_path / "again"), values(tuned[0]))
    shard = next((tmp_path / "delta").glob("delta-00002-*"))
    shard.unlink()
    with pytest.raises(Refused, match="are not there"):
        converter.apply_delta(BASE, tmp_path / "delta", tmp_path / "none")


def test_a_recipe_does_the_same(deltas: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["apply-delta", str(BASE), str(deltas[0]), "x", "--weight", "0.5", "--print-recipe"]) == 0
    (tmp_path / "recipe.yaml").write_text(capsys.readouterr().out)
    assert main(["run", str(tmp_path / "recipe.yaml"), str(tmp_path / "ran"), "-q"]) == 0
    converter.apply_delta(BASE, deltas[0], tmp_path / "direct", weights=[0.5])
    expect_equal(values(tmp_path / "ran"), values(tmp_path / "direct"))


def other_config(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


DIFFERENT = {
    "a shape": (lambda f: changed(f, lambda n, t: t[:-1] if n == "model.norm.weight" else t), "shapes"),
    "a dtype": (lambda f: changed(f, lambda n, t: t.float() if n == "model.norm.weight" else t), "dtypes"),
    "the config": (lambda f: other_config(f, rope_theta=5.0), "rope_theta"),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_difference_of_models_that_differ_in_more_than_values_is_refused(
    what: str, tuned: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(tuned[0], tmp_path / "other")
    harm, words = DIFFERENT[what]
    harm(tmp_path / "other")
    with pytest.raises(Refused, match=words) as refused:
        converter.make_delta(BASE, tmp_path / "other", tmp_path / "out")
    assert refused.value.code in ("models-differ", "tensors-misshapen")
    assert not (tmp_path / "out").exists()


def rename(path: Path, old: str, new: str) -> None:
    held = load_file(path)
    save_file({new if n == old else n: t for n, t in held.items()}, path)


def retie(folder: Path) -> None:
    path = folder / "delta_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ties": [["model.norm.weight", "lm_head.weight"]]}))


def reconfigure(folder: Path) -> None:
    path = folder / "delta_config.json"
    told = json.loads(path.read_text())
    told["config"]["rope_theta"] = 5.0
    path.write_text(json.dumps(told))


FOREIGN = {
    "a name": (
        lambda f: rename(file_of(f, "model.norm.weight"), "model.norm.weight", "model.norm.other"),
        "lists 1 tensors that no shard holds: model.norm.weight",
    ),
    "a shape": (lambda f: changed(f, lambda n, t: t[:-1] if n == "model.norm.weight" else t), "other shapes"),
    "ties": (retie, "tie other tensors"),
    "the config": (reconfigure, "rope_theta"),
}


def file_of(folder: Path, name: str) -> Path:
    return next(f for f in folder.glob("*.safetensors") if name in load_file(f))


@pytest.mark.parametrize("what", FOREIGN)
def test_a_difference_of_another_model_is_refused(what: str, deltas: list[Path], tmp_path: Path) -> None:
    shutil.copytree(deltas[0], tmp_path / "delta")
    harm, words = FOREIGN[what]
    harm(tmp_path / "delta")
    with pytest.raises(Refused, match=words) as refused:
        converter.apply_delta(BASE, tmp_path / "delta", tmp_path / "out")
    assert refused.value.code == ("index-phantom" if what == "a name" else "models-differ")
    assert not (tmp_path / "out").exists()


def test_an_adapter_and_a_model_are_no_differences(tuned: list[Path], tmp_path: Path) -> None:
    for other in (ADAPTER, tuned[0]):
        with pytest.raises(Refused) as refused:
            converter.apply_delta(BASE, other, tmp_path / "out")
        assert refused.value.code == "not-a-delta"
    with pytest.raises(Refused, match="an adapter"):
        converter.make_delta(BASE, ADAPTER, tmp_path / "out")


def test_it_is_noted_where_a_difference_goes_over_another_model(
    tuned: list[Path], deltas: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(tuned[1], other)
    held = load_file(file_of(other, "model.norm.weight"))
    save_file(dict(reversed(held.items())), file_of(other, "model.norm.weight"), metadata={"made": "otherwise"})
    assert "delta-other-base" in {n.code for n in converter.apply_delta(other, deltas[0]).notes}
    assert "delta-other-base" not in {n.code for n in converter.apply_delta(BASE, deltas[0]).notes}


@pytest.mark.parametrize("weights", [[1.0, 2.0], [float("nan")]])
def test_weights_that_do_not_go_with_the_differences_are_refused(
    weights: list[float], deltas: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError):
        converter.apply_delta(BASE, deltas[0], tmp_path / "out", weights=weights)


def test_a_difference_of_nothing_and_a_sum_that_changes_nothing_are_refused(deltas: list[Path], tmp_path: Path) -> None:
    with pytest.raises(Refused) as same:
        converter.make_delta(BASE, BASE, tmp_path / "delta")
    with pytest.raises(Refused) as rounded:
        converter.apply_delta(BASE, deltas[0], tmp_path / "out", weights=[1e-9])
    assert [same.value.code, rounded.value.code] == ["no-op", "no-op"]
    assert sorted(tmp_path.iterdir()) == []
    converter.make_delta(BASE, BASE, tmp_path / "delta", allow=["no-op"])
    assert all(not t.any() for t in values(tmp_path / "delta").values())


def test_a_model_and_an_output_are_no_sum(tmp_path: Path) -> None:
    assert main(["apply-delta", str(BASE), str(tmp_path / "out")]) == 2
    assert main(["apply-delta", str(BASE)]) == 2


def test_a_difference_is_neither_verified_nor_pushed_as_a_model(
    deltas: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(deltas[0])]) == 4
    assert "this is the difference of two models, not a model" in capsys.readouterr().out
    assert main(["push", str(deltas[0]), "me/difference", "--dry-run"]) == 3
    assert "weights-missing" in capsys.readouterr().err


def test_the_command_that_make_delta_prints_can_be_typed(
    tuned: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["make-delta", str(BASE), str(tuned[0]), str(tmp_path / "d")]) == 0
    step = capsys.readouterr().out.splitlines()[-1].split("rlhf-convert ")[1]
    assert main(step.split()) == 0
    assert (tmp_path / "d-applied" / "config.json").is_file()
