"""`explain` and the messages of engines and trainers, copied from their sources with the values of a case filled in.

Where each is printed is in the message's `seen_in`.
"""

from __future__ import annotations

import re

import pytest

from converter.examine.explanations import adapters, crashes, engines, megatron, resuming
from converter.examine.explanations.log import MESSAGES, read
from oracle.command import run

NEW = (*engines.MESSAGES, *resuming.MESSAGES, *adapters.MESSAGES, *megatron.MESSAGES)

PRINTED: dict[str, tuple[str, ...]] = {
    "engine-name-unknown": (
        (
            "ValueError: There is no module or parameter named 'base_model' in Qwen2ForCausalLM. The available "
            "parameters "
            "belonging to  (Qwen2ForCausalLM) are: {'lm_head.weight'}"
        ),
        "ValueError: No module or parameter named score in TransformersForCausalLM.",
    ),
    "engine-weights-missing": (
        "ValueError: Following weights were not initialized from checkpoint: {'model.layers.0.mlp.down_proj.weight'}",
        "Some weights are not initialized from checkpoints: ['model.norm.weight']",
        "ValueError: Missing keys ('lm_head.weight',) in loaded state!",
    ),
    "engine-name-skipped": ("Parameter model.layers.0.self_attn.q_proj.base_layer.weight not found in params_dict",),
    "engine-no-weights": (
        "RuntimeError: Cannot find any model weights with `/ckpt/global_step_10/actor/huggingface`",
        "RuntimeError: No model weights found in: `/ckpt/out`",
    ),
    "engine-shard-missing": (
        "FileNotFoundError: Weight files referenced in index but missing: {'/m/model-00002-of-00002.safetensors'}",
        (
            "RuntimeError: model.safetensors.index.json references 1 shard file(s) missing from /m (incomplete "
            "download?): "
            "['model-00002-of-00002.safetensors']"
        ),
    ),
    "engine-shape": (
        "AssertionError: Attempted to load weight (torch.Size([8, 4])) into parameter (torch.Size([4, 4]))",
        "AssertionError: Tried to load weights of size torch.Size([8, 4])to a parameter of size torch.Size([4, 4])",
        (
            "AssertionError: param.shape=torch.Size([4, 4]) param.dtype=torch.bfloat16 "
            "loaded_weight.shape=torch.Size([8, "
            "4]) "
            "loaded_weight.dtype=torch.bfloat16"
        ),
    ),
    "engine-tie-uninitialised": (
        (
            "ValueError: 'lm_head.weight' was skipped because it is tied to 'model.embed_tokens.weight' in "
            "Qwen2ForCausalLM, but 'model.embed_tokens.weight' was not found in the checkpoint, so the tied weight is "
            "uninitialized."
        ),
    ),
    "tie-differs": (
        (
            "The config for ./m says the word embeddings are tied, but the checkpoint contains a different "
            "lm_head.weight, "
            "which has been used instead of tying. Set `tie_word_embeddings=False` in the config to silence this "
            "warning."
        ),
    ),
    "lora-targets-unsupported": (
        (
            "ValueError: While loading ./a, expected target modules in {'qkv_proj'} but received ['score']. Please "
            "verify "
            "that the loaded LoRA module is correct"
        ),
        (
            "ValueError: LoRA adapter 'a' contains target modules ['lm_head'] that are not included in the specified "
            "--lora-target-modules ['q_proj']. Please update --lora-target-modules to include all required modules: "
            "['lm_head', 'q_proj'], or use 'all' to enable all supported modules."
        ),
    ),
    "lora-kind-unsupported": (
        (
            'ValueError: vLLM only supports modules_to_save being either None or ["classifier", "score"] for '
            "classification models. Unsupported modules_to_save: ['lm_head']"
        ),
        "ValueError: vLLM does not yet support DoRA.",
        "ValueError: vLLM does not support init_lora_weights='pissa'. Inits such as PiSSA modify the base model",
        "ValueError: Failed to load a because LoRA serving currently doesn't support DoRA adapters",
        (
            "ValueError: Failed to load a because LoRA serving currently doesn't support adapters that add tokens to "
            "the "
            "vocabulary"
        ),
    ),
    "lora-rank-too-large": (
        "ValueError: LoRA rank 64 is greater than max_lora_rank 16.",
        "ValueError: LoRA adapter a with rank 64 is incompatible with the current LoRA memory pool configuration.",
    ),
    "lora-head-does-not-fit": (
        "ValueError: Cannot load full module score: the model does not expose a unique classification head.",
        (
            "ValueError: Full module score for score has an incompatible weight shape: expected (1..8, 64), received "
            "(2, "
            "32)"
        ),
    ),
    "lora-embedding-rows": (
        "RuntimeError: The embedding LoRA size(32064) must be consistent with the base model's vocabulary size(32000).",
    ),
    "adapter-not-there": (
        "vllm.exceptions.LoRAAdapterNotFoundError: Loading lora a failed: No adapter found for ./run",
        "ValueError: ./a doesn't contain tensors",
        (
            "ValueError: adapter model file not found in ./a. Make sure you are passing the correct path to the "
            "adapter "
            "model."
        ),
    ),
    "quantisation-asked-otherwise": (
        (
            "ValueError: Quantization method specified in the model config (bitsandbytes) does not match the "
            "quantization "
            "method specified in the `quantization` argument (awq)."
        ),
        "ValueError: Cannot find the config file for awq",
    ),
    "heads-not-divisible": (
        "ValueError: Total number of attention heads (14) must be divisible by tensor parallel size (4).",
    ),
    "reward-model-not-embedding": ("AssertionError: LlamaForSequenceClassification is only used for embedding",),
    "engine-failed-elsewhere": (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
    ),
    "no-valid-checkpoint": ("ValueError: Can't find a valid checkpoint at ./run",),
    "resume-failed-deepspeed": ("ValueError: [deepspeed] failed to resume from checkpoint ./run/checkpoint-5",),
    "resume-started-afresh": (
        "Warning: [deepspeed] No checkpoint found at ./ckpt/_actor, skipping checkpoint loading.",
        (
            "Unable to find latest file at ./ckpt/latest, if trying to load latest checkpoint please ensure this file "
            "exists "
            "or pass an explicit checkpoint tag when loading a checkpoint."
        ),
    ),
    "zero-latest-missing": (
        "ValueError: Unable to find 'latest' file at ./run/latest",
        "ValueError: Invalid for universal checkpoint: ./run/latest_universal does not exist",
    ),
    "zero-no-files": (
        "AssertionError: ./run seems a bogus DeepSpeed checkpoint folder: Cannot find mp_rank_* files in there.",
        "FileNotFoundError: can't find *_optim_states.pt files in directory './run'",
        "ValueError: ./run/x.pt is not a model state checkpoint",
    ),
    "zero-tag-differs": (
        (
            "[rank=1] The checkpoint tag name 'loss0.71' is not consistent across all ranks. Including rank unique "
            "information in checkpoint tag could cause issues when restoring with different world sizes."
        ),
    ),
    "zero-elastic": (
        (
            "NotImplementedError: ZeRO-3 elastic checkpointing is deprecated and unsupported. Use Universal "
            "Checkpointing "
            "instead."
        ),
    ),
    "gather-switched-off": (
        (
            " stage3_gather_16bit_weights_on_model_save=false. Saving the full checkpoint instead, use "
            "zero_to_fp32.py to "
            "recover weights"
        ),
        (
            "ValueError: Cannot get 16bit model weights because `stage3_gather_16bit_weights_on_model_save` in "
            "DeepSpeed "
            "config is False."
        ),
    ),
    "dcp-metadata-not-found": (
        (
            "ValueError: Tried to load from ./ckpt but couldn't find a valid metadata file. However, potential model "
            "and "
            "optimizer checkpoint directories exist."
        ),
    ),
    "fsdp-only": ("ValueError: Checkpoint found at ./c is only supported when using PyTorch FSDP",),
    "fsdp2-names-differ": (
        (
            "ValueError: FSDP2 mapping failed (missing: ['lm_head.weight']). This is likely due to tied embeddings "
            "(config has "
            "tie_word_embeddings=True but checkpoint has separate weights)."
        ),
    ),
    "save-of-meta": (
        "RuntimeError: You can't save the model since some parameters are on the meta device.",
        "NotImplementedError: Cannot copy out of meta tensor; no data!",
    ),
    "model-not-loadable": (
        (
            "OSError: Can't load tokenizer for './run'. If you were trying to load it from "
            "'https://huggingface.co/models', "
            "make sure you don't have a local directory with the same name."
        ),
    ),
    "arguments-differ": (
        (
            "Warning: The following arguments do not match the ones in the `trainer_state.json` within the checkpoint "
            "directory: "
        ),
    ),
    "conversion-failed": (
        (
            "RuntimeError: Failed to apply weight conversion for 'model.layers.0.mlp.experts.gate_up_proj'. This "
            "likely "
            "means "
            "the checkpoint format is incompatible with the current model version. Error: x"
        ),
    ),
}
"""By code; what the installed libraries raise themselves is in test_explain_raised.py."""


