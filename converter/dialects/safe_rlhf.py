"""PKU safe-rlhf (beaver): `score_head` with an optional bias and a normaliser."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "safe-rlhf",
    "PKU safe-rlhf, beaver",
    reward=HeadSpec("score_head", bias="config", missing="random; the normaliser is then taken from config.json"),
    critic=HeadSpec("score_head", bias="config", missing="random; the normaliser is then taken from config.json"),
    config=ConfigRules(
        reward="{Family}ForScore",
        critic="{Family}ForScore",
        sets=(("do_normalize", False), ("normalizer_type", None)),
        keys=(
            "score_dim",
            "bias",
            "score_bias",
            "score_type",
            "do_normalize",
            "normalizer_type",
            "momentum",
            "mean",
            "var",
        ),
        rows_key="score_dim",
        role_key="score_type",
    ),
    backbone="{P}",
    normaliser="mean-var",
    extras=(("normalizer.", "safe-rlhf's running mean and variance"),),
    families=("llama", "bloom", "opt", "gpt2", "gptj", "gpt_neo", "gpt_neox"),
    marks=(Marks(("score_head.weight",)),),
    serves=(
        Serves(
            "safe-rlhf",
            ("reward",),
            keeps_mean=True,
            launch="--reward_model_name_or_path {out}",
            probe="probe_safe_rlhf.py",
        ),
        Serves("safe-rlhf", ("critic",), keeps_mean=True, launch="--reward_critic_model_name_or_path {out}"),
    ),
    evidence=(
        Evidence("experiment", "the classes as vendored in rewardbench 0.1.4"),
        Evidence("source", "safe_rlhf/models/score_model", "https://github.com/PKU-Alignment/safe-rlhf"),
    ),
    traps=("config.json's mean and var are lists: OpenRLHF fails on such a file",),
)
