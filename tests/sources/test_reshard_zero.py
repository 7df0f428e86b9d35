"""A ZeRO run's state for other ranks: what lived, bit by bit, cut as DeepSpeed cuts it, in the files that it reads.

Oracles: what lived when real DeepSpeed saved the stored runs, and DeepSpeed's own files read by torch itself.
`tests/runs/run_reshard_matrix.py` lets real DeepSpeed go on from what is written.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.cli import main
from converter.core.writer.write import write
from converter.errors import ConvertError, Refused
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from durability import Quiet, fast_folder
from saved_trees import differences as tree_differences
from saved_trees import loaded
from shards import edit
from zero.compare import RUNS, facts, faults, live, run_names


@pytest.fixture
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


NAMES = [n for n in run_names() if facts(RUNS / n)["stage"] and facts(RUNS / n)["case"] != "elastic"]


def resharded(run: Path, out: Path, ranks: int) -> Path:
    """A run's folder for other ranks, with the oracle beside it."""
    made = plan_state(ReshardRequest(str(run), ranks), revision=None, token=None, keep_code=False)
    write(made.plan, out, reporter=Quiet())
    for name in ("fixture.json", "oracle.safetensors"):
        shutil.copy(run / name, out)
    return out


def tag(run: Path) -> Path:
    return run / "global_step2"


def refused(run: Path, code: str, ranks: int = 3) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        plan_state(ReshardRequest(str(run), ranks), revision=None, token=None, keep_code=False)
    assert caught.value.code == code, caught.value
    return caught.value


def copy(place: Path, name: str) -> Path:
    return Path(shutil.copytree(RUNS / name, place / name))


@pytest.mark.parametrize("name", NAMES)
def test_weights_masters_and_moments_on_other_ranks_are_those_that_lived(name: str, place: Path) -> None:
    ranks = 1 if NAMES.index(name) % 3 == 0 else 4
    assert faults(resharded(RUNS / name, place / "out", ranks)) == []


@pytest.mark.parametrize("name", NAMES)
def test_on_as_many_ranks_as_before_the_files_are_those_of_deepspeed(name: str, place: Path) -> None:
    run, ranks = RUNS / name, facts(RUNS / name)["ranks"]
    out = resharded(run, place / "same", ranks)
    files = sorted(p.name for p in tag(run).iterdir())
    assert sorted(p.name for p in tag(out).iterdir()) == files
    assert (out / "latest").read_text() == (run / "latest").read_text()
    for file in files:
        found = list(tree_differences(loaded(tag(run) / file), loaded(tag(out) / file)))
        # In stage 3 what pads a rank's share is whatever was in memory, and zeros here: it is compared below.
        assert [d for d in found if "fp32_flat_groups" not in d] == [], file


@pytest.mark.parametrize(
    "name", ["aligned-z1-n2", "bf16-optimizer-z1-n2", "lora-frozen-head-z3-n2", "roundrobin-z2-n3", "subgroups-z3-n3"]
)
def test_to_other_ranks_and_back_gives_the_files_again(name: str, place: Path) -> None:
    ranks = facts(RUNS / name)["ranks"]
    same = resharded(RUNS / name, place / "same", ranks)
    there = resharded(same, place / "there", ranks + 2)
    back = resharded(there, place / "back", ranks)
    for path in sorted(tag(same).iterdir()):
        assert path.read_bytes() == (tag(back) / path.name).read_bytes(), path.name


def test_a_rank_that_was_gone_has_its_own_model_file_again(place: Path) -> None:
    run = RUNS / "lm-tied-z3-n2"
    back = resharded(resharded(run, place / "one", 1), place / "back", 2)
    file = "zero_pp_rank_1_mp_rank_00_model_states.pt"
    assert list(tree_differences(loaded(tag(run) / file), loaded(tag(back) / file))) == []


