"""What transformers, PEFT and the trainers write is healthy: doctor has no finding above cosmetic.

The folders are made by the frameworks' own code. What is expected is the same everywhere: nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import pytest

from converter.examine.doctor import DoctorRequest, examine
from healthy.adapters import ADAPTERS, HEAD_IN_BASE_ALONE, RARE, Adapter, base, quantised, records
from healthy.findings import codes, serious
from healthy.models import USUAL, Saved
from healthy.shrink import TASKS, NotTinyError, everything
from healthy.states import EXPECTED, FORMS, PLACE, RUNS, save
from selected import each_facet, one_in

NOTES = {"training-state", "run-folder", "zero-note", "verl-note", "moments-zero"}
CHECKPOINT = re.compile(r"checkpoint|step|global_step")
"""Folders in a run that are checkpoints; `optimizer_0` and `huggingface` are parts of one, and load nowhere."""


@pytest.mark.parametrize("saved", one_in(2, USUAL))
def test_a_model_that_transformers_saved_is_healthy(saved: Saved, tmp_path: Path) -> None:
    folder = saved.write(tmp_path / "model")
    assert serious(folder, deep=True) == []


def marked(known: dict[tuple[str, str], str], tasks: Container[str]) -> list[Any]:
    """Every architecture of these tasks; those with a finding that is known to be wrong are expected to fail."""
    found = [(task, kind, known.get((task, kind))) for task, kind in everything() if task in tasks]
    return [pytest.param(t, k, marks=pytest.mark.xfail(reason=why) if why else ()) for t, k, why in found]


_WHY = "names-in-memory: a load takes two names on disk to one"
TWO_NAMES = {("causal", "hy_v4"): _WHY, ("bare", "hy_v4"): _WHY, ("bare", "aria"): _WHY}


IN_TEXT_ALONE = {("multimodal", "qwen2_5_omni_thinker"), ("multimodal", "qwen3_vl_moe")}
"""Their text_config ties, their config does not: transformers 4.57.6 drops the head that 5.23 saves and keeps."""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), marked(TWO_NAMES, TASKS))
def test_every_architecture_of_transformers_is_healthy(task: str, kind: str, tmp_path: Path) -> None:
    try:
        folder = Saved(task, kind).write(tmp_path / "model")
    except NotTinyError as error:
        pytest.skip(str(error))
    expected = ["tied-copies"] if (task, kind) in IN_TEXT_ALONE else []
    assert codes(folder, deep=True) == expected
    assert serious(folder) == [] or expected


LORA_TASKS = {"causal": "CAUSAL_LM", "seqcls": "SEQ_CLS", "tokcls": "TOKEN_CLS", "seq2seq": "SEQ_2_SEQ_LM"}


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind"), marked({}, {*LORA_TASKS, "multimodal"}))
def test_an_adapter_over_every_architecture_of_transformers_is_healthy(task: str, kind: str, tmp_path: Path) -> None:
    adapter = Adapter(kind, task=LORA_TASKS.get(task), settings={"target_modules": "all-linear"})
    try:
        model = Saved(task, kind).write(tmp_path / "model")
        folder = adapter.write(tmp_path / "adapter", model)
    except Exception as error:  # PEFT has no place for LoRA in it
        pytest.skip(str(error))
    assert serious(folder) == []


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Base models, each made once."""
    root, made = tmp_path_factory.mktemp("bases"), set[Path]()

    def one(task: str, kind: str) -> Path:
        folder = root / f"{kind}-{task}"
        if folder not in made:
            base(folder, kind, task)
            made.add(folder)
        return folder

    return one


@pytest.mark.parametrize(
    "adapter",
    one_in(2, [pytest.param(a, id=str(a), marks=pytest.mark.slow if a.name in RARE else ()) for a in ADAPTERS]),
)
def test_an_adapter_that_peft_saved_is_healthy_with_its_base_at_hand_and_without(
    adapter: Adapter, bases: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = adapter.write(tmp_path / "adapter", bases(adapter.of, adapter.kind))
    assert serious(folder, deep=True) == []
    records(folder, "somebody/elsewhere")
    if adapter.name not in HEAD_IN_BASE_ALONE:
        assert serious(folder) == []


def test_an_adapter_over_a_quantised_base_is_healthy(tmp_path: Path) -> None:
    folder = Adapter("qlora").write(tmp_path / "adapter", base(tmp_path / "base"))
    quantised(tmp_path / "base")
    assert serious(tmp_path / "base", deep=True) == []
    assert serious(folder, deep=True) == []


@pytest.mark.parametrize("run", one_in(2, RUNS))
def test_a_state_that_a_trainer_left_is_healthy(run: str) -> None:
    folder = PLACE / run
    for place in (folder, *(p for p in folder.iterdir() if p.is_dir() and CHECKPOINT.match(p.name))):
        inside = str(place.relative_to(folder))
        assert codes(place) == EXPECTED.get((run, inside, ""), [])
    report = examine(DoctorRequest(str(folder), deep=True))
    assert "wrapped_runs" in run or report.case.kind in ("training", "run")
    assert {f.code for f in report.findings if f.severity == "cosmetic"} <= NOTES
    assert [f.code for f in report.findings if f.severity != "cosmetic"] == EXPECTED.get((run, ".", "deep"), [])


@pytest.mark.parametrize(
    ("form", "family", "trainer"), each_facet(FORMS, lambda c: (c[0], c[2]), lambda c: (c[0], c[1]), name="-".join)
)
def test_a_folder_in_a_trainer_s_own_form_is_healthy_for_it(
    form: str, family: str, trainer: str, tmp_path: Path
) -> None:
    folder = save(form, family, tmp_path / "model")
    assert serious(folder, target=trainer, deep=True) == []
