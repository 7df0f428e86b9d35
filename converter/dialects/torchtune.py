"""torchtune: a sequence classification folder, read with its own names; Llama and Mistral alone."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Serves

DIALECT = Dialect(
    "torchtune",
    "torchtune 0.6.1",
    reward=HeadSpec("score", missing="an error"),
    critic=HeadSpec("score", missing="an error"),
    config=ConfigRules(labels=True, pad=True),
    families=("llama", "mistral"),
    same_as="hf-seqcls",
    serves=(
        Serves(
            "torchtune",
            ("reward", "critic"),
            "0.6.1",
            "0.6.1",
            launch="checkpointer.checkpoint_dir={out}",
            probe="probe_torchtune.py",
        ),
    ),
    evidence=(
        Evidence("experiment", "torchtune 0.6.1: score.weight becomes output.weight, score.bias is skipped silently"),
    ),
    traps=(
        "the recipe lists the weight files by name: update checkpoint_files",
        "a score.bias would be skipped silently",
    ),
)
