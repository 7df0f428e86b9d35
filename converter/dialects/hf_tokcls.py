"""transformers' `XForTokenClassification` with one label: the critic of verl, AReaL and ROLL."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

_VERL = (
    "verl loads it with flash_attention_2; without flash-attn it falls to TRL's wrapper, whose head is random",
    "verl's critic keeps all positions, OpenRLHF's and SkyRL's drop the last",
)

DIALECT = Dialect(
    "hf-tokcls",
    "transformers XForTokenClassification, one label",
    reward=HeadSpec("{tokcls}", bias="always", bias_from_zero=True, missing="random weight; a missing bias is zero"),
    critic=HeadSpec("{tokcls}", bias="always", bias_from_zero=True, missing="random weight; a missing bias is zero"),
    config=ConfigRules(
        reward="tokcls",
        critic="tokcls",
        labels=True,
        keys=("token_classification_bias",),
        drops=("summary_dropout_prob",),
        numbers=("hidden_dropout",),
    ),
    pooling="last-attended",
    class_says=True,
    marks=(
        Marks(("score.weight", "score.bias"), classes=("ForTokenClassification",)),
        Marks(("classifier.weight", "classifier.bias"), classes=("ForTokenClassification",)),
        Marks(("score.weight",), without=("score.0.weight",), classes=("ForTokenClassification",)),
        Marks(("score.weight", "score.bias")),
    ),
    serves=(
        Serves(
            "verl",
            ("critic",),
            "0.7",
            "0.9.1",
            launch="python -m verl.trainer.main_ppo critic.model.path={out}",
            traps=_VERL,
            goes_by_class="loads and trains it, and stops at its first save",
            sets_labels=True,
            launch_marks=(r"verl\.trainer\.\w+", r"verl/trainer/\w+\.py"),
            launch_roles=(
                ("reward_model.model.path", "reward"),
                ("critic.model.path", "critic"),
                ("actor_rollout_ref.model.path", "actor"),
            ),
            probe="probe_verl.py",
        ),
        Serves(
            "verl",
            ("reward",),
            "0.7",
            "0.8",
            launch="python -m verl.trainer.main_ppo reward_model.model.path={out}",
            sets_labels=True,
        ),
        Serves("areal", ("critic",), "1.0.4", "1.0.4", launch="critic.path={out}", sets_labels=True),
        Serves(
            "roll",
            ("critic",),
            launch="critic model_args: model_type auto_token_classification, {out}",
            sets_labels=True,
        ),
    ),
    evidence=(
        Evidence("experiment", "verl 0.9.1 with gemma3; names of all classes enumerated in transformers 5.23"),
        Evidence("source", "verl/utils/model.py:641-682 and fsdp_checkpoint_manager.py:431-442 of 0.9.1"),
        Evidence("source", "labels: ROLL's roll/models/model_providers.py, num_labels of model_args, 1 by default"),
        Evidence("source", "areal/engine/fsdp_engine.py:974-1003 of 1.0.4"),
    ),
)
