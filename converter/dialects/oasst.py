"""OpenAssistant's pythia reward models: `out_proj` over GPT-NeoX."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "oasst",
    "OpenAssistant pythia reward models",
    reward=HeadSpec("out_proj", bias="always", missing="random"),
    critic=None,
    config=ConfigRules(keys=("pooling",)),
    pooling="configured",
    writable=False,
    marks=(
        Marks(("out_proj.weight", "out_proj.bias")),
        Marks(("out_proj.weight", "out_proj.bias"), config=(("model_type", "gpt_neox_reward_model"),)),
    ),
    evidence=(
        Evidence("experiment", "the class as vendored in rewardbench"),
        Evidence("source", "model/reward/instructor of Open-Assistant", "https://github.com/LAION-AI/Open-Assistant"),
    ),
)
