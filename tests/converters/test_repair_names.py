"""A model under its names in memory gets those that transformers' own save writes, proved by that save, bit by bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from converter.families.disk_names import memory_form
from oracle.bases import _randomise, quiet, read_tensors, write_tensors
from oracle.families import CASES, EXPERTS, RENAMED
from small_models import open_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

Tensors = dict[str, torch.Tensor]
CODES = {"names-in-memory", "experts-twice"}


SOME = ("llava", "qwen2_5_vl", "mixtral", "deepseek_v3")
EVERY = [n if n in SOME else pytest.param(n, marks=pytest.mark.slow) for n in (*RENAMED, *EXPERTS)]


def _live(name: str) -> Any:
    with quiet():
        torch.manual_seed(0)
        model = getattr(transformers, CASES[name].auto).from_config(CASES[name].config(), dtype=torch.float32)
        _randomise(model, 0)
        model.config.architectures = [type(model).__name__]
    return model


def _in_memory(model: Any) -> Tensors:
    tied = set(model.all_tied_weights_keys or {})
    return {n: t.clone() for n, t in model.state_dict().items() if n not in tied}


def _folder(model: Any, tensors: Tensors, folder: Path) -> Path:
    folder.mkdir()
    with quiet():
        model.config.save_pretrained(folder)
    write_tensors(folder, tensors)
    return folder


def _saved(model: Any, folder: Path) -> Tensors:
    with quiet():
        model.save_pretrained(folder)
    return read_tensors(folder)


def _same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _codes(folder: Path, **asked: Any) -> dict[str, str]:
    return {f.code: f.severity for f in examine(DoctorRequest(str(folder), **asked)).findings if f.code in CODES}


def _loads(model: Any, folder: Path) -> None:
    with quiet():
        again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert _same(dict(again.state_dict()), dict(model.state_dict()))
    if "ForCausalLM" in type(model).__name__:
        ids = torch.arange(5, 17)[None]
        with quiet(), torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("name", EVERY)
def test_what_transformers_saves_is_not_reported(tmp_path: Path, name: str) -> None:
    model = _live(name)
    _saved(model, tmp_path / "saved")
    assert _codes(tmp_path / "saved") == {}
    assert _codes(tmp_path / "saved", target="transformers@4") == {}
    with quiet():
        type(model).from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "again")
    assert _codes(tmp_path / "again") == {}


@pytest.mark.parametrize("name", ["qwen3", "bert", "t5"])
def test_families_with_one_set_of_names_are_not_reported(tmp_path: Path, name: str) -> None:
    _saved(_live(name), tmp_path / "saved")
    assert _codes(tmp_path / "saved", target="transformers@4") == {}


@pytest.mark.parametrize("name", EVERY)
def test_a_state_dict_becomes_what_a_save_writes_and_loads_with_nothing_missing(tmp_path: Path, name: str) -> None:
    model = _live(name)
    folder = _folder(model, _in_memory(model), tmp_path / "memory")
    found = [f for f in examine(DoctorRequest(str(folder))).findings if f.code in CODES]
    assert [f.code for f in found] == ["names-in-memory"]
    assert found[0].fix == ("fix-disk-names",) and found[0].recoverability == "here"
    assert str(found[0].next) == f"rlhf-convert repair {folder} {folder}-fixed"
    assert _codes(folder, target="transformers@4") == {"names-in-memory": "error"}
    assert main(["repair", str(folder), f"{folder}-fixed", "-q"]) == 0
    out = Path(f"{folder}-fixed")
    assert _same(read_tensors(out), _saved(model, tmp_path / "saved"))
    _loads(model, out)
    assert _codes(out) == {}


def _halves(memory: Tensors, disk: Tensors, form: Any, chosen: Callable[[int, str], bool]) -> Tensors:
    """A mixture: the tensors that are chosen under their names in memory, the others as on disk."""
    made = dict(disk)
    for number, (name, on_disk) in enumerate(form.renamed.items()):
        if chosen(number, name):
            made.pop(on_disk, None)
            made[name] = memory[name]
    for number, (name, parts) in enumerate(form.apart.items()):
        if chosen(number, name):
            made = {n: t for n, t in made.items() if n not in parts} | {name: memory[name]}
    return made


@pytest.mark.parametrize(
    "chosen",
    [lambda i, n: i % 2 == 0, lambda i, n: "vis" in n or ".1." in n],
    ids=["every second", "a tower or a layer"],
)
@pytest.mark.parametrize("name", EVERY)
def test_mixed_names_become_those_of_a_save(tmp_path: Path, name: str, chosen: Callable[[int, str], bool]) -> None:
    model = _live(name)
    memory, disk = _in_memory(model), _saved(model, tmp_path / "saved")
    whole = open_model(_folder(model, memory, tmp_path / "memory"))
    form = memory_form(whole.tensors, whole.config)
    assert form is not None
    mixed = _halves(memory, disk, form, chosen)
    folder = _folder(model, mixed, tmp_path / "mixed")
    if mixed.keys() == disk.keys():
        pytest.skip("nothing of this family is in what was chosen")
    assert _codes(folder)
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 0
    assert _same(read_tensors(tmp_path / "out"), disk)
    _loads(model, tmp_path / "out")


@pytest.mark.parametrize("name", [n for n in EVERY if n not in ("gpt_neox", "vit")])
def test_both_forms_are_one_where_equal_and_refused_where_not(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _live(name)
    memory, disk = _in_memory(model), _saved(model, tmp_path / "saved")
    folder = _folder(model, {**disk, **memory}, tmp_path / "both")
    codes = _codes(folder)
    assert set(codes.values()) == {"error"}
    assert ("experts-twice" in codes) == (name in EXPERTS or name == "phimoe")
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 0
    assert _same(read_tensors(tmp_path / "out"), disk)
    changed = next(n for n in reversed(memory) if n not in disk)
    other = {**disk, **memory, changed: memory[changed] + 1}
    folder = _folder(model, other, tmp_path / "differ")
    assert main(["repair", str(folder), str(tmp_path / "again")]) == 3
    assert "names-in-memory" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_some_experts_one_by_one_and_all_of_them_stacked_are_kept_once(tmp_path: Path) -> None:
    model = _live("mixtral")
    memory, disk = _in_memory(model), _saved(model, tmp_path / "saved")
    some = {n: t for n, t in disk.items() if ".experts.1." in n}
    folder = _folder(model, {**memory, **some}, tmp_path / "some")
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 0
    assert _same(read_tensors(tmp_path / "out"), disk)


@pytest.mark.parametrize("name", ["qwen2_vl", "mixtral"])
def test_wrappers_a_wrapped_class_and_names_in_memory_are_fixed_in_one_pass(tmp_path: Path, name: str) -> None:
    model = _live(name)
    disk = _saved(model, tmp_path / "saved")
    wrapped = {f"module._orig_mod.{n}": t for n, t in _in_memory(model).items()}
    folder = _folder(model, wrapped, tmp_path / "memory")
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [f"FSDP{type(model).__name__}"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 0
    assert _same(read_tensors(tmp_path / "out"), disk)
    _loads(model, tmp_path / "out")


def test_stacks_whose_form_no_file_records_are_left_as_they_are(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_local_experts=2, vocab_size=32, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    with quiet():
        transformers.GptOssForCausalLM(config).save_pretrained(tmp_path / "saved")
    assert _codes(tmp_path / "saved") == {}
