"""TRL's `AutoModelForCausalLMWithValueHead`: a causal model with `v_head.summary` beside it."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "trl-vhead",
    "TRL AutoModelForCausalLMWithValueHead",
    reward=HeadSpec("v_head.summary", bias="always", lm_head=True, missing="random, silently"),
    critic=HeadSpec("v_head.summary", bias="always", lm_head=True, missing="random, silently"),
    config=ConfigRules(reward="causal", critic="causal", keys=("summary_dropout_prob",)),
    one_file=True,
    marks=(
        Marks(("v_head.summary.weight", "v_head.summary.bias")),
        Marks(
            ("v_head.summary.weight", "v_head.summary.bias"),
            classes=("ForCausalLM", "LMHeadModel"),
            without=("v_head.summary.0.weight",),
        ),
    ),
    wrapped=(
        ("pretrained_model.", "TRL's wrapper with a value head"),
        ("policy.", "TRL's PPO wrapper"),
        ("value_model.", "TRL's PPO wrapper"),
    ),
    mostly_critic=True,
    serves=(
        Serves(
            "trl-valuehead",
            ("reward", "critic"),
            "0.4",
            "1.12.0",
            launch="AutoModelForCausalLMWithValueHead.from_pretrained({out!r})",
            probe="probe_trl_valuehead.py",
        ),
        Serves(
            "trl-valuehead",
            ("reward", "critic"),
            "1.13.0",
            "1.13.0",
            refused="TRL 1.13.0 has no value head wrapper any more; 1.12.0 is the last that has it",
        ),
    ),
    evidence=(
        Evidence("experiment", "TRL 0.12 to 1.13.0: trl/models and trl/experimental/ppo modeling_value_head.py"),
    ),
    traps=(
        "one file only: the wrapper can't load a sharded local folder",
        "the head has a dropout of 0.1 in training unless summary_dropout_prob is 0",
    ),
)
