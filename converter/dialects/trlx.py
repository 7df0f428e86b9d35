"""trlX: `base_model.` before a causal model, and a ReLU MLP as its value head, in pytorch_model.bin alone."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "trlx",
    "trlX 0.7",
    reward=None,
    critic=HeadSpec("v_head", kind="mlp", bias="always", width=2, lm_head=True, missing="an error: the load is strict"),
    config=ConfigRules(reward="causal", critic="causal"),
    backbone="base_model.{P}",
    outer="base_model.",
    container="torch",
    extras=(("frozen_head.", "trlX's copy of the reference model's top blocks"),),
    marks=(Marks(("v_head.0.weight", "v_head.2.weight"), backbone="base_model."),),
    serves=(
        Serves(
            "trlx",
            ("critic",),
            "0.7",
            "0.7.0",
            launch="model.model_path={out} model.num_layers_unfrozen=-1",
            pins_transformers="4",
        ),
    ),
    evidence=(Evidence("experiment", "trlX 0.7: make_head, modeling_ppo.py:253-381, modeling_base.py:150-280"),),
    traps=("num_layers_unfrozen > 0 demands frozen_head.* in the file, and raises",),
)
