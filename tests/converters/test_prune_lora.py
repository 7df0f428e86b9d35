"""`prune-lora` against PEFT's merge before and after: what is left out is the tail of the update's singular values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import converter
import oracle
from converter.errors import Refused, UsageError
from oracle.bases import Base, edit_config


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    """Ranks 8, 6 and 2, an alpha of its own, scales by the root of the rank; the embedding is adapted too."""
    folder = tmp_path_factory.mktemp("prune")
    base = oracle.make_base(folder / "base", "llama")
    settings: dict[str, Any] = {"rank_pattern": {"q_proj": 6, "v_proj": 2}, "alpha_pattern": {"v_proj": 7}}
    targets = [*base.targets, "embed_tokens"]
    return base, oracle.make_adapter(folder / "adapter", base, r=8, use_rslora=True, target_modules=targets, **settings)


def updates(base: Base, merged: dict[str, Any]) -> dict[str, Any]:
    before = oracle.read_tensors(base.path)
    return {n: t.double() - before[n].double() for n, t in merged.items() if not torch.equal(t, before[n])}


def test_peft_merges_it_to_the_best_update_of_that_rank(adapter: tuple[Base, Path], tmp_path: Path) -> None:
    base, path = adapter
    converter.prune_lora(path, tmp_path / "out", rank=4)
    whole, pruned = (
        updates(base, oracle.peft_merge(base, path)),
        updates(base, oracle.peft_merge(base, tmp_path / "out")),
    )
    said = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())["tensors"]
    assert sorted(pruned) == sorted(whole)
    for name, update in whole.items():
        u, values, v = torch.linalg.svd(update, full_matrices=False)
        best = u[:, :4] * values[:4] @ v[:4]
        assert float((pruned[name] - best).norm() / update.norm()) < 1e-6, name
        part = "lora_embedding_B" if "embed" in name else "lora_B.weight"
        measured = said.get(f"base_model.model.{name.removesuffix('.weight')}.{part}")
        if "v_proj" in name:
            assert measured is None  # its rank is 2 already: copied
        else:
            kept = float(values[:4].square().sum() / values.square().sum())
            assert measured["energy_kept"] == pytest.approx(kept, rel=1e-5)


def test_only_plain_lora_of_a_larger_rank_is_pruned(adapter: tuple[Base, Path], tmp_path: Path) -> None:
    base, path = adapter
    dora = oracle.make_adapter(tmp_path / "dora", base, use_dora=True)
    shutil.copytree(path, tmp_path / "pissa")
    edit_config(tmp_path / "pissa", "adapter_config.json", init_lora_weights="pissa")
    shutil.copytree(path, tmp_path / "wrong")
    edit_config(tmp_path / "wrong", "adapter_config.json", r=9)
    for source, rank, code in (
        (path, 8, "no-op"),
        (dora, 2, "not-plain-lora"),
        (base.path, 2, "not-an-adapter"),
        (tmp_path / "pissa", 2, "adapter-base-moved"),
        (tmp_path / "wrong", 2, "adapter-rank"),
    ):
        with pytest.raises(Refused) as refused:
            converter.prune_lora(source, tmp_path / "out", rank=rank)
        assert refused.value.code == code, source
    with pytest.raises(UsageError):
        converter.prune_lora(path, tmp_path / "out", rank=0)
    assert not (tmp_path / "out").exists()


def test_an_adapter_whose_config_does_not_target_what_it_holds_is_not_written(
    adapter: tuple[Base, Path], tmp_path: Path
) -> None:
    shutil.copytree(adapter[1], tmp_path / "adapter")
    edit_config(tmp_path / "adapter", "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(Refused) as refused:
        converter.prune_lora(tmp_path / "adapter", tmp_path / "out", rank=4)
    assert refused.value.code == "adapter-untargeted"
