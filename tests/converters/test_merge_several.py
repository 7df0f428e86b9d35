"""Several adapters in one pass: the exact weighted sum, rounded once; with `--numerics peft`, PEFT's merge in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.bases import DTYPES
from oracle.command import merged, run
from oracle.expected import inputs_for


def _adapters(tmp_path: Path, base: oracle.Base, *settings: dict[str, Any]) -> list[Path]:
    return [
        oracle.make_adapter(tmp_path / f"adapter{number}", base, seed=10 + number, **more)
        for number, more in enumerate(settings)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", [(0.5, 1.0), (0.3, -1.25)], ids=str)
def test_best_is_the_exact_weighted_sum_rounded_once(dtype: str, weights: tuple[float, float], tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", dtype=dtype)
    a, b = _adapters(tmp_path, base, {"r": 5, "use_rslora": True}, {"target_modules": ["q_proj", "up_proj"]})
    merged(a, tmp_path / "out", "--base", base.path, "--adapter", b, "--weight", weights[0], "--weight", weights[1])
    found = oracle.read_tensors(tmp_path / "out")
    unequal = total = 0
    for name, exact in oracle.reference64(base, list(zip((a, b), weights, strict=True))).items():
        ideal = oracle.rounded(exact, DTYPES[dtype])
        unequal += int(found[name].ne(ideal).sum())
        total += ideal.numel()
        assert oracle.errors_against(found[name], exact)[1] <= oracle.errors_against(ideal, exact)[1] * 1.0001, name
    # Over an fp32 base the sum is in fp64. Over 16 bits it is in fp32: a few elements fall on the other side of a tie.
    assert unequal <= (0 if dtype == "float32" else 1e-3 * total)


def test_weights_default_to_one(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    a, b = _adapters(tmp_path, base, {}, {"r": 7})
    merged(a, tmp_path / "out", "--base", base.path, "--adapter", b)
    found = oracle.read_tensors(tmp_path / "out")
    for name, exact in oracle.reference64(base, [(a, 1.0), (b, 1.0)]).items():
        assert found[name].equal(exact.float()), name


def test_one_adapter_can_be_weighted(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    (a,) = _adapters(tmp_path, base, {})
    merged(a, tmp_path / "out", "--base", base.path, "--weight", "0.37")
    found = oracle.read_tensors(tmp_path / "out")
    for name, exact in oracle.reference64(base, [(a, 0.37)]).items():
        assert found[name].equal(exact.float()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("second", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_peft_numerics_round_once_for_each_adapter_as_peft_does(
    dtype: str, second: dict[str, Any], tmp_path: Path
) -> None:
    base = oracle.make_base(tmp_path / "base", dtype=dtype)
    a, b, c = _adapters(tmp_path, base, {"r": 4}, second, {"target_modules": ["q_proj"]})
    expected = oracle.peft_merge(base, a, b, c)
    merged(a, tmp_path / "peft", "--base", base.path, "--adapter", b, "--adapter", c, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)


def test_best_is_nearer_to_fp64_than_pefts_roundings_in_turn(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", dtype="bfloat16")
    adapters = _adapters(tmp_path, base, {}, {}, {})
    expected = oracle.peft_merge(base, *adapters)
    merged(adapters[0], tmp_path / "out", "--base", base.path, "--adapter", adapters[1], "--adapter", adapters[2])
    found = oracle.read_tensors(tmp_path / "out")
    for name, exact in oracle.reference64(base, [(a, 1.0) for a in adapters]).items():
        ours, theirs = (oracle.errors_against(t[name], exact) for t in (found, expected))
        assert ours[0] <= theirs[0], name
        assert ours[1] < 0.9 * theirs[1], name
    forward = oracle.peft_logits(base, *adapters)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < 2e-2


def test_dora_after_lora_uses_the_norm_of_the_unmerged_base(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    a, b = _adapters(tmp_path, base, {}, {"use_dora": True})
    merged(a, tmp_path / "out", "--base", base.path, "--adapter", b)
    forward = oracle.peft_logits(base, a, b)
    said = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(said, forward) < 4e-6


def test_two_adapters_that_replace_one_module_are_refused(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    a, b = _adapters(tmp_path, base, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]})
    before = oracle.listing(tmp_path)
    ran = run("merge-lora", a, tmp_path / "out", "--base", base.path, "--adapter", b)
    assert ran.code == 3
    assert "lm_head" in ran.text
    assert oracle.listing(tmp_path) == before


@pytest.mark.parametrize("weights", [["0.5"], ["1", "2", "3"]], ids=["too-few", "too-many"])
def test_another_number_of_weights_than_of_adapters_is_a_usage_error(weights: list[str], tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base")
    a, b = _adapters(tmp_path, base, {}, {})
    before = oracle.listing(tmp_path)
    flags = [flag for w in weights for flag in ("--weight", w)]
    ran = run("merge-lora", a, tmp_path / "out", "--base", base.path, "--adapter", b, *flags)
    assert ran.code == 2
    assert oracle.listing(tmp_path) == before
