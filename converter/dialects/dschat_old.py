"""DeepSpeed-Chat before the rename: `rwtranrsformer.`, spelt so."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "dschat-old",
    "DeepSpeed-Chat before the rename",
    reward=HeadSpec("v_head", missing="random, silently"),
    critic=HeadSpec("v_head", missing="random, silently"),
    config=ConfigRules(reward="causal", critic="causal"),
    backbone="rwtranrsformer.",
    container="torch",
    one_file=True,
    pooling="last-non-pad",
    vocab_multiple=8,
    marks=(Marks(("v_head.weight",), backbone="rwtranrsformer."),),
    wrapped=(("rwtranrsformer.", "DeepSpeed-Chat's reward model, before its name was spelt right"),),
    serves=(Serves("deepspeed-chat-old", ("reward", "critic"), launch="main.py --critic_model_name_or_path {out}"),),
    evidence=(Evidence("experiment", "loaded by today's code the whole backbone stays uninitialised, silently"),),
    traps=("today's DeepSpeed-Chat reads none of it: convert to deepspeed-chat for that",),
)
