"""`rlhf-convert inspect`: what a folder holds, from headers and configs alone, broken or not."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.blanks import has_blank, new_name
from converter.cli.lines import adapter_kind, dtype_word, line, next_lines, short_revision
from converter.cli.sink import Sink
from converter.converters.merge.quantised.full_precision import full_precision_in
from converter.diagnostic import PROGRAM, Command, Next, as_argument, commands, is_command
from converter.errors import ConvertError
from converter.examine import facts
from converter.families.family import label_count
from converter.recipe.verbs import inspect as verb
from converter.recipe.verbs.inspect import LORA_MARK
from converter.text import fold, format_size, show

if TYPE_CHECKING:
    from converter.core.tensors.dtypes import TensorInfo
    from converter.recipe.verbs.inspect import Inspection
    from converter.sources.survey import Survey


def inspect(
    asked: str, revision: str | None, sink: Sink, *, tensors: bool = False, allow_name: Sequence[str] = ()
) -> int:
    """Show what a folder holds; exit code 1 where something is wrong with it."""
    found = verb.inspect(asked, revision=revision, allow_name=allow_name)
    sink.screen(_screen(found, tensors=tensors))
    sink.json(_json(found))
    return 1 if found.report.worst() in ("error", "changes-numbers") else 0


def screen(asked: str) -> list[str]:
    """What `inspect` prints."""
    return _screen(verb.inspect(asked))


def _screen(found: Inspection, *, tensors: bool = False) -> list[str]:
    case = found.report.case
    at = f"@{show(short_revision(found.revision))}" if found.revision else ""
    if case.kind == "run":
        return [f"{show(found.asked)}: a run's folder", *_inside(found), *next_lines(_next(found))]
    lines = _adapter(found) if found.is_adapter else _model(found)
    kind = {"training": f"shards of a training run ({case.source})", "run": "a run's folder"}.get(
        found.kind, found.kind
    )
    title = adapter_kind(found.config) if found.is_adapter else _family(found.config)
    return [
        f"{show(found.asked)}{at}: {kind}, {title}",
        *lines,
        *_around(found),
        *(_tensors(found.survey) if tensors else []),
        *_verdict(found),
        *_read(found),
        *next_lines(_next(found)),
    ]


def _around(found: Inspection) -> list[str]:
    """Its stacks of layers, the files beside the weights, and who saved it."""
    case = found.report.case
    present, missing = facts.files_beside(case)
    files = [fold(present, most=6)] if present else []
    files += [f"no {', no '.join(missing)}"] if missing and not found.is_training else []
    return [
        *(line("layers", each) for each in facts.layers(n.removesuffix(".weight") for n in found.survey.entries)),
        *([line("files", "; ".join(files))] if files else []),
        *([line("saved by", ", ".join(made))] if (made := facts.made_by(case)) else []),
    ]


def _read(found: Inspection) -> list[str]:
    """How little of a model on the Hub was transferred."""
    from converter.core.files import sparse

    read = [f for f in sparse.known() if f.path.is_relative_to(found.path)]
    if not read:
        return []
    count = sum(f.fetched for f in read)
    return [line("read", f"{format_size(count)} of the {format_size(sum(f.size for f in read))} on the Hub")]


def _inside(found: Inspection) -> list[str]:
    """The checkpoints that lie in a run's folder, by the numbers in their names."""
    from converter.examine.doctor import checkpoints_in
    from converter.sources.finding import kind_of

    below = checkpoints_in(found.path)
    return [line("", f"{show(_below(found, p))} ({kind_of(p)})") for p in below[-20:]]


def _below(found: Inspection, folder: Path) -> str:
    from converter.sources.hub.names import as_reference

    return f"{as_reference(found.asked).rstrip('/')}/{folder.name}"


# Models


def _family(config: Mapping[str, Any]) -> str:
    """`Qwen2ForSequenceClassification (qwen2), 1 label`."""
    architectures = config.get("architectures")
    name = show(architectures[0]) if isinstance(architectures, list) and architectures else "no architecture recorded"
    family = f" ({show(config['model_type'])})" if config.get("model_type") else ""
    labels = label_count(config) if "ForSequenceClassification" in name else None
    return name + family + ("" if labels is None else f", {labels} {'label' if labels == 1 else 'labels'}")


