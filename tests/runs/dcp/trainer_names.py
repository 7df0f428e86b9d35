"""Saves models of transformers as torchtitan and torchtune have them, with their own code, as distributed checkpoints.

    python tests/runs/dcp/trainer_names.py OUT --titan torchtitan-0.3.0.whl --tune torchtune-0.6.1.whl

The trainers' converters are taken out of their wheels and run as they are; what these import of their trainers beside
torch (types of settings, a base class) is not installed and stands empty. The oracle is transformers' own state.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import transformers
from safetensors.torch import load_file, save_file

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


def code(wheel: Path, member: str, package: str, given: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """A module of a wheel, run with empty modules for what it imports of its own package.

    Args:
        given: modules of it that are not empty.
    """
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
            made = _Empty(spec.name)
            vars(made).update({k: v for k, v in (given or {}).get(spec.name, {}).items() if not k.startswith("__")})
            return made

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


ADAPTERS = {"llama3": "Llama3", "qwen3": "Qwen3", "deepseek_v3": "DeepSeekV3", "gpt_oss": "GptOss"}


def titan(wheel: Path, family: str, model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state as torchtitan's own adapter makes it of what transformers has on disk."""
    utils = "torchtitan.models.utils"
    given = {utils: code(wheel, "torchtitan/models/utils.py", utils)}
    member = f"torchtitan/models/{family}/state_dict_adapter.py"
    made = code(wheel, member, f"torchtitan.models.{family}", given)[f"{ADAPTERS[family]}StateDictAdapter"]
    config = model.config
    attention = SimpleNamespace(
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None), q_lora_rank=getattr(config, "q_lora_rank", None) or 0,
    )  # fmt: skip
    experts = getattr(config, "n_routed_experts", None) or getattr(config, "num_experts", None)
    layers = [SimpleNamespace(attention=attention, moe=SimpleNamespace(num_experts=experts) if experts else None)]
    settings = SimpleNamespace(layers=layers, dim=config.hidden_size, enable_weight_tying=False)
    adapter = made(settings, None)
    adapter.model_config = settings
    adapter._validate_hf_rope_config = lambda *args: None
    given_state = as_blocks(state) if family == "gpt_oss" else dict(state)
    found: dict[str, torch.Tensor] = adapter.from_hf(given_state)
    return as_parameters(wheel, found) if family == "gpt_oss" else found


def as_blocks(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """gpt-oss as its checkpoint in blocks is read, the one that torchtitan's adapter takes: experts `[e, out, in]`."""
    ends = ("experts.gate_up_proj", "experts.down_proj")
    return {f"{n}_blocks" if n.endswith(ends) else n: t.mT if n.endswith(ends) else t for n, t in state.items()}


def as_parameters(wheel: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts' names as the module itself has them, which the adapter of 0.3.0 doesn't know."""
    text = zipfile.ZipFile(wheel).read("torchtitan/models/gpt_oss/moe.py").decode()
    own = {re.sub(r"_E[A-Z]+$", "", n): n for n in re.findall(r"self\.(mlp\d_\w+) = nn\.Parameter", text)}
    assert len(own) == 4, own
    split = {n: n.rpartition(".") for n in state}
    return {f"{before}{dot}{own.get(last, last)}": state[n].contiguous() for n, (before, dot, last) in split.items()}


def on_disk(model: Any) -> dict[str, torch.Tensor]:
    """What transformers saves: experts one by one."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        return load_file(Path(place) / "model.safetensors")


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
    save_file(on_disk(model), out / "oracle.safetensors")
    (out / "fixture.json").write_text(json.dumps(facts | {"torch": torch.__version__}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--titan", type=Path, required=True)
    parser.add_argument("--tune", type=Path, required=True)
    parser.add_argument("--only", default="", help="models with this in their names")
    given = parser.parse_args()
    torch.manual_seed(3)
    mixture = {"moe_intermediate_size": 6, "num_experts_per_tok": 2}
    latent = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 5,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 3, "num_key_value_heads": 4}  # fmt: skip
    made: dict[str, Any] = {
        "llama": transformers.LlamaConfig(**SMALL),
        "qwen2": transformers.Qwen2Config(**SMALL),
        "qwen3": transformers.Qwen3Config(head_dim=4, **SMALL),
        "qwen3-moe": transformers.Qwen3MoeConfig(head_dim=4, num_experts=4, decoder_sparse_step=2, **mixture, **SMALL),
        "deepseek": transformers.DeepseekV3Config(q_lora_rank=7, **(SMALL | mixture | latent)),
        "deepseek-q": transformers.DeepseekV3Config(q_lora_rank=None, **(SMALL | mixture | latent)),
    }
    models = {n: transformers.AutoModelForCausalLM.from_config(c) for n, c in made.items()}
    models["llama"] = models["llama"].bfloat16()
    for model in models.values():  # a bias of zeros would show nothing
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer))
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "rope_scaling": None}
    models["gpt-oss"] = transformers.AutoModelForCausalLM.from_config(transformers.GptOssConfig(**(SMALL | own)))
    for name, parameter in models["gpt-oss"].named_parameters():  # biases of zeros would show nothing
        if name.endswith(("bias", "sinks")):
            torch.nn.init.normal_(parameter)
    named = {"trainer": "torchtitan", "version": given.titan.name}
    families = {"llama": "llama3", "qwen3": "qwen3", "qwen3-moe": "qwen3", "deepseek": "deepseek_v3",
        "gpt-oss": "gpt_oss"}  # fmt: skip
    for name, family in {**families, "deepseek-q": "deepseek_v3"}.items():
        if given.only in name:
            state = titan(given.titan, family, models[name], on_disk(models[name]))
            save(given.out / f"titan-{name}", models[name], state, named)
    named = {"trainer": "torchtune", "version": given.tune.name}
    for name in ("llama", "qwen2"):
        if given.only in f"tune-{name}":
            state = tune(given.tune, name, models[name])
            save(given.out / f"tune-{name}", models[name], state, named)


if __name__ == "__main__":
    main()
