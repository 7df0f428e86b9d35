"""What is read of a pickle and written again is the same: byte for byte where torch wrote it, by value else."""

from __future__ import annotations

import collections
import io
import pickle  # noqa: TID251 - the oracle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import places
from converter.core.formats.pickle_machine import read_pickle
from converter.core.formats.pickle_writer import write_pickle
from converter.core.formats.torch_container import read_container
from converter.errors import Refused
from saved_trees import differences, loaded

ZERO = sorted((places.RUNS / "zero" / "runs").rglob("*.pt"))


def again(raw: bytes) -> bytes:
    return write_pickle(read_pickle(io.BytesIO(raw), where="x").value, reference=lambda identity: identity)


def test_every_file_that_deepspeed_saved_has_the_pickle_that_torch_wrote() -> None:
    assert len(ZERO) > 40
    for path in ZERO:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            raw = archive.read(name)
        value = read_container(path).pickle.value
        assert write_pickle(value, reference=lambda identity: identity) == raw, path


class Plain:
    """Pickled by `cls.__new__` and its state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and self.value == other.value

    __hash__ = None  # type: ignore[assignment]


class Words(list[str]):
    """Appended to after it was made."""


def shared() -> list[Any]:
    one = ["x"]
    return [one, one, {"again": one}]


VALUES = {
    "numbers": [
        0,
        255,
        256,
        65535,
        65536,
        -1,
        -128,
        -(1 << 31),
        1 << 31,
        -(1 << 31) - 1,
        1 << 70,
        -(1 << 63),
        0.1,
        True,
    ],
    "texts": ["", "ä", "x" * 300, b"", b"\0\1", b"x" * 300, bytearray(b"ab")],
    "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), ((),)],
    "sets": [{1, 2}, frozenset({3}), set()],
    "mappings": [{}, {"a": 1}, {i: i for i in range(2001)}, collections.OrderedDict(b=1, a=2)],
    "counted": [collections.Counter("aab"), collections.defaultdict(list, {"x": [1]})],
    "many": list(range(2001)),
    "objects": [Plain({"deep": Plain(1)}), Words(["a"]), Words(["a", "b"])],
    "shared": shared(),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", VALUES)
def test_what_python_pickles_in_any_protocol_is_the_same_value(name: str, protocol: int) -> None:
    value = VALUES[name]
    found = pickle.loads(again(pickle.dumps(value, protocol)))
    assert found == value
    assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize("name", ["numbers", "tuples", "mappings", "many", "objects", "shared"])
def test_the_bytes_of_protocol_2_are_those_of_cpython(name: str) -> None:
    raw = pickle.dumps(VALUES[name], 2)
    assert again(raw) == raw


def test_what_was_one_object_is_one_again() -> None:
    found = pickle.loads(again(pickle.dumps(shared(), 2)))
    assert found[0] is found[1] is found[2]["again"]


def test_a_state_on_a_dictionary_is_kept(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "a.pt")
    value = read_container(tmp_path / "a.pt").pickle.value
    assert value.state["_metadata"][""] == {"version": 1}
    assert list(differences(loaded(tmp_path / "a.pt"), loaded(tmp_path / "a.pt"))) == []


def test_what_is_in_itself_is_so_again() -> None:
    inside: list[Any] = []
    inside.append(inside)
    found = pickle.loads(again(pickle.dumps(inside, 2)))
    assert found[0] is found
    for more in ((), (1, 2, 3)):
        outside: tuple[Any, ...] = ([], *more)
        outside[0].append(outside)
        found = pickle.loads(again(pickle.dumps(outside, 2)))
        assert found[0][0] is found
        assert found[1:] == more


def test_what_is_nested_too_deeply_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(Refused, match="nested deeper"):
        again(pickle.dumps(deep, 2))
