"""Tiny models that DeepSpeed splits over ranks, and their training: see `split.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

STEPS = 2


@dataclass(frozen=True)
class Case:
    """What is split, and how."""

    split: str  # moe, autoep, pipe, tp
    size: int = 2
    dtype: str = "bf16"
    model: str = ""
    stages: tuple[int, ...] = (1, 2)
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def settings(case: Case, stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 30, "reduce_bucket_size": 1000} | case.zero
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bf16"},
        "fp16": {"enabled": case.dtype == "fp16", "initial_scale_power": 4},
    }
    return config | case.config


def _steps(engine: Any, loss: Any) -> None:
    import torch
    import torch.distributed as dist

    for step in range(STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        engine.backward(loss(engine))
        engine.step()


def train_moe(case: Case, stage: int) -> tuple[Any, Any]:
    """DeepSpeed's own mixture of experts."""
    import deepspeed
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 5)
            kinds = {"use_residual": case.model == "residual", "k": 1, "min_capacity": 4}
            self.moe = MoE(5, nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 5)), 4, case.size, **kinds)
            self.norm = nn.LayerNorm(5)
            size = 1 if case.model == "two-sizes" else case.size
            self.other = MoE(5, nn.Linear(5, 5), 2, size, **kinds)
            self.last = nn.Linear(5, 3)
            self.register_buffer("mean", torch.randn(5))

        def forward(self, x: Any) -> Any:
            hidden, *_ = self.moe(self.first(x))
            hidden, *_ = self.other(self.norm(hidden) + self.mean.to(x.dtype))
            return self.last(hidden).float().pow(2).mean()

    model = Net()
    group = {"params": list(model.parameters()), "name": "all"}
    groups = split_params_into_different_moe_groups_for_optimizer(group)
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings(case, stage))
    dtype = next(engine.module.parameters()).dtype
    _steps(engine, lambda e: e(torch.randn(9, 6, dtype=dtype)))
    return engine, model


def train_autoep(case: Case, stage: int) -> tuple[Any, Any]:
    """Experts of a model of transformers, spread by AutoEP."""
    import deepspeed
    import torch
    import transformers

    small = {
        "vocab_size": 29, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False, "use_cache": False,
    }  # fmt: skip
    if case.model == "mixtral":
        config = transformers.MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **small)
        model: Any = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.Qwen3MoeConfig(
            num_experts=4, num_experts_per_tok=2, moe_intermediate_size=6, head_dim=4, **small
        )
        model = transformers.Qwen3MoeForCausalLM(config)
    own = settings(case, stage)
    own["expert_parallel"] = {
        "enabled": True, "autoep_size": case.size, "preset_model": case.model, "use_grouped_mm": False
    }  # fmt: skip
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    # What 0.19.8 does to transformers' registry of outputs fails with newer versions of it; nothing here needs it.
    from transformers.utils import output_capturing

    registry, output_capturing._CAN_RECORD_REGISTRY = output_capturing._CAN_RECORD_REGISTRY, None
    engine, *_ = deepspeed.initialize(model=model, config=own)
    output_capturing._CAN_RECORD_REGISTRY = registry
    tokens = lambda: torch.randint(1, 28, (2, 7))  # noqa: E731

    def loss(e: Any) -> Any:
        ids = tokens()
        return e(input_ids=ids, labels=ids).loss

    _steps(engine, loss)
    return engine, model


def train_pipe(case: Case, stage: int) -> tuple[Any, Any]:
    """Layers of a pipeline, two of which share a weight."""
    import deepspeed
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from torch import nn

    class Head(nn.Linear):
        """The tied weight read the other way round."""

    def embed(layer: Any, x: Any) -> Any:
        return layer(x)

    specs = [
        TiedLayerSpec("shared", nn.Linear, 6, 6, bias=False, forward_fn=embed),
        LayerSpec(nn.Linear, 6, 7),
        torch.tanh,
        LayerSpec(nn.LayerNorm, 7),
        LayerSpec(nn.Linear, 7, 6),
        TiedLayerSpec("shared", nn.Linear, 6, 6, bias=False, forward_fn=embed),
    ]
    config: Any = None
    if case.model:
        specs, config = llama_layers(tied=case.model == "tied")
    model = PipelineModule(
        specs, num_stages=case.size, loss_fn=lambda out, label: (out.float() - label.float()).pow(2).mean(),
        partition_method="uniform",
    )  # fmt: skip
    own = settings(case, stage)
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, config=own, model_parameters=list(model.parameters()))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[case.dtype]

    def batches() -> Any:
        torch.manual_seed(5)
        while case.model:
            yield torch.randint(1, 28, (2, 7)), torch.randn(2, 7, 29, dtype=dtype)
        while True:
            yield torch.randn(3, 6, dtype=dtype), torch.randn(3, 6, dtype=dtype)

    data = batches()
    for _ in range(STEPS):
        engine.train_batch(data_iter=data)
    if config is not None:
        model.config = config
    return engine, model


def llama_layers(*, tied: bool) -> tuple[list[Any], Any]:
    """transformers' own layers in a pipeline, as those who train a model of transformers in one do."""
    import torch
    import transformers
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn
    from transformers.models.llama import modeling_llama as llama

    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    config.architectures = ["LlamaForCausalLM"]

    class Block(llama.LlamaDecoderLayer):  # type: ignore[misc]
        def __init__(self, index: int) -> None:
            super().__init__(config, index)
            self.rotary = llama.LlamaRotaryEmbedding(config)

        def forward(self, x: Any) -> Any:
            places = torch.arange(x.shape[1])[None]
            mask = torch.full((x.shape[1], x.shape[1]), -1e9, dtype=x.dtype).triu(1)[None, None]
            out = super().forward(x, attention_mask=mask, position_embeddings=self.rotary(x, places))
            return out[0] if isinstance(out, tuple) else out

    blocks = [LayerSpec(Block, i) for i in range(3)]
    norm = LayerSpec(llama.LlamaRMSNorm, 8)
    if tied:
        project = lambda layer, x: x @ layer.weight.t()  # noqa: E731
        return [
            TiedLayerSpec("embed", nn.Embedding, 29, 8), *blocks, norm,
            TiedLayerSpec("embed", nn.Embedding, 29, 8, forward_fn=project),
        ], config  # fmt: skip
    return [LayerSpec(nn.Embedding, 29, 8), *blocks, norm, LayerSpec(nn.Linear, 8, 29, bias=False)], config


def train_tp(case: Case, stage: int) -> tuple[Any, Any]:
    """A model of transformers whose layers AutoTP slices."""
    import deepspeed
    import torch
    import transformers

    small = {
        "vocab_size": 30, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": case.model == "tied",
        "use_cache": False,
    }  # fmt: skip
    if case.model == "qwen2":
        model: Any = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**small))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    own = settings(case, stage) | {"tensor_parallel": {"autotp_size": case.size}}
    own["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    engine, *_ = deepspeed.initialize(model=model, config=own)

    def loss(e: Any) -> Any:
        torch.manual_seed(7)  # slices of one model see the same tokens
        ids = torch.randint(1, 28, (2, 7))
        return e(input_ids=ids, labels=ids).loss

    _steps(engine, loss)
    return engine, model
