"""Loads folders in whatever transformers runs this, and says whose values their embeddings have: `FOLDER...`.

Each folder has `pair.json`: the names of its input and its output embedding.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

for text in sys.argv[1:]:
    folder = Path(text)
    pair = json.loads((folder / "pair.json").read_text())
    stored = load_file(folder / "model.safetensors")
    said: object
    try:
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder)
        loaded = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        said = [next((n for n in pair if torch.equal(stored[n], weight)), "neither") for weight in loaded]
    except Exception as error:  # each folder is judged by itself
        said = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
