"""UltraRM-13B and Eurus-RM-7B: `regression_head`."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "ultrarm",
    "UltraRM-13B, Eurus-RM-7B",
    reward=HeadSpec("regression_head", missing="random"),
    critic=None,
    writable=False,
    marks=(Marks(("regression_head.weight",)),),
    evidence=(
        Evidence("experiment", "the classes as vendored in rewardbench"),
        Evidence("text", "model card", "https://huggingface.co/openbmb/UltraRM-13b"),
    ),
)
