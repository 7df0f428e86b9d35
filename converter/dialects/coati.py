"""ColossalChat: `model.` before AutoModel's names, a head with a bias, weights in `modeling/`."""

from __future__ import annotations

from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "coati",
    "ColossalChat",
    reward=HeadSpec("value_head", bias="always", missing="random, silently, from --rm_pretrain alone; else strict"),
    critic=HeadSpec("value_head", bias="always", missing="random, silently, from --rm_pretrain alone; else strict"),
    config=ConfigRules(reward="causal", critic="causal"),
    backbone="model.",
    subfolder="modeling",
    marks=(Marks(("value_head.weight", "value_head.bias"), backbone="model."),),
    serves=(Serves("colossalchat", ("reward", "critic"), launch="train_ppo.py --rm_checkpoint_path {out}/modeling"),),
    evidence=(
        Evidence(
            "experiment",
            "coati/models/base.py, reward_model.py, critic.py; examples/training_scripts/train_ppo.py:365-376",
        ),
    ),
    traps=(
        "a reward model is read only where the path contains `modeling`",
        "rm_pretrain alone gives critic and reward model a random head",
    ),
)
