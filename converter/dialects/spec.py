"""What a dialect says: names, files, config and loader of one trainer's reward and critic models. Data alone.

A third party adds a dialect with one file that holds a `Dialect` and one entry point in the group
`rlhf_convert.dialects`, as ours are.

In names, `{P}` is the family's `base_model_prefix` and a dot (`model.` of Llama, `transformer.` of GPT-2),
`{tokcls}` the head of its token classification class (`score` or `classifier`), `{value_head_prefix}` that key of
config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from converter.diagnostic import quoted

Role = Literal["reward", "critic", "actor"]
HeadKind = Literal["linear", "mlp", "lm-row", "none"]
Bias = Literal["never", "always", "config"]
"""`config`: there is one where `config.bias` says so."""

Pooling = Literal["last-attended", "last-non-pad", "reward-token", "logit-0", "configured", "none"]
"""Which token's value is the reward. Two groups differ at least where pad is EOS."""

Alignment = Literal["all", "drop-last"]
"""Whether a critic keeps the value of every position, or drops the last one."""

Normalising = Literal["none", "mean-std", "mean-var"]


@dataclass(frozen=True)
class Evidence:
    """What a literal rests on: `experiment` with the real package, its `source`, or stored public `text`."""

    kind: Literal["experiment", "source", "text"]
    of: str
    link: str = ""


@dataclass(frozen=True)
class HeadSpec:
    """A head in a dialect.

    Attributes:
        stem: names are `stem.weight` and `stem.bias`; of an MLP `stem.0.weight` and `stem.2.weight` and so on.
        bias: whether the loader has one.
        kind: linear `[n, h]`; `mlp`: one hidden layer, ReLU; `lm-row`: row 0 of `lm_head`; `none`: no head at all.
        width: of an MLP: hidden units in multiples of the hidden size; 0: any.
        file: a file beside the weights that holds the head, the first that the loader looks for.
        files: others that it may be in.
        stem_in_file: names in that file, where they are others than `stem`; empty: `weight` and `bias` alone.
        lm_head: the model is a causal one, with its output embedding.
        missing: what the loader does where the head is missing or has another name.
    """

    stem: str
    bias: Bias = "never"
    kind: HeadKind = "linear"
    width: int = 0
    file: str | None = None
    files: tuple[str, ...] = ()
    stem_in_file: str | None = None
    lm_head: bool = False
    missing: str = "random, with a warning"


@dataclass(frozen=True)
class ConfigRules:
    """What `config.json` must say.

    Attributes:
        reward: `architectures` of a reward model: `seqcls`, `tokcls` and `causal` name the family's class, other
            words are written as they are.
        critic: the same of a critic.
        labels: number of labels and their names are written; else they are taken out.
        sets: keys and values that are written.
        keys: keys that belong to this dialect alone; they go when a model leaves it.
        drops: keys that must not be there.
        numbers: keys of which a trainer saved the number as a string, on which others fail.
        pad: the loader finds the scored token by `pad_token_id`.
    """

    reward: str = "seqcls"
    critic: str = "seqcls"
    labels: bool = False
    sets: tuple[tuple[str, Any], ...] = ()
    keys: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    pad: bool = False


@dataclass(frozen=True)
class Marks:
    """Signs in a folder. All given must hold; of several dialects the one with most signs is meant.

    Attributes:
        tensors: names that are all there; `{value_head_prefix}` stands for that key of config.json.
        without: names of which none is there.
        backbone: some tensor's name begins so.
        beside: one of these files lies beside the weights.
        classes: `architectures` names a class that ends so.
        config: keys that config.json has, and their value where it is not None.
        rows: rows of the first of `tensors`; None: any.
    """

    tensors: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    backbone: str | None = None
    beside: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    config: tuple[tuple[str, Any], ...] = ()
    rows: int | None = None


@dataclass(frozen=True)
class Serves:
    """A trainer that reads the dialect, from version `since` to `until`, both known to.

    Attributes:
        trainer: as `--to` names it.
        since, until: versions; empty where the trainer has none (`deepspeed-chat`).
        labels: heads of several rows are read.
        keeps_mean: mean and std of config.json reach the model; under transformers 5 they are uninitialised memory.
        launch: what to type; `{out}` is the folder.
        refused: this version can't use such a model at all, and why.
        traps: what goes wrong with this trainer, though not with others that read the dialect.
    """

    trainer: str
    roles: tuple[Role, ...]
    since: str = ""
    until: str = ""
    labels: bool = False
    keeps_mean: bool = False
    launch: str = ""
    refused: str = ""
    traps: tuple[str, ...] = ()

    def launch_line(self, path: str) -> str:
        """The line to type, with the folder as a word of a shell or of Python; empty where none is known."""
        return self.launch.replace("{out!r}", repr(path)).replace("{out}", quoted(path))


@dataclass(frozen=True)
class Dialect:
    """One way of storing a reward or critic model.

    Attributes:
        about: one line for people.
        reward, critic, actor: the head in each role; None: the dialect has no such role.
        backbone: what backbone names begin with, before the names of `AutoModel`.
        outer: what stands before names outside the backbone (`lm_head`).
        extras: beginnings of names that no other dialect has a place for, and what they are.
        container: `torch` where the loader reads `pytorch_model.bin` alone.
        subfolder: weights lie in it.
        one_file: the loader reads no sharded folder.
        normaliser: what is done to the score after the head.
        families: model types that the trainer has, or empty: all.
        vocab_multiple: the loader resizes embeddings to multiples of this.
        own_backbone: backbone code of its own, which transformers has not.
        same_as: a dialect with the same files; never detected itself.
        refused: recognised, and neither read nor written, and why.
        writable: can be written.
        traps: what goes wrong with every trainer that reads it, although the files are right.
    """

    name: str
    about: str
    reward: HeadSpec | None
    critic: HeadSpec | None
    evidence: tuple[Evidence, ...]
    actor: HeadSpec | None = None
    config: ConfigRules = ConfigRules()
    marks: tuple[Marks, ...] = ()
    serves: tuple[Serves, ...] = ()
    backbone: str = "{P}"
    outer: str = ""
    extras: tuple[tuple[str, str], ...] = ()
    container: Literal["safetensors", "torch"] = "safetensors"
    subfolder: str = ""
    one_file: bool = False
    pooling: Pooling = "last-attended"
    alignment: Alignment = "all"
    normaliser: Normalising = "none"
    families: tuple[str, ...] = ()
    vocab_multiple: int = 1
    own_backbone: str = ""
    same_as: str = ""
    refused: str = ""
    writable: bool = True
    traps: tuple[str, ...] = ()

    @property
    def head(self) -> HeadSpec:
        """The head in any role; both have the same files."""
        found = self.critic or self.reward or self.actor
        assert found is not None
        return found

    def head_of(self, role: Role) -> HeadSpec | None:
        """The head in one role."""
        return {"reward": self.reward, "critic": self.critic, "actor": self.actor}[role]
