"""A task head from an adapter over a base that has none: a causal model becomes a real reward model.

`LlamaForCausalLM` with a SEQ_CLS adapter becomes `LlamaForSequenceClassification`: the head from the adapter, no
`lm_head`, as many labels as the head has rows, and a pad token, without which rewards are read at the wrong place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.converters.merge.adapter_keys import Module
from converter.converters.merge.layer import merged_alone
from converter.converters.merge.methods.method import AdapterConfig
from converter.core.checkpoint import Checkpoint, SideFile
from converter.core.context import Context
from converter.core.files.names import ADDED_TOKENS, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY
from converter.core.side_files import side_json
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.adapter_task import TASK_SUFFIX
from converter.families.memory_names import Classifier, without_numbers
from converter.families.words import CLASSIFIERS, DECODER_CLASSES, OUTPUT_MODULES
from converter.text import fold, show

_BASE_SUFFIXES = (*DECODER_CLASSES, "ForSequenceClassification", "ForTokenClassification", "Model")


@dataclass(frozen=True)
class NewHead:
    """A module of an adapter that the base does not have."""

    module: Module
    config: AdapterConfig
    adapter: Checkpoint
    trained: Classifier | None


def is_new_head(module: Module, config: AdapterConfig, base_names: Collection[str], trained: Classifier | None) -> bool:
    """True for a task head that the base lacks and the adapter brings.

    Args:
        trained: the classification class of the adapter, where it is known.

    Raises:
        Refused: the adapter has a LoRA on a head whose own weight is nowhere (`head-base-lost`).
    """
    if not (_is_of_class(module, trained) if trained is not None else _looks_like_head(module, config)):
        return False
    spellings = {module.name, module.name.removeprefix(f"{trained.architecture.prefix}.") if trained else module.name}
    if any(name.startswith(f"{spelling}.") for name in base_names for spelling in spellings):
        return False
    if module.factors and "weight" not in module.replaced:
        raise Refused(
            "head-base-lost",
            f"{show(module.name)} = W0 + BA: BA is in the adapter; W0 was random, frozen and never saved, "
            "and no base model contains it",
            next="look in the run's own checkpoints (DeepSpeed global_step*) for the frozen head; "
            "without it the head can't be recovered",
        )
    return True


def is_head(name: str) -> bool:
    """True for a tensor of a classification head, by the name of its outermost module."""
    return name.split(".", maxsplit=1)[0] in CLASSIFIERS


def _is_of_class(module: Module, trained: Classifier) -> bool:
    names = [f"{module.name}.{leaf}" for leaf in module.replaced] or [f"{module.name}.weight"]
    return all(name in trained.own or without_numbers(name) in trained.adds for name in names)


def _looks_like_head(module: Module, config: AdapterConfig) -> bool:
    first = module.name.split(".")[0]
    return (
        config.task_type in TASK_SUFFIX
        and first not in OUTPUT_MODULES
        and (first in config.modules_to_save or first in CLASSIFIERS)
    )


def expect_head(config: AdapterConfig, brings: bool, base: Checkpoint, trained: Classifier | None, where: str) -> None:
    """Refuse a reward adapter without a head over a base without one: a random head is worthless.

    Raises:
        Refused: `head-missing`.
    """
    has = any(is_head(n) or (trained is not None and n in trained.own) for n in base.tensors)
    if config.task_type in TASK_SUFFIX and not brings and not has:
        raise Refused(
            "head-missing",
            "the adapter is for classification (a reward model), and neither it nor the base has a head (score)",
            where=where,
            next="look for the head in the run's own checkpoints; without it there is no reward model to write",
        )


def add_task_head(
    checkpoint: Checkpoint,
    heads: Sequence[NewHead],
    context: Context,
    *,
    prefix: str,
    touched: Collection[str],
    cast_to_base: bool,
) -> Checkpoint:
    """The checkpoint with its heads, its config and without the output embedding of the causal model.

    Args:
        prefix: what backbone names lack on disk (`transformer.`); they get it, since a head stands beside the backbone.
        touched: tensors that the adapters change; the class must have them.
        cast_to_base: round the head to the base's dtype, as PEFT does on load; else it keeps its own.

    Raises:
        Refused: two adapters bring one head (`adapters-conflict`), no class is known (`config-architecture`), or the
            class has tensors that are nowhere (`head-incomplete`) or lacks ones that were trained (`head-class`).
    """
    trained = heads[0].trained
    names = {n: prefix + n if prefix and not n.startswith(prefix) else n for n in checkpoint.tensors}
    dropped = dict(checkpoint.dropped)
    kept: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if not set(OUTPUT_MODULES).isdisjoint(name.split(".")[:-1]):
            dropped[name] = "a reward model has no output embedding"
        elif trained is not None and not trained.has(names[name]):
            if name in touched:
                what = f"the adapter trains {show(name)}, which {trained.architecture.name} does not have"
                raise Refused("head-class", what, where=show(heads[0].adapter.origin.asked))
            dropped[name] = f"{trained.architecture.name} has no such tensor"
        else:
            kept[names[name]] = tensor
    shards = {names.get(n, n): f for n, f in checkpoint.shards.items()}
    base_dtype = _main_dtype(checkpoint.tensors)
    for head in heads:
        for name, tensor in _head_tensors(head).items():
            if name in kept:
                raise Refused(
                    "adapters-conflict", f"two adapters bring {show(name)}", where=show(head.adapter.origin.asked)
                )
            kept[name] = tensors.cast(tensor, base_dtype) if cast_to_base else tensor
            context.note(
                "info", "head", f"{show(name)} {list(tensor.info.shape)} {tensor.info.dtype.value} from the adapter"
            )
    if trained is not None:
        _expect_whole(kept, trained, show(heads[0].adapter.origin.asked))
    config = _task_config(checkpoint, heads, context)
    return checkpoint.replace(tensors=kept, config=config, shards=shards, dropped=dropped, ties=())


def _expect_whole(kept: Collection[str], trained: Classifier, where: str) -> None:
    """Refuse where a part of the class was random in training and never saved: BERT's pooler over a masked model."""
    missing = trained.missing(kept)
    if missing:
        raise Refused(
            "head-incomplete",
            f"{fold(missing)} of {trained.architecture.name} is neither in the base nor in the adapter: it was random "
            "in training and never saved",
            where=where,
            next="look in the run's own checkpoints; without it the model that was trained can't be written",
        )


