"""What stands under a head's name and is no part of it is left over: named, and not copied into what is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.cli import main
from healthy.models import Saved
from oracle.bases import read_tensors, write_tensors


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("name", ["score.bias_old", "score.my_bias"])
def test_a_renamed_bias_is_not_copied_as_a_part_of_the_head(
    name: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Saved("tokcls", kind).write(tmp_path / "model")
    tensors = read_tensors(folder)
    tensors[name] = tensors.pop("score.bias")
    write_tensors(folder, tensors)
    for command in (["convert", "--role", "reward"], ["critic-to-rm"], ["rm-to-critic"]):
        verb, *rest = command
        assert main([verb, str(folder), str(tmp_path / "out"), "--to", "trl@1.12.0", *rest]) == 3
        assert name in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_tower_that_scales_up_does_not_make_a_model_a_quantised_one(tmp_path: Path) -> None:
    """SAM's `upscale_conv1` is no scale of a quantised weight."""
    import torch

    folder = Saved("bare", "sam").write(tmp_path / "model")
    tensors = read_tensors(folder)
    name = next(n for n in sorted(tensors) if n.endswith("k_proj.weight"))
    write_tensors(folder, {**tensors, name: tensors[name].to(torch.uint8)})
    assert main(["reshard", str(folder), str(tmp_path / "out"), "-q"]) == 3
    assert main(["reshard", str(folder), str(tmp_path / "out"), "-q", "--allow", "tensors-mistyped"]) == 0
