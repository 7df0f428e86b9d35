"""Writes `converter/families/memory_names.json`: by which names transformers knows a checkpoint's tensors.

Run by hand for a release, in an environment with the pinned transformers (timm, pillow and scipy add a few classes):

    python tools/make_memory_names.py

Everything is read off transformers itself: the renames of its conversion mapping, the prefix of each class's backbone,
which sub-models a class is made of (each class is built on the meta device, without weights), which class an auto class
picks, and what a classification class has that a language model lacks.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from transformers import AutoConfig, PreTrainedModel, conversion_mapping
    from transformers.models.auto import modeling_auto as auto

OUT = Path(__file__).parent.parent / "converter" / "families" / "memory_names.json"
TABLE = "src/transformers/conversion_mapping.py"
AUTO = {
    "base": "MODEL_MAPPING_NAMES",
    "backbone": "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "CAUSAL_LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "SEQ_2_SEQ_LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "IMAGE_TEXT": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
_SIBLINGS = ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MASKED_LM", "MODEL_FOR_PRETRAINING")
_CLASSIFIERS = (
    *("MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL_FOR_IMAGE_CLASSIFICATION"),
    *("MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_VIDEO_CLASSIFICATION"),
)
LABELS = 13  # a count that no other dimension has: its tensor is the one with a row for each label
_SECONDS = 60
_FEW = 8
_MANY = 16  # tensors of a head; more is a model of its own
_ROPE = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
# What some config classes leave open and their models need; tried in turn where the plain config does not do.
_SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"head_dim": 32},
    {"num_key_value_heads": 8},
    {"vocab_size": 99, "pad_token_id": 0, "position_embedding_type": "absolute"},
    {"prediction_length": 4, "context_length": 8},
    {"is_decoder": True, "vocab_size": 99},
    {"layer_types": ["full_attention"], "num_hidden_layers": 1},
    {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 12, "hidden_size": 768}},
    {"vision_config": {"architecture": "vit_base_patch16_224", "model_args": {"embed_dim": 768}}},
    {"vocabulary_map": {"<image>": 5}},
    {"attn_config": {"rope_theta": 1e4}},
    {"n_routed_experts": 4, "n_shared_experts": 1},
    {"text_config": {"mlp_layer_types": ["dense"] * 64}},
    {"text_config": {"num_hidden_layers": 2}},
    {"text_config": {"rope_parameters": _ROPE}},
    {"rope_parameters": _ROPE},
    {"talker_config": {"text_config": {"shared_expert_intermediate_size": 64}, "spatial_merge_size": 2}},
    {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [0]},
    {"audio_vocab_size": 99},
    {"is_encoder_decoder": False},
)


def model_classes() -> dict[str, type[PreTrainedModel]]:
    """Every model class that transformers can be asked for, by name."""
    found: dict[str, type[PreTrainedModel]] = {}
    root = Path(transformers.__file__).parent / "models"
    for file in sorted(root.glob("*/modeling_*.py")):
        try:
            module = importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}")
        except ImportError as error:
            print(f"not importable: {file.stem}: {error}", file=sys.stderr)
            continue
        for name, value in vars(module).items():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, PreTrainedModel) and not name.endswith("PreTrainedModel"):
                found[name] = value
    return found


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(cls: type[PreTrainedModel], **more: Any) -> PreTrainedModel | None:
    """The class with its default config, or a small variation of it, on the meta device; None where nothing works."""
    for settings in _SETTINGS:
        with contextlib.suppress(Exception), warnings.catch_warnings(), _limited(_SECONDS), torch.device("meta"):
            warnings.simplefilter("ignore")
            return cls(cls.config_class(**settings, **more))
    return None


def rules() -> dict[str, list[list[Any]]]:
    """The conversion mapping, each transform as its kind, its compiled pattern and its targets."""
    table = conversion_mapping._build_checkpoint_conversion_mapping()
    return {name: [_transform(t) for t in transforms] for name, transforms in sorted(table.items())}


def _transform(transform: Any) -> list[Any]:
    pattern, targets = transform.compiled_sources.pattern, list(transform.target_patterns)
    match type(transform).__name__:
        case "WeightConverter":
            words = "+".join(type(op).__name__ for op in transform.operations)
            return ["convert", pattern, *targets, words, *filter(None, [_details(transform.operations)])]
        case "GroupWeightRename":
            return ["group", pattern, *targets]
        case "Inkling2IndexOffsetWeightRename":
            return ["shift", pattern, *targets, transform.offset]
        case "WeightRenaming" | "PrefixChange":
            return ["rename", pattern, targets[0]]
        case other:
            raise NotImplementedError(f"converter/families/memory_names.py does not know {other}")


def _details(operations: list[Any]) -> dict[str, Any]:
    """How a load takes a tensor apart or puts it together, where that is more than a cut along its rows."""
    found: dict[str, Any] = {}
    for op in operations:
        match type(op).__name__:
            case "PermuteForRope":
                found["permute"] = [op.subconfig_key or "", *(op.permute_layer_names or ())]
            case "Concatenate" | "Chunk" | "Split" if op.dim and "MergeModulelist" not in str(operations):
                found["dim"] = op.dim
            case _:
                pass
        if getattr(op, "num_shards_attribute", None):
            found["count"] = op.num_shards_attribute
    return found


def parts(model: PreTrainedModel) -> list[list[str]]:
    """Outermost sub-models: path, class, model type; the config's key where it has one; the auto class that chooses."""
    found: list[list[str]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other[0]}.") for other in found)
        if not path or inside or not isinstance(module, PreTrainedModel):
            continue
        key = _config_key(model.config, module.config)
        chosen = _auto_of(module) if key and _is_auto(model.config, key) else None
        entry = [path, type(module).__name__, module.config.model_type, key, chosen]
        found.append([each for each in entry if each is not None])
    return found


