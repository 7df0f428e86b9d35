"""Bone: MiSS under its earlier name, which PEFT has no more.

Source: https://github.com/huggingface/peft/blob/v0.17.1/src/peft/tuners/bone/layer.py
"""

from __future__ import annotations

import dataclasses

from converter.converters.merge.methods import miss

METHOD = dataclasses.replace(
    miss.METHOD,
    title="Bone",
    peft_type="BONE",
    factors=("bone_block",),
    fields={name: field for name, field in miss.METHOD.fields.items() if name not in ("mini_r", "miss_dropout")},
    zeros=("bone_block",),
    kernels=(),
)
