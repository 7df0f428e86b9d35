"""Advice that circulates and what it can't cure, engines that serve, and messages of scripts around training."""

from converter.examine.explanations.message import Message

MESSAGES = (
    Message(
        "gradient-checkpointing",
        "cosmetic",
        (
            "use_cache=True",
            "use_reentrant",
            "radient checkpointing",
            "radient_checkpointing",
            "radient-checkpointing",
            "requires_grad=True",
        ),
        r"`?use_cache=True`? is incompatible with gradient checkpointing|None of the inputs have requires_grad|"
        r"use_reentrant|(?i:remov|disabl|turn|switch|without|drop|delet|omit)"
        r"\w*\b.{0,30}gradient[_ -]checkpointing|"
        r"^\W*gradient[_ -]checkpointing\W*$",
        "Harmless for weights: gradient checkpointing changes memory, never what is saved or loaded. Switching "
        "it off "
        "(removing --gradient_checkpointing) cures no checkpoint: not a head that is random, not "
        "torch.Size([0]), not a "
        "size mismatch.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "mismatched-sizes-ignored",
        "error",
        ("ignore_mismatched_sizes", "did not match"),
        r"ignore_mismatched_sizes=True|ignore_mismatched_sizes True|"
        r"--ignore_mismatched_sizes(?!\S*[= ]*(?:[Ff]alse|0))|"
        r"You set `ignore_mismatched_sizes`|^\W*ignore_mismatched_sizes\W*$|"
        r"newly initialized because the shapes did not match",
        "ignore_mismatched_sizes=True is no cure: every tensor whose shape differs is filled with random "
        "values, and the "
        "run goes on with them. The lines above name the tensors and both shapes.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "strict-false",
        "error",
        ("strict=False", "strict = False"),
        r"^(?!\s).{0,60}\b(?:load_state_dict|use|try|add|pass|set)\b.{0,80}strict ?= ?False|^strict ?= ?False\W*$",
        "strict=False is no cure: what is not found stays RANDOM, what does not fit is left out, and nothing "
        "is said. "
        "A size mismatch is raised all the same.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "delete-shards",
        "changes-numbers",
        ("global_step",),
        r"(?i:delete|remove|rm -rf?)\b.{0,60}global_step",
        "Look before: after ZeRO-3 without gathering, global_step* holds the only copy of the weights, and of "
        "a frozen "
        "random head always. Without it they are lost for good.",
        ("rlhf-convert doctor DIR",),
        ("sole-copy",),
    ),
    Message(
        "labels-passed",
        "changes-numbers",
        ("num_labels=",),
        r"You passed `?num_labels=(?P<want>\d+)`? which is incompatible to the `?id2label`? map of "
        r"length `?(?P<have>\d+)",
        "The script asks for {want} labels and config.json names {have}: if the head was trained with {have}, "
        "it will not "
        "fit.",
        ("rlhf-convert doctor DIR",),
        ("labels-mismatch",),
    ),
    Message(
        "target-modules-missing",
        "error",
        ("Target modules",),
        r"Target modules (?P<name>.{1,200}?) not found in the base model",
        "None of the modules that LoRA is to be put on ({name}) is in this model: the adapter is of another "
        "architecture, "
        "or the base is not the one that it was trained on.",
        ("rlhf-convert doctor ADAPTER --base BASE",),
        ("adapter-targets-missing",),
    ),
    Message(
        "adapter-key-error",
        "error",
        ("KeyError: 'base_model",),
        r"KeyError: '(?P<name>base_model\.[\w.]{1,300})'",
        "The adapter lacks {name} under this name: its names were changed or doubled, or its head was not saved.",
        ("rlhf-convert doctor ADAPTER --base BASE",),
        ("names-doubled", "adapter-half"),
    ),
    Message(
        "adapter-config-beside-model",
        "error",
        ("base_model_name_or_path",),
        r"KeyError: ['\"]base_model_name_or_path['\"]",
        "An adapter_config.json lies beside a merged model's weights, so the folder is taken for an adapter.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
        ("adapter-config-stray",),
    ),
    Message(
        "lora-weight-unsupported",
        "error",
        ("is unsupported LoRA weight", "unsupported LoRA weight"),
        r"(?<![\w.])(?P<name>[\w.]{1,300}+) is unsupported LoRA weight",
        "{name} is a whole tensor in the adapter (modules_to_save), which engines can't serve as LoRA. Merged, "
        "it is "
        "served as a model.",
        ("rlhf-convert merge-lora ADAPTER OUT --base BASE",),
    ),
    Message(
        "score-unsupported",
        "error",
        ("support Score API", "not support Pooling", "does not support Embeddings API"),
        r"(?:does not|doesn't) support (?:the )?(?:Score|Pooling|Embeddings) API",
        "vLLM serves this folder as a language model. A reward model needs the class of a classifier in "
        "config.json's "
        "`architectures`, and one label.",
        ("rlhf-convert convert DIR OUT --to hf-seqcls --role reward", "rlhf-convert doctor DIR --for vllm"),
    ),
    Message(
        "vision-names",
        "error",
        ("language_model", "visual."),
        r"KeyError: ['\"](?P<name>(?:model\.)?(?:language_model|visual|vision_tower|vision_model)\.[\w.]{1,300})"
        r"['\"]",
        "{name}: tensors of vision-language models were renamed in transformers 4.52, and file and engine follow "
        "different sides of that.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "tensor-not-mapped",
        "error",
        ("not map tensor", ", torch.uint8 -->", "torch.uint8"),
        r"Can ?not map tensor ['\"]?(?P<name>[\w.]+)|blk\.\d+\.[\w.]+,? torch\.uint8",
        "A converter meets a tensor that is no weight of the model. SCB, absmax or uint8: a quantised base was "
        "saved, and "
        "has to be merged in full precision instead. lora_ or a prefix: the model was not merged or not unwrapped.",
        ("rlhf-convert doctor DIR", "rlhf-convert merge-lora ADAPTER OUT --base FULL_PRECISION_BASE"),
        ("quantisation-left",),
    ),
    Message(
        "dschat-checkpoint",
        "error",
        ("Cannot find model checkpoint at",),
        r"Cannot find model checkpoint at",
        "DeepSpeed-Chat reads one file, pytorch_model.bin, with names of its own.",
        ("rlhf-convert convert DIR OUT --to deepspeed-chat --role reward",),
    ),
    Message(
        "zero-to-fp32-folder",
        "error",
        ("Parent directory",),
        r"Parent directory (?P<name>\S{1,300}) does not exist",
        "Since DeepSpeed 0.15.3 the second argument of zero_to_fp32.py is a folder and no file.",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "tensor-sizes-differ",
        "error",
        ("size of tensor a",),
        r"size of tensor a \((?P<have>\d+)\) must match (?:the size of tensor )?b \((?P<want>\d+)\)",
        "Two tensors of {have} and {want} values meet. In a resumed run: shards of another number of GPUs. In "
        "a merge: "
        "another base or LoRA rank.",
        ("rlhf-convert doctor DIR", "rlhf-convert gather DIR OUT"),
    ),
    Message(
        "rank-file-missing",
        "error",
        ("model_world_size_", "_optim_states.pt", "_model_states.pt"),
        r"(?:FileNotFoundError|No such file).{0,400}?(?:model_world_size_\d+_rank_\d+\.pt|mp_rank_\d+_(?:model|"
        r"optim)_states\.pt)",
        "A rank's shard is not here: the run had more GPUs or nodes than this folder has files. Each node may "
        "have kept "
        "its own.",
        ("rlhf-convert doctor DIR",),
        ("verl-rank-missing", "zero-rank-missing"),
    ),
    Message(
        "reverse-not-implemented",
        "error",
        ("reverse_op", "reverse_transform"),
        r"reverse_(?:op|transform).{0,200}NotImplementedError|NotImplementedError.{0,200}reverse_(?:op|"
        r"transform)|in reverse_op",
        "transformers 5 can't save this model's tensors under the names of its files. The weights in memory "
        "are sound; "
        "files are converted here without model classes.",
        ("rlhf-convert merge-lora ADAPTER OUT --base BASE", "rlhf-convert gather DIR OUT"),
    ),
    Message(
        "model-type-unknown",
        "error",
        ("does not recognize this architecture", "Should have a `model_type` key", "Unrecognized model identifier"),
        r"model type `?(?P<name>[\w.-]+)`? but Transformers does not recognize|Should have a `model_type` key|"
        r"Unrecognized model identifier",
        "config.json has no model_type that the installed transformers knows: the folder is no model (look one "
        "level "
        "below), or transformers is too old for it.",
        ("rlhf-convert inspect DIR",),
        ("config-missing",),
    ),
    Message(
        "hub-unreachable-offline",
        "error",
        (
            "couldn't connect to 'https://huggingface.co'",
            "outgoing traffic has been disabled",
            "LocalEntryNotFoundError",
        ),
        r"couldn't connect to 'https://huggingface\.co'|outgoing traffic has been disabled|LocalEntryNotFoundError",
        "The Hub was asked for a model, and can't be reached. If a local folder was meant, the path has a "
        "typing error: "
        "what is no folder is taken for a name on the Hub.",
        ("rlhf-convert inspect DIR",),
    ),
    Message(
        "config-file-missing",
        "error",
        ("does not appear to have a file named config.json",),
        r"does not appear to have a file named config\.json",
        "The folder has no config.json: it is an adapter, a trainer's shards, or the wrong level of a run.",
        ("rlhf-convert inspect DIR",),
        ("config-missing",),
    ),
    Message(
        "size-zero",
        "changes-numbers",
        ("torch.Size([0])",),
        r"torch\.Size\(\[0\]\)",
        "A tensor without values. In a file: saved under ZeRO-3 without gathering, and lost there. In a model under "
        "ZeRO-3: how each parameter looks outside of a gather, and harmless.",
        ("rlhf-convert doctor DIR",),
        ("zero3-empty-tensors",),
    ),
    Message(
        "push-too-large",
        "error",
        ("413 Client Error", "Payload Too Large", "larger than 10 MiB", "larger than 10MB"),
        r"413 Client Error|Payload Too Large|larger than 10 ?Mi?B",
        "The Hub refused a push as too large: weights have to go through LFS or Xet, in files of some GB.",
        ("rlhf-convert push DIR OWNER/NAME",),
    ),
)
