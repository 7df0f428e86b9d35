"""Heads of reward models and critics: there or not, under which name, whole or not, and where else they may be."""

from __future__ import annotations

import re
from collections.abc import Iterable

from converter.converters.heads.detect import Detected, detect
from converter.core.context import Context
from converter.core.files.names import MODEL_PICKLED
from converter.diagnostic import Command, Next, Steps
from converter.dialects.known import own_classes
from converter.errors import ConvertError
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.commands import convert_command, filling_command, role_word
from converter.examine.diagnoses.config import architecture, label_count
from converter.examine.diagnoses.names import WRAPPER
from converter.examine.diagnoses.places import Elsewhere, head_elsewhere, heads_among, keeps
from converter.examine.diagnoses.whole import is_read_whole, judgement_of
from converter.families.adapter_task import task_of_class
from converter.families.factors import factor_in_name
from converter.families.family import family, hidden_size
from converter.families.words import HEAD_FILES, HEAD_MODULES, PEFT_PREFIX
from converter.text import fold, show

_HEAD = re.compile(rf"(?:^|\.)(?:{'|'.join(HEAD_MODULES)})(?:\.|$)")
_COPY = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})+")
_LINEAR_BELOW = {"layoutlmv3": 10}
"""Labels below which the head of a token classifier is one layer, where it is two else.

Source: LayoutLMv3ForTokenClassification of transformers 5.23.
"""


def wanted_head(case: Case) -> tuple[str, ...]:
    """Names of the head's tensors that the class in `architectures` looks for; nothing where it has no head.

    A bias is not among them: where one is missing it starts at zero, which is what training starts at.
    """
    name = architecture(case)
    if name in own_classes():
        prefix = case.config.get("value_head_prefix")
        return (f"{prefix if isinstance(prefix, str) and prefix else 'score'}.weight",)
    known = family(case.config)
    for suffix, word in (("ForSequenceClassification", "seqcls"), ("ForTokenClassification", "tokcls")):
        if name.endswith(suffix) and name == getattr(known, word):
            if word == "tokcls" and label_count(case.config) < _LINEAR_BELOW.get(known.kind, 0):
                return ("classifier.weight",)
            return tuple(n for n in known.head_names.get(word, ()) if not n.endswith(".bias"))
    return ()


def heads_here(case: Case) -> list[str]:
    """Names in the folder that look like a head's, LoRA factors left out; those in files beside come with the file."""
    inside = [n for n in heads_among(case.shapes) if ".lora_" not in n]
    return inside + [f"{file}:{n}" for file, f in case.survey.beside.items() for n in f.tensors if file in HEAD_FILES]


def dialect_of(case: Case) -> Detected | None:
    """The dialect of the head, where one is clear."""
    try:
        return detect(case.checkpoint)
    except ConvertError:
        return None


@diagnosis("head-missing", "model", "adapter")
def head_missing(case: Case, context: Context) -> Iterable[Finding]:
    """A reward model or critic without a head in its files, or an adapter of one (task_type SEQ_CLS) with none in it,
    beside it or in the base. Loaders make a RANDOM head and warn at most: `Some weights of CriticModel were not
    initialized ... newly initialized: ['score.weight']`. Either the head was not a saved module, or it was lost when
    the adapter was merged as a language model. It may still be in the adapter, in value_head.safetensors
    (LLaMA-Factory), in pytorch_model.bin (TRL) or in the run's shards. A head that is in no file can't be recovered;
    ignore_mismatched_sizes and --init-head make another one, which has learnt nothing.
    """
    if not case.shapes or not is_read_whole(case):
        return
    if case.kind == "adapter":
        if not _adapter_lacks_head(case):
            return
        task = case.adapter_config.get("task_type") or case.adapter_config["auto_mapping"]["base_model_class"]
        text = f"an adapter of a reward model ({show(task)}) without a head"
        if case.base is None:
            text += "; the base, which may have one, is not here"
    else:
        wanted = wanted_head(case)
        if not wanted or any(n in case.shapes for n in wanted) or heads_here(case):
            return
        if any(factor_in_name().match(n) and _HEAD.search(n) for n in case.shapes):
            return
        text = f"{show(architecture(case))} has its head in {fold(wanted)}, which is in no file: loaders make it RANDOM"
    found = head_elsewhere(case)
    recoverability, command = _from(case, found)
    if case.kind == "adapter" and case.base is None and found is None:
        recoverability, command = "", Steps("look into the base first: ", case.command("doctor", "--base", "BASE"))
    yield Finding(code="head-missing", severity="error", text=text, recoverability=recoverability, next=command)


