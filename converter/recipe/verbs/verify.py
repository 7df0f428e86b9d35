"""What `verify` does: proof that a trainer loads a folder, and that it says what its source said."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converter.errors import UsageError
from converter.recipe.verbs.knobs import Where, optional

if TYPE_CHECKING:
    from converter.core.writer.reporter import Reporter
    from converter.dialects.spec import Role
    from converter.examine.verify.verify import Verified, VerifyRequest


def verify(
    folder: Where,
    *,
    for_: str | None = None,
    role: Role | None = None,
    against: Where | None = None,
    from_: str | None = None,
    base: Where | None = None,
    live: bool = False,
    python: str | Path | None = None,
    probe: str | Path | None = None,
    pairs: int = 200,
    device: str = "cpu",
    allow: Sequence[str] = (),
    told: Callable[[str], None] | None = None,
    reporter: Reporter | None = None,
) -> Verified:
    """Names, shapes, files, config and tokenizer against what a trainer's loader does with them.

    What fails is in the result and raises nothing: `found.holds`, and `found.failed` with a code and a command each.

    Args:
        folder: a model.
        for_: `TRAINER` or `TRAINER@VERSION` that is to load it; None: inferred from its files.
        role: what it is used as; None: what config.json says.
        against: what it was made of, a model, adapter or run: values are compared.
        from_: trainer or dialect of `against`, and `base` its base, if it is an adapter.
        live: load it with the trainer's own code, on the CPU, by `python`, which has the trainer.
        probe: preference pairs to score: JSON lines, a JSON list or Parquet of prompt, chosen, rejected.
        pairs: how many of them, the first ones.
        device: where `probe` runs the models: `cpu`, `cuda`, `cuda:N`, or `auto` for a CUDA device where one is there.
        allow: codes of refusals to go on past.
        told: hears, a line at a time, how far the scoring of a large model is.
        reporter: hears of each tensor that was compared with `against`.

    Raises:
        UsageError: arguments that need each other, or the folder is not there (`path-missing`).
    """
    from converter.core.files import sparse
    from converter.examine.verify.verify import VerifyRequest, examine

    codes = (allow,) if isinstance(allow, str) else tuple(allow)
    asked = VerifyRequest(
        str(folder), for_, role, optional(against), from_, optional(base), live, optional(python), optional(probe),
        pairs, codes, device,
    )  # fmt: skip
    if told is not None:
        asked = dataclasses.replace(asked, told=told)
    if reporter is not None:
        asked = dataclasses.replace(asked, reporter=reporter)
    _expect_sense(asked)
    found = examine(asked)
    sparse.expect_all_read()
    return found


def _expect_sense(asked: VerifyRequest) -> None:
    """Flags that need each other.

    Raises:
        UsageError: `--live` without `--python`, or a source's flag without a source (`usage`).
    """
    if asked.live and not asked.python:
        what = "--live loads the folder with the trainer's own code: name the Python that has it"
        raise UsageError("usage", what, expected="--live --python ~/envs/ppo/bin/python")
    if asked.python and not asked.live:
        raise UsageError("usage", "--python goes with --live")
    if asked.device != "cpu" and asked.probe is None:
        raise UsageError("usage", "--device says where --probe runs the models; there is no --probe")
    if (asked.base or asked.source) and not asked.against:
        raise UsageError("usage", "--base and --from say how --against is read; there is no --against")
