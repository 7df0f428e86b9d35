"""A reward model as verl's Megatron loader takes it beside `lm_head` and `score`: `reward_head`."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "verl-megatron-reward",
    "reward_head, which verl 0.9.1 reads with Megatron",
    reward=HeadSpec("reward_head", missing="random, with a printed line"),
    critic=None,
    writable=False,
    marks=(Marks(("reward_head.weight",)),),
    evidence=(Evidence("source", "verl/models/mcore/loader.py of 0.9.1"),),
)
