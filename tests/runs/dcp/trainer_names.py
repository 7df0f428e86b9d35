"""Saves models of transformers as torchtitan and torchtune have them, with their own code, as distributed checkpoints.

    python tests/runs/dcp/trainer_names.py OUT --titan torchtitan-0.3.0.whl --tune torchtune-0.6.1.whl

The trainers' converters are taken out of their wheels and run as they are; what these import of their trainers beside
torch (types of settings, a base class) is not installed and stands empty. The oracle is transformers' own state.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import save_file

SMALL = {
    "vocab_size": 30, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False, "use_cache": False,
}  # fmt: skip


class _Empty(types.ModuleType):
    """A module whose every name is a class that does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args: None, "Config": type("Config", (), {})})


def code(wheel: Path, member: str, package: str) -> dict[str, Any]:
    """A module of a wheel, run with empty modules for what it imports of its own package."""
    text = zipfile.ZipFile(wheel).read(member).decode()
    root = package.split(".", maxsplit=1)[0]
    found: dict[str, Any] = {"__name__": f"{package}.adapter", "__package__": package}
    before = dict(sys.modules)

    class Finder:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
            import importlib.machinery

            if name.split(".", maxsplit=1)[0] != root:
                return None
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

        def create_module(self, spec: Any) -> Any:
            return _Empty(spec.name)

        def exec_module(self, module: Any) -> None:
            module.__path__ = []

    finder: Any = Finder()
    sys.meta_path.insert(0, finder)
    try:
        exec(compile(text, member, "exec"), found)
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] == root:
                del sys.modules[name]
    return found


def titan(wheel: Path, family: str, model: Any) -> dict[str, torch.Tensor]:
    """The state as torchtitan's own adapter makes it of transformers'."""
    module = code(wheel, f"torchtitan/models/{family}/state_dict_adapter.py", f"torchtitan.models.{family}")
    made = module["Llama3StateDictAdapter" if family == "llama3" else "Qwen3StateDictAdapter"]
    config = model.config
    attention = SimpleNamespace(
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
    )  # fmt: skip
    layers = [SimpleNamespace(attention=attention, moe=None)]
    settings = SimpleNamespace(layers=layers, dim=config.hidden_size, enable_weight_tying=False)
    adapter = made(settings, None)
    adapter.model_config = settings
    adapter._validate_hf_rope_config = lambda *args: None
    found: dict[str, torch.Tensor] = adapter.from_hf(dict(model.state_dict()))
    return found


def tune(wheel: Path, family: str, model: Any) -> dict[str, torch.Tensor]:
    """The same with torchtune's converter."""
    config = model.config
    sizes = {"num_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads}
    plain = code(wheel, "torchtune/models/convert_weights.py", "torchtune.models")
    state = dict(model.state_dict())
    if family == "llama":
        found: dict[str, torch.Tensor] = plain["hf_to_tune"](state, **sizes, dim=config.hidden_size)
        return found
    own = code(wheel, "torchtune/models/qwen2/_convert_weights.py", "torchtune.models.qwen2")
    own["get_mapped_key"] = plain["get_mapped_key"]
    found = own["qwen2_hf_to_tune"](state, **sizes, dim=config.hidden_size)
    return dict(found)


def save(out: Path, model: Any, state: dict[str, torch.Tensor], facts: dict[str, str]) -> None:
    """A distributed checkpoint, its config and its oracle."""
    out.mkdir(parents=True)
    wrapped: dict[str, Any] = {"model": state} if facts["trainer"] == "torchtune" else state
    dcp.save(dict(wrapped), checkpoint_id=str(out / "step-2"), no_dist=True)
    model.config.architectures = [type(model).__name__]
    (out / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2, default=str))
    save_file({k: v.clone() for k, v in model.state_dict().items()}, out / "oracle.safetensors")
    (out / "fixture.json").write_text(json.dumps(facts | {"torch": torch.__version__}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--titan", type=Path, required=True)
    parser.add_argument("--tune", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(3)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).bfloat16()
    qwen2 = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SMALL))
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(head_dim=4, **SMALL))
    named = {"trainer": "torchtitan", "version": given.titan.name}
    save(given.out / "titan-llama", llama, titan(given.titan, "llama3", llama), named)
    save(given.out / "titan-qwen3", qwen3, titan(given.titan, "qwen3", qwen3), named)
    named = {"trainer": "torchtune", "version": given.tune.name}
    save(given.out / "tune-llama", llama, tune(given.tune, "llama", llama), named)
    save(given.out / "tune-qwen2", qwen2, tune(given.tune, "qwen2", qwen2), named)


if __name__ == "__main__":
    main()
