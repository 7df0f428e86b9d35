"""Messages of a run that goes on from a checkpoint: transformers' Trainer, accelerate, DeepSpeed, torch."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_TRAINER = "transformers 5.23.0: transformers/trainer.py"
_DEEPSPEED = "deepspeed 0.19.8: deepspeed/"
_ACCELERATE = "accelerate 1.15.0: accelerate/"
_TORCH = "torch 2.13.0: torch/"
_GATHER = Steps(Command("doctor", ("DIR",)), Command("gather", ("DIR", "OUT")))

MESSAGES = (
    Message(
        code="no-valid-checkpoint",
        severity="error",
        keys=("Can't find a valid checkpoint at", "No valid checkpoint found in output directory"),
        pattern=r"Can't find a valid checkpoint at (?P<name>\S{1,300})|"
        r"No valid checkpoint found in output directory \((?P<other>[^)]{1,300})",
        text="The Trainer looked for a checkpoint to go on from ({name}) and found neither weights under its names "
        "nor a "
        "global_step folder: the run's folder instead of checkpoint-N, a save that was not finished, or one with the "
        "weights alone.",
        next=Command("inspect", ("DIR",)),
        codes=("run-folder", "weights-missing"),
        seen_in=(_TRAINER, "transformers 5.23.0: transformers/integrations/deepspeed.py"),
    ),
    Message(
        code="resume-failed-deepspeed",
        severity="error",
        keys=("[deepspeed] failed to resume from checkpoint",),
        pattern=r"\[deepspeed\] failed to resume from checkpoint (?P<name>\S{1,300})",
        text="DeepSpeed loaded nothing from {name}: `latest` names a folder that is not there, or rank files are "
        "missing. "
        "The weights can be gathered where every rank's file is there.",
        next=_GATHER,
        codes=("zero-latest", "zero-rank-missing"),
        seen_in=("transformers 5.23.0: transformers/integrations/deepspeed.py",),
    ),
    Message(
        code="resume-started-afresh",
        severity="changes-numbers",
        keys=("skipping checkpoint loading", "Unable to find latest file at"),
        pattern=r"\[deepspeed\] No checkpoint found at (?P<name>\S{1,300}?), skipping checkpoint loading|"
        r"Unable to find latest file at (?P<other>\S{1,300}?),",
        text="Nothing was loaded: DeepSpeed found no checkpoint ({name}), warned, and the run begins again from the "
        "model's own weights and from step 0.",
        next=Command("inspect", ("DIR",)),
        codes=("zero-latest",),
        seen_in=(_DEEPSPEED + "runtime/engine.py", "openrlhf 0.11.2: openrlhf/utils/deepspeed/deepspeed.py"),
    ),
    Message(
        code="zero-latest-missing",
        severity="error",
        keys=("Unable to find 'latest' file at", "Invalid for universal checkpoint"),
        pattern=r"Unable to find 'latest' file at (?P<name>\S{1,300})|Invalid for universal checkpoint: ",
        text="The folder has no file `latest`, which says which global_step is meant: it is a level too high or too "
        "low, "
        "or the file was not copied. rlhf-convert takes the global_step folder itself.",
        next=Command("gather", ("DIR/global_stepN", "OUT")),
        codes=("zero-latest",),
        seen_in=(_DEEPSPEED + "utils/zero_to_fp32.py", _DEEPSPEED + "runtime/engine.py"),
    ),
    Message(
        code="zero-no-files",
        severity="error",
        keys=("seems a bogus DeepSpeed checkpoint folder", "files in directory '", "is not a model state checkpoint"),
        pattern=r"(?<!\S)(?P<name>\S{1,300}+) seems a bogus DeepSpeed checkpoint folder|"
        r"can't find (?P<other>\S{1,100}) files in directory '|is not a model state checkpoint",
        text="This is not the inside of a DeepSpeed checkpoint: the files of its ranks (mp_rank_*, zero_pp_rank_*) are "
        "not in the folder. They lie in global_stepN, or on the disks of the other nodes.",
        next=Command("inspect", ("DIR",)),
        codes=("zero-rank-missing", "shards-deleted"),
        seen_in=(
            _DEEPSPEED + "checkpoint/deepspeed_checkpoint.py",
            _DEEPSPEED + "utils/zero_to_fp32.py",
            _DEEPSPEED + "checkpoint/ds_to_universal.py",
        ),
    ),
    Message(
        code="zero-tag-differs",
        severity="changes-numbers",
        keys=("is not consistent across all ranks",),
        pattern=r"The checkpoint tag name '(?P<name>[^']{1,200})' is not consistent across all ranks",
        text="Ranks saved under different names ({name}), as a time or a loss in the name does. Each folder then "
        "holds a "
        "part of the ranks, and none is whole.",
        next=Command("doctor", ("DIR",)),
        codes=("zero-rank-missing",),
        seen_in=(_DEEPSPEED + "runtime/engine.py",),
    ),
    Message(
        code="zero-elastic",
        severity="error",
        keys=("elastic checkpointing is deprecated", "parameter-alignment layout does not match"),
        pattern=r"elastic checkpointing is deprecated|parameter-alignment layout does not match",
        text="DeepSpeed can't load this optimizer state into the present layout. The weights do not depend on it: "
        "gather "
        "them and start from the model, or convert to a universal checkpoint with DeepSpeed.",
        next=Command("gather", ("DIR", "OUT")),
        seen_in=(_DEEPSPEED + "runtime/zero/stage3.py", _DEEPSPEED + "runtime/zero/stage_1_and_2.py"),
    ),
    Message(
        code="gather-switched-off",
        severity="changes-numbers",
        keys=("stage3_gather_16bit_weights_on_model_save",),
        pattern=r"stage3_gather_16bit_weights_on_model_save=false\. Saving the full checkpoint instead|"
        r"Cannot get 16bit model weights because `?stage3_gather_16bit_weights_on_model_save",
        text="Under ZeRO-3 without gathering there is no model file to save: the weights are in global_step* alone, as "
        "shards. Keep that folder.",
        next=Command("gather", ("DIR", "OUT")),
        codes=("zero3-empty-tensors", "sole-copy"),
        seen_in=(
            _TRAINER,
            _ACCELERATE + "accelerator.py",
            "llamafactory 0.9.5: llamafactory/train/ppo/trainer.py",
        ),
    ),
    Message(
        code="optimizer-groups-differ",
        severity="error",
        keys=("loaded state dict",),
        pattern=r"loaded state dict (?:contains a parameter group that|has a different number of parameter groups)",
        text="The optimizer's state was saved for another set of parameters: other layers are trained now, LoRA was "
        "added "
        "or taken away, or weight decay is grouped otherwise. The weights are not concerned; start from them with a "
        "new optimizer.",
        next="load the checkpoint as a model, without resuming: leave optimizer.pt (or global_step*) out",
        seen_in=(_TORCH + "optim/optimizer.py",),
    ),
    Message(
        code="dcp-key-missing",
        severity="error",
        keys=("Missing key in checkpoint state_dict", "Missing optimizer state for parameter"),
        pattern=r"Missing key in checkpoint state_dict: (?P<name>[\w.]{1,300}?)\.?(?:$|[\s'\"])|"
        r"Missing optimizer state for parameter '(?P<other>[\w.]{1,300})'",
        text="The distributed checkpoint has no {name}: it was saved of another model, with another prefix, or without "
        "this part (weights alone, LoRA alone).",
        next=_GATHER,
        codes=("dcp-no-model", "dcp-optimizer-alone"),
        seen_in=(
            _TORCH + "distributed/checkpoint/default_planner.py",
            _TORCH + "distributed/checkpoint/state_dict.py",
        ),
    ),
    Message(
        code="dcp-size-differs",
        severity="error",
        keys=("Size mismatch between saved",),
        pattern=r"Size mismatch between saved (?P<have>torch\.Size\(\[[\d, ]*\]\)) and current: "
        r"(?P<want>torch\.Size\(\[[\d, ]*\]\)) for (?P<name>[\w.]{1,300})",
        text="{name} is {have} in the distributed checkpoint and {want} in the model: another vocabulary, size, LoRA "
        "rank "
        "or number of labels.",
        next=_GATHER,
        seen_in=(_TORCH + "distributed/checkpoint/default_planner.py",),
    ),
    Message(
        code="dcp-failed",
        severity="error",
        keys=("CheckpointException ranks:", "Failed to validate global plan"),
        pattern=r"CheckpointException ranks:dict_keys\(\[(?P<name>[\d, ]+)\]\)|Failed to validate global plan",
        text="torch's distributed checkpoint failed on these ranks ({name}); the error of each follows below. Without "
        "`.metadata` nothing of such a folder can be read by torch.",
        next=_GATHER,
        codes=("dcp-metadata-missing", "dcp-file-missing"),
        seen_in=(
            _TORCH + "distributed/checkpoint/api.py",
            _TORCH + "distributed/checkpoint/default_planner.py",
        ),
    ),
    Message(
        code="dcp-metadata-not-found",
        severity="error",
        keys=("/.metadata'", "but couldn't find a valid metadata file"),
        pattern=r"No such file or directory: '(?P<name>[^']{1,300})/\.metadata'|"
        r"Tried to load from (?P<other>\S{1,300}) but couldn't find a valid metadata file",
        text="{name} has no `.metadata`, the table of a distributed checkpoint: it is one level too high (look for "
        "pytorch_model_fsdp_0), or the save did not end.",
        next=Steps(Command("inspect", ("DIR",)), Command("gather", ("DIR", "OUT"))),
        codes=("dcp-metadata-missing",),
        seen_in=(_TORCH + "distributed/checkpoint/filesystem.py", _ACCELERATE + "utils/fsdp_utils.py"),
    ),
    Message(
        code="fsdp-only",
        severity="error",
        keys=("is only supported when using PyTorch FSDP",),
        pattern=r"Checkpoint found at (?P<name>\S{1,300}) is only supported when using PyTorch FSDP",
        text="{name} is in FSDP's shards, and this run is not under FSDP. Gathered, it is a model that any run can "
        "start "
        "from.",
        next=Command("gather", ("DIR", "OUT")),
        seen_in=(_TRAINER,),
    ),
    Message(
        code="fsdp2-names-differ",
        severity="error",
        keys=("FSDP2 mapping failed", "found in sharded model state dict but missing from full"),
        pattern=r"FSDP2 mapping failed \(missing: (?P<name>.{1,300}?)\)|"
        r"Parameter '(?P<other>[\w.]{1,300})' found in sharded model state dict but missing from full",
        text="accelerate found parameters under FSDP2 that the loaded weights do not have ({name}). Most often "
        "config.json "
        "ties the output embedding and the file holds it apart, or the other way round.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("tied-copies", "tied-copies-differ", "output-embedding-missing"),
        seen_in=(_ACCELERATE + "accelerator.py", _ACCELERATE + "utils/fsdp_utils.py"),
    ),
    Message(
        code="accelerate-shape",
        severity="error",
        keys=("Trying to set a tensor of shape",),
        pattern=r"Trying to set a tensor of shape (?P<have>torch\.Size\(\[[\d, ]*\]\)) in \"(?P<name>[\w.]{1,200})\" "
        r"\(which has shape (?P<want>torch\.Size\(\[[\d, ]*\]\))\)",
        text="{name} is {have} in the file and {want} in the model: another vocabulary or size, an empty tensor of "
        "ZeRO-3's, or packed 4-bit values that are loaded as if they were not.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-misshapen", "quantisation-left"),
        seen_in=(_ACCELERATE + "utils/modeling.py",),
    ),
    Message(
        code="accelerate-name",
        severity="error",
        keys=("does not have a parameter or a buffer named",),
        pattern=r"does not have a parameter or a buffer named (?P<name>[\w.]{1,300}?)\.(?:$|\s)",
        text="The file names a tensor ({name}) that the model does not have: another class, a prefix, or LoRA's layers "
        "left inside.",
        next=Command("doctor", ("DIR",)),
        codes=("names-wrapped", "lora-unmerged"),
        seen_in=(_ACCELERATE + "utils/modeling.py",),
    ),
    Message(
        code="save-of-meta",
        severity="error",
        keys=("since some parameters are on the meta device", "Cannot copy out of meta tensor"),
        pattern=r"can't save the model since some parameters are on the meta device|Cannot copy out of meta tensor",
        text="Parameters have no values in this process: they were offloaded, or never loaded since the file lacks "
        "them. "
        "What would be saved is not whole.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-missing",),
        seen_in=(_ACCELERATE + "accelerator.py", _TORCH + "_meta_registrations.py"),
    ),
    Message(
        code="shared-tensors-undeclared",
        severity="error",
        keys=("The weights trying to be saved contained shared tensors",),
        pattern=r"The weights trying to be saved contained shared tensors (?P<name>\[.{1,300}?\])",
        text="Two names share one memory ({name}), and the model's class does not say that they are tied. Nothing on "
        "disk "
        "is wrong, and this save wrote no weights: clone one of the two before it, or save with the class's own tie.",
        next="in the script: `model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())`, or tie_weights()",
        seen_in=("transformers 5.23.0: transformers/modeling_utils.py",),
    ),
    Message(
        code="tie-lost",
        severity="error",
        keys=("This checkpoint seem corrupted. The tied weights mapping",),
        pattern=r"specifies to tie (?P<name>[\w.]+) to (?P<other>[\w.]+), but both are absent from the checkpoint",
        text="Neither of two tied tensors is in the file ({name}), so both are RANDOM: the embedding was not saved, or "
        "stands under another name.",
        next=Command("doctor", ("DIR",)),
        codes=("tensors-missing", "names-wrapped"),
        seen_in=("transformers 5.23.0: transformers/modeling_utils.py",),
    ),
    Message(
        code="model-type-differs",
        severity="changes-numbers",
        keys=("You are using a model of type",),
        pattern=r"You are using a model of type `?(?P<have>[\w.-]*)`? to instantiate a model of type "
        r"`?(?P<want>[\w.-]*)",
        text="config.json says {have}, and the script's class is {want}. Names that the two do not share are random.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/configuration_utils.py",),
    ),
    Message(
        code="arguments-differ",
        severity="cosmetic",
        keys=("do not match the ones in the `trainer_state.json`",),
        pattern=r"do not match the ones in the `trainer_state\.json`",
        text="The Trainer goes on with other settings than the checkpoint was saved with, such as logging or saving "
        "steps. The weights are not concerned.",
        seen_in=("transformers 5.23.0: transformers/trainer_utils.py",),
    ),
    Message(
        code="model-not-loadable",
        severity="error",
        keys=("Can't load the model for", "Can't load the configuration of", "Can't load tokenizer for"),
        pattern=r"Can't load (?:the model for|the configuration of|tokenizer for) '(?P<name>[^']{1,300})'",
        text="{name} is neither a folder that transformers can load nor a name on the Hub: a path that does not "
        "exist, or "
        "a folder without these files (an adapter, shards, weights without a tokenizer).",
        next=Command("inspect", ("DIR",)),
        codes=("config-missing", "weights-missing"),
        seen_in=(
            "transformers 5.23.0: transformers/modeling_utils.py",
            "transformers 5.23.0: transformers/tokenization_utils_base.py",
        ),
    ),
    Message(
        code="tokenizer-not-built",
        severity="error",
        keys=("Couldn't instantiate the backend tokenizer from one of",),
        pattern=r"Couldn't instantiate the backend tokenizer from one of",
        text="transformers found no tokenizer.json, or none that it can read: the folder has weights without a "
        "tokenizer, "
        "or an old tokenizer.model alone, for which sentencepiece or tiktoken has to be installed.",
        next=Steps(Command("doctor", ("DIR",)), "; the base model's tokenizer files belong beside the weights"),
        codes=("tokenizer-missing",),
        seen_in=("transformers 5.23.0: transformers/tokenization_utils_tokenizers.py",),
    ),
    Message(
        code="conversion-failed",
        severity="error",
        keys=("Failed to apply weight conversion for", "We encountered some issues during automatic conversion"),
        pattern=r"Failed to apply weight conversion for '(?P<name>[\w.]{1,300})'|"
        r"We encountered some issues during automatic conversion of the weights",
        text="transformers 5 renames and stacks tensors as it loads them, as experts, and could not here ({name}): "
        "some of "
        "the pieces are missing, or are stacked already.",
        next=Command("doctor", ("DIR",)),
        codes=("experts-twice", "tensors-missing"),
        seen_in=(
            "transformers 5.23.0: transformers/integrations/deepspeed.py",
            "transformers 5.23.0: transformers/utils/loading_report.py",
        ),
    ),
)
