"""Containers, indexes and shards: each named breakage of a sound folder has its code in doctor's report."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from doctored import SIZES, codes, edit, serious
from places import RUNS as SAVED

SHARD = "model-00002-of-00003.safetensors"
FIRST = "model-00001-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
PT = {"format": "pt"}
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in three files, as transformers shards it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("m") / "model"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder, max_shard_size="7KB")
    assert (folder / SHARD).exists()
    return folder


@pytest.fixture(scope="module")
def trained(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with values as after training, as PEFT saves it."""
    folder = tmp_path_factory.mktemp("a") / "adapter"
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(sharded)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(folder)
    edit(folder, "adapter_config.json", base_model_name_or_path=str(sharded))
    return folder


def index_of(folder: Path, change: Callable[[dict[str, str]], None], **metadata: int) -> None:
    value = json.loads((folder / INDEX).read_text())
    change(value["weight_map"])
    value["metadata"].update(metadata)
    (folder / INDEX).write_text(json.dumps(value))


def pickled(folder: Path, value: object, name: str = "pytorch_model.bin") -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(value, folder / name)


class Hostile:
    """What a pickle may ask a reader to run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for f in sorted(folder.glob("model-*.safetensors")) for n, t in load_file(f).items()}


BREAKAGES: dict[str, Break] = {
    "git-lfs-pointer": lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "file-truncated": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]),
    "safetensors-header": lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"more"),
    "shard-missing": lambda f: (f / SHARD).unlink(),
    "index-missing": lambda f: (f / INDEX).unlink(),
    "index-malformed": lambda f: (f / INDEX).write_text("{"),
    "index-phantom": lambda f: index_of(f, lambda m: m.update({"no.such.weight": SHARD})),
    "index-conflict": lambda f: index_of(f, lambda m: m.update({min(n for n in m if m[n] == SHARD): FIRST})),
    "index-unlisted": lambda f: index_of(f, lambda m: m.pop("model.norm.weight")),
    "index-total-size": lambda f: index_of(f, lambda m: None, total_size=12),
    "stale-shards": lambda f: save_file(whole(f), f / "model.safetensors", metadata=PT),
    "config-missing": lambda f: (f / "config.json").unlink(),
    "adapter-config-stray": lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
    "stray-weights": lambda f: save_file({"a": torch.ones(1)}, f / "leftover.safetensors", metadata=PT),
    "download-unfinished": lambda f: (f / "model-00001-of-00003.safetensors.incomplete").write_bytes(b""),
    "pickle-names": lambda f: pickled(f, {"a": torch.ones(1), "b": Hostile()}),
    "pickled-weights": lambda f: pickled(f, whole(f), "consolidated.00.pth"),
    "torch-not": lambda f: (pickled(f, whole(f)), (f / "pytorch_model.bin").write_bytes(b"<html>not found</html>")),
    "no-tensors": lambda f: (
        [p.unlink() for p in f.glob("model*")],
        save_file({}, f / "model.safetensors", metadata=PT),
    ),
    "names-in-memory": lambda f: (
        edit(f, vision_config={}),
        save_file({"model.visual.a": torch.ones(1), "visual.b": torch.ones(1)}, f / "model.safetensors", metadata=PT),
        [p.unlink() for p in f.glob("model-*")],
        (f / INDEX).unlink(),
    ),
}
HARMLESS = {
    "index-unlisted",
    "index-total-size",
    "stale-shards",
    "stray-weights",
    "download-unfinished",
    "adapter-config-stray",
}


@pytest.mark.parametrize("code", BREAKAGES)
def test_each_breakage_of_a_sharded_model_has_its_code(sharded: Path, tmp_path: Path, code: str) -> None:
    folder = shutil.copytree(sharded, tmp_path / "model")
    assert codes(folder) == {}
    BREAKAGES[code](folder)
    found = codes(folder)
    assert code in found
    assert (found[code] == "error") == (code not in HARMLESS)


def with_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file, metadata=PT)


def config(**changes: object) -> Break:
    return lambda f: edit(f, "adapter_config.json", **changes)


def twin(folder: Path) -> None:
    """As OpenRLHF up to 0.5.5 leaves it after ZeRO-3: the good file pickled, the empty one beside."""
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    with_weights(folder, lambda t: {n: torch.empty(0) for n in t})


ADAPTERS: dict[str, Break] = {
    "adapter-empty-twin": twin,
    "adapter-empty": lambda f: with_weights(f, lambda t: {}),
    "adapter-and-model": lambda f: save_file({"a": torch.ones(1)}, f / "model.safetensors", metadata=PT),
    "adapter-config-missing": lambda f: (f / "adapter_config.json").unlink(),
    "adapter-shape": lambda f: with_weights(
        f, lambda t: {n: v.repeat(1, 2) if n.endswith("lora_A.weight") else v for n, v in t.items()}
    ),
    "adapter-rank": config(r=16),
    "adapter-half": lambda f: with_weights(f, lambda t: {n: v for n, v in t.items() if "v_proj.lora_A" not in n}),
    "adapter-incomplete": lambda f: with_weights(
        f, lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(16)}
    ),
    "adapter-unexpected": lambda f: with_weights(
        f, lambda t: {**t, "base_model.model.model.norm.weight": torch.ones(16)}
    ),
    "adapter-unmatched": lambda f: with_weights(
        f, lambda t: {n.replace("layers.0", "layers.9"): v for n, v in t.items()}
    ),
    "adapter-field-unknown": config(use_something_new=True),
    "adapter-pattern": config(rank_pattern={"(?P<x": 4}),
    "adapter-field-unsupported": config(use_qalora=True),
    "adapter-base-moved": config(init_lora_weights="corda"),
    "vocab-mismatch": lambda f: with_weights(
        f, lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.ones(40, 16)}
    ),
    "peft-type-unsupported": config(peft_type="NOVEL"),
    "peft-type-unmergeable": config(peft_type="PROMPT_TUNING"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", ADAPTERS)
def test_each_breakage_of_an_adapter_has_its_code(trained: Path, tmp_path: Path, code: str) -> None:
    folder = shutil.copytree(trained, tmp_path / "adapter")
    assert codes(folder) == {}
    ADAPTERS[code](folder)
    assert code in codes(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_base_is_no_fault_of_the_adapter(trained: Path, sharded: Path, tmp_path: Path) -> None:
    base = shutil.copytree(sharded, tmp_path / "model")
    edit(base, quantization_config={"quant_method": "fp8"})
    assert codes(trained, base=str(base))["base-quantised"] == "cosmetic"


def only(folder: Path, pattern: str) -> Path:
    return next(iter(sorted(folder.rglob(pattern))))


def rank(folder: Path) -> Path:
    return only(folder, "model_world_size_3_rank_0.pt")


def mixed(folder: Path) -> None:
    other = only(SAVED / "zero" / "runs" / "reward-z2-n2", "*mp_rank_00_model_states.pt")
    shutil.copyfile(other, only(folder, "zero_pp_rank_0*model_states.pt").parent / "mp_rank_00_model_states.pt")


RUNS: dict[str, tuple[str, Break]] = {
    "zero-latest": ("zero/runs/lm-tied-z3-n2", lambda f: (f / "latest").write_text("global_step99")),
    "zero-model-file": (
        "zero/runs/reward-z2-n2", lambda f: only(f, "*model_states.pt").unlink()
    ),
    "zero-mixed": ("zero/runs/lm-tied-z3-n2", mixed),
    "zero-experts": (
        "zero/runs/reward-z2-n2",
        lambda f: (only(f, "*model_states.pt").parent / "expert_0_mp_rank_00_model_states.pt").write_bytes(b""),
    ),
    "zero-pipeline": (
        "zero/runs/reward-z2-n2",
        lambda f: (only(f, "*model_states.pt").parent / "layer_00-model_01-model_states.pt").write_bytes(b""),
    ),
    "zero-tensor-parallel": (
        "zero/runs/reward-z2-n2",
        lambda f: (only(f, "*model_states.pt").parent / "mp_rank_01_model_states.pt").write_bytes(b""),
    ),
    "zero-sizes": (
        "zero/runs/lm-tied-z3-n2",
        lambda f: [
            shutil.copyfile(only(SAVED / "zero/runs/lora-z3-n2", f"*rank_{r}*optim_states.pt"), p)
            for r, p in enumerate(sorted(f.rglob("*optim_states.pt")))
        ],
    ),
    "torch-zip": (
        "zero/runs/lm-tied-z3-n2", lambda f: flip(only(f, "*rank_0*optim_states.pt"), b"data.pkl", b"data.pkx")
    ),
    "dcp-metadata-missing": ("dcp/runs/nested-n4", lambda f: only(f, ".metadata").unlink()),
    "verl-mixed": (
        "verl_saves/runs/critic-fsdp1-n3",
        lambda f: (
            only(f, "fsdp_config.json").unlink(),
            shutil.copyfile(rank(f), rank(f).with_name("model_world_size_5_rank_0.pt")),
        ),
    ),
}  # fmt: skip


def flip(file: Path, old: bytes, new: bytes) -> None:
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))


@pytest.mark.parametrize("code", RUNS)
def test_each_breakage_of_a_run_has_its_code(tmp_path: Path, code: str) -> None:
    name, change = RUNS[code]
    folder = shutil.copytree(SAVED / name, tmp_path / "run")
    assert serious(codes(folder)) == set()
    change(folder)
    assert serious(codes(folder)) == {code}


def test_a_pickle_in_a_doctor_s_hands_runs_nothing(
    sharded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "model")
    pickled(folder, {"b": Hostile()})
    assert serious(codes(folder)) == {"pickle-names"}
    assert capsys.readouterr().out == ""
