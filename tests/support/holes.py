"""Healthy folders with one harm each, and who notices it: transformers' and PEFT's own reports, and ours.

A harm counts where the framework's report does: a tensor that its load passes over may be missing.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.cli import main
from converter.errors import ConvertError
from converter.examine.doctor import DoctorRequest, examine
from converter.examine.verify.verify import VerifyRequest
from converter.examine.verify.verify import examine as verify
from converter.families.words import HEAD_MODULES
from healthy.adapters import Adapter
from healthy.adapters import base as write_base
from healthy.models import MODELS, Saved
from oracle.bases import quiet, read_tensors, write_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

MODEL_HARMS = ("removed", "halved", "renamed", "swapped", "zeroed", "unlisted", "retyped", "rows zeroed")
UNREPORTED = ("zeroed", "retyped", "rows zeroed")
"""Harms of which no load says anything: they are harms by what they do to the numbers."""
ADAPTER_HARMS = ("removed", "halved", "renamed", "pair removed")
LAYER = re.compile(r"\.(?:weight|\w*_proj)$")
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Harm:
    """What was done, and to which tensors."""

    kind: str
    names: tuple[str, ...]


def harmed(tensors: Tensors, kind: str, draw: random.Random) -> tuple[Tensors, Harm] | None:
    """The tensors with one harm; None where that kind has no place here."""
    name = draw.choice(sorted(tensors))
    made = dict(tensors)
    if kind == "removed":
        del made[name]
    elif kind == "renamed":
        value = made.pop(name)
        parts = name.split(".")
        at = draw.randrange(len(parts))
        parts[at] = draw.choice((f"{parts[at]}_old", f"my_{parts[at]}", f"net.{parts[at]}"))
        made[".".join(parts)] = value
    elif kind == "halved":
        dims = [d for d, size in enumerate(tensors[name].shape) if size > 1]
        if not dims:
            return None
        dim = draw.choice(dims)
        made[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] // 2).clone()
    elif kind == "swapped":
        others = sorted(n for n, t in tensors.items() if t.shape != tensors[name].shape)
        if not others:
            return None
        other = draw.choice(others)
        made[name], made[other] = tensors[other], tensors[name]
        return made, Harm(kind, (name, other))
    elif kind == "zeroed":
        if (
            not LAYER.search(name)
            or min(tensors[name].shape[:2] if tensors[name].dim() > 1 else (0,)) < 2
            or not tensors[name].any()
        ):
            return None  # biases, norms and relative positions of zeros are how training begins
        made[name] = torch.zeros_like(tensors[name])
    elif kind == "retyped":
        if not name.endswith(".weight"):
            return None  # buffers of other types are their class's own
        made[name] = tensors[name].to(draw.choice((torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn)))
    elif kind == "rows zeroed":
        value = tensors[name]
        is_matrix = LAYER.search(name) and value.dim() > 1 and min(value.shape) > 1 and "embed" not in name
        if not is_matrix or value.shape[0] < 16 or name.startswith(("lm_head", "embed_out", "output")):
            return None
        made[name] = value.clone()
        made[name][value.shape[0] // 2 :] = 0
    return made, Harm(kind, (name,))


def unlisted(folder: Path, draw: random.Random) -> Harm | None:
    """Drop a tensor's entry from the index: the file has it, and no loader looks for it there."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    value = json.loads(index.read_text())
    name = draw.choice(sorted(value["weight_map"]))
    del value["weight_map"][name]
    index.write_text(json.dumps(value))
    return Harm("unlisted", (name,))


def transformers_notices(folder: Path) -> bool:
    """Whether transformers reports a missing, a left-over or a mis-shaped tensor, or stops."""
    config = json.loads((folder / "config.json").read_text())
    named = getattr(transformers, config["architectures"][0])
    try:
        with quiet():
            _, info = named.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True)
    except (RuntimeError, ValueError, KeyError, OSError, IndexError, TypeError, AttributeError):
        return True
    return any(info[k] for k in ("missing_keys", "mismatched_keys", "unexpected_keys"))


def peft_notices(folder: Path, base: Path) -> bool:
    """Whether PEFT finds keys missing or left over, or stops at a size."""
    config = json.loads((folder / "adapter_config.json").read_text())
    with quiet():
        named = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
        auto = {"CAUSAL_LM": transformers.AutoModelForCausalLM}.get(config["task_type"], named)
        model = peft.get_peft_model(auto.from_pretrained(base), peft.PeftConfig.from_pretrained(folder))
    state = load_file(folder / WEIGHTS)
    try:
        with quiet():
            found = peft.set_peft_model_state_dict(model, state)
    except (RuntimeError, ValueError, KeyError):
        return True
    wanted = set(peft.get_peft_model_state_dict(model))
    return bool(found.unexpected_keys) or not wanted <= set(state)


