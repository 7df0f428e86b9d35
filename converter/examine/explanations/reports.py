"""Messages: the table that transformers 5 prints of what it loaded, and the lists of torch's load_state_dict."""

from converter.diagnostic import Command, Steps
from converter.examine.explanations.message import Message

_ROW = (
    r"(?P<name>(?<![\w.])(?![\d.]{1,80}+[\s|])"
    r"(?:[\w-]{1,80}+|\{[\d, .]{1,80}\})(?:\.(?:[\w-]{1,80}+|\{[\d, .]{1,80}\})){1,40}+)"
    r"\s{0,200}+\|\s{0,20}"
)
"""A row's first cell, no number; numbers of layers are folded, as `layers.{0, 1}.mlp`."""

_HEADS = r"(?:score|value_head|v_head|classifier|reward_head|score_head|regression_head|rm_head|summary)"
_PREFIX = (
    r"(?:module|_orig_mod|_fsdp_wrapped_module|_forward_module|base_model|pretrained_model|rwtran?sr?former|"
    r"policy|value_model)"
)
_REPORT = "transformers' load report: "
_RANDOM = (
    "Expected only where a reward model STARTS from a base model, or where an adapter that is loaded next "
    "brings the "
    "head; where a trained reward model or critic is loaded, rewards and values are noise."
)

