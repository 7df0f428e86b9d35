"""What ms-swift loads from a folder as a reward or value model: its own decision of the task, then its own loader.

`SwiftRLHF._get_model_task_type` decides from args.json and config.json; `get_model_processor` loads. See probe_common.
"""

from __future__ import annotations

from typing import Any

from probe_common import Loaded, positions, run, stand_in_for


def load(asked: Any) -> Loaded:
    """The model of the task that ms-swift takes it for; one without a `score` has no head to report."""
    stood_in = stand_in_for(
        "fastapi", "uvicorn", "openai", "gradio", "oss2", "tensorboard", "nltk", "rouge", "zstandard", "binpacking",
        "cpm_kernels", "transformers_stream_generator", "tiktoken", "aiohttp", "charset_normalizer", "ray", "vllm",
        "deepspeed", "jieba", "qwen_vl_utils", "einops",
    )  # fmt: skip
    import torch
    from swift.model import get_model_processor
    from swift.pipelines.train.rlhf import SwiftRLHF

    task, labels = SwiftRLHF._get_model_task_type(asked.folder)
    model, _ = get_model_processor(
        asked.folder,
        torch_dtype=getattr(torch, asked.dtype),
        task_type=task,
        num_labels=labels,
        device_map="cpu",
        attn_impl="eager",
    )
    facts = {"task_type": task, "num_labels": labels, "stood_in": stood_in}
    names = tuple(n for n in model.state_dict() if n.startswith("score."))
    if not names:
        raise ValueError(f"ms-swift took this for task_type {task!r}: {type(model).__name__} has no score head")

    def rewards(ids: Any, mask: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
        return model.score(hidden).squeeze(-1), list(range(ids.shape[1]))

    return Loaded(model, names, rewards, values, facts=facts)


if __name__ == "__main__":
    run("ms-swift", load, roles=("reward", "critic"))
