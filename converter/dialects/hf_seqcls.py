"""transformers' `XForSequenceClassification`: what most trainers read as a reward model."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

_TRL = (
    "TRL's PPO saves only the policy: the trained value model is never on disk",
    "TRL's RewardTrainer hides the warning of a missing score.weight: check that it loaded",
    "LoRA on it needs task_type SEQ_CLS, or modules_to_save=[score]",
)

DIALECT = Dialect(
    "hf-seqcls",
    "transformers XForSequenceClassification",
    reward=HeadSpec("score", missing="random N(0, initializer_range), told in a load report alone"),
    critic=HeadSpec("score", missing="random N(0, initializer_range), told in a load report alone"),
    config=ConfigRules(labels=True, pad=True),
    pooling="last-non-pad",
    class_says=True,
    marks=(
        Marks(("score.weight",), without=("score.bias", "score.0.weight"), classes=("ForSequenceClassification",)),
        Marks(("score.weight",), without=("score.bias", "score.0.weight")),
    ),
    serves=(
        Serves(
            "transformers",
            ("reward", "critic"),
            "4.46",
            "5.23",
            labels=True,
            leaves_heads=True,
            probe="probe_transformers.py",
        ),
        Serves(
            "trl",
            ("reward",),
            "0.12",
            "1.13.0",
            launch="python examples/scripts/ppo/ppo.py --reward_model_path {out}",
            traps=_TRL,
            sets_labels=True,
            leaves_heads=True,
            launch_marks=(r"trl", r"(?:.*/)?(?:ppo|ppo_tldr|rloo|reward_modeling)\.py"),
            launch_roles=(
                ("reward_model_path", "reward"),
                ("value_model_path", "critic"),
                ("sft_model_path", "actor"),
                ("model_name_or_path", "actor"),
            ),
            probe="probe_trl.py",
        ),
        Serves(
            "trl",
            ("critic",),
            "0.12",
            "1.12.0",
            sets_labels=True,
            leaves_heads=True,
            launch="python examples/scripts/ppo/ppo.py --reward_model_path {out}",
            traps=_TRL,
        ),
        Serves(
            "trl",
            ("critic",),
            "1.13.0",
            "1.13.0",
            refused="PPO is gone from TRL 1.13.0: there is nothing that loads a critic; 1.12.0 is the last that has it",
        ),
        Serves(
            "verl",
            ("reward",),
            "0.9",
            "0.9.1",
            launch="vllm serve {out} --runner pooling",
            goes_by_class="hands it to an engine that does not know that class",
        ),
        Serves(
            "vllm",
            ("reward",),
            labels=True,
            launch="vllm serve {out} --runner pooling",
            goes_by_class="does not know that class",
        ),
        Serves(
            "megatron",
            ("reward", "critic"),
            labels=True,
            launch="--load {out} --ckpt-format torch_dist --finetune",
            lays_out="to-megatron",
        ),
        Serves("nemo-rl", ("reward",), launch="env.reward_model.model_name={out}"),
        Serves(
            "roll",
            ("reward",),
            launch="reward model_args: model_type auto_sequence_classification, {out}",
            sets_labels=True,
        ),
    ),
    evidence=(
        Evidence("experiment", "transformers 4.46 and 5.23, TRL 0.12 to 1.13.0"),
        Evidence("source", "labels: TRL's examples/scripts/ppo/ppo.py:90-95; ROLL's roll/models/model_providers.py"),
        Evidence(
            "source",
            "pooling: GenericForSequenceClassification",
            "https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_layers.py",
        ),
    ),
)