def _model(found: Inspection) -> list[str]:
    lines = [_weights(found), *_quantised(found), *_beside(found.survey), *_shape(found.config)]
    heads = found.heads
    if heads:
        lines.append(line("head", "; ".join(f"{show(n)} {_shape_of(found.survey, n)}" for n in heads)))
    known, norm = facts.dialect(found.report.case), facts.normaliser(found.config)
    lines += [line("", f"read as {known}")] if known else []
    lines += [line("", f"rewards are normalised: {norm}")] if known and norm else []
    from converter.families.ties import find_ties

    for group in find_ties(found.survey.entries, found.config):
        stored = [n for n in group if n in found.survey.entries]
        how = "" if len(stored) < len(group) else " (both are stored)"
        lines.append(line("tied", f"{' = '.join(show(n) for n in group)}{how}"))
    return lines


def _quantised(found: Inspection) -> list[str]:
    """`quantised: 196 NF4, doubly quantised`: weights by how they are stored; the other tensors are whole."""
    held = found.quantised
    if not held.method:
        return []
    names = f": {fold([w.name for w, _ in held.weights], most=4)}" if held.weights else ""
    lines = [line("", f"quantised: {held.words or held.title}{names}")]
    lines += [line("", f"can't be made whole here: {held.unsupported}")] if held.unsupported else []
    made_of = full_precision_in(found.path, found.config, (found.asked.removeprefix("hf://"), found.asked))
    return lines + ([line("", f"made from {show(made_of)}, which is in full precision")] if made_of else [])


def _weights(found: Inspection) -> str:
    """`weights  7.07 B parameters in 339 tensors, bf16, 14.1 GB in 4 files`."""
    survey, files = found.survey, len(found.survey.files)
    return line(
        "weights",
        f"{_count(found.parameters)} parameters in {len(survey.entries)} tensors, {_dtypes(survey)}, "
        f"{format_size(sum(survey.files.values()))} in {files} {'file' if files == 1 else 'files'}",
    )


def _beside(survey: Survey) -> list[str]:
    """`beside   value_head.safetensors: v_head.summary.weight (1, 64) fp32`."""
    return [
        line(
            "beside",
            f"{show(file)}: " + ", ".join(f"{show(n)} {_shape_and_type(t.info)}" for n, t in found.tensors.items()),
        )
        for file, found in survey.beside.items()
    ]


def _dtypes(survey: Survey) -> str:
    sizes: Counter[Any] = Counter()
    for entry in survey.entries.values():
        sizes[entry.info.dtype] += max(entry.info.nbytes, 1)
    return " and ".join(dtype_word(d) for d, _ in sizes.most_common()) or "no tensors"


