"""The backbone that `verify` runs says what transformers' own model says, held in memory or read a module at a time."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification

from converter.converters.heads.detect import detect
from converter.converters.heads.model import Reading
from converter.converters.heads.read import read
from converter.core.context import Context
from converter.errors import Refused
from converter.examine.verify import backbone as module
from converter.examine.verify.backbone import Backbone
from converter.sources.opening import input_spec, open_checkpoint
from verify_folders import randomised

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = SIZES | {"num_key_value_heads": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": PLAIN,
    "gemma2": PLAIN | {"head_dim": 8},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "mixtral": PLAIN | {"num_local_experts": 4},
    "qwen3_moe": PLAIN | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": PLAIN | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": PLAIN
    | LATENT
    | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    | {"num_experts_per_tok": 2, "num_key_value_heads": 4},
}


def saved(kind: str, folder: Path) -> Any:
    """A random reward model, saved; and itself in fp64."""
    config = AutoConfig.for_model(kind, **FAMILIES[kind], vocab_size=97, pad_token_id=0, num_labels=1)
    config._experts_implementation = "eager"
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    randomised(model).save_pretrained(folder)
    return model.double().eval()


def reading(folder: Path) -> Reading:
    checkpoint = open_checkpoint(input_spec(str(folder)), token=None, keep_code=False)
    found = detect(checkpoint)
    assert found is not None
    return read(checkpoint, found.dialect, Context(frozenset()))


@pytest.mark.parametrize("kind", FAMILIES)
def test_hidden_states_are_those_of_the_live_model(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = saved(kind, tmp_path)
    base = getattr(live, live.base_model_prefix)
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, 0
    places = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    more = {"position_ids": places} if "position_ids" in inspect.signature(base.forward).parameters else {}
    with torch.no_grad():
        expected = base(input_ids=ids, attention_mask=mask, **more).last_hidden_state[mask.bool()]
    found = reading(tmp_path)
    # Held; a module at a time; of embeddings and experts only the rows that are asked for.
    for held, large in ((1 << 30, module.LARGE), (0, module.LARGE), (0, 0)):
        monkeypatch.setattr(module, "LARGE", large)
        backbone = Backbone(found, torch.float64, held=held)
        assert backbone.is_held is bool(held)
        for _ in range(2):
            torch.testing.assert_close(backbone(ids, mask)[mask.bool()], expected, rtol=1e-12, atol=1e-12)


def test_nothing_of_a_model_that_is_not_held_stays_in_memory(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    backbone = Backbone(reading(tmp_path), torch.float64, held=0)
    ids = torch.full((1, 4), 5)
    backbone(ids, torch.ones_like(ids))
    assert {p.device.type for p in backbone.model.parameters()} == {"meta"}


def test_a_module_that_takes_anothers_parameters_is_refused_and_not_run_on_nothing(tmp_path: Path) -> None:
    config = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=97, state_size=8)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(input_spec(str(tmp_path)), token=None, keep_code=False)
    from converter.converters.heads.detect import HEADLESS
    from converter.dialects.known import dialects

    found = read(checkpoint, dialects()[HEADLESS], Context(frozenset()))
    ids = torch.full((1, 4), 5)
    with pytest.raises(Refused, match="a module at a time"):
        Backbone(found, torch.float64, held=0)(ids, torch.ones_like(ids))


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match="nothing is there for 1 parameters"):
        Backbone(reading(tmp_path), torch.float64, held=0)
    save_file(tensors | {"model.layers.1.mlp.up_proj.weight": lost[:5].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(Refused, match="another shape"):
        Backbone(reading(tmp_path), torch.float64, held=0)
