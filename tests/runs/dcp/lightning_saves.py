"""Trains tiny models with Lightning under FSDP on CPU and saves what its Trainer saves, each beside its oracle.

Needs `lightning` beside what `train.py` needs (`pip install --no-deps lightning pytorch-lightning lightning-utilities
torchmetrics`). Starts one process a rank:

    python tests/runs/dcp/lightning_saves.py OUT --ranks 2 --case fsdp-sharded

The run is where Lightning puts it: OUT/<case>/lightning_logs/version_0/checkpoints/<name>.ckpt.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from living import clean, leave_on_cpu, live, live_fsdp1
from models import build
from train import finish

from ranks import run_ranks

STEPS = 2


@dataclass(frozen=True)
class Saved:
    """A model, `fsdp` (FSDPStrategy) or `parallel` (ModelParallelStrategy: FSDP2), and how it saves."""

    model: str
    strategy: str
    sharded: bool


CASES = {
    "fsdp-sharded": Saved("lm-tied", "fsdp", sharded=True),
    "fsdp-full": Saved("lm-tied", "fsdp", sharded=False),
    "fsdp-frozen-sharded": Saved("lm-frozen-mlp", "fsdp", sharded=True),
    "parallel-sharded": Saved("lm", "parallel", sharded=True),
    "parallel-full": Saved("reward", "parallel", sharded=False),
}


def work(out: Path, cases: list[str], ranks: int) -> None:
    """One rank: every case, one after the other."""
    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    leave_on_cpu()
    for name in cases:
        folder = out / f"lightning-{name}-n{ranks}"
        if dist.is_initialized():
            dist.barrier()
        found, config = save(folder, CASES[name])
        if dist.get_rank() == 0:
            facts = {"case": name, "layout": "lightning", "model": CASES[name].model, "ranks": ranks, "steps": STEPS}
            finish(folder, found, {**facts, "config": config})
            forget_places(folder)
        dist.barrier()


def save(folder: Path, case: Saved) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps of the Trainer, which saves after them; what then lived, by the names of the model inside."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.distributed.fsdp import fully_shard

    if os.environ["RANK"] == "0" and folder.exists():
        shutil.rmtree(folder)
    found: dict[str, Any] = {}
    torch.manual_seed(1)
    inner, loss = build(case.model)

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = inner

        def configure_model(self) -> None:
            if case.strategy == "parallel":
                mesh = self.device_mesh["data_parallel"]
                for layer in self.model.model.layers:
                    fully_shard(layer, mesh=mesh)
                fully_shard(self.model, mesh=mesh)

        def training_step(self, batch: Any, number: int) -> Any:
            torch.manual_seed(100 * number + self.global_rank)
            return loss(self.model)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)

        def on_train_end(self) -> None:
            optimizer = self.trainer.optimizers[0]
            if case.strategy == "parallel":
                found.update(live(self.model, optimizer))
                return
            given = self.trainer.strategy.model, SimpleNamespace(optimizer=optimizer)
            whole = live_fsdp1(*given)
            found.update({clean(n).replace("/model.", "/", 1): t for n, t in whole.items()})

    place = folder / "lightning_logs" / "version_0" / "checkpoints"
    trainer = pl.Trainer(
        accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=strategy_of(case), max_steps=STEPS,
        callbacks=[ModelCheckpoint(dirpath=place)], logger=False, enable_progress_bar=False,
        use_distributed_sampler=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(range(STEPS)))
    return found, inner.config.to_dict()


def forget_places(folder: Path) -> None:
    """Paths of this machine are taken out of what was saved in pieces: Lightning records absolute ones."""
    import pickle  # noqa: TID251

    import torch

    def relative(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: relative(v) for k, v in value.items()}
        inside = isinstance(value, str) and Path(value).is_relative_to(folder.absolute())
        return str(Path(value).relative_to(folder.absolute().parent)) if inside else value

    for meta in folder.rglob("meta.pt"):
        torch.save(relative(torch.load(meta, weights_only=False)), meta)  # noqa: TID251 - Lightning wrote it
        metadata = pickle.loads((meta.parent / ".metadata").read_bytes())
        metadata.storage_meta.checkpoint_id = meta.parent.name
        (meta.parent / ".metadata").write_bytes(pickle.dumps(metadata, protocol=2))


def strategy_of(case: Saved) -> Any:
    """Lightning's own strategy; that of FSDP1 asks for a GPU unless its class and device are others."""
    import torch
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FullyShardedDataParallel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if case.strategy == "parallel":
        # By default one replica a node: its ranks are for tensor parallelism, and without any each trains on its own.
        return ModelParallelStrategy(int(os.environ["WORLD_SIZE"]), 1, save_distributed_checkpoint=case.sharded)

    class OnCpu(FSDPStrategy):
        def _setup_model(self, model: Any) -> Any:
            how = {"sharding_strategy": self.sharding_strategy, "device_id": torch.device("cpu"), **self.kwargs}
            return super()._setup_model(FullyShardedDataParallel(model, **how))

    return OnCpu(
        auto_wrap_policy={LlamaDecoderLayer},
        state_dict_type="sharded" if case.sharded else "full",
        use_orig_params=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    if given.worker:
        work(given.out, given.case or sorted(CASES), given.ranks)
        return
    chosen = [word for case in given.case or sorted(CASES) for word in ("--case", case)]
    # So that Lightning takes the ranks as they were started.
    run_ranks(given.ranks, __file__, given.out, "--ranks", given.ranks, "--worker", *chosen, TORCHELASTIC_RUN_ID="1")


if __name__ == "__main__":
    main()
