"""The same folders, broken: each way of breaking them is named on each of eight architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from healthy.findings import codes
from healthy.models import Saved
from healthy.shrink import build
from oracle.bases import edit_config, read_tensors, write_tensors

Tensors = dict[str, torch.Tensor]

REWARD = ("llama", "qwen2", "gemma2", "gpt2", "gpt_neox", "opt", "bloom", "bert")
CAUSAL = ("llama", "qwen3_moe", "gpt2", "gpt_neox", "opt", "bloom", "falcon", "deepseek_v4")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Sound models, each made once; tests break a copy of their tensors."""
    root, made = tmp_path_factory.mktemp("sound"), dict[tuple[str, str], Path]()

    def one(task: str, kind: str) -> Path:
        if (task, kind) not in made:
            more = (("tie_word_embeddings", False),) if task == "causal" else ()
            made[task, kind] = Saved(task, kind, more=more).write(root / f"{task}-{kind}")
        return made[task, kind]

    return one


def broken(source: Path, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    write_tensors(folder, change(read_tensors(source)))
    return folder


def without(names: set[str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if n not in names}


@pytest.mark.parametrize("kind", REWARD)
def test_a_broken_reward_model_is_named(kind: str, sound: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = sound("seqcls", kind)
    assert codes(source, deep=True) == []
    body = f"{type(build('seqcls', kind)).base_model_prefix}."
    head = {n for n in read_tensors(source) if not n.startswith(body)}
    layers = {n for n in read_tensors(source) if ".1." in n}
    breaks: dict[str, Callable[[Tensors], Tensors]] = {
        "head-missing": without(head),
        "zero3-empty-tensors": lambda t: {n: v.new_empty(0) if n in head else v for n, v in t.items()},
        "names-wrapped": lambda t: {f"_orig_mod.{n}": v for n, v in t.items()},
        "layers-missing": without(layers),
        "names-doubled": lambda t: {f"{body}{body}{n}" if n not in head else n: v for n, v in t.items()},
        "labels-mismatch": lambda t: {n: torch.cat([v, v]) if n in head else v for n, v in t.items()},
        "nonfinite": lambda t: {n: v * float("nan") if n in layers else v for n, v in t.items()},
        "zero-tensors": lambda t: {n: v * 0 if n in layers else v for n, v in t.items()},
    }
    for code, change in breaks.items():
        assert code in codes(broken(source, tmp_path / code, change), deep=True), code
    renamed = {"head-named-otherwise", "head-missing"}
    folder = broken(source, tmp_path / "renamed", lambda t: {f"v_head.{n}" if n in head else n: t[n] for n in t})
    assert renamed & set(codes(folder))


@pytest.mark.parametrize("kind", CAUSAL)
def test_a_broken_language_model_is_named(kind: str, sound: Callable[[str, str], Path], tmp_path: Path) -> None:
    source = sound("causal", kind)
    assert codes(source, deep=True) == []
    tensors = read_tensors(source)
    output = {n for n in tensors if n in ("lm_head.weight", "embed_out.weight", "head.weight")}
    assert len(output) == 1
    breaks: dict[str, Callable[[Tensors], Tensors]] = {
        "output-embedding-missing": without(output),
        "vocabulary-rows": lambda t: {n: torch.cat([v, v[:5]]) if len(v) == 99 else v for n, v in t.items()},
        "zero3-empty-tensors": lambda t: {n: v.new_empty(0) if ".1." in n else v for n, v in t.items()},
        "layers-missing": without({n for n in tensors if ".1." in n}),
    }
    for code, change in breaks.items():
        assert code in codes(broken(source, tmp_path / code, change)), code


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_a_shard_that_is_cut_or_missing_is_named(kind: str, tmp_path: Path) -> None:
    from healthy.models import _sharded

    folder = Saved("causal", kind, _sharded).write(tmp_path / "model")
    assert codes(folder, deep=True) == []
    shards = sorted(folder.glob("*.safetensors"))
    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[:-7])
    assert codes(folder) == ["file-truncated"]
    shards[1].unlink()
    assert "shard-missing" in codes(folder)
    # Somebody makes a new index of what is there: only the config still knows how many layers there were.
    shards[1].write_bytes(whole)
    tensors = {n: t for n, t in read_tensors(folder).items() if ".h.1." not in n and ".layers.1." not in n}
    write_tensors(folder, tensors)
    assert codes(folder) == ["layers-missing"]
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, **{k: 1 for k in ("num_hidden_layers", "n_layer") if k in config})
    assert codes(folder) == []
