"""Messages around Megatron's checkpoints and verl's: Megatron-core, Megatron-LM, Megatron-Bridge, NeMo-RL, verl."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_CORE = "megatron-core 0.16.1: megatron/core/"
_LM = "megatron-lm 0032978: megatron/training/checkpointing.py"
_VERL = "verl 0.9.1: verl/"
_INSPECT = Command("inspect", ("DIR",))
_GATHER = Steps(Command("doctor", ("DIR",)), Command("gather", ("DIR", "OUT")))

MESSAGES = (
    Message(
        code="megatron-started-at-random",
        severity="error",
        keys=("could not find the metadata file", "will not load any checkpoints and will start from random"),
        pattern=r"could not find the metadata file (?P<name>\S{1,300})|will not load any checkpoints and will start "
        r"from "
        r"random",
        text="Megatron loaded nothing and goes on with RANDOM weights: {name} is not there, which says which iter_ "
        "folder "
        "is meant. The path is a level off, or the file was not copied. --exit-on-missing-checkpoint makes it stop.",
        next=_INSPECT,
        seen_in=(_LM,),
    ),
    Message(
        code="megatron-keys-differ",
        severity="error",
        keys=(
            "keys found in the checkpoint are missing in the provided sharded state dict",
            "not found in the checkpoint) encountered in the provided sharded state dict",
            "from model not in state dict",
        ),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+) from model not in state dict|"
        r"keys found in the checkpoint are missing in the provided sharded state dict|"
        r"\(not found in the checkpoint\) encountered in the provided sharded state dict",
        text="Megatron's checkpoint and the model have different names ({name}): other layers or experts, a head that "
        "one "
        "of them lacks, LoRA on one side, or another version of Transformer Engine.",
        next=_INSPECT,
        codes=("megatron-keys",),
        seen_in=(_CORE + "dist_checkpointing/validation.py", _CORE + "dist_checkpointing/strategies/torch.py"),
    ),
    Message(
        code="megatron-shape-differs",
        severity="error",
        keys=("Global shape mismatch for loaded",),
        pattern=r"Global shape mismatch for loaded \((?P<have>.{1,80}?)\) and expected \((?P<want>.{1,80}?)\)+ tensor "
        r"for "
        r"key (?P<name>[\w.]{1,300})",
        text="{name} is {have} in Megatron's checkpoint and {want} in the model: a vocabulary that was padded for "
        "another "
        "tensor-parallel size, or another size of model.",
        next=_INSPECT,
        codes=("megatron-config", "vocabulary-rows"),
        seen_in=(_CORE + "dist_checkpointing/strategies/torch.py",),
    ),
    Message(
        code="megatron-not-a-checkpoint",
        severity="error",
        keys=("is not a distributed checkpoint", "unknown checkpoint format in", "Checkpoint directory "),
        pattern=r"(?<!\S)(?P<name>\S{1,300}+) is not a distributed checkpoint|unknown checkpoint format in "
        r"(?P<other>\S{1,300})|"
        r"Checkpoint directory \S{1,300} does not exist",
        text="The folder is not the inside of a Megatron checkpoint (no metadata.json, common.pt or .metadata): it is "
        "a "
        "level off (iter_0000100, dist_ckpt), a Hugging Face model, or does not exist.",
        next=_INSPECT,
        codes=("megatron-unfinished",),
        seen_in=(_CORE + "dist_checkpointing/validation.py", _LM),
    ),
    Message(
        code="megatron-shards-missing",
        severity="error",
        keys=(
            "Missing shards after fully parallel loading",
            "Missing object shards after",
            "Invalid access pattern for",
            "Could not find shard at",
        ),
        pattern=r"Missing (?:object )?shards after fully parallel loading|Invalid access pattern for "
        r"(?P<name>\S{1,300})|"
        r"Could not find shard at .{1,100}? for FQN: '(?P<other>[\w.]{1,300})'",
        text="Pieces of a tensor are missing or there twice: a rank's .distcp file was not copied, or two runs wrote "
        "into "
        "one folder.",
        next=Command("doctor", ("DIR",)),
        codes=("dcp-file-missing", "dcp-chunks"),
        seen_in=(
            _CORE + "dist_checkpointing/strategies/fully_parallel.py",
            _CORE + "dist_checkpointing/validation.py",
            "torch 2.13.0: torch/distributed/checkpoint/utils.py",
        ),
    ),
    Message(
        code="megatron-optimizer-differs",
        severity="error",
        keys=(
            "Unable to load optimizer from checkpoint",
            "elements must be same in current run",
            "need to be the same in",
        ),
        pattern=r"Unable to load optimizer from checkpoint (?P<name>\S{1,300})\. |"
        r"Number of unpadded elements (?:in each bucket )?(?:must|need to) be (?:the )?same in current run",
        text="Megatron can't take up the optimizer's state: it is not there, or was laid out for other parallel "
        "sizes. The "
        "weights are not concerned: --no-load-optim or --finetune starts from them.",
        next="start with --no-load-optim --no-load-rng; no file has to change",
        seen_in=(_LM, _CORE + "optimizer/distrib_optimizer.py"),
    ),
    Message(
        code="megatron-rng-differs",
        severity="error",
        keys=("Unable to load rng state from checkpoint",),
        pattern=r"Unable to load rng state from checkpoint (?P<name>\S{1,300})\. ",
        text="Only the state of the random numbers can't be taken up, as after another number of ranks. The weights "
        "are "
        "sound.",
        next="start with --no-load-rng; no file has to change",
        seen_in=(_LM,),
    ),
    Message(
        code="megatron-not-asked-for",
        severity="error",
        keys=("Detected load from a distributed checkpoint, but neither",),
        pattern=r"Detected load from a distributed checkpoint, but neither",
        text="The checkpoint is in Megatron's distributed format, and the run was started for the old one (mp_rank_*).",
        next="start with --auto-detect-ckpt-format or --use-dist-ckpt; no file has to change",
        seen_in=(_LM,),
    ),
    Message(
        code="megatron-name-unknown",
        severity="error",
        keys=("Unsupported parameter name: ", "in Megatron state_dict. Expected keys to start with"),
        pattern=r"Unsupported parameter name: (?P<name>[\w.]{1,300})|"
        r"Invalid key (?P<other>[\w.]{1,300}) in Megatron state_dict\. Expected keys to start with",
        text="verl's converter from Megatron does not know a tensor ({name}): a value head, LoRA, experts or a vision "
        "part "
        "of an architecture that it was not written for.",
        next=_GATHER,
        codes=("megatron-keys",),
        seen_in=(_VERL + "models/mcore/weight_converter.py", _VERL + "model_merger/megatron_model_merger.py"),
    ),
    Message(
        code="verl-layout-old",
        severity="error",
        keys=("Detected deprecated Megatron checkpoint layout", "Found legacy PEFT checkpoint at"),
        pattern=r"Detected deprecated Megatron checkpoint layout \((?P<name>[^)]{1,200})|Found legacy PEFT checkpoint "
        r"at",
        text="The run was saved by an older verl, which laid Megatron's checkpoints out otherwise. The weights are "
        "there; "
        "verl's own script moves them.",
        next="python scripts/migrate_megatron_checkpoint_layout.py of the same verl moves them in place: copy them "
        "first",
        seen_in=(_VERL + "utils/checkpoint/megatron_checkpoint_manager.py",),
    ),
    Message(
        code="verl-export-not-resumable",
        severity="error",
        keys=("Found exported HF PEFT adapter at",),
        pattern=r"Found exported HF PEFT adapter at (?P<name>\S{1,300}?),",
        text="verl goes on from its own shards, and here is only what it exported for others. Training can begin from "
        "the "
        "export as a model, without the optimizer's state.",
        next=Command("merge-lora", ("ADAPTER", "OUT", "--base", "BASE")),
        seen_in=(_VERL + "utils/checkpoint/megatron_checkpoint_manager.py",),
    ),
    Message(
        code="verl-merge-keys",
        severity="error",
        keys=("keys in collected state dict", "Shape mismatch for key '"),
        pattern=r"(?P<which>Missing|Extra) keys in collected state dict: \[(?P<name>.{1,300}?)[\],]|"
        r"Shape mismatch for key '(?P<other>[\w.]{1,300})'",
        text="verl's merger compared what it collected with a model's own folder, and they differ: LoRA's layers are "
        "still "
        "inside, it is the critic, or the folder that it compared with is not this run's.",
        next=_GATHER,
        codes=("lora-unmerged", "verl-note"),
        seen_in=(_VERL + "model_merger/fsdp_model_merger.py",),
    ),
    Message(
        code="verl-world-size-unknown",
        severity="error",
        keys=("World size not found in the config file", "Could not determine world size. No file matching"),
        pattern=r"World size not found in the config file|Could not determine world size\. No file matching",
        text="verl's merger found no model_world_size_N_rank_0.pt and no world size: the folder is a level off (name "
        "global_step_N/actor), or rank 0's file is on another node.",
        next=_GATHER,
        codes=("verl-rank-missing", "run-folder"),
        seen_in=(_VERL + "model_merger/fsdp_model_merger.py", "verl 0.9.1: scripts/legacy_model_merger.py"),
    ),
    Message(
        code="verl-ranks-differ",
        severity="error",
        keys=("differs between rank 0 and rank",),
        pattern=r"Non-DTensor entry '(?P<name>[\w.]{1,300})' differs between rank 0 and rank (?P<other>\d+)",
        text="A tensor that every rank should hold alike ({name}) has other values on another rank: files of two "
        "saves are "
        "mixed, or a save was not finished.",
        next=Command("doctor", ("DIR", "--deep")),
        codes=("verl-mixed",),
        seen_in=(_VERL + "model_merger/fsdp_model_merger.py",),
    ),
    Message(
        code="verl-alpha-lost",
        severity="changes-numbers",
        keys=("LoRA alpha metadata is missing or equals 0",),
        pattern=r"LoRA alpha metadata is missing or equals 0",
        text="verl writes lora_alpha 0 where it does not know it. With 0 the adapter does nothing at all, and no "
        "loader "
        "says so.",
        next=Command("gather", ("DIR", "OUT", "--lora-alpha", "ALPHA_OF_TRAINING")),
        codes=("lora-alpha-zero",),
        seen_in=(_VERL + "model_merger/base_model_merger.py",),
    ),
    Message(
        code="verl-lora-keys",
        severity="error",
        keys=("Failed to load LoRA-only checkpoint: unexpected keys", "but no LoRA/adapter parameters were found"),
        pattern=r"Failed to load LoRA-only checkpoint: unexpected keys \[(?P<name>.{1,300}?)[\],]|"
        r"but no LoRA/adapter parameters were found in the state dict",
        text="The shards hold LoRA alone and the model has none under these names ({name}), or the other way round: "
        "the "
        "run is started with other LoRA settings than it was saved with.",
        next=_GATHER,
        seen_in=(_VERL + "utils/checkpoint/fsdp_checkpoint_manager.py",),
    ),
    Message(
        code="verl-resume-path",
        severity="error",
        keys=("must specify the global_steps", "resume_from_path must be"),
        pattern=r"(?:resume ckpt|resume_from_path) must specify the global_steps|resume_from_path must be ",
        text="verl goes on from a folder that is named global_step_N, and the path that was given is another: the "
        "run's "
        "folder, or actor/ inside of it.",
        next=_INSPECT,
        codes=("run-folder", "verl-latest"),
        seen_in=(_VERL + "trainer/ppo/ray_trainer.py", _VERL + "utils/checkpoint/checkpoint_handler.py"),
    ),
    Message(
        code="verl-data-position-lost",
        severity="cosmetic",
        keys=("No dataloader state found at",),
        pattern=r"No dataloader state found at (?P<name>\S{1,300}?), will start from scratch",
        text="verl did not find how far the data was read, and reads it from the beginning. The weights are not "
        "concerned.",
        seen_in=(_VERL + "trainer/ppo/v1/trainer_base.py",),
    ),
    Message(
        code="export-exists",
        severity="error",
        keys=("HF checkpoint already exists at",),
        pattern=r"HF checkpoint already exists at (?P<name>\S{1,300}?)\. ",
        text="NeMo-RL's converter does not write over {name}. What is there may be of an earlier try that was not "
        "finished: look before it is used or removed.",
        next=_INSPECT,
        seen_in=("nemo-rl 0.6.0: nemo_rl/models/megatron/community_import.py",),
    ),
    Message(
        code="nemo-draft-weights",
        severity="error",
        keys=("[draft] No ", "[draft] Checkpoint", "[draft] Cannot infer", "[draft] Unexpected"),
        pattern=r"\[draft\] (?:No supported checkpoint files were found in|Checkpoint '|Checkpoint index '|"
        r"No Eagle weights were mapped|Cannot infer TP sharding|Unexpected shape mismatch)",
        text="NeMo-RL could not load the draft model for speculative decoding. The policy's weights are not concerned.",
        next=Command("doctor", ("DRAFT_DIR",)),
        seen_in=("nemo-rl 0.6.0: nemo_rl/models/megatron/draft/utils.py",),
    ),
)
