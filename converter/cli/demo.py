"""`rlhf-convert demo`: the whole story on small checkpoints that real trainers' code wrote."""

from __future__ import annotations

import filecmp
import json
import os
import shlex
import shutil
import time
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from converter.cli.conversion import Written, write_recipe
from converter.cli.inspection import screen
from converter.cli.merge import Merge, head, merge_recipe
from converter.cli.options import Conversion, Display
from converter.errors import Refused, VerificationFailed

BASE, ADAPTER, MERGED = "tiny-qwen2-base", "tiny-reward-adapter", "rm"

TOLERANCE = 0.05
"""Difference of two rewards that rounding to bf16 explains; they lie about 5.6 apart, kind from unkind."""


@dataclass(frozen=True)
class Scored:
    """A held-out pair of answers: rewards recorded when the adapter was trained, and those of the merged model."""

    prompt: str
    recorded: tuple[float, float]
    merged: tuple[float, float]

    @property
    def difference(self) -> float:
        """The larger of the two differences."""
        return max(abs(a - b) for a, b in zip(self.recorded, self.merged, strict=True))


def demo(out: str, options: Display) -> int:
    """Tell the story; exit code 0 once the merged model scores like the one that was trained."""
    sink, begun = options.sink, time.monotonic()
    folder = Path(out).expanduser()
    lay_out(folder)
    base, adapter, merged = (_typed(out, name) for name in (BASE, ADAPTER, MERGED))

    sink.screen(["1. What is there: a base model, and a reward model that was trained over it as a LoRA adapter", ""])
    for path in (base, adapter):
        sink.screen([f"$ {shlex.join(['rlhf-convert', 'inspect', path])}", *screen(path), ""])

    asked = Merge(adapter, base)
    command = ["rlhf-convert", "merge-lora", adapter, merged, "--base", base]
    sink.screen(["2. Merge", "", f"$ {shlex.join(command)}"])
    merging = Conversion(as_json=options.as_json, verbose=options.verbose, quiet=options.quiet, overwrite=True)
    written = write_recipe(merge_recipe(asked, merging), merged, merging, head=head)
    assert written is not None
    sink.screen([*written.screen(), ""])

    sink.screen(["3. Does it say the same? transformers loads it and scores answers that training never saw", ""])
    scored = score(Path(merged).expanduser(), folder / ADAPTER)
    sink.screen([*_scores(scored), ""])
    sink.screen(["4. What changed", "", *_changes(written), ""])
    sink.screen([f"Done in {time.monotonic() - begun:.0f} s. The merged model is in {merged}, the receipt beside it:"])
    sink.screen([f"  {merged}/rlhf-convert.json"])
    sink.screen(["Next:    your own adapter:  rlhf-convert merge-lora ADAPTER OUT"])
    sink.json({"out": merged, "receipt": dict(written.receipt.content), "scores": [vars(s) for s in scored]})
    return 0


def lay_out(folder: Path) -> None:
    """Copy the shipped checkpoints to where the user can look at them.

    Raises:
        Refused: the folder holds something else (`output-exists`).
    """
    ours = {BASE, ADAPTER, MERGED}
    strange = (
        sorted(p.name for p in folder.iterdir() if p.name.partition(".")[0] not in ours) if folder.is_dir() else []
    )
    if strange or (folder.exists() and not folder.is_dir()):
        raise Refused(
            "output-exists",
            "the demo needs a folder of its own",
            where=str(folder),
            next="rlhf-convert demo --out ./another",
        )
    for name in (BASE, ADAPTER):
        source = resources.files("converter").joinpath("fixtures", name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        with resources.as_file(source) as path:
            for file in sorted(path.iterdir()):
                target = folder / name / file.name
                if not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
                    shutil.copyfile(file, target)


def score(merged: Path, adapter: Path) -> list[Scored]:
    """Rewards of the held-out pairs by the merged model, beside those recorded at training.

    Raises:
        VerificationFailed: a reward is further from the recorded one than rounding explains (`demo-differs`).
    """
    pairs = json.loads((adapter / "fixture.json").read_text("utf-8"))["training"]["held_out"]
    model, tokenizer = _loaded(merged)
    scored = []
    for pair in pairs:
        rewards = tuple(_reward(model, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        recorded = (pair["chosen_reward"], pair["rejected_reward"])
        scored.append(Scored(pair["prompt"], recorded, (rewards[0], rewards[1])))
    worst = max(scored, key=lambda s: s.difference)
    if worst.difference > TOLERANCE:
        raise VerificationFailed(
            "demo-differs",
            "the merged model does not score like the one that was trained",
            where=str(merged),
            expected=f"{worst.recorded[0]:.3f} and {worst.recorded[1]:.3f} for {worst.prompt!r}",
            got=f"{worst.merged[0]:.3f} and {worst.merged[1]:.3f}",
            next="report it with the output of `rlhf-convert env`",
        )
    return scored


def _loaded(merged: Path) -> tuple[Any, Any]:
    """Model and tokenizer, loaded by transformers from the folder and nowhere else, in fp32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        # transformers' and torch's deprecations are not the demo's story.
        warnings.simplefilter("ignore")
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        return load(merged, dtype=torch.float32).eval(), transformers.AutoTokenizer.from_pretrained(merged)


def _reward(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    import torch

    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    ]
    batch = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float(logits[0, 0])


def _scores(scored: list[Scored]) -> list[str]:
    lines = [
        f"{'':<26}  {'kind answer':>18}  {'unkind answer':>18}",
        f"{'':<26}" + f"  {'trained':>8}  {'merged':>8}" * 2,
    ]
    for each in scored[:4]:
        columns = (each.recorded[0], each.merged[0], each.recorded[1], each.merged[1])
        lines.append(f"{each.prompt:<26}" + "".join(f"  {value:>+8.3f}" for value in columns))
    right = sum(s.merged[0] > s.merged[1] for s in scored)
    worst = max(s.difference for s in scored)
    lines.append(
        f"{right} of {len(scored)} pairs ranked right; the largest difference is {worst:.4f}, the rounding of bf16"
    )
    return lines


def _changes(written: Written) -> list[str]:
    from converter.report import by_projection, line

    prepared = written.prepared
    base, after = prepared.opened["source"].config, prepared.checkpoint.config
    lines = [line("model", f"{_class(base)} -> {_class(after)}")]
    dropped = ", ".join(f"{n} ({why})" for n, why in prepared.checkpoint.dropped.items())
    added = ", ".join(n for n in prepared.checkpoint.tensors if n not in prepared.opened["source"].tensors)
    lines += [line("added", added)] if added else []
    lines += [line("dropped", dropped)] if dropped else []
    return [*lines, line("update", "by projection"), *by_projection(written.receipt.measures)]


def _class(config: Any) -> str:
    return ", ".join(config.get("architectures") or ["?"])


def _typed(out: str, name: str) -> str:
    """The path as a user would type it."""
    return f"{out.rstrip('/')}/{name}"
