"""Two-layer heads on `score.0` and `score.2`: Qwen2.5-Math-RM and -PRM, INF-ORM-70B."""

from __future__ import annotations

from converter.dialects.spec import Dialect, Evidence, HeadSpec, Marks

DIALECT = Dialect(
    "score-mlp",
    "Qwen2.5-Math-RM and -PRM, INF-ORM-70B",
    reward=HeadSpec("score", kind="mlp", bias="always", missing="random"),
    critic=None,
    pooling="last-non-pad",
    writable=False,
    class_says=True,
    marks=(Marks(("score.0.weight", "score.2.weight")),),
    evidence=(
        Evidence("experiment", "INFORM's class as vendored in rewardbench"),
        Evidence("text", "code of Qwen2.5-Math-RM-72B", "https://huggingface.co/Qwen/Qwen2.5-Math-RM-72B"),
    ),
)
