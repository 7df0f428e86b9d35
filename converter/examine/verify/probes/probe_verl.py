"""What verl's FSDP engine loads as its critic: `load_valuehead_model`, with the config as the engine sets it.

verl asks for flash attention, which needs a GPU; the probe asks for eager attention in its place and changes nothing
else, so that a folder is refused or taken for its content. Where verl falls back to TRL's wrapper, so does the probe.
See probe_common.
"""

from __future__ import annotations

from typing import Any

import transformers
from probe_common import Loaded, positions, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The token classifier, or TRL's wrapper where verl makes one."""
    stood_in = stand_in_for("ray", "flash_attn", "vllm", "sglang", "torchdata", "wandb", "hydra", "tensorboard")
    import torch
    from verl.utils.model import load_valuehead_model

    _without_flash_attention()
    config = transformers.AutoConfig.from_pretrained(asked.folder)
    config.num_labels = 1
    config.classifier_dropout = 0.0
    config.hidden_dropout = "0"
    config.summary_dropout_prob = 0.0
    model = load_valuehead_model(asked.folder, getattr(torch, asked.dtype), config, False)
    facts = {"stood_in": stood_in, "fell_back": hasattr(model, "v_head")}
    if facts["fell_back"]:
        from probe_trl_valuehead import wrapped

        found = wrapped(model)
        found.facts |= facts
        return found

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        return logits.squeeze(-1), list(range(ids.shape[1]))

    names = tuple(n for n in model.state_dict() if n.startswith(("score.", "classifier.")))
    return Loaded(model, names, values=values, facts=facts)


def _without_flash_attention() -> None:
    for auto in (transformers.AutoModelForTokenClassification, transformers.AutoModelForCausalLM):
        real = auto.from_pretrained

        def eager(*args: Any, real: Any = real, **more: Any) -> Any:
            return real(*args, **(more | {"attn_implementation": "eager"}))

        auto.from_pretrained = eager


if __name__ == "__main__":
    run("verl", load, roles=("critic",))
