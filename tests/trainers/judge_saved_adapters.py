"""Merges what trainers saved (`save_adapters.py`) and compares it with what their live models said.

    python tests/trainers/judge_saved_adapters.py SCRATCH [--envs DIR]     writes saved_adapters.md

The environments are those of `run_trainers.py`. The exit code is 1 where a merged model says anything else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402
import transformers  # noqa: E402
from matrix import environment, python_of  # noqa: E402
from run_trainers import DEFAULT  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import converter  # noqa: E402
from converter.errors import Refused  # noqa: E402

TRAINERS = {
    "llamafactory": ("LLaMA-Factory 0.9.5", "`run_exp`, trained here"),
    "trl": ("TRL 1.12.0", "its trainers' `save_model`, trained here"),
    "openrlhf": ("OpenRLHF 0.11.2", "`DeepspeedStrategy.save_model`, without its engine"),
    "verl": ("verl 0.9.1", "`model_merger`'s `save_lora_adapter`"),
}
NEAR = {"openrlhf": 4e-3}
"""Relative distances; OpenRLHF holds its base in bf16, and its live model is not rounded to it."""

REFUSED = {
    ("llamafactory", "pissa"): ("adapter-base-moved", "PiSSA by a random SVD"),
    ("llamafactory", "pissa-converted"): ("adapter-base-moved", "the same; `pissa_converted` beside it is named"),
    ("openrlhf", "reward"): ("head-missing", "the head is not saved"),
    ("verl", "merger-alpha-lost"): ("no-op", "alpha 0 is recorded; `--lora-alpha` is asked for"),
}
"""What a trainer did not save, by the code that says so."""

RESULT = HERE / "saved_adapters.md"


def save(trainer: str, envs: Path, out: Path, home: Path) -> None:
    """Let a trainer save its cases."""
    script = [python_of(envs, trainer), HERE / "save_adapters.py", trainer, out]
    subprocess.run(script, env=environment(home), check=True, capture_output=True)


def judged(saved: Path, scratch: Path) -> dict[str, str]:
    """Of each case `merged`, the code of a refusal, or what is wrong."""
    cases = [p for p in sorted(saved.iterdir()) if (p / "live.safetensors").is_file() or (p / "not_made.txt").is_file()]
    return {home.name: _judged(saved, home, scratch / home.name) for home in cases}


def expected(trainer: str, found: dict[str, str]) -> dict[str, str]:
    """What should have come of each."""
    return {name: REFUSED.get((trainer, name), ("merged", ""))[0] for name in found}


def _judged(saved: Path, home: Path, out: Path) -> str:
    if (home / "not_made.txt").is_file():
        return f"not made: {(home / 'not_made.txt').read_text().strip().splitlines()[-1]}"
    try:
        converter.merge_lora(home / "adapter", out, base=saved / "base")
    except Refused as error:
        return error.code
    said = load_file(home / "live.safetensors")
    kind = next(k for k in ("logits", "rewards", "values") if k in said)
    distance = float((say(out, said["ids"], kind) - said[kind]).norm() / said[kind].norm())
    return "merged" if distance < NEAR.get(saved.name, 1e-5) else f"off by {distance:.2g}"


@torch.no_grad()
def say(folder: Path, ids: Any, kind: str) -> Any:
    """What the written model says, with every tensor from its files."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, told = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if told["missing_keys"] or told["mismatched_keys"]:
        raise ValueError(str(told))
    model.eval()
    if kind != "values":
        return model(input_ids=ids).logits
    held = {n: t.float() for p in folder.glob("*.safetensors") for n, t in load_file(p).items() if "v_head." in n}
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    head = held["v_head.summary.weight"], held["v_head.summary.bias"]
    return torch.nn.functional.linear(hidden, *head).squeeze(-1)


def row(trainer: str, found: dict[str, str]) -> str:
    """A trainer's line of the table."""
    title, how = TRAINERS[trainer]
    merged = ", ".join(name for name, what in found.items() if what == "merged")
    refused = "; ".join(f"{name}: {REFUSED[trainer, name][1]}" for name in found if (trainer, name) in REFUSED)
    return f"| {title} | {how} | {merged} | {refused} |"


def main() -> int:
    """Save, judge, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--envs", type=Path, default=DEFAULT)
    asked = parser.parse_args()
    lines, wrong = [], 0
    for trainer in TRAINERS:
        out = asked.scratch / "saved" / trainer
        save(trainer, asked.envs, out, asked.scratch)
        found = judged(out, asked.scratch / "merged" / trainer)
        lines.append(row(trainer, found))
        print(lines[-1], flush=True)
        for name, what in expected(trainer, found).items():
            if found[name] != what:
                wrong += 1
                print(f"{trainer} {name}: {found[name]}, not {what}", flush=True)
    if not wrong:
        head = ["trainer", "saved by", "merged to what the live model said", "refused"]
        RESULT.write_text("\n".join([f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *lines, ""]), "utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
