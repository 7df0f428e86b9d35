"""What an adapter's values have to be before they are merged: an alpha that says something, and finite numbers."""

from __future__ import annotations

from collections.abc import Sequence

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.byte_runs import byte_runs
from converter.diagnostic import Command
from converter.errors import Refused, UsageError
from converter.text import fold, show


def with_alpha(adapters: Sequence[Checkpoint], alpha: float | None) -> tuple[Checkpoint, ...]:
    """The adapters, with that alpha where their configs record none or 0, as verl's merger writes it.

    Raises:
        UsageError: all of them record one (`lora-alpha-recorded`).
    """
    if alpha is None:
        return tuple(adapters)
    lacking = [not a.config.get("lora_alpha") for a in adapters]
    if not any(lacking):
        recorded = show(adapters[0].config.get("lora_alpha"))
        raise UsageError(
            "lora-alpha-recorded",
            f"adapter_config.json records lora_alpha {recorded}; --lora-alpha is for one that records none or 0",
            where=show(adapters[0].origin.asked),
            expected="no --lora-alpha; --weight W scales an adapter",
        )
    return tuple(
        a.replace(config={**a.config, "lora_alpha": alpha}) if lacks else a
        for a, lacks in zip(adapters, lacking, strict=True)
    )


def expect_finite(adapter: Checkpoint, context: Context) -> None:
    """Refuse NaN and infinity in an adapter: the run that wrote it had diverged, and so has what is merged.

    Raises:
        Refused: a tensor holds such values, and `--allow nonfinite` was not given (`nonfinite`).
    """
    stored = {n: t for n, t in adapter.tensors.items() if byte_runs(t) is not None}
    with context.keeping_open():
        bad = {name: count for name, tensor in stored.items() if (count := context.nonfinite(tensor))}
    if bad:
        first, count = next(iter(bad.items()))
        what = f"{len(bad)} of {len(adapter.tensors)} tensors hold NaN or infinity: {fold(bad)}"
        step = Command("doctor", (show(adapter.origin.asked), "--deep"))
        got = f"{count} such values in {show(first)}"
        context.consent(Refused("nonfinite", what, where=show(adapter.origin.asked), got=got, next=step))
