"""verl's Megatron critic: `lm_head`, `reward_head` or `score`, read by a loader of its own."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "verl-megatron",
    "verl 0.9.1, Megatron backend",
    reward=HeadSpec("reward_head", missing="random, with a printed line"),
    critic=HeadSpec("lm_head", missing="random, with a printed line"),
    writable=False,
    refused="verl's Megatron loader takes the first of lm_head, reward_head and score, and its saver writes the value "
    "head as lm_head [1, h], or, where embeddings are tied, not at all: such a folder can't be told from a broken "
    "causal model. Use verl's FSDP critic (--to verl)",
    marks=(Marks(("lm_head.weight",), rows=1),),
    serves=(Serves("verl-megatron", ("reward", "critic"), "0.9.1", "0.9.1"),),
    evidence=(Evidence("source", "verl/models/mcore/loader.py and saver.py:449-460 of 0.9.1"),),
)
