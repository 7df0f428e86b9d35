"""One change of a config that says another model than the tensors are, and who notices it.

transformers' own load is the judge: a change that its report does not mention must not be found by us either, and one
that it mentions has to be named, and no verb may write what such a load would still mention.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.cli import main
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from converter.examine.verify.verify import VerifyRequest
from converter.examine.verify.verify import examine as verify
from healthy.models import Saved
from holes import Sound, writers
from oracle.bases import quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

MOST = 3_000_000
"""Parameters of the largest model that is loaded."""
COUNTS = (
    "hidden_size", "n_embd", "d_model", "dim", "num_hidden_layers", "n_layer", "num_layers", "n_layers", "vocab_size",
    "num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim", "intermediate_size", "n_inner",
    "ffn_dim", "d_ff", "num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size", "num_labels",
    "q_lora_rank", "kv_lora_rank", "max_position_embeddings", "n_positions", "type_vocab_size", "attention_bias",
    "mlp_bias", "use_qkv_bias", "word_embed_proj_dim", "state_size", "shared_expert_intermediate_size",
)  # fmt: skip
"""Fields that count what a model is made of."""
KINDS = ("changed", "removed", "tie", "labels", "class", "type")
ENDS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "Model", "LMHeadModel")
NAMES_AND_SHAPES = ("tensors-", "head-", "vocabulary", "tie")


@dataclass(frozen=True)
class Change:
    """What was done to the config, in words."""

    kind: str
    words: str


def changed(config: dict[str, Any], kind: str, draw: random.Random) -> Change | None:
    """Change a config in place; None where that kind has no place here."""
    if kind in ("changed", "removed"):
        places = [(p, k) for p in _parts(config) for k in COUNTS if k in p and type(p[k]) in (int, bool)]
        if not places:
            return None
        part, key = draw.choice(places)
        before = part[key]
        if kind == "removed":
            del part[key]
        elif isinstance(before, bool):
            part[key] = not before
        else:
            part[key] = max(draw.choice((before * 2, before // 2, before + 1, before - 1)), 1)
        return Change(kind, f"{key}: {before} -> {part.get(key, 'absent')}")
    if kind == "tie":
        part = draw.choice([p for p in _parts(config) if "tie_word_embeddings" in p] or [config])
        before = part.get("tie_word_embeddings", True)
        part["tie_word_embeddings"] = not before
        return Change(kind, f"tie_word_embeddings: {before} -> {not before}")
    if kind == "labels":
        count = draw.choice((1, 2, 3, 5))
        config["id2label"] = {str(n): f"LABEL_{n}" for n in range(count)}
        config["label2id"] = {f"LABEL_{n}": n for n in range(count)}
        return Change(kind, f"{count} labels")
    named = config["architectures"][0]
    if kind == "class":
        start = next((named.removesuffix(e) for e in ENDS if named.endswith(e)), None)
        others = [] if start is None else [start + e for e in ENDS if hasattr(transformers, start + e)]
        others = [o for o in others if o != named]
        if not others:
            return None
        config["architectures"] = [draw.choice(others)]
        return Change(kind, f"{named} -> {config['architectures'][0]}")
    other = draw.choice(("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM"))
    if other == named:
        return None
    config["architectures"] = [other]
    config["model_type"] = other.removesuffix("ForCausalLM").lower()
    return Change(kind, f"{named} -> {other}")


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            yield value


def load_says(folder: Path) -> tuple[bool, list[str]]:
    """Whether transformers mentions anything, and what."""
    config = json.loads((folder / "config.json").read_text())
    named = getattr(transformers, config["architectures"][0], None)
    if named is None:
        return False, []  # a trainer's own class
    _expect_small(named, folder)
    try:
        with quiet():
            _, info = named.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:
        return True, [f"{type(error).__name__}: {error}"[:200]]
    found = [*info["missing_keys"], *info["unexpected_keys"]]
    found += [k[0] if isinstance(k, tuple) else k for k in info["mismatched_keys"]]
    return bool(found), found


class TooLargeError(Exception):
    """The config, without a field, is of a model that a test does not build."""


def _expect_small(named: Any, folder: Path) -> None:
    try:
        with torch.device("meta"), quiet():
            count = sum(p.numel() for p in named(named.config_class.from_pretrained(folder)).parameters())
    except Exception:
        return  # the load says why
    if count > MOST:
        raise TooLargeError(folder)


@dataclass(frozen=True)
class Outcome:
    """One case: what was changed, whether a load mentions it, and what is wrong with our answer."""

    case: str
    change: Change
    is_harm: bool
    wrong: str = ""


def config_case(sound: Sound, saved: Saved, seed: int) -> Outcome | None:
    """One change of one config; None where it has no place."""
    draw = random.Random(f"config {saved} {seed}")
    source, kind = sound.model(saved), draw.choice(KINDS)
    with tempfile.TemporaryDirectory(dir=sound.root) as scratch:
        folder = Path(scratch) / "harmed"
        shutil.copytree(source, folder)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        change = changed(config, kind, draw)
        if change is None:
            return None
        file.write_text(json.dumps(config))
        try:
            is_harm, mentioned = load_says(folder)
        except TooLargeError:
            return None
        if is_harm:
            wrong = _wrong_of_harm(folder, mentioned, Path(scratch))
        elif change.words.endswith("Model"):
            return None  # a backbone alone is whole, and has no head to be verified
        else:
            wrong = _wrong_of_none(folder, source)
        return Outcome(str(saved), change, is_harm, wrong)


def _wrong_of_harm(folder: Path, mentioned: list[str], scratch: Path) -> str:
    found = examine(DoctorRequest(str(folder))).findings
    wrong = []
    if not any(f.severity != "cosmetic" for f in found):
        wrong.append(f"doctor has nothing ({[f.code for f in found]})")
    if not _failed(folder):
        wrong.append("verify passes")
    for verb, command in writers(folder, out := scratch / "out").items():
        code = main(command)
        if code not in (0, 2, 3):
            wrong.append(f"{verb} exits {code}")
        elif code == 0:
            main([c for c in command if c != "--dry-run"])
            if not out.exists():
                continue
            still, what = load_says(out)
            if still:
                wrong.append(f"{verb} writes what a load mentions {what[:3]}")
            shutil.rmtree(out)
    return ", ".join(wrong) + (f" [load: {mentioned[:3]}]" if wrong else "")


def _wrong_of_none(folder: Path, before: Path) -> str:
    found = [f for f in examine(DoctorRequest(str(folder))).findings if f.severity != "cosmetic"]
    wrong = [f"{f.code}: {f.text}" for f in found if f.code.startswith(NAMES_AND_SHAPES)]
    wrong += [f"verify fails: {text}" for text in _failed(folder) if not found and not _failed(before)]
    return "; ".join(wrong)


def _failed(folder: Path) -> list[str]:
    try:
        return [c.text for c in verify(VerifyRequest(str(folder))).checks if c.outcome == "fails"]
    except ConvertError as error:
        return [str(error)]
