"""Megatron-Core critics (Megatron-Bridge, slime, NeMo-RL): `output_layer` in a distributed checkpoint."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "mcore-output-layer",
    "Megatron-Bridge, mbridge, slime, NeMo-RL with Megatron",
    reward=None,
    critic=HeadSpec("output_layer", bias="config", missing="slime: drawn anew with a warning; NeMo-RL: always skipped"),
    writable=False,
    refused="the weights are in Megatron's own names and sharded layout, which isn't read; slime and NeMo-RL draw the "
    "head anew when it isn't in their own checkpoint. Export the model with the trainer's own tools first",
    marks=(Marks((), backbone="decoder.layers.0.self_attention.linear_qkv"),),
    serves=(
        Serves("slime", ("critic",)),
        Serves("nemo-rl-megatron", ("critic",)),
        Serves("megatron-bridge", ("critic",)),
    ),
    evidence=(Evidence("source", "slime backends/megatron_utils/model.py:124-176; NeMo-RL finetune load"),),
)
