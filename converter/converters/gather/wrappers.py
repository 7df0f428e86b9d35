"""Wrappers that reward and PPO trainers put around a model: what is in a state, and the layout they would have saved.

Evidence: `state_dict` and `save_pretrained` of TRL's `AutoModelForCausalLMWithValueHead` (0.24 to 1.12: names without
`pretrained_model.`, the head inside the model's file, under PEFT alone in pytorch_model.bin), LLaMA-Factory's
`fix_valuehead_checkpoint` (train/callbacks.py: the head in value_head.safetensors), TRL's `PolicyAndValueWrapper`
(ppo_trainer.py: `policy`, `value_model`, and `critic_backbone`, which is a part of the latter), DeepSpeed-Chat's
`save_hf_format` and `save_zero_three_model` (dschat/utils/utils.py: a plain state_dict in pytorch_model.bin), trlX's
`save_pretrained` (modeling_base.py), ColossalChat's `modeling/`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.files.names import MODEL_PICKLED
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.dialects.known import dialect
from converter.errors import Refused, UsageError
from converter.families.expected import Unknown, expected
from converter.families.foreign import foreign
from converter.families.memory_names import auto_class
from converter.families.words import HEAD_FILES
from converter.text import fold, show

Part = Literal["policy", "value", "actor", "critic", "reward"]
Wrapping = Literal["plain", "trl", "llamafactory", "dschat", "trlx", "coati"]

SIDECAR = HEAD_FILES[0]
_INNER = "pretrained_model."
_HEAD = "v_head."
_SUMMARY = "v_head.summary.weight"
_PARTS = {"policy": "policy.", "value": "value_model."}
_SAME_AS_VALUE = "critic_backbone."
_OTHER_WORDS = {"actor": "policy", "critic": "value"}
_CHAT_LORA = (".lora_right_weight", ".lora_left_weight")
_RUN_CHECKPOINT = re.compile(r"checkpoint-\d+", re.ASCII)


@dataclass(frozen=True)
class Unwrapped:
    """The tensors of a state without their trainer's wrapper.

    Attributes:
        names: names in the model inside, by the trainer's.
        head: the same of a value head that stands outside of that model.
        layout: how the trainer would have saved it.
        part: `policy` or `value`, where the state holds both.
        dropped: tensors of the other part, with the reason.
    """

    names: dict[str, str]
    head: dict[str, str] = field(default_factory=dict)
    layout: Wrapping = "plain"
    part: str = ""
    dropped: dict[str, str] = field(default_factory=dict)

    @property
    def is_raw(self) -> bool:
        """The trainer saves its names in memory as they are."""
        return self.layout in ("dschat", "trlx", "coati")

    def placed(self, found: Checkpoint, given: Mapping[str, LazyTensor]) -> Checkpoint:
        """The gathered model or adapter with the head where the trainer puts it, in the file that it reads."""
        head = {name: given[raw] for raw, name in self.head.items()}
        found = found.replace(dropped={**found.dropped, **self.dropped})
        if self.layout in ("dschat", "trlx"):
            return found.replace(container="torch", one_file=self.layout == "dschat")
        if self.layout == "coati":
            return found.replace(subfolder="modeling")
        if not head:
            return found
        if self.layout == "llamafactory":
            return found.replace(beside={**found.beside, SIDECAR: head})
        if found.origin.kind == "adapter":
            return found.replace(beside={**found.beside, MODEL_PICKLED: head})
        return found.replace(tensors={**found.tensors, **head}, one_file=True)


def unwrap(names: Mapping[str, str], checkpoint: Checkpoint, part: str | None, context: Context) -> Unwrapped:
    """Names without a trainer's wrapper.

    Args:
        names: by the trainer's name, what compilers put into them taken off.
        part: what `--part` says.

    Raises:
        UsageError: a policy and a value model, and no part (`several-parts`), or a part of what has none (`no-parts`).
        Refused: LoRA of DeepSpeed-Chat's own, whose scale is in no file (`lora-dschat`).
    """
    where = show(checkpoint.origin.asked)
    _refuse_chat_lora(names, where)
    plain = set(names.values())
    if all(any(n.startswith(prefix) for n in plain) for prefix in _PARTS.values()):
        return _chosen_part(names, where, part, context)
    if part is not None:
        what = f"--part {show(part)}: this state is of one model, and has no parts"
        raise UsageError(
            "no-parts",
            what,
            where=where,
            next=Again(leave_out=("--part",), otherwise=Command("gather", (where, "OUT"))),
        )
    if _SUMMARY in plain:
        return _value_head(names, checkpoint, context)
    chat = tuple(p for name in ("dschat", "dschat-old") for p, _ in dialect(name).wrapped)
    if any(n.startswith(chat) for n in plain):
        return _raw(names, "dschat", "DeepSpeed-Chat's reward model: pytorch_model.bin, its only file", context)
    if "v_head.0.weight" in plain and any(n.startswith("base_model.") for n in plain):
        return _raw(names, "trlx", "trlX's critic: pytorch_model.bin, which is all that it reads", context)
    if {"value_head.weight", "value_head.bias"} <= plain:
        return _raw(names, "coati", "ColossalChat's model: weights in modeling/", context)
    return Unwrapped(dict(names))


def _raw(names: Mapping[str, str], layout: Wrapping, text: str, context: Context) -> Unwrapped:
    context.note("info", "layout", text)
    return Unwrapped(dict(names), layout=layout)


def _refuse_chat_lora(names: Mapping[str, str], where: str) -> None:
    lora = [n for n in names.values() if n.endswith(_CHAT_LORA)]
    if lora:
        raise Refused(
            "lora-dschat",
            f"LoRA of DeepSpeed-Chat's own ({fold(lora)}): the scale it is added with is in no file",
            where=where,
            next="convert_lora_to_linear_layer and save_hf_format of DeepSpeed-Chat, in its environment",
        )


def _chosen_part(names: Mapping[str, str], where: str, part: str | None, context: Context) -> Unwrapped:
    asked = _OTHER_WORDS.get(part or "", part)
    if asked not in _PARTS:
        what = "TRL's PPO trained a policy and a value model in one; say which"
        if asked is not None:
            what = f"there is no {show(asked)} in TRL's PPO wrapper"
        raise UsageError(
            "several-parts" if asked is None else "no-such-part",
            what,
            where=where,
            expected="--part policy or --part value",
            offers=_PARTS,
            next=Again(("--part", "policy"), otherwise=Command("gather", (where, "OUT", "--part", "policy"))),
        )
    own = _PARTS[asked]
    known = (*_PARTS.values(), _SAME_AS_VALUE)
    odd = [n for n in names.values() if not n.startswith(known)]
    if odd:
        what = f"tensors beside a policy and a value model, which TRL's PPO wrapper hasn't: {fold(odd)}"
        raise Refused("wrapper-names", what, where=where)
    context.note("info", "part", f"the {asked} model of TRL's PPO wrapper")
    kept = {raw: n.removeprefix(own) for raw, n in names.items() if n.startswith(own)}
    other = "value" if asked == "policy" else "policy"
    return Unwrapped(
        kept, part=asked, dropped=dict.fromkeys(names.keys() - kept.keys(), f"of the {other} model, or a name for both")
    )


def _value_head(names: Mapping[str, str], checkpoint: Checkpoint, context: Context) -> Unwrapped:
    """TRL's wrapper, which LLaMA-Factory trains in too, and takes apart when it saves."""
    head = {raw: n for raw, n in names.items() if n.startswith(_HEAD)}
    inside = {raw: n.removeprefix(_INNER) for raw, n in names.items() if raw not in head}
    sign = _sign_of_llamafactory(Path(checkpoint.origin.path))
    if sign:
        context.note("info", "layout", f"as LLaMA-Factory saves it: the head in {SIDECAR} ({sign})")
        return Unwrapped(inside, head, "llamafactory")
    context.note("info", "layout", "as TRL's value-head wrapper saves it")
    return Unwrapped(inside, head, "trl")


