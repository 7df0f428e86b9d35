"""Sound checkpoints as transformers and PEFT write them, and small edits of their files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from converter.shipped import shipped

FIXTURES = shipped("fixtures")
HIDDEN = 16
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
PT = {"format": "pt"}
WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
FIRST, SHARD = "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"
Tensors = dict[str, torch.Tensor]

Ends = Literal["fixed", "advice", "lost", "values", "told"]
"""What follows a finding: its command fixes the folder; a step that a person takes; nothing can; nothing has to."""


@dataclass(frozen=True)
class Breakage:
    """One thing done to a sound folder.

    Attributes:
        good: the sound folder: a name of `SOUND`, or a path below `tests` of a trainer's run.
        change: what is done to a copy of it.
        ends: how the user gets out of it.
        options: what `doctor` is asked beside the folder; `{here}` is the folder that the copy lies in.
        kept: values of the good folder that the result must have; others are of the breakage.
        at: the folder below the copy that is examined.
        name: the copy's name, where that counts.
        fill: options that the step asks a person for, with what they answer.
    """

    good: str
    change: Callable[[Path], object]
    ends: Ends
    options: tuple[str, ...] = ()
    kept: Callable[[str], bool] = lambda name: True
    at: str = ""
    name: str = "my rm's"
    fill: tuple[tuple[str, str], ...] = ()


def make_sound(root: Path) -> None:
    """Every sound folder, below one."""
    torch.manual_seed(0)
    causal = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    causal.save_pretrained(root / "model", max_shard_size="10KB")
    assert (root / "model" / SHARD).exists()
    causal.save_pretrained(root / "whole")
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).save_pretrained(root / "tied")
    LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).save_pretrained(root / "reward")
    shutil.copytree(root / "reward", root / "plain-reward")
    tokenizer(root / "reward")
    tokenizer(root / "whole")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _adapter(causal, root / "adapter", root / "whole", "CAUSAL_LM")
        model = LlamaForSequenceClassification.from_pretrained(root / "whole", num_labels=1)
        _adapter(model, root / "reward-adapter", root / "whole", "SEQ_CLS")


def _adapter(model: Any, out: Path, base: Path, task: str) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(out)
    edit(out, "adapter_config.json", base_model_name_or_path=str(base))
    wrapped.unload()


def tokenizer(folder: Path, **tokens: int) -> None:
    """A tokenizer of whole words, with a pad token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, 32)}} | tokens
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def shuffle(folder: Path) -> None:
    """The same words with two of them exchanged."""
    tokenizer(folder, w3=4, w4=3)


def pickled(folder: Path, value: object, name: str = "pytorch_model.bin") -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(value, folder / name)


def edit(folder: Path, name: str = "config.json", drop: tuple[str, ...] = (), **changes: Any) -> None:
    """Change a JSON file."""
    value = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({k: v for k, v in value.items() if k not in drop}))


def store(folder: Path, change: Callable[[Tensors], Tensors], name: str = WEIGHTS) -> None:
    """Change a safetensors file."""
    save_file(change(load_file(folder / name)), folder / name, metadata=PT)


def renamed(change: Callable[[str], str]) -> Callable[[Path], object]:
    """Rename every tensor."""
    return lambda f: store(f, lambda t: {change(n): v for n, v in t.items()}, weights_of(f))


def weights_of(folder: Path) -> str:
    return WEIGHTS if (folder / WEIGHTS).exists() else "adapter_model.safetensors"


def whole(folder: Path) -> Tensors:
    """Every tensor of a model in shards."""
    return {n: t for f in sorted(folder.glob("model*.safetensors")) for n, t in load_file(f).items()}


def only(folder: Path, pattern: str, at: int = 0) -> Path:
    """A file below a folder."""
    return sorted(folder.rglob(pattern))[at]


def beside(folder: Path, name: str, to: str) -> Path:
    """Another sound folder, copied beside the broken one."""
    return Path(shutil.copytree(folder.parents[1] / "sound" / name, folder.parent / to))


def copied_over(folder: Path) -> None:
    """One layer's matrix is written over another's."""
    tensors = load_file(folder / WEIGHTS)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    save_file({**tensors, names[1]: tensors[names[0]].clone()}, folder / WEIGHTS, PT)
