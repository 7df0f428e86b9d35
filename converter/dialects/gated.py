"""Reward models whose head depends on the prompt: ArmoRM, QRM, URM, LDL."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "gated-multi-objective",
    "ArmoRM, QRM, URM, LDL",
    reward=HeadSpec("regression_layer", kind="linear", missing="random"),
    critic=None,
    writable=False,
    refused="the score is a sum over objectives whose weights a gate computes from the prompt: no linear head gives "
    "the same numbers, and no PPO trainer has such a gate",
    marks=(
        Marks(("regression_layer.weight",)),
        Marks((), backbone="gating."),
        Marks((), beside=("regression_layer.pt", "gating_layer.pt")),
    ),
    evidence=(
        Evidence("text", "code of ArmoRM-Llama3-8B-v0.1", "https://huggingface.co/RLHFlow/ArmoRM-Llama3-8B-v0.1"),
    ),
)
