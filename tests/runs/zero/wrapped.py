"""Trains models inside the wrappers of reward and PPO trainers with real DeepSpeed, as `train.py` does.

Needs `trl` 0.24 (which LLaMA-Factory 0.9.5 has) beside `deepspeed`, `transformers` and `peft`:

    python tests/runs/zero/wrapped.py OUT --ranks 2 --case vhead-lora --stage 3

- `vhead`, `vhead-lora`: TRL's `AutoModelForCausalLMWithValueHead`, which LLaMA-Factory trains reward models in.
- `ppo`: TRL's `PolicyAndValueWrapper`.
- `dschat`: a module with the attributes of DeepSpeed-Chat's `RewardModel`, which is in no package.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import train

CASES = {
    "vhead": train.Case("vhead", stages=(2, 3)),
    "vhead-lora": train.Case("vhead-lora", stages=(1, 2, 3)),
    "vhead-lora-lean": train.Case("vhead-lora", stages=(2,), exclude_frozen=True),
    "ppo": train.Case("ppo", stages=(2, 3)),
    "dschat": train.Case("dschat", stages=(2, 3)),
}


def build(kind: str) -> tuple[Any, Any]:
    """A wrapped model and a function that gives its loss."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, pad_token_id=0, num_labels=1,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip

    def tokens() -> Any:
        return torch.randint(1, 16, (2, 7))

    if kind.startswith("vhead"):
        from trl.models.modeling_value_head import AutoModelForCausalLMWithValueHead

        inner: Any = LlamaForCausalLM(config)
        if kind == "vhead-lora":
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
            inner = get_peft_model(inner, lora)
        model: Any = AutoModelForCausalLMWithValueHead.from_pretrained(inner)

        def loss(engine: Any) -> Any:
            ids = tokens()
            logits, _, value = engine(input_ids=ids, attention_mask=torch.ones_like(ids))
            return value.float().pow(2).mean() + logits.float().pow(2).mean()

    elif kind == "ppo":
        model = policy_and_value()(LlamaForCausalLM(config), LlamaForSequenceClassification(config))

        def loss(engine: Any) -> Any:
            logits, values = engine(input_ids=tokens(), output_hidden_states=True)
            return logits.logits.float().pow(2).mean() + values.float().pow(2).mean()

    else:

        class RewardModel(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.config = config
                self.v_head = torch.nn.Linear(config.hidden_size, 1, bias=False)
                self.rwtransformer = LlamaModel(config)

            def forward(self, ids: Any) -> Any:
                return self.v_head(self.rwtransformer(ids)[0]).squeeze(-1)

        model = RewardModel()

        def loss(engine: Any) -> Any:
            return engine(tokens()).float().pow(2).mean()

    return model, loss


def policy_and_value() -> Any:
    """TRL's class as its file defines it; importing the whole module would need what only its trainer does."""
    import torch

    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    path = Path(next(iter(spec.submodule_search_locations))) / "trainer" / "ppo_trainer.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "PolicyAndValueWrapper")
    space: dict[str, Any] = {"nn": torch.nn}
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return space["PolicyAndValueWrapper"]


def finish(folder: Path, model: Any, found: dict[str, Any], facts: dict[str, Any]) -> None:
    """As `train.finish`, the config that of the causal model inside."""
    import trl

    facts["versions"]["trl"] = trl.__version__
    inner = getattr(model, "pretrained_model", getattr(model, "policy", None))
    inner = model if inner is None else inner
    plain_finish(folder, inner, found, facts)
    config = inner.config
    config.architectures = ["LlamaForCausalLM"]
    (folder / "config-of-run.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2, default=str))
    facts["files"] = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    (folder / "fixture.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


plain_finish = train.finish
train.CASES, train.build, train.finish = CASES, build, finish
train.__file__ = __file__

if __name__ == "__main__":
    train.main()
