"""To other ranks and back: the files are again those that the trainer saved. Runs are drawn from saves at hand. Slow.

    python tests/runs/run_round_trips.py SAVED... --draw 10 --from 0

A run that ZeRO or verl saved goes to a number of ranks that is drawn too, and back to its own. Beside the files stands
what the same number of ranks gives, written once: byte for byte the same files. What torch loads of the trainer's own
files is compared as well, but for what pads a rank's share in stage 3, which is whatever was in memory. Exits with 1
where anything differs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
MOST = 6


def runs_in(saved: list[Path]) -> list[Path]:
    """Saved runs below some folders, by their names."""
    from lived import facts

    found = {p.parent.name: p.parent for root in saved for p in sorted(root.rglob("fixture.json"))}
    return [run for run in found.values() if facts(run).get("ranks") and facts(run).get("stage") != 0]


def tried(run: Path, ranks: int, there: int) -> Iterator[str]:
    """What differs between a run's files and those of the way there and back."""
    from converter import reshard_state
    from saved_trees import differences as tree_differences
    from saved_trees import loaded

    with tempfile.TemporaryDirectory() as place:
        once, other, back = (Path(place) / n for n in ("once", "other", "back"))
        reshard_state(run, other, world_size=there)
        reshard_state(other, back, world_size=ranks)
        reshard_state(run, once, world_size=ranks)
        files = sorted(p.relative_to(once) for p in once.rglob("*") if p.is_file() and p.name != "rlhf-convert.json")
        for file in files:
            if not (back / file).is_file():
                yield f"{file} is missing"
            elif (once / file).read_bytes() != (back / file).read_bytes():
                yield f"{file} has other bytes"
            elif file.name.endswith("_states.pt") and (run / file).is_file():
                more = [d for d in tree_differences(loaded(run / file), loaded(back / file)) if "flat_groups" not in d]
                yield from (f"{file}: {d}" for d in more[:2])


def main() -> int:
    from converter.errors import ConvertError
    from lived import facts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path, nargs="+")
    parser.add_argument("--draw", type=int, default=10)
    parser.add_argument("--from", dest="seed", type=int, default=0)
    given = parser.parse_args()
    drawn = random.Random(given.seed)
    known = runs_in(given.saved)
    bad = 0
    for run in drawn.sample(known, min(given.draw, len(known))):
        ranks = int(facts(run)["ranks"])
        others = [n for n in range(1, MOST + 1) if n != ranks]
        found = ["refused for each number of ranks"]
        for there in drawn.sample(others, len(others)):
            try:
                found = list(tried(run, ranks, there))
            except ConvertError as error:
                if error.code in ("usage", "verl-mesh"):  # ranks that its parts or replicas can't share
                    continue
                found = [f"refused: {error.code}: {error.what}"]
            break
        words = "; ".join(found[:3]) or "equal"
        bad += bool(found)
        print(f"{run.name}: {ranks} to {there} to {ranks}: {words}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
