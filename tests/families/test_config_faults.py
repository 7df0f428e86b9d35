"""A config that no loader can follow is an error to doctor and verify, and refused by whatever writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from converter.families.config_faults import PADDED, fault_of
from oracle.bases import edit_config
from oracle.command import run

SMALL = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SMALL, num_key_value_heads=2, head_dim=8)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)),
}
HARMS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another type, other names": ("mixtral", {"model_type": "mistral"}, "AutoModel builds MistralForCausalLM"),
    "another type, other numbers": ("gemma", {"model_type": "mistral"}, "AutoModel builds MistralForCausalLM"),
    "no such dtype": ("llama", {"dtype": "float7"}, "dtype is float7, which torch does not have"),
    "a text for a number": ("llama", {"rms_norm_eps": "x"}, "rms_norm_eps is the text x"),
    "a pad token without a row": ("llama", {"pad_token_id": 24}, "pad_token_id is 24, and vocab_size is 24"),
    "more experts than there are": ("mixtral", {"num_experts_per_tok": 3}, "there are 2 experts"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for name, make in MODELS.items():
        torch.manual_seed(1)
        make().save_pretrained(root / name)
    return root


def logits(folder: Path) -> torch.Tensor | None:
    """What transformers makes of a folder; None where it stops."""
    try:
        with torch.no_grad():
            made: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(6)[None]).logits
            return made
    except Exception:
        return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("harm", HARMS)
def test_what_no_loader_can_follow_is_an_error_and_refused(harm: str, sound: Path, tmp_path: Path) -> None:
    family, changes, said = HARMS[harm]
    folder = shutil.copytree(sound / family, tmp_path / "model")
    assert run("doctor", folder).code == 0
    whole = logits(folder)
    edit_config(folder, **changes)
    found = logits(folder)
    assert found is None or whole is None or not torch.equal(found, whole)
    for typed in (("doctor", folder), ("verify", folder), ("reshard", folder, tmp_path / "out")):
        done = run(*typed)
        assert done.code in (1, 3, 4) and said in done.text, (typed, done.text)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(PADDED))
def test_transformers_builds_no_embedding_whose_pad_token_has_no_row(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 1
    config.layer_types = list(getattr(config, "layer_types", None) or ["full_attention"])[:1]
    config.pad_token_id = config.vocab_size
    with torch.device("meta"), pytest.raises(AssertionError, match="Padding_idx"):
        AutoModelForCausalLM.from_config(config)
    assert fault_of({**config.to_dict(), "architectures": []}) is not None


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "torch.float16", "float8_e4m3fn", "half", None])
def test_dtypes_that_torch_has_are_none(dtype: Any) -> None:
    assert fault_of({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": dtype}) is None


def test_a_class_of_remote_code_is_not_judged() -> None:
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "gemma", "auto_map": {"AutoModel": "m.M"}}
    assert fault_of(own) is None
    assert fault_of({"architectures": ["MyOwnModel"], "model_type": "llama"}) is None
