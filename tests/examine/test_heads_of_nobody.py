"""A head that no trainer looks for, under a language model's class that lacks its own output, which a load makes up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from converter.cli import main
from converter.examine.doctor import DoctorRequest, examine
from healthy.models import Saved
from holes import transformers_notices
from oracle.bases import read_tensors, write_tensors
from selected import each_value

OUTPUTS = {"llama": "lm_head.weight", "gpt_neox": "embed_out.weight", "falcon": "lm_head.weight"}


@pytest.mark.parametrize(("kind", "head"), each_value(OUTPUTS.keys(), ["classifier", "reward_head", "regression_head"]))
def test_the_output_that_is_missing_is_named_and_nothing_copies_the_folder(
    kind: str, head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(tmp_path / kind)
    tensors = {n: t for n, t in read_tensors(folder).items() if not n.startswith(("lm_head", "embed_out"))}
    write_tensors(folder, tensors | {f"{head}.weight": torch.randn(1, 32)})
    assert transformers_notices(folder)
    errors = {f.code: f.text for f in examine(DoctorRequest(str(folder))).findings if f.severity == "error"}
    assert set(errors) == {"tensors-missing"}
    assert OUTPUTS[kind] in errors["tensors-missing"]
    assert main(["reshard", str(folder), str(tmp_path / "out")]) == 3
    assert OUTPUTS[kind] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", OUTPUTS)
def test_such_a_head_is_still_read_where_its_class_becomes_one_that_has_it(kind: str, tmp_path: Path) -> None:
    folder = Saved("causal", kind, more=(("tie_word_embeddings", False),)).write(tmp_path / kind)
    tensors = {n: t for n, t in read_tensors(folder).items() if not n.startswith(("lm_head", "embed_out"))}
    head = torch.randn(1, 32)
    write_tensors(folder, tensors | {"reward_head.weight": head})
    out = tmp_path / "out"
    assert main(["convert", str(folder), str(out), "--to", "openrlhf", "--role", "reward", "-q"]) == 0
    assert not transformers_made_random(out)
    assert torch.equal(next(t for n, t in read_tensors(out).items() if t.shape == head.shape), head)


def transformers_made_random(folder: Path) -> list[str]:
    """What a load as a classifier lists as newly initialized."""
    import transformers

    named = transformers.AutoModelForSequenceClassification
    _, info = named.from_pretrained(folder, num_labels=1, output_loading_info=True)
    return list(info["missing_keys"])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_a_classifiers_head_under_a_name_of_ones_own_is_not_copied_as_it_is(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Saved("seqcls", kind).write(tmp_path / kind)
    tensors = read_tensors(folder)
    tensors["reward_head.weight"] = tensors.pop("score.weight")
    write_tensors(folder, tensors)
    assert transformers_notices(folder)
    for command in (["reshard", str(folder)], ["average", str(folder), str(folder)]):
        assert main([*command, str(tmp_path / "out"), "--dry-run"]) == 3
        assert "score.weight" in capsys.readouterr().err
    assert main(["convert", str(folder), str(tmp_path / "rm"), "--to", "trl", "--role", "reward", "-q"]) == 0
    assert not transformers_notices(tmp_path / "rm")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_a_bias_that_the_class_of_the_config_has_no_place_for_is_not_copied(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Saved("tokcls", kind).write(tmp_path / kind)
    named = (folder / "config.json").read_text()
    (folder / "config.json").write_text(named.replace("ForTokenClassification", "ForSequenceClassification"))
    assert transformers_notices(folder)
    assert main(["reshard", str(folder), str(tmp_path / "out"), "--dry-run"]) == 3
    assert "score.bias" in capsys.readouterr().err
