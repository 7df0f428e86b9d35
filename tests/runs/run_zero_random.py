"""Runs of real DeepSpeed with settings drawn by number: gathered, cut anew, and gone on with. Slow.

    python tests/runs/run_zero_random.py OUT --from 0 --count 40                   builds an environment, once
    python tests/runs/run_zero_random.py OUT --from 0 --count 40 --trainer PYTHON  a Python that has deepspeed and peft

Every run is saved beside what lived. What `gather` reads (weights, masters, states of the optimizer) has to be that,
bit by bit. Then `reshard` writes it for other ranks, another stage or as a universal checkpoint, DeepSpeed loads it,
and what lives then has to be the same. What DeepSpeed itself refuses to save or to load is counted apart.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
MOST_DRIFT = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 2e-2}


def names(numbers: list[int]) -> dict[int, str]:
    """Folders by number, each with what it is about."""
    from zero.options import draw

    found = {}
    for number in numbers:
        drawn = draw(number)
        options = drawn["options"]
        found[number] = f"{number:04d}-{options['model']}-{options['dtype']}-z{drawn['stage']}-n{drawn['before']}"
    return found


def save(python: str, out: Path, numbers: list[int]) -> None:
    """Those that don't lie in `out` yet."""
    from run_reshard_matrix import run_jobs
    from zero.options import draw

    folder = names(numbers)
    for ranks in (1, 2, 3, 4):
        jobs = [
            {"do": "save", "run": str(out / folder[n]), "case": folder[n], "stage": d["stage"], "options": d["options"]}
            for n in numbers
            if (d := draw(n))["before"] == ranks and not is_saved(out / folder[n])
        ]
        run_jobs(python, out, ranks, jobs)


def is_saved(run: Path) -> bool:
    return any((run / name).is_file() for name in ("losses.json", "error.txt"))


def gathered(run: Path, drawn: dict[str, Any]) -> list[str]:
    """What differs between what is gathered and what lived."""
    from converter.sources.deepspeed.source import SOURCE, adam_moments
    from zero.compare import differences, evaluated, live

    wanted = live(run)
    checkpoint = SOURCE.open(run, asked=run.name)
    tensors = checkpoint.tensors
    if drawn["options"]["exclude_frozen"]:
        kept = set(tensors) if drawn["stage"] < 3 else checkpoint.trained or set()
        wanted = {n: t for n, t in wanted.items() if n in kept}
        tensors = {n: t for n, t in tensors.items() if n in wanted}
        lost = (checkpoint.trained or set()) - set(tensors)
        assert not lost, lost
    found = [f"live: {d}" for d in differences(evaluated(tensors), wanted)]
    aliases = {n for group in checkpoint.ties for n in group[1:]}
    if drawn["stage"]:
        masters = SOURCE.open_masters(run, asked=run.name)
        own = {n: t for n, t in masters.tensors.items() if n in (masters.trained or ())}
        found += [f"master: {d}" for d in differences(evaluated(own), live(run, "master"))]
    for key in ("exp_avg", "exp_avg_sq"):
        states = {n: t for n, t in live(run, key).items() if n not in aliases}
        if states:
            allow = ["moments-order"] if drawn["options"]["groups"] == 1 else []
            moments = adam_moments(run, which=key, allow=allow)
            found += [f"{key}: {d}" for d in differences(evaluated(moments), states)]
    return found


def outcome(work: Any) -> tuple[list[str], str | None]:
    """What differs, and the code of a refusal."""
    from converter.errors import Refused, UsageError

    try:
        return work(), None
    except (Refused, UsageError) as error:
        return [], f"{error.code}: {error}"
    except Exception as error:
        return [f"{type(error).__name__}: {error}"], None


def reshard(run: Path, target: Path, drawn: dict[str, Any]) -> list[str]:
    """Write what is drawn."""
    from converter import reshard_state

    shutil.rmtree(target, ignore_errors=True)
    form: dict[str, Any] = {"to": "universal"} if drawn["universal"] else {"stage": drawn["to"]}
    reshard_state(run, target, world_size=drawn["after"], **form)
    return []


