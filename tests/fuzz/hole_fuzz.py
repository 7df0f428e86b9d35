"""Harms healthy models and adapters in one place each, and counts the harms that nobody here notices.

    python tests/fuzz/hole_fuzz.py SCRATCH [--cases 20000] [--seed 0] [--only-adapters] [--seconds N] [--judge-all]

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
import sys
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "support")]

from holes import MERGED_HERE, Outcome, Sound, adapter_case, model_case, model_cases  # noqa: E402

ADAPTERS_EVERY = 5
"""One case of so many is an adapter's."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--only-adapters", action="store_true")
    parser.add_argument("--judge-all", action="store_true", help="ask the frameworks about what is named, too")
    asked = parser.parse_args()
    asked.scratch.mkdir(parents=True, exist_ok=True)
    sound, kinds, missed = Sound(asked.scratch), Counter[str](), 0
    adapters, begun, passed = list(MERGED_HERE.values()), time.monotonic(), 0
    for number, (saved, seed) in enumerate(model_cases(asked.cases, asked.seed)):
        if time.monotonic() - begun > asked.seconds:
            break
        found: Outcome | None
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            if asked.only_adapters or number % ADAPTERS_EVERY == 0:
                found = adapter_case(
                    sound, adapters[number // ADAPTERS_EVERY % len(adapters)], seed, judge_all=asked.judge_all
                )
            else:
                found = model_case(sound, saved, seed, judge_all=asked.judge_all)
        if found is None:
            passed += 1
            continue
        kinds[found.harm.kind] += 1
        if found.wrong:
            missed += 1
            print(f"MISSED {number} {found.case}: {found.harm.kind} {found.harm.names[:2]}: {found.wrong}", flush=True)
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
