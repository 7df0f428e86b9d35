"""Faults of config.json, generation_config.json and the tokenizer's files, against each other and the weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from converter.core.context import Context
from converter.core.files.names import ADAPTER_CONFIG, GENERATION_CONFIG, MODEL_CONFIG, TOKENIZER_CONFIG
from converter.diagnostic import Next, Severity
from converter.dialects.known import entries_of, own_classes
from converter.errors import Refused
from converter.examine.diagnoses.aims import is_transformers_4
from converter.examine.diagnoses.case import HERE, LOST, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.whole import is_vocabulary_alone
from converter.families.family import family
from converter.families.old_spellings import missing_spellings
from converter.families.quantised.left import LEFT, is_left
from converter.families.words import CLASSIFIER_WEIGHT, INPUT, NOT_TEXT, OUTPUT
from converter.text import fold, show

_CLASSIFIER = re.compile(r"For(?:Sequence|Token)Classification$")
_WRAPPERS = re.compile(r"^(?:FSDP|DDP|Peft|DistributedDataParallel)\w+")
_MORE_ROWS = {"mllama_text_model": 8, "moshi": 1}
"""Input embeddings that have rows beyond the vocabulary by design, by model type.

Source: `nn.Embedding(config.vocab_size + 8, ...)` of MllamaTextModel, `+ 1` of MoshiModel, transformers 5.23.
"""
_MAX_FIXED_LABELS = 1024


def architecture(case: Case) -> str:
    """The class that the config names, or nothing."""
    names = case.config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def is_classifier(case: Case) -> bool:
    """True for reward models and critics of transformers' own classes."""
    return _CLASSIFIER.search(architecture(case)) is not None


@diagnosis("config-unreadable", "model", "adapter")
def config_unreadable(case: Case, context: Context) -> Iterable[Finding]:
    """A JSON file beside the weights can't be read: cut, with a key twice, nested without end, or saved with a byte
    order mark. Loaders either stop at it or go on with defaults, which changes numbers. Restore it from the base model
    or from another checkpoint of the run.
    """
    for name in (MODEL_CONFIG, ADAPTER_CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG):
        error = case.json_error(name)
        if error is not None and not any(f.code == error.code for f in case.survey.faults):
            severity: Severity = "error" if name in (MODEL_CONFIG, ADAPTER_CONFIG) else "changes-numbers"
            yield Finding(code="config-unreadable", severity=severity, text=f"{name}: {error.what}", evidence=(name,))


@diagnosis("architecture-missing", "model")
def architecture_missing(case: Case, context: Context) -> Iterable[Finding]:
    """config.json has no `architectures`. Python code that names the class itself loads the model; serving engines and
    trainers that choose by the architecture (vLLM, ms-swift, verl) refuse it or choose wrongly.
    """
    if case.config and not architecture(case):
        text = "config.json names no architecture: engines that choose by it refuse the model"
        yield Finding(code="architecture-missing", severity="cosmetic", text=text)


@diagnosis("architecture-wrapper", "model")
def architecture_wrapper(case: Case, context: Context) -> Iterable[Finding]:
    """`architectures` names a wrapper of the trainer (FSDPQwen2ForCausalLM, PeftModel...), which no engine knows: `is
    not a registered model`. The class within is what belongs there.
    """
    name = architecture(case)
    if _WRAPPERS.match(name):
        text = f"architectures is [{show(name)}], the trainer's wrapper: no engine knows that class"
        yield Finding(
            code="architecture-wrapper",
            severity="error",
            text=text,
            recoverability=HERE,
            fix=("fix-architecture",),
            applicability="safe",
        )


