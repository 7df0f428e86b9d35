"""Lets Megatron-Bridge itself put tiny models into GPTModels on CPU, and export them again; saves what it put there.

    python tests/runs/mcore/bridge.py OUT --cases qwen3 gemma2 --tp 2

`OUT/CASE/hf` is the model of transformers, `OUT/CASE/iter_0000010` what megatron-core saved of the GPTModel that the
bridge filled, `OUT/CASE/exported.safetensors` what the bridge made of it on its way back. No name or formula of ours
takes part. Needs megatron-core, transformers and Megatron-Bridge (`pip install --no-deps megatron-bridge`), whose
package wants TransformerEngine: words stand for its classes, of which none is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from absent import Finder
from fused import model_chunk
from models import built
from save import ITERATION, _save_sharded

from ranks import join, launch, place

VOCABULARY = 98
"""The bridge pads none: a multiple of its ranks."""


def auto_bridge() -> Any:
    """Megatron-Bridge's own entry, after megatron-core has found out that there is no TransformerEngine."""
    import megatron.core.models.gpt.gpt_layer_specs
    import megatron.core.models.mamba.mamba_layer_specs  # noqa: F401 - both ask for TransformerEngine

    sys.meta_path.append(Finder("transformer_engine", "modelopt"))  # type: ignore[arg-type]
    from megatron.bridge import AutoBridge

    return AutoBridge


def scatter_whole() -> None:
    """Let gloo send parts of a matrix's columns as they are read: it sends memory as it lies, NCCL does not."""
    import torch.distributed as dist

    plain = dist.scatter

    def scatter(tensor: Any, parts: Any = None, *given: Any, **named: Any) -> Any:
        return plain(tensor, parts and [p.contiguous() for p in parts], *given, **named)

    dist.scatter = scatter


def work(out: Path, case: str, asked: argparse.Namespace, entry: Any) -> None:
    """One model, on one rank."""
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file

    place(asked)
    theirs = built(case, vocabulary=VOCABULARY)
    if dist.get_rank() == 0:
        out.mkdir(parents=True)
        theirs.bfloat16().save_pretrained(out / "hf")
    dist.barrier()
    bridge = entry.from_hf_pretrained(out / "hf")
    model = model_chunk(theirs.config, asked).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # what the bridge leaves out shows
    bridge.load_hf_weights([model])
    _save_sharded(out / f"iter_{ITERATION:07d}", [model], theirs.config, asked)
    made, why = {}, ""
    try:
        for name, tensor in bridge.export_hf_weights([model], cpu=True, show_progress=False):
            made[name] = tensor.detach().contiguous().clone()
    except ValueError as error:  # on every rank alike
        made, why = {}, f"none: {type(error).__name__} {error}"
    dist.barrier()
    if dist.get_rank() == 0:
        save_file(made, out / "exported.safetensors")
        record = {"case": case, "tp": asked.tp, "pp": asked.pp, "no_export": why}
        (out / "fixture.json").write_text(json.dumps(record) + "\n")
    dist.barrier()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--worker", action="store_true")
    parser.set_defaults(
        ep=1, vpp=None, etp=None, first_stage=None, per_layer=False, critic=0, head_bias=False, no_args=False,
        optimizer=False, padded=VOCABULARY,
    )  # fmt: skip
    asked = parser.parse_args()
    if not asked.worker:
        raise SystemExit(not launch(asked.tp * asked.pp, sys.argv))
    warnings.simplefilter("ignore")
    join()
    scatter_whole()
    entry = auto_bridge()
    for case in asked.cases:
        try:
            work(asked.out / case, case, asked, entry)
        except Exception as error:
            print(f"{case}: {type(error).__name__} {error}", flush=True)
            if asked.tp * asked.pp > 1:
                raise


if __name__ == "__main__":
    main()
