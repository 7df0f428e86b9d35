"""A verl run's files for other ranks: what lived, bit by bit, in the files that its checkpoint manager reads.

Oracles: what lived when real verl saved the stored runs, and torch's own loading of the files that verl wrote.
`tests/runs/run_verl_reshard.py` lets real verl go on from what is written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import converter
from converter.cli import main
from converter.errors import ConvertError
from converter.sources.verl.source import SOURCE
from durability import fast_folder
from places import TESTS

RUNS = TESTS / "runs" / "verl_saves" / "runs"


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def loaded(path: Path) -> Any:
    return torch.load(path, weights_only=False)  # noqa: TID251 - as verl does; verl or this test wrote it


def wrong(run: str, out: Path) -> list[str]:
    """Names of weights and moments that aren't what lived."""
    lived = load_file(RUNS / run / "oracle.safetensors")
    found = {f"live/{n}": t for n, t in SOURCE.open(out, asked="x").tensors.items()}
    for which in ("exp_avg", "exp_avg_sq") if any(n.startswith("exp") for n in lived) else ():
        found |= {f"{which}/{n}": t for n, t in SOURCE.adam_moments(out, which=which).items()}  # type: ignore[arg-type]
    again = ("live/", "exp_avg/lm_head.", "exp_avg_sq/lm_head.") if "tied" in run else ("live/",)
    expected = {n for n in lived if not n.startswith(again) or n in found}
    return [n for n in sorted(expected | found.keys()) if not torch.equal(converter.to_torch(found[n]), lived[n])]


@pytest.mark.parametrize(
    ("run", "ranks"),
    [
        ("actor-tied-fsdp1-n2", 3),
        ("actor-tied-fsdp2-n2", 1),
        ("critic-fsdp1-n3", 2),
        ("critic-fsdp2-n4", 3),
        ("lora-fsdp1-n2", 1),
        ("lora-bf16-fsdp2-n2", 5),
        ("lora-only-fsdp2-n2", 3),
        ("critic-hsdp-fsdp1-n4", 1),
        ("critic-hsdp-fsdp1-n4", 6),
        ("critic-hsdp-fsdp2-n4", 2),
        ("critic-hsdp-fsdp2-n4", 8),
    ],
)
def test_weights_and_moments_on_other_ranks_are_those_that_lived(run: str, ranks: int, place: Path) -> None:
    converter.reshard_state(RUNS / run, place / "out", world_size=ranks)
    assert wrong(run, place / "out") == []
    assert json.loads((place / "out" / "fsdp_config.json").read_text())["world_size"] == ranks


@pytest.mark.parametrize("run", ["actor-tied-fsdp1-n2", "critic-fsdp2-n4", "critic-fsdp1-n3"])
def test_there_and_back_gives_what_torch_loads_of_verls_own_files(run: str, place: Path) -> None:
    ranks = int(run[-1])
    converter.reshard_state(RUNS / run, place / "there", world_size=ranks + 3)
    converter.reshard_state(place / "there", place / "back", world_size=ranks)
    for own in sorted((RUNS / run).glob("*_world_size_*.pt")):
        assert differences(loaded(own), loaded(place / "back" / own.name)) == [], own.name


def differences(one: Any, other: Any, at: str = "") -> list[str]:
    """Paths at which two loaded values differ; DTensors by their spec, mesh and local tensor."""
    if type(one) is not type(other):
        return [f"{at}: {type(one).__name__} and {type(other).__name__}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{at}: other keys"]
        return [d for k in one for d in differences(one[k], other[k], f"{at}/{k}")]
    if isinstance(one, list | tuple):
        return [d for i, (a, b) in enumerate(zip(one, other, strict=True)) for d in differences(a, b, f"{at}/{i}")]
    if isinstance(one, DTensor):
        same = one._spec == other._spec and vars_of(one.device_mesh) == vars_of(other.device_mesh)
        return ([] if same else [f"{at}: spec"]) + differences(one._local_tensor, other._local_tensor, at)
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [f"{at}: values"]
    return [] if one == other else [f"{at}: {one} and {other}"]


def vars_of(mesh: Any) -> dict[str, str]:
    """What a mesh knows, but for the hash that a process keeps for itself."""
    return {k: repr(v) for k, v in vars(mesh).items() if k != "_hash"}