@diagnosis("architecture-openrlhf", "model")
def architecture_openrlhf(case: Case, context: Context) -> Iterable[Finding]:
    """OpenRLHF builds its classes on the fly and saves `architectures: ["RewardModel"]` or `["CriticModel"]`. OpenRLHF
    loads that; AutoModelForSequenceClassification ignores it; vLLM, ms-swift and verl do not know it.
    """
    if architecture(case) in own_classes() and case.trainer != "openrlhf":
        text = (
            f"architectures is [{architecture(case)}], a class of OpenRLHF's own: other trainers and engines "
            f"do not know it"
        )
        command = case.command("rm-to-critic", "--to", "trl", out="converted")
        yield Finding(code="architecture-openrlhf", severity="cosmetic", text=text, recoverability=HERE, next=command)


@diagnosis("labels-mismatch", "model")
def labels_mismatch(case: Case, context: Context) -> Iterable[Finding]:
    """The head has other rows than the config has labels. transformers makes a head of as many rows as the config
    says (two, if it says nothing) and stops at the sizes: `size mismatch for score.weight: [1, h] ... [2, h]`. With
    ignore_mismatched_sizes=True it goes on with a RANDOM head. The number of rows is what was trained; the config has
    to follow it.
    """
    if not is_classifier(case):
        return
    labels = label_count(case.config)
    for name, info in case.shapes.items():
        if CLASSIFIER_WEIGHT.match(name) and info.shape and info.numel and info.shape[0] != labels:
            rows = "1 row" if info.shape[0] == 1 else f"{info.shape[0]} rows"
            text = f"{show(name)} has {rows} and config.json says {labels} labels"
            yield Finding(
                code="labels-mismatch",
                severity="error",
                text=text,
                tensors=(name,),
                evidence=folded(case, [name]),
                recoverability=HERE,
                fix=("fix-labels",),
                applicability="safe",
                next=case.repair(),
            )


def label_count(config: Mapping[str, Any]) -> int:
    """The number of labels that transformers makes of a config."""
    names = config.get("id2label")
    if isinstance(names, dict) and names:
        return len(names)
    number = config.get("num_labels")
    return number if isinstance(number, int) and 0 < number <= _MAX_FIXED_LABELS else 2


@diagnosis("pad-token-missing", "model")
def pad_token_missing(case: Case, context: Context) -> Iterable[Finding]:
    """A reward model without `pad_token_id` in its config: `Cannot handle batch sizes > 1 if no padding token is
    defined`, or rewards that depend on the batch, since the last token is found by the padding. The tokenizer's own
    pad token belongs there. (A critic's class gives a value for every token, and encoders score the first one.)
    """
    if not architecture(case).endswith("ForSequenceClassification") or case.config.get("pad_token_id") is not None:
        return
    if case.text_config.get("pad_token_id") is not None or case.config.get("is_encoder_decoder") is True:
        return
    if family(case.config).is_encoder:
        return
    from converter.converters.merge.task_head import pad_token_of
    from converter.core.side_files import find_side_files

    known = pad_token_of(find_side_files(case.root, keep_code=False)[0])
    text = "config.json has no pad_token_id: batches of more than one row fail or are scored at the wrong place"
    if known is not None:
        text += f". The tokenizer's pad token is {known}"
    command = case.repair() if known is not None else None
    next_step: Next = command or "set pad_token_id in config.json to the id that training used"
    yield Finding(
        code="pad-token-missing",
        severity="changes-numbers",
        text=text,
        recoverability=HERE if known is not None else "",
        fix=("fix-pad-token",) if known is not None else (),
        applicability="safe" if known is not None else "display-only",
        next=next_step,
    )


@diagnosis("pad-is-eos", "model")
def pad_is_eos(case: Case, context: Context) -> Iterable[Finding]:
    """The pad token is the end-of-text token. A reward model that finds the last token by its padding then reads the
    score before the end-of-text token in some trainers and at it in others: the same model gives other rewards. It is
    never changed silently, since training may have run so; what counts is what training used.
    """
    pad, eos = case.config.get("pad_token_id"), case.config.get("eos_token_id")
    ends = eos if isinstance(eos, list) else [eos]
    if is_classifier(case) and isinstance(pad, int) and pad in ends:
        text = f"pad_token_id {pad} is the end-of-text token as well: where rewards are read depends on the trainer"
        yield Finding(code="pad-is-eos", severity="cosmetic", text=text)


