"""`rlhf-convert gather` on what verl saved: models that transformers loads, adapters that PEFT loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oracle.command import run
from verl_saves.compare import RUNS, live
from zero.compare import differences

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _copy(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(RUNS / name, tmp_path / name))


def _adapter_keys(folder: Path) -> dict[str, torch.Tensor]:
    return {n.replace(".default", ""): t for n, t in live(folder).items() if ".lora_" in n}


def _base(folder: Path) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "huggingface"))


def test_an_actor_is_gathered_and_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    step = tmp_path / "run" / "global_step_2"
    shutil.copytree(RUNS / "actor-fsdp1-n1", step / "actor")
    out = tmp_path / "out"
    done = run("gather", str(tmp_path / "run"), str(out))
    assert done.code == 0, done.err
    assert "the only part that was saved" in done.out
    assert "verl FSDP, 1 rank" in done.out
    assert "config.json found in huggingface" in done.out
    assert differences(load_file(out / "model.safetensors"), live(step / "actor")) == []
    assert differences(LlamaForCausalLM.from_pretrained(out).state_dict(), live(step / "actor")) == []


@pytest.mark.parametrize("name", ["actor-tied-fsdp1-n2", "actor-tied-fsdp2-n2"])
def test_a_tied_model_loads_with_both_names(tmp_path: Path, name: str) -> None:
    from transformers import LlamaForCausalLM

    done = run("gather", str(_copy(tmp_path, name)), str(tmp_path / "out"))
    assert done.code == 0, done.err
    assert differences(LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict(), live(RUNS / name)) == []


def test_a_critic_keeps_its_class_and_its_head(tmp_path: Path) -> None:
    from transformers import LlamaForTokenClassification

    folder, out = _copy(tmp_path, "critic-fsdp2-n4"), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForTokenClassification"]
    assert differences(load_file(out / "model.safetensors"), live(folder)) == []
    assert differences(LlamaForTokenClassification.from_pretrained(out).state_dict(), live(folder)) == []


def test_a_bf16_run_stays_bf16_and_is_widened_exactly_on_request(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "actor-bf16-fsdp1-n2")
    assert run("gather", str(folder), str(tmp_path / "a")).code == 0
    assert differences(load_file(tmp_path / "a" / "model.safetensors"), live(folder)) == []
    done = run("gather", str(folder), str(tmp_path / "b"), "--dtype", "float32")
    assert done.code == 0, done.err
    assert "kept no fp32 masters" in done.out
    wanted = {n: t.float() for n, t in live(folder).items()}
    assert differences(load_file(tmp_path / "b" / "model.safetensors"), wanted) == []


@pytest.mark.parametrize("name", ["lora-fsdp1-n2", "lora-bf16-fsdp2-n2", "lora-only-fsdp2-n2"])
def test_lora_becomes_an_adapter_with_the_alpha_that_verl_records(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    folder, out = _copy(tmp_path, name), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    assert "lora_alpha = 8 as lora_train_meta.json records" in done.out
    assert "lora_train_meta.json" not in {p.name for p in out.iterdir()}
    assert differences(load_file(out / "adapter_model.safetensors"), _adapter_keys(folder)) == []
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 8)
    dtype = next(iter(live(folder).values())).dtype
    loaded = PeftModel.from_pretrained(_base(folder).to(dtype), out, autocast_adapter_dtype=False)
    held = {n: t for n, t in loaded.state_dict().items() if ".lora_" in n}
    assert differences(held, {n: t for n, t in live(folder).items() if ".lora_" in n}) == []


@pytest.mark.parametrize("where", ["lora_train_meta.json", "lora_adapter/adapter_config.json"])
def test_an_alpha_of_zero_is_not_believed(tmp_path: Path, where: str) -> None:
    folder, out = _copy(tmp_path, "lora-fsdp1-n2"), tmp_path / "out"
    recorded = folder / "lora_train_meta.json"
    config = json.loads((folder / "config-of-peft.json").read_text())
    if where == recorded.name:
        recorded.write_text('{"r": 2, "lora_alpha": 0, "task_type": "CAUSAL_LM"}')
    else:
        recorded.unlink()
        (folder / "lora_adapter").mkdir()
        (folder / where).write_text(json.dumps(config | {"lora_alpha": 0}))
    done = run("gather", str(folder), str(out))
    assert (done.code, out.exists()) == (2, False)
    assert "lora-alpha-unknown" in done.err
    done = run("gather", str(folder), str(out), "--lora-alpha", "8")
    assert done.code == 0, done.err
    assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_the_config_in_lora_adapter_is_the_runs_own(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "lora-fsdp1-n2"), tmp_path / "out"
    (folder / "lora_adapter").mkdir()
    (folder / "config-of-peft.json").rename(folder / "lora_adapter" / "adapter_config.json")
    (folder / "lora_train_meta.json").unlink()
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    assert "adapter_config.json found in lora_adapter" in done.out
    found = json.loads((out / "adapter_config.json").read_text())
    assert (found["lora_alpha"], found["task_type"]) == (8, "CAUSAL_LM")
    assert sorted(found["target_modules"]) == ["down_proj", "q_proj"]


def test_a_record_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-fsdp1-n2")
    (folder / "lora_train_meta.json").write_text('{"r": 64, "lora_alpha": 32, "task_type": "CAUSAL_LM"}')
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "adapter-rank" in done.err


def test_lora_is_merged_over_the_runs_own_weights_in_the_same_pass(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    folder, out = _copy(tmp_path, "lora-fsdp1-n2"), tmp_path / "out"
    done = run("gather", str(folder), str(out), "--emit", "merged")
    assert done.code == 0, done.err
    held, wanted = live(folder), {}
    for name, tensor in held.items():
        if ".lora_" in name:
            continue
        if ".base_layer." in name:
            module = name.rpartition(".base_layer.")[0]
            a, b = (held[f"{module}.lora_{x}.default.weight"] for x in "AB")
            tensor = tensor + 4.0 * (b @ a)
        wanted[name.removeprefix(PREFIX).replace(".base_layer", "")] = tensor
    loaded = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert loaded.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-7)
        if "lora" not in name and f"{PREFIX}{name}" in held:
            assert torch.equal(loaded[name], tensor)


def test_a_critic_with_lora_on_its_random_head_keeps_the_head(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "lora-critic-fsdp2-n2"), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    held = live(folder)
    a, b = (held[f"{PREFIX}score.lora_{x}.default.weight"] for x in "AB")
    wanted = held[f"{PREFIX}score.base_layer.weight"] + 4.0 * (b @ a)
    found = load_file(out / "adapter_model.safetensors")
    torch.testing.assert_close(found[f"{PREFIX}score.weight"], wanted, rtol=1e-6, atol=1e-7)
    assert torch.equal(found[f"{PREFIX}score.bias"], held[f"{PREFIX}score.base_layer.bias"])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["score"], "TOKEN_CLS")


def test_a_critics_frozen_random_head_is_in_the_adapter_and_in_the_merged_model(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForTokenClassification

    folder = _copy(tmp_path, "lora-critic-frozen-fsdp2-n2")
    held = {n: live(folder)[f"{PREFIX}score.{n}"] for n in ("weight", "bias")}
    done = run("gather", str(folder), str(tmp_path / "a"))
    assert done.code == 0, done.err
    assert "random, frozen, and in this checkpoint alone" in done.out
    base = LlamaForTokenClassification(LlamaConfig.from_pretrained(folder / "huggingface", num_labels=1))
    loaded = PeftModel.from_pretrained(base, tmp_path / "a").state_dict()
    assert all(torch.equal(loaded[f"{PREFIX}score.modules_to_save.default.{n}"], t) for n, t in held.items())
    done = run("gather", str(folder), str(tmp_path / "b"), "--emit", "merged")
    assert done.code == 0, done.err
    merged = LlamaForTokenClassification.from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(merged[f"score.{n}"], t) for n, t in held.items())


def test_a_damaged_shard_is_found_before_anything_is_published(tmp_path: Path) -> None:
    from converter.core.tensors.byte_runs import leaves
    from converter.sources.verl.source import SOURCE

    folder, out = _copy(tmp_path, "critic-fsdp1-n3"), tmp_path / "out"
    last: Any = list(leaves(SOURCE.open(folder, asked="x").tensors["model.norm.weight"]))[-1]
    raw = bytearray(Path(last.file).read_bytes())
    raw[last.offset] ^= 1
    Path(last.file).write_bytes(raw)
    done = run("gather", str(folder), str(out))
    assert (done.code, out.exists(), (tmp_path / "out.partial").exists()) == (3, False, False)
    assert "input-corrupt" in done.err
    assert "model_world_size_3_rank_2.pt" in done.err


def test_a_missing_rank_writes_nothing(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "critic-fsdp1-n3"), tmp_path / "out"
    (folder / "model_world_size_3_rank_1.pt").unlink()
    done = run("gather", str(folder), str(out))
    assert (done.code, out.exists()) == (3, False)
    assert "verl-rank-missing" in done.err


def test_nothing_of_torch_is_imported_to_plan(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-fsdp1-n2")
    code = (
        "import sys; from converter.cli import main; "
        f"code = main(['gather', {str(folder)!r}, {str(tmp_path / 'out')!r}, '--emit', 'merged', '--dry-run']); "
        "print(code, sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
