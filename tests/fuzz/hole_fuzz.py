"""Harms healthy folders in one place each, and counts the harms that nobody here notices.

    python tests/fuzz/hole_fuzz.py SCRATCH [--of models|runs|quantised] [--cases 20000] [--seed 0] [--seconds N]
        [--only-adapters] [--judge-all]

A case is made from the seed and its number alone. The harm is judged by transformers' and PEFT's own loading reports;
ours have to name the tensor, and every verb that writes has to refuse. The frameworks are asked about
what we pass over, and with --judge-all about every case. Prints one JSON object with the counts, and exits with 1 if
anything was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "support"), str(TESTS / "runs")]

import harmed_quantised  # noqa: E402
import harmed_runs  # noqa: E402
import quantised  # noqa: E402
from holes import MERGED_HERE, Outcome, Sound, adapter_case, model_case, model_cases  # noqa: E402

Found = Outcome | harmed_runs.Outcome | harmed_quantised.Outcome | None

ADAPTERS_EVERY = 5
"""One case of so many is an adapter's."""


def _cases(asked: argparse.Namespace) -> Iterator[Callable[[], Found]]:
    """One function for each case, made from the seed and the case's number alone."""
    if asked.of == "runs":
        runs = harmed_runs.Sound(asked.scratch)
        for run, seed in harmed_runs.cases(asked.cases, asked.seed):
            yield partial(harmed_runs.case, runs, run, seed)
        return
    if asked.of == "quantised":
        folders, forms = harmed_quantised.Sound(asked.scratch), sorted(quantised.KINDS)
        for number in range(asked.cases):
            yield partial(harmed_quantised.case, folders, forms[number % len(forms)], asked.seed + number)
        return
    sound, adapters = Sound(asked.scratch), list(MERGED_HERE.values())
    for number, (saved, seed) in enumerate(model_cases(asked.cases, asked.seed)):
        if asked.only_adapters or number % ADAPTERS_EVERY == 0:
            adapter = adapters[number // ADAPTERS_EVERY % len(adapters)]
            yield partial(adapter_case, sound, adapter, seed, judge_all=asked.judge_all)
        else:
            yield partial(model_case, sound, saved, seed, judge_all=asked.judge_all)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only-adapters", action="store_true")
    parser.add_argument("--judge-all", action="store_true", help="ask the frameworks about what is named, too")
    parser.add_argument("--of", choices=("models", "runs", "quantised"), default="models")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch").setLevel(logging.ERROR)  # meshes of ranks are read where no ranks are
    kinds, missed, passed, begun = Counter[str](), 0, 0, time.monotonic()
    for number, case in enumerate(_cases(asked)):
        if time.monotonic() - begun > asked.seconds:
            break
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            found = case()
        if found is None:
            passed += 1
            continue
        kind, what = (
            (found.harm.kind, found.harm.names[:2]) if isinstance(found, Outcome) else (found.kind, found.place)
        )
        kinds[kind] += 1
        if found.wrong:
            missed += 1
            print(f"MISSED {number} {found.case}: {kind} {what}: {found.wrong}", flush=True)
    seconds, busy = round(time.monotonic() - begun), round(time.process_time())
    print(
        json.dumps(
            {
                "cases": sum(kinds.values()),
                "harmless": passed,
                "missed": missed,
                "seconds": seconds,
                "cpu_seconds": busy,
                **kinds,
            }
        )
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
