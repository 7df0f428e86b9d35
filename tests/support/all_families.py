"""The families over which every list of names is tested: decoders, mixtures, an encoder, T5, a vision model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from healthy.shrink import build, settings
from oracle.bases import kept, quiet, read_tensors

DECODERS = ("llama", "qwen2", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "mpt", "gemma", "mixtral", "qwen3_moe")
FAMILIES = (
    *(("causal", kind) for kind in DECODERS),
    ("masked", "bert"),
    ("seq2seq", "t5"),
    ("multimodal", "llava"),
)
INPUT = {
    "gpt2": "transformer.wte", "gpt_neox": "gpt_neox.embed_in", "bloom": "transformer.word_embeddings",
    "falcon": "transformer.word_embeddings", "opt": "model.decoder.embed_tokens", "mpt": "transformer.wte",
    "bert": "bert.embeddings.word_embeddings", "t5": "shared", "llava": "language_model.model.embed_tokens",
}  # fmt: skip
OUTPUT = {
    "gpt_neox": "embed_out", "bert": "cls.predictions.decoder", "llava": "language_model.lm_head",
}  # fmt: skip
"""Names on disk; every other family's are `model.embed_tokens` and `lm_head`."""


def input_of(kind: str) -> str:
    return INPUT.get(kind, "model.embed_tokens") + ".weight"


def output_of(kind: str) -> str:
    return OUTPUT.get(kind, "lm_head") + ".weight"


def small(task: str, kind: str, *, tied: bool | None = None, **more: Any) -> Any:
    """A small model of a family; `tied` is said in the text model's part too."""
    if tied is not None:
        more["tie_word_embeddings"] = tied
    nested = settings(transformers.CONFIG_MAPPING[kind]).get("text_config")
    if nested is not None:
        more["text_config"] = nested | {k: v for k, v in more.items() if k in ("tie_word_embeddings", "vocab_size")}
        more.pop("vocab_size", None)
    with quiet():
        return build(task, kind, **more)


def save_twice(folder: Path, task: str, kind: str, *, equal: bool) -> dict[str, Any]:
    """A folder that stores both embeddings and ties them in its config; its tensors."""
    from safetensors.torch import save_file

    kept(folder, ("tied", task, kind), lambda home: small(task, kind, tied=True).save_pretrained(home))
    tensors = read_tensors(folder)
    embedding = tensors[input_of(kind)]
    tensors[output_of(kind)] = embedding.clone() if equal else embedding + 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def say(folder: Path, **changes: Any) -> None:
    """Change fields of config.json, in the text model's part too; `...` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        for key, value in changes.items():
            part.pop(key, None)
            if value is not ...:
                part[key] = value
    path.write_text(json.dumps(config))