def _config_key(config: Any, wanted: Any) -> str | None:
    return next((key for key in config.sub_configs if getattr(config, key, None) is wanted), None)


def _is_auto(config: Any, key: str) -> bool:
    return config.sub_configs[key] is AutoConfig


def _auto_of(module: PreTrainedModel) -> str | None:
    kind, name = module.config.model_type, type(module).__name__
    return next((task for task, table in AUTO.items() if name in _chosen(table, kind)), None)


def _chosen(table: str, kind: str) -> tuple[str, ...]:
    value = getattr(auto, table).get(kind, ())
    return (value,) if isinstance(value, str) else tuple(value)


def _relevant(trees: dict[str, list[list[str]]], table: Iterable[str]) -> dict[str, Any]:
    """Only the parts that some rule can concern: with rules of their own, inside them, or chosen by the config."""
    known = set(table)
    while True:
        kept = {name: [p for p in tree if len(p) == 5 or {p[1], p[2]} & known] for name, tree in trees.items()}
        more = {name for name, tree in kept.items() if tree} - known
        if not more:
            return {name: tree for name, tree in sorted(kept.items()) if tree}
        known |= more


def _trees(classes: dict[str, type[PreTrainedModel]]) -> tuple[dict[str, list[list[str]]], dict[str, list[list[str]]]]:
    """The parts of each class as built on its own, and of those that were met inside another."""
    trees: dict[str, list[list[str]]] = {}
    inner: dict[str, list[list[str]]] = {}
    for name, cls in classes.items():
        model = build(cls)
        if model is None:
            print(f"not built: {name}", file=sys.stderr)
            continue
        trees[name] = parts(model)
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and type(module).__name__ not in inner:
                inner[type(module).__name__] = parts(module)
    return trees, inner


def _generic(name: str) -> str:
    return re.sub(r"\d+", "N", name)


def heads(classes: dict[str, type[PreTrainedModel]]) -> dict[str, dict[str, Any]]:
    """For each classification class: tensors outside its backbone, and how the inside differs from other classes'."""
    found: dict[str, dict[str, Any]] = {}
    pairs = {
        (kind, name)
        for table in _CLASSIFIERS
        for kind in getattr(auto, f"{table}_MAPPING_NAMES")
        for name in _chosen(f"{table}_MAPPING_NAMES", kind)
    }
    for kind, name in sorted(pairs):
        cls = classes.get(name)
        model = build(cls, num_labels=LABELS) if cls is not None else None
        if cls is None or model is None or not hasattr(model, cls.base_model_prefix):
            print(f"head unknown: {name}", file=sys.stderr)
            continue
        inside = f"{cls.base_model_prefix}."
        state = model.state_dict()
        own = [n for n in state if not n.startswith(inside)]
        if len(own) > _MANY:
            continue
        labels = [n for n in own if n.endswith("weight") and LABELS in state[n].shape[:1]]
        entry: dict[str, Any] = {"own": own, "labels": labels[-1] if labels else None}
        adds, lacks = _compared({_generic(n) for n in state if n.startswith(inside)}, cls, kind, classes)
        entry |= {"adds": sorted(adds)} if adds else {}
        found[name] = entry | ({"lacks": sorted(lacks)} if lacks else {})
    return found