MESSAGES = (
    Message(
        code="mismatch-report-empty-file",
        severity="error",
        keys=("MISMATCH",),
        pattern=_ROW + r"MISMATCH.{0,200}?ckpt: torch\.Size\(\[0\]\)",
        text=_REPORT + "the file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. "
        "ignore_mismatched_sizes=True is not a cure: it fills the tensor with random values.",
        next=Steps(
            Command("doctor", ("DIR",)),
            Command("repair", ("DIR", "OUT", "--weights-from", "THE_RUNS_global_step_FOLDER")),
        ),
        codes=("zero3-empty-tensors",),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="mismatch-report-empty-model",
        severity="error",
        keys=("MISMATCH",),
        pattern=_ROW + r"MISMATCH.{0,200}?vs model: ?torch\.Size\(\[0\]\)",
        text=_REPORT + "the file is sound ({name}), and the model that loads it is empty: it was built under ZeRO-3 "
        "without "
        "from_pretrained knowing of it. Nothing in the files needs repair.",
        next="load the weights before DeepSpeed partitions the model, or inside of GatheredParameters; no file has to "
        "change",
        codes=("zero3-empty-tensors",),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="mismatch-report-labels",
        severity="error",
        keys=("MISMATCH",),
        pattern=r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,9}?" + _HEADS + r"[\w.]{0,80})\s{0,200}+\|\s{0,20}MISMATCH",
        text=_REPORT
        + "the head ({name}) has another number of rows in the file than num_labels asks for. Set num_labels to "
        "the head's rows. ignore_mismatched_sizes=True is not a cure: the head is then random.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("labels-mismatch",),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="mismatch-report",
        severity="error",
        keys=("MISMATCH",),
        pattern=_ROW + r"MISMATCH(?:.{0,200}?ckpt: torch\.Size\((?P<have>\[[\d, ]*\])\)"
        r" vs model: ?torch\.Size\((?P<want>\[[\d, ]*\])\))?",
        text=_REPORT + "{name} has one shape in the file and another in the model ({have} and {want}): another "
        "vocabulary, "
        "size or architecture. ignore_mismatched_sizes=True is not a cure: it fills the tensor with random values.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="head-missing-report",
        severity="error",
        keys=("MISSING",),
        pattern=r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,40}?"
        + _HEADS
        + r"(?:\.\w{1,80}+){1,8}+)\s{0,200}+\|\s{0,20}MISSING",
        text=_REPORT + "{name} is not in the checkpoint, so the head is RANDOM. " + _RANDOM,
        next=Steps(
            Command("doctor", ("DIR", "--for", "TRAINER")), Command("rm-to-critic", ("DIR", "OUT", "--to", "TRAINER"))
        ),
        codes=("head-missing",),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="weights-missing-report",
        severity="error",
        keys=("MISSING",),
        pattern=_ROW + r"MISSING",
        text=_REPORT
        + "{name} is not in the checkpoint, and is random now: another prefix or architecture, or a tensor that "
        "was not saved.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="output-embedding-unused-report",
        severity="cosmetic",
        keys=("UNEXPECTED",),
        pattern=r"(?P<name>(?:lm_head|embed_out)\.(?:weight|bias))\s{0,200}+\|\s{0,20}UNEXPECTED",
        text="Harmless: the output embedding ({name}) of the language model has no place in a reward model or critic.",
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="head-unused-report",
        severity="error",
        keys=("UNEXPECTED",),
        pattern=r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,40}?"
        + _HEADS
        + r"(?:\.\w{1,80}+){1,8}+)\s{0,200}+\|\s{0,20}UNEXPECTED",
        text=_REPORT
        + "the trained head is in the file, under a name ({name}) that this loader does not ask for: it is "
        "thrown away.",
        next=Command("convert", ("DIR", "OUT", "--to", "TRAINER", "--role", "reward")),
        codes=("head-named-otherwise", "head-dialect"),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="prefix-report",
        severity="error",
        keys=("UNEXPECTED",),
        pattern=r"(?<![\w.])(?P<name>" + _PREFIX + r"\.[\w.{}, -]{1,300}?)\s{0,200}+\|\s{0,20}UNEXPECTED",
        text=_REPORT + "names carry a wrapper's prefix ({name}), so nothing finds its place, and what should be "
        "there is "
        "random.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("names-wrapped",),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="weights-unused-report",
        severity="changes-numbers",
        keys=("UNEXPECTED",),
        pattern=_ROW + r"UNEXPECTED",
        text=_REPORT
        + "the file holds a tensor ({name}) that the model has no place for; it is left out. Harmless for buffers "
        "and for parts that this class does not use; not where the same table has MISSING rows.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
    Message(
        code="state-dict-prefix",
        severity="error",
        keys=("Unexpected key(s) in state_dict",),
        pattern=r"Unexpected key\(s\) in state_dict: \W?(?P<name>" + _PREFIX + r"\.[\w.]{1,300})",
        text="Names in the file carry a wrapper's prefix ({name}, ...): it was saved from the wrapped model. "
        "strict=False is no "
        "cure: nothing would be loaded, silently.",
        next=Steps(Command("doctor", ("DIR",)), Command("repair", ("DIR", "OUT"))),
        codes=("names-wrapped",),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="state-dict-lora",
        severity="error",
        keys=("Unexpected key(s) in state_dict", "Missing key(s) in state_dict"),
        pattern=r"(?:Unexpected|Missing) key\(s\) in state_dict: "
        r"(?:(?!in state_dict: ).){0,1200}?(?<![\w.])(?P<name>[\w.]{1,200}?(?:base_layer|lora_[AB])"
        r"[\w.]{0,80})",
        text="LoRA's wrappers are on one side only ({name}): a full model was saved with its adapter inside, or an "
        "adapter is "
        "loaded as a model.",
        next=Steps(Command("doctor", ("DIR",)), Command("inspect", ("DIR",))),
        codes=("lora-unmerged",),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="state-dict-keys",
        severity="error",
        keys=("Unexpected key(s) in state_dict", "Missing key(s) in state_dict"),
        pattern=r"(?P<which>Unexpected|Missing) key\(s\) in state_dict: \W?(?P<name>[\w.-]{1,300})",
        text="{which} names ({name}, ...): the file is of another architecture, carries a prefix, or lacks tensors. "
        "strict=False is not a cure: what is missing stays RANDOM, and what is unexpected is left out.",
        next=Command("doctor", ("DIR",)),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="state-dict-errors",
        severity="error",
        keys=("Error(s) in loading state_dict",),
        pattern=r"Error\(s\) in loading state_dict for (?P<name>\w+)",
        text="The weights do not fit {name}; the lines that follow name each tensor. torch.Size([0]) from "
        "checkpoint: the file "
        "is empty there. torch.Size([0]) in current model: the loader is.",
        next=Command("doctor", ("DIR",)),
        seen_in=("torch 2.13.0: torch/nn/modules/module.py",),
    ),
    Message(
        code="shapes-reported-empty-file",
        severity="error",
        keys=("found shape",),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+): found shape torch\.Size\(\[0\]\) in the checkpoint",
        text="The file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. "
        "ignore_mismatched_sizes=True fills it with random values.",
        next=Steps(
            Command("doctor", ("DIR",)),
            Command("repair", ("DIR", "OUT", "--weights-from", "THE_RUNS_global_step_FOLDER")),
        ),
        codes=("zero3-empty-tensors",),
        seen_in=("transformers 4.57.6: transformers/modeling_utils.py",),
    ),
    Message(
        code="shapes-reported",
        severity="error",
        keys=("found shape",),
        pattern=r"(?<![\w.])(?P<name>[\w.]{1,300}+): found shape torch\.Size\((?P<have>\[[\d, ]*\])\) in the "
        r"checkpoint and "
        r"torch\.Size\((?P<want>\[[\d, ]*\])\)",
        text="{name} is {have} in the file and {want} in the model, and is RANDOM now: another number of labels, "
        "vocabulary or size. ignore_mismatched_sizes=True is what lets this pass.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 4.57.6: transformers/modeling_utils.py",),
    ),
    Message(
        code="resumed-without-output-embedding",
        severity="cosmetic",
        keys=("missing keys in the checkpoint model loaded", "Removed shared tensor"),
        pattern=r"missing keys in the checkpoint model loaded: \['(?:lm_head|embed_out)\.weight'\]|Removed "
        r"shared tensor",
        text="Harmless: the output embedding is tied to the input's and is stored once.",
        seen_in=(
            "transformers 5.23.0: transformers/trainer.py",
            "accelerate 1.15.0: accelerate/utils/other.py",
        ),
    ),
    Message(
        code="resumed-without-weights",
        severity="error",
        keys=("missing keys in the checkpoint model loaded", "unexpected keys in the checkpoint model loaded"),
        pattern=r"(?P<which>missing|unexpected) keys in the checkpoint model loaded: \[(?P<name>'[^']*')",
        text="The run went on from a checkpoint with {which} names ({name}, ...): what is missing keeps the values "
        "that it had before, random or the base model's.",
        next=Command("doctor", ("DIR",)),
        seen_in=("transformers 5.23.0: transformers/trainer.py",),
    ),
    Message(
        code="report-notes",
        severity="cosmetic",
        keys=(
            "those params were newly init",
            "ckpt weights were loaded, but they did not match",
            "can be ignored when loading",
        ),
        pattern=r"those params were newly init|ckpt weights were loaded, but they did not match|"
        r"can be ignored when loading from",
        text="The notes under transformers' load report: a legend that says nothing by itself. The rows above it do.",
        seen_in=("transformers 5.23.0: transformers/utils/loading_report.py",),
    ),
)
