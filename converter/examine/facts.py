"""What `inspect` says beside weights: who saved the folder, its layers, its head's dialect, its other files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from converter.converters.heads.detect import detect
from converter.core.files.names import CARD, GENERATION_CONFIG, RECEIPT, TRAINER_STATE
from converter.core.side_files import is_tokenizer_file, travels
from converter.dialects.known import dialects
from converter.errors import ConvertError
from converter.families.megatron.names import is_megatron
from converter.families.megatron.rows import EMBEDDING, OUTPUT
from converter.text import fold, show

if TYPE_CHECKING:
    from converter.examine.diagnoses.case import Case

_SIGNS = (("zero_to_fp32.py", "DeepSpeed"), (TRAINER_STATE, "transformers' Trainer"))
"""Files that one library alone leaves; those of trainers stand in their dialects (`files_of_its_own`)."""

_TAG = re.compile(r"^-\s*(trl|llama-factory|unsloth|axolotl|openrlhf|verl|ms-swift)\s*$", re.MULTILINE)
_CARD_BYTES = 8192
_LAYER = re.compile(r"^(.*?\.)(\d+)\.", re.ASCII)
MOST_KINDS = 4


def made_by(case: Case) -> list[str]:
    """`LLaMA-Factory (value_head.safetensors), transformers 5.5.4, peft 0.18.1`: what the folder itself records."""
    return [f"{name}{f' ({sign})' if sign else ''}" for name, sign in _makers(case)] + [
        f"{name} {show(version)}" for name, version in versions(case).items()
    ]


def versions(case: Case) -> dict[str, str]:
    """Versions of libraries that configs record, by library."""
    receipt = case.json(RECEIPT) if RECEIPT in case.names else {}
    found = {
        "rlhf-convert": receipt.get("version"),
        "transformers": case.config.get("transformers_version"),
        "peft": case.adapter_config.get("peft_version"),
    }
    return {name: version for name, version in found.items() if isinstance(version, str) and version}


def _makers(case: Case) -> Iterator[tuple[str, str]]:
    """Trainers, with the sign that each was told by."""
    seen: set[str] = set()
    mapping = case.adapter_config.get("auto_mapping")
    own = [(file, d.maker) for d in dialects().values() for file in d.files_of_its_own]
    signs: list[tuple[str, str]] = [(whose, file) for file, whose in (*own, *_SIGNS) if file in case.names]
    if "value_head_prefix" in case.config:
        signs.append(("OpenRLHF", "value_head_prefix in config.json"))
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        signs.append(("unsloth", "auto_mapping"))
    signs += [(tag, "tag of its README.md") for tag in _tags(case)]
    for whose, sign in signs:
        if whose.lower() not in seen:
            seen.add(whose.lower())
            yield whose, sign


def _tags(case: Case) -> list[str]:
    """Trainers among the tags of a model card's front matter."""
    from converter.core.files.opening import open_input, pread

    if CARD not in case.names:
        return []
    try:
        fd = open_input(case.root / CARD, root=case.root)
    except ConvertError:
        return []
    try:
        text = pread(fd, _CARD_BYTES, 0).decode("utf-8", "replace")
    except (OSError, ConvertError):
        return []
    finally:
        os.close(fd)
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    return list(dict.fromkeys(_TAG.findall(front)))


def dialect(case: Case) -> str | None:
    """`LLaMA-Factory reward model (value_head.safetensors beside the weights)`; None where no head is known."""
    if is_megatron(case.shapes) and _has_vocabulary(case):
        return None
    try:
        found = detect(case.checkpoint)
    except ConvertError:
        return None
    if found is None or found.dialect.head.kind == "none":
        return None
    return f"{found.dialect.name}: {found.reason}"


def _has_vocabulary(case: Case) -> bool:
    """True where the output layer of a model of Megatron's is an output embedding: a critic's has other rows."""
    output, embedding = case.shapes.get(OUTPUT), case.shapes.get(EMBEDDING)
    return output is not None and embedding is not None and output.shape == embedding.shape


def normaliser(config: Mapping[str, Any]) -> str | None:
    """`mean 0.1, std 2.0`, where the config has them."""
    values = {k: config[k] for k in ("mean", "std") if isinstance(config.get(k), int | float)}
    return ", ".join(f"{k} {v:g}" for k, v in values.items()) or None


def layers(names: Iterable[str]) -> list[str]:
    """`model.layers.{0..31}: 12 tensors each`, for every stack of layers; those that differ show a range of counts."""
    stacks: dict[str, dict[str, int]] = {}
    for name in names:
        match = _LAYER.match(name)
        if match is not None:
            counts = stacks.setdefault(match[1], {})
            counts[match[2]] = counts.get(match[2], 0) + 1
    found = []
    for prefix, counts in stacks.items():
        if len(counts) < 2 and sum(counts.values()) < 2:
            continue
        least, most = min(counts.values()), max(counts.values())
        each = f"{most} tensors each" if least == most else f"{least} to {most} tensors each"
        found.append(f"{fold(f'{prefix}{number}' for number in counts)}: {each}")
    return found[:MOST_KINDS] + ([f"and {len(found) - MOST_KINDS} more"] if len(found) > MOST_KINDS else [])


def files_beside(case: Case) -> tuple[list[str], list[str]]:
    """Files that travel with the weights, and those that are missed: what a trainer or an engine looks for."""
    present = sorted(n for n in case.names if travels(n, keep_code=True))
    missing = []
    if not any(is_tokenizer_file(n) and not n.startswith("chat_template") for n in present):
        missing.append("tokenizer")
    names = case.config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    if case.kind == "model" and name.endswith("ForCausalLM") and GENERATION_CONFIG not in present:
        missing.append(GENERATION_CONFIG)
    return present, missing
