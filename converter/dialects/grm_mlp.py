"""GRM with an MLP as its head: one hidden layer of any width."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "grm-mlp",
    "GRM, MLP head",
    reward=HeadSpec("v_head.summary", kind="mlp", bias="always", missing="random"),
    critic=None,
    config=ConfigRules(keys=("vhead_layer_type", "vhead_num_neurons", "vhead_num_layers")),
    writable=False,
    marks=(Marks(("v_head.summary.0.weight", "v_head.summary.2.weight")),),
    evidence=(Evidence("experiment", "the class as vendored in rewardbench"),),
)
