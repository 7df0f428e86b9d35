"""`rlhf-convert demo`: the whole story on small checkpoints that real trainers' code wrote.

A reward model was trained under ZeRO-3 and saved without gathering: most of its tensors are `torch.Size([0])`. PEFT is
asked what it says to that while the demo runs, before and after the repair; nothing of it is written down here.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converter.cli.options import Conversion as Flags
from converter.cli.options import Display
from converter.cli.run import merge as merging
from converter.cli.run import repair as repairing
from converter.cli.run.folder import written
from converter.cli.run.hub import check_push, push_written
from converter.cli.run.planned import written_lines
from converter.cli.tell.inspect import screen
from converter.diagnostic import Command, Next, Steps
from converter.errors import Refused, VerificationFailed
from converter.recipe.verbs.conversion import Conversion
from converter.recipe.verbs.merge import MergeRequest
from converter.recipe.verbs.repair import Repaired, RepairRequest
from converter.shipped import shipped
from converter.text import show

BASE, RUN, REPAIRED, MERGED = "tiny-qwen2-base", "tiny-reward-run", "repaired", "rm"
CHECKPOINT = f"{RUN}/checkpoint-4"

TOLERANCE = 0.05
"""Difference of two rewards that rounding to bf16 explains; they lie about 6.4 apart, kind from unkind."""


@dataclass(frozen=True)
class Scored:
    """A held-out pair of answers: rewards of the live model at the end of training, and those of the merged model."""

    prompt: str
    recorded: tuple[float, float]
    merged: tuple[float, float]

    @property
    def difference(self) -> float:
        """The larger of the two differences."""
        return max(abs(a - b) for a, b in zip(self.recorded, self.merged, strict=True))


@dataclass(frozen=True)
class Loading:
    """What PEFT said when it loaded an adapter over the base: its error and its warnings, line by line."""

    loads: bool
    lines: tuple[str, ...]


def demo_and_push(out: str, repo_id: str | None, options: Display) -> int:
    """Tell the story and push the merged model; whether the Hub will take it is asked first."""
    shown = Flags(as_json=options.as_json, verbose=options.verbose, quiet=options.quiet, push_to_hub=repo_id)
    try:
        check_push(shown)
    except Refused as error:
        if error.code in ("hub-token", "hub-unreachable"):
            error.next = Steps(error.next, "; or, ", *_without_account(repo_id))
        raise
    code = demo(out, options)
    push_written(_typed(out, MERGED), shown)
    return code


def _without_account(repo_id: str | None) -> tuple[Next, ...]:
    """The command that pushes to a Hub on this machine, which is a part of the tests."""
    hub = Path(__file__).parents[3] / "tests" / "support" / "fake_hub.py"
    where = "to a Hub on this machine" if hub.is_file() else "in a clone of the repository"
    script = os.path.relpath(hub) if hub.is_file() else "tests/support/fake_hub.py"
    command = Command("demo", ("--push", repo_id or "me/demo"))
    return f"without an account, {where}: ", Command("", (script, *command.words), program="python")


def demo(out: str, options: Display) -> int:
    """Tell the story; exit code 0 once the merged model scores like the one that was trained."""
    sink, begun = options.sink, time.monotonic()
    folder = Path(out).expanduser()
    lay_out(folder)
    base, broken, repaired, merged = (_typed(out, name) for name in (BASE, CHECKPOINT, REPAIRED, MERGED))

    sink.screen(["1. What training left: a base model, and a reward model over it that ZeRO-3 saved without gathering"])
    for path in (base, broken):
        sink.screen(["", f"$ {Command('inspect', (path,))}", *screen(path)])

    sink.screen(["", "2. What a trainer says to that: PEFT loads the adapter over the base", ""])
    before = load(folder / BASE, folder / CHECKPOINT)
    sink.screen(_said(before))

    writing = Flags(as_json=options.as_json, verbose=options.verbose, quiet=options.quiet, overwrite=True)
    sink.screen(["", "3. Repair it from the shards beside it, and ask PEFT again", ""])
    fixed = _repaired(broken, repaired, writing)
    after = load(folder / BASE, folder / REPAIRED)
    if not after.loads:
        raise _differs("PEFT does not load the repaired adapter", folder / REPAIRED, "no error", after.lines[0])
    sink.screen(["", *_said(after)])

    command = Command("merge-lora", (repaired, merged, "--base", base))
    sink.screen(["", "4. Merge", "", f"$ {command}"])
    asked = MergeRequest(repaired, base)
    done = written(merging.of_request(asked, merged), merged, writing, input_lines=merging.input_lines)
    sink.screen([*written_lines(done), ""])

    sink.screen(["5. Does it say the same? transformers loads it and scores answers that training never saw", ""])
    scored = score(folder / MERGED, folder / RUN)
    sink.screen([*_scores(scored), "", "6. What changed", "", *_changes(done), ""])
    sink.screen([f"Done in {time.monotonic() - begun:.0f} s. The merged model is in {merged}, the receipt beside it:"])
    sink.screen([f"  {merged}/rlhf-convert.json"])
    sink.screen(["Next:    your own checkpoint:  rlhf-convert inspect PATH"])
    sink.json(
        {
            "out": merged,
            "before": vars(before),
            "after": vars(after),
            "repair": _receipt(fixed),
            "receipt": _receipt(done),
            "scores": [vars(s) for s in scored],
        }
    )
    return 0


def _repaired(broken: str, repaired: str, writing: Flags) -> Conversion:
    """The adapter with its empty tensors filled from the shards beside it."""
    writing.sink.screen([f"$ {Command('repair', (broken, repaired))}"])
    own = repairing.of_request(RepairRequest(broken), repaired)
    done = written(own, repaired, writing, input_lines=repairing.input_lines)
    assert isinstance(done, Repaired)
    writing.sink.screen(written_lines(done))
    return done


def _receipt(done: Conversion) -> dict[str, Any]:
    assert done.receipt is not None
    return dict(done.receipt.content)


def lay_out(folder: Path) -> None:
    """Copy the shipped checkpoints to where the user can look at them.

    Raises:
        Refused: the folder holds something else (`output-exists`).
    """
    ours = {BASE, RUN, REPAIRED, MERGED}
    strange = (
        sorted(p.name for p in folder.iterdir() if p.name.partition(".")[0] not in ours) if folder.is_dir() else []
    )
    if strange or (folder.exists() and not folder.is_dir()):
        raise Refused(
            "output-exists",
            "the demo needs a folder of its own",
            where=str(folder),
            next=Command("demo", ("--out", "./another")),
        )
    for name in (BASE, RUN):
        source = shipped("fixtures") / name
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            target = folder / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.is_file() and filecmp.cmp(file, target, shallow=False)):
                shutil.copyfile(file, target)


def load(base: Path, adapter: Path) -> Loading:
    """Load an adapter with PEFT over a base as trainers do, and note what is said."""
    with _quiet_libraries() as said:
        import peft
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        said.clear()
        try:
            peft.PeftModel.from_pretrained(model, adapter)
        except (RuntimeError, ValueError, KeyError) as error:
            return Loading(False, tuple(f"{type(error).__name__}: {error}".splitlines()))
        return Loading(True, tuple(line for w in said for line in str(w.message).splitlines() if "key" in line))


@contextmanager
def _quiet_libraries() -> Iterator[list[warnings.WarningMessage]]:
    """Libraries that look for nothing on the Hub and print nothing; their warnings are collected."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        yield said


