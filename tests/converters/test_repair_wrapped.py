"""Wrappers and prefixes of every combination, LoRA layers left in a full model, several faults at once: one pass."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from converter.families.plain_names import plain_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    from transformers import (
        AutoModelForCausalLM,
        BertConfig,
        BertForMaskedLM,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        Qwen2Config,
        Qwen2ForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

pytestmark = pytest.mark.filterwarnings("ignore")
FILE = "model.safetensors"
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
}
Tensors = dict[str, torch.Tensor]
Change = Callable[[str], str]


def _model(kind: str) -> Any:
    torch.manual_seed(0)
    match kind:
        case "lm":
            return LlamaForCausalLM(LlamaConfig(**SIZES))
        case "tied":
            return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        case "reward":
            return LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1, pad_token_id=0))
        case "t5":
            return T5ForConditionalGeneration(
                T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=16)
            )
    encoder = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return BertForMaskedLM(BertConfig(**encoder, max_position_embeddings=16))


def _broken(model: Any, folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    value = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in value.items() if v is not None}))
    save_file({n: t.clone().contiguous() for n, t in tensors.items()}, folder / FILE, metadata={"format": "pt"})
    return folder


def _saved(model: Any, folder: Path) -> Tensors:
    model.save_pretrained(folder)
    return {n: t.clone() for n, t in load_file(folder / FILE).items()}


def _same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _repaired(folder: Path, *more: str) -> Path:
    out = folder.with_name("out")
    assert main(["repair", str(folder), str(out), "-q", *more]) == 0
    assert [f.code for f in examine(DoctorRequest(str(out), deep=True)).findings if f.severity != "cosmetic"] == []
    return out


RENAMES: dict[str, Change] = {
    "module._orig_mod.": lambda n: f"module._orig_mod.{n}",
    "_orig_mod.module.": lambda n: f"_orig_mod.module.{n}",
    "_forward_module.module._orig_mod.": lambda n: f"_forward_module.module._orig_mod.{n}",
    "module. three times": lambda n: f"module.module.module.{n}",
    "model._orig_mod. within": lambda n: n.replace("model.", "model._orig_mod.", 1),
    "a wrapper at every module": lambda n: n.replace(".self_attn.", "._fsdp_wrapped_module.self_attn._orig_mod."),
    "a wrapper before the leaf": lambda n: n.replace(".weight", "._checkpoint_wrapped_module.weight"),
    "one tensor alone within": lambda n: n.replace("model.norm", "_orig_mod.model.norm"),
    "one tensor alone before": lambda n: n.replace("model.norm", "module.model.norm"),
    "half of the layers": lambda n: f"module.{n}" if "layers.1." in n else n,
    "model. before every name": lambda n: f"model.{n}",
    "model. twice and a wrapper": lambda n: f"_orig_mod.model.model._orig_mod.{n}",
    "model. twice in the layers alone": lambda n: n.replace("model.layers", "model.model.layers"),
    "base_model.model. without LoRA": lambda n: f"base_model.model.{n}",
    "module. around base_model.model.": lambda n: f"module.base_model.model.{n}",
}


@pytest.mark.parametrize("name", RENAMES)
def test_wrappers_and_prefixes_come_off_to_the_last_one(tmp_path: Path, name: str) -> None:
    model = _model("lm")
    good = _saved(model, tmp_path / "good")
    folder = _broken(model, tmp_path / "lm", {RENAMES[name](n): t for n, t in good.items()})
    codes = {f.code for f in examine(DoctorRequest(str(folder))).findings if f.severity == "error"}
    assert codes and codes <= {"names-wrapped", "names-doubled", "output-embedding-missing"}
    out = _repaired(folder)
    assert _same(load_file(out / FILE), good)
    _, info = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_a_tensor_with_and_without_a_wrapper_is_kept_once_where_equal_and_refused_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = _model("lm")
    good = _saved(model, tmp_path / "good")
    twice = "_orig_mod.model.norm.weight"
    folder = _broken(model, tmp_path / "lm", good | {twice: good["model.norm.weight"]})
    assert _same(load_file(_repaired(folder) / FILE), good)
    other = _broken(model, tmp_path / "other", good | {twice: good["model.norm.weight"] + 1})
    assert main(["repair", str(other), str(tmp_path / "refused")]) == 3
    error = capsys.readouterr().err
    assert "rename-collision" in error and twice in error and not (tmp_path / "refused").exists()


@pytest.mark.parametrize("kind", ["tied", "t5", "bert"])
def test_wrapped_copies_of_what_a_class_ties_are_stored_once(tmp_path: Path, kind: str) -> None:
    model = _model(kind)
    good = _saved(model, tmp_path / "good")
    folder = _broken(model, tmp_path / "wrapped", {f"module._orig_mod.{n}": t for n, t in model.state_dict().items()})
    assert _same(load_file(_repaired(folder) / FILE), good)


def test_wrapped_copies_that_differ_are_untied_with_consent_alone(tmp_path: Path) -> None:
    model = _model("tied")
    state = {f"module.{n}": t + 1 if n == "lm_head.weight" else t for n, t in model.state_dict().items()}
    folder = _broken(model, tmp_path / "wrapped", state)
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 3
    loaded = AutoModelForCausalLM.from_pretrained(_repaired(folder, "--allow", "untie"))
    assert torch.equal(loaded.lm_head.weight, state["module.lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, state["module.model.embed_tokens.weight"])


def test_a_wrapped_reward_model_of_a_wrapped_class_without_labels_is_fixed_in_one_pass(tmp_path: Path) -> None:
    model = _model("reward")
    good = _saved(model, tmp_path / "good")
    names = {f"module._orig_mod.{n}": t for n, t in good.items()}
    lost = {"id2label": None, "label2id": None, "num_labels": None}
    wrapped = ["FSDPLlamaForSequenceClassification"]
    folder = _broken(model, tmp_path / "rm", names, architectures=wrapped, **lost)
    out = _repaired(folder)
    assert _same(load_file(out / FILE), good)
    loaded, info = LlamaForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and loaded.config.num_labels == 1


def _trained(kind: str, **settings: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(_model(kind)), LoraConfig(lora_alpha=6, r=2, **settings))
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.1)
        elif "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def _unwrapped(name: str) -> str:
    return name.removeprefix("base_model.model.")


LORA: dict[str, tuple[str, dict[str, Any], Change]] = {
    "DoRA": ("lm", {"use_dora": True, "target_modules": ["q_proj", "v_proj"]}, _unwrapped),
    "ranks that differ": (
        "lm", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 4}}, _unwrapped
    ),
    "embeddings and head": ("lm", {"target_modules": ["embed_tokens", "lm_head"]}, _unwrapped),
    "biases": ("lm", {"target_modules": ["q_proj"], "bias": "all"}, _unwrapped),
    "a wrapper before": ("lm", {"target_modules": "all-linear"}, lambda n: f"_orig_mod.{_unwrapped(n)}"),
    "a wrapper within PEFT's": (
        "lm", {"target_modules": ["q_proj"]}, lambda n: n.replace("base_model.model.", "base_model.model._orig_mod.")
    ),
    "no adapter's name": ("lm", {"target_modules": ["q_proj"]}, lambda n: _unwrapped(n).replace(".default.", ".")),
    "a head trained whole": ("lm", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, _unwrapped),
    "a reward model": ("reward", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}, _unwrapped),
    "a tied model": ("tied", {"target_modules": ["q_proj"]}, _unwrapped),
    "the embeddings of a tied model": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, _unwrapped),
    "the head of a tied model": ("tied", {"target_modules": ["lm_head"]}, _unwrapped),
    "both sides of a tied model": ("tied", {"target_modules": ["embed_tokens", "lm_head"]}, _unwrapped),
}  # fmt: skip


SLOW = ("biases", "a wrapper within PEFT's", "no adapter's name", "a tied model", "the head of a tied model")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LORA])
def test_lora_left_in_a_full_model_is_merged_into_what_it_computed(tmp_path: Path, name: str) -> None:
    kind, settings, change = LORA[name]
    model = _trained(kind, **settings)
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        expected = model(ids).logits
    folder = _broken(model.get_base_model(), tmp_path / "left", {change(n): t for n, t in model.state_dict().items()})
    out = _repaired(folder, "--lora-alpha", "6")
    loaded, info = type(_model(kind)).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(ids).logits, expected, atol=1e-5)


def test_a_wrapped_reward_model_with_lora_and_without_labels_is_merged_and_fixed_in_one_pass(tmp_path: Path) -> None:
    model = _trained("reward", target_modules=["q_proj"], task_type="SEQ_CLS")
    lost = {"id2label": None, "label2id": None, "num_labels": None}
    wrapped = {f"module._orig_mod.{n}": t for n, t in model.state_dict().items()}
    base = model.get_base_model()
    folder = _broken(base, tmp_path / "left", wrapped, architectures=["FSDPLlamaForSequenceClassification"], **lost)
    out = _repaired(folder, "--lora-alpha", "6")
    ids = torch.arange(1, 9)[None]
    loaded = LlamaForSequenceClassification.from_pretrained(out).eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("emit", ["adapter", "both"])
def test_lora_left_in_a_full_model_is_split_off_as_peft_saves_it(tmp_path: Path, emit: str) -> None:
    model = _trained("lm", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "expected")
    _saved(_model("lm"), tmp_path / "base")
    folder = _broken(
        model.get_base_model(), tmp_path / "left", {_unwrapped(n): t for n, t in model.state_dict().items()}
    )
    out = tmp_path / "out"
    assert main(["repair", str(folder), str(out), "--lora-alpha", "6", "--emit", emit, "-q"]) == 0
    adapter = out if emit == "adapter" else tmp_path / "out-adapter"
    file = "adapter_model.safetensors"
    assert _same(load_file(adapter / file), load_file(tmp_path / "expected" / file))
    ids = torch.arange(1, 9)[None]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        if emit == "both":
            merged = AutoModelForCausalLM.from_pretrained(out).eval()
            assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)


def test_a_split_needs_lora_and_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _trained("lm", target_modules=["q_proj"])
    folder = _broken(
        model.get_base_model(), tmp_path / "left", {_unwrapped(n): t for n, t in model.state_dict().items()}
    )
    for emit in ("adapter", "both", "merged"):
        assert main(["repair", str(folder), str(tmp_path / "out"), "--emit", emit]) == 2
        assert "lora-alpha-unknown" in capsys.readouterr().err
    _saved(_model("lm"), tmp_path / "whole")
    assert main(["repair", str(tmp_path / "whole"), str(tmp_path / "out"), "--emit", "both"]) == 2
    assert "no-adapter" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (["encoder.encoder.layers.0.weight", "encoder.encoder.norm.weight"], None),
        (["visual.model.a.weight", "model.model.b.weight"], None),
        (["model.model.a.weight", "model.model.b.weight"], ["model.a.weight", "model.b.weight"]),
        (["model.model.a.weight", "model.model.b.weight", "model.head.weight"],
         ["model.a.weight", "model.b.weight", "head.weight"]),
        (["module.a.weight", "b.weight"], ["a.weight", "b.weight"]),
        (["base_model.model.a.lora_A.weight"], None),
    ],
)  # fmt: skip
def test_of_a_class_that_no_table_has_a_prefix_comes_off_where_every_name_has_it(
    names: list[str], plain: list[str] | None
) -> None:
    assert list(plain_names(names, {"architectures": ["Own"]}).names.values()) == (plain or names)


def test_a_bare_backbone_that_is_stored_with_its_prefix_is_left_as_it_loads() -> None:
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    assert plain_names(names, {"architectures": ["LlamaModel"], **SIZES}).changed == ()
