"""A head under a name of a user's own class is read where nothing else can be meant; else `--head` names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from converter.cli import main
from small_families import CONFIGS, tiny

IDS = torch.arange(3, 13)[None]


def own_class(folder: Path, family: str, head: str, *, rows: int = 1, bias: bool = False) -> torch.Tensor:
    """A folder as a user's class saves it: transformers' backbone, a linear head of its own; the live scores."""
    torch.manual_seed(0)
    causal = tiny(family)
    causal.save_pretrained(folder)
    layer = torch.nn.Linear(causal.config.hidden_size, rows, bias=bias)
    with torch.no_grad():
        scores: torch.Tensor = layer(causal.base_model(IDS).last_hidden_state[:, -1])
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("lm_head")}
    tensors |= {f"{head}.{n}": t.detach().clone() for n, t in layer.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MyRewardModel"], "pad_token_id": 0, "id2label": {str(i): str(i) for i in range(rows)}}
    (folder / "config.json").write_text(json.dumps(config | {"label2id": {str(i): i for i in range(rows)}}))
    return scores


def scores_of(folder: Path) -> torch.Tensor:
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", ["reward_head", "rm_head", "v_head", "value_head.summary", "my_own"])
def test_a_linear_head_of_any_name_scores_as_in_the_users_class(family: str, head: str, tmp_path: Path) -> None:
    live = own_class(tmp_path / "rm", family, head)
    assert main(["convert", str(tmp_path / "rm"), str(tmp_path / "out"), "--to", "trl", "--role", "reward", "-q"]) == 0
    assert torch.allclose(scores_of(tmp_path / "out"), live, atol=1e-6)


def test_a_bias_is_read_and_refused_where_the_target_has_no_place_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live = own_class(tmp_path / "rm", "llama", "rm_head", bias=True)
    command = ["convert", str(tmp_path / "rm"), str(tmp_path / "out"), "--to", "trl", "--role", "reward"]
    assert main(command) == 3
    assert "REFUSED head-bias" in capsys.readouterr().err
    assert main([*command, "--bias", "drop", "-q"]) == 0
    bias = load_file(tmp_path / "rm" / "model.safetensors")["rm_head.bias"]
    assert torch.allclose(scores_of(tmp_path / "out") + bias, live, atol=1e-6)


def with_more(folder: Path, **more: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors") | {n.replace("__", "."): t for n, t in more.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_of_two_layers_one_has_to_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = own_class(tmp_path / "rm", "llama", "rm_head")
    with_more(tmp_path / "rm", cost_head__weight=torch.ones(1, 16))
    command = ["convert", str(tmp_path / "rm"), str(tmp_path / "out"), "--to", "trl", "--role", "reward"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "ERROR dialect-unknown" in said
    assert "verl" not in said.partition("expected")[0]
    assert f"Next:    rlhf-convert {' '.join(command)} --head " in said
    assert main([*command, "--head", "rm_head", "-q", "--allow", "tensors-unexpected"]) == 0
    assert torch.allclose(scores_of(tmp_path / "out"), live, atol=1e-6)


@pytest.mark.parametrize(("head", "code"), [("no_such", "head-missing"), ("model.layers.0.mlp.up_proj", "head-shape")])
def test_a_name_that_is_no_head_is_refused(
    head: str, code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_class(tmp_path / "rm", "llama", "rm_head")
    with_more(tmp_path / "rm", model__layers__0__mlp__up_proj__weight=torch.ones(2000, 16))
    words = ["convert", str(tmp_path / "rm"), str(tmp_path / "out"), "--to", "trl", "--head", head, "--role", "reward"]
    assert main(words) == 3
    assert f"REFUSED {code}" in capsys.readouterr().err


def test_no_trainer_is_named_where_there_is_no_mark_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_class(tmp_path / "rm", "llama", "reward_head")
    assert main(["doctor", str(tmp_path / "rm")]) == 0
    said = capsys.readouterr().out
    assert "reward_head.weight" in said
    assert "verl" not in said.lower()
    assert "Megatron" not in said


@pytest.mark.parametrize(
    "name", ["LlamaForQuestionAnswering", "LlamaForTokenClassification", "LlamaForCausalLM", "BertForMaskedLM"]
)
def test_layers_of_transformers_own_classes_are_no_heads_of_users(name: str, tmp_path: Path) -> None:
    from converter.converters.heads.plain import plain_head
    from converter.sources.opening import input_spec, open_checkpoint

    kind = "bert" if name.startswith("Bert") else "llama"
    getattr(transformers, name)(CONFIGS[kind] if kind in CONFIGS else bert()).save_pretrained(tmp_path)
    assert plain_head(open_checkpoint(input_spec(str(tmp_path)), token=None, keep_code=False)) is None


def bert() -> transformers.BertConfig:
    return transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )


@pytest.mark.parametrize(
    ("family", "module"),
    [
        ("llama", "model.layers.0.self_attn.k_proj"),
        ("qwen2", "layers.1.mlp.gate_proj"),
        ("gpt2", "h.0.attn.c_proj"),
        ("gpt_neox", "layers.1.mlp.dense_h_to_4h"),
    ],
)
def test_a_second_copy_of_a_layer_of_the_model_is_no_head(
    family: str, module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has the shape of a head of 8 labels; a load passes over it."""
    tiny(family).save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"old.{module}.weight"] = torch.randn(8, 16)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert main(["reshard", str(tmp_path / "model"), str(tmp_path / "out")]) == 3
    assert "tensors-unexpected" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["verify", str(tmp_path / "model")]) == 4
