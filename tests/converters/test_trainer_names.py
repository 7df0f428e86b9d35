"""torchtitan's and torchtune's distributed checkpoints come out as the models of transformers that they were made of.

`tests/runs/dcp/trainer_names.py` made the stored ones with the trainers' own converters; the oracle is transformers'
own state, bit by bit.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from converter.errors import Refused
from converter.recipe.verbs.gather import gather
from places import TESTS
from zero.compare import differences

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STORED = TESTS / "runs" / "dcp" / "trainer_names"
NAMES = sorted(p.parent.name for p in STORED.glob("*/fixture.json"))


def gathered(run: Path, out: Path) -> dict[str, torch.Tensor]:
    gather(run, out)
    return load_file(out / "model.safetensors")


def refused(run: Path, out: Path) -> str:
    with pytest.raises(Refused) as caught:
        gather(run, out)
    assert caught.value.code == "names-of-trainer"
    assert "--emit state" in str(caught.value.next)
    return caught.value.what


@pytest.mark.parametrize("name", NAMES)
def test_names_and_rows_are_those_of_transformers_bit_by_bit(name: str, tmp_path: Path) -> None:
    wanted = load_file(STORED / name / "oracle.safetensors")
    assert differences(gathered(STORED / name, tmp_path / "out"), wanted) == []


def test_the_experts_of_gpt_oss_compute_what_torchtitan_s_do(tmp_path: Path) -> None:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    state = stored_state("titan-gpt-oss")
    model = gathered(STORED / "titan-gpt-oss", tmp_path / "out")
    experts = GptOssExperts(GptOssConfig.from_pretrained(tmp_path / "out"))
    before = "model.layers.1.mlp.experts."
    experts.load_state_dict({n.removeprefix(before): t for n, t in model.items() if n.startswith(before)})
    held = [state[f"layers.1.moe.routed_experts.inner_experts.{n}"] for n in
            ("mlp1_weight_EGD", "mlp1_bias_EG", "mlp2_weight_EDF", "mlp2_bias_ED")]  # fmt: skip
    tokens, chosen = torch.randn(5, 16), 2
    first, first_bias, second, second_bias = (t[chosen] for t in held)
    both = tokens @ first.T + first_bias  # torchtitan's GptOssGroupedExperts.forward and swiglu, in fp32
    gate, up = both[..., ::2].clamp(max=7.0), both[..., 1::2].clamp(-7.0, 7.0)
    wanted = gate * torch.sigmoid(1.702 * gate) * (up + 1) @ second.T + second_bias
    found = experts(tokens, torch.full((5, 1), chosen), torch.ones(5, 1))
    assert torch.allclose(found.reshape(5, 16), wanted, atol=1e-6)


def test_gpt_oss_before_its_names_had_the_letters_of_dimensions(tmp_path: Path) -> None:
    state = {re.sub(r"(mlp\d_[a-z]+)_E[A-Z]+$", r"\1", n): t for n, t in stored_state("titan-gpt-oss").items()}
    assert "layers.0.moe.routed_experts.inner_experts.mlp1_weight" in state
    run = written(state, "titan-gpt-oss", tmp_path / "run")
    wanted = load_file(STORED / "titan-gpt-oss" / "oracle.safetensors")
    assert differences(gathered(run, tmp_path / "out"), wanted) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "is not known"),
        ({"num_attention_heads": 8, "head_dim": 4}, "8 heads of 4"),
        ({"num_attention_heads": None}, "has no num_attention_heads"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = Path(shutil.copytree(STORED / "titan-llama", tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | change))
    assert words in refused(run, tmp_path / "out")


def written(state: dict[str, torch.Tensor], like: str, run: Path) -> Path:
    """A checkpoint of a state, with the config of a stored one."""
    dcp.save({"model": state}, checkpoint_id=str(run / "step-1"), no_dist=True)
    shutil.copy(STORED / like / "config.json", run)
    return run


def old_titan(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of torchtitan before 0.3.0."""
    names = {"lm_head.weight": "output.weight"}
    return {names.get(n, n.replace("attention.qkv_linear.", "attention.")): t for n, t in state.items()}


def stored_state(name: str) -> dict[str, torch.Tensor]:
    """What torch loads of a stored run."""
    folder = str(STORED / name / "step-2")
    entries = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    state = {n: torch.zeros(e.size, dtype=e.properties.dtype) for n, e in entries.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


def test_names_of_older_versions_of_torchtitan_are_known_and_tables_of_positions_left_out(tmp_path: Path) -> None:
    state = old_titan(stored_state("titan-llama")) | {"freqs_cis": torch.ones(4)}
    run = written(state, "titan-llama", tmp_path / "run")
    wanted = load_file(STORED / "titan-llama" / "oracle.safetensors")
    assert differences(gathered(run, tmp_path / "out"), wanted) == []


def test_a_tensor_that_the_trainer_does_not_have_is_refused(tmp_path: Path) -> None:
    state = stored_state("titan-llama") | {"layers.0.attention.sinks": torch.ones(4)}
    assert "sinks" in refused(written(state, "titan-llama", tmp_path / "run"), tmp_path / "out")


def test_a_bias_of_the_routers_that_transformers_has_no_place_for_is_refused(tmp_path: Path) -> None:
    bias = {"layers.1.moe.expert_bias_E": torch.tensor([0.0, 1.0, -1.0, 0.0])}
    run = written(stored_state("titan-qwen3-moe") | bias, "titan-qwen3-moe", tmp_path / "run")
    assert "chooses experts" in refused(run, tmp_path / "out")


def test_a_bias_of_zeros_chooses_no_other_experts_and_is_left_out(tmp_path: Path) -> None:
    bias = {"layers.1.moe.expert_bias_E": torch.zeros(4)}
    run = written(stored_state("titan-qwen3-moe") | bias, "titan-qwen3-moe", tmp_path / "run")
    wanted = load_file(STORED / "titan-qwen3-moe" / "oracle.safetensors")
    assert differences(gathered(run, tmp_path / "out"), wanted) == []
    receipt = json.loads((tmp_path / "out" / "rlhf-convert.json").read_text())
    assert "layers.1.moe.expert_bias_E" in json.dumps(receipt)


def test_further_layers_that_predict_tokens_are_refused(tmp_path: Path) -> None:
    more = {"mtp_layers.0.enorm.weight": torch.ones(16)}
    run = written(stored_state("titan-deepseek") | more, "titan-deepseek", tmp_path / "run")
    assert "mtp_layers.0.enorm.weight" in refused(run, tmp_path / "out")


def test_a_layer_without_its_experts_is_not_called_a_model(tmp_path: Path) -> None:
    state = stored_state("titan-qwen3-moe")
    del state["layers.1.moe.routed_experts.inner_experts.w3_EFD"]
    run = written(state, "titan-qwen3-moe", tmp_path / "run")
    with pytest.raises(Refused) as caught:
        gather(run, tmp_path / "out")
    assert "up_proj" in str(caught.value) or "gate_up" in str(caught.value)
