"""What DeepSpeed's own tools make of a saved run, for comparison. Run by a Python that has `deepspeed`.

python tests/runs/zero/peers.py zero_to_fp32 RUN OUT      OUT/model.safetensors, or OUT/error.txt
python tests/runs/zero/peers.py universal RUN OUT         OUT/fp32.safetensors, of `zero/<parameter>/fp32.pt`
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    import torch
    from safetensors.torch import save_file

    tool, run, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    out.mkdir(parents=True, exist_ok=True)
    if tool == "zero_to_fp32":
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            found = get_fp32_state_dict_from_zero_checkpoint(str(run))
        except ValueError as error:
            (out / "error.txt").write_text(str(error))
            return
        save_file({n: t.clone().contiguous() for n, t in found.items()}, out / "model.safetensors")
        return
    from universal import convert

    error = convert(run, out / "universal")
    if error:
        raise SystemExit(error)
    saved = {p.parent.name: torch.load(p) for p in (out / "universal").glob("*/zero/*/fp32.pt")}  # noqa: TID251
    whole = {n: v["param"] if isinstance(v, dict) else v for n, v in saved.items()}
    save_file({n: t.clone().contiguous() for n, t in whole.items()}, out / "fp32.safetensors")


if __name__ == "__main__":
    main()
