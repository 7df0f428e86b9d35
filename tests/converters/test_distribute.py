"""`reshard --to dcp`: what torch's loader puts into a live model is what transformers loads from the folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import transformers

import converter
from converter.cli import main
from converter.errors import ConvertError, Refused
from durability import fast_folder

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch", "ignore::FutureWarning:torch")

_SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
    "num_key_value_heads": 1,
}  # fmt: skip


def tied() -> Any:
    config = transformers.Qwen2Config(**_SIZES, tie_word_embeddings=True)
    return transformers.Qwen2ForCausalLM(config).bfloat16()


def renamed() -> Any:
    """A class whose names on disk are not those in memory."""
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = transformers.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **_SIZES},
        image_token_index=31,
    )
    return transformers.LlavaForConditionalGeneration(config)


def mixture() -> Any:
    config = transformers.MixtralConfig(**_SIZES, num_local_experts=2)
    return transformers.MixtralForCausalLM(config)


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    with fast_folder() as folder:
        yield folder


def loaded(folder: Path, model: Any, *under: str) -> dict[str, torch.Tensor]:
    """What torch's loader makes of a model's own state, whose values are others before."""
    state: Any = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    nest = state
    for word in reversed(under):
        nest = {word: nest}
    dcp.load(nest, checkpoint_id=str(folder), no_dist=True)
    found: dict[str, torch.Tensor] = state
    return found


@pytest.mark.parametrize(
    ("make", "under", "given"),
    [(tied, ("model",), None), (tied, ("app", "model"), "app.model"), (renamed, (), ".")],
    ids=["tied", "below two keys", "renamed, at the top"],
)
def test_a_models_own_state_is_loaded_bit_by_bit(make: Any, under: tuple[str, ...], given: str, place: Path) -> None:
    model = make()
    source, out = place / f"{make.__name__}-{len(under)}", place / f"{make.__name__}-{len(under)}-dcp"
    model.save_pretrained(source)
    done = converter.reshard(source, out, to="dcp", under=given, max_shard_size="4KB")
    assert len(done.plan.shards) > 1
    live = model.state_dict()
    found = loaded(out, model, *under)
    assert {n for n, t in live.items() if not torch.equal(t, found[n])} == set()
    metadata = dcp.FileSystemReader(out).read_metadata()
    assert metadata.state_dict_metadata.keys() == {".".join([*under, n]) for n in live}


def test_gather_makes_the_model_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tied()
    model.save_pretrained(place / "again")
    assert main(["reshard", str(place / "again"), str(place / "again-dcp"), "--to", "dcp"]) == 0
    assert f'load({{"model": model.state_dict()}}, checkpoint_id="{place}/again-dcp")' in capsys.readouterr().out
    converter.gather(place / "again-dcp", place / "back")
    found = transformers.AutoModelForCausalLM.from_pretrained(place / "back", dtype="auto")
    assert all(torch.equal(t, found.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_recipe_says_the_same(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tied().save_pretrained(place / "recipe")
    words = ["reshard", str(place / "recipe"), str(place / "x"), "--to", "dcp", "--under", "app.model"]
    assert main([*words, "--dtype", "fp32", "--print-recipe"]) == 0
    assert "- distribute:\n    under: app.model\n" in capsys.readouterr().out


def refused(source: Path, **given: Any) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        converter.reshard(source, to="dcp", **given)
    return caught.value


def test_what_transformers_makes_anew_on_loading_is_refused(place: Path) -> None:
    mixture().save_pretrained(place / "mixture")
    error = refused(place / "mixture")
    assert isinstance(error, Refused)
    assert error.code == "dcp-names"
    assert "experts" in error.what


def test_what_is_no_one_model_is_refused(place: Path) -> None:
    assert refused(Path(__file__).parents[2] / "fixtures" / "tiny-reward-adapter").code == "dcp-shape"
    tied().save_pretrained(place / "plain")
    assert refused(place / "plain", under="a/../b").code == "usage"
    assert main(["reshard", str(place / "plain"), str(place / "no"), "--under", "model"]) == 2
    assert main(["reshard", str(place / "plain"), str(place / "no"), "--to", "gguf"]) == 2
    assert main(["reshard", str(place / "plain"), str(place / "no"), "--to", "dcp", "--world-size", "2"]) == 2
    assert not (place / "no").exists()
