"""ms-swift: a sequence classification folder; `architectures` decides what it is taken for."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Serves

DIALECT = Dialect(
    "ms-swift",
    "ms-swift 4.6.0",
    reward=HeadSpec("score", missing="random"),
    critic=HeadSpec("score", missing="random"),
    config=ConfigRules(labels=True, pad=True),
    pooling="last-non-pad",
    same_as="hf-seqcls",
    maker="ms-swift",
    files_of_its_own=("args.json",),
    serves=(
        Serves(
            "ms-swift",
            ("reward", "critic"),
            "4.6.0",
            "4.6.0",
            launch="swift rlhf --rlhf_type ppo --reward_model {out}",
            goes_by_class="takes it for another kind of model",
            reads_adapters=True,
            probe="probe_ms_swift.py",
        ),
    ),
    evidence=(Evidence("experiment", "ms-swift 4.6.0: swift/pipelines/train/rlhf.py:30-59"),),
    traps=("an args.json in the folder wins over config.json", "tie_word_embeddings is forced to false"),
)
