"""Messages: the table that transformers 5 prints of what it loaded, and the lists of torch's load_state_dict."""

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
        "mismatch-report-empty-file",
        "error",
        ("MISMATCH",),
        _ROW + r"MISMATCH.{0,200}?ckpt: torch\.Size\(\[0\]\)",
        _REPORT + "the file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. "
        "ignore_mismatched_sizes=True is no cure: it fills the tensor with random values.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT --weights-from THE_RUNS_global_step_FOLDER"),
        ("zero3-empty-tensors",),
    ),
    Message(
        "mismatch-report-empty-model",
        "error",
        ("MISMATCH",),
        _ROW + r"MISMATCH.{0,200}?vs model: ?torch\.Size\(\[0\]\)",
        _REPORT + "the file is sound ({name}), and the model that loads it is empty: it was built under ZeRO-3 "
        "without "
        "from_pretrained knowing of it. Nothing in the files needs repair.",
        ("rlhf-convert doctor DIR",),
        ("zero3-empty-tensors",),
    ),
    Message(
        "mismatch-report-labels",
        "error",
        ("MISMATCH",),
        r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,9}?" + _HEADS + r"[\w.]{0,80})\s{0,200}+\|\s{0,20}MISMATCH",
        _REPORT
        + "the head ({name}) has another number of rows in the file than num_labels asks for. Set num_labels to "
        "the head's rows. ignore_mismatched_sizes=True is no cure: the head is then random.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
        ("labels-mismatch",),
    ),
    Message(
        "mismatch-report",
        "error",
        ("MISMATCH",),
        _ROW + r"MISMATCH(?:.{0,200}?ckpt: torch\.Size\((?P<have>\[[\d, ]*\])\)"
        r" vs model: ?torch\.Size\((?P<want>\[[\d, ]*\])\))?",
        _REPORT + "{name} has one shape in the file and another in the model ({have} and {want}): another "
        "vocabulary, "
        "size or architecture. ignore_mismatched_sizes=True is no cure: it fills the tensor with random values.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "head-missing-report",
        "error",
        ("MISSING",),
        r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,40}?" + _HEADS + r"(?:\.\w{1,80}+){1,8}+)\s{0,200}+\|\s{0,20}MISSING",
        _REPORT + "{name} is not in the checkpoint, so the head is RANDOM. " + _RANDOM,
        ("rlhf-convert doctor DIR --for TRAINER", "rlhf-convert rm-to-critic DIR OUT --to TRAINER"),
        ("head-missing",),
    ),
    Message(
        "weights-missing-report",
        "error",
        ("MISSING",),
        _ROW + r"MISSING",
        _REPORT
        + "{name} is not in the checkpoint, and is random now: another prefix or architecture, or a tensor that "
        "was not saved.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "output-embedding-unused-report",
        "cosmetic",
        ("UNEXPECTED",),
        r"(?P<name>(?:lm_head|embed_out)\.(?:weight|bias))\s{0,200}+\|\s{0,20}UNEXPECTED",
        "Harmless: the output embedding ({name}) of the language model has no place in a reward model or critic.",
    ),
    Message(
        "head-unused-report",
        "error",
        ("UNEXPECTED",),
        r"(?<![\w])(?P<name>(?:\w{1,80}+\.){0,40}?" + _HEADS + r"(?:\.\w{1,80}+){1,8}+)\s{0,200}+\|\s{0,20}UNEXPECTED",
        _REPORT + "the trained head is in the file, under a name ({name}) that this loader does not ask for: it is "
        "thrown away.",
        ("rlhf-convert convert DIR OUT --to TRAINER --role reward",),
        ("head-named-otherwise", "head-dialect"),
    ),
    Message(
        "prefix-report",
        "error",
        ("UNEXPECTED",),
        r"(?<![\w.])(?P<name>" + _PREFIX + r"\.[\w.{}, -]{1,300}?)\s{0,200}+\|\s{0,20}UNEXPECTED",
        _REPORT + "names carry a wrapper's prefix ({name}), so nothing finds its place, and what should be "
        "there is "
        "random.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
        ("names-wrapped",),
    ),
    Message(
        "weights-unused-report",
        "changes-numbers",
        ("UNEXPECTED",),
        _ROW + r"UNEXPECTED",
        _REPORT
        + "the file holds a tensor ({name}) that the model has no place for; it is left out. Harmless for buffers "
        "and for parts that this class does not use; not where the same table has MISSING rows.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "state-dict-prefix",
        "error",
        ("Unexpected key(s) in state_dict",),
        r"Unexpected key\(s\) in state_dict: \W?(?P<name>" + _PREFIX + r"\.[\w.]{1,300})",
        "Names in the file carry a wrapper's prefix ({name}, ...): it was saved from the wrapped model. "
        "strict=False is no "
        "cure: nothing would be loaded, silently.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT"),
        ("names-wrapped",),
    ),
    Message(
        "state-dict-lora",
        "error",
        ("Unexpected key(s) in state_dict", "Missing key(s) in state_dict"),
        r"(?:Unexpected|Missing) key\(s\) in state_dict: .{0,1200}?(?P<name>[\w.]{1,120}(?:base_layer|lora_[AB])"
        r"[\w.]{0,80})",
        "LoRA's wrappers are on one side only ({name}): a full model was saved with its adapter inside, or an "
        "adapter is "
        "loaded as a model.",
        ("rlhf-convert doctor DIR", "rlhf-convert inspect DIR"),
        ("lora-unmerged",),
    ),
    Message(
        "state-dict-keys",
        "error",
        ("Unexpected key(s) in state_dict", "Missing key(s) in state_dict"),
        r"(?P<which>Unexpected|Missing) key\(s\) in state_dict: \W?(?P<name>[\w.-]{1,300})",
        "{which} names ({name}, ...): the file is of another architecture, carries a prefix, or lacks tensors. "
        "strict=False is no cure: what is missing stays RANDOM, and what is unexpected is left out.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "state-dict-errors",
        "error",
        ("Error(s) in loading state_dict",),
        r"Error\(s\) in loading state_dict for (?P<name>\w+)",
        "The weights do not fit {name}; the lines that follow name each tensor. torch.Size([0]) from "
        "checkpoint: the file "
        "is empty there. torch.Size([0]) in current model: the loader is.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "shapes-reported-empty-file",
        "error",
        ("found shape",),
        r"(?<![\w.])(?P<name>[\w.]{1,300}+): found shape torch\.Size\(\[0\]\) in the checkpoint",
        "The file holds an empty tensor for {name}: it was saved under ZeRO-3 without gathering. "
        "ignore_mismatched_sizes=True fills it with random values.",
        ("rlhf-convert doctor DIR", "rlhf-convert repair DIR OUT --weights-from THE_RUNS_global_step_FOLDER"),
        ("zero3-empty-tensors",),
    ),
    Message(
        "shapes-reported",
        "error",
        ("found shape",),
        r"(?<![\w.])(?P<name>[\w.]{1,300}+): found shape torch\.Size\((?P<have>\[[\d, ]*\])\) in the checkpoint and "
        r"torch\.Size\((?P<want>\[[\d, ]*\])\)",
        "{name} is {have} in the file and {want} in the model, and is RANDOM now: another number of labels, "
        "vocabulary or size. ignore_mismatched_sizes=True is what lets this pass.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "resumed-without-output-embedding",
        "cosmetic",
        ("missing keys in the checkpoint model loaded", "Removed shared tensor"),
        r"missing keys in the checkpoint model loaded: \['(?:lm_head|embed_out)\.weight'\]|Removed shared tensor",
        "Harmless: the output embedding is tied to the input's and is stored once.",
    ),
    Message(
        "resumed-without-weights",
        "error",
        ("missing keys in the checkpoint model loaded", "unexpected keys in the checkpoint model loaded"),
        r"(?P<which>missing|unexpected) keys in the checkpoint model loaded: \[(?P<name>'[^']*')",
        "The run went on from a checkpoint with {which} names ({name}, ...): what is missing keeps the values "
        "that it had before, random or the base model's.",
        ("rlhf-convert doctor DIR",),
    ),
    Message(
        "report-notes",
        "cosmetic",
        (
            "those params were newly init",
            "ckpt weights were loaded, but they did not match",
            "can be ignored when loading",
        ),
        r"those params were newly init|ckpt weights were loaded, but they did not match|"
        r"can be ignored when loading from",
        "The notes under transformers' load report: a legend that says nothing by itself. The rows above it do.",
    ),
)
