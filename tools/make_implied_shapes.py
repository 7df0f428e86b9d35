"""Writes `converter/families/implied_shapes.json`: names and shapes of what transformers saves,
as expressions of config fields.

Run by hand for a release, in an environment with the pinned transformers (about ten minutes on one core):

    python tools/make_implied_shapes.py

Each class is built small in three sizes of distinct numbers and saved; an expression is kept if it gives the dimension
in all three. Then every field of the config is changed in turn: where the expressions no longer hold, the class is only
known with the field at its default (`assumes`). A class with a dimension that no expression gives is left out.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers.models.auto import modeling_auto as auto  # noqa: E402

from converter.families import implied, on_meta  # noqa: E402

OUT = Path(implied.__file__).with_name("implied_shapes.json")
FAMILIES = """
    llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox gptj bloom falcon olmo olmo2 olmo3
    starcoder2 cohere cohere2 stablelm smollm3 granite glm glm4 nemotron exaone4 ernie4_5 mixtral qwen2_moe qwen3_moe
    olmoe phimoe helium seed_oss hunyuan_v1_dense apertus arcee codegen gpt_bigcode gpt_oss dots1 minimax_m2
"""
MAPPINGS = ("MODEL_FOR_CAUSAL_LM", "MODEL_FOR_SEQUENCE_CLASSIFICATION", "MODEL_FOR_TOKEN_CLASSIFICATION", "MODEL")


def _sizes(heads: int, kv: int, dim: int, inter: int, vocab: int, layers: int, positions: int) -> dict[str, Any]:
    hidden = heads * dim
    return {
        **dict.fromkeys(("hidden_size", "n_embd"), hidden),
        **dict.fromkeys(("num_attention_heads", "n_head"), heads),
        "num_key_value_heads": kv,
        **dict.fromkeys(("intermediate_size", "ffn_dim"), inter),
        "ffn_hidden_size": inter + 1,
        "moe_intermediate_size": inter + 14,
        "shared_expert_intermediate_size": inter + 26,
        "vocab_size": vocab,
        **dict.fromkeys(("num_hidden_layers", "n_layer"), layers),
        **dict.fromkeys(("max_position_embeddings", "n_positions"), positions),
        "num_experts": layers + 3,
        "num_local_experts": layers + 3,
        "n_routed_experts": layers + 3,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 0,
        "rotary_dim": 4,
        "is_decoder": True,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_labels": layers + 9,
    }


SIZES = (
    _sizes(4, 2, 12, 106, 163, 2, 37),
    _sizes(6, 3, 16, 134, 211, 3, 41),
    _sizes(10, 5, 20, 166, 307, 4, 53),
)


_UNDECLARED_HEAD_DIM = frozenset({"qwen3_moe"})
"""Types whose configs do not declare `head_dim`, and whose published models have one of their own."""


def _config(kind: str, settings: dict[str, Any], **more: Any) -> Any:
    cls = transformers.CONFIG_MAPPING[kind]
    known = cls().to_dict()
    names = {**{v: k for k, v in (cls.attribute_map or {}).items()}}
    kept = {k: v for k, v in settings.items() if k in known or k == "num_labels" or k in names}
    has_heads = "hidden_size" in settings and "num_attention_heads" in settings
    if has_heads and ("head_dim" in known or kind in _UNDECLARED_HEAD_DIM):
        kept["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"] + 2
    return cls(**{**kept, **more})


def _saved(cls: Any, config: Any) -> dict[str, tuple[int, ...]]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls._from_config(config, dtype=torch.float32).save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118


def _template(name: str) -> tuple[str, tuple[int, ...]]:
    numbers = tuple(int(n) for n in re.findall(r"(?<=\.)(\d+)(?=\.)", name))
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name), numbers


_CANDIDATES = (
    "hidden_size n_embd intermediate_size ffn_dim moe_intermediate_size shared_expert_intermediate_size vocab_size "
    "num_hidden_layers n_layer num_attention_heads n_head num_key_value_heads head_dim num_labels n_positions "
    "max_position_embeddings num_experts num_local_experts n_routed_experts word_embed_proj_dim rotary_dim "
    "ffn_hidden_size"
)


def _expressions(known: list[dict[str, int]]) -> dict[tuple[int, ...], str]:
    """Every expression by its values in the sizes; the simplest of equals first."""
    names = [n for n in _CANDIDATES.split() if all(n in k for k in known)]
    heads = "num_attention_heads" if "num_attention_heads" in names else "n_head"
    texts = [*names]
    texts += [f"{heads}*head_dim", "num_key_value_heads*head_dim"]
    texts += [f"{heads}*head_dim+2*num_key_value_heads*head_dim"]
    texts += [f"{n}*{m}" for n in (2, 3, 4, 6) for m in names]
    texts += [f"{m}+2" for m in names]
    texts += [f"{a}*{b}" for a, b in itertools.combinations(names, 2)]
    texts += ["hidden_size+2*head_dim", "n_embd+2*head_dim", "2*hidden_size+head_dim"]
    texts += ["1", "2", "3", "4"]
    found: dict[tuple[int, ...], str] = {}
    for text in texts:
        try:
            found.setdefault(tuple(implied.evaluate(text, k) for k in known), text)
        except KeyError:
            continue
    return found


def _entry(kind: str, cls: Any) -> dict[str, Any] | None:
    configs = [_config(kind, s) for s in SIZES]
    known = [implied.fields(c.to_dict()) for c in configs]
    expressions = _expressions(known)
    grouped: list[dict[str, tuple[list[tuple[int, ...]], set[tuple[int, ...]]]]] = []
    for config in configs:
        groups: dict[str, tuple[list[tuple[int, ...]], set[tuple[int, ...]]]] = {}
        for name, shape in _saved(cls, _untied(config)).items():
            template, numbers = _template(name)
            groups.setdefault(template, ([], set()))
            groups[template][0].append(numbers)
            groups[template][1].add(shape)
        grouped.append(groups)
    if any(g.keys() != grouped[0].keys() for g in grouped[1:]):
        return _fail(cls, "other names in other sizes")
    rows = []
    for name in grouped[0]:
        if any(len(g[name][1]) != 1 for g in grouped):
            return _fail(cls, f"{name} has several shapes")
        tops = [tuple(max(n) + 1 for n in zip(*g[name][0], strict=True)) for g in grouped]
        for g, top in zip(grouped, tops, strict=True):
            if sorted(g[name][0]) != sorted(itertools.product(*(range(t) for t in top))):
                return _fail(cls, f"{name} is not in every layer")
        counts = [expressions.get(tuple(n)) for n in zip(*tops, strict=True)]
        dims = [expressions.get(tuple(d)) for d in zip(*(next(iter(g[name][1])) for g in grouped), strict=True)]
        if None in counts or None in dims:
            return _fail(cls, f"{name}: no expression for {[next(iter(g[name][1])) for g in grouped]}, {tops}")
        rows.append([name, counts, dims])
    tied_config = _config(kind, SIZES[0], tie_word_embeddings=True)
    tied = sorted(set(_saved(cls, _untied(configs[0]))) - set(_saved(cls, tied_config)))
    used = {f for _, counts, dims in rows for e in (*counts, *dims) for f in re.findall(r"[a-z_]+", e)}
    default = transformers.CONFIG_MAPPING[kind]().to_dict()
    return {
        "ties": bool(default.get("tie_word_embeddings", True)),
        "tied": tied,
        "defaults": {f: default[f] for f in sorted(used) if _is_default(kind, f, default.get(f))},
        "assumes": {},
        "aliases": {k: v for k, v in (configs[0].attribute_map or {}).items() if v in used},
        "passes": _passes(cls, configs[0]),
        "tensors": rows,
    }


def _passes(cls: Any, config: Any) -> list[str]:
    """Patterns of names that a load passes over, where they are too many: as the program of `on_meta` has them."""
    with torch.device("meta"):
        return on_meta._passes_unexpected(cls(config))


def _is_default(kind: str, field: str, value: Any) -> bool:
    """True where a config without the field has this value, whatever its size; else it is inferred from the others."""
    if not isinstance(value, int):
        return False
    cls = transformers.CONFIG_MAPPING[kind]
    try:
        without = [_config(kind, {k: v for k, v in s.items() if k != field}) for s in SIZES]
        if field == "head_dim":
            without = [cls(hidden_size=s["hidden_size"], num_attention_heads=s["num_attention_heads"]) for s in SIZES]
    except Exception:
        return False  # no default goes with these sizes
    return all(c.to_dict().get(field) == value for c in without)


def _untied(config: Any) -> Any:
    config.tie_word_embeddings = False
    return config


def _fail(cls: Any, why: str) -> None:
    print(f"  {cls.__name__}: {why}", file=sys.stderr)


def _holds(entry: dict[str, Any], cls: Any, config: Any) -> bool:
    value = {**config.to_dict(), "architectures": [cls.__name__]}
    found = implied.of_entry({**entry, "assumes": {}}, value)
    return found is not None and dict(found.shapes) == _saved(cls, config)


_SKIP = ("tie_word_embeddings", "architectures", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id",
         "model_type", "num_labels", "return_dict", "output_hidden_states", "is_encoder_decoder", "problem_type",
         "_name_or_path", "chunk_size_feed_forward", "output_attentions", "use_cache", "rope_theta", "rms_norm_eps",
         "initializer_range")  # fmt: skip


def _assumed(entry: dict[str, Any], kind: str, cls: Any) -> dict[str, Any] | None:
    """Fields with which the expressions do not hold at other values than their defaults."""
    base = _config(kind, SIZES[0])
    if not _holds(entry, cls, _untied(base)):
        return None
    default = transformers.CONFIG_MAPPING[kind]().to_dict()
    found: dict[str, Any] = {}
    for name, value in base.to_dict().items():
        if name in _SKIP or name.endswith(("token_id", "dropout", "eps", "_range", "pdrop")):
            continue
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value]
        elif value is None:
            others = [24, True]
        elif value == []:
            others = [[0]]
        elif isinstance(value, int):
            others = [value * 2] if value and name in entry["defaults"] else [value * 2, 1] if value else [1]
        for other in others:
            try:
                changed = _untied(_config(kind, SIZES[0], **{name: other}))
                saved = _saved(cls, changed)
            except Exception:
                continue  # a setting that no model can have
            if name in changed.to_dict() and not _agrees(entry, cls, changed, saved):
                if value != default.get(name):
                    return None  # a config that is silent has other tensors
                found[name] = value
                break
    return found


def _agrees(entry: dict[str, Any], cls: Any, config: Any, saved: dict[str, tuple[int, ...]]) -> bool:
    got = implied.of_entry({**entry, "assumes": {}}, {**config.to_dict(), "architectures": [cls.__name__]})
    return got is not None and dict(got.shapes) == saved


def written(value: dict[str, Any]) -> str:
    """The table as it is read: a class a line, so that the others need not be parsed."""
    head = json.dumps({k: v for k, v in value.items() if k != "classes"}).removesuffix("}")
    rows = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in value["classes"].items()]
    return head + ', "classes": {\n' + ",\n".join(rows) + "\n}}\n"


def main() -> None:
    """Write the table."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    classes: dict[str, Any] = {}
    wanted = sys.argv[1:] or FAMILIES.split()
    for kind in wanted:
        assumes: dict[str, Any] | None = None
        for mapping in MAPPINGS:
            name = getattr(auto, f"{mapping}_MAPPING_NAMES").get(kind)
            cls = getattr(transformers, name, None) if isinstance(name, str) else None
            if cls is None:
                continue
            try:
                entry = _entry(kind, cls)
                if entry is None:
                    continue
                if assumes is None:
                    assumes = _assumed(entry, kind, cls)
                if assumes is None or not _holds(entry, cls, _untied(_config(kind, SIZES[1]))):
                    _fail(cls, "does not hold")
                    continue
            except Exception as error:
                _fail(cls, f"{type(error).__name__}: {error}"[:200])
                continue
            classes[name] = {**entry, "assumes": assumes}
        print(kind, [n for n in classes if n.lower().startswith(kind.replace("_", "")[:4])], assumes, file=sys.stderr)
    about = "Names and shapes by config fields, from transformers; written by tools/make_implied_shapes.py"
    value = {"about": about, "transformers": transformers.__version__, "classes": classes}
    OUT.write_text(written(value))


if __name__ == "__main__":
    main()
