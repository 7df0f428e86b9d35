"""Tiny real mixtures of experts, stored one by one or as stacks, and adapters over their experts in every form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oracle.adapters import rewrite_adapter
from oracle.bases import DTYPES, Base, _randomise, quiet, read_tensors, write_tensors
from oracle.expected import load_output

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

VOCAB = 163
WIDTH, INNER, EXPERTS = 32, 20, 4
_TEXT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": INNER,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_QWEN = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "decoder_sparse_step": 1}
_QWEN |= {"mlp_only_layers": []}
_SHARED = {"shared_expert_intermediate_size": 24}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": INNER,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_NEXT = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_NEXT |= {"layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 2}
_VISION = {"depth": 1, "hidden_size": 24, "intermediate_size": 36, "num_heads": 2, "out_hidden_size": WIDTH}
_VISION |= {"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}


@dataclass(frozen=True)
class Mixture:
    """One family.

    Attributes:
        config: the config's class and what it is made with.
        attention: modules of attention that an adapter may train too.
        one_by_one: names of an expert's modules on disk, where the checkpoint holds experts one by one: those that are
            laid end to end in `gate_up_proj`, then the others.
        disk: the module of the experts on disk, where its name differs from that in memory.
        stacks: the parameters of the experts' module, in order.
    """

    config: tuple[str, dict[str, Any]]
    attention: tuple[str, ...] = ("q_proj", "v_proj", "o_proj")
    one_by_one: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    disk: tuple[str, str] = ("", "")
    auto: str = "AutoModelForCausalLM"
    stacks: tuple[str, ...] = ("gate_up_proj", "down_proj")


_W = ("w1", "w3", "w2")
_BLOCK = ("mlp.experts", "block_sparse_moe.experts")
MIXTURES = {
    "mixtral": Mixture(("MixtralConfig", _TEXT | {"num_local_experts": EXPERTS}), one_by_one=_W, disk=_BLOCK),
    "qwen2_moe": Mixture(("Qwen2MoeConfig", _TEXT | _QWEN | _SHARED)),
    "qwen3_moe": Mixture(("Qwen3MoeConfig", _TEXT | _QWEN)),
    "qwen3_next": Mixture(("Qwen3NextConfig", _TEXT | _QWEN | _SHARED | _NEXT)),
    "qwen3_5_moe": Mixture(("Qwen3_5MoeTextConfig", _TEXT | _QWEN | _SHARED | _NEXT)),
    "deepseek_v2": Mixture(("DeepseekV2Config", _TEXT | _DEEPSEEK), ("q_b_proj", "kv_b_proj", "o_proj")),
    "deepseek_v3": Mixture(("DeepseekV3Config", _TEXT | _DEEPSEEK), ("q_b_proj", "kv_b_proj", "o_proj")),
    "gpt_oss": Mixture(
        ("GptOssConfig", _TEXT | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2}), one_by_one=()
    ),
    "llama4": Mixture(
        (
            "Llama4TextConfig",
            _TEXT | {"num_local_experts": EXPERTS, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1},
        ),
        one_by_one=(),
    ),
    "glm4_moe": Mixture(
        ("Glm4MoeConfig", _TEXT | _DEEPSEEK | {"num_key_value_heads": 2, "n_shared_experts": 1}),
    ),
    "olmoe": Mixture(("OlmoeConfig", _TEXT | {"num_experts": EXPERTS, "num_experts_per_tok": 2})),
    "minimax": Mixture(
        (
            "MiniMaxConfig",
            _TEXT | {"num_local_experts": EXPERTS, "layer_types": ["full_attention"] * 2, "block_size": 8},
        ),
        one_by_one=_W,
        disk=_BLOCK,
    ),
    "phimoe": Mixture(("PhimoeConfig", _TEXT | {"num_local_experts": EXPERTS}), one_by_one=_W, disk=_BLOCK),
    "granitemoe": Mixture(("GraniteMoeConfig", _TEXT | {"num_local_experts": EXPERTS}), one_by_one=()),
    "dots1": Mixture(
        ("Dots1Config", _TEXT | _DEEPSEEK | {"n_shared_experts": 1, "num_key_value_heads": 2}),
    ),
    "ernie4_5_moe": Mixture(
        (
            "Ernie4_5_MoeConfig",
            _TEXT
            | {
                "moe_num_experts": EXPERTS,
                "moe_k": 2,
                "moe_intermediate_size": INNER,
                "moe_num_shared_experts": 1,
                "moe_layer_start_index": 0,
            },
        ),
    ),
    "hunyuan_v1_moe": Mixture(
        ("HunYuanMoEV1Config", _TEXT | {"num_experts": EXPERTS, "moe_topk": 2, "moe_intermediate_size": INNER}),
    ),
    "lfm2_moe": Mixture(
        (
            "Lfm2MoeConfig",
            _TEXT
            | {
                "num_experts": EXPERTS,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": INNER,
                "num_dense_layers": 0,
                "layer_types": ["full_attention"] * 2,
            },
        ),
        ("q_proj", "v_proj", "out_proj"),
        one_by_one=_W,
    ),
    "qwen3_vl_moe": Mixture(
        ("Qwen3VLMoeConfig", {"text_config": _TEXT | _QWEN | {"rope_parameters": _MROPE}, "vision_config": _VISION}),
        one_by_one=(),
        auto="AutoModelForImageTextToText",
    ),
}


@dataclass(frozen=True)
class MixtureBase(Base):
    """A base with the targets of its family."""

    @property
    def targets(self) -> Any:
        return list(MIXTURES[self.family].attention)

    @property
    def parameters(self) -> list[str]:
        """Every stack, as `target_parameters` names it."""
        return [f"experts.{name}" for name in MIXTURES[self.family].stacks]


def make_mixture(
    path: Path,
    family: str,
    *,
    dtype: str = "float32",
    stacked: bool = False,
    change: Callable[[Any], None] | None = None,
    **more: Any,
) -> MixtureBase:
    """Writes a tiny mixture; `stacked`: with the names and stacks that it has in memory, as some trainers save it."""
    name, settings = MIXTURES[family].config
    auto = MIXTURES[family].auto
    with quiet():
        config = getattr(transformers, name)(**(settings | more))
        if change is not None:
            change(config)
        torch.manual_seed(0)
        model = getattr(transformers, auto).from_config(config, dtype=torch.float32)
        _randomise(model, 0)
        model = model.to(DTYPES[dtype])
        model.config.dtype = DTYPES[dtype]
        model.save_pretrained(path)
        model = getattr(transformers, auto).from_pretrained(path, dtype="auto")  # some keep a router in fp32
        model.save_pretrained(path)
        if stacked:
            write_tensors(path, {k: v.clone() for k, v in model.state_dict().items()})
    return MixtureBase(path, family, False, auto)


def as_saved(path: Path, base: MixtureBase, *, dtype: str, apart: bool = False) -> dict[str, Any]:
    """The tensors of a folder as transformers saves them after it has loaded them; `apart`: experts one by one."""
    with quiet():
        model = load_output(path, base.auto, DTYPES[dtype])
        if apart:
            model._weight_conversions = None  # else it saves what it has loaded in the same form
        model.save_pretrained(path.with_name(path.name + "-saved"))
    return read_tensors(path.with_name(path.name + "-saved"))


def add_expert_modules(
    base: MixtureBase,
    adapter: Path,
    path: Path,
    modules: Sequence[str],
    *,
    rank: int = 3,
    dtype: Any = None,
    seed: int = 7,
) -> Path:
    """A copy of an adapter with LoRA over modules of single experts too, as transformers 4 and PEFT made it."""
    stored = read_tensors(base.path)
    generator = torch.Generator().manual_seed(seed)

    def add(tensors: dict[str, Any]) -> None:
        for name in modules:
            height, width = stored[f"{name}.weight"].shape
            a, b = torch.randn(rank, width, generator=generator), torch.randn(height, rank, generator=generator)
            for part, value in (("lora_A", a * 0.1), ("lora_B", b * 0.1)):
                tensors[f"base_model.model.{name}.{part}.weight"] = value.to(dtype or value.dtype)

    return rewrite_adapter(adapter, path, change=add)
