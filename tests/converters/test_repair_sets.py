"""Several sets of weight files in one folder: the one that alone covers what config.json implies is taken, or none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine

SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PT = {"format": "pt"}
Tensors = dict[str, torch.Tensor]
Change = Callable[[Path, Tensors, Tensors], object]


def _model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets") / "lm"
    _model(0).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "lm")


@pytest.fixture(scope="module")
def other() -> Tensors:
    """A save of another step: the same names and shapes, other values."""
    return {n: t.clone() for n, t in _model(1).state_dict().items()}


def whole(folder: Path) -> Tensors:
    """The tensors of the sound file, in memory: it will be overwritten."""
    return {n: t.clone() for n, t in load_file(folder / WHOLE).items()}


def shards(folder: Path, tensors: Tensors, total: int, *, index: bool = False) -> list[Path]:
    """Write tensors as shards of a total, in order, with or without an index."""
    names, files = list(tensors), []
    weight_map = {}
    for n in range(total):
        file = folder / f"model-{n + 1:05d}-of-{total:05d}.safetensors"
        part = {k: tensors[k].contiguous() for k in names[n * len(names) // total : (n + 1) * len(names) // total]}
        save_file(part, file, metadata=PT)
        weight_map |= dict.fromkeys(part, file.name)
        files.append(file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def cut(file: Path, by: int = 9) -> None:
    file.write_bytes(file.read_bytes()[:-by])


def _stale_index(f: Path, good: Tensors, bad: Tensors) -> None:
    (f / WHOLE).unlink()
    shards(f, bad, 3, index=True)[1].unlink()
    shards(f, good, 2)


def _bins_beside(f: Path, good: Tensors, bad: Tensors) -> None:
    shards(f, bad, 3, index=True)
    (f / WHOLE).unlink()
    cut(f / "model-00003-of-00003.safetensors")
    names = list(good)
    for n in range(2):
        part = {k: good[k] for k in names[n::2]}
        torch.save(part, f / f"pytorch_model-0000{n + 1}-of-00002.bin")
    weight_map = {k: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, k in enumerate(names)}
    (f / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _smaller_model(f: Path, good: Tensors, bad: Tensors) -> None:
    """What loaders read is whole by itself, and of a model with other sizes than the config's."""
    shards(f, good, 2)
    save_file({n: torch.ones([s // 2 for s in t.shape]) for n, t in bad.items()}, f / WHOLE, metadata=PT)


ALONE: dict[str, Change] = {
    "a whole file that is cut, beside shards": lambda f, g, b: (shards(f, g, 2), cut(f / WHOLE)),
    "a whole file of another size of model": _smaller_model,
    "a whole file that lacks a layer": lambda f, g, b: (
        shards(f, g, 2, index=True),
        save_file({n: t for n, t in b.items() if "layers.2." not in n}, f / WHOLE, metadata=PT),
    ),
    "a whole file that lacks one norm": lambda f, g, b: (
        shards(f, g, 2, index=True),
        save_file({n: t for n, t in b.items() if n != "model.norm.weight"}, f / WHOLE, metadata=PT),
    ),
    "a stale index of another total": _stale_index,
    "two totals without an index, one lacking a file": lambda f, g, b: (
        (f / WHOLE).unlink(),
        shards(f, g, 2),
        shards(f, b, 3)[0].unlink(),
    ),
    "two totals without an index, one with a file that is cut": lambda f, g, b: (
        (f / WHOLE).unlink(),
        shards(f, g, 3),
        cut(shards(f, b, 2)[0]),
    ),
    "an index that can not be read": lambda f, g, b: (
        (f / WHOLE).unlink(),
        shards(f, b, 3)[2].unlink(),
        shards(f, g, 2),
        (f / INDEX).write_text("{"),
    ),
    "pickles beside shards that are cut": _bins_beside,
    "one pickle beside a pointer": lambda f, g, b: (
        torch.save(g, f / "pytorch_model.bin"),
        (f / WHOLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ),
    "wrapped names in the whole set": lambda f, g, b: (
        shards(f, {f"module._orig_mod.{n}": t for n, t in g.items()}, 2),
        cut(f / WHOLE),
    ),
}


@pytest.mark.parametrize("name", ALONE)
def test_the_set_that_alone_covers_the_config_is_written_and_nothing_is_deleted(
    folder: Path, other: Tensors, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = whole(folder)
    ALONE[name](folder, good, other)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    report = examine(DoctorRequest(str(folder)))
    found = [f for f in report.findings if f.severity == "error" and not f.code.startswith("names-")]
    assert [f.code for f in found] == ["weight-sets"]
    assert found[0].fix == ("choose-weights",) and found[0].recoverability == "here"
    assert str(found[0].next) == f"rlhf-convert repair {folder} {folder}-fixed"
    assert main(["repair", str(folder), f"{folder}-fixed"]) == 0
    screen = capsys.readouterr()
    assert "is taken: 30 tensors, all that config.json implies" in " ".join((screen.out + screen.err).split())
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    out = Path(f"{folder}-fixed")
    written = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    assert written.keys() == good.keys() and all(torch.equal(written[n], good[n]) for n in good)
    assert sum(len(load_file(p)) for p in out.glob("*.safetensors")) == len(good)
    receipt = json.loads((out / "rlhf-convert.json").read_text())
    assert "is taken: 30 tensors" in json.dumps(receipt["notes"])
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(loaded.state_dict()[n], good[n]) for n in good)
    assert examine(DoctorRequest(str(out))).worst() in (None, "cosmetic")


@pytest.mark.parametrize("verb", [["reshard"], ["convert", "--to", "trl"]])
def test_other_verbs_refuse_and_name_the_repair(
    folder: Path, other: Tensors, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ALONE["a stale index of another total"](folder, whole(folder), other)
    assert main([verb[0], str(folder), str(folder.parent / "out"), *verb[1:]]) == 3
    error = capsys.readouterr().err
    assert "weight-sets" in error and f"rlhf-convert repair {folder}" in error


BOTH: dict[str, Change] = {
    "a whole file and shards": lambda f, g, b: shards(f, b, 2, index=True),
    "two totals": lambda f, g, b: ((f / WHOLE).unlink(), shards(f, b, 2), shards(f, g, 3)),
    "an index of one and shards of another": lambda f, g, b: (
        (f / WHOLE).unlink(),
        shards(f, b, 2, index=True),
        shards(f, g, 3),
    ),
    "a pickle beside": lambda f, g, b: torch.save(b, f / "pytorch_model.bin"),
    "both beside a file that is cut": lambda f, g, b: (
        shards(f, b, 2),
        torch.save(g, f / "pytorch_model.bin"),
        cut(f / WHOLE),
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_two_sets_that_cover_it_with_different_values_are_a_question(
    folder: Path, other: Tensors, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = whole(folder)
    BOTH[name](folder, good, other)
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out)]) == 2
    error = capsys.readouterr().err
    choices = [w.removesuffix(",") for w in error.partition("--set ")[2].replace("# or --set", "").split()][:2]
    assert "different values" in error and not out.exists() and len(choices) == 2
    made = []
    for n, choice in enumerate(choices):
        assert main(["repair", str(folder), f"{out}{n}", "--set", choice, "-q"]) == 0
        made.append({k: t for p in Path(f"{out}{n}").glob("*.safetensors") for k, t in load_file(p).items()})
    for want in (good, other):
        assert any(m.keys() == want.keys() and all(torch.equal(m[k], want[k]) for k in m) for m in made)


@pytest.mark.parametrize("name", BOTH)
def test_two_sets_with_equal_values_are_one_and_the_one_that_loaders_read_is_written(folder: Path, name: str) -> None:
    good = whole(folder)
    BOTH[name](folder, good, good)
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out), "-q"]) == 0
    written = {n: t for p in out.glob("*.safetensors") for n, t in load_file(p).items()}
    assert written.keys() == good.keys() and all(torch.equal(written[n], good[n]) for n in good)
    assert json.loads((out / "rlhf-convert.json").read_text())["notes"]


NEITHER: dict[str, Change] = {
    "both cut": lambda f, g, b: (cut(shards(f, b, 2)[0]), cut(f / WHOLE)),
    "both lack a layer": lambda f, g, b: (
        shards(f, {n: t for n, t in g.items() if "layers.1." not in n}, 2),
        save_file({n: t for n, t in b.items() if "layers.2." not in n}, f / WHOLE, metadata=PT),
    ),
    "one of another size, one cut": lambda f, g, b: (
        save_file({n: t.repeat([2] * t.dim()) for n, t in b.items()}, f / "pytorch.tmp", metadata=PT),
        (f / "pytorch.tmp").rename(f / WHOLE),
        cut(shards(f, g, 2)[1]),
    ),
}


@pytest.mark.parametrize("name", NEITHER)
def test_where_no_set_covers_it_the_refusal_names_what_each_lacks(
    folder: Path, other: Tensors, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    NEITHER[name](folder, whole(folder), other)
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out)]) == 3
    error = capsys.readouterr().err
    assert "none of 2 sets" in error and "model.safetensors:" in error and "model-*-of-00002.safetensors:" in error
    assert not out.exists()


def test_a_set_that_lacks_a_file_is_not_completed_from_another_save(folder: Path, other: Tensors) -> None:
    good = whole(folder)
    (folder / WHOLE).unlink()
    shards(folder, good, 3, index=True)[2].unlink()
    shards(folder, other, 2)[0].unlink()
    assert main(["repair", str(folder), str(folder.parent / "out"), "-q"]) == 3
    assert not (folder.parent / "out").exists()


def test_a_tensor_in_two_files_is_kept_once_where_the_copies_are_equal_and_refused_where_not(
    folder: Path, other: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    good = whole(folder)
    (folder / WHOLE).unlink()
    second = shards(folder, good, 2, index=True)[1]
    name = "model.embed_tokens.weight"
    copy = {**load_file(second), name: good[name]}
    save_file(copy, second, metadata=PT)
    found = [f for f in examine(DoctorRequest(str(folder))).findings if f.severity == "error"]
    assert [f.code for f in found] == ["weight-sets"] and found[0].fix == ("choose-weights",)
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out), "-q"]) == 0
    assert sum(name in load_file(p) for p in out.glob("*.safetensors")) == 1
    assert AutoModelForCausalLM.from_pretrained(out).state_dict().keys() == good.keys()
    save_file({**copy, name: other[name]}, second, metadata=PT)
    assert main(["repair", str(folder), str(folder.parent / "again"), "-q"]) == 3
    assert "different values" in capsys.readouterr().err
    assert not (folder.parent / "again").exists()


