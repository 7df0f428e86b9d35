"""Two folders that have to fit: a reward model or critic and the actor that it trains with; a model and its adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from converter.core.context import Context
from converter.core.files.names import CHAT_TEMPLATE, MODEL_CONFIG, RECEIPT, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from converter.core.files.opening import read_limited
from converter.diagnostic import Command
from converter.errors import Refused
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis
from converter.examine.diagnoses.config import is_part_of_vision
from converter.families.words import input_embedding
from converter.text import fold, show

_TEMPLATE_BYTES = 1 << 20
_LORA_KEYS = ("r", "lora_alpha", "target_modules", "base_model_name_or_path")


@diagnosis("pair-same-path", "model", "adapter")
def pair_same_path(case: Case, context: Context) -> Iterable[Finding]:
    """The critic and the actor are one folder. OpenRLHF then initialises the critic's value head anew, at RANDOM, even
    where the folder has a trained one. Copy or link it to another path.
    """
    if case.actor is not None and case.actor.root.resolve() == case.root.resolve():
        text = "this folder is the actor's as well: with one path for both OpenRLHF makes the critic's head RANDOM"
        yield Finding(code="pair-same-path", severity="error", text=text, next="give the critic a folder of its own")


@diagnosis("pair-tokenizer", "model", "adapter")
def pair_tokenizer(case: Case, context: Context) -> Iterable[Finding]:
    """The actor's tokenizer gives other numbers to the same tokens. A critic reads the actor's token numbers directly,
    so its values are of other words; a reward model that is fed by numbers has the same trouble.
    """
    actor = case.actor
    if actor is None:
        return
    own, theirs = _vocabulary(case), _vocabulary(actor)
    if not own or not theirs or own == theirs:
        return
    other = sorted(t for t in own.keys() & theirs.keys() if own[t] != theirs[t])
    alone = sorted(own.keys() ^ theirs.keys())
    if other:
        text = f"{len(other)} tokens have other numbers than in {show(actor.asked)}: {fold(other[:20])}"
        shown = tuple(f"{show(t)}: {own[t]}, {theirs[t]}" for t in other[:3])
        yield Finding(code="pair-tokenizer", severity="error", text=text, evidence=shown)
    elif alone:
        text = f"{len(alone)} tokens are in one tokenizer only: {fold(alone[:20])}"
        yield Finding(
            code="pair-tokenizer", severity="changes-numbers", text=text, evidence=tuple(show(t) for t in alone[:3])
        )


def _vocabulary(case: Case) -> dict[str, int]:
    """Tokens and their numbers of tokenizer.json, else of vocab.json."""
    whole = case.json(TOKENIZER)
    model = whole.get("model")
    table = model.get("vocab") if isinstance(model, Mapping) else case.json(VOCABULARY)
    if isinstance(table, list):  # Unigram: pairs of token and score, in order
        listed = {str(p[0]): n for n, p in enumerate(table) if isinstance(p, list) and p}
    else:
        listed = {str(t): n for t, n in table.items() if isinstance(n, int)} if isinstance(table, Mapping) else {}
    added = whole.get("added_tokens")
    for each in added if isinstance(added, list) else []:
        if isinstance(each, Mapping) and isinstance(each.get("id"), int):
            listed[str(each.get("content"))] = each["id"]
    return listed


@diagnosis("pair-vocabulary", "model")
def pair_vocabulary(case: Case, context: Context) -> Iterable[Finding]:
    """The embeddings of critic and actor have another number of rows: token numbers beyond the smaller one stop the
    job, `index out of range`, at the first rare token.
    """
    if case.actor is None:
        return
    own, theirs = _rows(case), _rows(case.actor)
    if own is not None and theirs is not None and own != theirs:
        text = f"{own} embedding rows here, {theirs} in {show(case.actor.asked)}"
        yield Finding(code="pair-vocabulary", severity="changes-numbers", text=text)


def _rows(case: Case) -> int | None:
    name = input_embedding(n for n, i in case.shapes.items() if i.numel and not is_part_of_vision(n))
    return None if name is None else case.shapes[name].shape[0]


@diagnosis("pair-chat-template", "model", "adapter")
def pair_chat_template(case: Case, context: Context) -> Iterable[Finding]:
    """Reward model and actor have chat templates that differ: the reward model then scores texts of a form that it was
    not trained on. Trainers that score token numbers never look at the reward model's template; those that render
    texts for it do.
    """
    if case.actor is None:
        return
    own, theirs = _template(case), _template(case.actor)
    if own is not None and theirs is not None and own != theirs:
        text = f"the chat template is not that of {show(case.actor.asked)}"
        yield Finding(
            code="pair-chat-template",
            severity="cosmetic",
            text=text,
            evidence=("chat_template.jinja or tokenizer_config.json",),
        )


def _template(case: Case) -> str | None:
    try:
        path = case.root / CHAT_TEMPLATE
        return read_limited(path, limit=_TEMPLATE_BYTES, root=case.root).decode("utf-8", "replace")
    except Refused:
        value = case.json(TOKENIZER_CONFIG).get("chat_template")
        return value if isinstance(value, str) else None


@diagnosis("pair-special-tokens", "model")
def pair_special_tokens(case: Case, context: Context) -> Iterable[Finding]:
    """Critic and actor name other pad tokens or ends of text in config.json: where the score is read, or where an
    answer ends, differs between them.
    """
    if case.actor is None:
        return
    for key in ("pad_token_id", "eos_token_id"):
        own, theirs = case.config.get(key), case.actor.config.get(key)
        if own is not None and theirs is not None and own != theirs:
            text = f"{key} is {show(own)} here, {show(theirs)} in {show(case.actor.asked)}"
            yield Finding(code="pair-special-tokens", severity="changes-numbers", text=text, evidence=(MODEL_CONFIG,))


@diagnosis("pair-lora", "adapter")
def pair_lora(case: Case, context: Context) -> Iterable[Finding]:
    """Two adapters that train together have another rank, alpha, targets or base. Rank and targets need not match for
    current trainers, whose flags apply to each model by itself; another base means another tokenizer and vocabulary.
    """
    if case.actor is None or case.actor.kind != "adapter":
        return
    own, theirs = case.adapter_config, case.actor.adapter_config
    keys = [k for k in _LORA_KEYS if _plain(own, k) != _plain(theirs, k)]
    if keys:
        text = f"{', '.join(keys)} differ from those of {show(case.actor.asked)}"
        yield Finding(
            code="pair-lora",
            severity="cosmetic",
            text=text,
            evidence=tuple(f"{k}: {show(own.get(k))}" for k in keys[:3]),
        )


def _plain(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    return sorted(map(str, value)) if isinstance(value, list) else value


@diagnosis("pair-dtype", "model")
def pair_dtype(case: Case, context: Context) -> Iterable[Finding]:
    """Critic and actor are stored in another dtype. Trainers cast to their own flag; memory is planned by the files."""
    if case.actor is None:
        return
    own, theirs = _main_dtype(case), _main_dtype(case.actor)
    if own and theirs and own != theirs:
        yield Finding(code="pair-dtype", severity="cosmetic", text=f"{own} here, {theirs} in {show(case.actor.asked)}")


def _main_dtype(case: Case) -> str:
    sizes: dict[str, int] = {}
    for info in case.shapes.values():
        if info.dtype.is_float:
            sizes[info.dtype.torch_name] = sizes.get(info.dtype.torch_name, 0) + info.nbytes
    return max(sizes, key=lambda d: sizes[d], default="")


@diagnosis("adapter-left-beside", "model")
def adapter_left_beside(case: Case, context: Context) -> Iterable[Finding]:
    """verl's merger writes the base model and leaves the trained adapter in `lora_adapter/` inside of it, with a
    lora_alpha of 0: whoever serves the folder serves the untrained model. Merge the adapter into it, with the alpha of
    the training script: --lora-alpha. A folder whose adapter was merged already has no use for it.
    """
    inside = [n for n in case.near if n.kind == "adapter" and n.path == case.root / "lora_adapter"]
    if inside and not (case.root / RECEIPT).exists():
        text = "verl's adapter lies in lora_adapter/: this model is the base, without what was trained"
        merge = Command("merge-lora", (inside[0].argument, case.out("merged"), "--base", case.folder))
        has_alpha = inside[0].adapter_config.get("lora_alpha")
        step = merge if has_alpha else merge.with_options("--lora-alpha", "N")
        yield Finding(
            code="adapter-left-beside",
            severity="changes-numbers",
            text=text,
            evidence=("lora_adapter/",),
            recoverability=HERE,
            next=step,
        )