def _sign_of_llamafactory(folder: Path) -> str:
    """What only LLaMA-Factory writes beside a checkpoint or into the run's folder; empty where it isn't there."""
    folders = [folder, folder.parent]
    if _RUN_CHECKPOINT.fullmatch(folder.parent.name):
        folders.append(folder.parent.parent)
    for each in folders:
        for name in dialect("llamafactory").files_of_its_own:
            if (each / name).is_file():
                return f"{name} is there"
    return ""


def without_foreign_prefix(found: Checkpoint, context: Context) -> Checkpoint:
    """The model without what a user's own class put before its names (`llm.`, `net.`), where it is whole without it."""
    other = foreign(found.tensors, found.config)
    if other is None:
        return found
    text = f"`{show(other.prefix)}` stands before the names, and without it they are the model's, every one of them"
    context.note("info", "foreign-prefix", text)
    return found.rename(other.names)


def expect_known_ends(found: Checkpoint) -> None:
    """Tensors whose sizes no file records have to be compared with what the config implies.

    Raises:
        Refused: the config's family is not known (`dcp-hf-shards`).
    """
    if found.origin.ends_recorded or not isinstance(wanted := expected(found.config), Unknown):
        return
    raise Refused(
        "dcp-hf-shards",
        "no file says how many pieces HuggingFaceStorageWriter wrote, so a rank that is lost would not be noticed, and "
        f"config.json does not tell either: {wanted.words}",
        where=show(found.origin.asked),
        next="save with enable_consolidation=True, or consolidate_safetensors_files_on_every_rank of torch, with all "
        "files",
    )


def for_value_model(found: Checkpoint, base: Checkpoint | None, context: Context) -> Checkpoint:
    """The value model's own config: TRL saves that of the policy alone.

    Raises:
        Refused: it has other sizes than the policy (`config-of-policy`), or no class (`no-class`).
    """
    if base is not None:
        return found.replace(config=base.config, config_bytes=base.config_bytes)
    score = next((t for n, t in found.tensors.items() if n in ("score.weight", "classifier.weight")), None)
    config, where = dict(found.config), show(found.origin.asked)
    if not config or score is None or len(score.info.shape) != 2:
        return found
    if config.get("hidden_size", config.get("n_embd")) != score.info.shape[1]:
        raise Refused(
            "config-of-policy",
            "config.json is the policy's, and the value model has other sizes",
            where=where,
            expected=f"hidden size {score.info.shape[1]}",
            next=Steps(
                Again(
                    ("--base", "BASE"),
                    otherwise=Command("gather", (where, "OUT", "--part", "value", "--base", "BASE")),
                ),
                ", the model that the value model began with",
            ),
        )
    name = auto_class("SEQ_CLS", str(config.get("model_type")))
    if name is None:
        raise Refused("no-class", f"transformers has no sequence classifier for {show(config.get('model_type'))}")
    labels = {str(i): f"LABEL_{i}" for i in range(score.info.shape[0])}
    config |= {"architectures": [name], "num_labels": len(labels), "id2label": labels}
    config["label2id"] = {label: int(i) for i, label in labels.items()}
    context.note("info", "config", f"config.json is the policy's; written for the value model, a {name}")
    return found.replace(config=config)
