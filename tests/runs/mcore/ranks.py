"""Processes that are ranks of Megatron's on CPU: started, joined, and placed over TP, PP, VPP and EP.

Needs `torch` and `megatron-core`. One start serves many saves or loads: importing all of it takes longer than they do.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import Any


def launch(ranks: int, arguments: list[str]) -> bool:
    """Start one process a rank; True where all ended well. The others are stopped once one has failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank in range(ranks):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in place.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        workers.append(subprocess.Popen([sys.executable, *arguments, "--worker"], env=env))
    while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers):
        time.sleep(0.1)
    failed = any(w.poll() for w in workers)
    for worker in workers:
        if failed and worker.poll() is None:
            worker.kill()
        worker.wait()
    return not failed


def join() -> None:
    """This process as one rank, with what megatron-core asks of a GPU answered by the CPU."""
    import torch
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.moe import router

    tracker = random.CudaRNGStatesTracker
    # There is no GPU, and no dropout that would need its random numbers.
    tracker.fork = lambda self, name="": contextlib.nullcontext()
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    # Without TransformerEngine this calls a function of it that is not there.
    # It takes a bias since 0.14 or so, and the dtype last.
    router.router_gating_linear = lambda x, *given: torch.nn.functional.linear(x, *given[:-1]).to(given[-1])
    multi_latent_attention.HAVE_TE = False  # it says that there is one
    # Latent attention gives it two sizes that only TransformerEngine's takes; no latent model is run here.
    plain = DotProductAttention.__init__

    def without_sizes(self: Any, *given: Any, **named: Any) -> None:
        plain(self, *given, **{n: v for n, v in named.items() if n not in ("k_channels", "v_channels")})

    DotProductAttention.__init__ = without_sizes
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    connect()


def connect() -> None:
    """Meet the other ranks, for the next run's groups."""
    import torch.distributed as dist

    place = f"tcp://127.0.0.1:{int(os.environ['MASTER_PORT']) + len(_placed)}"
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=place, rank=rank, world_size=count, timeout=timedelta(seconds=900)
    )  # fmt: skip


_placed: list[tuple[Any, ...]] = []


def place(asked: argparse.Namespace) -> None:
    """Groups of ranks for a run's sizes; those of the run before are kept where they are the same.

    Else they are ended: each group has threads of its own, hundreds after a few runs.
    """
    import torch.distributed as dist
    from megatron.core import parallel_state

    sizes = sizes_of(asked)
    if sizes not in _placed[-1:]:
        if _placed:
            dist.barrier()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
            connect()
        parallel_state.initialize_model_parallel(
            asked.tp, asked.pp, virtual_pipeline_model_parallel_size=asked.vpp, expert_model_parallel_size=asked.ep,
            expert_tensor_parallel_size=expert_tp(asked),
        )  # fmt: skip
        _placed.append(sizes)


def sizes_of(asked: argparse.Namespace) -> tuple[int, ...]:
    """What groups of ranks depend on."""
    return (asked.tp, asked.pp, asked.vpp or 0, asked.ep, expert_tp(asked))


def expert_tp(asked: argparse.Namespace) -> int:
    """Over how many ranks an expert's matrices are split: where nothing is said, one with EP, else those of TP."""
    return int(asked.etp or (1 if asked.ep > 1 else asked.tp))


def ranks_for(asked: argparse.Namespace) -> int:
    """The fewest ranks that a run takes."""
    return int(max(asked.tp, asked.ep * expert_tp(asked)) * asked.pp)
