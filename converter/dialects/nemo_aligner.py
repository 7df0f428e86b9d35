"""NeMo-Aligner: `rm_head` in a .nemo archive."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "nemo-aligner",
    "NeMo-Aligner 0.7.0",
    reward=HeadSpec("rm_head", bias="always", missing="an error"),
    critic=HeadSpec("rm_head", bias="always", missing="an error"),
    writable=False,
    refused=".nemo archives hold Megatron's names and sharded layout, which isn't read. NeMo's own converter writes a "
    "Hugging Face folder; begin with that",
    marks=(Marks(("rm_head.weight",), backbone="decoder.layers."),),
    serves=(Serves("nemo-aligner", ("reward", "critic"), "0.7.0", "0.7.0"),),
    evidence=(Evidence("source", "nemo_aligner/models/nlp/gpt of 0.7.0"),),
)
