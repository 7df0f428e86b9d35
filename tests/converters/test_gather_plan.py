"""What gathering asks of the plan: adapters under PEFT's names, checksums of what is read, rows of flat stretches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.converters.gather.peft_names import PeftNames, peft_names, without_wrappers
from converter.core.checkpoint import Checkpoint, Origin, RecordCheck
from converter.core.context import Context
from converter.core.files.reading import InputFiles
from converter.core.tensors import nodes as tensors
from converter.core.tensors.byte_runs import reads
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import LazyTensor
from converter.core.writer.accounting import unaccounted
from converter.core.writer.plan import Plan, make_plan
from converter.core.writer.record_checks import compare_records
from converter.errors import Refused


def _stored(count: int, offset: int = 0, file: str = "/a") -> LazyTensor:
    return tensors.stored(TensorInfo(DType.F32, (count,)), file, offset)


def _checkpoint(kind: str, found: dict[str, LazyTensor], **more: Any) -> Checkpoint:
    origin = Origin(kind, "/run", "./run", "run", None, "0", "ZeRO-3, 2 ranks")
    return Checkpoint(found, {"peft_type": "LORA"}, origin, **more)


def test_an_adapter_gets_the_names_that_peft_reads_and_one_file_whatever_its_size() -> None:
    found = {f"t{i}": _stored(1000, 4000 * i) for i in range(5)}
    plan = make_plan(_checkpoint("adapter", found), context=Context(), max_shard_size=5000)
    assert [s.file for s in plan.shards] == ["adapter_model.safetensors"]
    assert list(plan.side_files) == ["adapter_config.json"]
    assert json.loads(plan.side_files["adapter_config.json"].content or b"") == {"peft_type": "LORA"}
    plan = make_plan(_checkpoint("model", found), context=Context(), max_shard_size=5000)
    assert [s.file for s in plan.shards] == [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert list(plan.side_files) == ["config.json", "model.safetensors.index.json"]


def test_a_plan_carries_the_checks_of_what_it_reads_through_json() -> None:
    checks = (RecordCheck("/a", 0, 400, 7), RecordCheck("/a", 400, 400, 8), RecordCheck("/b", 0, 400, 9))
    plan = make_plan(_checkpoint("model", {"w": _stored(10, 360)}, checks=checks), context=Context())
    assert plan.checks == checks[:1]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))).checks == plan.checks


def test_an_input_that_was_set_aside_is_accounted_for() -> None:
    base, out = _checkpoint("model", {"b": _stored(4)}), _checkpoint("model", {"w": _stored(4, 0, "/w")})
    assert unaccounted([base], out) == "b"
    assert unaccounted([base], out.replace(set_aside={"/run": "only its config is used"})) is None


def test_records_are_compared_with_their_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    with InputFiles({}) as files:
        compare_records([RecordCheck(str(path), 0, 0, 0)], files, 2)
        # CRC-32 of "123456789" is the standard's own test value.
        compare_records([RecordCheck(str(path), 1, 9, 0xCBF43926)], files, 2)
        with pytest.raises(Refused, match="fail the checksum"):
            compare_records([RecordCheck(str(path), 0, 9, 0xCBF43926)], files, 2)


def test_rows_of_a_parameter_cut_over_ranks_read_their_own_stretches_only() -> None:
    """Else every chunk of a large matrix would read all of it."""
    flat = tensors.concat([_stored(60, 0, "/r0"), _stored(60, 0, "/r1")], 0)
    weight = tensors.cast(tensors.reshape(flat, (12, 10)), DType.BF16)
    for start, stop in ((0, 3), (5, 7), (9, 12)):
        runs = reads(tensors.rows(weight, start, stop))
        assert sum(r.length for r in runs) == (stop - start) * 40
    assert [r.file for r in reads(tensors.rows(weight, 5, 7))] == ["/r0", "/r1"]


@pytest.mark.parametrize(
    ("names", "wanted", "taken"),
    [
        (["module.a.w", "module.b"], ["a.w", "b"], ("module.",)),
        (["module.a.w", "b"], ["module.a.w", "b"], ()),
        (["a._orig_mod.w", "_orig_mod.b"], ["a.w", "b"], ("_orig_mod.",)),
        (["module._forward_module.a"], ["a"], ("_forward_module.", "module.")),
        (["a._fsdp_wrapped_module._checkpoint_wrapped_module.w"], ["a.w"],
         ("_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")),
        (["x_orig_mod.w"], ["x_orig_mod.w"], ()),
    ],
)  # fmt: skip
def test_wrappers_are_taken_off_where_they_are_wrappers(
    names: list[str], wanted: list[str], taken: tuple[str, ...]
) -> None:
    found, said = without_wrappers(names)
    assert (list(found.values()), said) == (wanted, taken)


def test_names_that_become_one_are_refused() -> None:
    with pytest.raises(Refused, match="two tensors"):
        without_wrappers(["a._orig_mod.w", "a.w"])


def _peft(*names: str) -> PeftNames:
    return peft_names({n: n for n in names}, "x")


def test_peft_names_are_those_that_peft_saves() -> None:
    found = _peft(
        "base_model.model.q.base_layer.weight",
        "base_model.model.q.lora_A.default.weight",
        "base_model.model.q.lora_magnitude_vector.default.weight",
        "base_model.model.e.lora_embedding_A.default",
        "base_model.model.score.original_module.weight",
        "base_model.model.score.modules_to_save.default.weight",
        "base_model.model.e.token_adapter.trainable_tokens_delta.default",
    )
    assert [f.key.removeprefix("base_model.model.") for f in found.factors] == [
        "q.lora_A.weight", "q.lora_magnitude_vector", "e.lora_embedding_A", "score.weight",
        "e.token_adapter.trainable_tokens_delta",
    ]  # fmt: skip
    assert found.base == {"q.weight": "base_model.model.q.base_layer.weight"}
    assert found.copies == ["base_model.model.score.original_module.weight"]
    assert found.targets == ["q", "e"]


def test_several_adapters_at_once_are_refused() -> None:
    with pytest.raises(Refused, match="several adapters"):
        _peft("base_model.model.q.lora_A.a.weight", "base_model.model.q.lora_A.b.weight")


def test_tensors_outside_of_the_wrapped_model_are_refused() -> None:
    with pytest.raises(Refused, match="outside"):
        _peft("base_model.model.q.lora_A.a.weight", "v_head.weight")


def test_inspecting_a_model_imports_no_reader_of_trainers_files(tmp_path: Path) -> None:
    """Sources are asked by the names of files; what reads shards and pickles is imported for a folder that has some."""
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    program = (
        "import sys; from converter.cli import main; main(['inspect', sys.argv[1]]); "
        "print(*sys.modules, sep='\\n', file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    readers = ("pickle_machine", "torch_file", "torch_container", "deepspeed_state", "deepspeed_layout")
    slow = {f"converter.sources.{name}" for name in readers} | {"pickletools", "converter.core.writer.plan"}
    loaded = set(done.stderr.split())
    assert "converter.sources.deepspeed.source" in loaded
    assert slow & loaded == set()
