"""`rlhf-convert gather` on what real DeepSpeed saved: models that transformers loads, adapters that PEFT loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from oracle.command import run
from zero.compare import RUNS, differences, live

PREFIX = "base_model.model."
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _copy(tmp_path: Path, name: str, *, config: bool = False) -> Path:
    folder = Path(shutil.copytree(RUNS / name, tmp_path / name))
    if config:
        (folder / "config-of-run.json").rename(folder / "config.json")
    return folder


def _adapter_keys(folder: Path) -> dict[str, torch.Tensor]:
    """Live trained tensors under the names that PEFT saves."""
    found = {}
    for name, tensor in live(folder).items():
        if ".lora_" in name or ".modules_to_save." in name:
            found[name.replace(".default", "").replace(".modules_to_save", "")] = tensor
    return found


def _merged_weights(folder: Path, scale: float) -> dict[str, torch.Tensor]:
    """W + scale * BA in fp32, rounded once, under transformers' names; what was trained whole as it is."""
    held, found = live(folder), {}
    for name, tensor in held.items():
        plain = name.removeprefix(PREFIX)
        if ".lora_" in plain or ".original_module." in plain:
            continue
        if ".base_layer." in plain:
            module = name.rpartition(".base_layer.")[0]
            a, b = (held[f"{module}.lora_{x}.default.weight"].float() for x in "AB")
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        found[plain.replace(".base_layer", "").replace(".modules_to_save.default", "")] = tensor
    return found


