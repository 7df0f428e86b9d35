"""What torchtune's checkpointer loads from a folder as a reward model, put into its classifier. See probe_common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probe_common import Loaded, last_attended, run, stand_in_for


def load(asked: Any) -> Loaded:
    """Llama or Mistral; the state is reported under the names that torchtune's own saving gives it."""
    stood_in = stand_in_for("torchdata", "kagglehub", "blobfile", "tiktoken", "wandb")
    import torch
    from torchtune import training
    from torchtune.models.llama2 import llama2_classifier
    from torchtune.rlhf.utils import reward_tune_to_hf
    from torchtune.training import FullModelHFCheckpointer

    folder = Path(asked.folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    files = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    out = Path(asked.out).parent / f"{Path(asked.out).name}.torchtune"
    reader = FullModelHFCheckpointer(str(folder), files, "REWARD", str(out))
    state = reader.load_checkpoint()[training.MODEL_KEY]
    shape = {
        "vocab_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": config["num_key_value_heads"],
        "embed_dim": config["hidden_size"],
        "max_seq_len": config["max_position_embeddings"],
        "intermediate_dim": config["intermediate_size"],
        "norm_eps": config["rms_norm_eps"],
    }
    model = llama2_classifier(1, **shape)
    model.to(getattr(torch, asked.dtype))
    model.load_state_dict(state)  # strict: a missing or an unknown key raises
    loaded = reward_tune_to_hf(model.state_dict(), shape["num_heads"], shape["num_kv_heads"], shape["embed_dim"])

    def values(ids: Any, mask: Any) -> tuple[Any, list[int]]:
        # torchtune takes no padding mask here: rows are computed alone, without their padding.
        out = torch.zeros(ids.shape)
        for row, kept in enumerate(mask.bool()):
            out[row, kept] = model(ids[row][kept][None]).squeeze(-1)[0]
        return out, list(range(ids.shape[1]))

    return Loaded(
        model,
        ("score.weight",),
        lambda ids, mask: last_attended(values(ids, mask)[0], mask),
        values,
        state=loaded,
        facts={"stood_in": stood_in},
    )


if __name__ == "__main__":
    run("torchtune", load, roles=("reward", "critic"))
