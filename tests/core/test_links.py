"""`--link-unchanged`: files that stay as they are become links, which the folder's receipt tells from a stranger's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from fake_hub import FakeHub, running
from hub_here import client_of, on_disk, published, run

SIZES = {
    "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 32,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in several files whose config names a class that only its trainer has."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="5KB")
    edit(folder / "config.json", architectures=["FSDPLlamaForCausalLM"])
    return folder


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    folder = tmp_path / "rm"
    config = LlamaConfig(**SIZES, num_labels=1, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(folder, max_shard_size="5KB")
    return folder


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def links(folder: Path) -> dict[str, Path]:
    return {p.name: p.resolve() for p in folder.iterdir() if p.is_symlink()}


def shards(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("*.safetensors")}


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_a_config_that_is_fixed_leaves_every_weight_file_a_link_to_the_source(model: Path, tmp_path: Path) -> None:
    done = run("repair", model, tmp_path / "out", "--link-unchanged")
    assert done.returncode == 0
    assert "0 recomputed equal" in done.stdout  # nothing was written that could be compared with its source
    assert links(tmp_path / "out") == {n: model / n for n in shards(model)}
    assert f"{len(shards(model))} of {len(shards(model))} files are links" in done.stderr + done.stdout
    _, told = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    assert [f.code for f in examine(DoctorRequest(str(tmp_path / "out"), deep=True)).findings] == []


def test_a_renamed_head_leaves_the_files_without_it_links(reward: Path, tmp_path: Path) -> None:
    out = tmp_path / "critic"
    assert main(["rm-to-critic", str(reward), str(out), "--to", "openrlhf@0.5.2", "--link-unchanged", "-q"]) == 0
    head = next(f.name for f in reward.glob("*.safetensors") if "score.weight" in load_file(f))
    assert set(links(out)) == shards(reward) - {head}
    assert torch.equal(values(out)["value_head.weight"], values(reward)["score.weight"])


def test_links_are_relative_so_that_both_folders_can_move_together(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert main(["repair", str(model), str(tmp_path / "a" / "out"), "--link-unchanged", "-q"]) == 0
    moved = tmp_path.parent / (tmp_path.name + "-moved")
    tmp_path.rename(moved)
    assert same(values(moved / "a" / "out"), values(moved / "model"))
    assert main(["inspect", str(moved / "a" / "out"), "-q"]) == 0
    moved.rename(tmp_path)


def test_the_receipt_names_each_link_and_no_path(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    text = (tmp_path / "out" / "rlhf-convert.json").read_text()
    assert set(json.loads(text)["linked"]) == shards(model)
    assert str(tmp_path) not in text


def test_a_linked_folder_is_a_source_like_another(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    assert main(["reshard", str(tmp_path / "out"), str(tmp_path / "whole"), "--layout", "pack", "-q"]) == 0
    assert links(tmp_path / "whole") == {}
    assert same(values(tmp_path / "whole"), values(model))


def test_links_of_links_lead_to_the_file_itself(model: Path, tmp_path: Path) -> None:
    for source, out in (("model", "one"), ("one", "two")):
        edit(tmp_path / source / "config.json", architectures=["FSDPLlamaForCausalLM"])
        assert main(["repair", str(tmp_path / source), str(tmp_path / out), "--link-unchanged", "-q"]) == 0
    shutil.rmtree(tmp_path / "one")
    assert same(values(tmp_path / "two"), values(model))


def test_a_link_that_no_receipt_names_is_refused(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    (tmp_path / "out" / "rlhf-convert.json").unlink()
    refused = run("reshard", tmp_path / "out", tmp_path / "again")
    assert (refused.returncode, "input-outside" in refused.stderr) == (3, True)


def test_a_link_to_another_file_than_was_linked_is_refused(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    first = model / min(shards(model))
    content = {n: torch.cat([t, t]) for n, t in load_file(first).items()}
    save_file(content, first, metadata={"format": "pt"})
    refused = run("reshard", tmp_path / "out", tmp_path / "again")
    assert (refused.returncode, "link-changed" in refused.stderr) == (3, True)
    assert not (tmp_path / "again").exists()


def test_a_link_whose_file_is_gone_is_told_as_a_missing_file(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    shutil.rmtree(model)
    refused = run("reshard", tmp_path / "out", tmp_path / "again")
    assert refused.returncode == 3
    assert "leads nowhere" in refused.stderr or "shard-missing" in refused.stderr


@pytest.mark.parametrize("receipt", ["[]", "{", '{"linked": 1}', '{"linked": {"model.safetensors": {"size": -1}}}'])
def test_a_receipt_that_lies_opens_no_file_outside(receipt: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.safetensors"
    save_file({"w": torch.ones(4)}, secret)
    folder = tmp_path / "hostile"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(secret)
    (folder / "rlhf-convert.json").write_text(receipt)
    assert run("reshard", folder, tmp_path / "out").returncode == 3
    assert not (tmp_path / "out").exists()


def test_a_receipt_that_is_a_link_itself_vouches_for_nothing(model: Path, tmp_path: Path) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    (tmp_path / "out" / "rlhf-convert.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "out" / "rlhf-convert.json").symlink_to(tmp_path / "elsewhere.json")
    assert run("reshard", tmp_path / "out", tmp_path / "again").returncode == 3


def test_a_file_without_its_format_is_written_anew(model: Path, tmp_path: Path) -> None:
    first = min(shards(model))
    save_file(load_file(model / first), model / first)
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    assert set(links(tmp_path / "out")) == shards(model) - {first}


@pytest.mark.parametrize("option", [("--layout", "pack"), ("--max-shard-size", "1GB")])
def test_a_new_layout_and_links_exclude_each_other(option: tuple[str, str], model: Path, tmp_path: Path) -> None:
    refused = run("repair", model, tmp_path / "out", "--link-unchanged", *option)
    assert (refused.returncode, "link-layout" in refused.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_the_recipe_says_that_files_are_linked_and_makes_the_same_folder(model: Path, tmp_path: Path) -> None:
    printed = run("repair", model, tmp_path / "out", "--link-unchanged", "--print-recipe")
    (tmp_path / "recipe.yaml").write_text(printed.stdout)
    assert main(["run", str(tmp_path / "recipe.yaml"), str(tmp_path / "out"), "-q"]) == 0
    assert set(links(tmp_path / "out")) == shards(model)


def test_an_output_of_links_takes_no_room(model: Path, tmp_path: Path) -> None:
    planned = run("repair", model, tmp_path / "out", "--link-unchanged", "--dry-run", "--json")
    told = json.loads(planned.stdout)
    assert told["total_bytes"] == 0
    assert all(f["linked"] for f in told["files"])


def test_an_overwritten_output_of_links_leaves_the_source_whole(model: Path, tmp_path: Path) -> None:
    before = values(model)
    for _ in range(2):
        assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "--overwrite", "-q"]) == 0
    shutil.rmtree(tmp_path / "out")
    assert same(values(model), before)


def test_a_snapshot_of_the_hubs_cache_is_linked_to_its_blobs(model: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--me--rm"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    assert main(["repair", str(snapshot), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    assert {p.parent for p in links(tmp_path / "out").values()} == {blobs}
    assert same(values(tmp_path / "out"), values(model))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub()) as server, client_of(server, tmp_path):
        yield server


def test_a_pushed_folder_of_links_arrives_as_files(model: Path, tmp_path: Path, hub: FakeHub) -> None:
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
    pushed = run("push", tmp_path / "out", "me/rm")
    assert pushed.returncode == 0, pushed.stderr
    there, here = published(hub, "me/rm"), on_disk(model)
    assert {n: there[n] for n in shards(model)} == {n: here[n] for n in shards(model)}


def test_the_hub_gets_no_links(model: Path, tmp_path: Path, hub: FakeHub) -> None:
    refused = run("repair", model, "hf://me/rm", "--link-unchanged")
    assert (refused.returncode, "link-remote" in refused.stderr, hub.repos) == (2, True, {})


def test_a_strangers_link_in_the_way_is_not_removed(model: Path, tmp_path: Path) -> None:
    stage = tmp_path / "out.partial"
    stage.mkdir()
    (stage / "journal.jsonl").write_bytes(b"")
    os.symlink("../model/nothing", stage / min(shards(model)))
    refused = run("repair", model, tmp_path / "out", "--link-unchanged")
    assert (refused.returncode, "stage-foreign" in refused.stderr) == (3, True)
    shutil.rmtree(stage)
    assert main(["repair", str(model), str(tmp_path / "out"), "--link-unchanged", "-q"]) == 0