def _adapter_lacks_head(case: Case) -> bool:
    if (case.adapter_config.get("task_type") or task_of_class(case.adapter_config)) not in ("SEQ_CLS", "TOKEN_CLS"):
        return False
    beside = {*HEAD_FILES, MODEL_PICKLED} & case.names
    in_base = case.base is not None and (
        any(map(_is_of_a_head, case.base.shapes)) or any(n in case.base.shapes for n in wanted_head(case.base))
    )
    return not beside and not in_base and not any(map(_is_of_a_head, case.shapes))


def _is_of_a_head(name: str) -> bool:
    return _HEAD.search(name) is not None and bool(heads_among([f"{name}."]))


def _from(case: Case, found: Elsewhere | None) -> tuple[str, Next | None]:
    """Where a head is that is not here, and the command that takes it from there."""
    if found is None:
        return LOST, None
    if found.kind == "training":
        return f"from {found.asked}", Command("gather", (found.argument, case.out("gathered")))
    if found.kind == "adapter":
        return f"from {found.asked}", Command("merge-lora", (found.argument, case.out("merged")))
    return f"from {found.asked}", convert_command(case, role_word(case), None, "--weights-from", found.argument)


@diagnosis("head-base-lost", "adapter", "model")
def head_base_lost(case: Case, context: Context) -> Iterable[Finding]:
    """A reward head with LoRA on it: score = W0 + BA. BA is in the adapter; W0 was random, frozen and never saved,
    since OpenRLHF's LoraConfig has no task_type and `all-linear` catches the head too. No base model contains W0. A
    trainer starts with another random one and only warns: `newly initialized: ['score.weight']`. W0 is in the run's
    DeepSpeed checkpoint (frozen_param_fragments), if one was kept; it is in no other file. ignore_mismatched_sizes,
    filling with zeros and removing --gradient_checkpointing do not bring it back.
    """
    heads = {m["module"] for n in case.shapes if (m := factor_in_name().match(n)) and _is_of_a_head(m["module"])}
    for module in sorted(heads):
        own = [n for n in case.shapes if n.startswith(f"{module}.base_layer.") or f"{module}.modules_to_save." in n]
        whole = f"{module}.weight" in case.shapes
        in_base = case.base is not None and f"{_COPY.sub('', module)}.weight" in case.base.shapes
        if whole or own or in_base:
            continue
        names = tuple(n for n in case.shapes if n.startswith(f"{module}."))
        places = case.training_near()
        keeper = next((p for p in places if keeps(p, _COPY.sub("", module))), None)
        there = f"is in {show(keeper.asked)}, and not in this folder" if keeper else "is in no file here"
        text = f"{show(_COPY.sub('', module))} = W0 + BA: BA is here; the frozen weight under it {there}"
        command = filling_command(case)
        found = f"from {keeper.asked}" if keeper else LOST
        yield Finding(
            code="head-base-lost",
            severity="error",
            text=text,
            tensors=names,
            evidence=folded(case, names),
            recoverability=found,
            fix=("fill",),
            applicability="safe",
            next=command,
        )


@diagnosis("head-named-otherwise", "model")
def head_named_otherwise(case: Case, context: Context) -> Iterable[Finding]:
    """The head is in the file, under another name than the class in `architectures` looks for: that class makes a
    RANDOM one and lists the real one among the unused weights. Nothing is lost; the head needs its new name.
    """
    wanted = wanted_head(case)
    here = [n for n in heads_here(case) if n in case.shapes]
    if not wanted or not here or any(n in case.shapes for n in wanted) or architecture(case) in own_classes():
        return
    if any(n.startswith(f"{w.removesuffix('.weight')}.") for n in here for w in wanted):
        return  # another form of head under the same stem: an MLP of the model's own code
    text = f"{show(architecture(case))} looks for {fold(wanted)}; the head is {fold(here)}: loaded, it is RANDOM"
    # A wrapper's prefix is not a dialect: `convert` reads none there, `repair` takes it off.
    is_wrapped = all(WRAPPER.search(n) for n in here)
    command = case.repair() if is_wrapped else convert_command(case, role_word(case))
    yield Finding(
        code="head-named-otherwise",
        severity="error",
        text=text,
        tensors=tuple(here),
        evidence=folded(case, here),
        recoverability=HERE,
        fix=("remap-head",),
        applicability="safe",
        next=command,
    )


