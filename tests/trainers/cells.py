"""The cells of the conversion matrix: which trainers write, which read, and what each pair must come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BIAS, MEAN, STD = 0.71875, 0.296875, 2.0
NEAR = 2e-5
"""Two loaders in fp32 with other versions of torch's kernels and transformers differ by less."""


@dataclass(frozen=True)
class Source:
    """A folder that a trainer wrote."""

    name: str
    environment: str
    maker: str
    probe: str
    roles: tuple[str, ...]
    bias: bool = False
    mean: bool = False
    mlp: bool = False
    more: tuple[str, ...] = ()

    @property
    def constant(self) -> float:
        """What every score holds that isn't the weight's: lost where a head has no bias."""
        constant = BIAS if self.bias else 0.0
        return (constant - MEAN) / STD if self.mean else constant


@dataclass(frozen=True)
class Target:
    """A trainer that reads a folder in a role.

    Attributes:
        keeps_mean: its loader has the mean and std of config.json in memory.
        leaves_mean: it saves them there itself, and loses them when it loads (OpenRLHF on transformers 5).
        lm_head: its model is a causal one.
    """

    name: str
    to: str
    role: str
    environment: str
    probe: str
    bias: bool = False
    keeps_mean: bool = False
    leaves_mean: bool = False
    lm_head: bool = False


SOURCES = (
    Source("transformers seqcls", "trl", "hf_seqcls", "trl", ("reward", "critic")),
    Source("transformers tokcls", "verl", "hf_tokcls", "verl", ("critic",), bias=True),
    Source("OpenRLHF 0.11", "openrlhf", "openrlhf", "openrlhf", ("reward", "critic")),
    Source("OpenRLHF 0.11, mean and std", "openrlhf", "openrlhf", "openrlhf", ("reward", "critic"), mean=True),
    Source(
        "OpenRLHF before 0.5.4", "openrlhf-0.5.5", "openrlhf_old", "openrlhf", ("reward", "critic"),
        more=("--head-name", "value_head"),
    ),
    Source("TRL value head", "trl-0.28", "trl_vhead", "trl_valuehead", ("reward", "critic"), bias=True),
    Source("LLaMA-Factory", "llamafactory", "llamafactory", "llamafactory", ("reward", "critic"), bias=True),
    Source("SkyRL", "skyrl", "skyrl", "skyrl", ("critic",)),
    Source("safe-rlhf, bias", "rewardbench", "safe_rlhf", "safe_rlhf", ("reward", "critic"), bias=True),
    Source("safe-rlhf, normalised", "rewardbench", "safe_rlhf", "safe_rlhf", ("reward", "critic"), mean=True),
    Source("UltraRM", "rewardbench", "ultrarm", "ultrarm", ("reward", "critic")),
    Source("INF-ORM, two layers", "rewardbench", "inf_orm", "", (), mlp=True),
)  # fmt: skip

TARGETS = (
    Target("OpenRLHF 0.11 critic", "openrlhf@0.11.2", "critic", "openrlhf", "openrlhf", leaves_mean=True),
    Target("OpenRLHF 0.11 reward", "openrlhf@0.11.2", "reward", "openrlhf", "openrlhf", leaves_mean=True),
    Target("OpenRLHF 0.5.5 critic", "openrlhf@0.5.5", "critic", "openrlhf-0.5.5", "openrlhf", keeps_mean=True),
    Target("TRL 1.12 reward", "trl@1.12.0", "reward", "trl", "trl"),
    Target("TRL 0.28 value head", "trl-valuehead@0.28", "critic", "trl-0.28", "trl_valuehead", bias=True, lm_head=True),
    Target("verl 0.9 critic", "verl@0.9.1", "critic", "verl", "verl", bias=True),
    Target("LLaMA-Factory 0.9 reward", "llamafactory@0.9.5", "reward", "llamafactory", "llamafactory",
           bias=True, lm_head=True),
    Target("ms-swift 4.6 reward", "ms-swift@4.6.0", "reward", "ms-swift", "ms_swift"),
    Target("SkyRL 0.3 critic", "skyrl@0.3.0", "critic", "skyrl", "skyrl"),
    Target("safe-rlhf reward", "safe-rlhf", "reward", "rewardbench", "safe_rlhf", bias=True, keeps_mean=True),
    Target("torchtune 0.6 reward", "torchtune@0.6.1", "reward", "torchtune", "torchtune"),
)  # fmt: skip


LEGEND = (
    "- ¹ Refused (`head-bias`), since the target has no bias; with `--bias drop` every score moves by one constant,",
    "  which is printed, and by nothing else.",
    "- ² Mean and std stay in config.json, the head is the same; OpenRLHF on transformers 5 loses them when it loads.",
    "- ³ Refused (`head-not-linear`): two layers with a ReLU between them are no linear head.",
)


@dataclass(frozen=True)
class Cell:
    """What became of one conversion.

    Attributes:
        outcome: `lossless`; `shift`: all scores move by one constant, after `--bias drop`; `kept`: mean and std stay in
            config.json, where the target loses them itself; `impossible`: refused, as no such head says the same; or
            `wrong`.
        refused: the code of the refusal without `--bias drop`; empty where nothing was lost.
        detail: numbers, or what is wrong.
    """

    outcome: str
    refused: str = ""
    detail: str = ""

    def words(self) -> str:
        """For the table."""
        if self.outcome == "lossless":
            return "lossless"
        if self.outcome in ("kept", "impossible"):
            return {"kept": "kept²", "impossible": "refused³"}[self.outcome]
        return "shift¹" if self.outcome == "shift" else f"WRONG: {self.detail}"


def expected(source: Source, target: Target) -> str:
    """What the cell must be: the algebra of heads. A constant is lost where the target has no bias to hold it."""
    if source.mlp:
        return "impossible"
    if source.constant == 0 or target.bias or (source.mean and target.keeps_mean):
        return "lossless"
    if source.maker == "openrlhf" and target.leaves_mean:
        return "kept"
    return "shift"


def inputs() -> dict[str, Any]:
    """Sequences of several lengths, padded on either side; no token is pad, BOS or EOS."""
    rows = [[5 + (7 * i + 13 * j) % 370 for j in range(n)] for i, n in enumerate((9, 6, 4, 2))]
    width = max(map(len, rows))
    batches: dict[str, Any] = {}
    for side in ("right", "left"):
        ids, mask = [], []
        for row in rows:
            fill, on = [0] * (width - len(row)), [1] * len(row)
            ids.append(row + fill if side == "right" else fill + row)
            mask.append(on + fill if side == "right" else fill + on)
        batches[side] = {"input_ids": ids, "attention_mask": mask}
    return {"batches": batches}


def table(cells: Mapping[tuple[str, str], Cell]) -> str:
    """The matrix as markdown."""
    targets = [t for t in TARGETS if any(t.name == name for _, name in cells)]
    lines = ["| from \\ to | " + " | ".join(t.name for t in targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for source in SOURCES:
        row = [cells.get((source.name, t.name)) for t in targets]
        if any(row):
            lines.append(f"| {source.name} | " + " | ".join("" if c is None else c.words() for c in row) + " |")
    return "\n".join([*lines, "", *LEGEND]) + "\n"
