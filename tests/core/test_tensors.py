"""Lazy tensors: normal form, byte runs, JSON, and values against torch on random nodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converter.core.compute.evaluate import Evaluator
from converter.core.files.opening import Identity
from converter.core.files.reading import InputFiles
from converter.core.tensors import byte_runs as tensor_bytes
from converter.core.tensors import kernel_specs
from converter.core.tensors import nodes as tensors
from converter.core.tensors.as_json import from_json, to_json
from converter.core.tensors.byte_runs import ByteRun
from converter.core.tensors.dtypes import DType, TensorInfo
from converter.core.tensors.nodes import Cast, Concat, Filled, Narrow, Reshape, Stored, Strided
from converter.errors import Refused
from converter.text import fold, show


def f32(*shape: int, offset: int = 0, file: str = "/a") -> Stored:
    return tensors.stored(TensorInfo(DType.F32, shape), file, offset)


def test_rows_of_stored_bytes_are_stored_bytes() -> None:
    assert tensors.rows(f32(10, 4), 2, 5) == f32(3, 4, offset=32)


def test_a_narrow_of_everything_is_the_tensor_itself() -> None:
    assert tensors.narrow(f32(10, 4), 1, 0, 4) == f32(10, 4)


def test_an_inner_narrow_moves_behind_an_outer_one() -> None:
    both = tensors.narrow(tensors.narrow(f32(10, 4), 1, 1, 2), 0, 3, 2)
    assert both == Narrow(f32(2, 4, offset=48), 1, 1, 2)


def test_a_narrow_of_a_concat_keeps_only_the_parts_it_touches() -> None:
    parts = [f32(4, 2), f32(4, 2, offset=1000), f32(4, 2, offset=2000)]
    assert tensors.narrow(tensors.concat(parts, 0), 0, 5, 2) == f32(2, 2, offset=1008)


def test_neighbours_in_one_file_become_one() -> None:
    assert tensors.concat([f32(4, 2), f32(3, 2, offset=32)], 0) == f32(7, 2)


def test_parts_along_an_inner_dimension_are_not_neighbours() -> None:
    assert isinstance(tensors.concat([f32(4, 2), f32(4, 2, offset=32)], 1), Concat)


def test_reshape_of_reshape_folds_and_stored_bytes_take_any_shape() -> None:
    assert tensors.reshape(tensors.reshape(f32(4, 6), (24,)), (2, 12)) == f32(2, 12)


def test_a_lossless_cast_on_the_way_vanishes_so_that_bytes_can_be_copied() -> None:
    half = tensors.stored(TensorInfo(DType.BF16, (4,)), "/a", 0)
    assert tensors.cast(tensors.cast(half, DType.F32), DType.BF16) == half


def test_a_lossy_cast_on_the_way_stays() -> None:
    there_and_back = tensors.cast(tensors.cast(f32(4), DType.BF16), DType.F32)
    assert there_and_back == Cast(Cast(f32(4), DType.BF16), DType.F32)


def test_recast_rounds_a_computed_value_once() -> None:
    base = tensors.stored(TensorInfo(DType.BF16, (8, 4)), "/a", 0)
    params: dict[str, kernel_specs.Param] = {
        "scales": (1.0,), "dora": (False,), "numerics": "best", "out": "BF16", "transposed": False,
    }  # fmt: skip
    merged = tensors.apply(kernel_specs.LORA_MERGE, [base, f32(2, 4), f32(8, 2)], params)
    wide = tensors.recast(merged, DType.F32)
    assert isinstance(wide, tensors.Apply) and dict(wide.params)["out"] == "F32" and wide.inputs == merged.inputs


def test_a_strided_view_that_is_contiguous_is_stored() -> None:
    info = TensorInfo(DType.F32, (3, 1, 4))
    assert tensors.strided(info, "/a", 8, (4, 99, 1)) == tensors.stored(info, "/a", 8)
    assert isinstance(tensors.strided(info, "/a", 8, (1, 1, 3)), Strided)


def test_byte_runs_of_concatenated_files_follow_each_other() -> None:
    runs = tensor_bytes.byte_runs(tensors.concat([f32(4, 2), f32(2, 2, file="/b", offset=8)], 0))
    assert runs == (ByteRun("/a", 0, 32), ByteRun("/b", 8, 16))


def test_a_short_inner_slice_is_computed_and_a_long_one_copied() -> None:
    assert tensor_bytes.byte_runs(tensors.narrow(f32(10, 8), 1, 0, 4)) is None
    wide = f32(2, 100_000)
    assert tensor_bytes.byte_runs(tensors.narrow(wide, 1, 50_000, 50_000)) == (
        ByteRun("/a", 200_000, 200_000),
        ByteRun("/a", 600_000, 200_000),
    )


def test_a_tensor_without_elements_has_no_bytes_and_reads_nothing() -> None:
    assert tensor_bytes.byte_runs(f32(0, 4)) == () and tensor_bytes.reads(f32(0, 4)) == ()


def test_a_zero_dimensional_tensor_is_one_row() -> None:
    scalar = f32()
    assert tensors.rows(scalar, 0, 1) == scalar and tensor_bytes.byte_runs(scalar) == (ByteRun("/a", 0, 4),)


@pytest.mark.parametrize(("dim", "start", "length"), [(2, 0, 1), (0, 9, 2), (0, -1, 1), (0, 0, -1)])
def test_a_narrow_outside_the_shape_is_refused(dim: int, start: int, length: int) -> None:
    with pytest.raises(Refused, match="outside the shape"):
        tensors.narrow(f32(10, 4), dim, start, length)


def test_packed_data_is_not_cut_inside_a_byte() -> None:
    packed = tensors.stored(TensorInfo(DType.F4, (6, 3)), "/a", 0)
    assert tensors.rows(packed, 2, 4) == tensors.stored(TensorInfo(DType.F4, (2, 3)), "/a", 3)
    with pytest.raises(Refused, match="inside a byte"):
        tensors.rows(packed, 1, 2)


def test_parts_of_different_dtypes_are_not_concatenated() -> None:
    with pytest.raises(Refused, match="can't follow"):
        tensors.concat([f32(2, 2), tensors.stored(TensorInfo(DType.BF16, (2, 2)), "/a", 0)], 0)


def test_rows_of_a_merge_need_the_same_rows_of_b_and_all_of_a() -> None:
    params: dict[str, kernel_specs.Param] = {
        "scales": (2.0,), "dora": (False,), "numerics": "best", "out": "F32", "transposed": False,
    }  # fmt: skip
    w, a, b = f32(8, 4), f32(2, 4, file="/A"), f32(8, 2, file="/B")
    piece = tensors.rows(tensors.apply(kernel_specs.LORA_MERGE, [w, a, b], params), 3, 6)
    assert isinstance(piece, tensors.Apply)
    assert piece.inputs == (f32(3, 4, offset=48), a, f32(3, 2, file="/B", offset=24))


def test_fold_names_a_range_once() -> None:
    assert fold([f"layers.{i}.w" for i in range(28)]) == "layers.{0..27}.w"
    assert fold(["a.1", "a.5", "b", "c", "d"]) == "a.{1,5}, b, c and 1 more"


def test_show_escapes_what_a_terminal_would_obey() -> None:
    assert show("a\x1b[2Jb\nc\u202e") == "a\\x1b[2Jb\\nc\\u202e" and len(show("x" * 999)) == 200


@st.composite
def nodes(draw: st.DrawFn) -> tensors.LazyTensor:
    """A random tensor over a file of 4096 floats, built through the constructors."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=1, max_size=3)))
    x: tensors.LazyTensor = tensors.stored(TensorInfo(DType.F32, shape), "FILE", 4 * draw(st.integers(0, 100)))
    for _ in range(draw(st.integers(0, 5))):
        now = x.info.shape
        match draw(st.sampled_from(["narrow", "reshape", "concat", "cast", "filled"])):
            case "narrow":
                dim = draw(st.integers(0, len(now) - 1))
                start = draw(st.integers(0, now[dim]))
                x = tensors.narrow(x, dim, start, draw(st.integers(0, now[dim] - start)))
            case "reshape":
                x = tensors.reshape(x, (x.info.numel,)) if len(now) > 1 else tensors.reshape(x, (1, *now))
            case "concat":
                dim = draw(st.integers(0, len(now) - 1))
                x = tensors.concat([x, x], dim)
            case "cast":
                x = tensors.cast(x, draw(st.sampled_from([DType.F32, DType.F64, DType.BF16, DType.F16])))
            case "filled":
                x = tensors.concat([x, Filled(x.info, 1)], 0)
    return x


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("floats") / "f.bin"
    path.write_bytes(torch.randn(4096, generator=torch.Generator().manual_seed(0)).numpy().tobytes())
    return path


