"""A causal model without a head: an actor, or what a fresh head is put on."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Serves

DIALECT = Dialect(
    "hf-causal",
    "transformers XForCausalLM, no head",
    reward=None,
    critic=None,
    actor=HeadSpec("", kind="none", lm_head=True, missing="there is none"),
    config=ConfigRules(reward="causal", critic="causal"),
    pooling="none",
    class_says=True,
    marks=(),
    serves=(
        Serves("transformers", ("actor",), "4.46", "5.23", leaves_heads=True),
        Serves("openrlhf", ("actor",), "0.3.6", "0.11.2", launch="--actor.model_name_or_path {out}"),
        Serves("trl", ("actor",), "0.12", "1.13.0", launch="--model_name_or_path {out}", leaves_heads=True),
        Serves("verl", ("actor",), "0.7", "0.9.1", launch="actor_rollout_ref.model.path={out}"),
        Serves("llamafactory", ("actor",), "0.9.3", "0.9.5", launch="model_name_or_path: {out}", reads_adapters=True),
        Serves("deepspeed-chat", ("actor",), launch="main.py --actor_model_name_or_path {out}"),
        Serves("colossalchat", ("actor",), launch="train_ppo.py --pretrain {out}"),
        Serves("safe-rlhf", ("actor",), launch="--actor_model_name_or_path {out}"),
        Serves("skyrl", ("actor",), "0.3.0", "0.3.0", launch="trainer.policy.model.path={out}"),
        Serves("areal", ("actor",), "1.0.4", "1.0.4", launch="actor.path={out}"),
        Serves("ms-swift", ("actor",), "4.6.0", "4.6.0", launch="swift rlhf --model {out}", reads_adapters=True),
        Serves("nemo-rl", ("actor",), launch="policy.model_name={out}"),
        Serves("roll", ("actor",), launch="pretrain: {out}"),
        Serves("vllm", ("actor",), launch="vllm serve {out}"),
        Serves(
            "megatron", ("actor",), launch="--load {out} --ckpt-format torch_dist --finetune", lays_out="to-megatron"
        ),
        Serves("trlx", ("actor",), "0.7", "0.7.0", launch="model.model_path={out}"),
    ),
    evidence=(Evidence("experiment", "transformers 4.46 and 5.23"),),
)
