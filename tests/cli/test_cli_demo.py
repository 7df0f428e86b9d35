"""`demo`, shipped recipes by name, and `reshard`: from any folder, on the shipped checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oracle
from converter.shipped import shipped
from oracle.bases import quiet
from oracle.command import listing, run
from places import REPOSITORY

FIXTURES = shipped("fixtures")
BASE = FIXTURES / "tiny-qwen2-base"
ADAPTER = FIXTURES / "tiny-reward-adapter"
RUN = FIXTURES / "tiny-reward-run"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Told:
    """The demo, told once for several tests: its screen, and what it prints with `--json` the second time."""

    here: Path
    screen: str
    seconds: float
    first: dict[str, str]
    value: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.here / "rlhf-convert-demo"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        begun = time.monotonic()
        ran = run("demo")
        seconds = time.monotonic() - begun
        assert ran.code == 0, ran.err
        first = listing(folder)
        again = run("demo", "--json")
        assert again.code == 0, again.err
    return Told(folder, ran.out, seconds, first, json.loads(again.out))


def test_the_demo_tells_the_whole_story_in_under_a_minute(told: Told) -> None:
    assert told.seconds < 60
    headings = [line[:2] for line in told.screen.splitlines() if line[:1].isdigit() and line[1:3] == ". "]
    assert headings == ["1.", "2.", "3.", "4.", "5.", "6."]
    broken, repaired = "./rlhf-convert-demo/tiny-reward-run/checkpoint-4", "./rlhf-convert-demo/repaired"
    assert f"$ rlhf-convert repair {broken} {repaired}" in told.screen
    assert f"$ rlhf-convert merge-lora {repaired} ./rlhf-convert-demo/rm" in told.screen
    # In this order: the fault, what PEFT says, the repair, and that PEFT has nothing to say any more.
    words = ["zero3-empty-tensors", "with shape torch.Size([0])", f"wrote    {repaired}", "loads, and misses nothing"]
    places = [told.screen.find(each) for each in words]
    assert min(places) > 0
    assert places == sorted(places)
    assert "16 of 16 pairs ranked right" in told.screen
    assert "The merged model is in ./rlhf-convert-demo/rm" in told.screen
    assert sorted(p.name for p in told.here.iterdir()) == ["rlhf-convert-demo"]


def test_what_peft_says_in_the_demo_is_what_it_says_without_us(told: Told) -> None:
    import peft
    import transformers

    with quiet():
        load = transformers.AutoModelForSequenceClassification.from_pretrained
        with pytest.raises(RuntimeError) as error:
            peft.PeftModel.from_pretrained(load(BASE, num_labels=1), RUN / "checkpoint-4")
        repaired = peft.PeftModel.from_pretrained(load(BASE, num_labels=1), told.folder / "repaired")
    before = told.value["before"]
    assert before["loads"] is False
    assert sorted(before["lines"][1:]) == sorted(str(error.value).splitlines()[1:])
    assert told.value["after"] == {"loads": True, "lines": []}
    assert not any(p.numel() == 0 for p in repaired.parameters())


def test_the_repaired_adapter_of_the_demo_is_the_live_one(told: Told) -> None:
    """Digests of the live parameters, gathered while DeepSpeed trained them."""
    import torch

    wanted = json.loads((RUN / "fixture.json").read_text())["training"]["live_sha256"]
    found = oracle.read_tensors(told.folder / "repaired")
    digests = {n: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in found.items()}
    assert digests == {n.replace(".default", "").replace(".modules_to_save", ""): d for n, d in wanted.items()}
    assert sum(t.numel() == 0 for t in oracle.read_tensors(RUN / "checkpoint-4").values()) == 24


def test_the_demo_s_rewards_are_those_recorded_at_training(told: Told) -> None:
    recorded = json.loads((RUN / "fixture.json").read_text())["training"]["held_out"]
    scores = told.value["scores"]
    assert len(scores) == len(recorded)
    for score, pair in zip(scores, recorded, strict=True):
        assert score["merged"] == pytest.approx([pair["chosen_reward"], pair["rejected_reward"]], abs=0.02)


def test_the_demo_can_be_repeated_and_keeps_out_of_other_folders(told: Told, here: Path) -> None:
    assert listing(told.here) == told.first
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years of work")
    ran = run("demo", "--out", "mine")
    assert ran.code == 3
    assert [p.name for p in (here / "mine").iterdir()] == ["thesis.txt"]


def test_a_tampered_demo_model_is_noticed(told: Told, here: Path) -> None:
    """What the demo claims, it checks: a merge of another adapter does not score as recorded."""
    from converter.cli.tell.demo import score
    from converter.errors import VerificationFailed

    weights = Path(shutil.copytree(told.folder / "rm", here / "rm"))
    tensors = oracle.read_tensors(weights)
    tensors["score.weight"] = tensors["score.weight"] * 1.05
    for file in weights.glob("model*.safetensors*"):
        file.unlink()
    oracle.write_tensors(weights, tensors)
    with pytest.raises(VerificationFailed):
        score(weights, RUN)


def test_the_recipe_merge_reward_lora_makes_a_reward_model(here: Path) -> None:
    ran = run("run", "merge-reward-lora", "rm", "--input", f"adapter={ADAPTER}", "--input", f"source={BASE}")
    assert ran.code == 0, ran.err
    assert run("merge-lora", ADAPTER, "by-verb", "--base", BASE).code == 0
    oracle.same_bits(oracle.read_tensors(here / "rm"), oracle.read_tensors(here / "by-verb"))
    assert oracle.read_config(here / "rm")["architectures"] == ["Qwen2ForSequenceClassification"]


def test_the_recipe_merge_reward_lora_finds_the_recorded_base(here: Path) -> None:
    shutil.copytree(BASE, here / "tiny-qwen2-base")
    ran = run("run", "merge-reward-lora", "rm", "--input", f"adapter={ADAPTER}")
    assert ran.code == 0, ran.err
    assert "(as recorded)" in ran.out


def test_the_recipe_merge_two_adapters_is_the_weighted_sum_rounded_once(here: Path) -> None:
    base = oracle.make_base(here / "base", dtype="bfloat16")
    first = oracle.make_adapter(here / "first", base, seed=1)
    second = oracle.make_adapter(here / "second", base, seed=2)
    given = [f"--input={name}={path}" for name, path in (("first", first), ("second", second), ("source", base.path))]
    ran = run("run", "merge-two-adapters", "mixed", *given)
    assert ran.code == 0, ran.err
    expected = oracle.reference64(base, [(first, 0.5), (second, 0.5)])
    found, before = oracle.read_tensors(here / "mixed"), oracle.read_tensors(base.path)
    assert expected
    oracle.same_bits(
        {n: t for n, t in found.items() if n not in expected}, {n: t for n, t in before.items() if n not in expected}
    )
    for name, exact in expected.items():
        # bf16 keeps 8 bits: half a unit in the last place of the exact sum, and what fp32 adds to it.
        assert ((found[name].double() - exact).abs() <= exact.abs() * 2**-8 * 1.001 + 1e-9).all(), name


def test_the_recipe_reshard_bf16_casts_and_packs(here: Path) -> None:
    import torch

    base = oracle.make_base(here / "base", dtype="float32", sharded=True)
    ran = run("run", "reshard-bf16", "out", "--input", f"source={base.path}")
    assert ran.code == 0, ran.err
    expected = {name: t.to(torch.bfloat16) for name, t in oracle.read_tensors(base.path).items()}
    oracle.same_bits(oracle.read_tensors(here / "out"), expected)
    assert sorted(p.name for p in (here / "out").glob("*.safetensors*")) == ["model.safetensors"]


def test_reshard_keeps_names_values_config_and_tokenizer(here: Path) -> None:
    ran = run("reshard", BASE, "out", "--max-shard-size", "100KB")
    assert ran.code == 0, ran.err
    oracle.same_bits(oracle.read_tensors(here / "out"), oracle.read_tensors(BASE))
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ):
        assert (here / "out" / name).read_bytes() == (BASE / name).read_bytes()
    index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in oracle.read_tensors(BASE).values())
    files = sorted((here / "out").glob("*.safetensors"))
    assert len(files) == 4
    assert all(f.stat().st_size < 104_000 for f in files)
    oracle.load_output(here / "out")


def test_reshard_of_a_pickled_adapter_makes_safetensors_of_it(here: Path) -> None:
    before = load_file(ADAPTER / "adapter_model.safetensors")
    (here / "pickled").mkdir()
    (here / "pickled" / "adapter_config.json").write_bytes((ADAPTER / "adapter_config.json").read_bytes())
    torch.save(before, here / "pickled" / "adapter_model.bin")
    ran = run("reshard", "pickled", "out")
    assert ran.code == 0, ran.err
    after = load_file(here / "out" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)


def test_the_options_of_run_override_the_recipe_s_output(here: Path) -> None:
    ran = run(
        "run", "reshard-bf16", "--print-recipe", "--max-shard-size", "1MB", "--layout", "preserve", "--dtype", "fp16"
    )
    assert ran.code == 0
    assert "max-shard-size: 1000000" in ran.out
    assert "layout: preserve" in ran.out
    assert ran.out.count("dtype:") == 2


@pytest.mark.slow
def test_the_demo_works_from_an_installed_wheel_in_any_folder(here: Path) -> None:
    """A wheel laid out in a folder of its own, ahead of this checkout; the dependencies are this environment's."""
    root = REPOSITORY
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(here / "wheel"), str(root)]
    subprocess.run(pip, check=True, timeout=300)
    (wheel,) = (here / "wheel").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(here / "site")
    (here / "work").mkdir()
    code = "import converter, sys; print(converter.__file__); from converter.cli import main; sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=here / "work",
        env=os.environ | {"PYTHONPATH": str(here / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(here / "site"))
    assert (here / "work" / "rlhf-convert-demo" / "rm" / "rlhf-convert.json").is_file()
