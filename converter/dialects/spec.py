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
        bias_from_zero: a bias that is missing starts at zero, which is what it is in models without one.
    """

    stem: str
    bias: Bias = "never"
    bias_from_zero: bool = False
    kind: HeadKind = "linear"
    width: int = 0
    file: str | None = None
    files: tuple[str, ...] = ()
    stem_in_file: str | None = None
    lm_head: bool = False
    missing: str = "random, with a warning"


FAMILY_CLASSES = frozenset({"seqcls", "tokcls", "causal"})
"""Words that stand for a family's own class in `ConfigRules`."""


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
        rows_key, role_key: keys that hold the head's number of rows, and the role; empty: there is none.
    """

    reward: str = "seqcls"
    critic: str = "seqcls"
    labels: bool = False
    sets: tuple[tuple[str, Any], ...] = ()
    keys: tuple[str, ...] = ()
    drops: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    pad: bool = False
    rows_key: str = ""
    role_key: str = ""


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
        goes_by_class: what it does to a folder whose `architectures` names another class, where it looks there.
        sets_labels: it loads with one label, whatever the config says.
        reads_adapters: it loads an adapter's folder with the base that the adapter records.
        leaves_heads: it hands an adapter's folder to `from_pretrained`, which puts LoRA on the recorded base. The head
            that the adapter brings stays among the unexpected keys in transformers 5.15, and is read in 5.23.
        pins_transformers: the major version of transformers that the trainer asks for, where it pins one. This and what
            follows is of the trainer as a whole: it stands in one of its entries, and is found from all.
        launch_marks: regular expressions of which a word of a command line matches one in full: it starts the trainer.
        launch_options: options that together give it away, where no word does.
        launch_keys: keys of a YAML file of which one gives it away.
        launch_roles: options that name a model's folder, and what it is used as.
        lays_out: the step that makes the trainer's own files of the model, where it reads no folder of transformers'.
        probe: the script that runs the trainer's own loader: a file of `examine/verify/probes`, or a module of the
            package that the dialect is from (`my_package.probe_mine`).
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
    goes_by_class: str = ""
    sets_labels: bool = False
    reads_adapters: bool = False
    leaves_heads: bool = False
    pins_transformers: str = ""
    launch_marks: tuple[str, ...] = ()
    launch_options: tuple[str, ...] = ()
    launch_keys: tuple[str, ...] = ()
    launch_roles: tuple[tuple[str, Role], ...] = ()
    probe: str = ""
    lays_out: str = ""

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
        maker: who saves such folders, as they spell it; needed where there are files of its own.
        files_of_its_own: files that this maker alone leaves beside weights, or in a run's folder.
        wrapped: what the names of the training state begin with, of which no model's names do, and whose they are.
        class_says: `architectures` names the class, so that there is nothing to say of whose the folder is.
        mostly_critic: a folder is taken for a critic unless its class says otherwise.
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
    maker: str = ""
    files_of_its_own: tuple[str, ...] = ()
    wrapped: tuple[tuple[str, str], ...] = ()
    class_says: bool = False
    mostly_critic: bool = False

    @property
    def head(self) -> HeadSpec:
        """The head in any role; both have the same files."""
        found = self.critic or self.reward or self.actor
        assert found is not None
        return found

    def head_of(self, role: Role) -> HeadSpec | None:
        """The head in one role."""
        return {"reward": self.reward, "critic": self.critic, "actor": self.actor}[role]
