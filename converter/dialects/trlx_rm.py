"""trlX's `GPTRewardModel` of summarize_rlhf, and Starling-RM-7B: `transformer.` before any backbone."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "trlx-rm",
    "trlX summarize_rlhf GPTRewardModel; Starling-RM-7B",
    reward=HeadSpec("v_head", missing="random, silently"),
    critic=None,
    backbone="transformer.",
    pooling="last-non-pad",
    writable=False,
    marks=(Marks(("v_head.weight",), backbone="transformer."),),
    evidence=(
        Evidence("source", "trlx/examples/summarize_rlhf/reward_model/reward_model.py"),
        Evidence(
            "text", "Starling-RM-7B-alpha's model card", "https://huggingface.co/berkeley-nest/Starling-RM-7B-alpha"
        ),
    ),
    traps=("loaded with strict=False: nothing tells of names that miss",),
)
