"""Trains with megatron-core's own Adam, saves in three ways, and compares masters and moments with the live ones. Slow.

    python tests/runs/run_mcore_optimizer.py OUT --trainer PYTHON   a Python that has megatron-core and transformers
    python tests/runs/run_mcore_optimizer.py OUT --compare-only     what was saved before, again

`plain` is the optimizer that is not distributed, `fully_reshardable` the distributed one with names; of both every fp32
master and both moments must be the live ones, bit by bit. `dp_reshardable` has flat buffers without names: it must be
refused. Exits with 1 on a difference. The Python that runs this has rlhf-convert.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from run_mcore_matrix import DEFAULT, HERE, trainer

NAMED, UNNAMED = ("plain", "fully_reshardable"), "dp_reshardable"
_KEYS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}
"""What megatron-core calls tensors of its local modules when it saves them."""


def differences(out: Path, kind: str) -> list[str]:
    """Everything in which what is read differs from what lived."""
    import torch
    from safetensors.torch import load_file

    from converter.sources.megatron.source import SOURCE
    from zero.compare import evaluated

    live = load_file(out / kind / "live.safetensors")
    (folder,) = (out / kind).glob("iter_*")
    found: list[str] = []
    read = {
        "master": SOURCE.open_masters(folder, asked=str(folder)).tensors,
        "exp_avg": SOURCE.adam_moments(folder, which="exp_avg"),
        "exp_avg_sq": SOURCE.adam_moments(folder, which="exp_avg_sq"),
    }
    for which, tensors in read.items():
        held = evaluated(tensors)
        wanted = {_key(n.partition("/")[2]): t for n, t in live.items() if n.startswith(f"{which}/")}
        found += [f"{which}: {n}" for n in sorted(held.keys() ^ wanted.keys())]
        same = held.keys() & wanted.keys()
        found += [f"{which}/{n} differs" for n in sorted(same) if not torch.equal(held[n], wanted[n])]
        if not same:
            found.append(f"{which}: nothing was compared")
    return found


def _key(name: str) -> str:
    for ours, theirs in _KEYS.items():
        name = name.replace(ours, theirs)
    return name


def refusals(out: Path) -> list[str]:
    """What is read of buffers without names, which is to be nothing."""
    from converter.errors import ConvertError
    from converter.sources.megatron.source import SOURCE

    (folder,) = (out / UNNAMED).glob("iter_*")
    found = []
    for code, read in (
        ("dcp-no-masters", lambda: SOURCE.open_masters(folder, asked=str(folder))),
        ("dcp-no-moments", lambda: SOURCE.adam_moments(folder, which="exp_avg")),
    ):
        try:
            read()
            found.append(f"no {code}")
        except ConvertError as error:
            found += [] if error.code == code and "fully-reshardable" in error.what else [str(error)]
    return found


def main() -> None:
    """Train, save, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trainer")
    parser.add_argument("--compare-only", action="store_true")
    asked = parser.parse_args()
    if not asked.compare_only:
        asked.out.mkdir(parents=True, exist_ok=True)
        command = [asked.trainer or trainer(DEFAULT), str(HERE / "mcore" / "optimizer.py"), str(asked.out)]
        subprocess.run([*command, "--kinds", *NAMED, UNNAMED], check=True)
    is_wrong = False
    for kind in (*NAMED, UNNAMED):
        found = refusals(asked.out) if kind == UNNAMED else differences(asked.out, kind)
        is_wrong |= bool(found)
        words = "refused, with the flag" if kind == UNNAMED else "equal"
        print(f"{kind:20} {'; '.join(found[:5]) if found else words}", flush=True)
    raise SystemExit(1 if is_wrong else 0)


if __name__ == "__main__":
    main()
