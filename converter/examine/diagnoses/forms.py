"""Forms that one library writes and another can't read: headers without a format, positions left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from converter.converters.heads.detect import head_like
from converter.core.context import Context
from converter.core.files.names import MODEL_CONFIG
from converter.core.formats.safetensors_io import read_header
from converter.errors import ConvertError
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis, folded
from converter.examine.diagnoses.commands import convert_command
from converter.examine.diagnoses.whole import head_of_another_class
from converter.text import fold, show


@diagnosis("format-missing", "model", "adapter")
def format_missing(case: Case, context: Context) -> Iterable[Finding]:
    """The safetensors header has no `format` in its metadata. transformers before 4.4x stops: `'NoneType' object has no
    attribute 'get'`; newer ones take it for PyTorch's. Writing the folder anew adds it.
    """
    first = next((n for n in case.survey.files if n.endswith(".safetensors")), None)
    if first is None:
        return
    try:
        metadata = read_header(case.root / first, root=case.root).metadata
    except (ConvertError, OSError):
        return
    if "format" not in metadata:
        text = f"{show(first)} does not say its format: older versions of transformers can't read it"
        can_rewrite = case.kind == "model" and all(fault.code != "config-missing" for fault in case.survey.faults)
        command = case.command("reshard", out="fixed") if can_rewrite else None
        yield Finding(
            code="format-missing",
            severity="cosmetic",
            text=text,
            evidence=(show(first),),
            recoverability=HERE,
            next=command,
        )


@diagnosis("weights-wrapped", "model")
def weights_wrapped(case: Case, context: Context) -> Iterable[Finding]:
    """The tensors in a pickled weight file lie under a key, as in `torch.save({"model": ..., "optimizer": ...})`.
    `from_pretrained` looks at the top and finds none of its names: `'dict' object has no attribute
    'is_floating_point'`, or random weights. They are read here; writing the folder anew puts them where loaders look.
    """
    if not case.survey.wrapped:
        return
    name, keys = next(iter(case.survey.wrapped.items()))
    where = "".join(f"[{key!r}]" for key in keys)
    text = (
        f"the tensors of {show(name)} lie under {where}: loaders look at the top, and stop or start from random weights"
    )
    can_rewrite = case.survey.error() is None
    yield Finding(
        code="weights-wrapped",
        severity="error",
        text=text,
        evidence=tuple(f"{show(n)}: {'.'.join(k)}" for n, k in list(case.survey.wrapped.items())[:3]),
        recoverability=HERE,
        next=case.command("reshard", out="fixed") if can_rewrite else None,
    )


@diagnosis("rope-lost", "model")
def rope_lost(case: Case, context: Context) -> Iterable[Finding]:
    """The base model stretches its positions (rope_scaling, or a rope_type other than default) and this config does
    not, or has other limits: on long texts the model answers otherwise than in training, with no message.
    """
    if case.base is None:
        return
    own, theirs = _positions(case.text_config), _positions(case.base.text_config)
    if theirs.get("type") not in (None, "default") and own != theirs:
        said = own.get("type") or "none"
        base = f"{show(case.base.asked)} has rope scaling {show(theirs['type'])}"
        text = f"{base}, this config {show(said)} or other numbers"
        yield Finding(
            code="rope-lost",
            severity="changes-numbers",
            text=text,
            evidence=(MODEL_CONFIG,),
            recoverability=f"from {show(case.base.asked)}",
        )


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are stretched, in one spelling for versions 4 and 5 of transformers."""
    found: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping) and not any(isinstance(v, dict) for v in value.values()):
            found = {**value, **found}
    kind = found.pop("rope_type", None) or found.pop("type", None)
    found.pop("rope_theta", None)
    return {"type": kind, **{k: v for k, v in found.items() if k != "type"}}


@diagnosis("architecture-head", "model")
def architecture_head(case: Case, context: Context) -> Iterable[Finding]:
    """config.json names one class of transformers, and the head in the files is another's: a reward model
    (`score.weight`) whose config still says ForCausalLM, a critic (`classifier`) under ForSequenceClassification. What
    goes by the class (vLLM, AutoModel with trust in `architectures`) drops the head and makes its own RANDOM; trainers
    that name their class themselves load it. `convert` writes the class that the head is of.
    """
    found = head_of_another_class(case)
    if found is None:
        return
    named, heads = show(case.config["architectures"][0]), head_like(case.shapes)
    text = f"config.json names {named}, and {fold(heads)} is the head of {found.dialect.about}"
    yield Finding(
        code="architecture-head",
        severity="error",
        text=f"{text}: a loader that goes by the class drops it, and makes its own at RANDOM",
        tensors=tuple(heads),
        evidence=folded(case, heads),
        recoverability=HERE,
        next=convert_command(case, "reward" if found.dialect.reward else "critic"),
    )