def test_replicas_of_shards_keep_their_width_where_there_are_more_ranks(place: Path) -> None:
    """verl makes a mesh of `ranks / fsdp_size` times `fsdp_size`, of one dimension where that is no more than ranks."""
    run = RUNS / "critic-hsdp-fsdp2-n4"
    for ranks, sizes, rank, at in ((8, (4, 2), 5, (2, 1)), (2, (2,), 1, (1,))):
        converter.reshard_state(run, place / str(ranks), world_size=ranks)
        state = loaded(place / str(ranks) / f"model_world_size_{ranks}_rank_{rank}.pt")
        tensor = state["model.embed_tokens.weight"]
        mesh = tensor.device_mesh
        assert (mesh.shape, tuple(mesh.get_coordinate() or ())) == (sizes, at)
        assert mesh.mesh_dim_names == ("ddp", "fsdp")[-len(sizes) :]
        assert mesh.mesh.flatten().tolist() == list(range(ranks))
        own = loaded(run / f"model_world_size_4_rank_{rank % 2}.pt")["model.embed_tokens.weight"]
        assert torch.equal(tensor._local_tensor, own._local_tensor)
        assert [p.is_shard(0) for p in tensor.placements] == [False, True][-len(sizes) :]


def test_a_step_comes_with_all_its_parts_and_the_runs_tracker(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = place / "run" / "global_step_7"
    for part, run in (("actor", "actor-tied-fsdp2-n2"), ("critic", "critic-fsdp1-n3")):
        shutil.copytree(RUNS / run, step / part)
    torch.save({"cursor": 5}, step / "data.pt")
    extra = {"lr_scheduler": {"last_epoch": 7}, "rng": {"cpu": torch.get_rng_state()}}
    for rank in range(3):
        torch.save(extra, step / "critic" / f"extra_state_world_size_3_rank_{rank}.pt")
    (place / "run" / "latest_checkpointed_iteration.txt").write_text("7")
    assert main(["reshard", str(place / "run"), str(place / "out"), "--world-size", "4"]) == 0
    screen = capsys.readouterr().out
    assert "critic: random states belong to a rank: ranks 3 begin with the trainer's seed" in screen
    assert f"on 4 ranks: trainer.default_local_dir={place / 'out'} trainer.resume_mode=auto" in screen
    out = place / "out" / "global_step_7"
    assert (place / "out" / "latest_checkpointed_iteration.txt").read_text() == "7"
    assert loaded(out / "data.pt") == {"cursor": 5}
    assert wrong("actor-tied-fsdp2-n2", out / "actor") == []
    assert wrong("critic-fsdp1-n3", out / "critic") == []
    states = [loaded(out / "critic" / f"extra_state_world_size_4_rank_{rank}.pt") for rank in range(4)]
    assert [sorted(s) for s in states] == [["lr_scheduler", "rng"]] * 3 + [["lr_scheduler"]]
    assert all(s["lr_scheduler"] == {"last_epoch": 7} for s in states)
    assert torch.equal(states[2]["rng"]["cpu"], extra["rng"]["cpu"])  # type: ignore[arg-type,index]


def refused(run: Path, ranks: int = 3, **given: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        converter.reshard_state(run, world_size=ranks, **given)
    return caught.value


def test_what_can_not_be_cut_is_refused_by_its_name(place: Path) -> None:
    replicas = refused(RUNS / "critic-hsdp-fsdp2-n4")
    assert (replicas.code, "don't make replicas of 2 shards" in replicas.what) == ("verl-mesh", True)
    alone = refused(RUNS / "actor-fsdp1-n1")
    assert (alone.code, "whole tensors" in alone.what) == ("verl-mesh", True)
    original = refused(RUNS / "actor-original-fsdp1-n2")
    assert (original.code, "use_orig_params" in original.what) == ("verl-optimizer", True)
    run = Path(shutil.copytree(RUNS / "critic-fsdp2-n4", place / "run"))
    (run / "optim_world_size_4_rank_2.pt").unlink()
    assert refused(run).code == "verl-rank-missing"
    torch.save({"lr_scheduler": Path.unlink}, run / "extra_state_world_size_4_rank_0.pt")
    assert refused(RUNS / "critic-fsdp2-n4", stage=2).code == "usage"


def test_an_extra_state_that_names_foreign_code_is_refused(place: Path) -> None:
    run = Path(shutil.copytree(RUNS / "critic-fsdp2-n4", place / "run"))
    torch.save({"lr_scheduler": Path.unlink}, run / "extra_state_world_size_4_rank_0.pt")
    assert refused(run).code == "pickle-names"
