"""The model folders of the default run: by task, the types that RLHF is done with, and each way of saving them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from healthy.shrink import build
from oracle.bases import kept, quiet, save_tokenizer
from selected import each_facet

TYPES: dict[str, str] = {
    "causal": """
        llama qwen2 qwen3 qwen3_moe mistral mixtral gemma gemma2 gemma3_text phi phi3 gpt2 gpt_neox opt bloom falcon
        stablelm olmo2 cohere granite glm4 deepseek_v3 deepseek_v4 starcoder2 gpt_oss rwkv recurrent_gemma mllama moshi
        prophetnet
    """,
    "seqcls": """
        llama qwen2 qwen3 mistral gemma2 phi3 gpt2 gpt_neox opt bloom gpt_oss bert roberta deberta-v2 t5 xlnet funnel
        ibert bigbird_pegasus
    """,
    "tokcls": "llama qwen2 mistral gpt2 gpt_neox bert layoutlmv3 openai_privacy_filter",
    "multimodal": "llava qwen2_vl qwen2_5_vl gemma3 mllama pix2struct",
    "seq2seq": "t5 bart led",
    "images": "vit",
    "bare": "bert whisper gemma4_audio sam",
}
"""The rest is in the slow sweep over every architecture."""


def _plain(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _half(model: Any, folder: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)


def _sharded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="30KB")


def _served(model: Any, folder: Path) -> None:
    """With everything that lies beside a model on the Hub."""
    model.save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")


@dataclass(frozen=True)
class Saved:
    """One folder: what is built, and how it is saved."""

    task: str
    kind: str
    how: Callable[[Any, Path], None] = _plain
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [self.task, self.kind, self.how.__name__.strip("_"), *(f"{k}={v}" for k, v in self.more)]
        return "-".join(words)

    def write(self, folder: Path) -> Path:
        """The folder with what the model saved, which is built once in a run."""
        with quiet():
            kept(folder, (str(self), self.how.__module__), self._save)
        torch.manual_seed(0)  # what a test draws next does not depend on which one was the first
        return folder

    def _save(self, folder: Path) -> None:
        self.how(build(self.task, self.kind, **dict(self.more)), folder)


_VARIED = ("llama", "qwen2", "gpt2", "opt")

MODELS = [
    *(Saved(task, kind) for task, kinds in TYPES.items() for kind in kinds.split()),
    *(Saved("causal", kind, how) for kind in _VARIED for how in (_half, _sharded, _served)),
    *(Saved("causal", kind, _plain, (("tie_word_embeddings", tied),)) for kind in _VARIED for tied in (True, False)),
    *(Saved("seqcls", kind, how) for kind in ("llama",) for how in (_half, _sharded, _served)),
    *(Saved("seqcls", kind, _plain, (("num_labels", 2),)) for kind in ("llama", "bert")),
    *(Saved("tokcls", kind, _plain, (("pad_token_id", None),)) for kind in ("llama", "qwen2", "gpt2")),
    Saved("seqcls", "bert", _plain, (("pad_token_id", None),)),
    *(Saved("multimodal", kind, how) for kind in ("llava",) for how in (_half, _sharded, _served)),
]

USUAL = each_facet(MODELS, lambda s: s.kind, lambda s: s.task, lambda s: s.how, lambda s: (s.task, s.more))
"""For `parametrize`: by default each architecture, each task, and each way of saving them."""
