"""Saves every family with real megatron-core on CPU and compares what is gathered with what lived. Slow.

    python tests/runs/run_mcore_matrix.py OUT                     builds an environment with megatron-core, once
    python tests/runs/run_mcore_matrix.py OUT --trainer PYTHON    a Python that has megatron-core and transformers
    python tests/runs/run_mcore_matrix.py OUT --compare-only      what was saved before, again
    python tests/runs/run_mcore_matrix.py OUT --only mixtral      runs whose names have this in them

Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
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

RUNS: dict[str, list[str]] = {
    "llama": ["--case", "llama"],
    "llama-layers-pp2": ["--case", "llama", "--pp", "2", "--per-layer"],
    "mistral": ["--case", "mistral"],
    "qwen2": ["--case", "qwen2"],
    "qwen2-tied-tp2-pp2": ["--case", "qwen2-tied", "--tp", "2", "--pp", "2"],
    "qwen3": ["--case", "qwen3"],
    "qwen3-tp2-optimizer": ["--case", "qwen3", "--tp", "2", "--optimizer"],
    "qwen3-fp32": ["--case", "qwen3", "--dtype", "fp32"],
    "qwen3-critic-tp2": ["--case", "qwen3-tied", "--tp", "2", "--critic", "1", "--no-args"],
    "qwen2-reward-3": ["--case", "qwen2", "--critic", "3", "--head-bias"],
    "mixtral": ["--case", "mixtral"],
    "qwen2_moe": ["--case", "qwen2_moe"],
    "qwen3_moe": ["--case", "qwen3_moe"],
    "qwen3_moe-ep2": ["--case", "qwen3_moe", "--ep", "2"],
    "qwen3_moe-layers": ["--case", "qwen3_moe", "--per-layer"],
    "deepseek_v2": ["--case", "deepseek_v2"],
    "deepseek_v3": ["--case", "deepseek_v3"],
    "glm4_moe": ["--case", "glm4_moe"],
    "old-qwen2-tied-tp2-pp2": ["--case", "qwen2-tied", "--tp", "2", "--pp", "2", "--format", "torch"],
    "old-qwen3-critic-tp2": ["--case", "qwen3", "--tp", "2", "--critic", "1", "--format", "torch"],
    "old-qwen3_moe-ep2": ["--case", "qwen3_moe", "--ep", "2", "--format", "torch"],
    "old-qwen3_moe-tp2-ep2": ["--case", "qwen3_moe", "--tp", "2", "--ep", "2", "--format", "torch"],
    "old-deepseek_v3-tp2": ["--case", "deepseek_v3", "--tp", "2", "--format", "torch"],
}


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


def save(python: str, out: Path, name: str) -> str:
    """One run; what the script said of the two models' logits, or why it failed."""
    command = [python, str(HERE / "mcore" / "save.py"), str(out / name), *RUNS[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (out / f"{name}.log").write_text(done.stdout + done.stderr)
    said = next((line for line in done.stdout.splitlines() if line.startswith("logits")), "")
    return said if done.returncode == 0 else f"NOT SAVED ({out / name}.log)"


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
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in (n for n in RUNS if asked.only in n):
        said = "" if asked.compare_only else save(asked.trainer or trainer(DEFAULT), asked.out, name)
        if not (asked.out / name / "fixture.json").is_file():
            failed += not asked.compare_only
            print(f"{name:24} {said or 'not there'}", flush=True)
            continue
        found = compare(asked.out, name)
        failed += bool(found)
        print(f"{name:24} {'; '.join(found[:3]) if found else 'equal'}  {said}", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
