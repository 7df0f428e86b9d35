"""Adapters of every PEFT method, over bases of several kinds: PEFT builds and saves them, each tensor drawn."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from oracle.adapters import with_card
from oracle.bases import DTYPES, Base, _randomise, kept, make_base, make_vision_base, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers

SMALL = {"intermediate": 80, "hidden": 48}
"""Widths that blocks of 4, 8 and 16 divide, as several methods ask."""


def make_method_base(path: Path, family: str, dtype: str) -> Base:
    """A tiny model: a causal one, `bert` (an encoder), `resnet` (convolutions)."""
    if family == "resnet":
        return make_vision_base(path, "resnet", dtype=dtype)
    if family == "bert":

        def make(home: Path) -> None:
            config = transformers.BertConfig(
                vocab_size=163, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80,
                max_position_embeddings=64, num_labels=2,
            )  # fmt: skip
            model = transformers.BertForSequenceClassification(config)
            _randomise(model, 0)
            model.to(DTYPES[dtype]).save_pretrained(home)

        with quiet():
            kept(path, ("bert", dtype), make)
        return EncoderBase(path, "bert", True, auto="AutoModelForSequenceClassification")
    return make_base(path, family, dtype=dtype, **SMALL)


def make_video_base(path: Path) -> Base:
    """A classifier of videos: its patches are a convolution of three dimensions, its biases have names of their own."""
    with quiet():
        config = transformers.VideoMAEConfig(
            image_size=32, patch_size=16, num_frames=4, tubelet_size=2, hidden_size=48, num_hidden_layers=1,
            num_attention_heads=4, intermediate_size=80,
        )  # fmt: skip
        model = transformers.VideoMAEForVideoClassification(config)
        _randomise(model, 0)
        model.save_pretrained(path)
    return Base(path, "videomae", False, auto="AutoModelForVideoClassification")


@dataclasses.dataclass(frozen=True)
class EncoderBase(Base):
    """A base of BERT's kind."""

    @property
    def targets(self) -> list[str]:
        return ["query", "value", "intermediate.dense"]


def make_method_adapter(path: Path, base: Base, kind: str, *, seed: int = 1, **settings: Any) -> Path:
    """Builds an adapter of a PEFT config class over a base, draws every tensor of it, and saves it with PEFT."""
    with quiet():
        torch.manual_seed(seed)
        made = {k: getattr(peft, v[0])(**v[1]) if isinstance(v, tuple) else v for k, v in settings.items()}
        config = getattr(peft, kind)(target_modules=made.pop("target_modules", None) or base.targets, **made)
        wrapped = peft.get_peft_model(base.load(), config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in wrapped.named_parameters():
                if value.requires_grad and value.is_floating_point():
                    _draw(name, value, generator)
        wrapped.save_pretrained(with_card(path))
    return path


def _draw(name: str, value: Any, generator: Any) -> None:
    draw = torch.randn(value.shape, generator=generator)
    if "ranknum" in name:
        return
    if any(word in name for word in ("ia3_l", "boft_s", "road_alpha", "ln_tuning", "vector_a", "vector_b")):
        value.mul_((1 + 0.1 * draw).to(value.dtype))
    elif any(word in name for word in ("_logits", "osf_svd_params", "delora_lambda", "hra_u")):
        value.add_((0.02 * draw).to(value.dtype))
    elif any(word in name for word in ("spectrum", "c3a_kernel", "lora_E", "theta_d")):
        value.copy_(draw.to(value.dtype))
    else:
        value.copy_((0.1 * draw).to(value.dtype))
