"""Messages of trainers, shards, containers and the Hub."""

from converter.examine.explanations.message import Message

MESSAGES = (
    Message(
        "zero-files-unexpected",
        "error",
        ("optim_states.pt",),
        r"Expected (?P<want>\d+) of '\*_optim_states\.pt' under .* but found (?P<have>\d+) files",
        "{have} shard files lie where {want} belong: a run of another size saved into the same folder, or "
        "files are "
        "missing.",
        ("rlhf-convert doctor DIR", "rlhf-convert gather DIR OUT"),
        ("zero-mixed", "zero-rank-missing"),
    ),
    Message(
        "zero-stage-unknown",
        "error",
        ("unknown zero stage",),
        r"unknown zero stage(?: (?P<stage>\d))?",
        "zero_to_fp32 reads stages 2 and 3; other stages ({stage}) are gathered by rlhf-convert.",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "zero-not-a-checkpoint",
        "error",
        ("is not a zero checkpoint",),
        r"is not a zero checkpoint",
        "zero_to_fp32 does not know this layout (BF16_Optimizer, or stage 0); rlhf-convert does.",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "zero-consumed",
        "error",
        ("numels out of",),
        r"consumed (?P<have>\d+) numels out of (?P<want>\d+)",
        "The shards do not add up to the parameters: alignment padding, or files of two runs. rlhf-convert "
        "knows the "
        "paddings, and names the parameter where sizes part otherwise.",
        ("rlhf-convert gather DIR OUT",),
        ("zero-sizes",),
    ),
    Message(
        "world-size-changed",
        "error",
        ("world size",),
        r"DP world size of (?P<have>\d+) .*(?:current|different)|checkpoint.* world size",
        "The run was saved with another number of GPUs, and its optimizer state can't be resumed as it is. The "
        "weights can "
        "be gathered with any number.",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "flat-parameters",
        "error",
        ("_flat_param",),
        r"[.'\"]_flat_param\b",
        "An FSDP save of flat local shards: shapes are not in it. With the sharded or the full state-dict type "
        "they "
        "are.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "verl-config-missing",
        "error",
        ("fsdp_config.json",),
        r"fsdp_config\.json.{0,400}?(?:not exist|No such file|not found)",
        "Older versions of verl did not write fsdp_config.json; the world size is in the names of the rank files.",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "dcp-key-invalid",
        "error",
        ("is invalid", ".distcp"),
        r"Key `(?P<name>[\w.]+)` is invalid",
        "accelerate's merge-weights unwraps one top key only, and this checkpoint has several (model, optim, step).",
        ("rlhf-convert gather DIR OUT",),
    ),
    Message(
        "header-incomplete",
        "error",
        (
            "deserializing header",
            "MetadataIncompleteBuffer",
            "InvalidHeader",
            "HeaderTooLarge",
            "HeaderTooSmall",
            "InvalidHeaderDeserialization",
        ),
        r"MetadataIncompleteBuffer|InvalidHeaderDeserialization|HeaderToo(?:Large|Small)|InvalidHeader|"
        r"deserializing header: ",
        "A safetensors file is cut short, empty, or is something else: a git-lfs pointer, an error page, a pickle.",
        ("rlhf-convert doctor DIR",),
        ("file-truncated", "safetensors-not"),
    ),
    Message(
        "zip-damaged",
        "error",
        ("PytorchStreamReader",),
        r"PytorchStreamReader failed",
        "A .bin or .pt file is cut short or damaged; fetch it again. Other shards are not concerned.",
        ("rlhf-convert doctor DIR",),
        ("torch-zip",),
    ),
    Message(
        "format-missing",
        "error",
        ("'NoneType' object has no attribute 'get'",),
        r"'NoneType' object has no attribute 'get'",
        "Where the traceback ends in a loader of weights: older transformers need `format: pt` in the header of a "
        "safetensors file, and this one has no metadata. Elsewhere it is a bug of the script's own.",
        ("rlhf-convert repair DIR OUT",),
    ),
    Message(
        "shared-memory",
        "error",
        ("share memory",),
        r"Some tensors share memory|shared tensors .* are mismatching",
        "The model has tied weights, and the save function wants each tensor once. Nothing on disk is wrong; a "
        "save "
        "that "
        "stopped here wrote nothing, or an unfinished folder.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "pickle-vulnerability",
        "error",
        ("serious vulnerability", "weights_only", "Weights only load failed"),
        r"serious vulnerability issue in .?torch\.load|Weights only load failed",
        "This version refuses pickled files, with reason. As safetensors they load everywhere, and rlhf-convert "
        "reads them "
        "without running anything.",
        ("rlhf-convert reshard DIR OUT",),
    ),
    Message(
        "probabilities-not-finite",
        "error",
        ("probability tensor contains",),
        r"probability tensor contains either",
        "NaN or infinity in the weights or in half-precision arithmetic: see whether the file has any.",
        ("rlhf-convert doctor DIR --deep",),
    ),
    Message(
        "remote-code-missing",
        "error",
        ("does not appear to have a file named",),
        r"does not appear to have a file named (?P<name>[\w.*]+\.py)",
        "config.json names code ({name}) that was not copied with the weights. Copy it from the base model.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "tokenizer-class",
        "error",
        ("TokenizersBackend does not exist", "has no attribute 'keys'"),
        r"Tokenizer class TokenizersBackend does not exist|'list' object has no attribute 'keys'",
        "The tokenizer was saved by transformers 5 and is read by transformers 4: a matter of "
        "tokenizer_config.json "
        "alone.",
        ("rlhf-convert repair DIR OUT --for transformers@4",),
    ),
    Message(
        "vocabulary-padded",
        "error",
        ("org_vocab_size", "has wrong shape"),
        r"loaded_weight\.shape\[output_dim\] == self\.org_vocab_size|token_embd\.weight.* has wrong shape",
        "The embedding has other rows than config.json's vocab_size: padded in training, or cut.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "merge-four-bit",
        "changes-numbers",
        ("4-bit linear", "8-bit linear"),
        r"Merge lora module to (?:4|8)-bit linear may get different generations",
        "A merge into a quantised base rounds twice. Merge into the base in bf16 or fp32.",
        ("rlhf-convert merge-lora ADAPTER OUT --base FULL_PRECISION_BASE",),
        ("base-quantised",),
    ),
    Message(
        "out-of-memory",
        "error",
        ("OutOfMemoryError", "out of memory", "Killed", "oom-kill", "oom_kill", "SIGKILL"),
        r"CUDA out of memory|OutOfMemoryError|^\s*Killed\s*$|\d+ Killed {2}|oom[-_]kill|Out of memory: Killed|"
        r"exitcode +: -9|Signal 9 \(SIGKILL\)",
        "Memory ran out. Merging and gathering need neither a GPU nor the whole model in memory: rlhf-convert streams.",
        ("rlhf-convert merge-lora ADAPTER OUT --memory 2GB", "rlhf-convert gather DIR OUT --memory 2GB"),
    ),
    Message(
        "disk-full",
        "error",
        ("No space left on device",),
        r"No space left on device",
        "The disk is full, and what was being saved is not whole: check the last checkpoint before trusting it.",
        ("rlhf-convert doctor DIR",),
    ),
)
