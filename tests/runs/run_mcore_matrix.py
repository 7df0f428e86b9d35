"""Saves every family with real megatron-core on CPU, over its sizes, and compares what is gathered with what lived.

    python tests/runs/run_mcore_matrix.py OUT                     builds an environment with megatron-core, once
    python tests/runs/run_mcore_matrix.py OUT --trainer PYTHON    a Python that has megatron-core and transformers
    python tests/runs/run_mcore_matrix.py OUT --compare-only      what was saved before, again
    python tests/runs/run_mcore_matrix.py OUT --only mixtral      runs whose names have this in them
    python tests/runs/run_mcore_matrix.py OUT --all               every family at every size
    python tests/runs/run_mcore_matrix.py OUT --draw 10           others in their place, drawn at random (--seed 1)

TP 1, 2 x PP 1, 2 x EP 1, 2, both formats, layers stacked and apart, virtual and uneven stages, heads of critics. All of
them are saved by one start of four ranks. Slow: about ten minutes. Exits with 1 on a difference, and where a run is not
saved. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "support")]
DEFAULT = Path("~/.cache/rlhf-convert-trainers/megatron-core").expanduser()
PACKAGES = ("torch==2.13.0", "numpy", "safetensors", "transformers==5.23.0", "einops", "pyyaml")
MEGATRON = "megatron-core==0.16.1"

DENSE = ("llama", "mistral", "qwen2", "qwen2-tied", "qwen3", "qwen3-tied")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")
SIZES = ("", "tp2", "pp2", "tp2-pp2")
OF_EXPERTS = ("ep2", "tp2-ep2", "pp2-ep2", "tp2-pp2-ep2", "tp2-ep2-etp2")
OTHERS: dict[str, list[str]] = {
    "llama-vpp2": ["--case", "llama", "--pp", "2", "--vpp", "2", "--layers", "4"],
    "qwen3_moe-vpp2-ep2": ["--case", "qwen3_moe", "--pp", "2", "--vpp", "2", "--layers", "4", "--ep", "2"],
    "deepseek_v3-vpp2": ["--case", "deepseek_v3", "--pp", "2", "--vpp", "2", "--layers", "4"],
    "qwen2-uneven": ["--case", "qwen2", "--pp", "2", "--layers", "3", "--first-stage", "1", "--tp", "2"],
    "qwen3-12-layers": ["--case", "qwen3", "--layers", "12", "--pp", "2"],
    "llama-apart-pp2": ["--case", "llama", "--pp", "2", "--per-layer"],
    "qwen3-apart-12-layers": ["--case", "qwen3", "--layers", "12", "--per-layer", "--tp", "2"],
    "qwen3_moe-apart": ["--case", "qwen3_moe", "--per-layer", "--ep", "2"],
    "deepseek_v3-mtp": ["--case", "deepseek_v3-mtp"],
    "deepseek_v3-mtp-tp2-pp2": ["--case", "deepseek_v3-mtp", "--tp", "2", "--pp", "2"],
    "deepseek_v3-mtp-ep2": ["--case", "deepseek_v3-mtp", "--ep", "2"],
    "glm4_moe-mtp-pp2": ["--case", "glm4_moe-mtp", "--pp", "2"],
    "qwen3-fp32": ["--case", "qwen3", "--dtype", "fp32"],
    "qwen3-optimizer-tp2": ["--case", "qwen3", "--tp", "2", "--optimizer"],
    "qwen3-critic": ["--case", "qwen3-tied", "--critic", "1", "--no-args"],
    "qwen3-critic-tp2-pp2": ["--case", "qwen3-tied", "--tp", "2", "--pp", "2", "--critic", "1", "--no-args"],
    "qwen3_moe-critic-ep2": ["--case", "qwen3_moe", "--ep", "2", "--critic", "1"],
    "deepseek_v3-critic-tp2": ["--case", "deepseek_v3", "--tp", "2", "--critic", "1"],
    "qwen3_next": ["--case", "qwen3_next"],
    "qwen3_next-tp2": ["--case", "qwen3_next", "--tp", "2"],
    "qwen3_next-pp2": ["--case", "qwen3_next", "--pp", "2"],
    "qwen3_next-tp2-ep2": ["--case", "qwen3_next", "--tp", "2", "--ep", "2"],
    "qwen3_next-critic-ep2": ["--case", "qwen3_next", "--ep", "2", "--critic", "1"],
    "qwen2-labels-tp2": ["--case", "qwen2", "--tp", "2", "--critic", "3", "--head-bias"],
}
NOT_OLD = frozenset({"qwen3-optimizer-tp2", "llama-apart-pp2", "qwen3-apart-12-layers", "qwen3_moe-apart"}) | {
    name for name in OTHERS if name.startswith("qwen3_next-")
}
"""What the old format has no other form for, or what is refused in it: parts of gated delta nets split over ranks."""
NO_ARGS = "--no-args"


def _sizes(words: str) -> list[str]:
    """`tp2-pp2` as options."""
    return [part for word in words.split("-") if word for part in (f"--{word[:-1]}", word[-1])]


def every_run() -> dict[str, list[str]]:
    """Runs by name, with the arguments of `mcore/save.py`."""
    found: dict[str, list[str]] = {}
    for case in (*DENSE, *MIXTURES):
        for sizes in (*SIZES, *(OF_EXPERTS if case in MIXTURES else ())):
            # Megatron splits no expert that has biases.
            whole = ["--etp", "1"] if case == "gpt_oss" and "etp" not in sizes else []
            found["-".join(w for w in (case, sizes) if w)] = ["--case", case, *_sizes(sizes), *whole]
    del found["gpt_oss-tp2-ep2-etp2"]
    found |= OTHERS
    old = {f"old-{n}": [a for a in given if a != NO_ARGS] for n, given in found.items() if n not in NOT_OLD}
    return found | {name: [*given, "--format", "torch"] for name, given in old.items()}


CHOSEN = re.compile(
    r"(?:old-)?(?:[a-z0-9_]+|.*-mtp.*|.*(?:vpp|uneven|layers|apart|critic|labels|fp32|optimizer|next-).*|"
    r"qwen2-tied.*|qwen3_moe-.+|(?:deepseek_v3|gpt_oss)-(?:tp2-pp2|ep2)|"
    r"(?:mixtral|qwen2_moe|glm4_moe|deepseek_v2)-tp2-ep2)"
)
"""Runs without `--all`: every family, and every size of those that differ most."""


def drawn(count: int, seed: int) -> dict[str, list[str]]:
    """Runs of several axes at once that are not listed, the same ones for a seed."""
    draw, known = random.Random(seed), {frozenset(given) for given in every_run().values()}
    found: dict[str, list[str]] = {}
    while len(found) < count:
        case = draw.choice((*DENSE, *MIXTURES))
        tp, pp, ep = draw.choice((1, 2)), draw.choice((1, 2)), draw.choice((1, 2)) if case in MIXTURES else 1
        given = {"--tp": tp, "--pp": pp, "--ep": ep, "--layers": draw.choice((2, 4))}
        words = [case, f"tp{tp}", f"pp{pp}", f"ep{ep}", f"l{given['--layers']}"]
        if pp == 2 and given["--layers"] == 4:
            for option, value in draw.choice(({}, {"--vpp": 2}, {"--first-stage": 1})).items():
                given[option] = value
                words.append(f"{option[2:5]}{value}")
        if case == "gpt_oss" or (ep == 2 and draw.random() < 0.3):
            given["--etp"] = 1 if case == "gpt_oss" or pp == 2 or tp == 1 else 2
            words.append(f"etp{given['--etp']}")
        more = [a for pair in given.items() for a in map(str, pair)]
        if draw.random() < 0.3:
            rows = draw.choice((1, 1, 3))
            more += ["--critic", str(rows), *(["--head-bias"] if rows == 3 else [])]
            words.append(f"critic{rows}")
        for flag, chance in (("--per-layer", 0.3), ("--optimizer", 0.15), (NO_ARGS, 0.2), ("--format", 0.35)):
            if draw.random() < chance and not (
                "--format" in flag and set(more) & {"--per-layer", "--optimizer", NO_ARGS}
            ):
                more += ["--format", "torch"] if flag == "--format" else [flag]
                words.append(flag[2:])
        if frozenset(["--case", case, *more]) not in known:
            found["-".join(words)] = ["--case", case, *more]
    return found


def trainer(folder: Path) -> str:
    """A Python with megatron-core, in an environment that is built if it isn't there."""
    python = folder / "bin" / "python"
    if not (folder / "built").is_file():
        print(f"building {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "-q", "-c", str(HERE.parents[1] / "constraints.txt")]
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([*pip, "--no-deps", MEGATRON], check=True)
        (folder / "built").touch()
    return str(python)


def save(python: str, out: Path, runs: dict[str, list[str]]) -> None:
    """All runs that are not there yet."""
    left = out / "runs.json"
    left.write_text(json.dumps(runs))
    command = [python, str(HERE / "mcore" / "save.py"), str(out), "--many", str(left)]
    with (out / "save.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=False)


def compare(out: Path, name: str) -> list[str]:
    """Everything in which a gathered run differs from what lived."""
    from mcore.compare import oracle, written
    from oracle.command import run
    from zero.compare import differences

    target = out / f"{name}.gathered"
    shutil.rmtree(target, ignore_errors=True)
    done = run("gather", str(out / name), str(target))
    if done.code:
        return [f"exit {done.code}: {done.err.strip()}"]
    found = differences(written(target), oracle(out / name))
    shutil.rmtree(target)
    return found


def main() -> None:
    """Save and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer")
    parser.add_argument("--compare-only", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--draw", type=int, default=0, metavar="COUNT")
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    every = {n: given for n, given in every_run().items() if asked.all or CHOSEN.fullmatch(n)}
    if asked.draw:
        every = drawn(asked.draw, asked.seed)
    runs = {name: given for name, given in every.items() if asked.only in name}
    if not asked.compare_only:
        save(asked.trainer or trainer(DEFAULT), asked.out, runs)
    counts = {"equal": 0, "different": 0, "not saved": 0}
    for name in runs:
        if not (asked.out / name / "fixture.json").is_file():
            said = "not saved"
        else:
            found = compare(asked.out, name)
            said = "; ".join(found[:3]) if found else "equal"
        counts[said if said in counts else "different"] += 1
        print(f"{name:32} {said}", flush=True)
    print(", ".join(f"{n} {word}" for word, n in counts.items()))
    raise SystemExit(1 if counts["different"] + counts["not saved"] else 0)


if __name__ == "__main__":
    main()
