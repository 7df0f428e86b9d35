"""Tiny real models, written by transformers' own `save_pretrained`: two layers, odd heights, seeded values."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

VOCAB = 163  # odd on purpose: no height below is a multiple of 64
SHARDS = {"float32": "60KB", "bfloat16": "30KB", "float16": "30KB"}  # splits every model below into three or more files


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers and PEFT warn about things that these tests do on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


MADE_ONCE = "RLHF_CONVERT_TESTS_MADE_ONCE"
"""The environment variable with the folder that the workers of a run share; without it each process has its own."""


@functools.cache
def _home() -> Path:
    """Where what is made once lies, until the run ends."""
    if shared := os.environ.get(MADE_ONCE):
        Path(shared).mkdir(exist_ok=True)
        return Path(shared)
    folder = Path(tempfile.mkdtemp(prefix="bases-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def kept(path: Path, key: object, make: Callable[[Path], None]) -> None:
    """What `make` writes, in `path`: made once in a run for each key, and copied after that."""
    home = _home() / hashlib.sha256(repr(key).encode()).hexdigest()
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=_home()) as scratch:
            make(Path(scratch) / "made")
            with contextlib.suppress(OSError):  # another worker was first
                (Path(scratch) / "made").rename(home)
    shutil.copytree(home, path, dirs_exist_ok=True)


def digest(folder: Path) -> str:
    """Of names and contents of the files of a folder."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
            found.update(file.read_bytes())
    return found.hexdigest()


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make one model, and the names of its adapter targets and of its embedding."""

    causal: Callable[[bool, int, int, int], Any]
    attention: tuple[str, ...]
    mlp: tuple[str, ...]
    embedding: str

    @property
    def targets(self) -> list[str]:
        return [*self.attention, *self.mlp]


def _llama_like(config: str, **more: Any) -> Callable[[bool, int, int, int], Any]:
    def build(tied: bool, vocab: int, intermediate: int, hidden: int) -> Any:
        return getattr(transformers, config)(
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=intermediate,
            vocab_size=vocab,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
            **more,
        )

    return build


def _gpt2(tied: bool, vocab: int, intermediate: int, hidden: int) -> Any:
    return transformers.GPT2Config(
        n_embd=hidden,
        n_layer=2,
        n_head=4,
        n_inner=intermediate,
        n_positions=64,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )


def _opt(tied: bool, vocab: int, intermediate: int, hidden: int) -> Any:
    return transformers.OPTConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=intermediate,
        word_embed_proj_dim=hidden,
        max_position_embeddings=64,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _neox(tied: bool, vocab: int, intermediate: int, hidden: int) -> Any:
    return transformers.GPTNeoXConfig(
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=intermediate,
        max_position_embeddings=64,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )


_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"), "embed_tokens"
FAMILIES = {
    "llama": Family(_llama_like("LlamaConfig"), *_LLAMA),
    "qwen2": Family(_llama_like("Qwen2Config"), *_LLAMA),
    "gemma2": Family(_llama_like("Gemma2Config", head_dim=14, pad_token_id=0), *_LLAMA),
    "mistral": Family(_llama_like("MistralConfig"), *_LLAMA),
    "gpt2": Family(_gpt2, ("c_attn", "attn.c_proj"), ("c_fc", "mlp.c_proj"), "wte"),
    "opt": Family(_opt, ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2"), "embed_tokens"),
    "gpt_neox": Family(_neox, ("query_key_value", "dense"), ("dense_h_to_4h", "dense_4h_to_h"), "embed_in"),
}
_VISION_TARGETS = {"resnet": ["convolution"], "convnext": ["patch_embeddings", "pwconv1", "pwconv2"]}


@dataclasses.dataclass(frozen=True)
class Base:
    """A base model on disk."""

    path: Path
    family: str
    tied: bool
    auto: str = "AutoModelForCausalLM"

    @property
    def targets(self) -> list[str]:
        return FAMILIES[self.family].targets if self.family in FAMILIES else _VISION_TARGETS[self.family]

    def load(self, *, task: str = "CAUSAL_LM", dtype: Any = "auto", **config: Any) -> Any:
        """The model as transformers reads it from disk, in its own dtype; a SEQ_CLS one has a random head."""
        auto = "AutoModelForSequenceClassification" if task == "SEQ_CLS" else self.auto
        with quiet():
            return getattr(transformers, auto).from_pretrained(self.path, dtype=dtype, **config).eval()


def _randomise(model: Any, seed: int) -> None:
    """Every parameter gets values that no initialiser gives: no zero bias and no unit norm can hide a mix-up."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(1 + noise.abs() * 0.1)
            elif "running_mean" in name:
                value.copy_(noise * 0.1)
            elif value.dim() < 2 and not name.endswith("bias"):
                value.copy_(1 + noise * 0.1)
            else:
                value.copy_(noise * 0.08)


