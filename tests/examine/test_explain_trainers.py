"""`explain` and the messages of PEFT, TRL, LLaMA-Factory, Unsloth, verl, NeMo-RL and Megatron, from their sources."""

from __future__ import annotations

import pytest

from converter.examine.explanations.log import read

PRINTED: dict[str, tuple[str, ...]] = {
    "adapter-config-newer": ("TypeError: LoraConfig.__init__() got an unexpected keyword argument 'corda_config'",),
    "lora-module-unsupported": (
        (
            "ValueError: Target module Qwen2VLVisionBlock( (norm1): LayerNorm() ) is not supported. Currently, only "
            "the "
            "following modules are supported: `torch.nn.Linear`"
        ),
    ),
    "merge-refused-by-peft": (
        "ValueError: Cannot merge LORA layers when the model is gptq quantized",
        "ValueError: Cannot merge adapters to a quantized model.",
        "ValueError: Please merge adapters before quantizing the model.",
    ),
    "adapter-in-model-unused": (
        (
            "Loading adapter weights from ./a led to unexpected keys not found in the model: "
            "model.x.lora_A.default.weight. "
        ),
        "Loading adapter weights from ./a led to missing keys in the model: score.weight",
    ),
    "finetuning-quantised": (
        (
            "ValueError: You cannot perform fine-tuning on purely quantized models. Please attach trainable adapters "
            "on "
            "top of"
            " the quantized model to correctly perform fine-tuning."
        ),
    ),
    "quantisation-state-missing": (
        (
            "ValueError: Supplied state dict for model.layers.0.mlp.up_proj.weight does not contain `bitsandbytes__*` "
            "and "
            "possibly other `quantized_stats` components."
        ),
        "FP4 quantization state not initialized. Please call .cuda() or .to(device) on the LinearFP4 layer first.",
        "AttributeError: 'Parameter' object has no attribute 'quant_state'",
    ),
    "peft-model-and-config": (
        (
            "ValueError: You passed a `PeftModel` instance together with a `peft_config` to the trainer. Please first "
            "merge "
            "and unload the existing adapter"
        ),
    ),
    "lora-on-output-embedding": (
        (
            "ValueError: Applying a PEFT adapter to `lm_head` is not supported: the log-probabilities are computed "
            "from "
            "`lm_head.weight` directly"
        ),
    ),
    "new-tokens-not-trained": (
        "Cloning chat template added new tokens to the tokenizer, but 'lm_head' is not in PEFT's `modules_to_save`.",
        "Remember to add embedding layers to `additional_target` to make the added tokens trainable.",
    ),
    "reward-model-not-loaded": ("AssertionError: Reward model is not correctly loaded.",),
    "reward-model-type": (
        "ValueError: `reward_model_type` cannot be lora for Freeze/Full PPO training.",
        "ValueError: Unsloth does not support lora reward model.",
    ),
    "one-adapter-only": (
        "ValueError: vLLM only accepts a single adapter. Merge them first.",
        "AssertionError: Quantized model only accepts a single adapter.",
        "ValueError: Adapter is only valid for the LoRA method.",
    ),
    "quantised-not-resizable": ("ValueError: Cannot resize embedding layers of a quantized model.",),
    "unsloth-no-config": (
        "RuntimeError: Unsloth: Failed to load model. Both AutoConfig and PeftConfig loading failed.",
    ),
    "megatron-started-at-random": (
        "WARNING: could not find the metadata file /ckpt/latest_checkpointed_iteration.txt",
        "    will not load any checkpoints and will start from random",
    ),
    "megatron-keys-differ": (
        (
            "megatron.core.dist_checkpointing.core.CheckpointingException: Some keys found in the checkpoint are "
            "missing "
            "in "
            "the provided sharded state dict. "
        ),
        "KeyError: \"output_layer.weight from model not in state dict: ['decoder.final_layernorm.weight']\"",
    ),
    "megatron-shape-differs": (
        (
            "CheckpointingException: Global shape mismatch for loaded (torch.Size([32000, 8])) and expected ((32128, "
            "8)) "
            "tensor for key embedding.word_embeddings.weight"
        ),
    ),
    "megatron-not-a-checkpoint": (
        "CheckpointingException: /ckpt/iter_1 is not a distributed checkpoint",
        "CheckpointingException: Checkpoint directory /ckpt/iter_1 does not exist",
        "NotImplementedError: unknown checkpoint format in /ckpt/iter_1",
    ),
    "megatron-shards-missing": (
        "CheckpointingException: Missing shards after fully parallel loading: {('a', (0,), None)}",
        "ValueError: Could not find shard at 'torch.Size([0, 0])' for FQN: 'model.embed_tokens.weight'",
    ),
    "megatron-optimizer-differs": (
        (
            "Unable to load optimizer from checkpoint /ckpt. Specify --no-load-optim or --finetune to prevent "
            "attempting "
            "to "
            "load the optimizer state, exiting ..."
        ),
        "AssertionError: Number of unpadded elements must be same in current run (8) and checkpoint (16)",
    ),
    "megatron-rng-differs": (
        (
            "Unable to load rng state from checkpoint /ckpt. Specify --no-load-rng or --finetune to prevent "
            "attempting to "
            "load the rng state, exiting ..."
        ),
    ),
    "megatron-not-asked-for": (
        (
            "RuntimeError: Detected load from a distributed checkpoint, but neither --use-dist-ckpt nor "
            "--auto-detect-ckpt-format is set."
        ),
    ),
    "megatron-name-unknown": (
        "NotImplementedError: Unsupported parameter name: output_layer.bias",
        (
            "ValueError: Invalid key lm_head.weight in Megatron state_dict. Expected keys to start with "
            "'decoder/embedding/output_layer' in TransformerLayer."
        ),
    ),
    "verl-layout-old": (
        (
            "RuntimeError: Detected deprecated Megatron checkpoint layout (dist_ckpt). The current loader expects the "
            "split "
            "layout (model/, optimizer/, extra/ subdirectories). Migrate the checkpoint in place with:"
        ),
    ),
    "verl-export-not-resumable": (
        (
            "RuntimeError: Found exported HF PEFT adapter at /c/huggingface/adapter, but `load_checkpoint()` resumes "
            "from "
            "/c/model."
        ),
    ),
    "verl-merge-keys": (
        "AssertionError: Missing keys in collected state dict: ['lm_head.weight']",
        (
            "AssertionError: Shape mismatch for key 'lm_head.weight': original torch.Size([8, 4]) vs collected "
            "torch.Size([4, 4])"
        ),
    ),
    "verl-world-size-unknown": (
        "ValueError: World size not found in the config file.",
        (
            "FileNotFoundError: Could not determine world size. No file matching 'model_world_size_(\\d+)_rank_0.pt' "
            "found in "
            "./actor"
        ),
    ),
    "verl-ranks-differ": (
        (
            "ValueError: Non-DTensor entry 'model.norm.weight' differs between rank 0 and rank 1; expected a "
            "replicated "
            "buffer/parameter identical on every rank"
        ),
    ),
    "verl-alpha-lost": (
        (
            "UserWarning: LoRA alpha metadata is missing or equals 0; falling back to lora_alpha=0. Please verify "
            "checkpoint "
            "LoRA metadata (lora_train_meta.json)."
        ),
    ),
    "verl-lora-keys": (
        (
            "ValueError: Failed to load LoRA-only checkpoint: unexpected keys ['x.lora_A.default.weight']. Ensure the "
            "model "
            "has the correct LoRA adapters configured."
        ),
    ),
    "verl-resume-path": (
        "AssertionError: resume ckpt must specify the global_steps",
        "AssertionError: resume_from_path must be an existing path when resume_mode is 'resume_path'",
    ),
    "verl-data-position-lost": ("Warning: No dataloader state found at /c/data.pt, will start from scratch",),
    "export-exists": (
        "FileExistsError: HF checkpoint already exists at ./hf. Delete it to run or set overwrite=True.",
    ),
    "nemo-draft-weights": ("RuntimeError: [draft] No supported checkpoint files were found in './eagle'.",),
}


def named(text: str) -> list[str]:
    return [seen.message.code for seen, new in read([text.encode()]) if new]


@pytest.mark.parametrize("code", PRINTED)
def test_a_text_of_a_trainer_is_known_alone_and_behind_a_prefix(code: str) -> None:
    for text in PRINTED[code]:
        assert named(text) == [code]
        assert named(f"[rank3]: {text}\r\n") == [code]