@diagnosis("head-dialect", "model", "adapter")
def head_dialect(case: Case, context: Context) -> Iterable[Finding]:
    """The head is stored as one trainer does it: under its name, in a file of its own, or with its prefixes. That
    trainer reads it. transformers and most others do not look there: for them the folder has no head, and they make a
    RANDOM one with a warning at most. `convert` writes the form of another trainer.
    """
    found = dialect_of(case)
    if found is None or found.dialect.class_says or case.trainer in _served(found):
        return
    here = heads_here(case)
    where = fold(here) if here else "the head"
    text = f"{where}: the head as {found.dialect.about} stores it. Other trainers do not look there"
    command = convert_command(case, "reward" if found.dialect.reward else "critic")
    yield Finding(
        code="head-dialect",
        severity="cosmetic",
        text=text,
        tensors=tuple(here),
        evidence=folded(case, here),
        recoverability=HERE,
        next=command,
    )


def _served(found: Detected) -> set[str]:
    return {s.trainer for s in found.dialect.serves}


@diagnosis("heads-several", "model", "adapter")
def heads_several(case: Case, context: Context) -> Iterable[Finding]:
    """Two heads lie in one folder (score.weight and value_head.weight, or value_head.safetensors and .bin). Which one
    counts depends on the loader, and the other may be of an older save. Say which is meant with --from.
    """
    files = [n for n in HEAD_FILES if n in case.survey.beside]
    stems = {n.rpartition(":")[2].split(".")[0] for n in heads_here(case)} - {"normalizer"}
    if len(files) > 1:
        tensors = [sorted((n, str(t.info)) for n, t in case.survey.beside[f].tensors.items()) for f in files]
        text = f"{fold(files)} both hold a head; LLaMA-Factory reads the first and ignores the other"
        equal = tensors[0] == tensors[1] and case.deep and _equal_files(case, files, context)
        yield Finding(
            code="heads-several", severity="cosmetic" if equal else "changes-numbers", text=text, evidence=tuple(files)
        )
    elif len(stems) > 1 and not _is_one_renamed(case):
        text = f"several heads: {fold(sorted(stems))}. Which one counts depends on the loader"
        here = heads_here(case)
        is_whole = all(name in case.shapes for name in wanted_head(case))
        yield Finding(
            code="heads-several",
            severity="changes-numbers" if is_whole else "error",
            text=text,
            tensors=tuple(here),
            evidence=folded(case, here),
        )


def _is_one_renamed(case: Case) -> bool:
    """True where the second head is what the class's own lacks, behind a prefix: `net.classifier.dense.weight`."""
    found = judgement_of(case)
    return found is not None and bool(found.prefix)


def _equal_files(case: Case, files: list[str], context: Context) -> bool:
    first, second = (case.survey.beside[f].tensors for f in files[:2])
    return all(context.equal(t, second[n]) for n, t in first.items())


@diagnosis("head-rows", "model")
def head_rows(case: Case, context: Context) -> Iterable[Finding]:
    """The head gives several values for each token (two labels is the default of transformers), and config.json agrees.
    As a classifier that is sound. Trainers that want a reward or a value build one row and stop at the sizes:
    `size mismatch ... [2, h] ... [1, h]`. Whether one row, or the difference of two, is the reward is known to whoever
    trained it: `convert --label N` or `--label-weights=-1,1`.
    """
    for name in wanted_head(case):
        info = case.shapes.get(name)
        if (
            info is not None
            and len(info.shape) == 2
            and info.shape[0] > 1
            and info.shape[0] == label_count(case.config)
        ):
            text = f"{show(name)} has {info.shape[0]} rows: a classifier; reward models and critics have one"
            command = convert_command(case, role_word(case), None, "--label", "N")
            yield Finding(
                code="head-rows",
                severity="cosmetic",
                text=text,
                tensors=(name,),
                evidence=folded(case, [name]),
                next=command,
            )


