"""Nemotron's reward models: the logit of token 0 of a causal model is the reward."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec

DIALECT = Dialect(
    "lm-head-row0",
    "Nemotron-70B-Reward-HF and -340B-",
    reward=HeadSpec("lm_head", kind="lm-row", missing="not possible: it is the output embedding"),
    critic=None,
    pooling="logit-0",
    writable=False,
    marks=(),
    evidence=(Evidence("text", "model card", "https://huggingface.co/nvidia/Llama-3.1-Nemotron-70B-Reward-HF"),),
    traps=("no file says that a model is one of these: name it with --from lm-head-row0",),
)