@diagnosis("vocabulary-rows", "model")
def vocabulary_rows(case: Case, context: Context) -> Iterable[Finding]:
    """The embedding has other rows than config.json's vocab_size: padded in training (to a multiple of 8, 64 or 128),
    or grown by added tokens without the config following. transformers stops at the sizes; engines stop with
    `loaded_weight.shape[output_dim] == self.org_vocab_size`.
    """
    size = case.text_config.get("vocab_size")
    if not isinstance(size, int) or isinstance(size, bool):
        return
    grown = size + _MORE_ROWS.get(str(case.text_config.get("model_type")), 0)
    wrong = [
        n
        for n, i in case.shapes.items()
        if (INPUT.search(n) or OUTPUT.search(n))
        and len(i.shape) == 2
        and i.numel
        # One row is a value head under this name, as Megatron's saver writes it.
        and i.shape[0] not in (grown if INPUT.search(n) else size, 1)
        and not is_part_of_vision(n)
    ]
    if wrong and is_vocabulary_alone(case):
        rows = case.shapes[wrong[0]].shape[0]
        verb = "has" if len(wrong) == 1 else "have"
        text = f"config.json says vocab_size {size}, and {fold(wrong)} {verb} {rows} rows"
        yield Finding(
            code="vocabulary-rows",
            severity="error",
            text=text,
            tensors=tuple(wrong),
            evidence=folded(case, wrong),
            recoverability=HERE,
            fix=("fix-vocabulary",),
            applicability="unsafe",
            next=case.repair("--allow", "vocabulary-rows"),
        )


def is_part_of_vision(name: str) -> bool:
    """True for tensors of an image or audio tower, whose embeddings are no vocabulary."""
    return any(word in name for word in NOT_TEXT)


@diagnosis("end-tokens-lost", "model")
def end_tokens_lost(case: Case, context: Context) -> Iterable[Finding]:
    """generation_config.json knows fewer end-of-text tokens than config.json or the base model's: a chat model with two
    of them ([151645, 151643]) that is left with one does not stop where it should, and generates to the limit.
    """
    own = _ends(case.json(GENERATION_CONFIG)) or _ends(case.config)
    base = case.base
    if base is None or not own:
        return
    theirs = _ends(base.json(GENERATION_CONFIG))
    lost = sorted(theirs - own)
    if len(theirs) > 1 and own & theirs and lost:
        text = f"the base model ends its answers at {sorted(theirs)}, this one only at {sorted(own)}: {lost} got lost"
        yield Finding(
            code="end-tokens-lost", severity="changes-numbers", text=text, recoverability=f"from {show(base.asked)}"
        )


def _ends(config: Mapping[str, Any]) -> set[int]:
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return {v for v in values if isinstance(v, int) and not isinstance(v, bool)}


@diagnosis("tokenizer-of-transformers-5", "model", "adapter")
def tokenizer_of_transformers_5(case: Case, context: Context) -> Iterable[Finding]:
    """tokenizer_config.json was saved by transformers 5 (`TokenizersBackend`, or extra_special_tokens as a list), which
    transformers 4 can't read: `Tokenizer class TokenizersBackend does not exist`, `'list' object has no attribute
    'keys'`. Only looked at under `--for transformers@4`, or for trainers that pin transformers 4.
    """
    if not is_transformers_4(case.target) and not any(s.pins_transformers == "4" for s in entries_of(case.trainer)):
        return
    config = case.json(TOKENIZER_CONFIG)
    marks = {
        "tokenizer_class": config.get("tokenizer_class") == "TokenizersBackend",
        "extra_special_tokens": isinstance(config.get("extra_special_tokens"), list),
    }
    wrong = [key for key, is_new in marks.items() if is_new]
    if wrong:
        text = f"tokenizer_config.json is of transformers 5 ({', '.join(wrong)}): transformers 4 can't read it"
        command = case.repair("--for", "transformers@4")
        yield Finding(
            code="tokenizer-of-transformers-5",
            severity="error",
            text=text,
            evidence=tuple(wrong),
            recoverability=HERE,
            fix=("fix-for-transformers-4",),
            applicability="safe",
            next=command,
        )