def cut_as_deepspeed_cuts(values: dict[str, torch.Tensor], ranks: int, rank: int) -> torch.Tensor:
    """A rank's share of parameters in stage 3, from whole tensors."""
    pieces = []
    for value in values.values():
        part = math.ceil(value.numel() / ranks)
        flat = torch.nn.functional.pad(value.flatten(), (0, part * ranks - value.numel()))
        pieces.append(flat.view(ranks, part)[rank])
    return torch.cat(pieces)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_stage_3_cuts_each_parameter_and_closes_sub_groups_by_a_ranks_elements(ranks: int, place: Path) -> None:
    run = RUNS / "subgroups-z3-n3"
    out = resharded(run, place / "out", ranks)
    limit = 60
    first = loaded(tag(run) / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    expected: list[tuple[int, list[str]]] = []
    for group, shapes in enumerate(first):  # on three ranks each group is one sub-group
        sizes = {n: math.ceil(math.prod(s) / ranks) for n, s in shapes.items()}
        subs: list[list[str]] = [[]]
        for name in sizes:
            if sum(sizes[n] for n in subs[-1]) >= limit:
                subs.append([])
            subs[-1].append(name)
        expected += [(group, s) for s in ([list(sizes)] if limit >= sum(sizes.values()) else subs)]
    for rank in range(ranks):
        model = loaded(tag(out) / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = loaded(tag(out) / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        assert [list(g) for g in model["param_shapes"]] == [names for _, names in expected]
        assert (model["dp_world_size"], state["partition_count"]) == (ranks, ranks)
        inner = state["optimizer_state_dict"]
        homes = [(g, p) for g, group in enumerate(inner["param_groups"]) for p in group["params"]]
        assert homes == [(group, i) for i, (group, _) in enumerate(expected)]
        assert [g["weight_decay"] for g in inner["param_groups"]] == [0.0, 0.1]
        for index, (_, names) in enumerate(expected):
            wanted = {k: {n: live(run, k)[n] for n in names} for k in ("master", "exp_avg", "exp_avg_sq")}
            flat = {"master": state["fp32_flat_groups"][index], **inner["state"][index]}
            for kind, values in wanted.items():
                assert torch.equal(flat[kind], cut_as_deepspeed_cuts(values, ranks, rank)), (rank, index, kind)
            assert float(inner["state"][index]["step"]) == 2


def test_steps_of_sub_groups_are_tensors_of_their_own(place: Path) -> None:
    """An optimizer counts up in place: one tensor in two states would be counted twice a step."""
    out = resharded(RUNS / "subgroups-z3-n3", place / "out", 1)
    state = loaded(tag(out) / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
    steps = [s["step"] for s in state["optimizer_state_dict"]["state"].values()]
    assert len(steps) > 2
    assert len({s.untyped_storage().data_ptr() for s in steps}) == len(steps)


@pytest.mark.parametrize(("ranks", "order"), [(2, [0, 2, 4, 1, 3]), (4, [0, 4, 1, 2, 3]), (1, [0, 1, 2, 3, 4])])
def test_round_robin_deals_anew_for_the_new_ranks(ranks: int, order: list[int], place: Path) -> None:
    out = resharded(RUNS / "roundrobin-z2-n3", place / "out", ranks)
    names = ["scale", "first.bias", "norm.bias", "twin.bias", "last.bias"]  # as the optimizer got them
    shapes = loaded(tag(out) / "mp_rank_00_model_states.pt")["param_shapes"][0]
    assert list(shapes) == [names[i] for i in order]
    masters = live(RUNS / "roundrobin-z2-n3", "master")
    flat = torch.cat([masters[names[i]].flatten() for i in order])
    part = math.ceil(len(flat) / (2 * ranks)) * 2
    for rank in range(ranks):
        state = loaded(tag(out) / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
        mine = flat[rank * part : (rank + 1) * part]
        assert torch.equal(state["single_partition_of_fp32_groups"][0], mine)
        assert state["group_paddings"][0] == part - len(mine)
        assert state["base_optimizer_state"]["state"][0]["exp_avg"].shape == (part,)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["aligned-z1-n2", "lora-frozen-head-z3-n2", "roundrobin-z2-n3", "lora-lean-z2-n2"])
def test_another_stage_has_what_lived(name: str, stage: int, place: Path) -> None:
    run, out = RUNS / name, place / "out"
    made = plan_state(ReshardRequest(str(run), stage=stage), revision=None, token=None, keep_code=False)
    write(made.plan, out, reporter=Quiet())
    shutil.copy(run / "oracle.safetensors", out)
    (out / "fixture.json").write_text(json.dumps(facts(run) | {"stage": stage}))
    assert faults(out) == []
    first = loaded(min(tag(out).glob("*optim_states.pt")))
    assert first["optimizer_state_dict"]["zero_stage"].args == (stage,)
    assert first["ds_config"]["zero_optimization"]["stage"] == stage
    assert len(list(tag(out).glob("*model_states.pt"))) == (facts(run)["ranks"] if stage == 3 else 1)


def test_bf16_optimizer_keeps_its_stage() -> None:
    asked = ReshardRequest(str(RUNS / "bf16-optimizer-z1-n2"), stage=2)
    with pytest.raises(Refused, match="no loss scaler"):
        plan_state(asked, revision=None, token=None, keep_code=False)


# What can't be cut is refused by its name, and nothing is written.


def _optimizer(run: Path, rank: int) -> Path:
    return tag(run) / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _adafactor(state: Any) -> None:
    for own in state["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
        own["exp_avg_sq_row"] = torch.zeros(3, 7)


def _ahead(state: Any) -> None:
    state["optimizer_state_dict"]["optimizer_state_dict"]["state"][1]["step"] += 1


def _other_sub_groups(state: Any) -> None:
    state["ds_config"]["zero_optimization"]["sub_group_size"] = 7


def _experts(state: Any) -> None:
    state["num_experts"] = [4]


@pytest.mark.parametrize(
    ("ranks", "file", "change", "code", "says"),
    [
        ((0, 1, 2), _optimizer, _adafactor, "zero-optimizer-state", "exp_avg_sq_row"),
        ((1,), _optimizer, _ahead, "zero-mixed", "step"),
        ((0, 1, 2), None, _other_sub_groups, "zero-layout", "sub_group_size 7"),
        ((0, 1, 2), None, _experts, "zero-experts", "experts"),
    ],
)
def test_states_that_belong_to_a_cut_are_refused(
    ranks: tuple[int, ...], file: Any, change: Callable[[Any], None], code: str, says: str, place: Path
) -> None:
    run = copy(place, "subgroups-z3-n3")
    for rank in ranks:
        edit(file(run, rank) if file else tag(run) / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", change)
    assert says in refused(run, code).what


def test_elastic_states_and_missing_or_mixed_ranks_are_refused(place: Path) -> None:
    assert "learning rates" in refused(RUNS / "elastic-z2-n3", "zero-elastic").what
    run = copy(place, "roundrobin-z2-n3")
    edit(tag(run) / "mp_rank_00_model_states.pt", lambda s: s["ds_config"]["zero_optimization"].clear())
    assert "round_robin_gradients" in refused(run, "zero-layout").what
    _optimizer(run, 1).unlink()
    refused(run, "zero-rank-missing")
    run = copy(place, "lora-z3-n2")
    (tag(run) / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refused(run, "zero-rank-missing")


def test_other_states_are_named_for_what_they_are(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "out"
    dcp = RUNS.parents[1] / "dcp" / "runs" / "titan-n3"
    for source, code in ((dcp, "reshard-any-ranks"), (RUNS / "plain-z0-n1", "reshard-any-ranks")):
        assert main(["reshard", str(source), str(out), "--world-size", "2"]) == 3
        assert f"REFUSED {code}: nothing written" in capsys.readouterr().err
    for words in (["--world-size", "2", "--dtype", "bf16"], ["--tag", "x"], ["--world-size", "70000"]):
        assert main(["reshard", str(RUNS / NAMES[0]), str(out), *words]) == 2
    assert list(place.iterdir()) == []


def test_what_a_trainer_reads_beside_the_shards_comes_along(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = copy(place, "lora-z3-n2")
    (run / "trainer_state.json").write_text('{"global_step": 2}')
    torch.save({"last_epoch": 2}, run / "scheduler.pt")
    for rank in (0, 1):
        torch.save({"cpu": torch.get_rng_state()}, run / f"rng_state_{rank}.pth")
    (run / "tokenizer.json").write_text("{}")
    assert main(["reshard", str(run), str(place / "out"), "--world-size", "1"]) == 0
    screen = capsys.readouterr().out
    assert "not carried along: oracle.safetensors, rng_state_1.pth" in screen
    assert f"--resume_from_checkpoint {place / 'out'}" in screen
    names = {p.name for p in (place / "out").iterdir()}
    assert names == {
        "adapter_config.json", "global_step2", "latest", "rlhf-convert.json", "rng_state_0.pth", "scheduler.pt",
        "tokenizer.json", "trainer_state.json",
    }  # fmt: skip


def test_a_schedule_that_names_foreign_code_is_refused(place: Path) -> None:
    run = copy(place, "lora-z3-n2")
    torch.save({"hook": Path.unlink}, run / "scheduler.pt")
    assert isinstance(refused(run, "pickle-names"), Refused)


def test_files_that_are_no_archives_become_archives(place: Path) -> None:
    """DeepSpeed writes torch's older form where `checkpoint_serialization` is off."""
    run = copy(place, "reward-z2-n2")
    file = tag(run) / "mp_rank_00_model_states.pt"
    state = loaded(file)
    torch.save(state, file, _use_new_zipfile_serialization=False)
    out = resharded(run, place / "out", 3)
    assert faults(out) == []
    assert loaded(tag(out) / file.name)["module"].keys() == state["module"].keys()
