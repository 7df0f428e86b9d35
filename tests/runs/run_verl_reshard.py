"""The stored verl runs on other ranks: real verl loads each, and what lived has to live again. Slow.

    python tests/runs/run_verl_reshard.py OUT --trainer PYTHON     a Python that has verl (see verl_saves/train.py)
    python tests/runs/run_verl_reshard.py OUT --trainer PYTHON --ranks 2 3
    python tests/runs/run_verl_reshard.py OUT --trainer PYTHON --ranks 6 8 --runs SAVED --alone

DTensors name the process groups of their mesh by numbers, which torch counts in each process: a run of replicas is
saved by processes that make no other mesh before (`train.py --case critic-hsdp --fsdp 2`), and loaded so (`--alone`).

Every run is resharded by `converter.reshard_state`; verl's own checkpoint manager loads the files; weights and both
moments are compared with the run's oracle bit by bit, and two steps are trained. Exits with 1 on a difference. The
Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def resharded(out: Path, run: Path, ranks: int) -> str | None:
    """Why a run can't be for that many ranks; None where it is."""
    import converter

    shutil.rmtree(out, ignore_errors=True)
    try:
        converter.reshard_state(run, out, world_size=ranks)
    except converter.Refused as why:
        return f"{why.code}: {why.what}"
    return None


def launch(trainer: str, out: Path, ranks: int, number: int, jobs: list[dict[str, Any]]) -> None:
    """Load some runs on as many ranks, in the same processes one after the other."""
    file = out / f"jobs-{ranks}-{number}.json"
    file.write_text(json.dumps(jobs))
    with (out / f"ranks-{ranks}-{number}.log").open("w") as log:
        command = [trainer, str(HERE / "verl_saves" / "resume.py"), str(file), "--ranks", str(ranks)]
        subprocess.run(command, check=False, stdout=log, stderr=log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", required=True, help="a Python that has verl")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="runs with this in their names")
    parser.add_argument("--runs", type=Path, default=HERE / "verl_saves" / "runs", help="others than the stored ones")
    parser.add_argument("--alone", action="store_true", help="each in processes of its own, as trainers load it")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wrong = loaded = 0
    for ranks in given.ranks:
        jobs: list[dict[str, Any]] = []
        for run in sorted(p.parent for p in given.runs.glob(f"*{given.only}*/fixture.json")):
            out = given.out / f"{run.name}-m{ranks}"
            facts = json.loads((run / "fixture.json").read_text())
            refused = resharded(out, run, ranks)
            if refused:
                print(f"{out.name}: refused, {refused}")
                continue
            job = {"run": str(out), "case": facts["case"], "fsdp": facts["fsdp"], "out": f"{out}.json"}
            jobs.append(job | {"oracle": str(run / "oracle.safetensors")})
            Path(job["out"]).unlink(missing_ok=True)
        for number, each in enumerate([[j] for j in jobs] if given.alone else [jobs]):
            launch(given.trainer, given.out, ranks, number, each)
        for job in jobs:
            found = json.loads(Path(job["out"]).read_text()) if Path(job["out"]).is_file() else ["it was not loaded"]
            loaded += 1
            wrong += bool(found)
            if found:
                print(f"{Path(job['run']).name}: {'; '.join(found[:3])}")
    print(f"{loaded} loaded, {wrong} differ")
    return 1 if wrong or not loaded else 0


if __name__ == "__main__":
    sys.exit(main())