def _count(number: int) -> str:
    """`7.07 B`, `494 M`, `120 K`: parameters as people count them."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 999.5 * size else f"{number / size:.0f} {unit}"
    return str(number)


_SHAPE_KEYS = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "vocabulary": ("vocab_size",),
}


def _shape(config: Mapping[str, Any]) -> list[str]:
    inner = config.get("text_config")
    nested = inner if isinstance(inner, Mapping) else {}
    words = []
    for word, keys in _SHAPE_KEYS.items():
        value = next((c[k] for k in keys for c in (config, nested) if isinstance(c.get(k), int)), None)
        if value is not None:
            words.append(f"{word} {value}")
    return [line("shape", ", ".join(words))] if words else []


def _shape_of(survey: Survey, name: str) -> str:
    return _shape_and_type(survey.entries[name].info)


def _shape_and_type(info: TensorInfo) -> str:
    return f"({', '.join(map(str, info.shape))}) {dtype_word(info.dtype)}"


# Adapters


def _adapter(found: Inspection) -> list[str]:
    survey = found.survey
    modules = {n.partition(LORA_MARK)[0] for n in survey.entries if LORA_MARK in n}
    kinds = Counter(m.rpartition(".")[2] for m in modules)
    whole = [n for n in survey.entries if LORA_MARK not in n]
    lines = [line("base", _base(found.config)), _weights(found)]
    if modules:
        listed = ", ".join(f"{show(k)}" for k in sorted(kinds))
        lines.append(line("targets", f"{len(modules)} modules: {listed}"))
    if whole:
        lines.append(line("whole", f"{len(whole)} {'tensor' if len(whole) == 1 else 'tensors'}: {fold(whole)}"))
    return lines + _beside(survey)


def _base(config: Mapping[str, Any]) -> str:
    """The base that the adapter records, and whether it is at hand."""
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        return "not recorded; name it with --base"
    if not _base_at_hand(config):
        return f"{show(name)}, neither here nor in the Hub's cache"
    return f"{show(name)}, {'here' if Path(name).expanduser().is_dir() else 'in the Hub cache'}"


def _base_at_hand(config: Mapping[str, Any]) -> bool:
    from converter.sources.locate import resolve

    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        return False
    try:
        resolve(name, revision=revision if isinstance(revision, str) and revision else None, allow_download=False)
    except ConvertError:
        return False
    return True


def _tensors(survey: Survey) -> list[str]:
    """Every tensor with its shape, dtype and file."""
    return [f"  {show(n)}  {_shape_and_type(e.info)}  {show(Path(e.file).name)}" for n, e in survey.entries.items()]


# Faults and what to do


def _verdict(found: Inspection) -> list[str]:
    """Doctor's findings, a line or two each."""
    from converter.cli.tell.doctor import WIDTH, WORDS
    from converter.examine.doctor import file_of

    lines = []
    for finding in found.findings:
        how = {"": "", "lost": "; lost", "here": ""}.get(finding.recoverability, f"; {finding.recoverability}")
        file = file_of(finding, found.report.case)
        about = f"{file}: " if file else ""
        text = line(WORDS[finding.severity], f"{finding.code}: {about}{finding.text}{how}")
        indent = " " * len(line("", ""))
        lines += textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    if lines:
        return [*lines, line("", f"{Command('doctor', (as_argument(found.asked),))} says more")]
    without = f"; {found.report.not_compared}" if found.report.not_compared else ""
    return textwrap.wrap(
        line("faults", f"none found in headers and configs{without}"),
        WIDTH, subsequent_indent=" " * len(line("", "")), break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _next(found: Inspection) -> list[Next]:
    path = as_argument(found.asked)
    if found.kind == "run":
        from converter.examine.doctor import checkpoints_in

        return [Command("inspect", (_below(found, checkpoints_in(found.path)[-1]),))]
    if found.has_errors:
        held = (command for f in found.findings for command in commands(f.next)[:1] if is_command(f.next))
        return [c for c in dict.fromkeys(held) if c.program == PROGRAM]
    if found.report.is_for_others():
        return []
    if found.is_training:
        told: list[Next] = [f.next for f in found.findings if f.code == "training-state" and f.next]
        return told or [Command("gather", (path, new_name(path, "gathered")))]
    # A head that only its own trainer finds: no other command moves it to where others look.
    steps: list[Next] = [f.next for f in found.findings if f.code == "head-dialect" and f.next]
    if found.is_adapter:
        from converter.sources.hub.names import as_base

        named = as_base(found.config.get("base_model_name_or_path"), found.config.get("revision"))
        base = () if _base_at_hand(found.config) else ("--base", named)
        merge = Command("merge-lora", (path, new_name(path, "merged"), *base))
        # Of an adapter that names no base doctor says what it fits.
        return [*steps, Command("doctor", (path,)) if has_blank(merge) else merge]
    if found.quantised.weights and not found.quantised.unsupported:
        return [*steps, Command("reshard", (path, new_name(path, "whole"), "--dequantize"))]
    return [*steps, Command("reshard", (path, new_name(path, "resharded"), "--max-shard-size", "5GB"))]


def _json(found: Inspection) -> dict[str, Any]:
    survey = found.survey
    return {
        "path": found.asked,
        "revision": found.revision,
        "detected": found.kind,
        "source": found.report.case.source,
        "architectures": found.config.get("architectures"),
        "model_type": found.config.get("model_type"),
        "peft_type": found.config.get("peft_type"),
        "base": found.config.get("base_model_name_or_path"),
        "parameters": found.parameters,
        "tensors": len(survey.entries),
        "dtypes": [d.value for d in found.dtypes],
        "files": dict(survey.files),
        "heads": {n: list(shape) for n, shape in found.heads.items()},
        "saved_by": list(found.saved_by),
        "side_files": list(found.side_files),
        "not_compared": found.report.not_compared or None,
        "findings": [f.to_json() for f in found.findings],
    }
