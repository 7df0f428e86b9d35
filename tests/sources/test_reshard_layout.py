"""What DeepSpeed's other tools read of a rewritten run: where sub-groups end, and the frozen parameters.

Oracles: DeepSpeed 0.19.8's rules, worked out by hand for the stored runs (`_create_fp16_sub_groups` of
runtime/zero/stage3.py), what its own files list, and what lived when it saved them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.writer.write import write
from converter.recipe.verbs.reshard_state import ReshardRequest, plan_state
from durability import Quiet
from saved_trees import loaded
from shards import edit
from zero.compare import RUNS, live


def rewritten(run: Path, out: Path, **asked: Any) -> Path:
    """The folder of a tag, of other ranks or of another stage."""
    made = plan_state(ReshardRequest(str(run), **asked), revision=None, token=None, keep_code=False)
    write(made.plan, out, reporter=Quiet())
    return out / "global_step2"


@pytest.mark.parametrize(
    ("ranks", "limit", "expected"),
    [
        # Elements of one rank: 35, 7, 49, 91. The first alone is as many as the limit.
        (1, 35, [["first.weight"], ["norm.weight", "second.weight"], ["last.weight"]]),
        # 18, 4, 25, 46: three together are as many as the limit.
        (2, 47, [["first.weight", "norm.weight", "second.weight"], ["last.weight"]]),
        # One more than three together have: the fourth is taken in too, and nothing is left.
        (2, 48, [["first.weight", "norm.weight", "second.weight", "last.weight"]]),
    ],
)
def test_a_sub_group_ends_with_the_parameter_that_makes_it_as_large_as_the_limit(
    ranks: int, limit: int, expected: list[list[str]], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(RUNS / "subgroups-z3-n3", tmp_path / "run"))
    for file in (run / "global_step2").glob("*model_states.pt"):
        edit(file, lambda s: s["ds_config"]["zero_optimization"].update(sub_group_size=limit))
    made = rewritten(run, tmp_path / "out", world_size=ranks)
    shapes = loaded(made / "zero_pp_rank_0_mp_rank_00_model_states.pt")["param_shapes"]
    assert [list(each) for each in shapes] == [
        ["scale", "first.bias", "norm.bias", "twin.bias", "last.bias"],
        *expected,
    ]


def test_files_of_stage_2_list_the_frozen_parameters_and_those_of_stage_1_do_not(tmp_path: Path) -> None:
    """`zero_to_fp32.py` takes frozen weights from that list alone: what it lacks is lost to it."""
    run = RUNS / "lora-frozen-head-z3-n2"
    own = loaded(run / "global_step2" / "zero_pp_rank_0_mp_rank_00_model_states.pt")["frozen_param_shapes"]
    assert any("score" in name for name in own)
    lived = live(run)
    second = loaded(rewritten(run, tmp_path / "2", stage=2) / "mp_rank_00_model_states.pt")
    assert {n: tuple(s) for n, s in second["frozen_param_shapes"].items()} == {n: tuple(s) for n, s in own.items()}
    assert second["frozen_param_fragments"].keys() == own.keys()
    assert all(torch.equal(t, lived[n]) for n, t in second["frozen_param_fragments"].items())
    first = loaded(rewritten(run, tmp_path / "1", stage=1) / "mp_rank_00_model_states.pt")
    assert (first["frozen_param_shapes"], first["frozen_param_fragments"]) == (None, None)


def test_a_run_of_stage_1_which_lists_nothing_frozen_gets_the_list_in_stage_2(tmp_path: Path) -> None:
    run = RUNS / "lora-z1-n2"
    assert loaded(run / "global_step2" / "mp_rank_00_model_states.pt")["frozen_param_shapes"] is None
    lived, trained = live(run), live(run, "master")
    second = loaded(rewritten(run, tmp_path / "2", stage=2) / "mp_rank_00_model_states.pt")
    found = second["frozen_param_fragments"]
    assert found.keys() == lived.keys() - trained.keys()
    assert all(torch.equal(t, lived[n]) for n, t in found.items())
