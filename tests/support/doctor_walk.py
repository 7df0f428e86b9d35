"""Where broken folders are looked at, and what came of a command that doctor printed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from breakages.sound import make_sound
from converter.examine.doctor import diagnoses


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of sound checkpoints, which are not changed."""
    root = tmp_path_factory.mktemp("sound")
    make_sound(root / "sound")
    return root / "sound"


@pytest.fixture
def here(sound: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder beside it, in which a user works."""
    folder = sound.parent / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


def code_of(key: str) -> str:
    """The code that a breakage is of: what follows it in the key tells breakages of one code apart."""
    return max((c for c in diagnoses() if key == c or key.startswith(f"{c}-")), key=len)


def expect_loaded(folder: Path, *, with_others: bool = False) -> None:
    """transformers or PEFT load it, and neither misses a key nor finds one that it does not know."""
    if (folder / "adapter_config.json").exists():
        expect_adapter(folder)
        return
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    if not hasattr(transformers, name) or (folder / "pytorch_model.bin").exists():
        return  # a class of the trainer's own, or names that only it reads
    _, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(keys for what, keys in found.items() if not (with_others and what == "unexpected_keys")), found


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def expect_adapter(folder: Path) -> None:
    """PEFT finds a place for every key, and a key for every place."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(folder)
    base = config.base_model_name_or_path
    if not base or not Path(base).exists():
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    result = set_peft_model_state_dict(get_peft_model(model, config), load_file(folder / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not [k for k in result.missing_keys if "lora_" in k]
