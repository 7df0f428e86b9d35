"""Every dialect read and written: values as transformers' backbone and the stored head give them, in fp64.

Each source goes to one hub (verl's token classification, which has a place for everything linear) and each target comes
from it, on disk, in four families; all pairs go there and back as lazy tensors, which must be the very same bytes.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import heads_zoo as zoo
from converter.converters.heads import matrix as head_matrix
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.known import dialects
from converter.errors import Refused
from heads_run import base_of, opened, remapped, same_bits, stored, written
from selected import each_facet

FAMILIES = list(zoo.CONFIGS)
LINEAR = [n for n, f in zoo.FORMS.items() if not f.mlp]
WRITTEN = [n for n in zoo.FORMS if dialects()[n].writable]
HUB = "hf-tokcls"
MOVES = ("hf-seqcls", "trl-vhead", "dschat", "trlx", "coati")
TOGETHER = [n for n in WRITTEN if n != "trlx"]


def cases(names: list[str]) -> list[tuple[str, str]]:
    """All dialects in a family with an untied head and one with a tied; in the other families those that rename."""
    some = {"llama": names, "gpt2": names}
    chosen = [
        (family, name) for family in FAMILIES for name in some.get(family, names) if family in some or name in MOVES
    ]
    return [(family, name) for family, name in chosen if family in zoo.FORMS[name].families]


def usual(every: list[tuple[str, str]]) -> list[Any]:
    """By default every dialect, every family, and what renames with both kinds of family; all pairs go below."""
    return each_facet(every, lambda c: c[1], lambda c: (c[0], c[1] in MOVES), name=lambda c: f"{c[0]}-{c[1]}")


@pytest.mark.parametrize(("family", "dialect"), usual(cases(LINEAR)))
def test_a_head_read_from_any_dialect_gives_the_live_model_s_values(family: str, dialect: str, tmp_path: Path) -> None:
    model, form = zoo.live(family), zoo.FORMS[dialect]
    bias = model.bias if form.bias else None
    source = zoo.save(form, model, tmp_path / "source", bias=bias)
    out = written(remapped(opened(source), HUB), tmp_path / "out")
    found = zoo.score(family, out, zoo.FORMS[HUB])
    torch.testing.assert_close(found, zoo.expected(model, bias=bias), rtol=1e-12, atol=1e-12)
    assert zoo.architecture(out) == zoo.STEM[family] + "ForTokenClassification"


@pytest.mark.parametrize(("family", "dialect"), usual(cases(WRITTEN)))
def test_a_head_written_in_any_dialect_gives_the_live_model_s_values_by_that_trainer_s_names(
    family: str, dialect: str, tmp_path: Path
) -> None:
    model, form = zoo.live(family), zoo.FORMS[dialect]
    bias = model.bias if form.bias or form.mlp else None
    source = zoo.save(zoo.FORMS[HUB], model, tmp_path / "source", bias=bias)
    base = opened(base_of(model, tmp_path / "base"))
    out = written(remapped(opened(source), dialect, base=base), tmp_path / "out")
    found = zoo.score(family, out, form)
    torch.testing.assert_close(found, zoo.expected(model, bias=bias), rtol=1e-12, atol=1e-12)
    if not form.architecture.startswith("{causal}"):
        assert zoo.architecture(out) in (zoo.filled(form.architecture, family), "RewardModel", "CriticModel")
    else:
        assert zoo.architecture(out) == zoo.CAUSAL[family]


def pairs() -> list[Any]:
    """Every pair of dialects and every family that has both; by default one of these, in turn."""
    found: list[Any] = []
    for turn, (source, target) in enumerate(itertools.permutations(TOGETHER, 2)):
        both = [f for f in FAMILIES if f in zoo.FORMS[source].families and f in zoo.FORMS[target].families]
        for number, family in enumerate(both):
            usual = number == turn % len(both)
            found.append(pytest.param(family, source, target, marks=() if usual else pytest.mark.slow))
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Checkpoint]:
    """One folder for each family and dialect that is written, with a bias where the head has one; and the bases."""
    root = tmp_path_factory.mktemp("heads")
    found = {}
    for family in FAMILIES:
        model = zoo.live(family)
        for name in TOGETHER:
            if family in zoo.FORMS[name].families:
                bias = model.bias if zoo.FORMS[name].bias else None
                folder = zoo.save(zoo.FORMS[name], model, root / f"{family}-{name}", bias=bias)
                found[family, name] = opened(folder)
        found[family, "base"] = opened(base_of(model, root / f"{family}-base"))
    return found


@pytest.mark.parametrize(("family", "source", "target"), pairs())
def test_there_and_back_is_the_same_bytes_wherever_both_ways_are_lossless(
    family: str, source: str, target: str, made: dict[tuple[str, str], Checkpoint]
) -> None:
    given, base = made[family, source], made[family, "base"]
    kind = head_matrix.cell(dialects()[source], dialects()[target]).kind
    if zoo.FORMS[source].bias and not zoo.FORMS[target].bias:
        with pytest.raises(Refused) as caught:
            remapped(given, target, base=base)
        assert (caught.value.code, kind) == ("head-bias", "B")
        return
    assert kind == "L"
    back = remapped(remapped(given, target, base=base), source, base=base)
    before, after = nodes(given), nodes(back)
    assert after.keys() == before.keys()
    changed = {n for n in after if after[n] != before[n]}
    # The output embedding comes back from the base: another file, the same bytes.
    assert changed <= {f"{zoo.OUTPUT(family)}.weight"}
    assert all(Context().equal(after[n], before[n]) for n in changed)


def nodes(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor as the bytes of a file that it is, those beside the weights too."""
    beside = {f"{file}:{n}": t for file, found in checkpoint.beside.items() for n, t in found.items()}
    return {**checkpoint.tensors, **beside}


