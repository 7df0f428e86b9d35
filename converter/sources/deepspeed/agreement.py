"""Are a run's model file and its optimizer files of one save? Their steps say so, and in stages 1 and 2 their values.

There the module holds what the masters were rounded to, so that a few elements of each rank's part of each parameter
tell files of another step, or of another training, from the run's own. In stage 3 no file has both: what remains are
the optimizer's steps beside the run's, and the learning rates that the schedule set beside those of the groups.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from converter.core.files.reading import InputFiles
from converter.core.tensors import nodes as tensors
from converter.core.tensors.byte_runs import ByteRun, byte_runs
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.sources.deepspeed.files import UNIVERSAL
from converter.sources.deepspeed.layout import listed_shapes, share, trained_tensors
from converter.sources.deepspeed.state import Shards, common_state, number_of, step_of
from converter.sources.deepspeed.zero_folder import MASTER
from converter.text import fold, show

_MOST = 32
"""Elements that are compared of each rank's part of a parameter."""
_MOMENTS = ("exp_avg", "exp_avg_sq")
_UNITS = {DType.F32: "I", DType.BF16: "H", DType.F16: "H"}


def expect_one_save(shards: Shards) -> None:
    """Refuse optimizer files that are not of the model file's save.

    Raises:
        Refused: they are of other steps, or hold other weights (`zero-mixed`); see `trained_tensors`.
    """
    if shards.agreed or not shards.stage:
        return
    shards.agreed = True
    if shards.stage < 3:
        _expect_values(shards)
    elif shards.universal:
        _expect_rank_0s_part(shards)
    counted = counted_steps(shards)
    if counted is None or counted[0] == counted[1]:
        return
    own, taken = counted
    if own > taken:
        text = f"the optimizer files are of step {own:g}, the model file is of step {taken:g}: they are of two saves"
        raise shards.refuse("zero-mixed", text, next="copy the files of one save from the nodes that wrote them")
    if (rates := _other_rates(shards)) is not None:
        text = f"the optimizer counted {own:g} steps and the run {taken:g}; {rates}: they are of two saves"
        raise shards.refuse("zero-mixed", text, next="copy the files of one save from the nodes that wrote them")
    shards.said.append(
        f"the optimizer counted {own:g} steps and the run {taken:g}: it began anew when the run was resumed, or its "
        "files are of an earlier save"
    )


def counted_steps(shards: Shards) -> tuple[float, float] | None:
    """Steps that the optimizer counted, and those of the run without the ones it skipped; None where one is missing."""
    if not shards.files.optimizers and not shards.universal:
        return None
    own = step_of(
        shards, _states_of_universal(shards) if shards.universal else shards.optim(min(shards.files.optimizers))
    )
    taken, skipped = (
        shards.model(min(shards.files.models, default=0)).get(k) for k in ("global_steps", "skipped_steps")
    )
    if own is None or type(taken) is not int:
        return None
    return own, float(taken - (skipped if type(skipped) is int else 0))


def _states_of_universal(shards: Shards) -> Mapping[Any, Any]:
    """What has the optimizer's step: the common state in stage 3, else the folder of any parameter."""
    common = common_state(shards)
    listed = [] if shards.stage == 3 else sorted((shards.folder / UNIVERSAL).glob("*/step.pt"))
    if not listed:
        return common
    step = shards.read(str(listed[0].relative_to(shards.folder)))
    return {"base_optimizer_state": [{"step": step}]}


def _other_rates(shards: Shards) -> str | None:
    """How the learning rates that the schedule set last differ from those of the optimizer; None where they don't."""
    schedule = shards.model().get("lr_scheduler")
    last = schedule.get("_last_lr") if isinstance(schedule, dict) else None
    state = {} if shards.universal else shards.optim(min(shards.files.optimizers))
    base = state.get("optimizer_state_dict" if shards.stage == 3 else "base_optimizer_state")
    groups = base.get("param_groups") if isinstance(base, dict) else None
    if not isinstance(groups, list) or not isinstance(last, list) or len(groups) != len(last):
        return None
    own = [g.get("lr") if isinstance(g, dict) else None for g in groups]
    if not all(type(rate) is float for rate in (*own, *last)) or own == last:
        return None
    return f"its learning rate is {own[0]:g}, and the schedule in the model file had set {last[0]:g}"


def _expect_values(shards: Shards) -> None:
    """Masters of stages 1 and 2, rounded, are what the module holds.

    Raises:
        Refused: they aren't (`zero-mixed`).
    """
    module = shards.model().get("module")
    if not isinstance(module, dict) or _lags(shards.model()):
        return
    with InputFiles(shards.inputs) as files:
        for name, master in trained_tensors(shards).items():
            held = module.get(name)
            if not isinstance(held, LazyTensor) or held.info.shape != master.info.shape:
                continue
            if (file := _other(files, master, held)) is not None:
                text = (
                    f"the master of {show(name)} in it, rounded to {held.info.dtype.name}, is not the weight in "
                    "the model file: they are of two saves"
                )
                advice = "copy the files of one save; gather without --master takes the model file's weights"
                raise shards.refuse("zero-mixed", text, file=_within(shards, file), next=advice)