def is_named(folder: Path, harm: Harm, *, base: Path | None = None) -> bool:
    """Whether doctor, or verify, names a tensor of the harm in something worse than cosmetic."""
    asked = DoctorRequest(str(folder), base=None if base is None else str(base), deep="zeroed" in harm.kind)
    # A head of zeros is how some trainers begin: that it is zero is named, and is no more than a hint.
    said = [f for f in examine(asked).findings if f.severity != "cosmetic" or harm.kind == "zeroed"]
    if any(_names(f"{f.text} {' '.join(f.evidence)}", f.tensors, harm) for f in said):
        return True
    if base is not None:
        return False
    try:
        checks = verify(VerifyRequest(str(folder))).checks
    except ConvertError as error:  # it can't be verified: no all-clear, but a tensor has to be named all the same
        return _names(error.what, (), harm)
    return any(c.outcome == "fails" and _names(c.text, (), harm) for c in checks)


def _names(text: str, tensors: tuple[str, ...], harm: Harm) -> bool:
    return any(n in tensors or n in text for n in harm.names)


def writers(folder: Path, out: Path, *, base: Path | None = None, dry: bool = True) -> dict[str, list[str]]:
    """The verbs that would write something of a folder, by their names.

    Args:
        dry: only plan it; values are looked at as they are written.
    """
    rest = ["--dry-run", "-q"] if dry else ["-q"]
    if base is not None:
        return {"merge-lora": ["merge-lora", str(folder), str(out), "--base", str(base), *rest]}
    found = {"reshard": ["reshard", str(folder), str(out), *rest], "repair": ["repair", str(folder), str(out), *rest]}
    found["average"] = ["average", str(folder), str(folder), str(out), *rest]
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    if named.endswith(("ForSequenceClassification", "ForTokenClassification")):
        found["convert"] = ["convert", str(folder), str(out), "--to", "trl", "--role", "reward", *rest]
        found["rm-to-critic"] = ["rm-to-critic", str(folder), str(out), "--to", "openrlhf", *rest]
        found["critic-to-rm"] = ["critic-to-rm", str(folder), str(out), "--to", "trl", *rest]
    elif named.endswith("ForCausalLM"):
        found["convert"] = ["convert", str(folder), str(out), "--to", "trl", "--role", "actor", *rest]
    return found


def refusals(
    folder: Path, out: Path, draw: random.Random, *, base: Path | None = None, dry: bool = True
) -> dict[str, int]:
    """Exit codes of verbs that write: of two, drawn, since all pass the same gate and a run has many cases."""
    every = writers(folder, out, base=base, dry=dry)
    found = {}
    for verb in draw.sample(sorted(every), min(2, len(every))):
        found[verb] = main(every[verb])
        shutil.rmtree(out, ignore_errors=True)
    return found


@dataclass
class Sound:
    """Healthy folders, each made once below a folder."""

    root: Path

    def model(self, saved: Saved) -> Path:
        folder = self.root / str(saved)
        if not folder.exists():
            saved.write(folder)
        return folder

    def adapter(self, adapter: Adapter) -> tuple[Path, Path]:
        """The adapter's folder and its base's."""
        base = self.root / f"base-{adapter.kind}-{adapter.of}"
        if not base.exists():
            write_base(base, adapter.kind, adapter.of)
        folder = self.root / f"adapter-{adapter}"
        if not folder.exists():
            adapter.write(folder, base)
        return folder, base


@dataclass(frozen=True)
class Outcome:
    """One case: what was harmed, and what is wrong with our answer; empty where nothing is."""

    case: str
    harm: Harm
    wrong: str = ""


def drawn(saved: Saved, seed: int) -> tuple[str, random.Random]:
    """The kind of harm of a case, and what draws the rest of it."""
    draw = random.Random(f"{saved} {seed}")
    return draw.choice(MODEL_HARMS), draw