def named(text: str) -> list[str]:
    return [seen.message.code for seen, new in read([text.encode()]) if new]


@pytest.mark.parametrize("code", PRINTED)
def test_a_text_of_a_framework_is_known_alone_and_behind_a_prefix(code: str) -> None:
    for text in PRINTED[code]:
        assert named(text) == [code]
        assert named(f"(WorkerDict pid=7, ip=10.0.0.1) {text}\r\n") == [code]


def test_every_new_message_says_where_it_was_found() -> None:
    place = re.compile(r"[\w-]+ [\w.]+: [\w./]+\.(?:py|cpp|c)")
    for message in (*NEW, *crashes.MESSAGES):
        if message is not crashes.UNKNOWN:
            assert message.seen_in
        assert [each for each in message.seen_in if not place.fullmatch(each)] == []


def test_each_of_eleven_frameworks_has_messages_that_are_known() -> None:
    known = {each.split(" ")[0] for message in MESSAGES for each in message.seen_in}
    assert known >= {"vllm", "sglang", "deepspeed", "accelerate", "transformers", "peft", "trl", "llamafactory", "verl"}
    assert known >= {"nemo-rl", "megatron-core", "megatron-lm", "unsloth", "openrlhf", "torch"}
    assert len(NEW) >= 60


def test_the_source_of_a_message_is_shown() -> None:
    shown = run("explain", "lora-rank-too-large").out
    assert "vllm 0.33.0: vllm/lora/peft_helper.py" in shown
    assert "vllm 0.33.0" in run("explain", PRINTED["lora-rank-too-large"][0]).out


def test_a_message_that_no_file_can_cure_sends_nobody_to_a_tool_that_would_find_nothing() -> None:
    for message in MESSAGES:
        sound = re.search(
            r"[Nn]othing (?:in the files|is wrong|on disk)|weights are (?:not concerned|sound)", message.text
        )
        steps = [str(step) for step in message.steps]
        assert not (sound and any(step.endswith("doctor DIR") for step in steps)), message.code
        assert not (message.severity == "cosmetic" and any(step.endswith("doctor DIR") for step in steps)), message.code
