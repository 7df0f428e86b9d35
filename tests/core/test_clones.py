"""A head renamed on a file system that shares blocks: the model's bytes are not written a second time."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.cli import main

pytestmark = pytest.mark.root

MEGABYTE = 1 << 20


@pytest.fixture
def shared_blocks(tmp_path: Path) -> Iterator[Path]:
    """A loop-mounted XFS image."""
    if shutil.which("mkfs.xfs") is None:
        pytest.skip("xfsprogs is not installed")
    image, mount = tmp_path / "image", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(600 * MEGABYTE)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], check=False, capture_output=True).returncode:
        pytest.skip("this machine mounts no images")
    try:
        yield mount
    finally:
        subprocess.run(["umount", mount], check=True)


def used(mount: Path) -> int:
    os.sync()
    state = os.statvfs(mount)
    return (state.f_blocks - state.f_bfree) * state.f_frsize


@pytest.mark.parametrize("target", ["skyrl", "openrlhf"])
def test_a_head_renamed_takes_no_room_for_the_rest_of_the_model(shared_blocks: Path, target: str) -> None:
    source = shared_blocks / "rm"
    source.mkdir()
    torch.manual_seed(0)
    shards = [{f"model.layers.{i}.mlp.up_proj.weight": torch.randn(8192, 1024)} for i in range(3)]
    shards[0]["model.embed_tokens.weight"] = torch.randn(64, 1024)
    shards[1]["model.norm.weight"] = torch.randn(1024)  # what follows it is on no block boundary
    shards[2]["score.weight"] = torch.randn(1, 1024)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, source / name, metadata={"format": "pt"})
    index = {n: name for name, tensors in zip(names, shards, strict=True) for n in tensors}
    total = sum(t.nbytes for tensors in shards for t in tensors.values())
    text = f'{{"metadata": {{"total_size": {total}}}, "weight_map": {str(index).replace(chr(39), chr(34))}}}'
    (source / "model.safetensors.index.json").write_text(text)
    (source / "config.json").write_text(
        '{"architectures": ["LlamaForSequenceClassification"], "model_type": "llama", "num_labels": 1, '
        '"pad_token_id": 0, "hidden_size": 1024, "vocab_size": 64, "num_hidden_layers": 3}'
    )
    before = used(shared_blocks)
    assert total > 90 * MEGABYTE
    out = shared_blocks / "critic"
    assert main(["rm-to-critic", str(source), str(out), "--to", target, "--layout", "preserve", "-q"]) == 0
    assert used(shared_blocks) - before < 4 * MEGABYTE
    head = "value_head.weight" if target == "skyrl" else "score.weight"
    for name, tensors in zip(names, shards, strict=True):
        made = load_file(out / name)
        expected = {head if n == "score.weight" else n: t for n, t in tensors.items()}
        assert made.keys() == expected.keys()
        assert all(torch.equal(made[n], expected[n]) for n in made)
