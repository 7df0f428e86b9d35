"""Advice that circulates and what it can't cure, engines that serve, and messages of scripts around training."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

MESSAGES = (
    Message(
        code="gradient-checkpointing",
        severity="cosmetic",
        keys=(
            "use_cache=True",
            "use_reentrant",
            "radient checkpointing",
            "radient_checkpointing",
            "radient-checkpointing",
            "requires_grad=True",
        ),
        pattern=r"`?use_cache=True`? is incompatible with gradient checkpointing|None of the inputs have requires_grad|"
        r"use_reentrant|(?i:remov|disabl|turn|switch|without|drop|delet|omit)"
        r"\w*\b.{0,30}gradient[_ -]checkpointing|"
        r"^\W*gradient[_ -]checkpointing\W*$",
        text="Harmless for weights: gradient checkpointing changes memory, never what is saved or loaded. Switching "
        "it off "
        "(removing --gradient_checkpointing) cures no checkpoint: not a head that is random, not "
        "torch.Size([0]), not a "
        "size mismatch.",
        seen_in=("transformers 5.23.0: transformers/modeling_layers.py",),
    ),
    Message(
        code="mismatched-sizes-ignored",
        severity="error",
        keys=("ignore_mismatched_sizes", "did not match"),
        pattern=r"ignore_mismatched_sizes=True|ignore_mismatched_sizes True|"
        r"--ignore_mismatched_sizes(?!\S*[= ]*(?:[Ff]alse|0))|"
        r"You set `ignore_mismatched_sizes`|^\W*ignore_mismatched_sizes\W*$|"
        r"newly initialized because the shapes did not match",
        text="ignore_mismatched_sizes=True is not a cure: every tensor whose shape differs is filled with random "
        "values, and the "
        "run goes on with them. The lines above name the tensors and both shapes.",
        next=Command("doctor", ("DIR",)),
    ),
    Message(
        code="strict-false",
        severity="error",
        keys=("strict=False", "strict = False"),
        pattern=r"^(?!\s).{0,60}\b(?:load_state_dict|use|try|add|pass|set)\b.{0,80}strict ?= ?False|^strict ?= "
        r"?False\W*$",
        text="strict=False is not a cure: what is not found stays RANDOM, what does not fit is left out, and nothing "
        "is said. "
        "A size mismatch is raised all the same.",
        next=Command("doctor", ("DIR",)),
    ),
    Message(
        code="delete-shards",
        severity="changes-numbers",
        keys=("global_step",),
        pattern=r"(?i:delete|remove|rm -rf?)\b.{0,60}global_step",
        text="Look before: after ZeRO-3 without gathering, global_step* holds the only copy of the weights, and of "
        "a frozen "
        "random head always. Without it they are lost for good.",
        next=Command("doctor", ("DIR",)),
        codes=("sole-copy",),
    ),
    Message(
        code="labels-passed",
        severity="changes-numbers",
        keys=("num_labels=",),
        pattern=r"You passed `?num_labels=(?P<want>\d+)`? which is incompatible to the `?id2label`? map of "
        r"length `?(?P<have>\d+)",
        text="The script asks for {want} labels and config.json names {have}: if the head was trained with {have}, "
        "it will not "
        "fit.",
        next=Command("doctor", ("DIR",)),
        codes=("labels-mismatch",),
        seen_in=("transformers 5.23.0: transformers/configuration_utils.py",),
    ),
    Message(
        code="target-modules-missing",
        severity="error",
        keys=("Target modules",),
        pattern=r"Target modules (?P<name>.{1,200}?) not found in the base model",
        text="None of the modules that LoRA is to be put on ({name}) is in this model: the adapter is of another "
        "architecture, "
        "or the base is not the one that it was trained on.",
        next=Command("doctor", ("ADAPTER", "--base", "BASE")),
        codes=("adapter-targets-missing",),
        seen_in=("peft 0.21.2: peft/tuners/tuners_utils.py",),
    ),
    Message(
        code="adapter-key-error",
        severity="error",
        keys=("KeyError: 'base_model",),
        pattern=r"KeyError: '(?P<name>base_model\.[\w.]{1,300})'",
        text="The adapter lacks {name} under this name: its names were changed or doubled, or its head was not saved.",
        next=Command("doctor", ("ADAPTER", "--base", "BASE")),
        codes=("names-doubled", "adapter-half"),
    ),
    Message(
        code="adapter-config-beside-model",
        severity="error",
        keys=("base_model_name_or_path",),
        pattern=r"KeyError: ['\"]base_model_name_or_path['\"]",
        text="An adapter_config.json lies beside a merged model's weights, so the folder is taken for an adapter.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("adapter-config-stray",),
    ),
    Message(
        code="lora-weight-unsupported",
        severity="error",
        keys=("is unsupported LoRA weight", "unsupported LoRA weight"),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+) is unsupported LoRA weight",
        text="{name} is a whole tensor in the adapter (modules_to_save), which engines can't serve as LoRA. Merged, "
        "it is "
        "served as a model.",
        next=Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE")),
        seen_in=("vllm 0.33.0: vllm/lora/utils.py",),
    ),
    Message(
        code="score-unsupported",
        severity="error",
        keys=("support Score API", "not support Pooling", "does not support Embeddings API"),
        pattern=r"(?:does not|doesn't) support (?:the )?(?:Score|Pooling|Embeddings) API",
        text="vLLM serves this folder as a language model. A reward model needs the class of a classifier in "
        "config.json's "
        "`architectures`, and one label.",
        next=Steps(
            Command("convert", ("DIR", "OUT", "--to", "hf-seqcls", "--role", "reward")),
            Command("doctor", ("DIR", "--for", "vllm")),
        ),
    ),
    Message(
        code="vision-names",
        severity="error",
        keys=("KeyError: '", 'KeyError: "'),
        pattern=r"KeyError: "
        r"['\"](?P<name>(?:model\.)?(?:language_model|visual|vision_tower|vision_model)\.[\w.]{1,300})"
        r"['\"]",
        text="{name}: tensors of vision-language models were renamed in transformers 4.52, and file and engine follow "
        "different sides of that.",
        next=Command("doctor", ("DIR",)),
    ),
    Message(
        code="tensor-not-mapped",
        severity="error",
        keys=("not map tensor", ", torch.uint8 -->", "torch.uint8"),
        pattern=r"Can ?not map tensor ['\"]?(?P<name>[\w.]+)|blk\.\d+\.[\w.]+,? torch\.uint8",
        text="A converter meets a tensor that is not a weight of the model. SCB, absmax or uint8: a quantised base was "
        "saved, and "
        "has to be merged in full precision instead. lora_ or a prefix: the model was not merged or not unwrapped.",
        next=Steps(
            Command("doctor", ("DIR",)), Command("merge-lora", ("ADAPTER", "OUT", "--base", "FULL_PRECISION_BASE"))
        ),
        codes=("quantisation-left",),
    ),
    Message(
        code="dschat-checkpoint",
        severity="error",
        keys=("Cannot find model checkpoint at",),
        pattern=r"Cannot find model checkpoint at",
        text="DeepSpeed-Chat reads one file, pytorch_model.bin, with names of its own.",
        next=Command("convert", ("DIR", "OUT", "--to", "deepspeed-chat", "--role", "reward")),
    ),
    Message(
        code="zero-to-fp32-folder",
        severity="error",
        keys=("Parent directory",),
        pattern=r"Parent directory (?P<name>\S{1,300}) does not exist",
        text="Since DeepSpeed 0.15.3 the second argument of zero_to_fp32.py is a folder and no file.",
        next=Command("gather", ("DIR", "OUT")),
    ),
    Message(
        code="tensor-sizes-differ",
        severity="error",
        keys=("size of tensor a",),
        pattern=r"size of tensor a \((?P<have>\d+)\) must match (?:the size of tensor )?b \((?P<want>\d+)\)",
        text="Two tensors of {have} and {want} values meet. In a resumed run: shards of another number of GPUs. In "
        "a merge: "
        "another base or LoRA rank.",
        next=Steps(Command("doctor", ("DIR",)), Command("gather", ("DIR", "OUT"))),
    ),
    Message(
        code="rank-file-missing",
        severity="error",
        keys=("model_world_size_", "_optim_states.pt", "_model_states.pt"),
        pattern=r"(?:FileNotFoundError|No such file).{0,400}?(?:model_world_size_\d+_rank_\d+\.pt|mp_rank_\d+_(?:model|"
        r"optim)_states\.pt)",
        text="A rank's shard is not here: the run had more GPUs or nodes than this folder has files, and each node "
        "may have kept its own; or fewer ranks saved it than load it now.",
        next=Steps(Command("doctor", ("DIR", "--resume-on", "RANKS"))),
        codes=("verl-rank-missing", "zero-rank-missing"),
    ),
    Message(
        code="reverse-not-implemented",
        severity="error",
        keys=("NotImplementedError", "in reverse_op"),
        pattern=r"reverse_(?:op|transform).{0,200}NotImplementedError|NotImplementedError.{0,200}reverse_(?:op|"
        r"transform)|in reverse_op",
        text="transformers 5 can't save this model's tensors under the names of its files. The weights in memory "
        "are sound; "
        "files are converted here without model classes.",
        next=Steps(Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE")), Command("gather", ("DIR", "OUT"))),
        seen_in=("transformers 5.23.0: transformers/core_model_loading.py",),
    ),
    Message(
        code="model-type-unknown",
        severity="error",
        keys=(
            "does not recognize this architecture",
            "Should have a `model_type` key",
            "Unrecognized model identifier",
        ),
        pattern=r"model type `?(?P<name>[\w.-]+)`? but Transformers does not recognize|Should have a `model_type` key|"
        r"Unrecognized model identifier",
        text="config.json has no model_type that the installed transformers knows: the folder is not a model (look one "
        "level "
        "below), or transformers is too old for it.",
        next=Command("inspect", ("DIR",)),
        codes=("config-missing",),
        seen_in=("transformers 5.23.0: transformers/models/auto/configuration_auto.py",),
    ),
    Message(
        code="hub-unreachable-offline",
        severity="error",
        keys=(
            "couldn't connect to 'https://huggingface.co'",
            "outgoing traffic has been disabled",
            "LocalEntryNotFoundError",
        ),
        pattern=r"couldn't connect to 'https://huggingface\.co'|outgoing traffic has been "
        r"disabled|LocalEntryNotFoundError",
        text="The Hub was asked for a model, and can't be reached. If a local folder was meant, the path has a "
        "typing error: "
        "what is not a folder is taken for a name on the Hub.",
        next=Command("inspect", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/utils/hub.py",),
    ),
    Message(
        code="config-file-missing",
        severity="error",
        keys=("does not appear to have a file named config.json",),
        pattern=r"does not appear to have a file named config\.json",
        text="The folder has no config.json: it is an adapter, a trainer's shards, or the wrong level of a run.",
        next=Command("inspect", ("DIR",)),
        codes=("config-missing",),
        seen_in=("transformers 5.23.0: transformers/utils/hub.py",),
    ),
    Message(
        code="size-zero",
        severity="changes-numbers",
        keys=("torch.Size([0])",),
        pattern=r"torch\.Size\(\[0\]\)",
        text="A tensor without values. In a file: saved under ZeRO-3 without gathering, and lost there. In a "
        "model under "
        "ZeRO-3: how each parameter looks outside of a gather, and harmless.",
        next=Command("doctor", ("DIR",)),
        codes=("zero3-empty-tensors",),
    ),
    Message(
        code="push-too-large",
        severity="error",
        keys=("413 Client Error", "Payload Too Large", "larger than 10 MiB", "larger than 10MB"),
        pattern=r"413 Client Error|Payload Too Large|larger than 10 ?Mi?B",
        text="The Hub refused a push as too large: weights have to go through LFS or Xet, in files of some GB.",
        next=Command("push", ("DIR", "OWNER/NAME")),
    ),
)
