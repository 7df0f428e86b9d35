"""The whole matrix of `reshard --world-size`: real DeepSpeed saves runs, and goes on with them on other ranks. Slow.

    python tests/runs/run_reshard_matrix.py OUT                   builds an environment with DeepSpeed, once
    python tests/runs/run_reshard_matrix.py OUT --trainer PYTHON  a Python that has deepspeed, transformers and peft
    python tests/runs/run_reshard_matrix.py OUT --before 2 3 --after 1 4 --case odd-fp32 --to-stage 1

Every run is resharded by the command line. What lives after DeepSpeed has loaded it has to be what lived when it was
saved, bit by bit: weights, buffers, masters, both moments, by name; learning rates, decays, steps, scheduler and client
state too. The losses of five further steps are compared with those of the run that went on uninterrupted.
Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
TOLERANCE = {"fp32": 1e-6, "bf16": 5e-3, "fp16": 5e-3}
"""Of a loss, relative. Sums over other ranks are rounded otherwise: in 16 bits a weight may then be another one."""
DEFAULT_CASES = (
    "odd-fp32", "odd", "odd-fp16", "lm-tied-fp32", "lm-fp16", "subgroups-fp32", "roundrobin-fp32", "roundrobin",
    "aligned-fp32", "roundrobin-aligned", "bf16-optimizer", "lora-fp32", "lora-lean", "lora-frozen-head", "reward",
)  # fmt: skip


@dataclass(frozen=True)
class Try:
    """One run on one number of ranks, gone on with on another."""

    case: str
    stage: int
    before: int
    after: int
    to: int
    universal: bool = False
    through: bool = False

    @property
    def saved(self) -> str:
        return f"{self.case}-z{self.stage}-n{self.before}"

    @property
    def name(self) -> str:
        form = "-universal" if self.universal else f"-z{self.to}" if self.to != self.stage else ""
        return f"{self.saved}-m{self.after}{form}{'-through' if self.through else ''}"


def tries(
    cases: Iterable[str],
    before: Iterable[int],
    after: Iterable[int],
    to: int | None,
    *,
    universal: bool = False,
    through: bool = False,
) -> list[Try]:
    """All that `train` knows stages of; `to` another stage, or as they were saved."""
    from zero.resume import cases as known

    stages = [(c, s) for c in cases for s in known()[c].stages if s and s != to]
    return [Try(c, s, n, m, to or s, universal, through) for c, s in stages for n in before for m in after]


def run_jobs(python: str, out: Path, ranks: int, jobs: list[dict[str, Any]]) -> None:
    """A launch of `ranks` processes that do all jobs; one that fails ends it, and the rest are done by another."""
    while jobs:
        file = out / f"jobs-{jobs[0]['do']}-{ranks}.json"
        file.write_text(json.dumps(jobs))
        with (out / f"{file.stem}.log").open("a") as log:
            command = [python, str(HERE / "zero" / "resume.py"), str(file), "--ranks", str(ranks)]
            subprocess.run(command, check=False, stdout=log, stderr=log)
        left = [job for job in jobs if not is_done(job)]
        if len(left) == len(jobs):
            left = left[1:]
        jobs = left


def is_done(job: dict[str, Any]) -> bool:
    """Whether a job has left what it found, or why it found nothing."""
    if job["do"] == "save":
        return any((Path(job["run"]) / name).is_file() for name in ("losses.json", "error.txt"))
    return any((Path(job["out"]) / name).is_file() for name in ("resumed.json", "error.txt"))


def save(python: str, out: Path, asked: Iterable[Try]) -> None:
    """The runs that don't lie in `out` yet."""
    for ranks in sorted({t.before for t in asked}):
        runs = {t.saved: t for t in asked if t.before == ranks and not (out / t.saved / "losses.json").is_file()}
        jobs = [{"do": "save", "run": str(out / n), "case": t.case, "stage": t.stage} for n, t in runs.items()]
        run_jobs(python, out, ranks, jobs)


def reshard(out: Path, each: Try) -> str:
    """What the command line says where it refuses; empty where it wrote."""
    source, target = out / each.saved, out / each.name
    how = ("--to", "universal") if each.universal else ("--stage", str(each.to))
    if each.through:
        said = written(source, out / f"{each.name}-universal", "--to", "universal")
        if said:
            return said
        source = out / f"{each.name}-universal"
    return written(source, target, "--world-size", str(each.after), *how)


def written(source: Path, target: Path, *words: str) -> str:
    """What `reshard` says where it refuses; empty where it wrote."""
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-m", "converter", "reshard", str(source), str(target), *words, "-q"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE.parents[1])
    return done.stderr if done.returncode else ""