def _expect_rank_0s_part(shards: Shards) -> None:
    """Of stage 3, ds_to_universal.py leaves rank 0's part of every master and moment in the common state.

    Raises:
        Refused: a parameter's folder holds another (`zero-mixed`).
    """
    with InputFiles(shards.inputs) as files:
        for key, flats in _rank_0s_parts(shards).items():
            groups = listed_shapes(shards)
            if [f.info.shape for f in flats] != [(sum(share(math.prod(s), shards.ranks) for s in g.values()),)
                                                 for g in groups]:  # fmt: skip
                continue
            whole = trained_tensors(shards, key)
            for group, flat in zip(groups, flats, strict=True):
                offset = 0
                for name, shape in group.items():
                    count = min(share(math.prod(shape), shards.ranks), math.prod(shape))
                    own = tensors.narrow(tensors.reshape(whole[name], (math.prod(shape),)), 0, 0, count)
                    file = _other(files, own, tensors.narrow(flat, 0, offset, count))
                    if file is not None:
                        text = f"the state of {show(name)} is not that of the save that `optimizer_state.pt` is of"
                        advice = "make the universal checkpoint anew from the ranks' own files"
                        raise shards.refuse("zero-mixed", text, file=_within(shards, file), next=advice)
                    offset += share(math.prod(shape), shards.ranks)


def expect_steps_of_one(shards: Shards, names: Iterable[str]) -> None:
    """Of stages 1 and 2, a universal checkpoint has the optimizer's step in each parameter's folder, or in none.

    Raises:
        Refused: some are missing (`zero-parameter-missing`) or differ (`zero-mixed`).
    """
    if not shards.universal or shards.stage == 3:
        return
    files = {n: f"{UNIVERSAL}/{n}/step.pt" for n in names}
    held = {n: f for n, f in files.items() if (shards.folder / f).is_file()}
    if held and (lost := [n for n in files if n not in held]):
        text = f"`{UNIVERSAL}` lacks step.pt of {len(lost)} trained parameters: {fold(lost)}"
        raise shards.refuse("zero-parameter-missing", text, next="make it anew from the ranks' own files")
    steps = {n: number_of(shards, shards.read(f)) for n, f in held.items()}
    if len(set(steps.values())) > 1:
        listed = fold([f"{n}: {s}" for n, s in steps.items()])
        raise shards.refuse("zero-mixed", f"the optimizer's steps of parameters differ ({listed})")


def _rank_0s_parts(shards: Shards) -> dict[str, list[LazyTensor]]:
    """By state: what rank 0 had of each sub-group."""
    common = common_state(shards)
    masters, inner = common.get("fp32_flat_groups"), common.get("optimizer_state_dict")
    state = inner.get("state") if isinstance(inner, dict) else None
    own = [state.get(i) for i in range(len(state))] if isinstance(state, dict) else []
    listed = {MASTER: masters} | {k: [s.get(k) if isinstance(s, dict) else None for s in own] for k in _MOMENTS}
    return {k: v for k, v in listed.items() if isinstance(v, list) and v and all(isinstance(t, LazyTensor) for t in v)}


def _within(shards: Shards, file: str) -> str:
    return os.path.relpath(file, shards.folder.absolute())


def _other(files: InputFiles, master: LazyTensor, held: LazyTensor) -> str | None:
    """The file in which a part of a master isn't what is held, rounded; None where all that is compared is."""
    for run, place in _pairs(master, held):
        if _rounded(files, run, master.info.dtype, held.info.dtype) != _units(files, place, held.info.dtype):
            return run.file
    return None


def _lags(model: Mapping[Any, Any]) -> bool:
    """True of ZenFlow, which updates weights on the device before it does the masters."""
    config = model.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and bool(zero.get("zenflow"))


def _pairs(master: LazyTensor, held: LazyTensor) -> Iterator[tuple[ByteRun, ByteRun]]:
    """The middle of each stretch of a master, and where the module has it."""
    whole, parts = byte_runs(held), byte_runs(master)
    kinds = master.info.dtype, held.info.dtype
    if whole is None or parts is None or len(whole) != 1 or not _is_rounded(*kinds):
        return
    own, other = (dtype.bits // 8 for dtype in kinds)
    before = 0
    for part in parts:
        count = part.length // own
        taken = min(count, _MOST)
        first = (count - taken) // 2
        yield (
            ByteRun(part.file, part.offset + first * own, taken * own),
            ByteRun(whole[0].file, whole[0].offset + (before + first) * other, taken * other),
        )
        before += count


def _is_rounded(master: DType, held: DType) -> bool:
    return held in _UNITS and master in (held, DType.F32)


def _units(files: InputFiles, run: ByteRun, dtype: DType) -> list[int | None]:
    """Elements as whole numbers of their bits; None for NaN, which has many."""
    buffer = bytearray(run.length)
    files.read_into(run.file, run.offset, buffer)
    unit = _UNITS[dtype]
    values = struct.unpack(f"<{len(buffer) // struct.calcsize(unit)}{unit}", buffer)
    least = {DType.F32: 0x7F80_0000, DType.BF16: 0x7F80, DType.F16: 0x7C00}[dtype]
    sign = 0x8000_0000 if dtype is DType.F32 else 0x8000
    return [None if v & (sign - 1) > least else v for v in values]


def _rounded(files: InputFiles, run: ByteRun, master: DType, held: DType) -> list[int | None]:
    """A master's elements as torch rounds them to the module's dtype: to nearest, ties to even."""
    values = _units(files, run, master)
    if master is held:
        return values
    if held is DType.BF16:
        return [None if v is None else (v + 0x7FFF + (v >> 16 & 1)) >> 16 for v in values]
    return [None if v is None else _half(struct.unpack("<f", struct.pack("<I", v))[0]) for v in values]


def _half(value: float) -> int:
    try:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    except OverflowError:
        return 0xFC00 if value < 0 else 0x7C00
