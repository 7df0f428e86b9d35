"""Names of PEFT methods are known without their code, and say what the code says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import write_tables
from converter.converters.merge.methods.finding import methods
from converter.converters.merge.methods.method import Method
from converter.families.factors import KEPT, declared, factor_names
from converter.plugins import METHODS, load, named
from converter.testing import tiny_reward_model, write_tensors

PLAIN_INSPECT = """
import json, sys
from converter.cli import main
imported = []
for folder in sys.argv[1:]:
    main(["inspect", folder])
    imported.append([name for name in sys.modules])
print(json.dumps(imported), file=sys.stderr)
"""

OF_LORA = {"lora", "dora", "bdlora", "kasa", "monteclora", "velora"}
"""Modules of the methods whose `peft_type` is LORA: which of them it is stands in the config's other fields."""

SHARED = {"fields", "method", "finding", "site_kernels"}
"""Modules of that package that are no method."""


def test_what_is_kept_of_the_shipped_methods_is_what_they_declare() -> None:
    assert KEPT.read_text("utf-8") == write_tables.declared_methods(), "python tools/write_tables.py writes it"


def test_every_registered_method_is_declared_with_its_own_names() -> None:
    by_value = {d.point.value: d for d in declared()}
    points = [points[0] for points in named(METHODS).values()]
    assert by_value.keys() == {point.value for point in points}
    for point in points:
        method, told = load(point), by_value[point.value]
        assert isinstance(method, Method)
        assert (told.peft_type, told.switch) == (method.peft_type, method.switch)
        assert (told.factors, told.shared) == (method.factors, method.shared)
        assert (told.pairs, told.zeros) == (method.pairs, method.zeros)
    assert {id(m) for m in methods()} == {id(load(point)) for point in points}
    assert {"lora_A", "vera_lambda_b", "hada_w1_a", "oft_R"} <= {*factor_names()}


@pytest.fixture(scope="module")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> list[set[str]]:
    """Modules of one process after `inspect` of a model, and after `inspect` of a LoRA adapter."""
    folder = tmp_path_factory.mktemp("inspected")
    adapter = folder / "adapter"
    adapter.mkdir()
    tiny_reward_model(folder / "model")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(folder / "model")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.mlp.up_proj"
    write_tensors(
        adapter / "adapter_model.safetensors", {f"{module}.lora_A.weight": (2, 8), f"{module}.lora_B.weight": (16, 2)}
    )
    command = [sys.executable, "-c", PLAIN_INSPECT, str(folder / "model"), str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [set(names) for names in json.loads(done.stderr)]


def of_methods(modules: set[str]) -> set[str]:
    package = "converter.converters.merge.methods."
    return {name.removeprefix(package) for name in modules if name.startswith(package)}


def test_inspecting_a_model_imports_no_method_and_nothing_that_parses_options(inspected: list[set[str]]) -> None:
    model, _ = inspected
    assert "converter.examine.doctor" in model
    assert of_methods(model) == set()
    assert model & {"typer", "importlib.metadata", "subprocess", "difflib"} == set()


def test_inspecting_a_lora_adapter_imports_the_methods_of_its_type_alone(inspected: list[set[str]]) -> None:
    _, adapter = inspected
    assert of_methods(adapter) - SHARED == OF_LORA


def test_a_method_that_is_not_kept_is_imported_and_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_method.py").write_text(
        "class Method:\n    peft_type, switch = 'STRANGE', ''\n"
        "    factors, pairs = ('odd_a', 'odd_b'), (('odd_a', 'odd_b'),)\n"
        "METHOD = Method()\n"
    )
    info = tmp_path / "odd_method-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[rlhf_convert.methods]\nodd = odd_method:METHOD\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    declared.cache_clear()
    try:
        found = {d.peft_type: d for d in declared()}
    finally:
        declared.cache_clear()
    assert found["STRANGE"].factors == ("odd_a", "odd_b")
    assert found["STRANGE"].pairs == (("odd_a", "odd_b"),)
    assert found["STRANGE"].shared == ()