def resume(python: str, out: Path, asked: Iterable[Try]) -> None:
    """Load and go on, each number of ranks in one launch."""
    for each in asked:
        shutil.rmtree(f"{out / each.name}-live", ignore_errors=True)
    for ranks in sorted({t.after for t in asked}):
        jobs = [
            {"do": "resume", "run": str(out / t.name), "out": f"{out / t.name}-live", "case": t.case, "stage": t.to}
            | ({"universal": True} if t.universal else {})
            for t in asked
            if t.after == ranks
        ]
        run_jobs(python, out, ranks, jobs)


def faults(out: Path, each: Try) -> list[str]:
    """Everything in which what lives after loading differs from what lived when the run was saved."""
    from zero.resume import cases

    case = cases()[each.case]
    return faults_of(Path(f"{out / each.name}-live"), out / each.saved, case.dtype, case.groups)


def faults_of(live: Path, run: Path, dtype: str, groups: int) -> list[str]:
    """The same of any run that `resume.py` saved, and of what it left when it had loaded it."""
    from safetensors.torch import load_file

    from zero.compare import differences
    from zero.resume import CLIENT, STEPS

    if not (live / "resumed.json").is_file():
        error = live / "error.txt"
        return [error.read_text().strip().splitlines()[-1] if error.is_file() else "it was not loaded"]
    found = differences(load_file(live / "oracle.safetensors"), load_file(run / "oracle.safetensors"))
    told = json.loads((live / "resumed.json").read_text())
    lived = json.loads((run / "losses.json").read_text())
    decays = [0.1 * i for i in range(groups)]
    client = {k: repr(sorted(v) if k == "words" else v) for k, v in CLIENT.items()}
    wanted = {"rates": lived["rates"], "decays": decays, "steps": STEPS, "scheduler": STEPS, "client": client}
    found += [f"{k}: {told[k]}, and was {v}" for k, v in wanted.items() if told[k] != v]
    drift = max(abs(a - b) / abs(b) for a, b in zip(told["losses"], lived["losses"], strict=True))
    most = TOLERANCE[dtype]
    return found + ([f"losses drift by {drift:.1e}, more than {most:.0e}"] if not drift <= most else [])


def table(out: Path, asked: list[Try], refused: dict[str, str]) -> int:
    """Print how many are equal, by stage, ranks before and after; the number that differ."""
    equal: Counter[tuple[int, int, int]] = Counter()
    total: Counter[tuple[int, int, int]] = Counter()
    for each in asked:
        found = [refused[each.name]] if each.name in refused else faults(out, each)
        place = (each.stage, each.before, each.after)
        total[place] += 1
        equal[place] += not found
        if found:
            print(f"{each.name}: {'; '.join(found[:3])}")
    after = sorted({t.after for t in asked})
    print("stage  ranks  " + "".join(f"{f'-> {m}':>9}" for m in after))
    for stage, before in sorted({(t.stage, t.before) for t in asked}):
        cells = [f"{equal[stage, before, m]}/{total[stage, before, m]}" for m in after]
        print(f"{stage:<7}{before:<7}" + "".join(f"{c:>9}" for c in cells))
    wrong = total.total() - equal.total()
    print(f"{total.total()} resumed, {wrong} differ")
    return wrong if total else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer", help="a Python that has DeepSpeed; without it an environment is built")
    parser.add_argument("--before", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--after", type=int, nargs="+", default=[1, 2, 3, 4, 6])
    parser.add_argument("--case", action="append")
    parser.add_argument("--to-universal", action="store_true", help="resume from DeepSpeed's universal checkpoints")
    parser.add_argument("--through-universal", action="store_true", help="by way of our universal checkpoint")
    parser.add_argument("--to-stage", type=int, help="resume in this stage; default: the one that saved")
    given = parser.parse_args()
    from run_zero_matrix import DEFAULT, trainer

    python = given.trainer or trainer(DEFAULT)
    given.out.mkdir(parents=True, exist_ok=True)
    cases = given.case or DEFAULT_CASES
    asked = tries(
        cases, given.before, given.after, given.to_stage, universal=given.to_universal, through=given.through_universal
    )
    save(python, given.out, asked)
    refused = {t.name: said for t in asked if (said := reshard(given.out, t))}
    resume(python, given.out, [t for t in asked if t.name not in refused])
    return 1 if table(given.out, asked, refused) else 0


if __name__ == "__main__":
    sys.exit(main())
