"""Fixes of a config: labels, pad token, architecture, vocabulary, and both spellings of what transformers 5 renamed.

No tensor changes. What can't be inferred from the folder itself is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from converter.converters.fix.vocabulary import with_rows_in_config
from converter.converters.merge.task_head import pad_token_of
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.errors import Refused
from converter.families.old_spellings import with_old_spellings
from converter.families.old_tokenizers import with_old_tokenizer
from converter.families.words import CLASSIFIER_WEIGHT, WRAPPED_CLASS
from converter.text import show

_WRAPPER = WRAPPED_CLASS


@dataclass(frozen=True)
class FixArchitecture:
    """Take a trainer's wrapper off the class name in `architectures`: FSDPQwen2ForCausalLM is Qwen2ForCausalLM."""

    name: ClassVar[str] = "fix-architecture"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with its class named.

        Raises:
            Refused: no class is named at all (`config-architecture`).
        """
        names = checkpoint.config.get("architectures")
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            what = "config.json names no architecture, and which class the weights are of is not guessed"
            raise Refused("config-architecture", what, where=show(checkpoint.origin.asked))
        bare = [_WRAPPER.sub("", n) for n in names]
        if bare != names:
            context.note("info", "fixed", f"architectures: {show(names[0])} is {show(bare[0])}")
        return _with(checkpoint, {"architectures": bare})


@dataclass(frozen=True)
class FixLabels:
    """Make the config's labels as many as the head has rows."""

    name: ClassVar[str] = "fix-labels"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with its labels counted.

        Raises:
            Refused: there is no head to count by (`head-missing`).
        """
        rows = next(
            (t.info.shape[0] for n, t in checkpoint.tensors.items() if CLASSIFIER_WEIGHT.match(n) and t.info.shape),
            None,
        )
        if rows is None:
            what = "there is no head whose rows could be counted"
            raise Refused("head-missing", what, where=show(checkpoint.origin.asked))
        context.note("info", "fixed", f"num_labels: {rows}, the rows of the head")
        labels = {str(i): f"LABEL_{i}" for i in range(rows)}
        back = {label: int(i) for i, label in labels.items()}
        return _with(checkpoint, {"num_labels": rows, "id2label": labels, "label2id": back})


@dataclass(frozen=True)
class FixPadToken:
    """Write the tokenizer's pad token into a config that has none."""

    name: ClassVar[str] = "fix-pad-token"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with a pad token.

        Raises:
            Refused: the tokenizer has none (`pad-token-missing`).
        """
        if checkpoint.config.get("pad_token_id") is not None:
            return checkpoint
        known = pad_token_of(checkpoint.side_files)
        if known is None:
            raise Refused(
                "pad-token-missing",
                "neither the config nor the tokenizer has a pad token",
                where=show(checkpoint.origin.asked),
                next="set pad_token_id in config.json to the id that training used",
            )
        context.note("info", "fixed", f"pad_token_id: {known}, the tokenizer's pad token")
        return _with(checkpoint, {"pad_token_id": known})


@dataclass(frozen=True)
class FixVocabulary:
    """Make the config's vocab_size the number of rows of the embeddings."""

    name: ClassVar[str] = "fix-vocabulary"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with its vocabulary counted.

        Raises:
            Refused: embeddings of different heights (`vocab-mismatch`), or without consent (`vocabulary-rows`).
        """
        return with_rows_in_config(checkpoint, context, consent=True)


@dataclass(frozen=True)
class FixForTransformers4:
    """Write what transformers 5 renamed under its old name too, so that both read the folder alike."""

    name: ClassVar[str] = "fix-for-transformers-4"

    def __call__(self, checkpoint: Checkpoint, context: Context) -> Checkpoint:
        """The checkpoint with `rope_theta`, `rope_scaling`, `torch_dtype` and their like beside the new spellings.

        Raises:
            Refused: nothing says how transformers 4 would write an entry (`spelling-unknown`), without consent.
        """
        config = with_old_spellings(checkpoint.config, context, asked=checkpoint.origin.asked)
        if config != dict(checkpoint.config):
            context.note("info", "fixed", "config.json: old spellings written beside those of transformers 5")
        return with_old_tokenizer(checkpoint.replace(config=config), context)


def _with(checkpoint: Checkpoint, changes: Mapping[str, Any]) -> Checkpoint:
    return checkpoint.replace(config={**checkpoint.config, **changes})
