"""One row of a head with several, where each has a mean and a standard deviation of its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import heads_zoo as zoo
from converter.core.checkpoint import Checkpoint
from heads_run import opened, remapped, written

MEANS, DEVIATIONS = (0.5, -1.25, 3.0), (2.0, 4.0, 0.5)


def three_rows(folder: Path) -> tuple[Checkpoint, torch.Tensor, torch.Tensor]:
    """A reward model of safe-rlhf with three scores, normalised each, with its head."""
    draw = torch.Generator().manual_seed(3)
    weight, bias = torch.randn(3, zoo.HIDDEN, generator=draw), torch.randn(3, generator=draw)
    model = dataclasses.replace(zoo.live("llama", torch.float32), weight=weight, bias=bias)
    source = zoo.save(zoo.FORMS["safe-rlhf"], model, folder, bias=bias)
    path = source / "config.json"
    means = {"do_normalize": True, "mean": list(MEANS), "var": [d * d for d in DEVIATIONS], "score_type": "reward"}
    path.write_text(json.dumps(json.loads(path.read_text()) | means | {"score_dim": 3, "bias": True}))
    return opened(source), weight.double(), bias.double()


def test_a_row_that_is_taken_has_its_own_mean_and_deviation_folded_in(tmp_path: Path) -> None:
    source, weight, bias = three_rows(tmp_path / "rm")
    for label in range(3):
        out = written(remapped(source, "hf-tokcls", label=label), tmp_path / str(label))
        found = load_file(out / "model.safetensors")
        assert torch.equal(found["score.weight"], (weight[label : label + 1] / DEVIATIONS[label]).float())
        assert torch.equal(found["score.bias"], ((bias[label : label + 1] - MEANS[label]) / DEVIATIONS[label]).float())


def test_a_sum_of_rows_is_that_of_the_normalised_scores(tmp_path: Path) -> None:
    source, weight, bias = three_rows(tmp_path / "rm")
    parts = (1.0, -2.0, 0.5)
    out = written(remapped(source, "hf-tokcls", label_weights=parts), tmp_path / "out")
    found = load_file(out / "model.safetensors")
    scaled = torch.tensor([p / d for p, d in zip(parts, DEVIATIONS, strict=True)], dtype=torch.float64)
    shift = sum(p * m / d for p, m, d in zip(parts, MEANS, DEVIATIONS, strict=True))
    torch.testing.assert_close(found["score.weight"], (scaled @ weight).float().view(1, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["score.bias"], (scaled @ bias - shift).float().view(1), rtol=1e-6, atol=1e-6)