@diagnosis("head-reshaped", "model")
def head_reshaped(case: Case, context: Context) -> Iterable[Finding]:
    """The head has as many numbers as the hidden size and another shape ([8, h/8]): a leftover of a sharded layout.
    Loaders stop at the sizes. Row by row is the likely order, and no file proves it: check scores after converting.
    """
    hidden = hidden_size(case.config)
    for name in heads_here(case):
        info = case.shapes.get(name)
        if info is None or hidden is None or len(info.shape) < 2 or not name.endswith("weight"):
            continue
        if info.numel == hidden and info.shape[-1] != hidden:
            text = f"{show(name)} is {list(info.shape)}: as many numbers as [1, {hidden}] has, in a sharded layout"
            command = convert_command(case, role_word(case), None, "--allow", "head-reshaped")
            yield Finding(
                code="head-reshaped",
                severity="error",
                text=text,
                tensors=(name,),
                evidence=folded(case, [name]),
                recoverability=HERE,
                fix=("remap-head",),
                applicability="unsafe",
                next=command,
            )


@diagnosis("head-bias", "model")
def head_bias(case: Case, context: Context) -> Iterable[Finding]:
    """The head has a bias that the class in `architectures` has no place for (sequence classification and OpenRLHF have
    none): loaders leave it out without a word, and every score shifts by it. Rankings stay; values of a critic do not.
    """
    for name in wanted_head(case):
        stem = name.removesuffix(".weight")
        bias = f"{stem}.bias"
        has_none = architecture(case).endswith(("ForSequenceClassification", *own_classes()))
        if bias not in case.shapes or not has_none or bias in family(case.config).head_names.get("seqcls", ()):
            continue
        if case.deep and context.is_zero(case.survey.entries[bias].tensor):
            continue
        text = f"{show(architecture(case))} has no place for {show(bias)}: it is ignored, and every score shifts by it"
        command = convert_command(case, "critic", "verl")
        yield Finding(
            code="head-bias",
            severity="changes-numbers",
            text=text,
            tensors=(bias,),
            evidence=folded(case, [bias]),
            recoverability=HERE,
            next=command,
        )


@diagnosis("task-type-wrong", "adapter")
def task_type_wrong(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter trains a head, and its task_type is CAUSAL_LM: PEFT and mergers then load a language model, find no
    place for the head and leave it out.
    """
    heads = [n for n in case.shapes if _is_of_a_head(n) and ".lora_" not in n]
    if heads and case.adapter_config.get("task_type") == "CAUSAL_LM":
        text = f"task_type is CAUSAL_LM, and the adapter holds {fold(heads)}: loaded as a language model it is left out"
        advice = "set task_type to SEQ_CLS in adapter_config.json"
        yield Finding(
            code="task-type-wrong",
            severity="changes-numbers",
            text=text,
            tensors=tuple(heads),
            evidence=folded(case, heads),
            recoverability=HERE,
            next=advice,
        )


@diagnosis("merged-without-head", "model")
def merged_without_head(case: Case, context: Context) -> Iterable[Finding]:
    """A language model that seems to be merged from an adapter with a reward head: the head is in the adapter (or in
    value_head.safetensors beside it) and not in this folder. A merge as a causal model drops it without a word (TRL's
    example scripts, ms-swift's merge_lora, LLaMA-Factory's export without `stage: rm`). Merge again with the head.
    """
    if "CausalLM" not in architecture(case) or heads_here(case):
        return
    found = head_elsewhere(case, only="adapter")
    if found is None or not (found.given or found.is_inside):
        return
    text = f"{show(found.asked)} trains a reward head ({fold(found.names)}), and this merged model has none"
    command = Command("merge-lora", (found.argument, case.out("rm")))
    yield Finding(
        code="merged-without-head",
        severity="error",
        text=text,
        evidence=tuple(found.names[:3]),
        recoverability=f"from {found.asked}",
        next=command,
    )
