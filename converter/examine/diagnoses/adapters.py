"""Adapters: would they merge, do they cover what they claim, do they do anything at all?"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from converter.converters.merge.asked_modules import modules_missing
from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG
from converter.diagnostic import Next, Severity, completed
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.diagnoses.adapters_alone import adapter_inconsistent, adapter_keys_named, adapter_untargeted
from converter.examine.diagnoses.case import LOST, Case, Diagnosis, Finding, diagnosis, folded
from converter.examine.diagnoses.commands import filling_command
from converter.examine.diagnoses.whole import is_read_whole
from converter.families.factors import factor_in_name, factor_pairs, zero_factors
from converter.families.words import LORA_MAGNITUDE, PEFT_PREFIX
from converter.sources.finding import sources
from converter.sources.survey import StoredTensor
from converter.text import fold, show

_COPY = re.compile(rf"(?:{re.escape(PEFT_PREFIX)})+")
_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.", re.ASCII)
_NUMBER = re.compile(r"\.\d+", re.ASCII)

# What a merge refuses, by its code, and what `explain` says of it.
REFUSALS: dict[str, str] = {
    "adapter-unmatched": (
        "Tensors of the adapter have no place in the base model. PEFT loads such an adapter without a word: it "
        "warns of "
        "what is missing and says nothing of keys that it ignores, and the model answers as its base does. It is "
        "another "
        "base, a prefix that is doubled or missing, or an adapter of another version's names."
    ),
    "adapter-files-unread": "Weight files lie beside the adapter that are not merged: a part of what was trained may "
    "be in them. A file that holds the adapter's own tensors again is a copy; what else is there has to be looked at.",
    "adapter-task-unknown": "The adapter brings a head and has no task type, and more than one class has such a head.",
    "adapter-shape": "A tensor of the adapter has another shape than the base's layer: another base, or another "
    "size of it.",
    "adapter-rank": "The ranks in adapter_config.json are not those of the tensors: the config is of another run.",
    "adapter-incomplete": "Parts of a module are missing, or there is one that the config does not speak of (a DoRA "
    "magnitude without use_dora, for one).",
    "adapter-unexpected": "A tensor is of no kind that the config speaks of (a DoRA magnitude without use_dora, for "
    "one).",
    "adapter-ambiguous": "The adapter's names fit the base in two ways that differ; it has to be said which is meant.",
    "adapter-fused": (
        "The adapter has factors for weights that transformers 5 interleaves or transposes when it loads them, or for "
        "experts that it puts together otherwise than by stacking: no tensor on disk is what they are over. Experts "
        "that are only stacked, and weights that are only cut, joined or permuted, are merged."
    ),
    "adapter-expert-layout": (
        "The factors of all experts of a layer are one tensor, and nothing says how it is laid out: the matrix is "
        "square and no peft_version is recorded, or unsloth wrote it, whose older versions had the experts of lora_B "
        "in another order under the same names. Read in the wrong way the update goes to the wrong experts."
    ),
    "base-experts": (
        "The experts that the base holds are not those that its config counts, or one of them is missing: which one an "
        "adapter's factors belong to can't be said."
    ),
    "adapter-base-moved": "This start (CorDA, LoRA-GA, LoftQ, pissa_niter_N, ...) moves the base by something that "
    "no file holds. PEFT draws it anew when it loads the adapter, and answers are others than in training (CorDA's it "
    "refuses). Save such a run with path_initial_model_for_weight_conversion.",
    "adapter-bias": "lora_B has a bias (lora_bias=True), and the base's layer has none to add it to: PEFT loads such "
    "an adapter, and nobody can merge it. Or the config's `bias` and the tensors disagree.",
    "adapter-biases-lost": "The config says that biases were trained (bias=lora_only, boft_only, ...), and the adapter "
    "does not hold those of its own modules: PEFT before 0.21 does not save them, and loads the base's in their place.",
    "adapter-config": "adapter_config.json can't be read, or lacks what PEFT needs.",
    "adapter-tokens": "The trained token rows do not fit the embedding.",
    "adapter-pattern": "rank_pattern or alpha_pattern has a pattern that is not read.",
    "adapter-field-unknown": "A field of adapter_config.json is set that is not known: it may change the arithmetic, "
    "and versions of PEFT that do not know it ignore it.",
    "adapter-field-unsupported": "A field of adapter_config.json is set whose arithmetic is not implemented here. "
    "PEFT knows it.",
    "peft-type-unsupported": "A PEFT method other than LoRA (IA3, LoHa, OFT, ...), which is not merged here. PEFT "
    "loads it.",
    "peft-type-unmergeable": "A PEFT method that has no merged form: it works at run time, and PEFT loads it.",
    "base-quantised": (
        "Weights that the adapter changes are quantised in the base, which is how QLoRA trains; PEFT loads the adapter "
        "over it. A merge into 4 or 8 bits rounds twice: --dequantize makes the base whole first, as its vendor's own "
        "code does, or merge into the full-precision base. Weights that the adapter leaves alone may stay quantised."
    ),
    "vocab-mismatch": "The adapter was trained with another vocabulary than the base has, and does not bring the rows.",
    "head-class": "The adapter trains a tensor that the class of its head does not have.",
    "head-incomplete": "A part of the head's class was random in training, frozen, and never saved.",
    "tied-scale": "The adapter changes one side of a tie, and the class scales its decoder's outputs by whether there "
    "is one (T5's kin): releases of transformers disagree on what the model says once the two are apart.",
    "tied-copies-differ": "The base stores tied embeddings twice, with different values.",
}

NOT_MERGED_HERE = frozenset(
    {"peft-type-unsupported", "peft-type-unmergeable", "adapter-field-unsupported", "adapter-fused", "base-quantised"}
)
"""Refusals of a merge that say what is not implemented here; PEFT loads these adapters, and some it can merge."""


_MOST_REFUSALS = 8
_OF_THE_LAYERS = ("layer_replication", "target_parameters", "megatron_config")
"""Fields without which the adapter would be over other layers: what refuses then says nothing."""


def _refusals(case: Case) -> list[ConvertError]:
    """Why this adapter does not merge into the base at hand; asked once, from headers."""
    return case.once("merge", _refusals_of_merge)


def _refusals_of_merge(case: Case) -> list[ConvertError]:
    """A field of the config that stops a merge is left out, and the merge is tried again: there may be more."""
    found: list[ConvertError] = []
    without: frozenset[str] = frozenset()
    while len(found) < _MOST_REFUSALS and (error := _try_merge(case, without)) is not None:
        found.append(error)
        name = error.facts.get("field")
        if not isinstance(name, str) or name in {*without, *_OF_THE_LAYERS} or not error.code.startswith("adapter-"):
            break
        without |= {name}
    return found


def _try_merge(case: Case, without: frozenset[str]) -> ConvertError | None:
    from converter.converters.merge.merge_lora import MergeLora
    from converter.sources.hf import peft

    if case.base is None or case.base.kind != "model" or case.survey.error() or case.base.survey.error():
        return None
    try:
        adapter = peft.SOURCE.open(case.root, asked=case.asked)
        if without:
            adapter = adapter.replace(config={k: v for k, v in adapter.config.items() if k not in without})
        base = sources()[case.base.source or "hf"].open(case.base.root, asked=case.base.asked)
        MergeLora(adapters=(adapter,))(base, Context())
    except ConvertError as error:
        return error
    return None


def _merge_refused(code: str) -> Diagnosis:
    def find(case: Case, context: Context) -> Iterable[Finding]:
        mine = [e for e in _refusals(case) if e.code == code]
        if mine and not (code == "adapter-incomplete" and _halves(case)[0]):
            yield _of(mine[0], case, [e.what for e in mine[1:]])

    return Diagnosis(code, find, frozenset({"adapter"}), False, REFUSALS[code])


def _of(error: ConvertError, case: Case, more: Sequence[str] = ()) -> Finding:
    details = [f"expected {error.expected}"] if error.expected else []
    details += [f"got {error.got}"] if error.got else []
    base = f"base: {show(case.base.asked)}" if case.base is not None else ""
    severity = _severity(error, case)
    what = error.what if severity != "cosmetic" else f"not merged here: {error.what}"
    lost = LOST if error.code == "no-op" else ""
    return Finding(
        code=error.code,
        severity=severity,
        text="; ".join((what, *more)),
        evidence=(*details, base)[:3],
        recoverability=lost,
        next=_merging(error, case),
        facts=tuple(error.facts.items()),
    )


def _merging(error: ConvertError, case: Case) -> Next | None:
    """What to do about a refused merge: "the same command" is the merge."""
    return completed(error.next, case.command("merge-lora", out="merged"))


def _severity(error: ConvertError, case: Case) -> Severity:
    """How bad it is for who loads the adapter with PEFT; that it can't be merged here is not a fault of the adapter."""
    if error.code in NOT_MERGED_HERE or (error.code == "adapter-bias" and case.adapter_config.get("lora_bias") is True):
        return "cosmetic"
    start = case.adapter_config.get("init_lora_weights")
    if error.code == "adapter-base-moved" and start != "corda":
        return "changes-numbers"
    if error.code == "adapter-field-unknown" and error.facts.get("field") != "init_lora_weights":
        return "changes-numbers"
    return "error"


