"""Broken adapters of every method: refused by name with nothing written, where PEFT loads many and merges nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bare_adapters import BARE, Bare
from oracle.command import listing, run

UNREAD = {"velora": "lora_velora_embed", "monteclora": "lora_monteclora_sampler.std_prior"}
"""Factors that only training reads: nothing is wrong where one is missing or has another shape."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    return oracle.make_base(folder, "llama").path


@pytest.mark.parametrize("name", BARE)
def test_a_sound_adapter_written_by_hand_is_merged(name: str, base: Path, tmp_path: Path) -> None:
    """The control: what the tests below break was whole."""
    adapter = BARE[name].write(tmp_path / "adapter")
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base)
    assert ran.code == 0, ran.err
    key = f"{BARE[name].module.removeprefix('base_model.model.')}.weight"
    assert not torch.equal(oracle.read_tensors(tmp_path / "out")[key], oracle.read_tensors(base)[key])


def _without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: {k: v for k, v in tensors.items() if k != key}


def _longer(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda tensors: tensors | {key: torch.cat((tensors[key], tensors[key][:1]))}


def _broken(tensors: dict[str, Any]) -> dict[str, Any]:
    key = next(k for k, v in tensors.items() if v.is_floating_point())
    value = tensors[key].clone()
    value.view(-1)[0] = float("nan")
    return tensors | {key: value}


def _breakages(name: str, bare: Bare) -> Iterator[tuple[str, Callable[[dict[str, Any]], dict[str, Any]] | None, Any]]:
    """What to break: its name, a change of the tensors, changes of the config."""
    for key in bare.keys:
        if UNREAD.get(name, "-") in key:
            continue
        yield f"without {key}", _without(key), {}
        yield f"longer {key}", _longer(key), {}
    yield "nan", _broken, {}
    yield "stray", lambda t: t | {f"{bare.module}.nobodys_factor": torch.ones(3)}, {}
    yield "foreign factor", lambda t: t | {f"{bare.module}.lora_magnitude_vector": torch.ones(48)}, {}
    yield "unknown field", None, {"scale_of_tomorrow": 2}
    if bare.rank is not None:
        yield "contradiction", None, dict([bare.rank])


@pytest.mark.parametrize("name", BARE)
def test_a_broken_adapter_is_refused_and_nothing_is_written(name: str, base: Path, tmp_path: Path) -> None:
    bare = BARE[name]
    accepted = []
    for number, (what, change, config) in enumerate(_breakages(name, bare)):
        if len(bare.keys) == 1 and what.startswith("without"):
            continue  # an empty file is refused by the source
        tensors = bare.tensors() if change is None else change(bare.tensors())
        adapter = bare.write(tmp_path / str(number) / "adapter", tensors, **config)
        before = listing(tmp_path)
        ran = run("merge-lora", adapter, tmp_path / str(number) / "out", "--base", base)
        assert "Traceback" not in ran.text
        if ran.code != 3 or listing(tmp_path) != before:
            accepted.append(f"{what}: exit {ran.code} {ran.err[-300:]}")
    assert not accepted, "\n".join(accepted)


REFUSED_FIELDS = {
    "pvera": ("sample_at_inference", True, "draws at random"),
    "unilora": ("save_indices", False, "order of the model's layers"),
    "tinylora": ("save_projection", False, "order of the model's layers"),
    "miss": ("init_weights", "sideways", "true, false, bat or mini"),
    "road": ("variant", "road_3", "road_1 or road_2 or road_4"),
    "oft": ("num_cayley_neumann_terms", 0, "malformed"),
    "deft": ("decomposition_method", "svd", "relu or qr"),
    "peanut": ("act_fn", "softmax", "malformed"),
    "kasa": ("use_dora", True, "are set: together they are not implemented"),
    "bdlora": ("use_bdlora", {"nblocks": 2, "sideways": 1}, "malformed"),
    "ia3": ("feedforward_modules", "(a+)+b", "plain regular expression"),
    "adalora": ("rank_pattern", {"q_proj.lora_E": [1, 2]}, "true and false"),
}


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_a_field_with_a_value_of_no_meaning_is_refused_by_name(name: str, base: Path, tmp_path: Path) -> None:
    key, value, words = REFUSED_FIELDS[name]
    adapter = BARE[name].write(tmp_path / "adapter", **{key: value})
    ran = run("merge-lora", adapter, tmp_path / "out", "--base", base)
    assert ran.code == 3
    assert key in ran.text
    assert words in ran.text
    assert not (tmp_path / "out").exists()


def test_an_untrained_adapter_changes_nothing_and_is_refused(base: Path, tmp_path: Path) -> None:
    bare = BARE["vera"]
    tensors = bare.tensors()
    tensors[f"{bare.module}.vera_lambda_b"].zero_()
    ran = run("merge-lora", bare.write(tmp_path / "a", tensors), tmp_path / "out", "--base", base)
    assert ran.code == 3
    assert "every vera_lambda_b is zero" in ran.text


def test_a_weight_goes_with_linear_methods_only(base: Path, tmp_path: Path) -> None:
    ran = run("merge-lora", BARE["oft"].write(tmp_path / "a"), tmp_path / "out", "--base", base, "--weight", "0.5")
    assert ran.code == 3
    assert "the update of OFT is not linear" in ran.text


def test_a_position_outside_of_the_weight_is_refused(base: Path, tmp_path: Path) -> None:
    bare = BARE["shira"]
    tensors = bare.tensors()
    tensors[f"{bare.module}.shira_indices"][0, 0] = 48
    ran = run("merge-lora", bare.write(tmp_path / "a", tensors), tmp_path / "out", "--base", base)
    assert ran.code == 3
    assert "a position outside of a weight [48, 48]" in ran.text
    assert not (tmp_path / "out").exists()
