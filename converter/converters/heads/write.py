"""Any dialect, written: the backbone under its names, the head in its file, the output embedding where it has one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from converter.converters.heads.config import config_for
from converter.converters.heads.fit import Fitted
from converter.converters.heads.model import Reading, resolve
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.files.names import MODEL_WEIGHTS
from converter.core.tensors.byte_runs import reads
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Steps
from converter.dialects.known import Target
from converter.dialects.spec import HeadSpec
from converter.errors import Refused
from converter.families.ties import is_tied
from converter.families.words import OUTPUT_PREFIXES, input_embedding
from converter.text import fold, show

_ONE_FILE = MODEL_WEIGHTS


def write(
    reading: Reading, fitted: Fitted | None, target: Target, spec: HeadSpec, base: Checkpoint | None, context: Context
) -> Checkpoint:
    """The output; `fitted` is None for an actor.

    Raises:
        Refused: the target lacks a class (`no-class`), or the output embedding is nowhere (`lm-head-missing`).
    """
    config = config_for(reading, fitted, target, context)
    writer = _Writer(reading, fitted, target, spec, base, context, config)
    return writer.result()


@dataclass
class _Writer:
    reading: Reading
    fitted: Fitted | None
    target: Target
    spec: HeadSpec
    base: Checkpoint | None
    context: Context
    config: dict[str, Any]
    dropped: dict[str, str] = field(default_factory=dict)

    def result(self) -> Checkpoint:
        found = self.reading.checkpoint
        kept = self._with_output_embedding(dict(found.tensors))
        self._check_vocabulary(kept)
        names = {n: self._named(n) for n in kept}
        moved = found.replace(tensors=kept, shards={n: f for n, f in found.shards.items() if n in kept}).rename(names)
        head, beside = self._head()
        tensors = self._placed(dict(moved.tensors), head)
        shards = dict(moved.shards)
        if self.reading.shard is not None and shards:
            shards |= dict.fromkeys(head, self.reading.shard)
        if self.target.dialect.one_file:
            shards = dict.fromkeys(tensors, _ONE_FILE)
        self._account(head, beside)
        gone = {**self.reading.stored, **found.tensors}
        return self._with_base(
            moved.replace(
                tensors=tensors,
                config=self.config,
                shards=shards,
                ties=self._ties(kept),
                beside={**moved.beside, **beside},
                container=self.target.dialect.container,
                subfolder=self.target.dialect.subfolder,
                dropped={**moved.dropped, **self.dropped},
                left=(*moved.left, *(gone[n] for n in self.dropped if n in gone)),
            )
        )

    # The head

    def _head(self) -> tuple[dict[str, LazyTensor], dict[str, dict[str, LazyTensor]]]:
        """The head among the weights, and files beside them."""
        if self.fitted is None:
            return {}, {}
        stem = resolve(self.spec.stem, self.reading.family, self.config)
        if self.spec.file is None:
            return {f"{stem}.{leaf}": t for leaf, t in self.fitted.tensors.items()}, {}
        inner = stem if self.spec.stem_in_file is None else self.spec.stem_in_file
        return {}, {
            self.spec.file: {f"{inner}.{leaf}" if inner else leaf: t for leaf, t in self.fitted.tensors.items()}
        }

    def _placed(self, tensors: dict[str, LazyTensor], head: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """The head where it stood, so that files keep their order and their numbers."""
        twice = sorted(tensors.keys() & head.keys())
        if twice:
            raise Refused("rename-collision", f"the model has tensors of the head's name already: {fold(twice)}")
        position = len(tensors) if self.reading.position is None else self.reading.position
        names = list(tensors)
        before, after = names[:position], names[position:]
        return {n: tensors[n] for n in before} | head | {n: tensors[n] for n in after}

    def _account(self, head: dict[str, LazyTensor], beside: dict[str, dict[str, LazyTensor]]) -> None:
        """Tensors of the source's head that the output doesn't read: settled above, in words, or known to be zero."""
        written = [*head.values(), *(t for tensors in beside.values() for t in tensors.values())]
        used = {(run.file, run.offset) for t in written for run in reads(t)}
        why = "an actor has no head" if self.fitted is None else "no part of the head in its new form"
        for name, tensor in self.reading.stored.items():
            if not any((run.file, run.offset) in used for run in reads(tensor)):
                self.dropped[name] = why

    # The backbone

    def _named(self, name: str) -> str:
        dialect, kind = self.target.dialect, self.reading.family
        if dialect.backbone == "{P}":
            return name
        prefix = resolve("{P}", kind, self.config)
        if name.startswith(OUTPUT_PREFIXES):
            return dialect.outer + name
        if not name.startswith(prefix):
            what = f"{show(name)} is not part of the backbone ({show(prefix)}) and has no place in {dialect.name}"
            raise Refused("backbone-name", what, where=show(self.reading.checkpoint.origin.asked))
        return resolve(dialect.backbone, kind, self.config) + name.removeprefix(prefix)

    def _check_vocabulary(self, kept: dict[str, LazyTensor]) -> None:
        multiple = self.target.dialect.vocab_multiple
        embedding = input_embedding(kept)
        if embedding is None or kept[embedding].info.shape[0] % multiple == 0:
            return
        rows = kept[embedding].info.shape[0]
        self.context.consent(
            Refused(
                "vocab-not-padded",
                f"{show(embedding)} has {rows} rows, and {self.target.words} resizes embeddings to a multiple of "
                f"{multiple} before it loads: the file's would not fit, and stay uninitialised, silently",
                expected=f"{-(-rows // multiple) * multiple} rows",
            )
        )

    # The output embedding

    def _with_output_embedding(self, kept: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        present = [n for n in kept if n.startswith(OUTPUT_PREFIXES)]
        if not self.spec.lm_head:
            self.dropped |= dict.fromkeys(
                present, f"{self.target.words} has no output embedding in a {self.target.role}"
            )
            return {n: t for n, t in kept.items() if n not in present}
        if present:
            return self._settled(kept, present)
        if any(f".{stem}" in n for n in kept for stem in OUTPUT_PREFIXES):
            return kept  # that of the language model inside a larger one
        if self.reading.family.tied:
            self.config["tie_word_embeddings"] = True
            return self._doubled(kept)
        return kept | self._from_base(kept)

    def _settled(self, kept: dict[str, LazyTensor], present: list[str]) -> dict[str, LazyTensor]:
        """Embeddings that are stored twice although they are tied: one of them where they are equal, else untied."""
        weight, embedding = next((n for n in present if n.endswith(".weight")), None), input_embedding(kept)
        if weight is None or embedding is None or not is_tied(self.config):
            return kept
        if not self.context.equal(kept[weight], kept[embedding]):
            self.config["tie_word_embeddings"] = False
            text = f"{show(weight)} and {show(embedding)} differ: both are written, and tie_word_embeddings is false"
            self.context.note("changes-numbers", "tied-differ", text)
        elif not self.target.dialect.outer:
            self.dropped[weight] = f"identical with {embedding}, to which it is tied"
            return {n: t for n, t in kept.items() if n != weight}
        return kept

    def _doubled(self, kept: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        """A strict loader wants the output embedding by name though it is the input's."""
        embedding = input_embedding(kept)
        if not self.target.dialect.outer or embedding is None:
            return kept
        return kept | {self._output_name(): kept[embedding]}

    def _output_name(self) -> str:
        return "embed_out.weight" if self.reading.family.kind == "gpt_neox" else "lm_head.weight"

    def _from_base(self, kept: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
        where = show(self.reading.checkpoint.origin.asked)
        if self.base is None:
            text = (
                f"{self.target.words} wraps a causal model, and this one has no lm_head: its values don't depend on it"
            )
            error = Refused(
                "lm-head-missing",
                f"{text}, but the trainer would draw a random one",
                where=where,
                next=Steps(Again(("--base", "DIR")), ", the model that this one was trained from"),
            )
            self.context.consent(error)
            return {}
        found = {n: t for n, t in self.base.tensors.items() if n.startswith(OUTPUT_PREFIXES)}
        own = input_embedding(self.base.tensors)
        if not found and own is not None and is_tied(self.base.config):
            found = {self._output_name(): self.base.tensors[own]}
        embedding = input_embedding(kept)
        if not found:
            held = "the base has no lm_head either" if self.base.tensors else "the base has a config and no weights"
            asked = show(self.base.origin.asked)
            raise Refused("lm-head-missing", held, where=asked, next=Steps(Again(("--base", "DIR")), ", one with it"))
        expected = kept[embedding].info.shape if embedding is not None else None
        odd = [t for n, t in found.items() if n.endswith(".weight") and expected not in (None, t.info.shape)]
        if odd:
            what = "the base's output embedding doesn't fit this vocabulary"
            got = str(list(odd[0].info.shape))
            asked = show(self.base.origin.asked)
            raise Refused("lm-head-shape", what, where=asked, expected=str(list(expected or ())), got=got)
        self.context.note("info", "lm-head", f"{fold(found)} from the base, {show(self.base.origin.name)}")
        return found

    def _with_base(self, found: Checkpoint) -> Checkpoint:
        if self.base is None:
            return found
        aside = {self.base.origin.path: "only its output embedding is used, where that is missing"}
        return found.replace(set_aside={**found.set_aside, **aside}, inputs={**self.base.inputs, **found.inputs})

    def _ties(self, kept: dict[str, LazyTensor]) -> tuple[tuple[str, ...], ...]:
        embedding = input_embedding(kept)
        stored = any(n.startswith(OUTPUT_PREFIXES) for n in kept)
        if not self.spec.lm_head or stored or embedding is None or not is_tied(self.config):
            return ()
        return ((self._named(embedding), self._named(self._output_name())),)