def _said(loading: Loading) -> list[str]:
    """The first lines; of many that are alike one is shown."""
    call = ">>> PeftModel.from_pretrained(base, adapter)"
    if loading.loads and not loading.lines:
        return [call, "loads, and misses nothing"]
    shown = [show(line.strip(), 300) for line in loading.lines[:2]]
    rest = len(loading.lines) - len(shown)
    return [call, *shown, *([f"... and {rest} more lines like it"] if rest else [])]


def _differs(what: str, where: Path, expected: str, got: str) -> VerificationFailed:
    advice = "report it with the output of `rlhf-convert env`"
    return VerificationFailed("demo-differs", what, where=str(where), expected=expected, got=show(got), next=advice)


def score(merged: Path, run: Path) -> list[Scored]:
    """Rewards of the held-out pairs by the merged model, beside those of the live model at the end of training.

    Raises:
        VerificationFailed: a reward is further from the recorded one than rounding explains (`demo-differs`).
    """
    pairs = json.loads((run / "fixture.json").read_text("utf-8"))["training"]["held_out"]
    model, tokenizer = _loaded(merged)
    scored = []
    for pair in pairs:
        rewards = tuple(_reward(model, tokenizer, pair["prompt"], pair[side]) for side in ("chosen", "rejected"))
        recorded = (pair["chosen_reward"], pair["rejected_reward"])
        scored.append(Scored(pair["prompt"], recorded, (rewards[0], rewards[1])))
    worst = max(scored, key=lambda s: s.difference)
    if worst.difference > TOLERANCE:
        raise _differs(
            "the merged model does not score like the one that was trained",
            merged,
            f"{worst.recorded[0]:.3f} and {worst.recorded[1]:.3f} for {worst.prompt!r}",
            f"{worst.merged[0]:.3f} and {worst.merged[1]:.3f}",
        )
    return scored


def _loaded(merged: Path) -> tuple[Any, Any]:
    """Model and tokenizer, loaded by transformers from the folder and nowhere else, in fp32."""
    with _quiet_libraries():
        import torch
        import transformers

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


def _changes(done: Conversion) -> list[str]:
    from converter.cli.lines import by_projection, line

    prepared = done.prepared
    assert done.receipt is not None
    base, after = prepared.opened["source"].config, prepared.checkpoint.config
    lines = [line("model", f"{_class(base)} -> {_class(after)}")]
    dropped = ", ".join(f"{n} ({why})" for n, why in prepared.checkpoint.dropped.items())
    added = ", ".join(n for n in prepared.checkpoint.tensors if n not in prepared.opened["source"].tensors)
    lines += [line("added", added)] if added else []
    lines += [line("dropped", dropped)] if dropped else []
    return [*lines, line("update", "by projection"), *by_projection(done.receipt.measures)]


def _class(config: Any) -> str:
    return ", ".join(config.get("architectures") or ["?"])


def _typed(out: str, name: str) -> str:
    """The path as a user would type it."""
    return f"{out.rstrip('/')}/{name}"