def test_a_model_is_gathered_and_transformers_loads_it(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    out = tmp_path / "out"
    done = run("gather", str(_copy(tmp_path, "lm-tied-z3-n2")), str(out))
    assert done.code == 0, done.err
    assert "`latest` says so" in done.out
    assert "rounded to bfloat16" in done.out
    wanted = live(RUNS / "lm-tied-z3-n2")
    wanted.pop("lm_head.weight")
    assert differences(load_file(out / "model.safetensors"), wanted) == []
    model = LlamaForCausalLM.from_pretrained(out)
    assert torch.equal(model.lm_head.weight.bfloat16(), live(RUNS / "lm-tied-z3-n2")["lm_head.weight"])


@pytest.mark.parametrize("option", [["--master"], ["--dtype", "float32"]])
@pytest.mark.parametrize("name", ["lm-tied-z3-n2", "reward-z2-n2", "lm-fp16-z1-n2"])
def test_masters_are_kept_on_request(tmp_path: Path, name: str, option: list[str]) -> None:
    done = run("gather", str(_copy(tmp_path, name)), str(tmp_path / "out"), *option)
    assert done.code == 0, done.err
    wanted = live(RUNS / name, "master")
    wanted.pop("lm_head.weight", None) if "tied" in name else None
    assert differences(load_file(tmp_path / "out" / "model.safetensors"), wanted) == []
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("name", ["lora-z3-n2", "lora-z1-n2", "lora-lean-z2-n2"])
def test_a_lora_run_becomes_an_adapter_that_peft_loads(tmp_path: Path, name: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    folder, out = _copy(tmp_path, name), tmp_path / "out"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    assert sorted(p.name for p in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "rlhf-convert.json",
    ]  # fmt: skip
    wanted = _adapter_keys(folder)
    assert differences(load_file(out / "adapter_model.safetensors"), wanted) == []
    config = LlamaConfig.from_pretrained(folder / "config-of-run.json")
    loaded = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_config(config).bfloat16(), out)
    state = loaded.state_dict()
    assert all(
        torch.equal(state[n].bfloat16(), t) for n, t in live(folder).items() if ".lora_" in n or ".modules_to" in n
    )


def test_an_adapter_config_is_rebuilt_from_shapes_and_alpha_is_asked_for(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    folder, out = _copy(tmp_path, "lora-z3-n2"), tmp_path / "out"
    (folder / "adapter_config.json").unlink()
    done = run("gather", str(folder), str(out))
    assert (done.code, out.exists()) == (2, False)
    assert "lora-alpha-unknown" in done.err
    assert "the same command with --lora-alpha and the lora_alpha of the training script" in done.err
    done = run("gather", str(folder), str(out), "--lora-alpha", "8")
    assert done.code == 0, done.err
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (2, 8, "SEQ_CLS")
    base = AutoModelForSequenceClassification.from_config(LlamaConfig.from_pretrained(folder / "config-of-run.json"))
    loaded = PeftModel.from_pretrained(base.bfloat16(), out)
    state = loaded.state_dict()
    assert all(torch.equal(state[n].bfloat16(), t) for n, t in live(folder).items() if ".lora_" in n)


def test_a_config_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-z3-n2")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "adapter-rank" in done.err


@pytest.mark.parametrize("name", ["lora-z3-n2", "lora-z1-n2"])
def test_merging_over_the_runs_own_frozen_weights_takes_one_pass(tmp_path: Path, name: str) -> None:
    folder, out = _copy(tmp_path, name, config=True), tmp_path / "out"
    done = run("gather", str(folder), str(out), "--emit", "merged")
    assert done.code == 0, done.err
    assert differences(load_file(out / "model.safetensors"), _merged_weights(folder, 4.0)) == []
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert torch.equal(model.score.weight.bfloat16(), live(folder)[f"{PREFIX}score.modules_to_save.default.weight"])


def _base(tmp_path: Path, folder: Path) -> Path:
    """The model that training began with: its frozen weights, without the head."""
    base = tmp_path / "base"
    base.mkdir()
    held = {n: t for n, t in _merged_weights(folder, 0.0).items() if not n.startswith("score")}
    save_file(held, base / "model.safetensors")
    shutil.copy(folder / "config-of-run.json", base / "config.json")
    return base


def test_merging_without_frozen_weights_needs_the_base(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "lora-lean-z2-n2"), tmp_path / "out"
    done = run("gather", str(folder), str(out), "--emit", "merged")
    assert (done.code, out.exists()) == (3, False)
    assert "base-needed" in done.err
    done = run("gather", str(folder), str(out), "--emit", "merged", "--base", str(_base(tmp_path, folder)))
    assert done.code == 0, done.err
    assert differences(load_file(out / "model.safetensors"), _merged_weights(folder, 4.0)) == []


def test_a_frozen_random_head_with_lora_on_it_is_folded_and_saved_whole(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "lora-frozen-head-z3-n2", config=True), tmp_path / "adapter"
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    found = load_file(out / "adapter_model.safetensors")
    wanted = _merged_weights(folder, 4.0)["score.weight"]
    assert torch.equal(found[f"{PREFIX}score.weight"], wanted)
    assert not any("score.lora" in n for n in found)
    config = json.loads((out / "adapter_config.json").read_text())
    assert "score" not in config["target_modules"]
    assert "score" in config["modules_to_save"]
    assert config["task_type"] == "SEQ_CLS"
    done = run("gather", str(folder), str(tmp_path / "merged"), "--emit", "merged")
    assert done.code == 0, done.err
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert differences(merged, _merged_weights(folder, 4.0)) == []


def test_a_frozen_head_that_was_not_saved_is_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-frozen-head-z3-n2")
    for path in (folder / "global_step2").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)  # noqa: TID251
        state["module"] = {n: t for n, t in state["module"].items() if "base_layer" not in n}
        state |= {"frozen_param_shapes": None, "frozen_param_fragments": None}
        torch.save(state, path)
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "head-base-lost" in done.err


def test_frozen_weights_in_no_file_are_named(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "subgroups-z3-n3")
    (folder / "config.json").write_text("{}")
    for path in (folder / "global_step2").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)  # noqa: TID251
        torch.save(state | {"frozen_param_shapes": None, "frozen_param_fragments": None}, path)
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "zero3-empty-tensors" in done.err
    assert "frozen" in done.err


