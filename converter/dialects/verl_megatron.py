"""verl's Megatron critic as a folder of Hugging Face's: its saver writes the head as `lm_head [1, h]`."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "verl-megatron",
    "verl 0.9.1, Megatron backend",
    reward=HeadSpec("lm_head", missing="random, with a printed line"),
    critic=HeadSpec("lm_head", missing="random, with a printed line"),
    writable=False,
    marks=(Marks(("lm_head.weight",), rows=1),),
    serves=(
        Serves(
            "verl-megatron",
            ("reward", "critic"),
            "0.9.1",
            "0.9.1",
            refused="verl's Megatron loader takes the first of lm_head, reward_head and score, and its saver writes "
            "the value head as lm_head [1, h], or, where embeddings are tied, not at all: such a folder can't be told "
            "from a broken causal model. Use verl's FSDP critic (--to verl)",
        ),
    ),
    evidence=(Evidence("source", "verl/models/mcore/loader.py and saver.py:449-460 of 0.9.1"),),
)