def _head_tensors(head: NewHead) -> dict[str, LazyTensor]:
    module = head.module
    whole = merged_alone(module, module.replaced, head.config, show(head.adapter.origin.asked))
    return {f"{module.name}.{leaf}": tensor for leaf, tensor in whole.items()}


def _main_dtype(stored: Mapping[str, LazyTensor]) -> DType:
    """The dtype that most bytes of floating point have."""
    sizes: dict[DType, int] = {}
    for tensor in stored.values():
        if tensor.info.dtype.is_float:
            sizes[tensor.info.dtype] = sizes.get(tensor.info.dtype, 0) + tensor.info.nbytes
    return max(sizes, key=lambda d: sizes[d])


def _task_config(checkpoint: Checkpoint, heads: Sequence[NewHead], context: Context) -> dict[str, Any]:
    config = dict(checkpoint.config)
    task = heads[0].config.task_type or ""
    trained = heads[0].trained
    config["architectures"] = [trained.architecture.name if trained else _class_name(config, task, checkpoint)]
    labels = _label_count(heads)
    if len(config.get("id2label") or {}) != labels:
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    config["num_labels"] = labels
    if task not in TASK_SUFFIX:
        return config
    pad, origin = _pad_token(heads[0].adapter, checkpoint)
    if pad is None:
        context.note(
            "changes-numbers",
            "pad-token-missing",
            "no pad token is known: batches of more than one row will fail or be scored at the wrong place. "
            "Set pad_token_id in the output's config.json to the id that training used",
        )
    else:
        before = config.get("pad_token_id")
        if before is not None and before != pad:
            context.note(
                "changes-numbers",
                "pad-token",
                f"pad_token_id {show(before)} of the base becomes {pad}, as {origin} says",
            )
        config["pad_token_id"] = pad
    return config


def _label_count(heads: Sequence[NewHead]) -> int:
    """Rows of the head's last layer: of the one that the class is known to end with, else of the last in the file."""
    weights = {h.module.name: h.module.replaced["weight"] for h in heads if "weight" in h.module.replaced}
    last = (heads[0].trained.labels or "").removesuffix(".weight") if heads[0].trained else ""
    found = weights.get(last, next(reversed(weights.values()), None))
    return found.info.shape[0] if found is not None else 1


def _class_name(config: Mapping[str, Any], task: str, checkpoint: Checkpoint) -> str:
    names = config.get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    for suffix in _BASE_SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name.removesuffix(suffix) + TASK_SUFFIX[task]
    raise Refused(
        "config-architecture",
        "config.json names no architecture that a head can be put on",
        where=show(checkpoint.origin.asked),
        expected="architectures such as ['LlamaForCausalLM']",
        got=show(names),
    )


def _pad_token(adapter: Checkpoint, base: Checkpoint) -> tuple[int | None, str]:
    """The pad token's id and who says so: the adapter's tokenizer, the base's config, the base's tokenizer."""
    own = pad_token_of(adapter.side_files)
    if own is not None:
        return own, "the adapter's tokenizer"
    configured = base.config.get("pad_token_id")
    if isinstance(configured, int):
        return configured, "the base's config"
    return pad_token_of(base.side_files), "the base's tokenizer"


def pad_token_of(files: Mapping[str, SideFile]) -> int | None:
    """The id of a tokenizer's pad token, read from its files; None where it has none."""
    token = None
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS):
        value = side_json(files, name).get("pad_token")
        token = token or (value.get("content") if isinstance(value, dict) else value)
    if not isinstance(token, str):
        return None
    for identifier, entry in (side_json(files, TOKENIZER_CONFIG).get("added_tokens_decoder") or {}).items():
        if isinstance(entry, dict) and entry.get("content") == token and str(identifier).isdigit():
            return int(identifier)
    tokenizer = side_json(files, TOKENIZER)
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and entry.get("content") == token and isinstance(entry.get("id"), int):
            return int(entry["id"])
    model = tokenizer.get("model")
    vocabularies = [side_json(files, ADDED_TOKENS), model.get("vocab") if isinstance(model, dict) else None]
    for vocabulary in (*vocabularies, side_json(files, VOCABULARY)):
        if isinstance(vocabulary, dict) and isinstance(vocabulary.get(token), int):
            return int(vocabulary[token])
    return None
