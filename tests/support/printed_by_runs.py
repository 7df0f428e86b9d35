"""Texts that trainers, loaders and crashed runs print, by the code of the message that `explain` has for each."""

from __future__ import annotations

from collections.abc import Mapping

OF_RUNS: Mapping[str, str] = {
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
