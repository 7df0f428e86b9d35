"""LLaMA-Factory: a causal model, and the head in `value_head.safetensors` beside it."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "llamafactory",
    "LLaMA-Factory 0.9.3 to 0.9.5",
    reward=HeadSpec(
        "v_head.summary",
        bias="always",
        file="value_head.safetensors",
        files=("value_head.bin",),
        lm_head=True,
        missing="full models: random, silently; reward_model_type lora: an assertion",
    ),
    critic=HeadSpec(
        "v_head.summary",
        bias="always",
        file="value_head.safetensors",
        files=("value_head.bin",),
        lm_head=True,
        missing="random, silently",
    ),
    config=ConfigRules(reward="causal", critic="causal"),
    marks=(Marks((), beside=("value_head.safetensors", "value_head.bin")),),
    maker="LLaMA-Factory",
    files_of_its_own=("value_head.safetensors", "value_head.bin", "trainer_log.jsonl", "llamaboard_config.yaml"),
    serves=(
        Serves(
            "llamafactory",
            ("reward",),
            "0.9.3",
            "0.9.5",
            launch="stage: ppo, reward_model_type: full, reward_model: {out}",
            reads_adapters=True,
            pins_transformers="4",
            launch_marks=(r"(?:.*/)?(?:llamafactory-cli|lmf)", r".*LLaMA-Factory.*train\w*\.py"),
            launch_keys=("stage", "finetuning_type", "template"),
            launch_roles=(("reward_model", "reward"), ("model_name_or_path", "actor")),
            probe="probe_llamafactory.py",
        ),
        Serves(
            "llamafactory",
            ("critic",),
            "0.9.3",
            "0.9.5",
            launch="stage: ppo, model_name_or_path: {out}",
            reads_adapters=True,
        ),
    ),
    evidence=(
        Evidence(
            "experiment", "LLaMA-Factory 0.9.3 to 0.9.5: callbacks.py:55-97, loader.py:183-195, valuehead.py:33-58"
        ),
    ),
    traps=(
        "exporting a reward model with any stage but rm loses the head silently",
        "where both value_head files are there, the .bin is ignored",
        "rewards are read at the last attended token, counted from the left: pad on the right",
    ),
)
