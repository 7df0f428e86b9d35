"""Real adapters: PEFT builds and saves them, only their values are drawn from a seeded generator."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oracle.bases import Base, digest, kept, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def lora(base: Base, **settings: Any) -> dict[str, Any]:
    """Arguments of `LoraConfig`; alpha/r is not a power of two: then the order of scaling and adding shows."""
    return {"r": 3, "lora_alpha": 5, "target_modules": base.targets, "lora_dropout": 0.1} | settings


def with_card(folder: Path) -> Path:
    """The folder with a model card in it: PEFT then adds to that one, and builds no template, a third of its save."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# An adapter\n")
    return folder


def make_adapter(
    path: Path,
    base: Base,
    *,
    task: str = "CAUSAL_LM",
    labels: int = 1,
    seed: int = 1,
    noise: float | None = None,
    dtype: Any = None,
    prepare: Callable[[Any], Any] | None = None,
    **settings: Any,
) -> Path:
    """Builds an adapter over a base with PEFT, draws its trained tensors, saves it with PEFT's own `save_pretrained`.

    `noise` adds to what PEFT's initialiser made (for initialisers that move the base) instead of replacing it.
    `prepare` changes the base model in memory before PEFT sees it, for instance its vocabulary. `dtype` is that of the
    saved file.
    """

    def make(home: Path) -> None:
        config = {"num_labels": labels, "pad_token_id": 0} if task == "SEQ_CLS" else {}
        torch.manual_seed(seed)
        model = base.load(task=task, **config)
        if prepare is not None:
            model = prepare(model) or model
        config = peft.LoraConfig(
            task_type=task if base.auto == "AutoModelForCausalLM" else None, **lora(base, **settings)
        )
        wrapped = peft.get_peft_model(model, config)
        _draw(wrapped, torch.Generator().manual_seed(seed), noise)
        if dtype is not None:
            wrapped = wrapped.to(dtype)
        wrapped.save_pretrained(with_card(home))

    with quiet():
        if prepare is None and not path.exists():
            _made_once(path, base, (task, labels, seed, noise, dtype, sorted(settings.items())), make)
        else:
            make(path)
    return path


def _made_once(path: Path, base: Base, key: object, make: Callable[[Path], None]) -> None:
    """Keeps an adapter for its settings and what is in its base, wherever that lies: where PEFT says so, it is told."""
    here = json.dumps(str(base.path)).strip('"')

    def change(folder: Path, old: str, new: str) -> None:
        for file in (folder / CONFIG, folder / "README.md"):
            file.write_text(file.read_text().replace(old, new))

    def make_for_all(home: Path) -> None:
        make(home)
        change(home, here, "@BASE@")

    kept(path, ("adapter", digest(base.path), base.auto, base.family, key), make_for_all)
    change(path, "@BASE@", here)


def _draw(wrapped: Any, generator: Any, noise: float | None) -> None:
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if not value.requires_grad:
                continue
            draw = torch.randn(value.shape, generator=generator)
            if noise is not None and "lora_" in name:
                value.add_((draw * noise).to(value.dtype))
            elif "magnitude" in name:
                value.mul_((1 + 0.1 * draw).to(value.dtype))
            elif "lora_" in name:
                value.copy_((draw * 0.1).to(value.dtype))
            elif "trainable_tokens" in name:
                value.copy_((draw * 0.08).to(value.dtype))
            else:  # whole modules and biases
                value.add_((draw * 0.03).to(value.dtype))


def rewrite_adapter(
    source: Path,
    path: Path,
    *,
    rename: Callable[[str], str] | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None,
) -> Path:
    """A copy of an adapter with other keys (`rename`) or tensors (`change` edits the dictionary or returns another)."""
    shutil.copytree(source, path)
    tensors = load_file(path / WEIGHTS)
    if rename is not None:
        tensors = {rename(name): value for name, value in tensors.items()}
    if change is not None:
        tensors = change(tensors) or tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / WEIGHTS, {"format": "pt"})
    return path


def adapter_tensors(path: Path) -> dict[str, Any]:
    return load_file(path / WEIGHTS)  # type: ignore[no-any-return]