def test_what_was_left_is_told_to_be_of_another_save_where_its_values_differ(
    folder: Path, other: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    ALONE["two totals without an index, one lacking a file"](folder, whole(folder), other)
    assert main(["repair", str(folder), str(folder.parent / "out")]) == 0
    assert "other-save" in capsys.readouterr().out


def test_the_printed_recipe_of_a_choice_writes_the_same_folder(
    folder: Path, other: Tensors, capsys: pytest.CaptureFixture[str]
) -> None:
    ALONE["a whole file that is cut, beside shards"](folder, whole(folder), other)
    out, again = folder.parent / "out", folder.parent / "again"
    assert main(["repair", str(folder), str(out), "-q"]) == 0
    capsys.readouterr()
    assert main(["repair", str(folder), str(again), "--print-recipe"]) == 0
    recipe = folder.parent / "recipe.yaml"
    recipe.write_text(capsys.readouterr().out)
    assert main(["run", str(recipe), str(again), "-q"]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@pytest.mark.parametrize("code", ["index-malformed", "index-phantom", "index-conflict"])
def test_an_index_that_is_wrong_about_a_whole_set_is_made_anew(folder: Path, code: str) -> None:
    good = whole(folder)
    (folder / WHOLE).unlink()
    first, second = shards(folder, good, 2, index=True)
    index = json.loads((folder / INDEX).read_text())
    if code == "index-phantom":
        index["weight_map"]["no.such.weight"] = first.name
    elif code == "index-conflict":
        index["weight_map"]["model.norm.weight"] = first.name
    (folder / INDEX).write_text("{" if code == "index-malformed" else json.dumps(index))
    assert [f.code for f in examine(DoctorRequest(str(folder))).findings if f.severity == "error"] == [code]
    out = folder.parent / "out"
    assert main(["repair", str(folder), str(out), "-q"]) == 0
    made = json.loads((out / INDEX).read_text())["weight_map"]
    assert made == {n: p.name for p in (first, second) for n in load_file(p)}
    assert all(torch.equal(load_file(out / f)[n], good[n]) for n, f in made.items())


def test_an_index_that_promises_what_the_model_needs_and_no_file_holds_is_not_made_anew(folder: Path) -> None:
    good = whole(folder)
    (folder / WHOLE).unlink()
    first, _ = shards(folder, good, 2, index=True)
    save_file({n: t for n, t in load_file(first).items() if n != "model.embed_tokens.weight"}, first, metadata=PT)
    assert main(["repair", str(folder), str(folder.parent / "out"), "-q"]) == 3
    assert not (folder.parent / "out").exists()
