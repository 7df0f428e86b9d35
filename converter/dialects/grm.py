"""GRM: `v_head.summary`, linear or an MLP, without an output embedding."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "grm",
    "GRM, linear head",
    reward=HeadSpec("v_head.summary", bias="always", missing="random"),
    critic=None,
    config=ConfigRules(keys=("vhead_layer_type", "vhead_num_neurons", "vhead_num_layers")),
    writable=False,
    marks=(
        Marks(
            ("v_head.summary.weight", "v_head.summary.bias"),
            without=("v_head.summary.0.weight",),
            config=(("vhead_layer_type", None),),
        ),
    ),
    evidence=(
        Evidence("experiment", "the class as vendored in rewardbench"),
        Evidence("text", "code", "https://huggingface.co/Ray2333/GRM-llama3-8B-sftreg"),
    ),
)
