"""The model card of an output: how it was made and checked, inferred from its receipt. An existing card is extended.

Strings from inputs are escaped, capped and on one line; the front matter is made by a YAML library from vetted values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from converter.core.files.names import CARD
from converter.core.files.strict_yaml import read_values
from converter.dialects.known import own_classes
from converter.errors import ConvertError, Refused
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.dialects.known import Target

BEGIN, END = "<!-- rlhf-convert: begin -->", "<!-- rlhf-convert: end -->"
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}", re.ASCII)
_MOST = 12
_TAGS = {"reward": "reward-model", "critic": "value-model"}
MAX_TEXT = 200


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        receipt: `rlhf-convert.json`, or nothing where the folder has none.
        config: config.json or adapter_config.json.
        total_bytes: of the weight files.
        licence: the base's, as the Hub's tag, where it is known.
        consents: codes that the push itself needed, with what was refused otherwise.
        checks: what was checked of the files for a trainer: its words, each check's text and whether it holds.
        not_compared: why names and shapes were not compared with what a load asks for; empty where they were.
    """

    repo_id: str
    receipt: Mapping[str, Any]
    config: Mapping[str, Any]
    is_adapter: bool
    total_bytes: int
    licence: str | None = None
    consents: Mapping[str, str] | None = None
    checks: tuple[str, tuple[tuple[str, bool], ...]] | None = None
    not_compared: str = ""


