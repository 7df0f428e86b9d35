"""Records of a distributed checkpoint, read by the kinds of them: the same as each read by itself, or refused."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251
import pickletools
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from converter.core.formats import pickle_machine as machine
from converter.core.formats.pickle_values import Built
from converter.core.formats.torch_file import read_torch_member
from converter.core.formats.torch_members import Kind, Members
from converter.core.tensors.nodes import Stored
from converter.errors import Refused

VALUES = {
    "a": torch.arange(12.0).reshape(3, 4), "b": torch.full((3, 4), 7.0), "turned": torch.ones(4, 3),
    "low": torch.arange(24).reshape(6, 4).to(torch.bfloat16), "one": torch.tensor(5.0), "c": torch.zeros(3, 4),
}  # fmt: skip


def _file(tmp_path: Path, values: dict[str, torch.Tensor]) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Records behind each other, and where each begins with its length."""
    path, places = tmp_path / "__0_0.distcp", {}
    with path.open("wb") as file:
        for name, value in values.items():
            buffer = io.BytesIO()
            torch.save(value, buffer)
            places[name] = (file.tell(), len(buffer.getvalue()))
            file.write(buffer.getvalue())
    return path, places


def _read(path: Path, places: dict[str, tuple[int, int]]) -> dict[str, Any]:
    fd, kinds = os.open(path, os.O_RDONLY), dict[int, list[Kind]]()
    try:
        return {name: Members(fd, path).read(*place, kinds) for name, place in places.items()}
    finally:
        os.close(fd)


def test_a_record_read_by_its_kind_is_what_it_is_by_itself(tmp_path: Path) -> None:
    path, places = _file(tmp_path, VALUES)
    found = _read(path, places)
    raw = path.read_bytes()
    fd = os.open(path, os.O_RDONLY)
    for name, place in places.items():
        alone = read_torch_member(fd, path, start=place[0], length=place[1])
        assert (found[name].value, found[name].checks) == (alone.value, alone.checks), name
        at = found[name].value
        assert isinstance(at, Stored)
        held = torch.frombuffer(bytearray(raw[at.offset : at.offset + at.info.nbytes]), dtype=VALUES[name].dtype)
        assert torch.equal(held.reshape(VALUES[name].shape), VALUES[name])
    os.close(fd)


def test_records_have_the_same_digest_in_whichever_order_they_are_read(tmp_path: Path) -> None:
    path, places = _file(tmp_path, VALUES)
    forth = {n: t.digest for n, t in _read(path, places).items()}
    back = {n: t.digest for n, t in _read(path, dict(reversed(places.items()))).items()}
    assert forth == back
    assert len(set(forth.values())) == len(VALUES)


@pytest.mark.parametrize("where", ["head", "tail"])
def test_a_record_that_differs_from_its_kind_anywhere_else_is_judged_by_itself(tmp_path: Path, where: str) -> None:
    path, places = _file(tmp_path, {"a": VALUES["a"], "b": VALUES["b"]})
    start, length = places["b"]
    raw = bytearray(path.read_bytes())
    at = raw.index(b"data.pkl", start) if where == "head" else raw.rindex(b"data/0")
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(Refused) as caught:
        _read(path, places)
    assert caught.value.code == "torch-zip"
    assert start + length == len(raw)


def test_a_record_that_is_cut_short_is_refused_though_its_kind_is_known(tmp_path: Path) -> None:
    path, places = _file(tmp_path, {"a": VALUES["a"], "b": VALUES["b"]})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(Refused) as caught:
        _read(path, places)
    assert caught.value.code == "file-truncated"


def _plain(value: Any) -> Any:
    """Inert objects by what they hold, for comparing."""
    if isinstance(value, Built):
        return (value.path, *map(_plain, (value.args, value.kwargs, value.state, value.items)))
    if isinstance(value, dict):
        return [type(value).__name__, *((k, _plain(v)) for k, v in value.items())]
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_plain, value)]
    return repr(value)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_in_memory_is_read_as_by_pickletools(protocol: int) -> None:
    """The two decoders agree about every opcode that Python writes."""
    value = {
        "text": "ä" * 300, "numbers": [0, 255, 256, 65535, 65536, -1, 2**40, 1.5, True, None], "set": {1},
        "nested": OrderedDict(a=(1, (2, (3, ()))), b=[[]], c=b"bytes" * 60), "type": torch.bfloat16,
    }  # fmt: skip
    raw = pickle.dumps([value, value], protocol)
    in_memory = machine.read_pickle(io.BytesIO(raw), where="x")
    through = machine.read_pickle(io.BufferedReader(io.BytesIO(raw)), where="x")
    assert (_plain(in_memory.value), in_memory.names) == (_plain(through.value), through.names)
    assert in_memory.value[0] is in_memory.value[1]


def test_a_harmed_pickle_in_memory_is_refused_where_pickletools_refuses_it() -> None:
    raw = pickle.dumps({"a": [1, 2, (3, "four")], "b": {"c": 70000, "d": "x" * 300}}, 4)
    for at in range(len(raw)):
        for harmed in (raw[:at], raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :]):
            ends: list[Any] = []
            for file in (io.BytesIO(harmed), io.BufferedReader(io.BytesIO(harmed))):
                try:
                    ends.append(_plain(machine.read_pickle(file, where="x").value))
                except Refused as error:
                    ends.append(error.code)
            assert ends[0] == ends[1], (at, pickletools.code2op.get(chr(raw[at])))