def _compared(
    backbone: set[str], cls: type[PreTrainedModel], kind: str, classes: dict[str, type[PreTrainedModel]]
) -> tuple[set[str], set[str]]:
    """What a classifier's backbone has and the same one in some other class has not (it starts at random), and back."""
    inside = f"{cls.base_model_prefix}."
    adds: set[str] = set()
    lacks: set[str] = set()
    for table in _SIBLINGS:
        for name in _chosen(f"{table}_MAPPING_NAMES", kind):
            other = classes.get(name)
            model = build(other) if other is not None else None
            if other is None or model is None or other.base_model_prefix != cls.base_model_prefix:
                continue
            whole = not hasattr(model, cls.base_model_prefix)
            names = {_generic(inside + n if whole else n) for n in model.state_dict() if whole or n.startswith(inside)}
            if len(backbone ^ names) <= _FEW:  # more: a decoder alone, or another kind of model
                adds |= backbone - names
                lacks |= names - backbone
    return adds, lacks


def bare(classes: dict[str, type[PreTrainedModel]]) -> dict[str, Any]:
    """Parameters that modules of experts have without a module of their own.

    Returns:
        `order`: their names, in an order that is that of every class; `transposed`: model types whose class says that
        it keeps a matrix `[in, out]`; `counts`: keys of configs that are the number of experts, each with the model
        types where it is another number.
    """
    after: dict[str, set[str]] = {}
    transposed: set[str] = set()
    counts: dict[str, dict[str, bool]] = {}
    for cls in classes.values():
        model = build(cls) if _has_experts(cls) else None
        for path, module in [] if model is None else model.named_modules():
            own = [(n, p) for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
            if "experts" not in path.split(".") or not own or {n for n, _ in own} <= {"weight", "bias"}:
                continue
            for at, (name, _) in enumerate(own):
                after.setdefault(name, set()).update(n for n, _ in own[at + 1 :])
            if getattr(module, "is_transposed", False):
                transposed.add(cls.config_class.model_type)
            stack = next((p for _, p in own if p.dim() == 3), None)
            for kind, key, value in _counted(model.config) if stack is not None else ():
                equal = counts.setdefault(key, {})
                equal[kind] = equal.get(kind, True) and value == stack.shape[0]
    return {
        "order": _sorted_by(after),
        "transposed": sorted(transposed),
        "counts": {
            key: sorted(kind for kind, is_equal in equal.items() if not is_equal)
            for key, equal in sorted(counts.items())
            if 2 * sum(equal.values()) > len(equal)
        },
    }


def _has_experts(cls: type[PreTrainedModel]) -> bool:
    return "experts" in inspect.getsource(sys.modules[cls.__module__])


def _counted(config: Any) -> Iterator[tuple[str, str, int]]:
    """Whole numbers of a config, and of those inside it, that are of experts by their names, with the model type."""
    for key, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and key.endswith("experts"):
            yield config.model_type, key, value
    for key in config.sub_configs:
        if getattr(config, key, None) is not None:
            yield from _counted(getattr(config, key))


def _sorted_by(after: dict[str, set[str]]) -> list[str]:
    """Names so that each stands before those that come after it somewhere."""
    rest, found = dict(after), []
    while rest:
        first = next(n for n in sorted(rest) if not any(n in others for others in rest.values()))
        found.append(first)
        del rest[first]
    return found


def main() -> None:
    classes = model_classes()
    types = {name: cls.config_class.model_type for name, cls in classes.items() if cls.config_class is not None}
    table = rules()
    trees, inner = _trees({name: cls for name, cls in classes.items() if name in types})
    families: dict[str, dict[str, list[str]]] = {}
    for name, kind in types.items():
        families.setdefault(kind, {}).setdefault(classes[name].base_model_prefix, []).append(name)
    data = {
        "about": "Names of tensors in memory, from transformers; written by tools/make_memory_names.py",
        "transformers": transformers.__version__,
        "source": f"https://github.com/huggingface/transformers/blob/v{transformers.__version__}/{TABLE}",
        "rules": table,
        "families": families,
        "parts": _relevant(inner | trees, table),
        "auto": {task: {kind: _chosen(name, kind)[0] for kind in getattr(auto, name)} for task, name in AUTO.items()},
        "heads": heads(classes),
        "bare": bare(classes),
    }
    OUT.write_text(_lines(data), encoding="utf-8")


def _lines(data: dict[str, Any]) -> str:
    """JSON with one line for each entry of the tables, so that a change of version can be read as a difference."""
    chunks = []
    for key, value in data.items():
        if isinstance(value, dict):
            rows = [f"  {json.dumps(k)}: {json.dumps(value[k], separators=(',', ':'))}" for k in sorted(value)]
            chunks.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            chunks.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(chunks) + "\n}\n"


if __name__ == "__main__":
    main()
