"""`diff` of layouts that name and keep the same tensors otherwise: trainers' heads, states, experts, PEFT's keys."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from converter.cli import main
from heads_zoo import FORMS, live, save
from rope_models import save as save_rope_model
from zero.compare import RUNS

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call
ADAPTER = "adapter_model.safetensors"
HEADS = [n for n, f in FORMS.items() if not f.mlp and n not in ("hf-seqcls", "oasst", "starling34")]


def compared(a: Path, b: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    code = main(["diff", str(a), str(b), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def unpaired(found: dict[str, Any]) -> tuple[set[str], set[str]]:
    return set(found["missing"]), set(found["extra"])


@pytest.mark.parametrize("form", HEADS)
def test_one_reward_model_in_two_trainers_layouts_is_equal(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = live("llama")
    a = save(FORMS["hf-seqcls"], model, tmp_path / "a")
    b = save(FORMS[form], model, tmp_path / "b")
    _, found = compared(a, b, capsys)
    assert found["tensors"] == []
    assert unpaired(found) == (set(), {"lm_head.weight"} if FORMS[form].lm_head else set())
    assert found["equal_tensors"] == len(load_file(a / "model.safetensors"))


def test_heads_that_differ_are_told_across_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = live("llama")
    save(FORMS["openrlhf"], model, tmp_path / "a")
    save(FORMS["llamafactory"], model, tmp_path / "b")
    head = tmp_path / "b" / "value_head.safetensors"
    tensors = load_file(head)
    tensors["v_head.summary.weight"] = tensors["v_head.summary.weight"] * 2
    save_file(tensors | {"v_head.summary.bias": torch.ones(1).bfloat16()}, head)
    code, found = compared(tmp_path / "a", tmp_path / "b", capsys)
    (entry,) = found["tensors"]
    assert (code, entry["a"], entry["status"], entry["relative"]) == (1, "head.weight", "changed", pytest.approx(1.0))
    assert unpaired(found) == (set(), {"lm_head.weight", "head.bias"})
    assert any("value_head.safetensors" in said for said in found["read"][1])


def test_a_head_in_a_file_of_its_own_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        save(FORMS["llamafactory"], live("llama"), tmp_path / name)
    assert compared(tmp_path / "a", tmp_path / "b", capsys)[0] == 0
    head = tmp_path / "b" / "value_head.safetensors"
    save_file({n: t + 1 for n, t in load_file(head).items()}, head)
    code, found = compared(tmp_path / "a", tmp_path / "b", capsys)
    names = {f"value_head.safetensors:v_head.summary.{leaf}" for leaf in ("weight", "bias")}
    assert (code, {e["a"] for e in found["tensors"]}) == (1, names)


def test_a_tied_embedding_that_one_side_stores_twice_is_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=16, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    file = tmp_path / "b" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    code, found = compared(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, found["tied"], unpaired(found)) == (0, ["lm_head.weight"], (set(), set()))
    tensors["lm_head.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    code, found = compared(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, [e["b"] for e in found["tensors"]]) == (1, ["lm_head.weight"])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_5_vl"])
def test_names_and_experts_in_memory_are_those_on_disk(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rope_model(name, tmp_path / "a")
    auto = transformers.AutoModelForImageTextToText if "_vl" in name else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    state = {n: t.clone().contiguous() for n, t in model.state_dict().items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight")
    assert state.keys() != load_file(tmp_path / "a" / "model.safetensors").keys()
    save_file(state, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    code, found = compared(tmp_path / "a", tmp_path / "b", capsys)
    assert (code, found["tensors"], unpaired(found)) == (0, [], (set(), set()))


@pytest.mark.parametrize("run", ["lm-tied-z3-n2", "reward-z2-n2", "lora-z3-n2"])
def test_a_trainers_state_is_what_was_gathered_from_it(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = Path(shutil.copytree(RUNS / run, tmp_path / "run"))
    if (state / "config-of-run.json").exists():
        (state / "config-of-run.json").rename(state / "config.json")
    more = [] if (state / "adapter_config.json").exists() or "lora" not in run else ["--lora-alpha", "16"]
    assert main(["gather", str(state), str(tmp_path / "out"), "-q", *more]) == 0
    _, found = compared(state, tmp_path / "out", capsys)
    assert (found["tensors"], unpaired(found)) == ([], (set(), set()))
    assert found["equal_tensors"] == len(load_file(next((tmp_path / "out").glob("*.safetensors"))))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    model = get_peft_model(
        transformers.LlamaForCausalLM(config),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    "spelling",
    [
        lambda n: n.removeprefix("base_model.model."),
        lambda n: f"base_model.model.{n}",
        lambda n: f"module.{n}",
        lambda n: n.replace(".weight", ".default.weight"),
    ],
)
def test_an_adapter_in_another_spelling_is_equal(
    spelling: Any, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    save_file({spelling(n): t for n, t in load_file(adapter / ADAPTER).items()}, other / ADAPTER)
    code, found = compared(adapter, other, capsys)
    assert (code, found["tensors"], unpaired(found)) == (0, [], (set(), set()))


def test_adapter_configs_are_compared_by_what_they_mean(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = {k: v for k, v in config.items() if v not in (None, False, {}, [])}
    kept["target_modules"] = kept["target_modules"][::-1]
    (other / "adapter_config.json").write_text(json.dumps(kept))
    assert compared(adapter, other, capsys)[0] == 0
    (other / "adapter_config.json").write_text(json.dumps(kept | {"lora_alpha": 99, "use_rslora": True}))
    code, found = compared(adapter, other, capsys)
    assert (code, set(found["config"])) == (1, {"lora_alpha", "use_rslora"})


def test_an_adapter_against_a_model_is_told_with_the_way_to_compare_them(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_rope_model("llama", tmp_path / "model")
    assert main(["diff", str(adapter), str(tmp_path / "model")]) == 2
    err = capsys.readouterr().err
    assert "kinds-differ" in err
    assert "merge-lora" in err


def test_two_weight_files_are_compared_without_their_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"a": torch.ones(4), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    torch.save({"a": torch.ones(4), "b": torch.tensor([0.0, 3.0])}, tmp_path / "two.pt")
    code, found = compared(tmp_path / "one.safetensors", tmp_path / "two.pt", capsys)
    assert code == 1
    assert [(e["a"], e["largest"]) for e in found["tensors"]] == [("b", 3.0)]
    assert compared(tmp_path / "one.safetensors", tmp_path / "one.safetensors", capsys)[0] == 0


def test_the_screen_says_how_each_side_was_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, form in (("a", "openrlhf"), ("b", "dschat")):
        save(FORMS[form], live("qwen2"), tmp_path / name)
    main(["diff", str(tmp_path / "a"), str(tmp_path / "b")])
    lines = capsys.readouterr().out.splitlines()
    assert [text.split(":")[0] for text in lines if text.startswith("read")] == [
        "read     a as openrlhf", "read     b as dschat"
    ]  # fmt: skip
