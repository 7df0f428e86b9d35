"""NeMo-RL's DTensor value worker, which skips every `score.` of a Hugging Face folder."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Serves

DIALECT = Dialect(
    "nemo-rl-dtensor-value",
    "NeMo-RL's value worker (nemo_automodel 0.7.0)",
    reward=None,
    critic=HeadSpec("score", bias="always", missing="always random: a head of a Hugging Face folder is never read"),
    writable=False,
    refused="NeMo-RL's value worker skips every tensor named score.* of a folder, so its critic always begins with a "
    "random head; only its own checkpoint restores one. As a reward model the same folder is read: --role reward",
    serves=(Serves("nemo-rl", ("critic",)),),
    evidence=(Evidence("source", "dtensor_value_worker_v2.py:215; nemo_automodel 0.7.0 stateful_wrappers.py:544-553"),),
)
