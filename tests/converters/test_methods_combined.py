"""`--combine`: several adapters made into one, against PEFT's own `add_weighted_adapter` and its merge."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import oracle
from oracle.bare_adapters import BARE
from oracle.bases import Base, quiet, read_tensors
from oracle.command import merged, run
from oracle.expected import one_thread

WEIGHTS = (0.7, -0.4)
DENSE = {"ties", "magnitude_prune"}


def combined_by_peft(base: Base, adapters: Sequence[Path], how: str, folder: Path, **more: Any) -> dict[str, Any]:
    """The merge of what `add_weighted_adapter` makes of the adapters."""
    import peft

    with quiet(), one_thread():
        wrapped = peft.PeftModel.from_pretrained(base.load(), adapters[0], adapter_name="first")
        wrapped.load_adapter(adapters[1], adapter_name="second")
        wrapped.add_weighted_adapter(["first", "second"], list(WEIGHTS), "made", combination_type=how, **more)
        wrapped.merge_and_unload(adapter_names=["made"]).save_pretrained(folder)
    return read_tensors(folder)


def two(tmp_path: Path, family: str, dtype: str, ranks: tuple[int, int]) -> tuple[Base, list[Path]]:
    base = oracle.make_base(tmp_path / "base", family, dtype=dtype)
    made = [oracle.make_adapter(tmp_path / f"a{n}", base, seed=n, r=r, lora_alpha=5) for n, r in enumerate(ranks)]
    return base, made


def arguments(base: Base, adapters: Sequence[Path], out: Path, *more: object) -> list[object]:
    weights = [w for weight in WEIGHTS for w in ("--weight", weight)]
    return [adapters[0], out, "--adapter", adapters[1], "--base", base.path, *weights, *more]


CASES = {
    "cat": ("llama", "bfloat16", (3, 5), {}),
    "linear": ("gpt2", "float32", (3, 3), {}),
    "svd": ("llama", "float32", (3, 2), {}),
    "ties": ("llama", "bfloat16", (3, 3), {"density": 0.6}),
    "magnitude_prune": ("llama", "float32", (3, 3), {"density": 0.4}),
}


@pytest.mark.parametrize("how", CASES)
def test_a_combination_is_pefts_to_the_bit(how: str, tmp_path: Path) -> None:
    family, dtype, ranks, settings = CASES[how]
    base, adapters = two(tmp_path, family, dtype, ranks)
    expected = combined_by_peft(base, adapters, how, tmp_path / "theirs", **settings)
    more = [x for key, value in settings.items() for x in (f"--{key}", value)]
    out = tmp_path / "out"
    merged(*arguments(base, adapters, out, "--combine", how, "--numerics", "peft", *more))
    oracle.same_bits(read_tensors(out), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_combination_is_near_pefts_in_best_numerics(how: str, family: str, tmp_path: Path) -> None:
    ranks, settings = CASES[how][2:]
    base, adapters = two(tmp_path, family, "float32", ranks)
    expected = combined_by_peft(base, adapters, how, tmp_path / "theirs", **settings)
    more = [x for key, value in settings.items() for x in (f"--{key}", value)]
    merged(*arguments(base, adapters, tmp_path / "out", "--combine", how, *more))
    for name, value in read_tensors(tmp_path / "out").items():
        assert torch.allclose(value, expected[name], atol=2e-6), name


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties"])
def test_dare_draws_from_the_seed_and_the_tensors_name_as_pefts_own_function_does(how: str, tmp_path: Path) -> None:
    """PEFT draws from torch's one generator, layer after layer; here each tensor has a seed of its own."""
    from peft.utils import merge_utils

    base, adapters = two(tmp_path, "llama", "float32", (3, 3))
    options = ("--combine", how, "--density", 0.5, "--seed", 9, "--numerics", "peft")
    merged(*arguments(base, adapters, tmp_path / "out", *options))
    merged(*arguments(base, adapters, tmp_path / "again", *options))
    found = read_tensors(tmp_path / "out")
    oracle.same_bits(read_tensors(tmp_path / "again"), found)
    name = "model.layers.1.mlp.up_proj"
    held = [oracle.adapters.adapter_tensors(a) for a in adapters]
    factors = [[t[f"base_model.model.{name}.lora_{side}.weight"] for t in held] for side in "AB"]
    roots = [abs(w * 5 / 3) ** 0.5 for w in WEIGHTS]
    torch.manual_seed(zlib.crc32(f"9 {name}.weight".encode()))
    a = getattr(merge_utils, how)(factors[0], torch.tensor([roots[0], -roots[1]]), 0.5)
    b = getattr(merge_utils, how)(factors[1], torch.tensor(roots), 0.5)
    assert torch.equal(found[f"{name}.weight"], read_tensors(base.path)[f"{name}.weight"] + b @ a)