def make_base(
    path: Path,
    family: str = "llama",
    *,
    dtype: str = "float32",
    tied: bool = False,
    sharded: bool = False,
    vocab: int = VOCAB,
    intermediate: int = 83,
    hidden: int = 48,
    seed: int = 0,
    **config: Any,
) -> Base:
    """Writes a causal language model of a family to `path`."""

    def make(home: Path) -> None:
        settings = FAMILIES[family].causal(tied, vocab, intermediate, hidden)
        for key, value in config.items():
            setattr(settings, key, value)
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        _randomise(model, seed)
        model = model.to(DTYPES[dtype])
        model.config.dtype = DTYPES[dtype]
        model.save_pretrained(home, **({"max_shard_size": SHARDS[dtype]} if sharded else {}))

    with quiet():
        kept(path, (family, dtype, tied, sharded, vocab, intermediate, hidden, seed, sorted(config.items())), make)
    if sharded and len(list(path.glob("*.safetensors"))) < 3:
        raise AssertionError(f"{path} was meant to be sharded")
    return Base(path, family, tied)


def make_vision_base(path: Path, kind: str = "resnet", *, dtype: str = "float32", seed: int = 0) -> Base:
    """Writes a small image classifier with Conv2d layers: 1x1, 3x3 and 7x7 (resnet), or depthwise ones (convnext)."""

    def make(home: Path) -> None:
        if kind == "resnet":
            settings = transformers.ResNetConfig(
                embedding_size=10, hidden_sizes=[12, 20], depths=[1, 1], layer_type="bottleneck", num_labels=3
            )
        else:
            settings = transformers.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, num_labels=3)
        model = transformers.AutoModelForImageClassification.from_config(settings, dtype=torch.float32)
        _randomise(model, seed)
        model.to(DTYPES[dtype]).save_pretrained(home)

    with quiet():
        kept(path, (kind, dtype, seed), make)
    return Base(path, kind, False, auto="AutoModelForImageClassification")


def read_tensors(path: Path) -> dict[str, Any]:
    """All tensors of a folder of safetensors files, read with the safetensors package."""
    tensors: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        part = load_file(file)
        if twice := set(part) & set(tensors):
            raise AssertionError(f"{path} holds {sorted(twice)} twice")
        tensors.update(part)
    return tensors


def write_tensors(path: Path, tensors: dict[str, Any], name: str = "model.safetensors") -> None:
    """Replaces the weights of a folder by one file."""
    for file in [*path.glob("*.safetensors"), *path.glob("*.index.json")]:
        file.unlink()
    save_file({k: v.contiguous() for k, v in tensors.items()}, path / name, {"format": "pt"})


def read_config(path: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((path / name).read_text())  # type: ignore[no-any-return]


def edit_config(path: Path, name: str = "config.json", **changes: Any) -> None:
    """Changes fields of a JSON file; a value of `...` removes the field."""
    config = read_config(path, name)
    for key, value in changes.items():
        if value is ...:
            config.pop(key, None)
        else:
            config[key] = value
    (path / name).write_text(json.dumps(config, indent=2))


def without_prefix(base: Base, path: Path, prefix: str = "transformer.") -> Base:
    """The same model the way the original gpt2 lies on the Hub: no backbone prefix, and mask buffers."""
    shutil.copytree(base.path, path)
    tensors = {name.removeprefix(prefix): value for name, value in read_tensors(path).items()}
    for layer in range(2):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64)
    write_tensors(path, tensors)
    return dataclasses.replace(base, path=path)


def untied_copy(base: Base, path: Path) -> Base:
    """A tied model with its embedding stored a second time as the head, and the tie taken out of the config."""
    shutil.copytree(base.path, path)
    tensors = read_tensors(path)
    family = FAMILIES[base.family]
    embedding = next(name for name in tensors if name.endswith(f"{family.embedding}.weight"))
    head = "embed_out.weight" if base.family == "gpt_neox" else "lm_head.weight"
    tensors[head] = tensors[embedding].clone()
    write_tensors(path, tensors)
    edit_config(path, tie_word_embeddings=False)
    return dataclasses.replace(base, path=path, tied=False)


def save_tokenizer(path: Path, *, pad: str | None = "<pad>") -> None:
    """A real fast tokenizer of a few words, saved by transformers beside whatever is there; `<pad>` is token 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(150))]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with quiet():
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token=pad
        ).save_pretrained(path)
