"""Makes universal checkpoints of saved runs with DeepSpeed's own ds_to_universal.py. Needs `deepspeed`.

    python tests/runs/zero/universal.py OUT RUN...

OUT/<run> gets `global_step2_universal`, `latest_universal`, and what the run has beside its shards, with the oracle.
A run that the script can't convert (elastic states) is named and left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path


def convert(run: Path, out: Path) -> str | None:
    """One run; the converter's error, if it has one."""
    import deepspeed
    from deepspeed.checkpoint import ds_to_universal

    out.mkdir(parents=True, exist_ok=True)
    tag = (run / "latest").read_text().strip()
    target = out / f"{tag}_universal"
    shutil.rmtree(target, ignore_errors=True)
    asked = argparse.Namespace(
        input_folder=str(run / tag), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        ds_to_universal.main(asked)
    except (AttributeError, KeyError, AssertionError) as error:
        shutil.rmtree(target, ignore_errors=True)
        return f"{type(error).__name__}: {error}"
    facts = json.loads((run / "fixture.json").read_text())
    facts["universal"] = {"by": "deepspeed.checkpoint.ds_to_universal", "deepspeed": deepspeed.__version__}
    for path in run.iterdir():
        if path.is_file() and path.name != "latest" and path.parent != out:
            shutil.copy2(path, out)
    facts["files"] = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file())
    (out / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("run", type=Path, nargs="+")
    given = parser.parse_args()
    for run in given.run:
        error = convert(run, given.out / run.name)
        if error:
            print(f"{run.name}: not converted: {error}")


if __name__ == "__main__":
    main()
