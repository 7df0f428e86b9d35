"""SkyRL: the critic's head is `value_head`, named by a trainer option; config.json is ignored."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Serves

DIALECT = Dialect(
    "skyrl",
    "SkyRL 0.3.0",
    reward=None,
    critic=HeadSpec("value_head", missing="random"),
    config=ConfigRules(reward="CriticModel", critic="CriticModel", drops=("value_head_prefix",)),
    alignment="drop-last",
    marks=(),
    same_as="openrlhf-old",
    serves=(
        Serves(
            "skyrl", ("critic",), "0.3.0", "0.3.0", launch="trainer.critic.model.path={out}", probe="probe_skyrl.py"
        ),
    ),
    evidence=(Evidence("experiment", "SkyRL 0.3.0, model_wrapper.py:407-640"),),
    traps=("the trainer's algorithm.value_head_prefix must be value_head; config.json is not asked",),
)
