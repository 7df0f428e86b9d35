"""Adapters one over the other, and bases that bring code of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

import oracle
from oracle.bases import Base, edit_config
from oracle.command import merged

FAMILIES = ["llama", "gpt2", "gpt_neox"]


def _chain(folder: Path, family: str) -> tuple[Base, Path, Path]:
    """A base, an SFT adapter, and a DoRA that was trained over the two merged."""
    base = oracle.make_base(folder / "base", family)
    sft = oracle.make_adapter(folder / "sft", base, seed=1)
    merged(sft, folder / "sft-merged", "--base", base.path)
    second = Base(folder / "sft-merged", family, tied=base.tied)
    dora = oracle.make_adapter(folder / "dora", second, seed=2, use_dora=True)
    return base, sft, dora


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_over_a_merged_sft_is_merged_in_order(family: str, tmp_path: Path) -> None:
    """In one pass as in two: its norm is that of the merged weights, over which it was trained."""
    base, sft, dora = _chain(tmp_path, family)
    merged(dora, tmp_path / "two", "--base", tmp_path / "sft-merged")
    ran = merged(sft, tmp_path / "one", "--base", base.path, "--adapter", dora)
    oracle.same_bits(oracle.read_tensors(tmp_path / "one"), oracle.read_tensors(tmp_path / "two"))
    assert "merged one into the result of another" in ran.text


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_over_the_same_base_is_merged_as_peft_does(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    a = oracle.make_adapter(tmp_path / "a", base, seed=1)
    b = oracle.make_adapter(tmp_path / "b", base, seed=2, use_dora=True)
    merged(a, tmp_path / "out", "--base", base.path, "--adapter", b, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), oracle.peft_merge(base, a, b))


@pytest.mark.parametrize("family", FAMILIES)
def test_code_that_stays_behind_is_named_with_the_option_that_keeps_it(family: str, tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", family)
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    (base.path / "modeling_own.py").write_text("class Own: ...\n", encoding="utf-8")
    edit_config(base.path, "config.json", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    ran = merged(adapter, tmp_path / "out", "--base", base.path)
    assert "modeling_own.py" in ran.text and "--keep-code" in ran.text
    assert "python -c" not in ran.text
    ran = merged(adapter, tmp_path / "kept", "--base", base.path, "--keep-code")
    assert "stays behind" not in ran.text
    assert (tmp_path / "kept" / "modeling_own.py").is_file()