@pytest.mark.parametrize("dialect", ["hf-seqcls", "hf-tokcls", "trl-vhead", "dschat"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_linear_head_comes_back_from_trlx_s_mlp_bit_by_bit(family: str, dialect: str, tmp_path: Path) -> None:
    model, form = zoo.live(family), zoo.FORMS[dialect]
    bias = model.bias if form.bias else None
    source = zoo.save(form, model, tmp_path / "source", bias=bias)
    base = opened(base_of(model, tmp_path / "base"))
    there = written(remapped(opened(source), "trlx", base=base), tmp_path / "trlx")
    found = zoo.score(family, there, zoo.FORMS["trlx"])
    torch.testing.assert_close(found, zoo.expected(model, bias=bias), rtol=1e-12, atol=1e-12)
    back = written(remapped(opened(there), dialect, base=base), tmp_path / "back")
    assert same_bits(stored(back, form), stored(source, form))


def kind_in_code(given: Checkpoint, target: str, base: Checkpoint) -> str:
    """What a conversion does with a head that has a bias, or a mean, of its own."""
    try:
        remapped(given, target, base=base)
    except Refused as error:
        return {"head-bias": "B", "head-not-linear": "X"}[error.code]
    return "E" if zoo.FORMS[target].mlp else "L"


@pytest.mark.parametrize("source", [n for n, f in zoo.FORMS.items() if "llama" in f.families])
def test_the_matrix_says_what_the_code_does(source: str, tmp_path: Path) -> None:
    model, form = zoo.live("llama"), zoo.FORMS[source]
    folder = zoo.save(form, model, tmp_path / "source", bias=model.bias if form.bias else None)
    given, base = opened(folder), opened(base_of(model, tmp_path / "base"))
    for target in WRITTEN:
        cell = head_matrix.cell(dialects()[source], dialects()[target])
        expected = {"=": "E" if form.mlp else "L"}.get(cell.kind, cell.kind)
        assert kind_in_code(given, target, base) == expected, target


@pytest.mark.parametrize("source", ["openrlhf", "openrlhf-old", "safe-rlhf"])
def test_the_matrix_says_what_becomes_of_mean_and_std(source: str, tmp_path: Path) -> None:
    model, form = zoo.live("llama"), zoo.FORMS[source]
    folder = zoo.save(form, model, tmp_path / "source")
    keys = {"mean": [1.5], "var": [4.0], "do_normalize": True} if source == "safe-rlhf" else {"mean": 1.5, "std": 2.0}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    given, base = opened(folder), opened(base_of(model, tmp_path / "base"))
    for target in WRITTEN:
        cell = head_matrix.cell(dialects()[source], dialects()[target], normalised=True)
        expected = {"=": "L", "S": "B"}.get(cell.kind, cell.kind)
        assert kind_in_code(given, target, base) == expected, target


def test_an_fp32_head_over_a_bf16_model_stays_fp32(tmp_path: Path) -> None:
    model = zoo.live("llama")
    head = dataclasses.replace(model, weight=model.weight.float() / 3, bias=model.bias.float() / 3)
    source = zoo.save(zoo.FORMS["trl-vhead"], head, tmp_path / "source", bias=head.bias)
    out = written(remapped(opened(source), "hf-tokcls"), tmp_path / "out")
    found = zoo.read_main(out, zoo.FORMS["hf-tokcls"])
    assert torch.equal(found["score.weight"], head.weight)
    assert found["score.weight"].dtype is torch.float32
    assert found["model.norm.weight"].dtype is torch.bfloat16


def test_a_backbone_that_was_saved_on_its_own_gets_its_prefix_beside_a_head(tmp_path: Path) -> None:
    model = zoo.live("gpt2")
    source = zoo.save(zoo.Form("", "score.weight"), model, tmp_path / "source")
    out = written(remapped(opened(source), "hf-tokcls"), tmp_path / "out")
    found = zoo.score("gpt2", out, zoo.FORMS["hf-tokcls"])
    torch.testing.assert_close(found, zoo.expected(model), rtol=1e-12, atol=1e-12)


def test_the_head_stays_where_it_stood_so_that_files_keep_their_numbers(tmp_path: Path) -> None:
    source = opened(zoo.save(zoo.FORMS["hf-seqcls"], zoo.live("llama"), tmp_path / "source", shards=5))
    first = {n: t for n, t in source.tensors.items() if n == "score.weight"}
    rest = {n: t for n, t in source.tensors.items() if n != "score.weight"}
    given = source.replace(tensors=first | rest, shards={**source.shards, "score.weight": "head.safetensors"})
    out = remapped(given, "openrlhf@0.5.2", role="critic")
    assert list(out.tensors) == ["value_head.weight", *rest]
    assert out.shards["value_head.weight"] == "head.safetensors"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_save_pretrained_wrote_comes_back_from_every_dialect_bit_by_bit(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, num_labels=1, **zoo.CONFIGS[family])
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "rm", max_shard_size="9KB")
    base = opened(base_of(zoo.live(family), tmp_path / "base"))
    source, before = opened(tmp_path / "rm"), zoo.read_main(tmp_path / "rm", zoo.FORMS["hf-seqcls"])
    for target in ("openrlhf", "hf-tokcls", "llamafactory", "dschat", "coati", "trlx"):
        there = opened(written(remapped(source, target, base=base), tmp_path / target))
        back = written(remapped(there, "hf-seqcls"), tmp_path / f"{target}-back")
        assert same_bits(zoo.read_main(back, zoo.FORMS["hf-seqcls"]), before), target
        loaded, info = AutoModelForSequenceClassification.from_pretrained(back, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.config.num_labels == 1
