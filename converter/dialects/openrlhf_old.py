"""OpenRLHF up to 0.5.3: the head is `value_head`, and config.json doesn't name it."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "openrlhf-old",
    "OpenRLHF 0.3.6 to 0.5.3",
    reward=HeadSpec("value_head", missing="random"),
    critic=HeadSpec("value_head", missing="random"),
    config=ConfigRules(
        reward="RewardModel", critic="CriticModel", keys=("mean", "std"), drops=("value_head_prefix", "var")
    ),
    alignment="drop-last",
    normaliser="mean-std",
    marks=(Marks(("value_head.weight",), without=("value_head.bias",)),),
    serves=(
        Serves("openrlhf", ("reward",), "0.3.6", "0.5.3", keeps_mean=True, launch="--reward_pretrain {out}"),
        Serves("openrlhf", ("critic",), "0.3.6", "0.5.3", keeps_mean=True, launch="--critic_pretrain {out}"),
    ),
    evidence=(Evidence("source", "wheels of OpenRLHF 0.3.6.post1 to 0.5.3"),),
    traps=("newer OpenRLHF looks for `score`: give config.json a value_head_prefix, or convert again",),
)
