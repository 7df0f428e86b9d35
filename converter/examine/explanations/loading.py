"""Messages of loaders: missing, unexpected and empty weights, heads, shapes."""

from converter.examine.explanations.message import Message

_NO_CURE = (
    "ignore_mismatched_sizes=True is no cure: it fills the tensor with random values. "
    "Neither is removing --gradient_checkpointing."
)

MESSAGES = (
    Message(
        "size-mismatch-empty-file",
        "error",
        ("size mismatch for",),
        r"size mismatch for (?P<name>[\w.]+): copying a param with shape torch\.Size\(\[0\]\)",
        "The file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. The loader is "
        "right to "
        "stop. " + _NO_CURE,
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT --weights-from THE_RUNS_global_step_FOLDER"),
        ("zero3-empty-tensors",),
    ),
    Message(
        "size-mismatch-empty-model",
        "error",
        ("current model is torch.Size([0])",),
        r"(?:size mismatch for (?P<name>[\w.]+): .*)?shape in current model is torch\.Size\(\[0\]\)",
        "The file is sound ({name}); the model that loads it is empty: a plain load_state_dict under ZeRO-3 "
        "(zero.Init), outside of "
        "deepspeed.zero.GatheredParameters. Nothing in the files needs repair. Load before DeepSpeed "
        "partitions the "
        "model, "
        "or with from_pretrained, which knows of ZeRO-3.",
        ("rlhf-convert doctor DIR",),
        ("zero3-empty-tensors",),
    ),
    Message(
        "head-newly-initialised",
        "error",
        ("newly initialized", "not initialized"),
        r"(?:newly|not) initialized(?: [^:\[]{0,200})?: "
        r"\[.*'(?P<name>(?:\w+\.)*(?:score|value_head|v_head|classifier|reward_head|"
        r"score_head|regression_head|rm_head)[\w.]*)'",
        "{name} is not in the checkpoint under the name that this loader asks for: the head is RANDOM, and "
        "training or "
        "scoring runs on noise. Where a reward model starts from a base model this is expected; where a "
        "trained reward "
        "model or critic is loaded it is not.",
        ("rlhf-convert doctor DIR --for TRAINER", "rlhf-convert rm-to-critic DIR OUT --to TRAINER"),
        ("head-missing", "head-base-lost"),
    ),
    Message(
        "weights-newly-initialised",
        "error",
        ("newly initialized", "not initialized"),
        r"(?:newly|not) initialized(?: because[^:]*)?: \[(?P<name>'[^']*')",
        "Weights of the backbone ({name}, ...) are not in the checkpoint under these names, and are RANDOM now: "
        "another "
        "architecture, a prefix (module., base_model.), or a tensor that was not saved.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "labels-mismatch",
        "error",
        ("size mismatch for",),
        r"(?:score|classifier|v_head|value_head)[\w.]*: .{0,200}?\[1, \d+\].{0,200}? current model .{0,40}?\[2, \d+\]",
        "The head has one label, the loader makes two: AutoModelForSequenceClassification's default, where the "
        "config says "
        "nothing. Set num_labels to 1 in the config (a converted folder has it). " + _NO_CURE,
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "vocabulary-mismatch",
        "error",
        ("size mismatch for",),
        r"size mismatch for (?P<name>[\w.]*(?:embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)[\w.]*): "
        r"copying "
        r"a param with shape torch\.Size\(\[(?P<have>\d+), \d+\]\) from checkpoint, the shape in current model is "
        r"torch\.Size\(\[(?P<want>\d+), \d+\]\)",
        "The vocabulary has {have} rows in the file and {want} in the model: tokens were added in training, or one "
        "side is "
        "padded. Resize the model to the tokenizer before loading, or use the base that the adapter was "
        "trained on.",
        ("rlhf-convert doctor DIR --base BASE",),
    ),
    Message(
        "size-mismatch",
        "error",
        ("size mismatch for",),
        r"size mismatch for (?P<name>[\w.]+): copying a param with shape torch\.Size\(\[(?P<have>[^\]]+)\]\) from "
        r"checkpoint, the shape in current model is torch\.Size\(\[(?P<want>[^\]]+)\]\)",
        "{name} is [{have}] in the file and [{want}] in the model: another architecture or size, another LoRA "
        "rank, "
        "or a "
        "head with another number of labels. " + _NO_CURE,
        ("rlhf-convert doctor DIR --base BASE",),
    ),
    Message(
        "size-mismatch-cut",
        "error",
        ("size mismatch",),
        r"(?<!due to )size mismatch(?: for (?P<name>[\w.]+))?",
        "A tensor ({name}) has one shape in the file and another in the model; the rest of the line says "
        "which, and is not here. "
        "torch.Size([0]) from the checkpoint: saved empty under ZeRO-3. torch.Size([0]) in the current model: "
        "loaded "
        "outside of a gather. Neither: another architecture, vocabulary, LoRA rank or number of labels. " + _NO_CURE,
        ("rlhf-convert doctor DIR",),
        ("zero3-empty-tensors",),
    ),
    Message(
        "weights-not-used",
        "cosmetic",
        ("were not used when initializing", "not used: ["),
        r"(?:were )?not used(?: when initializing [^\[]{0,300})?: \[(?P<name>'(?:lm_head|embed_out)\.(?:weight|bias)'"
        r"(?:[,/ ]*'(?:lm_head|embed_out)\.(?:weight|bias)')*)\]",
        "Harmless: the output embedding ({name}) of the language model has no place in a reward model or critic.",
    ),
    Message(
        "weights-not-used-others",
        "changes-numbers",
        ("were not used when initializing",),
        r"were not used when initializing .*: \[(?P<name>'[^']*')",
        "The file holds tensors that the model has no place for ({name}, ...). If a head or a prefix such as "
        "module. or "
        "base_model. is among them, what should take their place is random.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "adapter-keys-missing",
        "error",
        ("adapter keys",),
        r"Found missing adapter keys while loading the checkpoint: \[(?:(?P<name>'[^']*'))?",
        "PEFT found no values for adapter tensors ({name}, ...): they are zero, and the model answers as its base "
        "does. PEFT "
        "says nothing of keys that it ignores: the names in the file do not fit.",
        ("rlhf-convert doctor ADAPTER --base BASE", "rlhf-convert merge-lora ADAPTER OUT --base BASE"),
    ),
    Message(
        "tokens-need-padding",
        "error",
        ("batch sizes > 1",),
        r"Cannot handle batch sizes > 1 if no padding token is defined",
        "The config has no pad_token_id, and a reward model needs it to find each answer's last token.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
    ),
    Message(
        "no-weight-file",
        "error",
        ("no file named", "a file named"),
        r"no file named (?P<name>[\w.-]+)|does not appear to have a file named (?:pytorch_model|model|tf_model)\.",
        "The folder has no weights under the names that transformers reads. After ZeRO-3 without gathering, with "
        "FSDP and "
        "in verl's `huggingface` folder, they are in the trainer's shards, in this folder, below or above it.",
        ("rlhf-convert doctor DIR", "rlhf-convert gather DIR OUT"),
        ("weights-missing",),
    ),
    Message(
        "not-a-repository",
        "error",
        ("Repo id must", "HFValidationError", "is not a local folder and is not a valid model identifier"),
        r"Repo id must |HFValidationError|is not a local folder and is not a valid model identifier",
        "The path does not exist, and was then taken for a name on the Hub. Look for a typing error, or for "
        "the folder "
        "checkpoint-N inside of it.",
        ("rlhf-convert inspect DIR",),
    ),
    Message(
        "no-adapter-config",
        "error",
        ("adapter_config.json",),
        r"Can't find 'adapter_config\.json'",
        "The folder is no adapter, or the path is wrong: see what is there.",
        ("rlhf-convert inspect DIR",),
        ("adapter-config-missing",),
    ),
    Message(
        "architecture-unsupported",
        "error",
        ("Model architectures", "is not a registered model"),
        r"Model architectures \[(?P<name>'[^']*')\].* not supported|'(?P<other>\w+)' is not a registered model",
        "The config's `architectures` names a class that this engine does not know: a wrapper's (FSDP..., "
        "RewardModel, "
        "CriticModel), or one that needs a newer version.",
        ("rlhf-convert doctor DIR --for vllm",),
    ),
    Message(
        "embedding-key-error",
        "error",
        ("lm_head.weight'", 'lm_head.weight"'),
        r"(?:KeyError:|Can ?not map tensor) ['\"]lm_head\.weight['\"]",
        "The config ties the output embedding to the input's, and the file holds both, or neither says so. The "
        "second copy "
        "has to go where they are equal.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
    ),
    Message(
        "unmerged-keys",
        "error",
        ("base_layer.weight", "lora_A", "lora_B", "KeyError: 'layers", "KeyError: 'model.layers"),
        r"(?:KeyError|not found in|Unexpected key).{0,2000}?(?:base_layer\.weight|lora_[AB])|"
        r"KeyError: '(?:model\.)?layers\.\d+\.[\w.]{1,200}'",
        "The engine meets a layer's name that it does not expect. Nearly always a full model was saved with "
        "LoRA's wrappers "
        "still around its layers (base_layer, lora_A), and is neither adapter nor model; else a prefix is wrong.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "no-value-head-found",
        "cosmetic",
        ("value_head", "v_head weight"),
        r"(?:no v_head weight is found|Failed to load value_head\.(?:bin|safetensors)|Provided path \(.*\)"
        r" does not "
        r"contain "
        r"value head weights)",
        "LLaMA-Factory looks for value_head.safetensors and for value_head.bin, and says this of each that is "
        "missing. "
        "Harmless where PPO makes a new head, or where the other file is there; otherwise the reward model is "
        "random.",
        ("rlhf-convert doctor DIR --for llamafactory",),
    ),
)
