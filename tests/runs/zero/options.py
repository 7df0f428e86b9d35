"""Settings of a DeepSpeed run, drawn by a number: models, optimizers, parameter groups, dtypes and options of ZeRO.

The same number draws the same settings, so that a miss can be looked at again. Combinations that DeepSpeed itself
refuses are drawn too: it says so when it is started.
"""

from __future__ import annotations

import random
from typing import Any

MODELS = (
    "odd", "odd", "odd", "lm", "lm-tied", "lora", "lora-frozen-head", "lora-causal", "reward", "neox", "vision",
    "vision-lora",
)  # fmt: skip
OPTIMIZERS = (
    "adamw", "adamw", "adamw", "amsgrad", "sgd", "momentum", "adagrad", "rmsprop", "nadam",
    "adamax",
)  # fmt: skip


def draw(number: int) -> dict[str, Any]:
    """What `train.Case` takes, with the stage, the ranks before and after, and what the state becomes."""
    rng = random.Random(number)

    def often(likely: float) -> bool:
        return rng.random() < likely

    stage = rng.choice((1, 1, 2, 2, 3, 3, 3, 0))
    before = rng.choice((1, 2, 2, 3, 4))
    after = rng.choice([n for n in (1, 2, 3, 4) if n != before])
    dtype = rng.choice(("bf16", "bf16", "fp16", "fp32"))
    model = rng.choice(MODELS)
    zero: dict[str, Any] = {}
    if stage == 3:
        zero |= {"sub_group_size": rng.choice((20, 60, 300, 10**9))}
        zero |= {"stage3_param_persistence_threshold": rng.choice((0, 30, 10**5))}
        zero |= {"zero_hpz_partition_size": 2} if before % 2 == 0 and often(0.2) else {}
        zero |= {"offload_param": {"device": "cpu"}} if often(0.2) else {}
        zero |= {"stage3_module_granularity_threshold": 100} if often(0.1) else {}
        zero |= {"stage3_use_all_reduce_for_fetch_params": True} if often(0.1) else {}
        zero |= {"memory_efficient_linear": False} if often(0.2) else {}
    if stage in (1, 2):
        zero |= {"round_robin_gradients": True} if often(0.4) else {}
        zero |= {"parameter_alignment": True} if often(0.3) else {}
        zero |= {"load_from_fp32_weights": False} if often(0.1) else {}
    if stage:
        zero |= {"overlap_comm": True} if often(0.3) else {}
        zero |= {"contiguous_gradients": False} if often(0.2) else {}
        zero |= {"reduce_scatter": False} if often(0.2) else {}
        zero |= {"reduce_bucket_size": rng.choice((50, 1000, 10**6))}
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": False}} if often(0.25) else {}
    config: dict[str, Any] = {}
    config |= {"data_types": {"grad_accum_dtype": rng.choice(("fp32", "bf16"))}} if stage and often(0.3) else {}
    config |= {"gradient_accumulation_steps": 2} if often(0.2) else {}
    config |= {"gradient_clipping": 1.0} if often(0.3) else {}
    config |= {"communication_data_type": "fp32"} if often(0.1) else {}
    config |= {"checkpoint": {"checkpoint_serialization": False}} if often(0.1) else {}
    if dtype == "bf16" and often(0.15):
        config |= {
            "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": often(0.5)}
        }
    if dtype == "fp16" and often(0.4):
        config |= {"fp16": {"enabled": True, "loss_scale": 8, "fp16_master_weights_and_grads": often(0.3)}}
    if dtype == "fp32" and often(0.3):
        config |= {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    options = {
        "model": model,
        "dtype": dtype,
        "zero": zero,
        "config": config,
        "groups": rng.choice((1, 1, 2, 3)),
        "named": often(0.3),
        "exclude_frozen": "lora" in model and often(0.4),
        "optimizer": rng.choice(OPTIMIZERS) if stage else "adamw",
        "given_frozen": often(0.3),
        "tag": rng.choice((None, None, None, "step 1", "epoch-1.5", "ckpt_ä")),
    }
    to = rng.choice((stage, stage, stage, 1, 2, 3))
    return {"options": options, "stage": stage, "before": before, "after": after, "to": to, "universal": often(0.15)}
