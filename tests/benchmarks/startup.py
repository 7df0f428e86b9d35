"""Start-up: `--help`, and `inspect` of a 70B model's headers; the median of seven runs each, and what was imported.

python tests/benchmarks/startup.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from big_headers import llama_70b

RUNS = 7
HEAVY = {"torch", "transformers", "peft"}


def seconds(command: list[str]) -> float:
    """Wall time of one run, interpreter start included."""
    begun = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begun


def main() -> None:
    """Prints one line a command."""
    program = [str(Path(sys.executable).with_name("rlhf-convert"))]
    with tempfile.TemporaryDirectory() as folder:
        model = llama_70b(Path(folder) / "model")
        seconds([*program, "--help"])  # byte code and file cache
        for arguments in (["--help"], ["merge-lora", "--help"], ["inspect", str(model)]):
            times = [seconds([*program, *arguments]) for _ in range(RUNS)]
            shown = " ".join(a if a != str(model) else "70B-HEADERS" for a in arguments)
            code = (
                "import sys; from converter.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
            )
            done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
            heavy = sorted({m.split(".")[0] for m in done.stderr.split()} & HEAVY)
            print(f"{shown:<22} median {statistics.median(times):.3f} s of {RUNS}, heavy imports: {heavy or 'none'}")


if __name__ == "__main__":
    main()
