"""What adapters hold whole: saved modules, resized embeddings, trained token rows; and the ties that it concerns.

PEFT saves resized embeddings with everything that stands in their module: the trained tensor, a second copy of it under
the plain name, and the frozen one below (`original_module`, `base_layer`). The trained one takes the base's place; the
frozen one is what the other side of a tie still has.

Source: `get_peft_model_state_dict`, https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/save_and_load.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from converter.converters.merge.adapter_keys import PLAIN, SAVED, UNDER, Module
from converter.converters.merge.embeddings import has_vocabulary_rows, is_vocabulary
from converter.converters.merge.methods.method import AdapterConfig
from converter.converters.merge.name_rules import NameRule
from converter.converters.merge.task_head import is_head
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors import nodes as tensors
from converter.core.tensors.nodes import Cast, LazyTensor
from converter.errors import Refused
from converter.text import show


@dataclass(frozen=True)
class Brought:
    """A tensor that an adapter holds whole, in the base's dtype, with its key there."""

    key: str
    tensor: LazyTensor


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding, `[n, dim]`, with their key in the adapter, and which rows they are."""

    key: str
    rows: LazyTensor
    indices: tuple[int, ...]


@dataclass
class WholeTensors:
    """What takes the place of the base's tensors, by name on disk.

    Attributes:
        own: the tensor that a name has instead of the base's.
        under: the frozen tensor below a trained one: what the rest of a tie has.
        one_sided: names whose own tensor is not that of the names they are tied to.
        rows: trained rows of embeddings.
        dropped: keys of adapters that are not needed, with the reason.
    """

    context: Context
    own: dict[str, Brought] = field(default_factory=dict)
    under: dict[str, Brought] = field(default_factory=dict)
    one_sided: set[str] = field(default_factory=set)
    rows: dict[str, TokenRows] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)

    def add(self, base: Checkpoint, module: Module, rule: NameRule, config: AdapterConfig, where: str) -> None:
        """Take in what the adapter holds whole of one module.

        Raises:
            Refused: the config does not ask for it (`adapter-unexpected`), it does not fit (`adapter-shape`), it is
                there twice with different values (`adapter-key-twice`), two adapters bring it (`adapters-conflict`), or
                two copies of one tied tensor differ (`tied-copies-differ`).
        """
        self.settle_copies(module, where)
        for leaf, tensor in module.replaced.items():
            name, key = rule.tensor(f"{module.name}.{leaf}"), module.key(leaf)
            old = stored(base, name)
            saved = module.saved or any(_is_below(module.name, m) for m in _saved_modules(config))
            copied = UNDER in module.whole[leaf] and bool(module.factors) and has_vocabulary_rows(name, old, base)
            if not (saved or copied or is_vocabulary(name) or _is_trained_bias(f"{module.name}.{leaf}", config)):
                raise Refused(
                    "adapter-unexpected",
                    f"{show(key)} would replace {show(name)}, and the config does not ask for that",
                    where=where,
                    expected="its module in modules_to_save, an embedding, or a bias with bias=all",
                )
            for found in (tensor, *(u[1] for u in [module.under(leaf)] if u)):
                _expect_fits(found, old, name, key, base, where)
            brought = Brought(key, tensors.cast(tensor, old.info.dtype))
            if name in self.own and not self._again(name, brought, where):
                continue
            is_trained = SAVED in module.whole[leaf] or PLAIN in module.whole[leaf]
            if saved and is_trained and not config.ensure_weight_tying:
                self.one_sided.add(name)
            else:
                self._expect_one_tensor(base, name, brought, where)
            self.own[name] = brought
            under = module.under(leaf)
            if under is not None:
                self.under[name] = Brought(under[0], tensors.cast(under[1], old.info.dtype))

    def settle_copies(self, module: Module, where: str) -> None:
        """A tensor that is there under two names must be the same twice.

        Raises:
            Refused: it is not (`adapter-key-twice`).
        """
        for leaf, tensor in module.replaced.items():
            copy = module.copy(leaf)
            if copy is None:
                continue
            if not is_same(self.context, copy[1], tensor):
                what = f"two tensors are the {leaf} of one module, and they differ"
                raise Refused(
                    "adapter-key-twice", what, where=where, got=f"{show(copy[0])} and {show(module.key(leaf))}"
                )
            self.dropped[copy[0]] = f"identical with {show(module.key(leaf))}"

    def _again(self, name: str, brought: Brought, where: str) -> bool:
        """False where an adapter before brought the same tensor.

        Raises:
            Refused: it brought another (`adapters-conflict`).
        """
        if not is_same(self.context, self.own[name].tensor, brought.tensor):
            raise Refused("adapters-conflict", f"two adapters replace {show(name)}; only one can", where=where)
        self.dropped[brought.key] = f"identical with {show(self.own[name].key)} of another adapter"
        return False

    def _expect_one_tensor(self, base: Checkpoint, name: str, brought: Brought, where: str) -> None:
        for twin in (n for n in base.tied_to(name) if n in self.own and n not in self.one_sided):
            if not is_same(self.context, brought.tensor, self.own[twin].tensor):
                what = f"{show(name)} and {show(twin)} are one tensor in the base, and the adapter's copies differ"
                raise Refused("tied-copies-differ", what, where=where)

    def add_rows(
        self, base: Checkpoint, modules: Iterable[Module], rule: NameRule, config: AdapterConfig, where: str
    ) -> None:
        """Take in the trained rows of embeddings; for two that are tied PEFT lists the indices of one.

        Raises:
            Refused: not as many rows as indices (`adapter-tokens`), or two adapters train them (`adapters-conflict`).
        """
        found = [m for m in modules if m.token_rows is not None]
        for module in sorted(found, key=lambda m: _listed(m.name, config) is None):
            name, rows = rule.tensor(f"{module.name}.weight"), module.token_rows
            assert rows is not None
            indices = _listed(module.name, config)
            if indices is None:
                indices = next((self.rows[n].indices for n in base.tied_to(name) if n in self.rows), ())
            if len(indices) != rows.info.shape[0] or len(set(indices)) != len(indices):
                what = f"{show(module.keys[-1])} has {rows.info.shape[0]} rows"
                raise Refused("adapter-tokens", f"{what}, the config lists {len(indices)} token indices", where=where)
            if name in self.rows:
                raise Refused("adapters-conflict", f"two adapters train rows of {show(name)}", where=where)
            self.rows[name] = TokenRows(module.rows_key, rows, indices)

    def root(self, base: Checkpoint, name: str) -> LazyTensor:
        """What updates and rows of `name` go on top of: its own tensor, its tie's, or the base's."""
        if name in self.own:
            return self.own[name].tensor
        partners = base.tied_to(name)
        for partner in partners:
            if partner in self.under:
                return self.under[partner].tensor
        for partner in partners:
            if partner in self.own and partner not in self.one_sided:
                return self.own[partner].tensor
        return stored(base, name)

    def rows_of(self, base: Checkpoint, name: str) -> TokenRows | None:
        """The trained rows of a name, or of what it is tied to."""
        return next((self.rows[n] for n in (name, *base.tied_to(name)) if n in self.rows), None)

    def is_tied_still(self, base: Checkpoint, group: Collection[str]) -> bool:
        """True where all names of a tie have the same tensor and the same rows."""
        first, *others = group
        rows = self.rows_of(base, first)
        return all(
            is_same(self.context, self.root(base, first), self.root(base, other))
            and self._same_rows(rows, self.rows_of(base, other))
            for other in others
        )

    def _same_rows(self, a: TokenRows | None, b: TokenRows | None) -> bool:
        if a is None or b is None:
            return a is b
        return a.indices == b.indices and is_same(self.context, a.rows, b.rows)

    def left_out(self, base: Checkpoint, written: Collection[str]) -> dict[str, str]:
        """Tensors of base and adapters that nothing written reads, with the reason.

        Args:
            written: the names that were built; what is tied to one of them is written as it is.
        """
        used = [self.root(base, name) for name in written]
        rows = [self.rows_of(base, name) for name in written]
        dropped = dict(self.dropped)
        for name, brought in (*self.own.items(), *self.under.items()):
            if brought.tensor not in used:
                dropped[brought.key] = f"a second or untrained copy of {show(name)}"
        twins = {r.key: f"the rows of what {show(n)} is tied to" for n, r in self.rows.items() if r not in rows}
        for name in dict.fromkeys(n for own in self.own for n in (own, *base.tied_to(own))):
            if name in base.tensors and base.tensors[name] not in used:
                dropped[name] = "replaced by the adapter's own"
        return dropped | twins


def stored(base: Checkpoint, name: str) -> LazyTensor:
    """The base's tensor of that name, or the one it is tied to.

    Raises:
        Refused: there is none (`adapter-unmatched`).
    """
    for candidate in (name, *base.tied_to(name)):
        if candidate in base.tensors:
            return base.tensors[candidate]
    raise Refused("adapter-unmatched", f"the base has no {show(name)}", where=show(base.origin.asked))


def is_same(context: Context, a: LazyTensor, b: LazyTensor) -> bool:
    """True where two tensors are known to hold the same; both may be rounded to one dtype on the way."""
    if isinstance(a, Cast) and isinstance(b, Cast) and a.info == b.info:
        a, b = a.source, b.source
    if isinstance(a, Cast) or isinstance(b, Cast):
        return a == b
    return a == b or context.equal(a, b)


def _expect_fits(found: LazyTensor, old: LazyTensor, name: str, key: str, base: Checkpoint, where: str) -> None:
    if found.info.shape == old.info.shape:
        return
    grows = found.info.shape[1:] == old.info.shape[1:] and not is_head(name) and has_vocabulary_rows(name, old, base)
    if not grows:
        raise Refused(
            "adapter-shape",
            f"{show(key)} does not fit the base's {show(name)}",
            where=where,
            expected=str(list(old.info.shape)),
            got=str(list(found.info.shape)),
        )


def _saved_modules(config: AdapterConfig) -> tuple[str, ...]:
    """Modules that are saved whole: those of the config, and heads of its task, which older PEFT does not list."""
    return (*config.modules_to_save, *_HEADS_OF_TASK.get(config.task_type or "", ()))


_HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""Source: https://github.com/huggingface/peft/blob/v0.13.2/src/peft/peft_model.py (`classifier_module_names`)"""


def _is_trained_bias(name: str, config: AdapterConfig) -> bool:
    """True for a bias where biases were trained; with `all` PEFT takes every tensor with that word in its name for one,
    such as the table of T5's `relative_attention_bias`.
    """
    return (name.endswith(".bias") and config.bias != "none") or ("bias" in name and config.bias == "all")


def _listed(module: str, config: AdapterConfig) -> tuple[int, ...] | None:
    """The token indices of a module; None where the config lists none for it."""
    named = [rows for key, rows in config.token_indices.items() if key and ends(module, key)]
    return named[-1] if named else config.token_indices.get("")


def ends(module: str, name: str) -> bool:
    """True for a module that a config calls `name`: the whole name or its last parts."""
    return module == name or module.endswith("." + name)


def _is_below(module: str, name: str) -> bool:
    """True for a module that modules_to_save names, and for what is inside one; PEFT compares the names' ends."""
    pieces = module.split(".")
    return any(".".join(pieces[:n]).endswith(name) for n in range(1, len(pieces) + 1))
