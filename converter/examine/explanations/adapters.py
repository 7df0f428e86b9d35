"""Messages about adapters: PEFT, transformers' own, TRL, LLaMA-Factory, Unsloth, bitsandbytes."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_PEFT = "peft 0.21.2: peft/"
_TRL = "trl 1.16.0: trl/trainer/"
_FACTORY = "llamafactory 0.9.5: llamafactory/"
_DOCTOR = Command("doctor", ("ADAPTER", "--base", "BASE"))
_MERGED = Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE"))
_MERGED_FULL = Command("merge-lora", ("ADAPTER", "OUT", "--base", "FULL_PRECISION_BASE"))

MESSAGES = (
    Message(
        code="adapter-weights-not-found",
        severity="error",
        keys=("Can't find weights for",),
        pattern=r"Can't find weights for (?P<name>\S{1,300}) in ",
        text="{name} has an adapter_config.json and neither adapter_model.safetensors nor adapter_model.bin: the save "
        "was "
        "not finished, or the tensors are in a trainer's shards.",
        next=Steps(Command("inspect", ("DIR",)), Command("gather", ("DIR", "OUT"))),
        codes=("weights-missing",),
        seen_in=(_PEFT + "utils/save_and_load.py",),
    ),
    Message(
        code="adapter-config-newer",
        severity="error",
        keys=("got an unexpected keyword argument",),
        pattern=r"(?<!\w)(?P<name>\w{0,80}Config)\.__init__\(\) got an unexpected keyword argument '(?P<other>\w+)'",
        text="adapter_config.json has a field ({other}) that the installed PEFT is too old for. Most such fields are "
        "off "
        "and say nothing; one that is on changes what the adapter computes.",
        next=Steps(_DOCTOR, _MERGED),
        codes=("adapter-field-unknown", "adapter-field-unsupported"),
        seen_in=("peft 0.15.2: peft/config.py",),
    ),
    Message(
        code="adapter-fields-ignored",
        severity="changes-numbers",
        keys=("these are ignored. This probably means that you're loading a configuration file",),
        pattern=r"Unexpected keyword arguments \[(?P<name>[^\]]{1,300})\] for class (?P<other>\w+), these are ignored",
        text="PEFT does not know fields of adapter_config.json ({name}) and goes on without them. Where one is on, the "
        "adapter computes something else than was trained.",
        next=_DOCTOR,
        codes=("adapter-field-unknown", "adapter-field-unsupported"),
        seen_in=(_PEFT + "config.py",),
    ),
    Message(
        code="adapter-config-incomplete",
        severity="error",
        keys=("config that is trying to be loaded is missing required keys",),
        pattern=r"The (?P<name>\w+) config that is trying to be loaded is missing required keys",
        text="adapter_config.json does not say of which kind the adapter is (peft_type): it was cut, or is of another "
        "program.",
        next=Command("doctor", ("ADAPTER",)),
        codes=("adapter-config",),
        seen_in=(_PEFT + "config.py",),
    ),
    Message(
        code="adapter-twice",
        severity="changes-numbers",
        keys=(
            "Already found a `peft_config` attribute",
            "You are trying to modify a model with PEFT for a second time",
        ),
        pattern=r"Already found a `peft_config` attribute in the model|"
        r"You are trying to modify a model with PEFT for a second time",
        text="PEFT was put around a model that has it already. The names of what is saved then carry base_model.model. "
        "twice, and loaders that do not expect that ignore the whole adapter without a word.",
        next=_DOCTOR,
        codes=("names-doubled", "adapter-unmatched"),
        seen_in=(_PEFT + "tuners/tuners_utils.py", _PEFT + "mapping_func.py"),
    ),
    Message(
        code="adapter-saved-in-pieces",
        severity="error",
        keys=("LoRA tensor(s) have invalid shape",),
        pattern=r"Adapter '(?P<other>[^']{1,100})': (?P<have>\d+) LoRA tensor\(s\) have invalid shape: "
        r"(?P<name>[\w.]+)",
        text="The adapter that is being saved is not whole: {have} tensors ({name}, ...) are empty or a slice, since "
        "ZeRO-3 or FSDP did not gather them. Their values are in the run's own checkpoint alone.",
        next=Steps(
            Command("gather", ("THE_RUNS_global_step_FOLDER", "OUT")),
            Command("repair", ("ADAPTER", "OUT", "--weights-from", "THE_RUNS_global_step_FOLDER")),
        ),
        codes=("zero3-empty-tensors", "sole-copy"),
        seen_in=(_PEFT + "utils/save_and_load.py",),
    ),
    Message(
        code="adapter-tied-target",
        severity="changes-numbers",
        keys=("are part of the adapter. This can lead to complications",),
        pattern=r"tied_target_modules=(?P<name>\[.{1,300}?\]) are part of the adapter",
        text="LoRA is on one side of a tie ({name}). Merged without untying, the update reaches both embeddings or is "
        "lost "
        "with the next save, by the loader's version.",
        next=_MERGED,
        codes=("tied-copies-differ",),
        seen_in=(_PEFT + "tuners/tuners_utils.py",),
    ),
    Message(
        code="adapter-base-renamed",
        severity="changes-numbers",
        keys=("config's `base_model_name_or_path` was renamed from",),
        pattern=r"`base_model_name_or_path` was renamed from '(?P<have>[^']{0,200})' to '(?P<want>[^']{0,200})'",
        text="The adapter says that it belongs to {have}, and {want} is loaded. It is right only on the weights that "
        "it "
        "was trained on.",
        next=_DOCTOR,
        codes=("adapter-base-moved", "base-differs"),
        seen_in=(_PEFT + "mapping_func.py",),
    ),
    Message(
        code="adapter-embeddings-saved",
        severity="cosmetic",
        keys=("Setting `save_embedding_layers` to `True`", "will assume that the vocabulary was not modified"),
        pattern=r"Setting `save_embedding_layers` to `True`|will assume that the vocabulary was not modified",
        text="PEFT decides whether the embeddings are saved with the adapter. Harmless where no tokens were added, or "
        "where they were saved.",
        seen_in=(_PEFT + "utils/save_and_load.py",),
    ),
    Message(
        code="lora-module-unsupported",
        severity="error",
        keys=("is not supported. Currently, only the following modules are supported",),
        pattern=r"Target module (?P<name>\w+)\(.{0,2000}? is not supported\. Currently, only the following modules",
        text="LoRA was to be put on a layer ({name}) that PEFT can't wrap: a name in target_modules fits a container "
        "or "
        "another kind of layer, often in the vision part.",
        next="name the layers more exactly in target_modules, as a pattern that ends in q_proj; no file has to change",
        seen_in=(_PEFT + "tuners/lora/model.py",),
    ),
    Message(
        code="merge-refused-by-peft",
        severity="error",
        keys=(
            "Cannot merge LORA layers",
            "Cannot merge adapters to a quantized model",
            "merge adapters before quantizing",
        ),
        pattern=r"Cannot merge LORA layers when|Cannot merge adapters to a quantized model|"
        r"Please merge adapters before quantizing the model",
        text="A merge into quantised weights is refused, with reason: it would round twice. The base in full "
        "precision is "
        "what the adapter is merged into.",
        next=_MERGED_FULL,
        codes=("base-quantised",),
        seen_in=(_PEFT + "tuners/lora/model.py", _FACTORY + "train/tuner.py"),
    ),
    Message(
        code="merge-nan",
        severity="error",
        keys=("NaNs detected in the merged weights",),
        pattern=r"NaNs detected in the merged weights\. The adapter (?P<name>\S{1,100}) seems to be broken",
        text="NaN or infinity came out of the merge: the adapter holds some, or fp16 overflowed. bf16 and fp32 do not.",
        next=Steps(Command("doctor", ("ADAPTER", "--deep")), _MERGED),
        codes=("nonfinite",),
        seen_in=(_PEFT + "tuners/lora/layer.py",),
    ),
    Message(
        code="adapter-in-model-unused",
        severity="error",
        keys=("Loading adapter weights from",),
        pattern=r"Loading adapter weights from (?P<name>\S{1,300}) led to (?P<which>unexpected|missing) keys",
        text="transformers' load_adapter met {which} names in {name}: the adapter is of another base or another "
        "class, or "
        "carries a prefix, and what does not fit is left out or zero.",
        next=_DOCTOR,
        codes=("adapter-unmatched", "names-doubled"),
        seen_in=("transformers 4.57.6: transformers/integrations/peft.py",),
    ),
    Message(
        code="finetuning-quantised",
        severity="error",
        keys=("You cannot perform fine-tuning on purely quantized models",),
        pattern=r"You cannot perform fine-tuning on purely quantized models",
        text="The model is quantised and has no adapter, so nothing in it can be trained: the adapter that was meant "
        "was "
        "not loaded, or the folder holds quantised weights where full ones were expected.",
        next=Command("inspect", ("DIR",)),
        codes=("quantisation-left",),
        seen_in=("transformers 5.23.0: transformers/trainer_utils.py",),
    ),
    Message(
        code="quantisation-state-missing",
        severity="error",
        keys=("quantized_stats` components", "quantization state not initialized", "has no attribute 'quant_state'"),
        pattern=r"Supplied state dict for (?P<name>[\w.]{1,300}) does not contain `bitsandbytes__|"
        r"quantization state not initialized|has no attribute 'quant_state'",
        text="The weights are packed to 4 bits and what belongs to them (absmax, quant_state) is not there: "
        "config.json "
        "says bitsandbytes of weights that are not, or a 4-bit layer was saved without its state.",
        next=Command("doctor", ("DIR",)),
        codes=("quantisation-left", "base-quantised"),
        seen_in=(
            "transformers 4.51.3: transformers/quantizers/quantizer_bnb_4bit.py",
            "bitsandbytes 0.50.2: bitsandbytes/nn/modules.py",
        ),
    ),
    Message(
        code="peft-model-and-config",
        severity="error",
        keys=("You passed a `PeftModel` instance together with a `peft_config`",),
        pattern=r"You passed a `PeftModel` instance together with a `peft_config`",
        text="TRL was given an adapter and the order to make another one on top. Merged first, the adapter is the "
        "base of "
        "the next.",
        next=_MERGED,
        seen_in=(_TRL + "reward_trainer.py", _TRL + "grpo_trainer.py"),
    ),
    Message(
        code="lora-on-output-embedding",
        severity="error",
        keys=("Applying a PEFT adapter to `lm_head` is not supported",),
        pattern=r"Applying a PEFT adapter to `lm_head` is not supported",
        text="TRL reads lm_head.weight directly, so LoRA on it would never be trained. An older adapter with LoRA "
        "there "
        "has to be merged before training goes on.",
        next=_MERGED,
        seen_in=(_TRL + "grpo_trainer.py", _TRL + "sft_trainer.py"),
    ),
    Message(
        code="new-tokens-not-trained",
        severity="changes-numbers",
        keys=("Cloning chat template added new tokens", "Remember to add embedding layers to `additional_target`"),
        pattern=r"Cloning chat template added new tokens to the tokenizer, but 'lm_head' is not in|"
        r"Remember to add embedding layers to `additional_target`",
        text="Tokens were added, and the embeddings are neither trained nor saved with the adapter: their rows are "
        "random, "
        "and other ones after each start.",
        next=_DOCTOR,
        codes=("adapter-tokens", "vocab-mismatch"),
        seen_in=(_TRL + "reward_trainer.py", _FACTORY + "hparams/parser.py"),
    ),
    Message(
        code="reward-model-not-loaded",
        severity="error",
        keys=("Reward model is not correctly loaded",),
        pattern=r"Reward model is not correctly loaded",
        text="LLaMA-Factory found neither value_head.safetensors nor value_head.bin in the reward model's folder: its "
        "head "
        "is elsewhere, as in model.safetensors, or was never saved.",
        next=Steps(
            Command("doctor", ("DIR", "--for", "llamafactory")),
            Command("convert", ("DIR", "OUT", "--to", "llamafactory", "--role", "reward")),
        ),
        codes=("head-missing", "head-dialect"),
        seen_in=(_FACTORY + "train/trainer_utils.py",),
    ),
    Message(
        code="reward-model-type",
        severity="error",
        keys=("`reward_model_type` cannot be lora", "does not support lora reward model"),
        pattern=r"`reward_model_type` cannot be lora for Freeze/Full PPO|"
        r"(?<!\w)(?P<name>\w{1,100}+) does not support lora reward model",
        text="LLaMA-Factory takes a LoRA reward model only where the policy is trained with LoRA on the same base. As "
        "a "
        "whole model it goes with `reward_model_type: full`.",
        next=Command("convert", ("ADAPTER", "OUT", "--to", "llamafactory", "--role", "reward", "--base", "BASE")),
        codes=("launch-reward-type",),
        seen_in=(_FACTORY + "hparams/finetuning_args.py", _FACTORY + "hparams/parser.py"),
    ),
    Message(
        code="one-adapter-only",
        severity="error",
        keys=("only accepts a single adapter", "Adapter is only valid for the LoRA method"),
        pattern=r"(?P<name>vLLM|Quantized model|Unsloth model|KTransformers model) only accepts a single adapter|"
        r"Adapter is only valid for the LoRA method",
        text="LLaMA-Factory was given more adapters than this engine takes, or an adapter where it trains without one. "
        "Adapters that were trained one on top of the other are merged in that order.",
        next=_MERGED,
        codes=("adapters-in-order",),
        seen_in=(_FACTORY + "hparams/parser.py", _FACTORY + "model/adapter.py"),
    ),
    Message(
        code="quantised-not-resizable",
        severity="error",
        keys=("Cannot resize embedding layers of a quantized model",),
        pattern=r"Cannot resize embedding layers of a quantized model",
        text="The tokenizer has more tokens than the quantised base has rows, and packed rows can't be added. Begin "
        "from "
        "the base in full precision.",
        next=_DOCTOR,
        codes=("vocab-mismatch", "base-quantised"),
        seen_in=(_FACTORY + "model/model_utils/embedding.py",),
    ),
    Message(
        code="unsloth-no-config",
        severity="error",
        keys=("Both AutoConfig and PeftConfig loading failed", "Unsloth: No config file found", "# of saved modules"),
        pattern=r"Unsloth: (?:Failed to load model\. Both AutoConfig and PeftConfig loading failed|No config file "
        r"found|"
        r"Saving LoRA finetune failed since # of LoRAs)",
        text="Unsloth found no config.json and no adapter_config.json where it looked, or merged fewer layers than the "
        "adapter has: a wrong path, or names of the adapter that do not fit the base.",
        next=Steps(Command("inspect", ("DIR",)), _DOCTOR),
        codes=("config-missing", "adapter-unmatched"),
        seen_in=(
            "unsloth 2026.10.9: unsloth/models/loader.py",
            "unsloth_zoo 2026.10.9: unsloth_zoo/saving_utils.py",
        ),
    ),
)
