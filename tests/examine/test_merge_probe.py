"""`merge-lora --probe`: how far a merge is from what was trained, against the live PEFT model and the written one."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import converter
import oracle
import quantised
from converter.errors import Refused, UsageError
from converter.shipped import shipped
from oracle.bases import quiet
from oracle.command import listing, merged, run

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
PAIRS = [
    {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "I can't say."},
    {"prompt": "Name a colour", "chosen": "Blue", "rejected": "Blue is not what I would name here"},
    {"prompt": "Is water wet", "chosen": "Yes, it is", "rejected": "no"},
]
SIZES = {"vocab": 384, "intermediate": 96, "hidden": 64}


@dataclass(frozen=True)
class Home:
    """A quantised base, the model that it was made from, adapters over the former, and pairs."""

    base: quantised.Folder
    original: oracle.Base
    pairs: Path
    adapters: dict[str, Path]


@pytest.fixture(scope="module", params=["nf4-nested", "fp8-blocks"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Home:
    folder = tmp_path_factory.mktemp("probe")
    base = quantised.make(folder / "made", request.param, vocab=384)
    original = oracle.make_base(folder / "original", dtype="bfloat16", **SIZES)
    for each in (base.path, base.whole.path, original.path):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(TOKENIZER / name, each)
    adapters = {t: oracle.make_adapter(folder / t, base.whole, task=t) for t in ("CAUSAL_LM", "SEQ_CLS")}
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return Home(base, original, folder / "pairs.jsonl", adapters)


def probe_of(out: Path) -> Any:
    return json.loads((out / "rlhf-convert.json").read_text())["probe"]


def sequences(pairs: list[dict[str, str]]) -> list[torch.Tensor]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    found = []
    for pair in pairs:
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            found.append(torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]))
    return found


def live(base: oracle.Base, adapter: Path, task: str) -> Any:
    """The adapter over whole weights as it is trained, its sums and activations in fp64."""
    more = {"num_labels": 1, "pad_token_id": 0} if task == "SEQ_CLS" else {}
    with quiet():
        return peft.PeftModel.from_pretrained(base.load(task=task, **more), adapter).double().eval()


def written(folder: Path, task: str) -> Any:
    kind = "AutoModelForSequenceClassification" if task == "SEQ_CLS" else "AutoModelForCausalLM"
    with quiet():
        return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def say(model: Any) -> torch.Tensor:
    return torch.cat([model(input_ids=ids).logits.flatten(0, -2) for ids in sequences(PAIRS)])


def test_divergence_of_a_language_model_is_the_one_from_the_live_adapter(home: Home, tmp_path: Path) -> None:
    adapter = home.adapters["CAUSAL_LM"]
    ran = merged(
        adapter, tmp_path / "out", "--base", home.base.path, "--dequantize", "--probe", home.pairs,
        "--against-base", home.original.path,
    )  # fmt: skip
    merged(adapter, tmp_path / "other", "--base", home.original.path)
    trained = say(live(home.base.whole, adapter, "CAUSAL_LM"))
    found = probe_of(tmp_path / "out")
    for side, folder in (("merge", "out"), ("other", "other")):
        own = say(written(tmp_path / folder, "CAUSAL_LM"))
        logs = trained.log_softmax(-1), own.log_softmax(-1)
        divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
        expected = {
            "kl_mean": float(divergence.mean()), "kl_max": float(divergence.max()),
            "logits_relative": float((own - trained).norm() / trained.norm()),
            "logits_max": float((own - trained).abs().max()), "tokens": len(trained),
            "first_changed": int((own.argmax(-1) != trained.argmax(-1)).sum()),
        }  # fmt: skip
        assert found[side] == pytest.approx(expected, rel=2e-3)
    assert (found["nearer"], found["trained_over"], found["is_quantised"]) == ("merge", "base", True)
    assert torch.is_grad_enabled(), "what a caller trains afterwards has gradients"
    assert "nearer to what was trained: this merge, by" in ran.text
    assert "as QLoRA trains it" in ran.text


def test_drift_of_rewards_is_the_one_from_the_live_adapter(home: Home, tmp_path: Path) -> None:
    adapter = home.adapters["SEQ_CLS"]
    merged(
        adapter, tmp_path / "out", "--base", home.original.path, "--probe", home.pairs, "--against-base", home.base.path
    )
    trained = say(live(home.base.whole, adapter, "SEQ_CLS")).flatten()
    own = say(written(tmp_path / "out", "SEQ_CLS")).flatten()
    margins = [x[::2] - x[1::2] for x in (own, trained)]
    found = probe_of(tmp_path / "out")
    expected = {
        "max": float((own - trained).abs().max()), "mean": float((own - trained).abs().mean()),
        "pairs_flipped": int(((margins[0] > 0) != (margins[1] > 0)).sum()),
        "margin_shift": float((margins[0] - margins[1]).mean()), "margin": float(margins[1].mean()),
    }  # fmt: skip
    assert found["merge"] == pytest.approx(expected, rel=2e-3)
    assert found["other"]["mean"] < found["merge"]["mean"] / 5
    assert (found["nearer"], found["trained_over"]) == ("other", "against-base")


def test_a_model_that_memory_does_not_hold_gives_the_same_figures(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = home.adapters["CAUSAL_LM"]
    (tmp_path / "texts.txt").write_text("What is two and two?\n\nName a colour\n")
    told: list[str] = []

    def planned() -> Any:
        return converter.merge_lora(
            adapter, base=home.base.path, dequantize=True, probe=tmp_path / "texts.txt", told=told.append
        ).plan.provenance["probe"]

    whole = planned()
    assert (whole["entries"], told) == (2, [])
    monkeypatch.setattr("converter.examine.verify.merge_probe.HELD", 0)
    monkeypatch.setattr("converter.examine.verify.outputs.STRETCH", 64 * 8 * 100)
    in_parts = planned()
    assert in_parts["merge"] == pytest.approx(whole["merge"], rel=1e-6)
    assert any("2 of 2 texts" in line for line in told)


def test_the_recipe_does_what_the_flags_do(home: Home, tmp_path: Path) -> None:
    flags = ("--base", home.base.path, "--dequantize", "--probe", home.pairs, "--pairs", "2")
    more = ("--against-base", home.original.path)
    printed = run("merge-lora", home.adapters["SEQ_CLS"], tmp_path / "one", *flags, *more, "--print-recipe")
    (tmp_path / "recipe.yaml").write_text(printed.out)
    assert run("run", tmp_path / "recipe.yaml", tmp_path / "two").code == 0
    merged(home.adapters["SEQ_CLS"], tmp_path / "one", *flags, *more)
    assert probe_of(tmp_path / "two") == probe_of(tmp_path / "one")
    assert probe_of(tmp_path / "one")["entries"] == 2


def test_what_can_not_be_measured_is_refused_before_a_byte_is_written(home: Home, tmp_path: Path) -> None:
    adapter, base = home.adapters["CAUSAL_LM"], tmp_path / "base"
    shutil.copytree(home.original.path, base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    before = listing(tmp_path)
    with pytest.raises(Refused) as caught:
        converter.merge_lora(adapter, tmp_path / "out", base=base, probe=home.pairs)
    assert caught.value.code == "probe-unmeasured"
    with pytest.raises(UsageError, match="there is no --probe"):
        converter.merge_lora(adapter, tmp_path / "out", base=base, against_base=home.base.path)
    with pytest.raises(UsageError) as wrong:
        converter.merge_lora(adapter, tmp_path / "out", base=home.original.path, probe=base / "config.json")
    assert wrong.value.code == "probe-line"
    assert listing(tmp_path) == before
