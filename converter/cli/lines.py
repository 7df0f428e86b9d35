"""What a run looks like on a screen: pure functions from values to lines of text. Nothing here prints."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from converter.core.checkpoint import MODEL, STATE
from converter.core.compute.finite import ZEROS
from converter.core.compute.measures import energy_kept, has_update, relative_size, surviving_share
from converter.diagnostic import Again, Command, Next, Steps, is_command, parts
from converter.errors import ConvertError, Refused
from converter.families.family import label_count
from converter.text import fold, format_duration, format_size, show

if TYPE_CHECKING:
    from converter.core.checkpoint import Checkpoint
    from converter.core.context import Note
    from converter.core.tensors.dtypes import DType
    from converter.core.writer.plan import Plan
    from converter.core.writer.shard_plan import Entry

LABEL_WIDTH = 9
"""Column at which the text of a screen's lines begins."""

_KEPT = "\0"
"""Stands for a space at which no line ends."""

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)


def line(label: str, text: str) -> str:
    """`label    text`, the text at a fixed column."""
    return f"{label:<{LABEL_WIDTH - 1}} {text}".rstrip()


def refusal(error: ConvertError, *, writes: bool = True) -> list[str]:
    """An error as a screen: its code, then what, where, expected, got and next.

    A verb that writes says that nothing was written.
    """
    was_refused = isinstance(error, Refused)
    head = "REFUSED" if was_refused else {2: "ERROR", 3: "FAILED", 4: "FAILED"}.get(error.exit_code, "STOPPED")
    done = "published" if error.code in ("system", "no-space") else "written"
    end = f": nothing {done}" if was_refused and writes else ""
    where = f"{error.where}: " if error.where else ""
    lines = [f"{head} {error.code}{end}", f"  {where}{error.what}"]
    for label, text in (("expected", error.expected), ("got", error.got)):
        if text:
            lines.append(line(label, text))
    if error.consent:
        lines.append(line("consent", f"--allow {error.code} goes on all the same, and the receipt says so"))
    if error.next:
        lines += step_lines(error.next)
    return lines


# Inputs


def adapter_line(adapter: Checkpoint) -> str:
    """`./trl-rm  LoRA r=16 alpha=32 SEQ_CLS; 393 of 393 tensors placed`; placing all of them is what a merge means."""
    count = len(adapter.tensors)
    return line(
        "adapter", f"{show(adapter.origin.asked)}  {adapter_kind(adapter.config)}; {count} of {count} tensors placed"
    )


def repaired_lines(repaired: Mapping[str, str]) -> list[str]:
    """Where each lost tensor comes from: `repaired 24 from checkpoint-4/global_step4 (ZeRO-3, 2 ranks): ...`."""
    groups: dict[str, list[str]] = {}
    for name, words in repaired.items():
        groups.setdefault(words, []).append(name)
    lines = []
    for words, names in groups.items():
        lines.append(line("repaired", f"{len(names)} from {words}"))
        lines.append(line("", f"  {fold(names, 4)}"))
    return lines


def adapter_kind(config: Mapping[str, Any]) -> str:
    """`LoRA r=16 alpha=32 SEQ_CLS`, `DoRA rsLoRA r=8..32 alpha=16 CAUSAL_LM`."""
    kind = str(config.get("peft_type") or "?")
    if kind.upper() == "LORA":
        kind = "DoRA" if config.get("use_dora") else "LoRA"
    words = [kind, *(["rsLoRA"] if config.get("use_rslora") else [])]
    for name, key, pattern in (("r", "r", "rank_pattern"), ("alpha", "lora_alpha", "alpha_pattern")):
        if config.get(key) is not None:
            words.append(f"{name}={_span(config[key], config.get(pattern))}")
    if config.get("task_type"):
        words.append(str(config["task_type"]))
    return show(" ".join(words))


MAX_SHOWN = 10**9
"""Ranks and alphas beyond which a config is not believed."""


