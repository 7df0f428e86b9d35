"""DeepSpeed-Chat: `rwtransformer.` before the backbone, in pytorch_model.bin alone."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "dschat",
    "DeepSpeed-Chat",
    reward=HeadSpec("v_head", missing="random, silently; a backbone that misses is uninitialised memory"),
    critic=HeadSpec("v_head", missing="random, silently; a backbone that misses is uninitialised memory"),
    config=ConfigRules(reward="causal", critic="causal"),
    backbone="rwtransformer.",
    container="torch",
    one_file=True,
    pooling="last-non-pad",
    vocab_multiple=8,
    marks=(Marks(("v_head.weight",), backbone="rwtransformer."),),
    wrapped=(("rwtransformer.", "DeepSpeed-Chat's reward model"),),
    serves=(
        Serves(
            "deepspeed-chat",
            ("reward", "critic"),
            launch="main.py --critic_model_name_or_path {out}",
            pins_transformers="4",
            launch_options=("actor_model_name_or_path", "critic_model_name_or_path"),
            launch_roles=(("critic_model_name_or_path", "critic"), ("actor_model_name_or_path", "actor")),
        ),
    ),
    evidence=(
        Evidence("experiment", "dschat of DeepSpeedExamples: create_critic_model, RewardModel, save_hf_format"),
        Evidence(
            "source",
            "load with its error list discarded",
            "https://github.com/deepspeedai/DeepSpeedExamples/tree/master/applications/DeepSpeed-Chat",
        ),
    ),
    traps=(
        "a path that contains `llama` forces the slow LlamaTokenizer and a [PAD] token",
        "OPT is scored at the second pad, others at the token before the first",
    ),
)
