"""Trains tiny models with real DeepSpeed on CPU and saves them the way users break them.

Each run is laid out as Trainer does: `checkpoint-N/` with the model or the adapter, saved with `save_pretrained` and
without gathering, beside `global_stepN/`, DeepSpeed's own checkpoint. Under ZeRO-3 what was saved is `torch.Size([0])`
wherever a parameter was partitioned. `oracle-N.safetensors` holds what lived in memory, gathered during training.

Needs `deepspeed`, `transformers`, `peft` (versions are in `fixture.json`); starts one process a rank:

    python tests/runs/repair/make.py tests/runs/repair/runs
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from ranks import run_ranks

RANKS = 2
VOCABULARY = 11
STEPS = 2


@dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and how it is saved.

    Attributes:
        threshold: parameters of so many elements stay whole under ZeRO-3.
        older: step 1 is saved too.
        base: the model that training began with is saved too, gathered.
        lora: arguments of PEFT's LoraConfig; None: the model itself is trained.
        frozen: names of parameters that are not trained, by a part of them.
        value_head: the model is inside of another, with a value head beside, as in LLaMA-Factory.
    """

    model: str = "LlamaForCausalLM"
    stage: int = 3
    threshold: int = 20
    older: bool = False
    base: bool = False
    exclude_frozen: bool = False
    frozen: tuple[str, ...] = ()
    lora: dict[str, Any] | None = None
    value_head: bool = False
    config: dict[str, Any] = field(default_factory=dict)


FROZEN = ("embed_tokens", "k_proj")
REWARD = "LlamaForSequenceClassification"
LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
SAVED = {"task_type": "SEQ_CLS", "modules_to_save": ["score", "embed_tokens"]}
ON_EMBEDDING = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "embed_tokens"]}
ON_HEAD = {**LORA, "target_modules": ["q_proj", "down_proj", "score"]}
CASES = {
    "reward": Case(REWARD, threshold=40, older=True),
    "tied": Case(config={"tie_word_embeddings": True}),
    "lora": Case(REWARD, threshold=0, older=True, base=True, lora={**LORA, **SAVED}),
    "head": Case(REWARD, lora=ON_HEAD),
    "head-lean": Case(REWARD, lora=ON_HEAD, exclude_frozen=True),
    "head-frozen": Case(REWARD, lora=LORA),
    "head-frozen-lean": Case(REWARD, lora=LORA, exclude_frozen=True),
    "embed-lora": Case(base=True, lora={**LORA, **ON_EMBEDDING}),
    "value-head": Case(threshold=0, lora={**LORA, "task_type": "CAUSAL_LM"}, value_head=True),
    "frozen": Case(threshold=40, frozen=FROZEN),
    "frozen-lean": Case(threshold=40, base=True, frozen=FROZEN, exclude_frozen=True),
    "frozen-z1": Case(stage=1, frozen=FROZEN),
}  # fmt: skip


def launch(out: Path, cases: list[str]) -> None:
    """Start one process a rank and wait for them."""
    run_ranks(RANKS, __file__, out, "--worker", *(w for c in cases for w in ("--case", c)))


def work(out: Path, cases: list[str]) -> None:
    """One rank: every case, one after the other."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    for name in cases:
        train(out / name, name, CASES[name])


def train(folder: Path, name: str, case: Case) -> None:
    """Train, and save as users do after each step that is kept."""
    import deepspeed
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    if rank == 0 and folder.exists():
        shutil.rmtree(folder)
    dist.barrier()
    torch.manual_seed(1)
    model = build(folder, case, rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": case.stage, "stage3_param_persistence_threshold": case.threshold, "reduce_bucket_size": 1000,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(1, STEPS + 1):
        torch.manual_seed(100 * step + rank)
        tokens = torch.randint(1, VOCABULARY, (2, 7))
        if case.model == REWARD:
            loss = engine(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits.float().sub(1).pow(2).sum()
        elif case.value_head:
            loss = engine(tokens).float().sub(1).pow(2).sum()
        else:
            loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        if case.older or step == STEPS:
            save(folder, engine, case, step, rank)
    if rank == 0:
        describe(folder, name, case)
    dist.barrier()
    engine.destroy()


def build(folder: Path, case: Case, rank: int) -> Any:
    """The model, wrapped by PEFT where the case says so."""
    import transformers
    from transformers import LlamaConfig

    settings = {"num_labels": 1} if case.model == REWARD else {}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, pad_token_id=0, use_cache=False, dtype="bfloat16",
        **settings, **case.config,
    )  # fmt: skip
    model = getattr(transformers, case.model)(config).bfloat16()
    for name, parameter in model.named_parameters():
        if any(part in name for part in case.frozen):
            parameter.requires_grad_(False)
    if case.base and rank == 0:
        model.save_pretrained(folder / "base")
    if case.lora is not None:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(**case.lora), autocast_adapter_dtype=False)
        model.peft_config["default"].base_model_name_or_path = None
    return with_value_head(model, config.hidden_size) if case.value_head else model


def with_value_head(model: Any, width: int) -> Any:
    """The model inside of another, as TRL's AutoModelForCausalLMWithValueHead has it."""
    import torch
    from torch import nn

    class ValueHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.summary = nn.Linear(width, 1)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = model
            self.v_head = ValueHead()

        def forward(self, tokens: Any) -> Any:
            hidden = self.pretrained_model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
            return self.v_head.summary(hidden)

    return Wrapper().to(torch.bfloat16)


def save(folder: Path, engine: Any, case: Case, step: int, rank: int) -> None:
    """What a callback does that never heard of gathering, then what DeepSpeed does."""
    import deepspeed
    import torch.distributed as dist
    from safetensors.torch import save_file

    place = folder / f"checkpoint-{step}"
    if rank == 0:
        getattr(engine.module, "pretrained_model", engine.module).save_pretrained(place)
        if case.value_head:  # LLaMA-Factory: `fix_valuehead_checkpoint`
            state = engine.module.v_head.state_dict(prefix="v_head.")
            save_file({n: t.clone() for n, t in state.items()}, place / "value_head.safetensors")
        (place / "README.md").unlink(missing_ok=True)
    dist.barrier()
    engine.save_checkpoint(str(place), exclude_frozen_parameters=case.exclude_frozen)
    named = list(engine.module.named_parameters(remove_duplicate=False))
    with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=case.stage == 3):
        found = {n: p.detach().clone().contiguous() for n, p in named}
    if rank == 0:
        for script in ("zero_to_fp32.py", "zero_to_torch.py"):
            (place / script).unlink(missing_ok=True)
        save_file(found, folder / f"oracle-{step}.safetensors")


def describe(folder: Path, name: str, case: Case) -> None:
    """How a run was made, with which versions."""
    import deepspeed
    import peft
    import torch
    import transformers

    versions = {m.__name__: m.__version__ for m in (deepspeed, torch, transformers, peft)}
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    facts = {"case": name, "stage": case.stage, "ranks": RANKS, "versions": versions, "files": files}
    facts |= {"exclude_frozen": case.exclude_frozen, "threshold": case.threshold}
    facts |= {"made_by": "tests/runs/repair/make.py"}
    (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--worker", action="store_true")
    given = parser.parse_args()
    run = work if given.worker else launch
    run(given.out, given.case or list(CASES))


if __name__ == "__main__":
    main()
