"""The stored verl runs on other ranks: real verl loads each, and what lived has to live again. Slow.

    python tests/runs/run_verl_reshard.py OUT --trainer PYTHON     a Python that has verl (see verl_saves/train.py)
    python tests/runs/run_verl_reshard.py OUT --trainer PYTHON --ranks 2 3

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", required=True, help="a Python that has verl")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", default="", help="runs with this in their names")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    wrong = loaded = 0
    for ranks in given.ranks:
        jobs: list[dict[str, Any]] = []
        for run in sorted((HERE / "verl_saves" / "runs").glob(f"*{given.only}*")):
            out = given.out / f"{run.name}-m{ranks}"
            facts = json.loads((run / "fixture.json").read_text())
            refused = resharded(out, run, ranks)
            if refused:
                print(f"{out.name}: refused, {refused}")
                continue
            job = {"run": str(out), "case": facts["case"], "fsdp": facts["fsdp"], "out": f"{out}.json"}
            jobs.append(job | {"oracle": str(run / "oracle.safetensors")})
            Path(job["out"]).unlink(missing_ok=True)
        file = given.out / f"jobs-{ranks}.json"
        file.write_text(json.dumps(jobs))
        with (given.out / f"ranks-{ranks}.log").open("w") as log:
            command = [given.trainer, str(HERE / "verl_saves" / "resume.py"), str(file), "--ranks", str(ranks)]
            subprocess.run(command, check=False, stdout=log, stderr=log)
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