def test_the_exact_sum_is_what_cat_and_negative_weights_mean(tmp_path: Path) -> None:
    base, adapters = two(tmp_path, "llama", "float32", (3, 5))
    merged(*arguments(base, adapters, tmp_path / "sum"))
    merged(*arguments(base, adapters, tmp_path / "cat", "--combine", "cat"))
    exact = oracle.reference64(base, list(zip(adapters, WEIGHTS, strict=True)))
    summed, laid = read_tensors(tmp_path / "sum"), read_tensors(tmp_path / "cat")
    for name, reference in exact.items():
        assert torch.equal(summed[name], oracle.rounded(reference, torch.float32)), name
        assert torch.allclose(laid[name], summed[name], atol=1e-7), name


def test_adapters_of_different_methods_and_ranks_are_one_sum(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    names = ("vera", "delora", "shira")
    folders = [BARE[name].write(tmp_path / name) for name in names]
    alone = []
    for name, folder in zip(names, folders, strict=True):
        merged(folder, tmp_path / f"{name}-out", "--base", base.path)
        alone.append(read_tensors(tmp_path / f"{name}-out"))
    more = [x for folder in folders[1:] for x in ("--adapter", folder)]
    merged(folders[0], tmp_path / "out", *more, "--base", base.path)
    key = "model.layers.0.self_attn.q_proj.weight"
    before = read_tensors(base.path)[key].double()
    total = before + sum(a[key].double() - before for a in alone)
    assert torch.allclose(read_tensors(tmp_path / "out")[key].double(), total, atol=3e-6)


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (("--combine", "ties"), "needs --density", 2),
        (("--combine", "ties", "--density", "1.5"), "above 0 and at most 1", 2),
        (("--combine", "linear", "--density", "0.5"), "has no use", 2),
        (("--combine", "linear", "--svd-rank", "4"), "--svd-rank", 2),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    options: tuple[str, ...], words: str, code: int, tmp_path: Path
) -> None:
    base, adapters = two(tmp_path, "llama", "float32", (3, 3))
    ran = run("merge-lora", *arguments(base, adapters, tmp_path / "out", *options))
    assert ran.code == code
    assert words in ran.text
    assert not (tmp_path / "out").exists()


def test_factors_of_different_ranks_are_not_added_element_by_element(tmp_path: Path) -> None:
    base, adapters = two(tmp_path, "llama", "float32", (3, 4))
    ran = run("merge-lora", *arguments(base, adapters, tmp_path / "out", "--combine", "linear"))
    assert ran.code == 3
    assert "[3, 4]" in ran.text


def test_only_plain_lora_has_factors_to_combine(tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", "llama")
    first, second = (BARE[n].write(tmp_path / n) for n in ("vera", "shira"))
    ran = run("merge-lora", first, tmp_path / "out", "--adapter", second, "--base", base.path, "--combine", "linear")
    assert ran.code == 3
    assert "this is VeRA" in ran.text
