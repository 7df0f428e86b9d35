"""`convert --to megatron --layout legacy`: each rank's file has what `mcore/models.py` puts into that rank's modules.

That megatron-core's own modules load the files is compared by tests/runs/run_mcore_written.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mcore.compare import written
from mcore.models import built, in_megatron
from oracle.command import run
from zero.compare import differences


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hf")
    for case in ("qwen2-tied", "qwen3_moe", "gpt_oss"):
        built(case).save_pretrained(root / case)
    return root


def _file(out: Path, rank: str) -> dict[str, object]:
    found: dict[str, object] = torch.load(out / "release" / rank / "model_optim_rng.pt", weights_only=False)  # noqa: TID251
    return found


def _parts(whole: dict[str, torch.Tensor], stage: int, tp: int, ranks: int) -> dict[str, torch.Tensor]:
    """Of a tied Qwen2 with a layer a stage, by the local names of a rank's modules, cut loop by loop."""
    found = {}
    for name, tensor in whole.items():
        if name.startswith(f"decoder.layers.{stage}."):
            name = name.replace(f"decoder.layers.{stage}.", "decoder.layers.0.")
        elif name.startswith("decoder.layers.") or (stage == 0) != (name == "embedding.word_embeddings.weight"):
            continue
        if "linear_qkv" in name or "word_embeddings" in name:
            tensor = tensor.chunk(ranks)[tp]
        elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
            tensor = tensor.chunk(ranks, 1)[tp]
        elif name.endswith("linear_fc1.weight"):
            tensor = torch.cat([half.chunk(ranks)[tp] for half in tensor.chunk(2)])
        found[name] = tensor
    if stage == 1:
        found["output_layer.weight"] = whole["embedding.word_embeddings.weight"].chunk(ranks)[tp]
    return found


def test_every_rank_has_its_part_under_the_names_of_local_modules(models: Path, tmp_path: Path) -> None:
    model, out = models / "qwen2-tied", tmp_path / "out"
    asked = ("--layout", "legacy", "--tp", "2", "--pp", "2", "--modules", "local")
    done = run("convert", model, out, "--to", "megatron", "--role", "actor", *asked)
    assert done.code == 0, done.err
    whole = in_megatron(load_file(model / "model.safetensors"), built("qwen2-tied").config)
    rows = torch.zeros(256 - 99, 16)
    whole["embedding.word_embeddings.weight"] = torch.cat([whole["embedding.word_embeddings.weight"][:99], rows])
    for stage in range(2):
        for tp in range(2):
            state = _file(out, f"mp_rank_{tp:02d}_{stage:03d}")
            assert differences(dict(state["model"]), _parts(whole, stage, tp, 2)) == []  # type: ignore[call-overload]
            args = state["args"]
            assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)  # type: ignore[attr-defined]
            assert (args.num_layers, args.padded_vocab_size, args.add_qkv_bias) == (2, 256, True)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("etp", "modules", "files", "key"),
    [
        ("2", "transformer-engine", ["00_000", "00_001", "01_000", "01_001"], "local_experts.1.linear_fc1.weight"),
        ("1", "grouped", ["00_000", "01_001"], "linear_fc1.weight1"),
    ],
)
def test_experts_are_numbered_within_their_rank(
    models: Path, tmp_path: Path, etp: str, modules: str, files: list[str], key: str
) -> None:
    model, out = models / "qwen3_moe", tmp_path / "out"
    asked = ("--layout", "legacy", "--tp", "2", "--ep", "2", "--etp", etp, "--modules", modules)
    assert run("convert", model, out, "--to", "megatron", "--role", "actor", *asked).code == 0
    assert sorted(p.name for p in (out / "release").iterdir()) == [f"mp_rank_{f}" for f in files]
    held = load_file(model / "model.safetensors")
    gate, up = (held[f"model.layers.1.mlp.experts.3.{n}_proj.weight"] for n in ("gate", "up"))
    wanted = torch.cat([gate, up]) if etp == "1" else torch.cat([gate.chunk(2)[1], up.chunk(2)[1]])
    have = _file(out, "mp_rank_01_001")["model"][f"decoder.layers.1.mlp.experts.{key}"]  # type: ignore[index]
    assert torch.equal(have, wanted)
    assert run("gather", out, tmp_path / "back").code == 0
    assert differences(written(tmp_path / "back"), held) == []


def test_stacked_experts_of_gpt_oss_come_back_from_both_formats(models: Path, tmp_path: Path) -> None:
    model = models / "gpt_oss"
    for layout in ("torch_dist", "legacy"):
        out, back = tmp_path / layout, tmp_path / f"{layout}-back"
        done = run("convert", model, out, "--to", "megatron", "--role", "actor", "--layout", layout, "--tp", "2")
        assert done.code == 0, done.err
        assert run("gather", out, back).code == 0
        assert differences(written(back), load_file(model / "model.safetensors")) == []


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--layout", "legacy", "--pp", "3"), "2 layers are not divided by 3 stages"),
        (("--layout", "legacy", "--tp", "2", "--ep", "3"), "4 experts are not divided by 3 ranks"),
    ],
)
def test_ranks_that_do_not_divide_a_model_are_refused(
    models: Path, tmp_path: Path, asked: tuple[str, ...], said: str
) -> None:
    done = run("convert", models / "qwen3_moe", tmp_path / "out", "--to", "megatron", "--role", "actor", *asked)
    assert done.code == 3
    assert said in done.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked",
    [("--to", "trl", "--layout", "legacy"), ("--to", "trl", "--pp", "2"), ("--to", "megatron", "--modules", "local")],
)
def test_options_of_the_old_format_go_with_it_alone(models: Path, tmp_path: Path, asked: tuple[str, ...]) -> None:
    done = run("convert", models / "qwen2-tied", tmp_path / "out", "--role", "actor", *asked)
    assert done.code == 2
    assert "goes with" in done.text
