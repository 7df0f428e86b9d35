"""InternLM2's reward models: `v_head` over a backbone with layout and code of its own."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "internlm2-reward",
    "InternLM2 reward models, 1.8B to 20B",
    reward=HeadSpec("v_head", missing="random"),
    critic=None,
    config=ConfigRules(keys=("reward_token_id",)),
    pooling="reward-token",
    own_backbone="InternLM2",
    writable=False,
    marks=(
        Marks(("v_head.weight", "model.tok_embeddings.weight"), backbone="model."),
        Marks(("v_head.weight",), config=(("reward_token_id", None),)),
    ),
    evidence=(Evidence("text", "model card and code", "https://huggingface.co/internlm/internlm2-7b-reward"),),
)