def model_card(facts: CardFacts, existing: str = "") -> str:
    """The card as Markdown: the existing text with our front matter added and our section put in or renewed.

    Raises:
        Refused: the existing card's front matter can't be read (`card-malformed`).
    """
    match = _FRONT.match(existing)
    own = _front_matter(facts)
    body = existing
    if match is not None:
        own = {**own, **_parse_front(match[1])}
        body = existing[match.end() :]
    section = f"{BEGIN}\n{_section(facts)}\n{END}\n"
    begin = body.find(BEGIN)
    end = body.find(END, begin) if begin >= 0 else -1
    if end >= 0:
        body = body[:begin] + section + body[end + len(END) :].removeprefix("\n")
    else:
        head = body.rstrip("\n")
        title = "" if head else f"# {_text(facts.repo_id.rpartition('/')[2])}\n"
        body = f"{head}\n\n{section}" if head else f"{title}\n{section}"
    front = yaml.safe_dump(own, sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n{body if body.startswith(chr(10)) else chr(10) + body}"


def own_text(card: str) -> str:
    """What people wrote in a card: without front matter, our section, and white space around."""
    match = _FRONT.match(card)
    body = card[match.end() :] if match is not None else card
    begin = body.find(BEGIN)
    end = body.find(END, begin) if begin >= 0 else -1
    if end >= 0:
        body = body[:begin] + body[end + len(END) :]
    return body.strip()


def _parse_front(text: str) -> dict[str, Any]:
    try:
        value = read_values(text.encode(), file=CARD).value
    except ConvertError as error:
        what = f"the front matter of README.md can't be read: {error.what}"
        raise Refused("card-malformed", what, next="fix or remove it") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused("card-malformed", "the front matter of README.md is not a mapping", next="fix or remove it")
    return value


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    bases = base_models(facts)
    front: dict[str, Any] = {"library_name": "peft" if facts.is_adapter else "transformers"}
    if tag := _pipeline_tag(facts):
        front["pipeline_tag"] = tag
    if bases:
        front["base_model"] = bases[0] if len(bases) == 1 else bases
        front["base_model_relation"] = "adapter" if facts.is_adapter else "finetune"
    if facts.licence and _LICENCE.fullmatch(facts.licence):
        front["license"] = facts.licence
    role = _role(facts)
    front["tags"] = ["rlhf-convert", *([_TAGS[role]] if role in _TAGS else [])]
    return front


def base_models(facts: CardFacts) -> list[str]:
    """Hub ids of the models that the output was made from; folders of somebody's machine are not named."""
    inputs = facts.receipt.get("inputs")
    found = []
    for value in inputs.values() if isinstance(inputs, dict) else ():
        name = value.get("name") if isinstance(value, dict) else None
        if isinstance(name, str) and value.get("kind") == "model":
            repo_id = "/".join(name.split("/")[:2])  # a folder in a repository is of that
            found += [repo_id] if _HUB_ID.fullmatch(repo_id) else []
    recorded = facts.config.get("base_model_name_or_path")
    if facts.is_adapter and not found and isinstance(recorded, str) and _HUB_ID.fullmatch(recorded):
        found.append(recorded)
    return list(dict.fromkeys(found))


def _architecture(facts: CardFacts) -> str:
    names = facts.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _is_classifier(facts: CardFacts) -> bool:
    return "Classification" in _architecture(facts) or facts.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")


def _role(facts: CardFacts) -> str:
    """What the model is: as it was made, else a reward model where it is a classifier."""
    aim = made_for(facts.receipt)
    return aim.role if aim is not None else "reward" if _is_classifier(facts) else ""


def _pipeline_tag(facts: CardFacts) -> str | None:
    if _is_classifier(facts) or _role(facts) == "reward":
        return "text-classification"
    return "text-generation" if "CausalLM" in _architecture(facts) else None


def _section(facts: CardFacts) -> str:
    receipt = facts.receipt
    lines = ["## How this was made", ""]
    if not receipt:
        lines.append("These files carry no receipt of rlhf-convert: how they were made is not recorded.")
    else:
        lines += [
            f"Made with rlhf-convert {_text(receipt.get('version'))}, {format_size(facts.total_bytes)} of weights.",
            "",
        ]
        lines += _inputs(receipt)
        lines += _steps(receipt)
        lines += _head(receipt)
        lines += _numbers(receipt)
        lines += _listed("Dropped", receipt.get("dropped"))
        lines += _listed("Repaired, and from where", receipt.get("repaired"))
        lines += _listed("Gone on with, though refused by default", receipt.get("consents"))
        lines += _notes(receipt)
    lines += _not_compared(facts)
    lines += _checks(facts)
    lines += _listed("Pushed all the same", facts.consents)
    return "\n".join([*lines, "", *_load(facts)]).replace("\n\n\n", "\n\n")


def _not_compared(facts: CardFacts) -> list[str]:
    """What was compared with nothing: as the files are, else as they were when they were written."""
    notes = facts.receipt.get("notes")
    rows = [n for n in notes if isinstance(n, list) and len(n) == 3] if isinstance(notes, list) else []
    found = [facts.not_compared] if facts.not_compared else [n[2] for n in rows if n[1] in NOT_COMPARED]
    return [line for text in dict.fromkeys(map(str, found)) for line in (f"Not checked: {_text(text)}.", "")]


def _head(receipt: Mapping[str, Any]) -> list[str]:
    notes = head_notes(receipt)
    return ["Head:", "", *(f"- {_text(n)}" for n in notes[:_MOST]), ""] if notes else []


def _checks(facts: CardFacts) -> list[str]:
    """What was checked before the push, with the trainer that it was checked for."""
    if facts.checks is None:
        return []
    words, found = facts.checks
    whole = all(holds for _, holds in found)
    title = f"Checked for {_text(words)}, against what its loader does with the files:"
    if not whole:
        title = f"Checked for {_text(words)}, which does not load it as it is meant:"
    return [title, "", *(f"- {'' if holds else 'fails: '}{_text(text)}" for text, holds in found[:_MOST]), ""]


def _load(facts: CardFacts) -> list[str]:
    """How it is loaded: in Python, and in the trainer that it was made for."""
    lines = ["## Load it", ""]
    aim = made_for(facts.receipt)
    launch = launch_lines(aim, facts.repo_id) if aim is not None else []
    snippet = _snippet(facts)
    if snippet:
        lines += ["```python", *snippet, "```"]
    if launch and aim is not None:
        lines += ["", f"In {aim.words}:", "", "```text", *launch, "```"]
    return lines


def _inputs(receipt: Mapping[str, Any]) -> list[str]:
    inputs = receipt.get("inputs")
    rows = [v for v in inputs.values() if isinstance(v, dict)] if isinstance(inputs, dict) else []
    lines = [f"| {_text(v.get('name'))} | {_text(v.get('kind'))} | {_text(v.get('revision') or '')} |" for v in rows]
    return ["| input | kind | revision |", "|---|---|---|", *lines, ""]


def _steps(receipt: Mapping[str, Any]) -> list[str]:
    recipe = receipt.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    if not isinstance(steps, list) or not steps:
        return []
    text = yaml.safe_dump({"steps": steps}, sort_keys=False, allow_unicode=False)
    return [
        "Recipe:",
        "",
        "```yaml",
        *(line.replace("`", "'").replace("<", "\u2039")[:MAX_TEXT] for line in text.splitlines()[:60]),
        "```",
        "",
    ]


def _numbers(receipt: Mapping[str, Any]) -> list[str]:
    counts = receipt.get("counts")
    words = []
    if isinstance(counts, dict):
        words = [f"{n} {_text(k)}" for k, n in counts.items() if isinstance(n, int) and n]
    lines = [f"Tensors: {', '.join(words)}."] if words else []
    if share := surviving(receipt):
        lines.append(f"Of the adapter's change {share} survives rounding to the output's dtype.")
    if receipt.get("verified") is True:
        lines.append("Read back after writing, sampled tensors recomputed and compared.")
    return [*lines, ""] if lines else []


def surviving(receipt: Mapping[str, Any]) -> str | None:
    """The share of a merge's update that rounding left, over all tensors, as the screen says it."""
    from converter.core.compute.measures import has_update, surviving_share

    tensors = receipt.get("tensors")
    measured = [m for m in tensors.values() if isinstance(m, dict)] if isinstance(tensors, dict) else []
    if any(not isinstance(v, int | float) for m in measured for v in m.values()):
        return None
    updates = [m for m in measured if has_update(m)]
    return f"{surviving_share(updates) * 100:.3f} %" if updates else None


def _listed(title: str, value: object) -> list[str]:
    if not isinstance(value, dict) or not value:
        return []
    by_reason: dict[str, list[str]] = {}
    for name, reason in value.items():
        by_reason.setdefault(str(reason), []).append(str(name))
    lines = [f"{title}:", ""]
    lines += [f"- {_text(fold(names))}: {_text(reason)}" for reason, names in list(by_reason.items())[:_MOST]]
    return [*lines, ""]


def _notes(receipt: Mapping[str, Any]) -> list[str]:
    notes = receipt.get("notes")
    kept = (
        [n for n in notes if isinstance(n, list) and len(n) == 3 and n[0] == "changes-numbers"]
        if isinstance(notes, list)
        else []
    )
    return ["Changes numbers:", "", *(f"- {_text(n[2])}" for n in kept[:_MOST]), ""] if kept else []


def _snippet(facts: CardFacts) -> Sequence[str]:
    repo = facts.repo_id
    if facts.is_adapter:
        bases = base_models(facts)
        kind = "SequenceClassification" if _is_classifier(facts) else "CausalLM"
        more = ", num_labels=1" if kind == "SequenceClassification" else ""
        base = repr(bases[0]) if bases else '"THE_BASE_MODEL"'
        return (
            f"from transformers import AutoModelFor{kind}",
            "from peft import PeftModel",
            "",
            f"base = AutoModelFor{kind}.from_pretrained({base}{more})",
            f'model = PeftModel.from_pretrained(base, "{repo}")',
        )
    architecture = _architecture(facts)
    if architecture in own_classes() and facts.config.get("value_head_prefix") == "score":
        # OpenRLHF's own classes; the head has the name that transformers knows.
        return (
            "from transformers import AutoModelForSequenceClassification",
            "",
            f'model = AutoModelForSequenceClassification.from_pretrained("{repo}", num_labels=1)',
        )
    if made_for(facts.receipt) is not None and "For" not in architecture:
        return ()  # a class of the trainer's own: transformers would load it without its head
    known = re.fullmatch(r"[A-Z]\w{1,80}For\w{1,60}", architecture)
    name = architecture if known else "AutoModel"
    return (f"from transformers import {name}", "", f'model = {name}.from_pretrained("{repo}")')


def _text(value: object) -> str:
    """A string of an input as Markdown text on one line."""
    text = show(value, MAX_TEXT)
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


NOT_COMPARED = ("family-unknown", "adapter-not-compared")
"""Codes of a receipt's notes that say what the gate had nothing to compare with."""

TOLD = frozenset(
    {
        "head", "head-base", "dialect-from", "dialect-to", "head-folded", "head-carried", "head-embedded", "head-units",
        "head-unembedded", "head-bias-zero", "normaliser-folded", "lm-head", "part",
    }
)  # fmt: skip
"""Codes of a receipt's notes that say where a head is from, and in whose names it is written."""


def head_notes(receipt: Mapping[str, Any]) -> list[str]:
    """The receipt's words about the head."""
    notes = receipt.get("notes")
    rows = [n for n in notes if isinstance(n, list) and len(n) == 3] if isinstance(notes, list) else []
    return [str(n[2]) for n in rows if n[0] == "info" and n[1] in TOLD]


def made_for(receipt: Mapping[str, Any]) -> Target | None:
    """The trainer and the role that the recipe's last `remap-head` names; None where there is none that is known."""
    from converter.dialects.known import target

    recipe = receipt.get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    listed = steps if isinstance(steps, list) else []
    found = [s["remap-head"] for s in listed if isinstance(s, dict) and "remap-head" in s]
    fields = found[-1] if found and isinstance(found[-1], dict) else {}
    to, role = fields.get("to"), fields.get("role")
    if not isinstance(to, str) or role not in ("reward", "critic", "actor"):
        return None
    try:
        return target(to, role)
    except ConvertError:
        return None


def launch_lines(aim: Target, repo_id: str) -> list[str]:
    """The trainer's own line with the repository in it, and what goes wrong although the files are right."""
    if not aim.serves.launch:
        return []
    line = aim.serves.launch_line(repo_id)
    return [line, *(f"# {trap}" for trap in aim.traps)]
