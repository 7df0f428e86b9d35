"""`converter.load`: a live model is filled from any source as from the folder that a conversion would have written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import converter
from converter.cli import main
from converter.shipped import shipped

FIXTURES = shipped("fixtures")
BASE = FIXTURES / "tiny-qwen2-base"
ADAPTER = FIXTURES / "tiny-reward-adapter"
STATE = FIXTURES / "tiny-reward-run" / "checkpoint-4" / "global_step4"
IDS = torch.arange(3, 23)[None]

Classifier = transformers.AutoModelForSequenceClassification
Causal = transformers.AutoModelForCausalLM


def built(auto: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of the folder's config with random values."""
    torch.manual_seed(1)
    return auto.from_config(transformers.AutoConfig.from_pretrained(folder), dtype=dtype).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def same_state(a: Any, b: Any) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) and one[n].dtype == two[n].dtype for n in one)


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def refused(code: str, source: Path, model: Any, **knobs: Any) -> converter.ConvertError:
    """The refusal; not one value of the model has changed."""
    before = snapshot(model)
    with pytest.raises(converter.ConvertError) as caught:
        converter.load(source, model, **knobs)
    assert caught.value.code == code, caught.value
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    return caught.value


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped adapter merged by the command line."""
    out = tmp_path_factory.mktemp("reward") / "rm"
    assert main(["merge-lora", str(ADAPTER), str(out), "--base", str(BASE), "-q"]) == 0
    return out


def test_a_causal_model_gives_the_logits_of_from_pretrained_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = built(Causal, BASE)
    before = list(Path.cwd().iterdir())
    done = converter.load(BASE, model)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert list(Path.cwd().iterdir()) == before
    loaded = Causal.from_pretrained(BASE)
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    assert set(done.filled) == set(model.state_dict())
    assert done.missing == done.unexpected == done.rounded == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_is_merged_into_a_reward_model_as_in_the_merged_folder(reward: Path, dtype: torch.dtype) -> None:
    model = built(Classifier, reward, dtype)
    done = converter.load(ADAPTER, model, base=BASE)
    loaded = Classifier.from_pretrained(reward, dtype=dtype)
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))
    assert len(done.measures) == 14
    assert [next(iter(s)) for s in done.recipe.steps_to_value()] == ["merge-lora"]


@pytest.mark.parametrize("place", ["tag", "run"])
def test_shards_of_a_run_are_gathered_and_merged_into_a_reward_model(place: str, reward: Path, tmp_path: Path) -> None:
    assert main(["gather", str(STATE), str(tmp_path / "rm"), "--emit", "merged", "--base", str(BASE), "-q"]) == 0
    model = built(Classifier, reward)
    source = STATE
    if place == "run":
        source = tmp_path / "run"
        source.mkdir()
        (source / "global_step4").symlink_to(STATE)
        (source / "latest").write_text("global_step4")
        (source / "adapter_config.json").write_bytes((STATE.parent / "adapter_config.json").read_bytes())
    converter.load(source, model, base=BASE)
    loaded = Classifier.from_pretrained(tmp_path / "rm")
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))


def test_a_head_is_remapped_on_the_way(reward: Path, tmp_path: Path) -> None:
    """A value model of transformers for token classification: what verl's critic is."""
    out = tmp_path / "critic"
    assert main(["convert", str(reward), str(out), "--to", "verl", "--role", "critic", "-q"]) == 0
    model = built(transformers.AutoModelForTokenClassification, out)
    converter.load(ADAPTER, model, to="verl", role="critic", base=BASE)
    loaded = transformers.AutoModelForTokenClassification.from_pretrained(out)
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))


def test_experts_are_stacked_as_transformers_stacks_them(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    assert any(".experts.3." in n for n in load_file(tmp_path / "moe" / "model.safetensors"))
    model = built(Causal, tmp_path / "moe", torch.float32)
    converter.load(tmp_path / "moe", model)
    loaded = Causal.from_pretrained(tmp_path / "moe")
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox", "llama", "opt", "falcon"])
def test_a_tied_model_of_each_family_is_filled_and_stays_tied(family: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, Any] = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "llama": {"intermediate_size": 48},
        "gpt_neox": {"intermediate_size": 48},
    }.get(family, {})
    given = {k: v for k, v in sizes.items() if not (family == "gpt2" and k in ("hidden_size", "num_hidden_layers"))}
    config = transformers.AutoConfig.for_model(family, **given, **more, tie_word_embeddings=True)
    torch.manual_seed(0)
    Causal.from_config(config).save_pretrained(tmp_path / "tied")
    model = built(Causal, tmp_path / "tied", torch.float32)
    converter.load(tmp_path / "tied", model)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loaded = Causal.from_pretrained(tmp_path / "tied")
    assert same_state(model, loaded)
    assert torch.equal(logits(model), logits(loaded))


