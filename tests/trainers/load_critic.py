"""Fills OpenRLHF's critic in memory, in whatever Python has OpenRLHF, and compares it with what its own loader loads.

`FOLDER BASE SOURCE...`: FOLDER is the critic that a conversion wrote; `converter.load` fills one with each SOURCE, an
adapter over BASE. Prints one JSON object a source.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "converter" / "examine" / "verify" / "probes"))

from probe_common import stand_in_for  # noqa: E402

stand_in_for("flash_attn", "ring_flash_attn", "deepspeed", "ray", "vllm", "torchdata", "bitsandbytes")

import torch  # noqa: E402
from openrlhf.models import get_llm_for_sequence_regression  # noqa: E402


def critic(folder: str) -> Any:
    return get_llm_for_sequence_regression(
        folder, "critic", normalize_reward=False, attn_implementation="eager", param_dtype="bf16"
    )


def scrambled(folder: str) -> Any:
    """The same class, every parameter of it random."""
    model = critic(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def values(model: Any) -> Any:
    ids = torch.arange(3, 43).reshape(2, 20)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return model.eval()(ids, action_mask=mask[:, :-1], attention_mask=mask)


def anonymous() -> int:
    """Bytes of this process's own pages."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(n.split()[1]) * 1024 for n in lines if n.startswith("RssAnon:"))


def filled(model: Any, source: str, base: str | None) -> tuple[Any, int]:
    """What `converter.load` says, and how many bytes the process grew by at most."""
    import converter

    before, peak, going = anonymous(), 0, True

    def watch() -> None:
        nonlocal peak
        while going:
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = converter.load(source, model, to="openrlhf", role="critic", base=base)
    finally:
        going = False
        watcher.join()
    return done, peak - before


def main(folder: str, base: str, sources: list[str]) -> None:
    reference = critic(folder)
    wanted, state = values(reference), reference.state_dict()
    for source in sources:
        model = scrambled(folder)
        was = values(model)
        done, grew = filled(model, source, base or None)
        found = model.state_dict()
        print(
            json.dumps(
                {
                    "class": type(model).__name__,
                    "differed": not torch.equal(was, wanted),
                    "names": sorted(found) == sorted(state),
                    "unequal": [n for n in state if not torch.equal(found[n], state[n])],
                    "values": torch.equal(values(model), wanted),
                    "finite": bool(torch.isfinite(wanted).all()) and float(wanted.float().std()) > 0,
                    "filled": len(done.filled),
                    "parameters": len(dict(model.named_parameters())),
                    "missing": done.missing,
                    "unexpected": done.unexpected,
                    "grew": grew,
                    "largest": max(p.numel() * p.element_size() for p in model.parameters()),
                    "size": sum(p.numel() * p.element_size() for p in model.parameters()),
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
