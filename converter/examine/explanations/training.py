"""Messages of trainers, shards, containers and the Hub."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

MESSAGES = (
    Message(
        code="zero-files-unexpected",
        severity="error",
        keys=("optim_states.pt",),
        pattern=r"Expected (?P<want>\d+) of '\*_optim_states\.pt' under .* but found (?P<have>\d+) files",
        text="{have} shard files lie where {want} belong: a run of another size saved into the same folder, or "
        "files are "
        "missing.",
        next=Steps(Command("doctor", ("DIR",)), Command("gather", ("DIR", "OUT"))),
        codes=("zero-mixed", "zero-rank-missing"),
        seen_in=("deepspeed 0.19.8: deepspeed/utils/zero_to_fp32.py",),
    ),
    Message(
        code="zero-stage-unknown",
        severity="error",
        keys=("unknown zero stage",),
        pattern=r"unknown zero stage(?: (?P<stage>\d))?",
        text="zero_to_fp32 reads stages 2 and 3; other stages ({stage}) are gathered by rlhf-convert.",
        next=Command("gather", ("DIR", "OUT")),
        seen_in=("deepspeed 0.19.8: deepspeed/utils/zero_to_fp32.py",),
    ),
    Message(
        code="zero-not-a-checkpoint",
        severity="error",
        keys=("is not a zero checkpoint",),
        pattern=r"is not a zero checkpoint",
        text="zero_to_fp32 does not know this layout (BF16_Optimizer, or stage 0); rlhf-convert does.",
        next=Command("gather", ("DIR", "OUT")),
        seen_in=("deepspeed 0.19.8: deepspeed/utils/zero_to_fp32.py",),
    ),
    Message(
        code="zero-consumed",
        severity="error",
        keys=("numels out of",),
        pattern=r"consumed (?P<have>\d+) numels out of (?P<want>\d+)",
        text="The shards do not add up to the parameters: alignment padding, or files of two runs. rlhf-convert "
        "knows the "
        "paddings, and names the parameter where sizes part otherwise.",
        next=Command("gather", ("DIR", "OUT")),
        codes=("zero-sizes",),
        seen_in=("deepspeed 0.19.8: deepspeed/utils/zero_to_fp32.py",),
    ),
    Message(
        code="world-size-changed",
        severity="error",
        keys=(" world size",),
        pattern=r"(?:checkpoint.{0,80}?)?DP world size of (?P<have>\d+) .{0,80}?"
        r"(?:current world size is (?P<want>\d+)|current|different)|checkpoint.* world size",
        text="The run was saved on another number of ranks ({have}), and DeepSpeed resumes on as many only. reshard "
        "writes its state for those that there are now ({want}), the optimizer's included, bit by bit.",
        next=Steps(Command("reshard", ("DIR", "OUT", "--world-size", "RANKS")), Command("gather", ("DIR", "OUT"))),
        seen_in=("deepspeed 0.19.8: deepspeed/runtime/engine.py",),
    ),
    Message(
        code="flat-parameters",
        severity="error",
        keys=("_flat_param",),
        pattern=r"[.'\"]_flat_param\b",
        text="An FSDP save of flat local shards: shapes are not in it. With the sharded or the full state-dict type "
        "they "
        "are.",
        next=Command("doctor", ("DIR",)),
        seen_in=("torch 2.13.0: torch/distributed/fsdp/_common_utils.py",),
    ),
    Message(
        code="verl-config-missing",
        severity="error",
        keys=("fsdp_config.json",),
        pattern=r"fsdp_config\.json.{0,400}?(?:not exist|No such file|not found)",
        text="Older versions of verl did not write fsdp_config.json; the world size is in the names of the rank files.",
        next=Command("gather", ("DIR", "OUT")),
    ),
    Message(
        code="dcp-key-invalid",
        severity="error",
        keys=("` is invalid",),
        pattern=r"Key `(?P<name>[\w.]+)` is invalid",
        text="accelerate's merge-weights unwraps one top key only, and this checkpoint has several (model, "
        "optim, step).",
        next=Command("gather", ("DIR", "OUT")),
    ),
    Message(
        code="header-incomplete",
        severity="error",
        keys=(
            "deserializing header",
            "MetadataIncompleteBuffer",
            "InvalidHeader",
            "HeaderTooLarge",
            "HeaderTooSmall",
            "InvalidHeaderDeserialization",
        ),
        pattern=r"MetadataIncompleteBuffer|InvalidHeaderDeserialization|HeaderToo(?:Large|Small)|InvalidHeader|"
        r"deserializing header: ",
        text="A safetensors file is cut short, empty, or is something else: a git-lfs pointer, an error page, a "
        "pickle.",
        next=Command("doctor", ("DIR",)),
        codes=("file-truncated", "safetensors-not"),
    ),
    Message(
        code="zip-damaged",
        severity="error",
        keys=("PytorchStreamReader",),
        pattern=r"PytorchStreamReader failed",
        text="A .bin or .pt file is cut short or damaged; fetch it again. Other shards are not concerned.",
        next=Command("doctor", ("DIR",)),
        codes=("torch-zip",),
    ),
    Message(
        code="format-missing",
        severity="error",
        keys=("'NoneType' object has no attribute 'get'",),
        pattern=r"'NoneType' object has no attribute 'get'",
        text="Where the traceback ends in a loader of weights: older transformers need `format: pt` in the header of a "
        "safetensors file, and this one has no metadata. Elsewhere it is a bug of the script's own.",
        next=Command("repair", ("DIR", "OUT")),
    ),
    Message(
        code="shared-memory",
        severity="error",
        keys=("share memory",),
        pattern=r"Some tensors share memory|shared tensors .* are mismatching",
        text="The model has tied weights, and the save function wants each tensor once. Nothing on disk is wrong; a "
        "save "
        "that "
        "stopped here wrote nothing, or an unfinished folder.",
        next="save with model.save_pretrained(), or safetensors.torch.save_model(), which know of ties",
        seen_in=("safetensors 0.8.0: safetensors/torch.py",),
    ),
    Message(
        code="pickle-vulnerability",
        severity="error",
        keys=("serious vulnerability", "weights_only", "Weights only load failed"),
        pattern=r"serious vulnerability issue in .?torch\.load|Weights only load failed",
        text="This version refuses pickled files, with reason. As safetensors they load everywhere, and rlhf-convert "
        "reads them "
        "without running anything.",
        next=Command("reshard", ("DIR", "OUT")),
        seen_in=(
            "transformers 5.23.0: transformers/utils/import_utils.py",
            "torch 2.13.0: torch/serialization.py",
        ),
    ),
    Message(
        code="probabilities-not-finite",
        severity="error",
        keys=("probability tensor contains",),
        pattern=r"probability tensor contains either",
        text="NaN or infinity in the weights or in half-precision arithmetic: see whether the file has any.",
        next=Command("doctor", ("DIR", "--deep")),
    ),
    Message(
        code="remote-code-missing",
        severity="error",
        keys=("does not appear to have a file named",),
        pattern=r"does not appear to have a file named (?P<name>[\w.*]+\.py)",
        text="config.json names code ({name}) that was not copied with the weights. Copy it from the base model.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/utils/hub.py",),
    ),
    Message(
        code="tokenizer-class",
        severity="error",
        keys=("TokenizersBackend does not exist", "has no attribute 'keys'"),
        pattern=r"Tokenizer class TokenizersBackend does not exist|'list' object has no attribute 'keys'",
        text="The tokenizer was saved by transformers 5 and is read by transformers 4: a matter of "
        "tokenizer_config.json "
        "alone.",
        next=Command("repair", ("DIR", "OUT", "--for", "transformers@4")),
    ),
    Message(
        code="vocabulary-padded",
        severity="error",
        keys=("org_vocab_size", "has wrong shape"),
        pattern=r"loaded_weight\.shape\[output_dim\] == self\.org_vocab_size|token_embd\.weight.* has wrong shape",
        text="The embedding has other rows than config.json's vocab_size: padded in training, or cut.",
        next=Command("doctor", ("DIR",)),
        seen_in=("sglang 0.5.23: sglang/srt/layers/vocab_parallel_embedding.py",),
    ),
    Message(
        code="merge-four-bit",
        severity="changes-numbers",
        keys=("4-bit linear", "8-bit linear"),
        pattern=r"Merge lora module to (?:4|8)-bit linear may get different generations",
        text="A merge into a quantised base rounds twice. Merge into the base in bf16 or fp32.",
        next=Command("merge-lora", ("ADAPTER", "OUT", "--base", "FULL_PRECISION_BASE")),
        codes=("base-quantised",),
        seen_in=("peft 0.21.2: peft/tuners/lora/bnb.py",),
    ),
    Message(
        code="out-of-memory",
        severity="error",
        keys=(
            "OutOfMemoryError",
            "out of memory",
            "Killed",
            "oom-kill",
            "oom_kill",
            "Signal 9 (SIGKILL",
            *("exitcode: -9", "exitcode : -9", "exitcode  : -9"),
            "return code = -9",
        ),
        pattern=r"CUDA out of memory|OutOfMemoryError|^\s*Killed\s*$|\d+ Killed {2}|oom[-_]kill|Out of memory: Killed|"
        r"exitcode *: -9\b|return code = -9\b|Signal 9 \(SIGKILL\)",
        text="Memory ran out. Merging and gathering need neither a GPU nor the whole model in memory: "
        "rlhf-convert streams.",
        next=Steps(
            Command("merge-lora", ("ADAPTER", "OUT", "--memory", "2GB")),
            Command("gather", ("DIR", "OUT", "--memory", "2GB")),
        ),
    ),
    Message(
        code="disk-full",
        severity="error",
        keys=("No space left on device",),
        pattern=r"No space left on device",
        text="The disk is full, and what was being saved is not whole: check the last checkpoint before trusting it.",
        next=Command("doctor", ("DIR",)),
    ),
)
