"""What LLaMA-Factory loads from a folder for `stage: rm` and PPO: `load_model(..., add_valuehead=True)`.

See probe_common.
"""

from __future__ import annotations

from typing import Any

from probe_common import Loaded, run, stand_in_for
from probe_trl_valuehead import wrapped


def load(asked: Any) -> Loaded:
    """The value-head wrapper with what `value_head.safetensors` or `.bin` holds."""
    stood_in = stand_in_for(
        "av", "gradio", "librosa", "modelscope", "ray", "sse_starlette", "fastapi", "uvicorn", "PIL"
    )
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    given = {
        "model_name_or_path": asked.folder,
        "stage": "rm",
        "template": "empty",
        "infer_dtype": asked.dtype,
        "trust_remote_code": False,
    }
    model_args, _, finetuning_args, _ = get_infer_args(given)
    tokenizer = load_tokenizer(model_args)["tokenizer"]
    model = load_model(tokenizer, model_args, finetuning_args, is_trainable=False, add_valuehead=True)
    found = wrapped(model)
    found.facts["stood_in"] = stood_in
    return found


if __name__ == "__main__":
    run("llamafactory", load, roles=("reward", "critic"))