def resumed(python: str, out: Path, numbers: list[int]) -> None:
    """Load and go on, each number of ranks in one launch."""
    from run_reshard_matrix import run_jobs
    from zero.options import draw

    folder = names(numbers)
    for ranks in (1, 2, 3, 4):
        jobs = []
        for number in numbers:
            drawn = draw(number)
            if drawn["after"] != ranks:
                continue
            live = out / f"{folder[number]}-live"
            shutil.rmtree(live, ignore_errors=True)
            jobs.append(
                {"do": "resume", "run": str(out / f"{folder[number]}-new"), "out": str(live), "case": folder[number]}
                | {"stage": drawn["stage"] if drawn["universal"] else drawn["to"], "options": drawn["options"]}
                | {"universal": drawn["universal"]}
            )
        run_jobs(python, out, ranks, jobs)


def after_loading(out: Path, name: str, drawn: dict[str, Any]) -> list[str]:
    """What differs between what lives after loading and what lived."""
    from safetensors.torch import load_file

    from zero.compare import differences

    live, run = out / f"{name}-live", out / name
    if not (live / "resumed.json").is_file():
        error = live / "error.txt"
        return ["LOAD " + (error.read_text().strip().splitlines()[-1] if error.is_file() else "nothing was loaded")]
    found = differences(load_file(live / "oracle.safetensors"), load_file(run / "oracle.safetensors"))
    told, lived = (json.loads(p.read_text()) for p in (live / "resumed.json", run / "losses.json"))
    found += [] if told["rates"] == lived["rates"] else [f"rates {told['rates']}, and were {lived['rates']}"]
    drift = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(told["losses"], lived["losses"], strict=True))
    most = MOST_DRIFT[drawn["options"]["dtype"]]
    return found + ([] if drift <= most else [f"losses drift by {drift:.1e}: {told['losses']} {lived['losses']}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", help="a Python that has DeepSpeed; without it an environment is built")
    parser.add_argument("--from", dest="first", type=int, default=0)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--gather-only", action="store_true")
    given = parser.parse_args()
    from run_zero_matrix import DEFAULT, trainer
    from zero.options import draw

    python = given.trainer or trainer(DEFAULT)
    given.out.mkdir(parents=True, exist_ok=True)
    numbers = list(range(given.first, given.first + given.count))
    folder = names(numbers)
    save(python, given.out, numbers)
    counted: Counter[str] = Counter()
    ready = []
    for number in numbers:
        run, drawn = given.out / folder[number], draw(number)
        if not (run / "losses.json").is_file():
            error = run / "error.txt"
            said = error.read_text().strip().splitlines()[-1] if error.is_file() else "no reason"
            print(f"{run.name}: DeepSpeed did not save: {said[:200]}", flush=True)
            counted["not saved"] += 1
            continue
        found, refusal = outcome(lambda run=run, drawn=drawn: gathered(run, drawn))
        counted["gather differs" if found else "gather refused" if refusal else "gather equal"] += 1
        if found or refusal:
            print(f"{run.name}: GATHER {'; '.join(found[:3]) or refusal}\n    {drawn}", flush=True)
        if not drawn["stage"] or given.gather_only:
            continue
        new = given.out / f"{run.name}-new"
        found, refusal = outcome(lambda run=run, new=new, drawn=drawn: reshard(run, new, drawn))
        if found or refusal:
            counted["reshard fails" if found else "reshard refused"] += 1
            print(f"{run.name}: RESHARD {'; '.join(found[:3]) or refusal}\n    {drawn}", flush=True)
        else:
            ready.append(number)
    resumed(python, given.out, ready)
    for number in ready:
        drawn = draw(number)
        found = after_loading(given.out, folder[number], drawn)
        counted["resume differs" if found else "resume equal"] += 1
        if found:
            print(f"{folder[number]}: RESUME {'; '.join(found[:3])}\n    {drawn}", flush=True)
    print(dict(counted))
    return 1 if any(word in key for key in counted for word in ("differs", "fails")) else 0


if __name__ == "__main__":
    sys.exit(main())
