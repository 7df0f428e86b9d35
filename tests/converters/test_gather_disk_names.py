"""A gathered model has the names that transformers' own save writes, and loads with nothing missing or unexpected.

The state is `module.state_dict()` of a live model, which is what DeepSpeed's stages 0 to 2 put into the model file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from converter.core.checkpoint import Checkpoint, Origin
from converter.core.context import Context
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Filled, Stored
from converter.errors import Refused
from converter.families.disk_names import with_disk_names
from oracle.bases import _randomise, quiet, read_tensors, write_tensors
from oracle.families import CASES, EXPERTS, RENAMED
from small_models import open_model
from zero.compare import differences, evaluated

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers


def _live(name: str, auto: str | None = None) -> Any:
    case = CASES[name]
    with quiet():
        torch.manual_seed(0)
        model = getattr(transformers, auto or case.auto).from_config(case.config(), dtype=torch.float32)
        _randomise(model, 0)
        model.config.architectures = [type(model).__name__]
    return model


def _on_disk(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The model's state by its names on disk, through what `gather` calls; what is tied is there once."""
    folder.mkdir(parents=True)
    tied = set(model.all_tied_weights_keys or {})
    write_tensors(folder, {n: t.clone() for n, t in model.state_dict().items() if n not in tied})
    (folder / "config.json").write_text(model.config.to_json_string(use_diff=False))
    return evaluated(with_disk_names(open_model(folder), Context()).tensors)


def _loads(model: Any, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """transformers loads the tensors by these names: all, no others, and with the same values."""
    folder.mkdir()
    write_tensors(folder, tensors)
    model.config.save_pretrained(folder)
    with quiet():
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert differences(again.state_dict(), model.state_dict()) == []


@pytest.mark.parametrize("name", [*RENAMED, *EXPERTS])
def test_names_and_values_are_those_that_a_save_writes_and_they_load(tmp_path: Path, name: str) -> None:
    model = _live(name)
    ours = _on_disk(model, tmp_path / "memory")
    assert ours.keys() != model.state_dict().keys(), "nothing is renamed: the family proves nothing"
    with quiet():
        model.save_pretrained(tmp_path / "saved")
    assert differences(ours, read_tensors(tmp_path / "saved")) == []
    _loads(model, ours, tmp_path / "ours")


def test_stacked_experts_are_slices_of_the_same_bytes(tmp_path: Path) -> None:
    model = _live("mixtral")
    _on_disk(model, tmp_path / "memory")
    found = with_disk_names(open_model(tmp_path / "memory"), Context()).tensors
    expert = found["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    assert isinstance(expert, Stored) and expert.info.shape == (88, 48)


def test_the_tables_stacks_are_all_along_the_first_dimension_and_pairs_along_the_next() -> None:
    from transformers import conversion_mapping

    table = conversion_mapping._build_checkpoint_conversion_mapping()
    converters = [t for each in table.values() for t in each if hasattr(t, "operations")]
    dims = {tuple((type(o).__name__, getattr(o, "dim", None)) for o in t.operations) for t in converters}
    stacks = {d for d in dims if "+".join(n for n, _ in d) in ("MergeModulelist", "MergeModulelist+Concatenate")}
    assert stacks == {(("MergeModulelist", 0),), (("MergeModulelist", 0), ("Concatenate", 1))}


def test_tensors_that_a_load_changes_under_their_own_name_are_refused() -> None:
    config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    found = _named([name], config)
    with pytest.raises(Refused) as caught:
        with_disk_names(found, Context())
    assert caught.value.code == "layout-unknown" and name in caught.value.what


def _named(names: Iterable[str], config: dict[str, Any]) -> Checkpoint:
    tensors = {n: Filled(TensorInfo(DType.F32, (1,)), 0) for n in names}
    return Checkpoint(tensors=tensors, config=config, origin=Origin("model", "/x", "x", "x", None, "", ""))


@pytest.mark.parametrize("name", ["qwen3", "bert", "t5", "bart", "gpt_neo", "distilbert", "falcon"])
def test_families_with_one_set_of_names_keep_them(name: str) -> None:
    model = _live(name)
    found = with_disk_names(_named(model.state_dict(), model.config.to_dict()), Context())
    assert list(found.tensors) == list(model.state_dict())


@pytest.mark.parametrize("name", ["llava", "mixtral", "gpt_neox"])
def test_names_that_are_those_on_disk_already_are_kept(tmp_path: Path, name: str) -> None:
    model = _live(name)
    names = list(_on_disk(model, tmp_path / "memory"))
    found = with_disk_names(_named(names, model.config.to_dict()), Context())
    assert list(found.tensors) == names


def test_a_class_that_transformers_does_not_have_keeps_its_names() -> None:
    for config in ({}, {"architectures": None}, {"architectures": ["Own"]}, {"architectures": [3]}):
        found = _named(["language_model.x.weight"], config)
        assert with_disk_names(found, Context()) is found
