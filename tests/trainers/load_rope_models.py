"""Loads folders in whatever transformers runs this, and saves what each says: `FOLDER...`, each named by its case."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch  # noqa: E402

from rope_models import load  # noqa: E402

for text in sys.argv[1:]:
    folder = Path(text)
    try:
        torch.save(load(folder.name, folder), folder / "said.pth")
    except Exception as error:  # each folder is judged by itself
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}")
