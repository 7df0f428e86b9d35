"""Messages of loaders: missing, unexpected and empty weights, heads, shapes."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_NO_CURE = (
    "ignore_mismatched_sizes=True is not a cure: it fills the tensor with random values. "
    "Neither is removing --gradient_checkpointing."
)

MESSAGES = (
    Message(
        code="size-mismatch-empty-file",
        severity="error",
        keys=("size mismatch for",),
        pattern=r"size mismatch for (?P<name>[\w.]+): copying a param with shape torch\.Size\(\[0\]\)",
        text="The file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. The loader is "
        "right to "
        "stop. " + _NO_CURE,
        next=Steps(
            Command("doctor", ("DIR",)),
            Command("repair", ("DIR", "OUT", "--weights-from", "THE_RUNS_global_step_FOLDER")),
        ),
        codes=("zero3-empty-tensors",),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="size-mismatch-empty-model",
        severity="error",
        keys=("current model is torch.Size([0])",),
        pattern=r"(?:size mismatch for (?P<name>[\w.]+): .*)?shape in current model is torch\.Size\(\[0\]\)",
        text="The file is sound ({name}); the model that loads it is empty: a plain load_state_dict under ZeRO-3 "
        "(zero.Init), outside of "
        "deepspeed.zero.GatheredParameters. Nothing in the files needs repair. Load before DeepSpeed "
        "partitions the "
        "model, "
        "or with from_pretrained, which knows of ZeRO-3.",
        next="load the weights before DeepSpeed partitions the model, or inside of GatheredParameters; no file has to "
        "change",
        codes=("zero3-empty-tensors",),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="head-newly-initialised",
        severity="error",
        keys=("newly initialized", "not initialized"),
        pattern=r"(?:newly|not) initialized(?: [^:\[]{0,200})?: "
        r"\[.*'(?P<name>(?:\w+\.)*(?:score|value_head|v_head|classifier|reward_head|"
        r"score_head|regression_head|rm_head)[\w.]*)'",
        text="{name} is not in the checkpoint under the name that this loader asks for: the head is RANDOM, and "
        "training or "
        "scoring runs on noise. Where a reward model starts from a base model this is expected; where a "
        "trained reward "
        "model or critic is loaded it is not.",
        next=Steps(
            Command("doctor", ("DIR", "--for", "TRAINER")), Command("rm-to-critic", ("DIR", "OUT", "--to", "TRAINER"))
        ),
        codes=("head-missing", "head-base-lost"),
        seen_in=("transformers 4.57.6: transformers/modeling_utils.py",),
    ),
    Message(
        code="weights-newly-initialised",
        severity="error",
        keys=("newly initialized", "not initialized"),
        pattern=r"(?:newly|not) initialized(?: because[^:]*)?: \[(?P<name>'[^']*')",
        text="Weights of the backbone ({name}, ...) are not in the checkpoint under these names, and are RANDOM now: "
        "another "
        "architecture, a prefix (module., base_model.), or a tensor that was not saved.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 4.57.6: transformers/modeling_utils.py",),
    ),
    Message(
        code="labels-mismatch",
        severity="error",
        keys=("size mismatch for",),
        pattern=r"(?:score|classifier|v_head|value_head)[\w.]*: .{0,200}?\[1, \d+\].{0,200}? current model "
        r".{0,40}?\[2, \d+\]",
        text="The head has one label, the loader makes two: AutoModelForSequenceClassification's default, where the "
        "config says "
        "nothing. Set num_labels to 1 in the config (a converted folder has it). " + _NO_CURE,
        next=Command("doctor", ("DIR",)),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="vocabulary-mismatch",
        severity="error",
        keys=("size mismatch for",),
        pattern=r"size mismatch for "
        r"(?P<name>[\w.]*(?:embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out)[\w.]*): "
        r"copying "
        r"a param with shape torch\.Size\(\[(?P<have>\d+), \d+\]\) from checkpoint, the shape in current model is "
        r"torch\.Size\(\[(?P<want>\d+), \d+\]\)",
        text="The vocabulary has {have} rows in the file and {want} in the model: tokens were added in "
        "training, or one "
        "side is "
        "padded. Resize the model to the tokenizer before loading, or use the base that the adapter was "
        "trained on.",
        next=Command("doctor", ("DIR", "--base", "BASE")),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="size-mismatch",
        severity="error",
        keys=("size mismatch for",),
        pattern=r"size mismatch for (?P<name>[\w.]+): copying a param with shape "
        r"torch\.Size\(\[(?P<have>[^\]]+)\]\) from "
        r"checkpoint, the shape in current model is torch\.Size\(\[(?P<want>[^\]]+)\]\)",
        text="{name} is [{have}] in the file and [{want}] in the model: another architecture or size, another LoRA "
        "rank, "
        "or a "
        "head with another number of labels. " + _NO_CURE,
        next=Command("doctor", ("DIR", "--base", "BASE")),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="size-mismatch-cut",
        severity="error",
        keys=("size mismatch",),
        pattern=r"(?<!due to )size mismatch(?: for (?P<name>[\w.]+))?",
        text="A tensor ({name}) has one shape in the file and another in the model; the rest of the line says "
        "which, and is not here. "
        "torch.Size([0]) from the checkpoint: saved empty under ZeRO-3. torch.Size([0]) in the current model: "
        "loaded "
        "outside of a gather. Neither: another architecture, vocabulary, LoRA rank or number of labels. " + _NO_CURE,
        next=Command("doctor", ("DIR",)),
        codes=("zero3-empty-tensors",),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="weights-not-used",
        severity="cosmetic",
        keys=("were not used when initializing", "not used: ["),
        pattern=r"(?:were )?not used(?: when initializing [^\[]{0,300})?: "
        r"\[(?P<name>'(?:lm_head|embed_out)\.(?:weight|bias)'"
        r"(?:[,/ ]*'(?:lm_head|embed_out)\.(?:weight|bias)')*)\]",
        text="Harmless: the output embedding ({name}) of the language model has no place in a reward model or critic.",
        seen_in=("transformers 4.57.6: transformers/modeling_utils.py",),
    ),
    Message(
        code="weights-not-used-others",
        severity="changes-numbers",
        keys=("were not used when initializing",),
        pattern=r"were not used when initializing .*: \[(?P<name>'[^']*')",
        text="The file holds tensors that the model has no place for ({name}, ...). If a head or a prefix such as "
        "module. or "
        "base_model. is among them, what should take their place is random.",
        next=Command("doctor", ("DIR",)),
        seen_in=(
            "transformers 4.57.6: transformers/modeling_utils.py",
            "accelerate 1.15.0: accelerate/utils/modeling.py",
        ),
    ),
    Message(
        code="adapter-keys-missing",
        severity="error",
        keys=("adapter keys",),
        pattern=r"Found missing adapter keys while loading the checkpoint: \[(?:(?P<name>'[^']*'))?",
        text="PEFT found no values for adapter tensors ({name}, ...): they are zero, and the model answers as its base "
        "does. PEFT "
        "says nothing of keys that it ignores: the names in the file do not fit.",
        next=Steps(
            Command("doctor", ("ADAPTER", "--base", "BASE")),
            Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE")),
        ),
        seen_in=("peft 0.21.2: peft/peft_model.py",),
    ),
    Message(
        code="tokens-need-padding",
        severity="error",
        keys=("batch sizes > 1",),
        pattern=r"Cannot handle batch sizes > 1 if no padding token is defined",
        text="The config has no pad_token_id, and a reward model needs it to find each answer's last token.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        seen_in=("transformers 5.23.0: transformers/modeling_layers.py",),
    ),
    Message(
        code="no-weight-file",
        severity="error",
        keys=("no file named", "a file named"),
        pattern=r"no file named (?P<name>[\w.-]+)|does not appear to have a file named "
        r"(?:pytorch_model|model|tf_model)\.",
        text="The folder has no weights under the names that transformers reads. After ZeRO-3 without gathering, with "
        "FSDP and "
        "in verl's `huggingface` folder, they are in the trainer's shards, in this folder, below or above it.",
        next=Steps(Command("doctor", ("DIR",)), Command("gather", ("DIR", "OUT"))),
        codes=("weights-missing",),
        seen_in=("transformers 5.23.0: transformers/modeling_utils.py",),
    ),
    Message(
        code="not-a-repository",
        severity="error",
        keys=("Repo id must", "HFValidationError", "is not a local folder and is not a valid model identifier"),
        pattern=r"Repo id must |HFValidationError|is not a local folder and is not a valid model identifier",
        text="The path does not exist, and was then taken for a name on the Hub. Look for a typing error, or for "
        "the folder "
        "checkpoint-N inside of it.",
        next=Command("inspect", ("DIR",)),
        seen_in=("huggingface_hub 2.4.0: huggingface_hub/utils/_validators.py",),
    ),
    Message(
        code="no-adapter-config",
        severity="error",
        keys=("adapter_config.json",),
        pattern=r"Can't find 'adapter_config\.json'",
        text="The folder is not an adapter, or the path is wrong: see what is there.",
        next=Command("inspect", ("DIR",)),
        codes=("adapter-config-missing",),
        seen_in=("peft 0.21.2: peft/config.py",),
    ),
    Message(
        code="architecture-unsupported",
        severity="error",
        keys=("Model architectures", "is not a registered model"),
        pattern=r"Model architectures \[(?P<name>'[^']*')\].* not supported|'(?P<other>\w+)' is not a registered model",
        text="The config's `architectures` names a class that this engine does not know: a wrapper's (FSDP..., "
        "RewardModel, "
        "CriticModel), or one that needs a newer version.",
        next=Command("doctor", ("DIR", "--for", "vllm")),
        seen_in=(
            "vllm 0.33.0: vllm/model_executor/models/registry.py",
            "sglang 0.5.23: sglang/srt/models/registry.py",
        ),
    ),
    Message(
        code="embedding-key-error",
        severity="error",
        keys=("lm_head.weight'", 'lm_head.weight"'),
        pattern=r"(?:KeyError:|Can ?not map tensor) ['\"]lm_head\.weight['\"]",
        text="The config ties the output embedding to the input's, and the file holds both, or neither says so. The "
        "second copy "
        "has to go where they are equal.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
    ),
    Message(
        code="unmerged-keys",
        severity="error",
        keys=("KeyError: '", 'KeyError: "', "not found in", "Unexpected key"),
        pattern=r"(?:KeyError|not found in|Unexpected key).{0,2000}?(?:base_layer\.weight|lora_[AB])|"
        r"KeyError: '(?:model\.)?layers\.\d+\.[\w.]{1,200}'",
        text="The engine meets a layer's name that it does not expect. Nearly always a full model was saved with "
        "LoRA's wrappers "
        "still around its layers (base_layer, lora_A), and is neither adapter nor model; else a prefix is wrong.",
        next=Command("doctor", ("DIR",)),
    ),
    Message(
        code="no-value-head-found",
        severity="cosmetic",
        keys=("no v_head weight", "Failed to load value_head", "does not contain value head"),
        pattern=r"(?:no v_head weight is found|Failed to load value_head\.(?:bin|safetensors)|Provided path \(.*\)"
        r" does not "
        r"contain "
        r"value head weights)",
        text="LLaMA-Factory looks for value_head.safetensors and for value_head.bin, and says this of each that is "
        "missing. "
        "Harmless where PPO makes a new head, or where the other file is there; otherwise the reward model is "
        "random.",
        next=Command("doctor", ("DIR", "--for", "llamafactory")),
        seen_in=("llamafactory 0.9.5: llamafactory/model/model_utils/valuehead.py",),
    ),
)
