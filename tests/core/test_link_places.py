"""A linked file that was cut or that grew is another one than was linked, though its header is the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from converter.cli import main
from converter.core.files.opening import open_input
from converter.errors import Refused
from verify_folders import make_rm


@pytest.mark.parametrize("change", [-4, 4])
def test_a_linked_file_of_another_size_is_another_file(change: int, tmp_path: Path) -> None:
    model = make_rm(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["reshard", str(model), str(out), "--link-unchanged", "-q"]) == 0
    linked, file = out / "model.safetensors", model / "model.safetensors"
    assert linked.is_symlink()
    os.close(open_input(linked, root=out))
    os.truncate(file, file.stat().st_size + change)
    with pytest.raises(Refused) as caught:
        open_input(linked, root=out)
    assert caught.value.code == "link-changed"
