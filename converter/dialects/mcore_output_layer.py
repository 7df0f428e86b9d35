"""Megatron-Core critics (Megatron-Bridge, slime, NeMo-RL): `output_layer`. `gather` reads their checkpoints."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks, Serves

_DRAWN_ANEW = (
    "slime and NeMo-RL draw the head anew when it isn't in a checkpoint of their own, which has Megatron's names and "
    "sharded layout: no folder of a model gives it to them"
)

DIALECT = Dialect(
    "mcore-output-layer",
    "Megatron-Bridge, mbridge, slime, NeMo-RL with Megatron",
    reward=None,
    critic=HeadSpec("output_layer", bias="config", missing="slime: drawn anew with a warning; NeMo-RL: always skipped"),
    writable=False,
    marks=(Marks(("output_layer.weight",)),),
    serves=(
        Serves("slime", ("critic",), refused=_DRAWN_ANEW),
        Serves("nemo-rl-megatron", ("critic",), refused=_DRAWN_ANEW),
        Serves("megatron-bridge", ("critic",), refused=_DRAWN_ANEW),
    ),
    evidence=(Evidence("source", "slime backends/megatron_utils/model.py:124-176; NeMo-RL finetune load"),),
)