def _span(value: Any, pattern: Any) -> str:
    others = list(pattern.values()) if isinstance(pattern, Mapping) else []
    numbers = [v for v in [value, *others] if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(set(numbers)) < 2:
        return show(value, 40)
    low, high = min(numbers), max(numbers)
    return f"{low:g}..{high:g}" if abs(low) < MAX_SHOWN and abs(high) < MAX_SHOWN else "malformed"


def base_line(label: str, base: Checkpoint, *, recorded: bool) -> str:
    """`Qwen/Qwen2.5-7B@d149729 (as recorded), bf16`."""
    revision = base.origin.revision
    at = f"@{show(short_revision(revision))}" if revision else ""
    how = " (as recorded)" if recorded else ""
    held = dtype_words(base) if base.tensors else "config alone"
    return line(label, f"{show(base.origin.asked)}{at}{how}, {held}")


def short_revision(revision: str) -> str:
    """The first seven digits of a commit; a branch or tag as it is."""
    return revision[:7] if _COMMIT.fullmatch(revision) else revision


def dtype_words(checkpoint: Checkpoint) -> str:
    """`bf16`, or `bf16 and F32` where tensors differ, the type with most bytes first."""
    sizes: Counter[DType] = Counter()
    for tensor in checkpoint.tensors.values():
        sizes[tensor.info.dtype] += max(tensor.info.nbytes, 1)
    return " and ".join(dtype_word(d) for d, _ in sizes.most_common())


def dtype_word(dtype: DType) -> str:
    """The name that people use: bf16, fp16, fp32, fp64; else the header's."""
    return {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}.get(dtype.value, dtype.value)


def note_lines(notes: Iterable[Note], *, verbose: bool) -> list[str]:
    """Notes of a run, those that change numbers first; cosmetic ones only where asked for."""
    order = {"changes-numbers": 0, "info": 1, "cosmetic": 2}
    shown = sorted((n for n in notes if verbose or n.severity != "cosmetic"), key=lambda n: order[n.severity])
    return [
        line("note", f"changes-numbers ({n.code}): {n.text}" if n.severity == "changes-numbers" else n.text)
        for n in shown
    ]


# Plan


def plan_line(plan: Plan, checkpoint: Checkpoint, adapters: Sequence[Checkpoint]) -> str:
    """`142 copied, 196 merged, 1 from adapter: score.weight, 1 dropped: lm_head.weight`."""
    named = {"from adapter", "filled", "dropped"}
    groups = fates(plan, checkpoint, adapters)
    parts = [
        f"{len(names)} {work}" + (f": {fold(names)}" if work in named else "")
        for work, names in groups.items()
        if names
    ]
    return line("plan", ", ".join(parts))


def fates(plan: Plan, checkpoint: Checkpoint, adapters: Sequence[Checkpoint]) -> dict[str, list[str]]:
    """Names of tensors by what happens to them."""
    folders = {a.origin.path for a in adapters}
    groups: dict[str, list[str]] = {}
    for shard in plan.shards:
        for entry in shard.entries:
            groups.setdefault(_work(entry, folders) if shard.link is None else "linked", []).append(entry.name)
    groups["dropped"] = list(checkpoint.dropped)
    return groups


def _work(entry: Entry, adapter_folders: set[str]) -> str:
    """The word for what happens to one tensor."""
    from converter.core.tensors.nodes import Apply, Cast, Filled

    if entry.runs is not None and not (isinstance(entry.tensor, Filled) and entry.length):
        from_adapter = any(run.file.rpartition("/")[0] in adapter_folders for run in entry.runs)
        return "from adapter" if from_adapter else "copied"
    match entry.tensor:
        case Apply(kernel=kernel) if kernel.endswith("merge"):
            return "merged"
        case Cast():
            return f"cast to {dtype_word(entry.tensor.info.dtype)}"
        case Filled():
            return "filled"
        case _:
            return "computed"


def needs_line(disk: int, free: int | None, memory: int) -> str:
    """`14.1 GB disk (96 GB free), 0.4 GB memory`."""
    room = "" if free is None else f" ({format_size(free)} free)"
    return line("needs", f"{format_size(disk)} disk{room}, {format_size(memory)} memory")


def files_json(plan: Plan) -> list[dict[str, Any]]:
    """A plan's weight files as JSON objects; `linked` where one is a link to a file of the source."""
    return [
        {"file": s.file, "size": s.size, "tensors": len(s.entries)} | ({} if s.link is None else {"linked": True})
        for s in plan.shards
    ]


# Result


def shards_line(done: int, total: int, size: int, seconds: float) -> str:
    """`4/4 shards  14.1 GB  0:21`."""
    return f"{done}/{total} {'shard' if total == 1 else 'shards'}  {format_size(size)}  {format_duration(seconds)}"


def linked_lines(plan: Plan, source: str) -> list[str]:
    """`29 of 30 files are links to those of ./rm: keep it`; nothing where none is one."""
    if not plan.linked:
        return []
    count = (
        f"{len(plan.linked)} of {len(plan.shards)} {'file is a link' if len(plan.linked) == 1 else 'files are links'}"
    )
    return [line("linked", f"{count} to what is in {show(source)}: keep it, and where it is")]


def checked_line(reread: int, recomputed: int, measures: Mapping[str, Mapping[str, float]]) -> str:
    """`339 re-read, 24 recomputed equal, all finite`; where values are not, in which tensors, and how many of each."""
    kept = {name: int(m["nonfinite_kept"]) for name, m in measures.items() if m.get("nonfinite_kept")}
    words = [f"{reread} re-read", f"{recomputed} recomputed equal"] if reread else ["nothing (--no-verify)"]
    if kept:
        worst = sorted(kept, key=lambda name: (-kept[name], name))
        named = ", ".join(f"{show(n)} ({kept[n]})" for n in worst[:_MOST_NOT_FINITE])
        more = f" and {len(worst) - _MOST_NOT_FINITE} more tensors" if len(worst) > _MOST_NOT_FINITE else ""
        words.append(f"{sum(kept.values())} non-finite values kept from the inputs: {named}{more}")
    elif reread and any(m.keys() - {ZEROS} for m in measures.values()):
        words.append("merged values all finite")
    return line("checked", ", ".join(words))


_MOST_NOT_FINITE = 4


def update_lines(measures: Mapping[str, Mapping[str, float]], plan: Plan) -> list[str]:
    """How much of the adapter's update survives rounding, in all and at worst.

    The share is `<W' - W, D> / <D, D>`, D the exact update: the norm of the error alone can't tell an update that was
    lost from one that was rounded.
    """
    found = _measured(measures)
    if not found:
        return _kept_lines(measures)
    worst = min(found, key=lambda n: surviving_share([found[n]]))
    dtypes = {e.name: dtype_word(e.tensor.info.dtype) for e in plan.entries if e.name in found}
    stored = " and ".join(sorted(set(dtypes.values())))
    everything = list(found.values())
    summary = f"{_percent(surviving_share(everything))} survives {stored}"
    summary += f"; size {_percent(relative_size(everything))} of the weights"
    return [line("update", f"{summary}; worst {_percent(surviving_share([found[worst]]))}: {show(_module(worst))}")]


def _kept_lines(measures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """How much of a difference its factors keep, in all and at worst."""
    found = {n: m for n, m in measures.items() if m.get("difference", 0) > 0}
    if not found:
        return []
    worst = min(found, key=lambda n: energy_kept([found[n]]))
    summary = f"{_percent(energy_kept(list(found.values())))} of the change's energy, in {len(found)} modules"
    module = worst.removeprefix("base_model.model.").partition(".lora_")[0]
    return [line("kept", f"{summary}; worst {_percent(energy_kept([found[worst]]))}: {show(module)}")]


def by_projection(measures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The same for each kind of layer, worst first: a table of share and size."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for name, measured in _measured(measures).items():
        groups.setdefault(_module(name).rpartition(".")[2], []).append(measured)
    ordered = sorted(groups.items(), key=lambda g: surviving_share(g[1]))
    width = max((len(show(n)) for n, _ in ordered), default=0)
    return [
        line(
            "",
            f"{show(n):<{width}}  {_percent(surviving_share(m)):>8} survives  "
            f"size {_percent(relative_size(m)):>8}  {len(m)} tensors",
        )
        for n, m in ordered
    ]


def _measured(measures: Mapping[str, Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """Tensors with an update that has a size: neither none nor one that is not finite."""
    return {n: m for n, m in measures.items() if has_update(m)}


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _percent(share: float) -> str:
    """`99.1 %`, `0.042 %`; three digits, and 100 only for what is."""
    percent = 100 * share
    if 99.95 <= percent < 99.9995:
        return f"{percent:.3f} %"
    return f"{percent:.3g} %" if abs(percent) < 99.95 else f"{percent:.4g} %"


def wrote_line(out: str, config: Mapping[str, Any], pad_token: str | None, kind: str = MODEL) -> str:
    """`./rm  Qwen2ForSequenceClassification, 1 label, pad <|endoftext|>`."""
    if kind == STATE:
        return line("wrote", f"{show(out)}  a state dict, which is no model")
    if config.get("peft_type"):
        return line("wrote", f"{show(out)}  {adapter_kind(config)}")
    architectures = config.get("architectures")
    words = [show(architectures[0])] if isinstance(architectures, list) and architectures else ["model"]
    if "ForSequenceClassification" in words[0]:
        labels = label_count(config)
        words.append(
            f"{labels} {'label' if labels == 1 else 'labels'}" if labels is not None else "labels not recorded"
        )
        pad = config.get("pad_token_id")
        words.append(f"pad {show(pad_token if pad_token is not None else pad)}" if pad is not None else "no pad token")
    return line("wrote", f"{show(out)}  {', '.join(words)}")


def wrapped_step(step: Next, width: int, arrow: str) -> list[str]:
    """A step behind an arrow, sentences wrapped; a command is never cut, so that it can be copied."""
    text = "".join(str(p).replace(" ", _KEPT) if isinstance(p, Command | Again) else str(p) for p in parts(step))
    if is_command(step):
        return [f"{arrow}{step}"]
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=arrow,
        subsequent_indent=" " * len(arrow),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [each.replace(_KEPT, " ") for each in lines]


def step_lines(step: Next) -> list[str]:
    """`Next:` and a step, of which every line can be pasted: sentences beside commands are a shell's comments."""
    held = parts(step)
    if is_command(step) or not any(isinstance(p, Command) for p in held):
        return [line("Next:", str(step))]
    lines: list[str] = []
    for is_typed, group in groupby(held, lambda part: isinstance(part, Command)):
        if is_typed:
            lines.append(str(Steps(*group)))
        elif (said := "".join(map(str, group)).strip(" ;,")) not in ("", "then"):
            lines.append(f"# {said}")
    return [line("" if at else "Next:", each) for at, each in enumerate(lines)]


def next_lines(commands: Sequence[Next]) -> list[str]:
    """`Next:` and what to type, one command a line."""
    return [line("" if at else "Next:", str(command)) for at, command in enumerate(commands)]
