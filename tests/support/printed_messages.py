"""One text as it is printed, for each message that `explain` knows, by the message's code."""

from __future__ import annotations

from collections.abc import Mapping

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
    "verl-lora-keys": (
        "ValueError: Failed to load LoRA-only checkpoint: unexpected keys "
        "['x.lora_A.default.weight']. Ensure the model has the correct LoRA adapters configured."
    ),
    "verl-resume-path": "AssertionError: resume_from_path must be an existing path when resume_mode is 'resume_path'",
    "verl-data-position-lost": "Warning: No dataloader state found at /c/data.pt, will start from scratch",
    "export-exists": "FileExistsError: HF checkpoint already exists at ./hf. Delete it to run or set overwrite=True.",
    "nemo-draft-weights": "RuntimeError: [draft] No supported checkpoint files were found in './eagle'.",
    "mismatch-report-empty-file": (
        "model.norm.weight            | MISMATCH   | Reinit due to size mismatch - ckpt: "
        "torch.Size([0]) vs model:torch.Size([16])"
    ),
    "mismatch-report-empty-model": (
        "model.norm.weight            | MISMATCH   | Reinit due to size mismatch - ckpt: "
        "torch.Size([16]) vs model:torch.Size([0])"
    ),
    "mismatch-report-labels": (
        "score.weight                 | MISMATCH   | Reinit due to size mismatch - ckpt: "
        "torch.Size([1, 16]) vs model:torch.Size([2, 16])"
    ),
    "mismatch-report": (
        "model.norm.weight            | MISMATCH   | Reinit due to size mismatch - ckpt: "
        "torch.Size([8]) vs model:torch.Size([16])"
    ),
    "head-missing-report": "score.weight                 | MISSING    | ",
    "weights-missing-report": "model.layers.{0, 1}.mlp.up_proj.weight | MISSING    | ",
    "output-embedding-unused-report": "lm_head.weight               | UNEXPECTED | ",
    "head-unused-report": "v_head.summary.weight        | UNEXPECTED | ",
    "prefix-report": "module.model.norm.weight     | UNEXPECTED | ",
    "weights-unused-report": "model.layers.{0, 1}.odd.weight | UNEXPECTED | ",
    "state-dict-prefix": ('\tUnexpected key(s) in state_dict: "module.model.norm.weight", "module.lm_head.weight". '),
    "state-dict-lora": '\tUnexpected key(s) in state_dict: "layers.0.q_proj.base_layer.weight". ',
    "state-dict-keys": '\tMissing key(s) in state_dict: "score.weight". ',
    "state-dict-errors": "RuntimeError: Error(s) in loading state_dict for LlamaForCausalLM:",
    "shapes-reported-empty-file": (
        "- model.norm.weight: found shape torch.Size([0]) in the checkpoint and torch.Size([16]) "
        "in the model instantiated"
    ),
    "shapes-reported": (
        "- model.norm.weight: found shape torch.Size([8]) in the checkpoint and torch.Size([16]) "
        "in the model instantiated"
    ),
    "resumed-without-output-embedding": "There were missing keys in the checkpoint model loaded: ['lm_head.weight'].",
    "resumed-without-weights": "There were missing keys in the checkpoint model loaded: ['model.norm.weight'].",
    "report-notes": (
        "- MISSING:\tthose params were newly initialized because missing from the checkpoint. "
        "Consider training on your downstream task."
    ),
    "size-mismatch-empty-file": (
        "size mismatch for score.weight: copying a param with shape torch.Size([0]) from checkpoint"
    ),
    "size-mismatch-empty-model": "([4,4]) from checkpoint, the shape in current model is torch.Size([0])",
    "head-newly-initialised": (
        "Some weights of CriticModel were not initialized from the model checkpoint at ./rm and "
        "are newly initialized: ['score.weight']"
    ),
    "weights-newly-initialised": (
        "Some weights of LlamaForCausalLM were not initialized from the model checkpoint at x "
        "and are newly initialized: ['model.layers.0.mlp.up_proj.weight']"
    ),
    "labels-mismatch": (
        "size mismatch for base_model.model.score.lora_B.default.weight: copying a param with "
        "shape torch.Size([1, 8]) from checkpoint, the shape in current model is torch.Size([2, "
        "8])."
    ),
    "vocabulary-mismatch": (
        "size mismatch for model.embed_tokens.weight: copying a param with shape "
        "torch.Size([32001, 4096]) from checkpoint, the shape in current model is "
        "torch.Size([32000, 4096])."
    ),
    "size-mismatch": (
        "\tsize mismatch for model.norm.weight: copying a param with shape torch.Size([8]) from "
        "checkpoint, the shape in current model is torch.Size([16])."
    ),
    "size-mismatch-cut": (
        "\u001b[33m(CriticWorker pid=7)\u001b[0m size mismatch for score.weight: copying a param with shape "
    ),
    "weights-not-used": (
        "Some weights of the model checkpoint at x were not used when initializing "
        "LlamaForSequenceClassification: ['lm_head.weight']"
    ),
    "weights-not-used-others": (
        "Some weights of the model checkpoint at ./rm were not used when initializing LlamaForCausalLM: ['odd.weight']"
    ),
    "adapter-keys-missing": (
        "Found missing adapter keys while loading the checkpoint: ['base_model.model.x.lora_A.weight']"
    ),
    "tokens-need-padding": "ValueError: Cannot handle batch sizes > 1 if no padding token is defined.",
    "no-weight-file": "OSError: Error no file named pytorch_model.bin, model.safetensors, found in directory ./out.",
    "not-a-repository": (
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or "
        "'namespace/repo_name': 'saves/Qwen2/lora'."
    ),
    "no-adapter-config": "Can't find 'adapter_config.json'",
    "architecture-unsupported": "ValueError: Model architectures ['LlamaForSequenceClassification'] are not supported",
    "embedding-key-error": "Can not map tensor 'lm_head.weight'",
    "unmerged-keys": "KeyError: 'layers.11.mlp.down_proj.weight'",
    "no-value-head-found": "Failed to load value_head.bin",
    "zero-files-unexpected": "ValueError: Expected 1 of '*_optim_states.pt' under './global_step9' but found 4 files.",
    "zero-stage-unknown": '    raise ValueError("unknown zero stage 1")\nWidgetError: upside down\n',
    "zero-not-a-checkpoint": (
        "ValueError: ./run/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt is not a zero checkpoint"
    ),
    "zero-consumed": "ValueError: consumed 255381772 numels out of 255381776 - something is wrong",
    "world-size-changed": (
        "deepspeed.runtime.zero.utils.ZeRORuntimeException: The checkpoint being loaded used a "
        "DP world size of 4 but the current world size is 2. Automatic adjustment of ZeRO's "
        "optimizer state partitioning with a new world size is not currently supported."
    ),
    "flat-parameters": "_fsdp_wrapped_module._flat_param",
    "verl-config-missing": "fsdp_config.json does not exist",
    "dcp-key-invalid": 'KeyError: "Key `model` is invalid"',
    "header-incomplete": (
        "safetensors_rust.SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"
    ),
    "zip-damaged": "RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory",
    "format-missing": "AttributeError: 'NoneType' object has no attribute 'get'",
    "shared-memory": "RuntimeError: Some tensors share memory, this will lead to duplicate memory on disk",
    "pickle-vulnerability": "Due to a serious vulnerability issue in torch.load ... upgrade torch to at least v2.6",
    "probabilities-not-finite": "RuntimeError: probability tensor contains either `inf`, `nan` or element < 0",
    "remote-code-missing": "./x does not appear to have a file named modeling_*.py",
    "tokenizer-class": "Tokenizer class TokenizersBackend does not exist",
    "vocabulary-padded": "token_embd.weight has wrong shape; expected 5120, 65110, got 65112",
    "merge-four-bit": "Merge lora module to 4-bit linear may get different generations",
    "out-of-memory": (
        "slurmstepd: error: Detected 1 oom_kill event in StepId=1.0. Some of the step tasks have been OOM Killed."
    ),
    "disk-full": "OSError: [Errno 28] No space left on device: './out/model-00002-of-00004.safetensors'",
    "gradient-checkpointing": (
        "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
    ),
    "mismatched-sizes-ignored": (
        "Some weights were newly initialized because the shapes did not match:\n- score.weight: found shape "
    ),
    "strict-false": "model.load_state_dict(state, strict=False)",
    "delete-shards": "rm -rf checkpoint-*/global_step*",
    "labels-passed": "You passed `num_labels=1` which is incompatible to the `id2label` map of length `2`.",
    "target-modules-missing": (
        "ValueError: Target modules {'q_proj', 'v_proj'} not found in the base model. Please "
        "check the target modules and try again."
    ),
    "adapter-key-error": "KeyError: 'base_model.model.score.weight'",
    "adapter-config-beside-model": "KeyError: 'base_model_name_or_path'",
    "lora-weight-unsupported": "base_model.model.score.weight is unsupported LoRA weight",
    "score-unsupported": "The model does not support Score API",
    "vision-names": "KeyError: 'language_model.embed_tokens.weight'",
    "tensor-not-mapped": "Can not map tensor 'model.layers.0.mlp.down_proj.SCB'",
    "dschat-checkpoint": "Cannot find model checkpoint at .../pytorch_model.bin",
    "zero-to-fp32-folder": "Parent directory ../pytorch_model.bin does not exist",
    "tensor-sizes-differ": "The size of tensor a (18959) must match the size of tensor b (19471)",
    "rank-file-missing": (
        "FileNotFoundError: [Errno 2] No such file or directory: './ckpt/actor/model_world_size_8_rank_3.pt'"
    ),
    "reverse-not-implemented": "    raise NotImplementedError: in reverse_op",
    "model-type-unknown": (
        "ValueError: The checkpoint you are trying to load has model type `qwen9` but "
        "Transformers does not recognize this architecture."
    ),
    "hub-unreachable-offline": (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and "
        "couldn't find them in the cached files."
    ),
    "config-file-missing": "OSError: ./run/checkpoint-500 does not appear to have a file named config.json.",
    "size-zero": "torch.Size([0]) from checkpoint, the shape in current model is torch.Size([1, 8]).",
    "push-too-large": (
        "huggingface_hub.errors.HfHubHTTPError: 413 Client Error: Payload Too Large for url: "
        "https://huggingface.co/api/models/me/rm/commit/main"
    ),
    "traceback-unknown": (
        'Traceback (most recent call last):\n  File "/home/u/train.py", line 12, in <module>\n    '
        "trainer.train()\n  File "
        '"/opt/venv/lib/python3.11/site-packages/trl/trainer/grpo_trainer.py", line 900, in '
        "training_step\n    rewards = self.reward(prompts)\n"
    ),
    "worker-failed": "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ",
    "exception-ignored": "Exception ignored in: <function LLM.__del__ at 0x7f>\nstep 2\n",
    "run-interrupted": "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-30T10:00:00 DUE TO TIME LIMIT ***",
    "collective-timeout": (
        "[rank0]:[E1130 10:00:00.1 ProcessGroupNCCL.cpp:632] [Rank 0] Watchdog caught collective "
        "operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, "
        "Timeout(ms)=600000) ran for 600069 milliseconds before timing out."
    ),
    "crash-below-python": "Fatal Python error: Segmentation fault",
    "worker-ended": "[ERROR] [launch.py:325:sigkill_handler] ['python', 'train.py'] exits with return code = 1",
    "actor-died": "ray.exceptions.ActorDiedError: The actor died unexpectedly before finishing this task.",
}
