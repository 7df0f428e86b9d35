"""AReaL's Megatron critic: the head in `value_head.pt` beside HF weights."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "areal-mcore",
    "AReaL 1.0.4, Megatron backend",
    reward=None,
    critic=HeadSpec(
        "value_head", file="value_head.pt", stem_in_file="", missing="random, with an info line in the log"
    ),
    config=ConfigRules(reward="causal", critic="causal"),
    marks=(Marks((), beside=("value_head.pt",)),),
    serves=(Serves("areal-megatron", ("critic",), "1.0.4", "1.0.4", launch="critic.path={out}"),),
    evidence=(Evidence("source", "areal mcore/hf_load.py:741-755 and hf_save.py:840-852 of 1.0.4"),),
    traps=("lm_head is skipped by this loader, whatever the folder holds",),
)