def reference(x: tensors.LazyTensor, memory: torch.Tensor) -> torch.Tensor:
    """The same tensor with torch's own operations on the whole file in memory."""
    names = {DType.F32: torch.float32, DType.F64: torch.float64, DType.BF16: torch.bfloat16, DType.F16: torch.float16}
    match x:
        case Stored():
            return memory[x.offset // 4 : x.offset // 4 + x.info.numel].reshape(x.info.shape)
        case Narrow():
            return reference(x.source, memory).narrow(x.dim, x.start, x.length)
        case Reshape():
            return reference(x.source, memory).reshape(x.shape)
        case Concat():
            return torch.cat([reference(p, memory) for p in x.parts], x.dim)
        case Cast():
            return reference(x.source, memory).to(names[x.dtype])
        case Filled():
            return torch.full(x.info.shape, x.value, dtype=names[x.info.dtype])
        case _:
            raise AssertionError(x)


def _at(x: tensors.LazyTensor, path: str) -> tensors.LazyTensor:
    import json

    return from_json(json.loads(json.dumps(to_json(x)).replace('"FILE"', json.dumps(path))))


@settings(max_examples=150, deadline=None)
@given(nodes())
def test_json_gives_the_same_node_back(x: tensors.LazyTensor) -> None:
    assert from_json(to_json(x)) == x


@settings(max_examples=150, deadline=None)
@given(nodes(), st.data())
def test_values_bytes_and_rows_agree_with_torch(floats: Path, x: tensors.LazyTensor, data: st.DataObject) -> None:
    memory = torch.frombuffer(bytearray(floats.read_bytes()), dtype=torch.float32)
    expected = reference(x, memory)
    assert (tuple(expected.shape), str(expected.dtype)) == (x.info.shape, f"torch.{x.info.dtype.torch_name}")
    here = _at(x, str(floats))
    with InputFiles({str(floats): Identity.of(floats.stat())}) as files:
        evaluator = Evaluator(files)
        assert torch.equal(evaluator.evaluate(here, {}), expected)
        start = data.draw(st.integers(0, x.info.shape[0]))
        stop = data.draw(st.integers(start, x.info.shape[0]))
        assert torch.equal(evaluator.evaluate(tensors.rows(here, start, stop), {}), expected[start:stop])
        runs = tensor_bytes.byte_runs(here)
        if runs is not None:
            raw = b"".join(floats.read_bytes()[r.offset : r.offset + r.length] for r in runs)
            assert raw == expected.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
