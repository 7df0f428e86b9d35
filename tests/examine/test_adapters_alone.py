"""An adapter without its base is judged by its config and its own layers; PEFT's own load is the judge of the harm."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converter.cli import main
from converter.errors import Refused
from converter.recipe.verbs.adapters import prune_lora
from healthy.adapters import WEIGHTS, Adapter, records
from healthy.findings import codes, serious
from holes import Sound, peft_notices
from selected import each_value

Tensors = dict[str, torch.Tensor]
LORA = {
    "llama": Adapter("alone-llama", settings={"target_modules": "all-linear"}),
    "gpt2": Adapter("alone-gpt2", kind="gpt2", settings={"target_modules": ["c_attn", "c_proj"]}),
    "gpt_neox": Adapter("alone-neox", kind="gpt_neox", settings={"target_modules": "all-linear"}),
    "ranks": Adapter("alone-ranks", settings={"target_modules": "all-linear", "r": 4,
                     "rank_pattern": {"layers.0.self_attn.q_proj": 2, "layers.1.mlp.up_proj": 8}}),
}  # fmt: skip
OTHERS = {
    "ia3": Adapter("alone-ia3", "IA3Config", settings={"target_modules": ["q_proj", "v_proj"],
                   "feedforward_modules": []}),
    "loha": Adapter("alone-loha-ranks", "LoHaConfig", settings={"target_modules": ["q_proj", "v_proj"], "r": 4,
                    "rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
    "oft": Adapter("alone-oft", "OFTConfig", settings={"target_modules": ["q_proj", "v_proj"], "oft_block_size": 8}),
    "vblora": Adapter("alone-vblora", "VBLoRAConfig", settings={"target_modules": ["q_proj", "v_proj"],
                      "vector_length": 8, "num_vectors": 16, "topk": 2}),
    "poly": Adapter("alone-poly", "PolyConfig", settings={"target_modules": ["q_proj", "v_proj"], "r": 2}),
    "waveft": Adapter("alone-waveft", "WaveFTConfig", settings={"target_modules": ["q_proj", "v_proj"],
                      "n_frequency": 8}),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def first(held: Tensors, pattern: str) -> str:
    return next(n for n in sorted(held) if re.search(pattern, n))


def module_gone(held: Tensors) -> str:
    name = first(held, r"\.1\.")
    module = re.sub(r"\.(lora_\w+\.weight|[^.]+(\.weight)?|poly_router\..*)$", "", name)
    for key in [n for n in held if n.startswith(f"{module}.")]:
        del held[key]
    return module.removeprefix("base_model.model.")


def cut(held: Tensors) -> str:
    name = first(held, r"\.1\..*lora_A")
    held[name] = held[name][:, : held[name].shape[1] // 2].clone()
    return name


def half_of_the_rank(held: Tensors) -> str:
    name = first(held, r"\.0\..*lora_B")
    held[name] = held[name][:, :1].clone()
    return name


def turned(held: Tensors) -> str:
    name = first(held, r"\.0\..*lora_A")
    held[name] = held[name].t().contiguous()
    return name


def of_integers(held: Tensors) -> str:
    name = max(held)
    held[name] = held[name].to(torch.int32)
    return name


def harm(sound: Sound, adapter: Adapter, out: Path, change: Callable[[Tensors], str]) -> tuple[Path, str]:
    """A harmed copy without its base, and the name that has to be reported; PEFT notices each but those of types."""
    source, base = sound.adapter(adapter)
    shutil.copytree(source, out)
    held = load_file(out / WEIGHTS)
    name = change(held)
    save_file(held, out / WEIGHTS, {"format": "pt"})
    assert change is of_integers or peft_notices(out, base)
    records(out, "nobody/has-it")
    return out, name


HARMS = {harm.__name__: harm for harm in (module_gone, cut, half_of_the_rank, turned, of_integers)}


@pytest.mark.parametrize(("change", "family"), each_value(HARMS, LORA.keys()))
def test_a_harmed_lora_without_its_base_is_named_and_not_written(
    family: str, change: Callable[[Tensors], str], sound: Sound, tmp_path: Path
) -> None:
    folder, name = harm(sound, LORA[family], tmp_path / "adapter", change)
    assert any(name in text for text in serious(folder))
    with pytest.raises(Refused):
        prune_lora(folder, tmp_path / "out", rank=1)
    assert main(["repair", str(folder), str(tmp_path / "out"), "-q"]) == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "method"), each_value({"module_gone": module_gone, "of_integers": of_integers}, OTHERS.keys())
)
def test_a_harmed_adapter_of_another_method_is_named_without_its_base(
    method: str, change: Callable[[Tensors], str], sound: Sound, tmp_path: Path
) -> None:
    folder, name = harm(sound, OTHERS[method], tmp_path / "adapter", change)
    assert any(name in text for text in serious(folder))


@pytest.mark.parametrize("adapter", [*LORA.values(), *OTHERS.values()], ids=str)
def test_a_sound_adapter_without_its_base_has_no_finding(adapter: Adapter, sound: Sound, tmp_path: Path) -> None:
    folder, _ = harm_nothing(sound, adapter, tmp_path / "adapter")
    assert serious(folder) == []


def harm_nothing(sound: Sound, adapter: Adapter, out: Path) -> tuple[Path, Path]:
    source, base = sound.adapter(adapter)
    shutil.copytree(source, out)
    records(out, "nobody/has-it")
    return out, base


@pytest.mark.parametrize("family", LORA)
@pytest.mark.parametrize("targets", [["nothing_here"], None])
def test_factors_that_the_config_does_not_target_are_named(
    family: str, targets: Any, sound: Sound, tmp_path: Path
) -> None:
    folder, _ = harm_nothing(sound, LORA[family], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    assert "adapter-untargeted" in codes(folder)
    assert main(["prune-lora", str(folder), str(tmp_path / "out"), "--rank", "1", "-q"]) == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_a_prompt_of_another_size_than_the_config_counts_is_named(
    name: str, rows: int, sound: Sound, tmp_path: Path
) -> None:
    settings = {"num_virtual_tokens": 4} | ({"encoder_hidden_size": 16} if name == "PromptEncoderConfig" else {})
    folder, _ = harm_nothing(sound, Adapter(f"alone-{name}", name, settings=settings), tmp_path / "adapter")
    assert serious(folder) == []
    held = load_file(folder / WEIGHTS)
    whole = torch.cat([held["prompt_embeddings"]] * 2)
    save_file({"prompt_embeddings": whole[:rows].clone()}, folder / WEIGHTS, {"format": "pt"})
    assert codes(folder) == ["adapter-inconsistent"]


def attention_in_some_layers(held: Tensors) -> Tensors:
    """Keys of a hybrid: of 12 layers every fourth has attention, the others have another mixer."""
    made: Tensors = {}
    for layer in range(12):
        module = "self_attn" if layer % 4 == 3 else "linear_attn"
        for name, value in held.items():
            if ".layers.0.self_attn." in name:
                made[name.replace(".layers.0.self_attn.", f".layers.{layer}.{module}.")] = value
    return made


@pytest.mark.parametrize("only", ["self_attn", "linear_attn", ""])
def test_layers_of_a_hybrid_lack_nothing(only: str, sound: Sound, tmp_path: Path) -> None:
    folder, _ = harm_nothing(sound, LORA["llama"], tmp_path / "adapter")
    made = attention_in_some_layers(load_file(folder / WEIGHTS))
    save_file({n: t.clone() for n, t in made.items() if only in n}, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    assert codes(folder) == []


@pytest.mark.parametrize("family", LORA)
def test_an_adapter_with_nan_is_not_pruned_without_its_base(family: str, sound: Sound, tmp_path: Path) -> None:
    folder, _ = harm_nothing(sound, LORA[family], tmp_path / "adapter")
    held = load_file(folder / WEIGHTS)
    held[first(held, "lora_B")][0, 0] = float("nan")
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(Refused) as refused:
        prune_lora(folder, tmp_path / "out", rank=1)
    assert refused.value.code == "nonfinite"


def emptied(pattern: str) -> Callable[[Tensors], str]:
    """A change that makes one factor zero."""

    def change(held: Tensors) -> str:
        name = first(held, pattern)
        held[name] = torch.zeros_like(held[name])
        return name

    return change


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
@pytest.mark.parametrize("family", LORA)
def test_a_factor_of_zeros_in_one_layer_is_named(family: str, factor: str, sound: Sound, tmp_path: Path) -> None:
    folder, _ = harm_nothing(sound, LORA[family], tmp_path / "adapter")
    assert serious(folder, deep=True) == []
    held = load_file(folder / WEIGHTS)
    name = emptied(rf"\.1\..*{factor}")(held)
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    (said,) = serious(folder, deep=True)
    assert said.startswith("changes-numbers suspicious-values") and name in said


def test_an_expert_that_no_token_reached_is_sound(sound: Sound, tmp_path: Path) -> None:
    folder, _ = harm_nothing(sound, LORA["llama"], tmp_path / "adapter")
    held = load_file(folder / WEIGHTS)
    for name in [n for n in held if ".mlp." in n]:
        for expert in (0, 1):
            value = held[name] if expert == 0 or "lora_A" in name else torch.zeros_like(held[name])
            held[name.replace(".mlp.", f".mlp.experts.{expert}.")] = value.clone()
        del held[name]
    save_file(held, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    targets = [*{n.split(".")[-3] for n in held}]
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
    assert serious(folder, deep=True) == []
