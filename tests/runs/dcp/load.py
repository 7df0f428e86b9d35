"""Loads distributed checkpoints with torch's own planner on several ranks, and writes what each tensor then is.

    python tests/runs/dcp/load.py CHECKPOINT OUT.safetensors --ranks 2

Every tensor is cut among the ranks along its first dimension, loaded, and gathered. Keys are those of `.metadata`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks


def work(folder: str, out: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state = {}
    for key, entry in dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        empty = torch.zeros(entry.size, dtype=entry.properties.dtype)
        state[key] = distribute_tensor(empty, mesh, [Shard(0)]) if empty.dim() and empty.numel() else empty
    dcp.load(state, checkpoint_id=folder)
    whole = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()}
    if dist.get_rank() == 0:
        save_file({k: t.contiguous() for k, t in whole.items()}, out)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.folder, given.out)
    else:
        run_ranks(given.ranks, __file__, given.folder, given.out, "--worker")


if __name__ == "__main__":
    main()