def test_frozen_weights_that_were_quantised_without_their_scales_are_refused(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-frozen-head-z3-n2")
    for path in (folder / "global_step2").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)  # noqa: TID251
        state["frozen_param_fragments"] = {n: t.to(torch.int8) for n, t in state["frozen_param_fragments"].items()}
        torch.save(state, path)
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "zero_quantized_nontrainable_weights" in done.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_storage_is_found_before_anything_is_published(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "reward-z2-n2"), tmp_path / "out"
    path = folder / "global_step2" / "mp_rank_00_model_states.pt"
    from converter.sources.deepspeed.source import open_tag

    weight = open_tag(folder, asked="x").tensors["score.weight"]
    raw = bytearray(path.read_bytes())
    raw[weight.offset] ^= 1  # type: ignore[union-attr]
    path.write_bytes(raw)
    done = run("gather", str(folder), str(out))
    assert (done.code, out.exists(), (tmp_path / "out.partial").exists()) == (3, False, False)
    assert "input-corrupt" in done.err
    assert "mp_rank_00_model_states.pt" in done.err


def test_wrapper_prefixes_are_taken_off(tmp_path: Path) -> None:
    folder, out = _copy(tmp_path, "lm-tied-z3-n2"), tmp_path / "out"

    def wrapped(name: str) -> str:
        return "module._orig_mod." + name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")

    for path in (folder / "global_step2").glob("*model_states.pt"):
        state = torch.load(path, weights_only=True)  # noqa: TID251
        state["module"] = {wrapped(n): t for n, t in state["module"].items()}
        state["param_shapes"] = [{wrapped(n): s for n, s in g.items()} for g in state["param_shapes"]]
        state["shared_params"] = {wrapped(n): wrapped(h) for n, h in state["shared_params"].items()}
        torch.save(state, path)
    done = run("gather", str(folder), str(out))
    assert done.code == 0, done.err
    wanted = live(folder)
    wanted.pop("lm_head.weight")
    assert differences(load_file(out / "model.safetensors"), wanted) == []


def test_config_and_tokenizer_come_from_the_base_where_the_run_has_none(tmp_path: Path) -> None:
    folder, base = _copy(tmp_path, "lm-tied-z3-n2"), tmp_path / "base"
    base.mkdir()
    (folder / "config.json").rename(base / "config.json")
    save_file({"model.norm.weight": torch.ones(12)}, base / "model.safetensors")
    (base / "tokenizer.json").write_text("{}")
    done = run("gather", str(folder), str(tmp_path / "out"))
    assert done.code == 3
    assert "config-missing" in done.err
    done = run("gather", str(folder), str(tmp_path / "out"), "--base", str(base))
    assert done.code == 0, done.err
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_the_recipe_that_is_printed_does_the_same(tmp_path: Path) -> None:
    folder = _copy(tmp_path, "lora-z3-n2")
    printed = run("gather", str(folder), "--print-recipe", "--master")
    (tmp_path / "r.yaml").write_text(printed.out)
    assert run("run", str(tmp_path / "r.yaml"), str(tmp_path / "a")).code == 0
    assert run("gather", str(folder), str(tmp_path / "b"), "--master").code == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--master", "--dtype", "bf16"], 2, "give one"),
        (["--tag", "global_step7"], 2, "no-such-tag"),
    ],
)
def test_wishes_that_contradict_are_usage_errors(tmp_path: Path, arguments: list[str], code: int, word: str) -> None:
    done = run("gather", str(_copy(tmp_path, "lora-z3-n2")), str(tmp_path / "out"), *arguments)
    assert (done.code, word in done.err) == (code, True), done.err


def test_there_is_no_adapter_in_a_run_without_lora(tmp_path: Path) -> None:
    done = run("gather", str(_copy(tmp_path, "reward-z2-n2")), str(tmp_path / "out"), "--emit", "adapter")
    assert (done.code, "no-adapter" in done.err) == (3, True)


def test_other_verbs_say_that_shards_have_to_be_gathered(tmp_path: Path) -> None:
    tag = _copy(tmp_path, "reward-z2-n2") / "global_step2"
    done = run("reshard", str(tag), str(tmp_path / "out"))
    assert (done.code, "rlhf-convert gather" in done.err) == (3, True)


def test_nothing_of_torch_is_imported_to_plan(tmp_path: Path) -> None:
    import subprocess
    import sys

    folder = _copy(tmp_path, "lora-z3-n2", config=True)
    code = (
        "import sys; from converter.cli import main; "
        f"code = main(['gather', {str(folder)!r}, {str(tmp_path / 'out')!r}, '--emit', 'merged', '--dry-run']); "
        "print(code, sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
