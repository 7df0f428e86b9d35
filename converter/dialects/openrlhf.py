"""OpenRLHF since 0.5.4: the head is named by `value_head_prefix` of config.json, `score` by default."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "openrlhf",
    "OpenRLHF 0.5.4 and newer",
    reward=HeadSpec("{value_head_prefix}", missing="random, with transformers' warning"),
    critic=HeadSpec("{value_head_prefix}", missing="random, with transformers' warning"),
    config=ConfigRules(
        reward="RewardModel",
        critic="CriticModel",
        sets=(("value_head_prefix", "score"),),
        keys=("value_head_prefix", "mean", "std"),
        drops=("var",),
    ),
    alignment="drop-last",
    normaliser="mean-std",
    class_says=True,
    marks=(
        Marks(("score.weight",), without=("score.bias", "score.0.weight"), classes=("RewardModel", "CriticModel")),
        Marks(
            ("{value_head_prefix}.weight",),
            without=("{value_head_prefix}.bias",),
            config=(("value_head_prefix", None),),
        ),
        Marks(
            ("{value_head_prefix}.weight",),
            without=("{value_head_prefix}.bias",),
            classes=("RewardModel", "CriticModel"),
            config=(("value_head_prefix", None),),
        ),
    ),
    serves=(
        Serves("openrlhf", ("reward",), "0.5.4", "0.5.5", keeps_mean=True, launch="--reward_pretrain {out}"),
        Serves("openrlhf", ("critic",), "0.5.4", "0.5.5", keeps_mean=True, launch="--critic_pretrain {out}"),
        Serves("openrlhf", ("reward",), "0.5.6", "0.10", launch="--reward_pretrain {out}"),
        Serves("openrlhf", ("critic",), "0.5.6", "0.10", launch="--critic_pretrain {out}"),
        Serves(
            "openrlhf",
            ("reward",),
            "0.11.0",
            "0.11.2",
            launch="python -m openrlhf.cli.train_ppo_ray --reward.model_name_or_path {out}",
        ),
        Serves(
            "openrlhf",
            ("critic",),
            "0.11.0",
            "0.11.2",
            launch="python -m openrlhf.cli.train_ppo_ray --critic.model_name_or_path {out}",
            launch_marks=(r"openrlhf\.cli\.\w+", r"openrlhf/cli/\w+\.py"),
            launch_roles=(
                ("reward_pretrain", "reward"),
                ("critic_pretrain", "critic"),
                ("pretrain", "actor"),
                ("reward.model_name_or_path", "reward"),
                ("critic.model_name_or_path", "critic"),
                ("actor.model_name_or_path", "actor"),
            ),
            probe="probe_openrlhf.py",
        ),
    ),
    evidence=(
        Evidence("experiment", "OpenRLHF 0.5.5 (transformers 4.46) and 0.11.2 (transformers 5.15): load, mean and std"),
        Evidence(
            "source",
            "openrlhf/models/model.py: _get_reward_model, _get_critic_model",
            "https://github.com/OpenRLHF/OpenRLHF/blob/v0.11.2/openrlhf/models/model.py",
        ),
    ),
    traps=(
        "the critic's path must differ from the actor's: the same path initialises the value head anew",
        "config.json's value_head_prefix beats the command line",
        "under transformers 5 mean and std are uninitialised memory: leave reward normalisation off",
    ),
)