@diagnosis("adapter-merge-refused", "adapter")
def adapter_merge_refused(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter does not merge into its base; the message says why."""
    known = {*REFUSALS, "head-base-lost", "head-missing", "no-op", *(f.code for f in case.survey.faults)}
    others = [e for e in _refusals(case) if isinstance(e, Refused | UsageError) and e.code not in known]
    for error in others[:1]:
        yield Finding(
            code="adapter-merge-refused",
            severity="error",
            text=f"{error.code}: {error.what}",
            next=_merging(error, case),
        )


@diagnosis("lora-alpha-zero", "adapter")
def lora_alpha_zero(case: Case, context: Context) -> Iterable[Finding]:
    """lora_alpha is 0 in adapter_config.json: whatever was trained is multiplied by nothing, and the merge is the base
    model, byte for byte. verl's merger writes 0 where it does not know the value. The number is in the training script.
    """
    if case.adapter_config.get("lora_alpha") == 0:
        text = "lora_alpha is 0: a merge would give the base model back. The training script has the value"
        advice = case.command("merge-lora", out="merged").with_options("--lora-alpha", "N")
        yield Finding(code="lora-alpha-zero", severity="error", text=text, evidence=(ADAPTER_CONFIG,), next=advice)


@diagnosis("no-op", "adapter")
def no_op(case: Case, context: Context) -> Iterable[Finding]:
    """Every lora_B is zero: the adapter does nothing. It was saved before the first step, from a rank that did not
    train, or is a zero-filled `repair` of an empty one. Merged, it is the base model.
    """
    if case.adapter_config.get("lora_alpha") == 0:
        return
    for error in _refusals(case):
        if error.code == "no-op":
            yield _of(error, case)
            return
    if not case.deep:
        return
    factor, begun = factor_in_name(), zero_factors()
    second = {n: e for n, e in case.survey.entries.items() if (m := factor.match(n)) and m["kind"] in begun}
    filled = {n: e for n, e in second.items() if e.info.numel}
    if filled and all(_is_zero(e, context) for e in filled.values()):
        text = f"all {len(filled)} lora_B are zero: the adapter does nothing"
        yield Finding(
            code="no-op",
            severity="error",
            text=text,
            tensors=tuple(filled),
            evidence=folded(case, filled),
            recoverability=LOST,
        )


def _is_zero(entry: StoredTensor, context: Context) -> bool:
    return context.is_zero(entry.tensor)


def _halves(case: Case) -> tuple[tuple[str, ...], int]:
    """Modules that lack one of their factors, and how many modules there are."""
    found: dict[str, set[str]] = {}
    for name in case.shapes:
        if match := factor_in_name().match(name):
            found.setdefault(match["module"], set()).add(match["kind"])
    has_magnitude = case.adapter_config.get("use_dora") is True

    def is_half(kinds: set[str]) -> bool:
        """One factor of a pair, or DoRA's magnitude without factors, or factors without it."""
        lacks = has_magnitude and (LORA_MAGNITUDE in kinds) != bool(kinds - {LORA_MAGNITUDE})
        return lacks or any(len(kinds & set(pair)) == 1 for pair in factor_pairs())

    alone = [m for m, kinds in found.items() if is_half(kinds)]
    return tuple(sorted(alone)), len(found)


@diagnosis("adapter-half", "adapter")
def adapter_half(case: Case, context: Context) -> Iterable[Finding]:
    """Modules have lora_A without lora_B, or the reverse: half of them was not saved. One without the other means
    nothing, and PEFT fills the missing half with its start.
    """
    alone, count = _halves(case)
    if alone:
        what = "lack a LoRA factor" if case.adapter_config.get("use_dora") is True else "have one LoRA factor only"
        text = f"{len(alone)} of {count} modules {what}: {fold(alone)}"
        places = case.training_near()
        found = f"from {places[0].asked}" if places else LOST
        yield Finding(
            code="adapter-half",
            severity="error",
            text=text,
            tensors=alone,
            evidence=alone[:3],
            recoverability=found,
            fix=("fill",),
            next=filling_command(case),
        )


@diagnosis("adapter-targets-missing", "adapter")
def adapter_targets_missing(case: Case, context: Context) -> Iterable[Finding]:
    """The adapter has tensors for fewer layers than target_modules names in the base: a part was not saved (an
    adapter of 443 bytes is the extreme), or was saved by one rank only. PEFT fills the rest with its start, which
    changes nothing, and warns of missing keys at most.
    """
    if case.base is None or not is_read_whole(case):
        return
    dimensions = {n: len(i.shape) for n, i in case.base.shapes.items()}
    lacks = tuple(modules_missing(case.shapes, case.adapter_config, dimensions, case.base.config))
    if lacks:
        yield Finding(
            code="adapter-targets-missing",
            severity="error",
            text=f"{len(lacks)} modules that adapter_config.json names are not in the adapter: {fold(lacks)}",
            tensors=lacks,
            evidence=(fold(lacks),),
            recoverability="",
        )


@diagnosis("base-differs", "adapter")
def base_differs(case: Case, context: Context) -> Iterable[Finding]:
    """The base model that was given is not the one that the adapter records. Shapes may fit all the same (an instruct
    version, an already merged model): the result is then not what was trained.
    """
    recorded = case.adapter_config.get("base_model_name_or_path")
    if case.base is None or not isinstance(recorded, str) or not recorded:
        return
    if recorded.rstrip("/").rpartition("/")[2] != case.base.asked.rstrip("/").rpartition("/")[2]:
        text = f"the adapter records {show(recorded)} as its base, and {show(case.base.asked)} was given"
        yield Finding(code="base-differs", severity="cosmetic", text=text)


DIAGNOSES = (
    lora_alpha_zero,
    no_op,
    adapter_half,
    adapter_targets_missing,
    adapter_keys_named,
    base_differs,
    adapter_inconsistent,
    adapter_untargeted,
    adapter_merge_refused,
    *(_merge_refused(code) for code in REFUSALS),
)
