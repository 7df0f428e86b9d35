"""Messages of vLLM and SGLang, which serve a model or an adapter: names and shapes they do not take."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_VLLM = "vllm 0.33.0: vllm/"
_SGLANG = "sglang 0.5.23: sglang/srt/"
_MERGED = Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE"))
_FOR_VLLM = Command("doctor", ("DIR", "--for", "vllm"))

MESSAGES = (
    Message(
        code="engine-name-unknown",
        severity="error",
        keys=("There is no module or parameter named", "No module or parameter named"),
        pattern=r"(?:There is no|No) module or parameter named ['\"]?(?P<name>[\w.]{1,300}?)['\"]? in (?P<other>\w+)",
        text="The file holds {name}, and the engine's class has no such part: a wrapper's prefix (base_model., "
        "module.), "
        "LoRA's layers left inside, a head that this class does not have, or another architecture.",
        next=_FOR_VLLM,
        codes=("names-wrapped", "lora-unmerged"),
        seen_in=(_VLLM + "model_executor/models/utils.py", _SGLANG + "models/utils.py"),
    ),
    Message(
        code="engine-weights-missing",
        severity="error",
        keys=("not initialized from checkpoint", "Missing keys ("),
        pattern=r"Following weights were not initialized from checkpoint: \{'(?P<name>[\w.]+)'|"
        r"[Ww]eights (?:were|are) not initialized from checkpoints?:|"
        r"Missing keys \('(?P<other>[\w.]+)'.{0,20000}? in loaded state",
        text="The folder lacks tensors that the model has ({name}, ...). The engine stops, or runs with what happened "
        "to "
        "be in memory: a shard is missing, names carry a prefix, or a tensor was never saved.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-missing", "index-phantom"),
        seen_in=(
            _VLLM + "model_executor/model_loader/default_loader.py",
            _VLLM + "model_executor/model_loader/sharded_state_loader.py",
            _SGLANG + "models/gemma4_mm.py",
        ),
    ),
    Message(
        code="engine-name-skipped",
        severity="changes-numbers",
        keys=("not found in params_dict",),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+) not found in params_dict",
        text="SGLang skips a tensor that its class has no place for ({name}) and serves the rest. What should stand in "
        "its place has values that nobody trained; only a part that this class leaves out is harmless.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-unexpected", "names-wrapped"),
        seen_in=(_SGLANG + "models/llama.py", _SGLANG + "models/qwen2.py"),
    ),
    Message(
        code="engine-no-weights",
        severity="error",
        keys=("Cannot find any model weights with", "No model weights found in"),
        pattern=r"(?:Cannot find any model weights with|No model weights found in:) `?(?P<name>[^`\s]{1,300})",
        text="{name} holds no weights under a name that the engine reads: it is an adapter, a trainer's shards, a "
        "folder "
        "with the config alone (verl's huggingface/), or the wrong level of a run.",
        next=Steps(Command("inspect", ("DIR",)), Command("gather", ("DIR", "OUT"))),
        codes=("weights-missing",),
        seen_in=(_VLLM + "model_executor/model_loader/default_loader.py", _SGLANG + "model_loader/loader.py"),
    ),
    Message(
        code="engine-shard-missing",
        severity="error",
        keys=("Weight files referenced in index but missing", "shard file(s) missing from"),
        pattern=r"Weight files referenced in index but missing: |references \d+ shard file\(s\) missing from",
        text="The index names weight files that are not in the folder: a download or a copy was not finished, or an "
        "index of another save was left behind.",
        next=Command("doctor", ("DIR",)),
        codes=("index-phantom", "shard-missing"),
        seen_in=(
            _VLLM + "model_executor/model_loader/weight_utils.py",
            _SGLANG + "model_loader/weight_utils.py",
        ),
    ),
    Message(
        code="engine-shape",
        severity="error",
        keys=("Attempted to load weight (", "Tried to load weights of size", "loaded_weight.shape=torch.Size("),
        pattern=r"Attempted to load weight \((?P<have>.{1,80}?)\) into parameter \((?P<want>.{1,80}?)\)|"
        r"Tried to load weights of size (?P<other>torch\.Size\(\[[\d, ]*\]\)) ?to a parameter of size|"
        r"loaded_weight\.shape=torch\.Size\(",
        text="A tensor in the file has another shape than the model that config.json describes ({have}): another size, "
        "vocabulary or number of heads, a slice of a rank, or packed 4-bit values.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-misshapen", "vocabulary-rows"),
        seen_in=(
            _VLLM + "model_executor/model_loader/weight_utils.py",
            _VLLM + "model_executor/layers/linear.py",
            _SGLANG + "layers/linear.py",
        ),
    ),
    Message(
        code="engine-tie-uninitialised",
        severity="error",
        keys=("so the tied weight is uninitialized",),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+)['\"]? was skipped because it is tied to ['\"]?(?P<other>[\w.]+)|"
        r"so the tied weight is uninitialized",
        text="config.json ties {name} to another tensor, and that other one is not in the file. The tie is wrong, or "
        "the "
        "wrong one of the two was kept.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("output-embedding-missing",),
        seen_in=(_VLLM + "model_executor/models/utils.py",),
    ),
    Message(
        code="tie-differs",
        severity="changes-numbers",
        keys=("says the word embeddings are tied", "so we will NOT tie them"),
        pattern=r"says the word embeddings are tied, but the checkpoint contains a different|"
        r"specifies to tie (?P<name>[\w.]+) to [\w.]+,? but both are present in the checkpoints? with different values",
        text="config.json says that the two embeddings are one, and the file holds two with different values. This "
        "loader takes both; others throw one away and then answer differently.",
        next=Steps(Command("doctor", ("DIR", "--deep")), Command("repair", ("DIR", "OUT", "--allow", "untie"))),
        codes=("tied-copies-differ",),
        seen_in=(
            _VLLM + "model_executor/model_loader/weight_tying.py",
            "transformers 5.23.0: transformers/modeling_utils.py",
        ),
    ),
    Message(
        code="lora-targets-unsupported",
        severity="error",
        keys=("expected target modules in", "that are not included in the specified --lora-target-modules"),
        pattern=r"While loading (?P<name>.{1,300}?), expected target modules in|"
        r"contains target modules .{1,2000}? that are not included in the specified --lora-target-modules",
        text="The adapter has LoRA on modules that the engine does not serve with LoRA, or that it was started "
        "without: "
        "a head, an embedding, experts, or names of another architecture. Merged, all of it is served.",
        next=Steps(Command("doctor", ("ADAPTER", "--base", "BASE")), _MERGED),
        codes=("adapter-targets-missing", "adapter-unmatched"),
        seen_in=(_VLLM + "lora/lora_model.py", _SGLANG + "lora/lora_manager.py"),
    ),
    Message(
        code="lora-kind-unsupported",
        severity="error",
        keys=(
            "vLLM only supports modules_to_save",
            "vLLM does not yet support DoRA",
            "vLLM does not support",
            "Adapter bias is not supported",
            "LoRA serving currently doesn't support",
        ),
        pattern=r"vLLM only supports modules_to_save being|vLLM does not yet support DoRA|"
        r"vLLM does not support (?P<name>LoRA bias|init_lora_weights|Activated LoRA|layer_replication|block-diagonal "
        r"LoRA|QALoRA)|Adapter bias is not supported|"
        r"LoRA serving currently doesn't support (?P<other>DoRA adapters|adapters that add tokens)",
        text="The adapter is of a kind that the engine can't serve beside a base (DoRA, biases, whole modules, added "
        "tokens, an initialisation that changed the base). Merged into its base it is served as a model.",
        next=_MERGED,
        seen_in=(_VLLM + "lora/peft_helper.py", _SGLANG + "lora/lora_manager.py"),
    ),
    Message(
        code="lora-rank-too-large",
        severity="error",
        keys=("is greater than max_lora_rank", "is incompatible with the current LoRA memory pool configuration"),
        pattern=r"LoRA rank (?P<have>\d+) is greater than max_lora_rank (?P<want>\d+)|"
        r"with rank (?P<other>\d+) is incompatible with the current LoRA memory pool",
        text="The adapter's rank is larger than the engine was started for. Nothing is wrong with it: start the engine "
        "with --max-lora-rank of the adapter's `r` (rank_pattern counts too), or merge it.",
        next=_MERGED,
        seen_in=(_VLLM + "lora/peft_helper.py", _SGLANG + "lora/lora_manager.py"),
    ),
    Message(
        code="lora-head-does-not-fit",
        severity="error",
        keys=("Cannot load full module", "Full module ", "Only one full classification module"),
        pattern=r"Cannot load full module (?P<name>\S{1,200}?):|Full module (?P<other>\S{1,200}?) (?:is missing weight|"
        r"does not match|for \S+ has an incompatible)|Only one full classification module",
        text="The adapter brings a whole head ({name}), and the engine's class has none of that name and shape: the "
        "base "
        "is served as another class than the adapter was trained as. Merged, the head is in the model.",
        next=Steps(_MERGED, Command("doctor", ("OUT", "--for", "vllm"))),
        seen_in=(_VLLM + "lora/model_manager.py", _VLLM + "lora/lora_model.py"),
    ),
    Message(
        code="lora-embedding-rows",
        severity="error",
        keys=("must be consistent with the base model's vocabulary size",),
        pattern=r"The embedding LoRA size ?\((?P<have>\d+)\) must be consistent with the base model's vocabulary size ?"
        r"\((?P<want>\d+)\)",
        text="The adapter was trained on an embedding of {have} rows, the base that is served has {want}: tokens were "
        "added in training, or it is another base.",
        next=Steps(Command("doctor", ("ADAPTER", "--base", "BASE")), _MERGED),
        codes=("vocab-mismatch", "adapter-tokens"),
        seen_in=(_VLLM + "lora/lora_model.py",),
    ),
    Message(
        code="adapter-not-there",
        severity="error",
        keys=("No adapter found for", "doesn't contain tensors", "adapter model file not found in"),
        pattern=r"No adapter found for (?P<name>\S{1,300})|(?<!\S)(?P<other>\S{1,300}+) doesn't contain tensors|"
        r"adapter model file not found in",
        text="The folder that was named as an adapter has no adapter_model.safetensors or .bin: a wrong path, the "
        "run's "
        "folder instead of a checkpoint's, or a save that was not finished.",
        next=Command("inspect", ("DIR",)),
        codes=("weights-missing", "run-folder"),
        seen_in=(
            _VLLM + "exceptions.py",
            _VLLM + "lora/lora_model.py",
            "transformers 5.23.0: transformers/integrations/peft.py",
        ),
    ),
    Message(
        code="quantisation-asked-otherwise",
        severity="error",
        keys=("Quantization method specified in the model config", "Cannot find the config file for"),
        pattern=r"Quantization method specified in the model config \((?P<name>[\w-]+)\) does not match|"
        r"Cannot find the config file for (?P<other>awq|gptq|bitsandbytes|fp8|compressed-tensors)\b",
        text="The folder is quantised in another way than the engine was told ({name}), or says nothing of it. Leave "
        "--quantization out, and look at quantization_config: weights that were merged in full precision must not "
        "carry one.",
        next=Command("doctor", ("DIR",)),
        codes=("quantisation-left",),
        seen_in=(_VLLM + "config/model.py", _VLLM + "model_executor/model_loader/weight_utils.py"),
    ),
    Message(
        code="heads-not-divisible",
        severity="error",
        keys=("must be divisible by tensor parallel size", "must be divisible by the tensor parallel size"),
        pattern=r"attention heads \((?P<have>\d+)\) must be divisible by (?:the )?tensor parallel size "
        r"\((?P<want>\d+)\)",
        text="The model's {have} attention heads can't be shared out over {want} GPUs. Nothing is wrong with the "
        "files: "
        "choose a tensor-parallel size that divides the number of heads.",
        next="start the engine with another --tensor-parallel-size; no file has to change",
        seen_in=(_VLLM + "config/model.py",),
    ),
    Message(
        code="reward-model-not-embedding",
        severity="error",
        keys=("is only used for embedding",),
        pattern=r"(?<!\w)(?P<name>\w{1,100}+) is only used for embedding",
        text="SGLang serves reward models and classifiers through its embedding side alone. Nothing is wrong with the "
        "files.",
        next="start the server with --is-embedding",
        seen_in=(_SGLANG + "models/llama_reward.py", _SGLANG + "models/qwen2_rm.py"),
    ),
    Message(
        code="engine-failed-elsewhere",
        severity="error",
        keys=("Engine core initialization failed", "architectures failed to be inspected", "failed to be inspected"),
        pattern=r"Engine core initialization failed|Model architectures .{1,300}? failed to be inspected",
        text="vLLM reports that one of its processes did not start: that is not the cause, which is the first error of "
        "that process, further up in the same output.",
        next=Command("explain", ("WHOLE_LOG",)),
        seen_in=(_VLLM + "v1/engine/utils.py", _VLLM + "model_executor/models/registry.py"),
    ),
)
