"""accelerate's stored runs under FSDP in their other layout: real accelerate loads each on other ranks. Slow.

    python tests/runs/run_fsdp_layouts.py OUT --trainer PYTHON --ranks 1 3

Every run is rewritten by `converter.reshard_state`; accelerate loads the files; weights and both moments are compared
with the run's oracle bit by bit, and two steps are trained. Exits with 1 on a difference. The Python that runs this has
rlhf-convert, PYTHON has accelerate.
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
SAVED = HERE / "dcp" / "runs"
RUNS = {"accelerate": "full", "accelerate-lora": "full", "accelerate-full": "sharded", "fsdp1": "full"}
"""Cases of dcp/train.py that are stored, and the layout that each gets."""


def main() -> int:
    import converter

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", required=True, help="a Python that has accelerate")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3])
    given = parser.parse_args()
    wrong = loaded = 0
    for ranks in given.ranks:
        jobs: list[dict[str, Any]] = []
        for case, layout in RUNS.items():
            if case == "fsdp1" and ranks == 1:  # torch runs it without shards then, and saves other states
                continue
            run, out = SAVED / f"{case}-n2", given.out / f"{case}-m{ranks}"
            shutil.rmtree(out, ignore_errors=True)
            given.out.mkdir(parents=True, exist_ok=True)
            converter.reshard_state(run, out, to=layout)
            jobs.append({"run": str(out), "case": case, "layout": layout, "out": f"{out}.json"})
            jobs[-1]["oracle"] = str(run / "oracle.safetensors")
            Path(jobs[-1]["out"]).unlink(missing_ok=True)
        file = given.out / f"jobs-{ranks}.json"
        file.write_text(json.dumps(jobs))
        with (given.out / f"ranks-{ranks}.log").open("w") as log:
            command = [given.trainer, str(HERE / "dcp" / "resume.py"), str(file), "--ranks", str(ranks)]
            subprocess.run(command, check=False, stdout=log, stderr=log)
        for job in jobs:
            found = json.loads(Path(job["out"]).read_text()) if Path(job["out"]).is_file() else ["it was not loaded"]
            loaded += 1
            wrong += bool(found)
            print(f"{Path(job['run']).name}: {'; '.join(found[:3]) or 'equal'}", flush=True)
    print(f"{loaded} loaded, {wrong} differ")
    return 1 if wrong or not loaded else 0


if __name__ == "__main__":
    sys.exit(main())
