"""Starling-RM-34B: Llama names under `transformer.`, and a class that only sounds like transformers' own."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "starling34",
    "Starling-RM-34B",
    reward=HeadSpec("v_head", missing="random, and with transformers' class of that name everything is"),
    critic=None,
    backbone="transformer.",
    pooling="last-non-pad",
    writable=False,
    marks=(Marks(("v_head.weight",), backbone="transformer.", classes=("ForSequenceClassification",)),),
    evidence=(
        Evidence("experiment", "the class as vendored in rewardbench"),
        Evidence("text", "model card", "https://huggingface.co/Nexusflow/Starling-RM-34B"),
    ),
)