@diagnosis("rope-of-transformers-5", "model")
def rope_of_transformers_5(case: Case, context: Context) -> Iterable[Finding]:
    """config.json has `rope_parameters` and other new keys only, as transformers 5 writes it. Older stacks read
    `rope_theta`, `rope_scaling`, `rotary_pct` and their like, do not find them, and go on with their defaults: the
    model loads and answers worse, with no message. Both spellings side by side are read rightly by all.
    """
    is_old = is_transformers_4(case.target)
    severity: Severity = "changes-numbers" if is_old else "cosmetic"
    try:
        missing = missing_spellings(case.config, case.folder)
    except Refused as error:
        if is_old:
            yield Finding(code="rope-of-transformers-5", severity=severity, text=error.what, recoverability=LOST)
        return
    if missing:
        text = f"{fold(missing)} {'stands' if len(missing) == 1 else 'stand'} in config.json as transformers 5 writes "
        text += "it: transformers 4 would go on with its defaults, silently"
        command = case.repair("--for", "transformers@4")
        yield Finding(
            code="rope-of-transformers-5",
            severity=severity,
            text=text,
            recoverability=HERE,
            fix=("fix-for-transformers-4",),
            applicability="safe",
            next=command,
        )


@diagnosis("remote-code-missing", "model")
def remote_code_missing(case: Case, context: Context) -> Iterable[Finding]:
    """`auto_map` in the config names Python files that are not in the folder: `does not appear to have a file named
    modeling_x.py`. They have to be copied from the base model; look at them before running them.
    """
    from converter.converters.merge.remote_code import code_files

    missing = sorted(code_files(case.config) - case.names)
    if missing:
        text = f"auto_map names {fold(missing)}, and the folder does not have {'it' if len(missing) == 1 else 'them'}"
        yield Finding(
            code="remote-code-missing",
            severity="error",
            text=text,
            evidence=tuple(show(m) for m in missing[:3]),
            recoverability="from the base model",
        )


@diagnosis("quantisation-left", "model")
def quantisation_left(case: Case, context: Context) -> Iterable[Finding]:
    """config.json says that the weights are quantised, and no tensor is: the loader looks for scales that are not
    there, or quantises what is whole. A merge or a cast wrote full-precision weights and kept the base's config.
    """
    if is_left(case.config, case.shapes):
        method = case.config["quantization_config"].get("quant_method")
        text = f"quantization_config ({show(method)}) is in config.json, and every weight is whole"
        yield Finding(code=LEFT, severity="error", text=text, recoverability=HERE)


@diagnosis("dtype-differs", "model")
def dtype_differs(case: Case, context: Context) -> Iterable[Finding]:
    """The weights are of another dtype than config.json says: twice the size that was expected (fp32 masters written
    for a bf16 model), or half the bits. Loaders that go by the config cast silently.
    """
    said = case.config.get("dtype", case.config.get("torch_dtype"))
    sizes: dict[str, int] = {}
    for info in case.shapes.values():
        if info.dtype.is_float:
            sizes[info.dtype.torch_name] = sizes.get(info.dtype.torch_name, 0) + info.nbytes
    if not isinstance(said, str) or not sizes:
        return
    main = max(sizes, key=lambda d: sizes[d])
    if said in ("float32", "bfloat16", "float16") and main in ("float32", "bfloat16", "float16") and said != main:
        text = f"config.json says {said}, and most of the weights are {main}"
        command = case.command("reshard", "--dtype", said, out=said)
        yield Finding(
            code="dtype-differs",
            severity="cosmetic",
            text=text,
            recoverability=HERE,
            fix=("cast",),
            applicability="unsafe",
            next=command,
        )
