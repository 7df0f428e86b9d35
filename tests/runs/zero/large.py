"""Large ZeRO-2 and ZeRO-3 checkpoints in DeepSpeed's layout, written with torch.save, for measuring time and memory.

Real DeepSpeed would need the memory of training them; `tests/benchmarks/run.py` has DeepSpeed's own reader compare
what it finds in these files with what was gathered. Adam's moments, which neither reads, are in them with `--moments`,
for those who write a run's state anew.

Source of the layout: https://github.com/deepspeedai/DeepSpeed/blob/v0.19.8/deepspeed/utils/zero_to_fp32.py

    python tests/runs/zero/large.py FOLDER --stage 3 --layers 5 --ranks 4
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TAG = "global_step5"


@dataclass(frozen=True)
class Size:
    """A Llama by its widths; the defaults make 98 million parameters at 5 layers, 392 million at 28."""

    layers: int
    hidden: int = 1024
    inner: int = 2816
    vocab: int = 32000

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every parameter; the output embedding is tied."""
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            for name in "qkvo":
                yield f"{at}.self_attn.{name}_proj.weight", (self.hidden, self.hidden)
            for name, shape in (("gate", (self.inner, self.hidden)), ("up", (self.inner, self.hidden))):
                yield f"{at}.mlp.{name}_proj.weight", shape
            yield f"{at}.mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{at}.input_layernorm.weight", (self.hidden,)
            yield f"{at}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)

    @property
    def parameters(self) -> int:
        """How many numbers."""
        return sum(torch.Size(s).numel() for _, s in self.shapes())

    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.hidden,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": 16,
            "vocab_size": self.vocab, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        }  # fmt: skip


def make(folder: Path, size: Size, stage: int, *, ranks: int = 4, moments: bool = False) -> None:
    """The run's folder: config, `latest`, and a tag with the files of its ranks."""
    tag = folder / TAG
    tag.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(size.config()) + "\n")
    (folder / "latest").write_text(TAG)
    shapes = OrderedDict((n, torch.Size(s)) for n, s in size.shapes())
    masters = _masters(shapes)
    module = OrderedDict(
        (n, t.bfloat16() if stage < 3 else torch.empty(0, dtype=torch.bfloat16)) for n, t in masters.items()
    )
    model = {
        "module": module, "buffer_names": [], "optimizer": None, "param_shapes": [shapes],
        "frozen_param_shapes": None, "frozen_param_fragments": None, "shared_params": {}, "dp_world_size": ranks,
        "mp_world_size": 1, "global_steps": 5, "ds_version": "0.19.8", "lr_scheduler": None,
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}},
    }  # fmt: skip
    for rank in range(ranks):
        if stage == 3:
            torch.save(model, tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        state = _third(masters, rank, ranks) if stage == 3 else _second(masters, rank, ranks)
        if moments:
            _add_moments(state, stage)
        outer = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
        torch.save(outer, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    if stage < 3:
        torch.save(model, tag / "mp_rank_00_model_states.pt")


def _masters(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {n: torch.randn(s) * 0.02 for n, s in shapes.items()}


def _second(masters: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Any]:
    """One flat group, cut into equal stretches; what the last one is padded with isn't saved."""
    flat = torch.cat([t.flatten() for t in masters.values()])
    part = -(-len(flat) // (2 * ranks)) * 2
    mine = flat[rank * part : (rank + 1) * part].clone()
    return {
        "zero_stage": 2, "partition_count": [ranks], "single_partition_of_fp32_groups": [mine],
        "group_paddings": [part - len(mine)], "base_optimizer_state": {"state": {}, "param_groups": []},
    }  # fmt: skip


def _third(masters: dict[str, torch.Tensor], rank: int, ranks: int) -> dict[str, Any]:
    """Each parameter cut and padded alone; the pieces end to end."""
    pieces = []
    for tensor in masters.values():
        part = -(-tensor.numel() // ranks)
        piece = tensor.flatten()[rank * part : (rank + 1) * part]
        pieces.append(torch.nn.functional.pad(piece, (0, part - len(piece))))
    return {
        "zero_stage": 3, "partition_count": ranks, "fp32_flat_groups": [torch.cat(pieces)],
        "optimizer_state_dict": {"state": {}, "param_groups": [{"params": [0]}]},
    }  # fmt: skip


def _add_moments(state: dict[str, Any], stage: int) -> None:
    """Adam's state of the one flat group, as large as the padded masters."""
    (masters,) = state["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
    count = len(masters) + (0 if stage == 3 else state["group_paddings"][0])
    adam = {"step": torch.tensor(5.0), "exp_avg": torch.randn(count), "exp_avg_sq": torch.rand(count)}
    group = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    state[key] = {"state": {0: adam}, "param_groups": [group]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--stage", type=int, choices=(2, 3), required=True)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--moments", action="store_true")
    given = parser.parse_args()
    width = given.hidden * 11 // 4
    size = Size(given.layers, given.hidden, width, given.vocab)
    make(given.folder, size, given.stage, ranks=given.ranks, moments=given.moments)