def model_case(sound: Sound, saved: Saved, seed: int, *, judge_all: bool = True) -> Outcome | None:
    """One harm to one model; None where it has no place, or no framework notices it.

    Args:
        judge_all: False: the framework is asked only about what we pass over, which is half of a case's time.
    """
    kind, draw = drawn(saved, seed)
    source = sound.model(saved)
    with tempfile.TemporaryDirectory(dir=sound.root) as scratch:
        folder = Path(scratch) / "harmed"
        shutil.copytree(source, folder)
        if kind == "unlisted":
            harm = unlisted(folder, draw)
        else:
            made = harmed(read_tensors(source), kind, draw)
            harm = None if made is None else made[1]
            if made is not None:
                write_tensors(folder, made[0])
        is_judged = kind not in UNREPORTED
        if harm is None or (judge_all and is_judged and not transformers_notices(folder)):
            return None
        wrong = _wrong(folder, harm, Path(scratch) / "out", draw)
        if wrong and not judge_all and is_judged and not transformers_notices(folder):
            return None
        return Outcome(str(saved), harm, wrong)


def _wrong(folder: Path, harm: Harm, out: Path, draw: random.Random, base: Path | None = None) -> str:
    wrong = [] if is_named(folder, harm, base=base) else ["not named"]
    is_head = harm.kind == "zeroed" and bool({*HEAD_MODULES} & {*harm.names[0].split(".")})  # heads may begin so
    if harm.kind != "rows zeroed" and not is_head:  # a part that is zero is found by doctor --deep and verify alone
        codes = refusals(folder, out, draw, base=base, dry=harm.kind != "zeroed")
        # A head by another name is read as what it is, and written under its own.
        reads_heads = harm.kind == "renamed" and re.match(r"(?:score|classifier)\.", harm.names[0]) is not None
        fixes = ("convert", "rm-to-critic", "critic-to-rm") if reads_heads else ()
        # Of a folder that is whole by its headers repair writes nothing; an index it writes anew, with what it lacked.
        fixes = (*fixes, "repair") if harm.kind in ("zeroed", "unlisted") else fixes
        wrong += [f"{verb} exits {code}" for verb, code in codes.items() if code not in (2, 3) and verb not in fixes]
    return ", ".join(wrong)


def adapter_case(sound: Sound, adapter: Adapter, seed: int, *, judge_all: bool = True) -> Outcome | None:
    """One harm to one adapter; None where PEFT does not notice it. See `model_case`."""
    draw = random.Random(f"{adapter} {seed}")
    source, base = sound.adapter(adapter)
    tensors, kind = load_file(source / WEIGHTS), draw.choice(ADAPTER_HARMS)
    with tempfile.TemporaryDirectory(dir=sound.root) as scratch:
        folder = Path(scratch) / "harmed"
        shutil.copytree(source, folder)
        if kind == "pair removed":
            name = draw.choice(sorted(n for n in tensors if ".lora_" in n))
            gone = tuple(n for n in tensors if n.startswith(f"{_module(name)}.lora_"))
            made: Any = ({n: t for n, t in tensors.items() if n not in gone}, Harm(kind, gone))
        else:
            made = harmed(tensors, kind, draw)
        if made is None:
            return None
        save_file(made[0], folder / WEIGHTS, {"format": "pt"})
        if judge_all and not peft_notices(folder, base):
            return None
        modules = dict.fromkeys(_module(n).removeprefix("base_model.model.") for n in made[1].names)
        harm = Harm(kind, (*made[1].names, *modules))  # a finding about an adapter names the module
        wrong = _wrong(folder, harm, Path(scratch) / "out", draw, base)
        if wrong and not judge_all and not peft_notices(folder, base):
            return None
        return Outcome(f"adapter {adapter}", harm, wrong)


def _module(key: str) -> str:
    return key.partition(".lora_")[0].removesuffix(".weight")


def model_cases(count: int, seed: int) -> Iterator[tuple[Saved, int]]:
    """Models in turn with seeds of their own."""
    for number in range(count):
        yield MODELS[number % len(MODELS)], seed + number


MERGED_HERE: Mapping[str, Adapter] = {
    "llama": Adapter("plain", settings={"target_modules": "all-linear"}),
    "qwen2": Adapter("over-qwen2", kind="qwen2", settings={"target_modules": "all-linear"}),
    "gpt2": Adapter("over-gpt2", kind="gpt2", settings={"target_modules": ["c_attn"]}),
    "reward": Adapter("reward", task="SEQ_CLS", kind="llama", of="seqcls", settings={"target_modules": "all-linear"}),
    "dora": Adapter("dora", settings={"use_dora": True}),
}
"""Adapters that a merge takes."""