def test_an_untied_model_gets_both_from_a_tied_folder(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(BASE)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    Causal.from_config(config).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    config.tie_word_embeddings = False
    model = Causal.from_config(config)
    converter.load(tmp_path / "tied", model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert torch.equal(
        model.lm_head.weight, load_file(tmp_path / "tied" / "model.safetensors")["model.embed_tokens.weight"]
    )


def test_a_bare_backbone_takes_names_with_and_without_its_prefix(tmp_path: Path) -> None:
    backbone = built(transformers.AutoModel, BASE)
    converter.load(BASE, backbone, allow=["load-unexpected"])
    assert same_state(backbone, transformers.AutoModel.from_pretrained(BASE))
    backbone.save_pretrained(tmp_path / "bare")
    causal = built(Causal, BASE)
    done = converter.load(tmp_path / "bare", causal, allow=["load-missing"])
    assert done.missing == ("lm_head.weight",)
    assert same_state(causal.model, backbone)


def test_a_module_that_holds_the_model_is_filled_too() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pretrained_model = built(Causal, BASE)

    wrapper = Wrapper()
    converter.load(BASE, wrapper)
    assert same_state(wrapper.pretrained_model, Causal.from_pretrained(BASE))


# Refusals


def test_a_head_that_the_source_lacks_is_refused_before_anything_changes(reward: Path) -> None:
    error = refused("load-unexpected", BASE, built(Classifier, reward))
    assert "lm_head.weight" in error.what
    error = refused("load-missing", BASE, built(Classifier, reward), allow=["load-unexpected"])
    assert "score.weight" in error.what
    assert error.exit_code == 3
    assert error.consent


def test_a_consent_keeps_the_head_of_the_model_and_is_recorded(reward: Path) -> None:
    model = built(Classifier, reward)
    head = model.score.weight.clone()
    done = converter.load(BASE, model, allow=["load-unexpected", "load-missing"])
    assert done.missing == ("score.weight",)
    assert done.unexpected == ("lm_head.weight",)
    assert torch.equal(model.score.weight, head)
    assert set(done.prepared.context.consents) == {"load-unexpected", "load-missing"}


def test_another_shape_is_refused_before_anything_changes(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(BASE)
    config.vocab_size += 1
    error = refused("load-shape", BASE, Causal.from_config(config))
    assert error.expected == "[385, 64]"
    assert error.got == "[384, 64]"


def test_rounding_to_a_narrower_dtype_needs_consent(tmp_path: Path) -> None:
    built(Causal, BASE, torch.float32).save_pretrained(tmp_path / "wide")
    model = built(Causal, BASE, torch.bfloat16)
    error = refused("load-rounds", tmp_path / "wide", model)
    assert "F32 to BF16" in error.what
    done = converter.load(tmp_path / "wide", model, allow="load-rounds")
    assert len(done.rounded) == len(model.state_dict())
    assert same_state(model, Causal.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16))


def test_a_value_that_overflows_in_the_models_dtype_is_no_success(tmp_path: Path) -> None:
    tensors = stored(BASE)
    tensors["model.norm.weight"][0] = 1e30
    (tmp_path / "large").mkdir()
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "large" / "config.json").write_bytes((BASE / "config.json").read_bytes())
    with pytest.raises(converter.VerificationFailed) as caught:
        converter.load(tmp_path / "large", built(Causal, BASE, torch.float16), allow=["load-rounds"])
    assert caught.value.code == "new-nonfinite"
    assert "model.norm.weight" in caught.value.what


def test_tied_names_with_different_values_are_refused_by_a_tied_model() -> None:
    config = transformers.AutoConfig.from_pretrained(BASE)
    assert "lm_head.weight" in stored(BASE)
    config.tie_word_embeddings = True
    refused("load-tied", BASE, Causal.from_config(config))


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    config = json.loads((BASE / "config.json").read_text()) | {"model_type": "llama"}
    given = {k: v for k, v in config.items() if k not in ("architectures", "layer_types")}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))
    refused("load-family", BASE, model)


def test_a_model_without_memory_is_refused(reward: Path) -> None:
    with torch.device("meta"):
        model = Causal.from_config(transformers.AutoConfig.from_pretrained(BASE))
    with pytest.raises(converter.Refused) as caught:
        converter.load(BASE, model)
    assert caught.value.code == "load-not-whole"


def test_the_source_is_refused_as_a_conversion_refuses_it(reward: Path) -> None:
    refused("zero3-empty-tensors", STATE.parent, built(Classifier, reward), base=BASE)
    refused("head-missing", BASE, built(Classifier, reward), to="openrlhf")
    refused("usage", BASE, built(Causal, BASE), label=0)
    with pytest.raises(converter.UsageError, match="a live torch model"):
        converter.load(BASE, {})  # type: ignore[arg-type]


def test_a_merge_that_changes_nothing_is_refused(tmp_path: Path, reward: Path) -> None:
    """As the command line refuses it: each lora_B is zero."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ADAPTER.iterdir():
        if file.is_file():
            (adapter / file.name).write_bytes(file.read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    zeros = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(zeros, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    refused("no-op", adapter, built(Classifier, reward), base=BASE)


# Memory

SCRIPT = """
import sys, threading, time
import torch
import converter

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(n.split()[1]) * 1024 for n in lines if n.startswith("RssAnon:"))

def model(layers, width):
    made = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    with torch.no_grad():
        return [p.fill_(0) for p in made.parameters()] and made

converter.load(sys.argv[1], model(2, 8))  # what is imported and allocated once is not part of a model's cost
large = model(int(sys.argv[3]), int(sys.argv[4]))
before, peak, going = anonymous(), 0, True

def watch():
    global peak
    while going:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
converter.load(sys.argv[2], large)
going = False
watcher.join()
assert all((p == 0.5).all() for p in large.parameters())
print(peak - before)
"""


def _plain_model(folder: Path, layers: int, width: int) -> Path:
    folder.mkdir()
    tensors = {f"{n}.weight": torch.full((width, width), 0.5, dtype=torch.bfloat16) for n in range(layers)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    """Anonymous pages beyond those of a model of 268 MB in fp32 whose four tensors are stored in bf16."""
    layers, width = 4, 4096
    small, large = _plain_model(tmp_path / "small", 2, 8), _plain_model(tmp_path / "large", layers, width)
    asked = [sys.executable, "-c", SCRIPT, str(small), str(large), str(layers), str(width)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) <= 4 * width * width, done.stdout
