"""One text as it is printed, for each message that `explain` knows, by the message's code."""

from __future__ import annotations

from collections.abc import Mapping

from printed_by_runs import OF_RUNS

PRINTED: Mapping[str, str] = {
    "engine-name-unknown": "ValueError: No module or parameter named score in TransformersForCausalLM.",
    "engine-weights-missing": "Some weights are not initialized from checkpoints: ['model.norm.weight']",
    "engine-name-skipped": "Parameter model.layers.0.self_attn.q_proj.base_layer.weight not found in params_dict",
    "engine-no-weights": "RuntimeError: Cannot find any model weights with `/ckpt/global_step_10/actor/huggingface`",
    "engine-shard-missing": (
        "RuntimeError: model.safetensors.index.json references 1 shard file(s) missing from /m "
        "(incomplete download?): ['model-00002-of-00002.safetensors']"
    ),
    "engine-shape": (
        "AssertionError: param.shape=torch.Size([4, 4]) param.dtype=torch.bfloat16 "
        "loaded_weight.shape=torch.Size([8, 4]) loaded_weight.dtype=torch.bfloat16"
    ),
    "engine-tie-uninitialised": (
        "ValueError: 'lm_head.weight' was skipped because it is tied to "
        "'model.embed_tokens.weight' in Qwen2ForCausalLM, but 'model.embed_tokens.weight' was "
        "not found in the checkpoint, so the tied weight is uninitialized."
    ),
    "tie-differs": (
        "The config for ./m says the word embeddings are tied, but the checkpoint contains a "
        "different lm_head.weight, which has been used instead of tying. Set "
        "`tie_word_embeddings=False` in the config to silence this warning."
    ),
    "lora-targets-unsupported": (
        "ValueError: LoRA adapter 'a' contains target modules ['lm_head'] that are not included "
        "in the specified --lora-target-modules ['q_proj']. Please update --lora-target-modules "
        "to include all required modules: ['lm_head', 'q_proj'], or use 'all' to enable all "
        "supported modules."
    ),
    "lora-kind-unsupported": (
        'ValueError: vLLM only supports modules_to_save being either None or ["classifier", '
        "\"score\"] for classification models. Unsupported modules_to_save: ['lm_head']"
    ),
    "lora-rank-too-large": (
        "ValueError: LoRA adapter a with rank 64 is incompatible with the current LoRA memory pool configuration."
    ),
    "lora-head-does-not-fit": (
        "ValueError: Full module score for score has an incompatible weight shape: expected "
        "(1..8, 64), received (2, 32)"
    ),
    "lora-embedding-rows": (
        "RuntimeError: The embedding LoRA size(32064) must be consistent with the base model's vocabulary size(32000)."
    ),
    "adapter-not-there": (
        "ValueError: adapter model file not found in ./a. Make sure you are passing the correct "
        "path to the adapter model."
    ),
    "quantisation-asked-otherwise": (
        "ValueError: Quantization method specified in the model config (bitsandbytes) does not "
        "match the quantization method specified in the `quantization` argument (awq)."
    ),
    "heads-not-divisible": (
        "ValueError: Total number of attention heads (14) must be divisible by tensor parallel size (4)."
    ),
    "reward-model-not-embedding": "AssertionError: LlamaForSequenceClassification is only used for embedding",
    "engine-failed-elsewhere": (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    ),
    "no-valid-checkpoint": "ValueError: Can't find a valid checkpoint at ./run",
    "resume-failed-deepspeed": "ValueError: [deepspeed] failed to resume from checkpoint ./run/checkpoint-5",
    "resume-started-afresh": (
        "Unable to find latest file at ./ckpt/latest, if trying to load latest checkpoint please "
        "ensure this file exists or pass an explicit checkpoint tag when loading a checkpoint."
    ),
    "zero-latest-missing": "ValueError: Invalid for universal checkpoint: ./run/latest_universal does not exist",
    "zero-no-files": (
        "AssertionError: ./run seems a bogus DeepSpeed checkpoint folder: Cannot find mp_rank_* files in there."
    ),
    "zero-tag-differs": (
        "[rank=1] The checkpoint tag name 'loss0.71' is not consistent across all ranks. "
        "Including rank unique information in checkpoint tag could cause issues when restoring "
        "with different world sizes."
    ),
    "zero-elastic": (
        "NotImplementedError: ZeRO-3 elastic checkpointing is deprecated and unsupported. Use "
        "Universal Checkpointing instead."
    ),
    "gather-switched-off": (
        " stage3_gather_16bit_weights_on_model_save=false. Saving the full checkpoint instead, "
        "use zero_to_fp32.py to recover weights"
    ),
    "optimizer-groups-differ": (
        "ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
    ),
    "dcp-key-missing": "RuntimeError: Missing key in checkpoint state_dict: model.layers.0.mlp.up_proj.weight.",
    "dcp-size-differs": (
        "ValueError: Size mismatch between saved torch.Size([8, 4]) and current: torch.Size([4, "
        "4]) for model.norm.weight"
    ),
    "dcp-failed": "torch.distributed.checkpoint.api.CheckpointException: CheckpointException ranks:dict_keys([0, 1])",
    "dcp-metadata-not-found": (
        "ValueError: Tried to load from ./ckpt but couldn't find a valid metadata file. However, "
        "potential model and optimizer checkpoint directories exist."
    ),
    "fsdp-only": "ValueError: Checkpoint found at ./c is only supported when using PyTorch FSDP",
    "fsdp2-names-differ": (
        "ValueError: FSDP2 mapping failed (missing: ['lm_head.weight']). This is likely due to "
        "tied embeddings (config has tie_word_embeddings=True but checkpoint has separate "
        "weights)."
    ),
    "accelerate-shape": (
        'ValueError: Trying to set a tensor of shape torch.Size([8, 4]) in "weight" (which has '
        "shape torch.Size([4, 4])), this looks incorrect."
    ),
    "accelerate-name": (
        "ValueError: Linear(in_features=4, out_features=4) does not have a parameter or a buffer named lora_A."
    ),
    "save-of-meta": "RuntimeError: You can't save the model since some parameters are on the meta device.",
    "shared-tensors-undeclared": (
        "RuntimeError: The weights trying to be saved contained shared tensors "
        "[{'lm_head.weight', 'model.embed_tokens.weight'}] which are not properly defined."
    ),
    "tie-lost": (
        "This checkpoint seem corrupted. The tied weights mapping for this model specifies to "
        "tie model.embed_tokens.weight to lm_head.weight, but both are absent from the "
        "checkpoint, and we could not find another related tied weight for those keys"
    ),
    "model-type-differs": (
        "You are using a model of type `llama` to instantiate a model of type `qwen2`. This is "
        "not supported for all configurations of models and can yield errors."
    ),
    "arguments-differ": (
        "Warning: The following arguments do not match the ones in the `trainer_state.json` "
        "within the checkpoint directory: "
    ),
    "model-not-loadable": (
        "OSError: Can't load tokenizer for './run'. If you were trying to load it from "
        "'https://huggingface.co/models', make sure you don't have a local directory with the "
        "same name."
    ),
    "tokenizer-not-built": "ValueError: Couldn't instantiate the backend tokenizer from one of: ",
    "conversion-failed": (
        "RuntimeError: Failed to apply weight conversion for "
        "'model.layers.0.mlp.experts.gate_up_proj'. This likely means the checkpoint format is "
        "incompatible with the current model version. Error: x"
    ),
    "adapter-weights-not-found": (
        "ValueError: Can't find weights for ./run/checkpoint-500 in ./run/checkpoint-500 or in "
        "the Hugging Face Hub. Please check that the file adapter_model.bin or "
        "adapter_model.safetensors is present."
    ),
    "adapter-config-newer": "TypeError: LoraConfig.__init__() got an unexpected keyword argument 'corda_config'",
    "adapter-fields-ignored": (
        "UserWarning: Unexpected keyword arguments ['use_new_thing'] for class LoraConfig, these "
        "are ignored. This probably means that you're loading a configuration file that was "
        "saved using a higher version of the library"
    ),
    "adapter-config-incomplete": (
        "TypeError: The LoraConfig config that is trying to be loaded is missing required keys: {'peft_type'}."
    ),
    "adapter-twice": (
        "UserWarning: You are trying to modify a model with PEFT for a second time. If you want "
        "to reload the model with a different config, make sure to call `.unload()` before."
    ),
    "adapter-saved-in-pieces": (
        "ValueError: Adapter 'default': 12 LoRA tensor(s) have invalid shape: "
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    ),
    "adapter-tied-target": (
        "UserWarning: Model with `tie_word_embeddings=True` and the "
        "tied_target_modules=['lm_head'] are part of the adapter. This can lead to complications "
        "when merging the adapter"
    ),
    "adapter-base-renamed": (
        "UserWarning: The PEFT config's `base_model_name_or_path` was renamed from 'me/base' to "
        "'./base'. Please ensure that the correct base model is loaded when loading this "
        "checkpoint."
    ),
    "adapter-embeddings-saved": (
        "UserWarning: Setting `save_embedding_layers` to `True` as the embedding layer has been "
        "resized during finetuning."
    ),
    "lora-module-unsupported": (
        "ValueError: Target module Qwen2VLVisionBlock( (norm1): LayerNorm() ) is not supported. "
        "Currently, only the following modules are supported: `torch.nn.Linear`"
    ),
    "merge-refused-by-peft": "ValueError: Cannot merge LORA layers when the model is gptq quantized",
    "merge-nan": "ValueError: NaNs detected in the merged weights. The adapter default seems to be broken",
    "adapter-in-model-unused": (
        "Loading adapter weights from ./a led to unexpected keys not found in the model: "
        "model.x.lora_A.default.weight. "
    ),
    "finetuning-quantised": (
        "ValueError: You cannot perform fine-tuning on purely quantized models. Please attach "
        "trainable adapters on top of the quantized model to correctly perform fine-tuning."
    ),
    "quantisation-state-missing": (
        "ValueError: Supplied state dict for model.layers.0.mlp.up_proj.weight does not contain "
        "`bitsandbytes__*` and possibly other `quantized_stats` components."
    ),
    "peft-model-and-config": (
        "ValueError: You passed a `PeftModel` instance together with a `peft_config` to the "
        "trainer. Please first merge and unload the existing adapter"
    ),
    "lora-on-output-embedding": (
        "ValueError: Applying a PEFT adapter to `lm_head` is not supported: the "
        "log-probabilities are computed from `lm_head.weight` directly"
    ),
    "new-tokens-not-trained": (
        "Cloning chat template added new tokens to the tokenizer, but 'lm_head' is not in PEFT's `modules_to_save`."
    ),
    "reward-model-not-loaded": "AssertionError: Reward model is not correctly loaded.",
    "reward-model-type": "ValueError: `reward_model_type` cannot be lora for Freeze/Full PPO training.",
    "one-adapter-only": "ValueError: vLLM only accepts a single adapter. Merge them first.",
    "quantised-not-resizable": "ValueError: Cannot resize embedding layers of a quantized model.",
    "unsloth-no-config": "RuntimeError: Unsloth: Failed to load model. Both AutoConfig and PeftConfig loading failed.",
    "megatron-started-at-random": "WARNING: could not find the metadata file /ckpt/latest_checkpointed_iteration.txt",
    "megatron-keys-differ": (
        "megatron.core.dist_checkpointing.core.CheckpointingException: Some keys found in the "
        "checkpoint are missing in the provided sharded state dict. "
    ),
    "megatron-shape-differs": (
        "CheckpointingException: Global shape mismatch for loaded (torch.Size([32000, 8])) and "
        "expected ((32128, 8)) tensor for key embedding.word_embeddings.weight"
    ),
    "megatron-not-a-checkpoint": "CheckpointingException: Checkpoint directory /ckpt/iter_1 does not exist",
    "megatron-shards-missing": (
        "ValueError: Could not find shard at 'torch.Size([0, 0])' for FQN: 'model.embed_tokens.weight'"
    ),
    "megatron-optimizer-differs": (
        "Unable to load optimizer from checkpoint /ckpt. Specify --no-load-optim or --finetune "
        "to prevent attempting to load the optimizer state, exiting ..."
    ),
    "megatron-rng-differs": (
        "Unable to load rng state from checkpoint /ckpt. Specify --no-load-rng or --finetune to "
        "prevent attempting to load the rng state, exiting ..."
    ),
    "megatron-not-asked-for": (
        "RuntimeError: Detected load from a distributed checkpoint, but neither --use-dist-ckpt "
        "nor --auto-detect-ckpt-format is set."
    ),
    "megatron-name-unknown": (
        "ValueError: Invalid key lm_head.weight in Megatron state_dict. Expected keys to start "
        "with 'decoder/embedding/output_layer' in TransformerLayer."
    ),
    "verl-layout-old": (
        "RuntimeError: Detected deprecated Megatron checkpoint layout (dist_ckpt). The current "
        "loader expects the split layout (model/, optimizer/, extra/ subdirectories). Migrate "
        "the checkpoint in place with:"
    ),
    "verl-export-not-resumable": (
        "RuntimeError: Found exported HF PEFT adapter at /c/huggingface/adapter, but "
        "`load_checkpoint()` resumes from /c/model."
    ),
    "verl-merge-keys": (
        "AssertionError: Shape mismatch for key 'lm_head.weight': original torch.Size([8, 4]) vs "
        "collected torch.Size([4, 4])"
    ),
    "verl-world-size-unknown": (
        "FileNotFoundError: Could not determine world size. No file matching "
        "'model_world_size_(\\d+)_rank_0.pt' found in ./actor"
    ),
    "verl-ranks-differ": (
        "ValueError: Non-DTensor entry 'model.norm.weight' differs between rank 0 and rank 1; "
        "expected a replicated buffer/parameter identical on every rank"
    ),
    "verl-alpha-lost": (
        "UserWarning: LoRA alpha metadata is missing or equals 0; falling back to lora_alpha=0. "
        "Please verify checkpoint LoRA metadata (lora_train_meta.json)."
    ),
    **OF_RUNS,
}
