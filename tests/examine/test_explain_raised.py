"""`explain` against what the installed torch, transformers, PEFT and accelerate raise, warn and log themselves."""

from __future__ import annotations

import io
import json
import logging
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import checkpoint as dcp
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config
from transformers.utils import logging as transformers_logging

from converter.examine.explanations.log import read

TINY = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 16,
}

pytestmark = pytest.mark.filterwarnings("ignore")


def printed(action: Callable[[], object]) -> str:
    """Everything that a library logs and warns while something is done, and the traceback that it ends with."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = transformers_logging.get_logger("transformers")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                action()
            except BaseException:  # as torch's CheckpointException is
                stream.write(traceback.format_exc())
    finally:
        logger.removeHandler(handler)
        transformers_logging.set_verbosity(level)
    return stream.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in warned)


def named(action: Callable[[], object]) -> set[str]:
    return {seen.message.code for seen, _ in read([printed(action).encode()])}


def model(*, tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **settings})


def adapter(folder: Path) -> Path:
    get_peft_model(model(), lora()).save_pretrained(folder)
    return folder


def with_fields(folder: Path, **fields: object) -> Path:
    file = folder / "adapter_config.json"
    kept = {k: v for k, v in {**json.loads(file.read_text()), **fields}.items() if v != "left out"}
    file.write_text(json.dumps(kept))
    return folder


def test_torchs_optimizer_with_another_number_of_groups_or_of_parameters() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    one = torch.optim.SGD(a.parameters(), lr=1)
    fewer = torch.optim.SGD(b.parameters(), lr=1)
    two = torch.optim.SGD([{"params": [a.weight]}, {"params": [a.bias]}], lr=1)
    assert named(lambda: one.load_state_dict(fewer.state_dict())) == {"optimizer-groups-differ"}
    assert named(lambda: one.load_state_dict(two.state_dict())) == {"optimizer-groups-differ"}


def test_torchs_distributed_checkpoint_of_another_model(tmp_path: Path) -> None:
    dcp.save({"a.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path)
    assert "dcp-key-missing" in named(lambda: dcp.load({"b.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path))
    found = named(lambda: dcp.load({"a.weight": torch.ones(3, 2)}, checkpoint_id=tmp_path))
    assert found >= {"dcp-failed", "dcp-size-differs"}
    assert "traceback-unknown" not in found


def test_torchs_distributed_checkpoint_without_its_metadata(tmp_path: Path) -> None:
    dcp.save({"a.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path)
    (tmp_path / ".metadata").unlink()
    assert "dcp-metadata-not-found" in named(lambda: dcp.load({"a.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path))


def test_accelerate_and_a_tensor_of_another_shape_or_name() -> None:
    layer = nn.Linear(2, 2)
    found = named(lambda: set_module_tensor_to_device(layer, "weight", "cpu", value=torch.ones(3, 2)))
    assert found == {"accelerate-shape"}
    assert named(lambda: set_module_tensor_to_device(layer, "lora_A", "cpu", value=torch.ones(1))) == {
        "accelerate-name"
    }


def test_transformers_and_a_tie_that_is_stored_twice_or_not_at_all(tmp_path: Path) -> None:
    model(tied=True).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding + 1}, file, metadata={"format": "pt"})
    assert "tie-differs" in named(lambda: LlamaForCausalLM.from_pretrained(tmp_path))
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    assert "tie-lost" in named(lambda: LlamaForCausalLM.from_pretrained(tmp_path))


def test_transformers_and_a_config_of_another_model(tmp_path: Path) -> None:
    Qwen2Config(**TINY).save_pretrained(tmp_path)
    assert named(lambda: LlamaConfig.from_pretrained(tmp_path)) == {"model-type-differs"}


def test_transformers_and_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    found = named(lambda: AutoTokenizer.from_pretrained(tmp_path))
    assert found == {"tokenizer-not-built"}


def test_transformers_and_a_save_of_tensors_that_share_memory(tmp_path: Path) -> None:
    shared = model()
    shared.model.layers[0].self_attn.k_proj.weight = shared.model.layers[0].self_attn.q_proj.weight
    assert named(lambda: shared.save_pretrained(tmp_path)) == {"shared-tensors-undeclared"}


def test_peft_and_an_adapter_config_of_another_version(tmp_path: Path) -> None:
    newer = with_fields(adapter(tmp_path), brand_new_option=True)
    assert named(lambda: PeftConfig.from_pretrained(newer)) == {"adapter-fields-ignored"}


def test_peft_and_an_adapter_config_that_says_no_kind(tmp_path: Path) -> None:
    cut = with_fields(adapter(tmp_path), peft_type="left out", brand_new_option=True)
    assert "adapter-config-incomplete" in named(lambda: LoraConfig.from_pretrained(cut))


def test_peft_and_a_folder_with_the_config_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter(tmp_path) / "adapter_model.safetensors").unlink()
    found = named(lambda: PeftModel.from_pretrained(model(), tmp_path))
    assert found & {"adapter-weights-not-found", "not-a-repository"}
    assert "traceback-unknown" not in found


def test_peft_around_a_model_that_has_it_already() -> None:
    assert "adapter-twice" in named(lambda: get_peft_model(get_peft_model(model(), lora()), lora()))


def test_peft_and_another_base_than_the_adapters() -> None:
    assert "adapter-base-renamed" in named(lambda: get_peft_model(model(), lora(base_model_name_or_path="me/other")))


def test_peft_and_lora_on_one_side_of_a_tie() -> None:
    made = get_peft_model(model(tied=True), lora(target_modules=["lm_head"]))
    assert "adapter-tied-target" in named(made.merge_and_unload) | named(
        lambda: get_peft_model(model(tied=True), lora(target_modules=["lm_head"]))
    )


def test_peft_and_embeddings_that_are_saved_with_the_adapter(tmp_path: Path) -> None:
    made = get_peft_model(model(), lora(target_modules=["embed_tokens"]))
    assert "adapter-embeddings-saved" in named(lambda: made.save_pretrained(tmp_path))


def test_peft_and_an_adapter_that_is_saved_without_being_gathered(tmp_path: Path) -> None:
    made = get_peft_model(model(), lora())
    layer = made.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight = nn.Parameter(torch.empty(0))
    text = printed(lambda: made.save_pretrained(tmp_path))
    (seen,) = [s for s, _ in read([text.encode()]) if s.message.code == "adapter-saved-in-pieces"]
    assert seen.groups["have"] == "1"
    assert seen.groups["name"].endswith("q_proj.lora_A.weight")


def test_peft_and_a_merge_that_gives_nan() -> None:
    made = get_peft_model(model(), lora())
    made.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(float("nan"))
    assert named(lambda: made.merge_and_unload(safe_merge=True)) == {"merge-nan"}


def test_an_error_of_transformers_that_is_not_known_is_reported_as_that() -> None:
    found = named(lambda: LlamaForCausalLM(LlamaConfig(**{**TINY, "num_attention_heads": 3})))
    assert found == {"traceback-unknown"}
