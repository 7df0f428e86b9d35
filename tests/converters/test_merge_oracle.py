"""`merge-lora` against PEFT on seven families of models, tied and untied, in three dtypes, in one file and sharded.

PEFT's own merge is the oracle of `--numerics peft`, an fp64 computation from the files that of `best`, and the unmerged
PEFT model's forward pass that of what the output says. The expected values never come from the code under test.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import oracle
from oracle.bases import without_prefix
from oracle.command import merged
from oracle.expected import inputs_for
from selected import one_in

TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
"""Relative distance of logits that rounding the merged weights may cause; the largest measured are a third of it."""

KINDS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and one adapter."""

    family: str
    dtype: str
    tied: bool
    sharded: bool
    kind: str

    def __str__(self) -> str:
        tie = "tied" if self.tied else "untied"
        return f"{self.family}-{self.dtype}-{tie}-{'sharded' if self.sharded else 'one'}-{self.kind}"


def covering() -> Iterator[Case]:
    """Each family, and every two values of two of the others together; the other products are in the slow run."""
    families = list(oracle.FAMILIES)
    for turn, (dtype, kind) in enumerate(itertools.product(oracle.DTYPES, KINDS)):
        yield Case(families[turn % len(families)], dtype, turn % 2 == 1, turn in (1, 2, 4, 6, 8), kind)
    for dtype, kind in zip(oracle.DTYPES, KINDS, strict=True):
        yield Case("gpt2-plain", dtype, tied=True, sharded=False, kind=kind)  # the original gpt2 is tied


def everything() -> Iterator[Case]:
    for values in itertools.product(oracle.FAMILIES, oracle.DTYPES, (False, True), (False, True), KINDS):
        yield Case(*values)


COVERING = list(covering())
REST = [c for c in everything() if c not in COVERING]


@dataclasses.dataclass(frozen=True)
class Merge:
    """A case carried out: by PEFT, and by both modes of the command."""

    case: Case
    base: oracle.Base
    adapter: Path
    expected: dict[str, Any]
    peft: Path
    best: Path


def carry_out(case: Case, folder: Path) -> Merge:
    family = case.family.removesuffix("-plain")
    base = oracle.make_base(folder / "base", family, dtype=case.dtype, tied=case.tied, sharded=case.sharded)
    adapter = oracle.make_adapter(folder / "adapter", base, **KINDS[case.kind])
    expected = oracle.peft_merge(base, adapter)
    if case.family == "gpt2-plain":
        plain = without_prefix(base, folder / "plain")
        masks = {k: v for k, v in oracle.read_tensors(plain.path).items() if k.endswith(".attn.bias")}
        expected = {k.removeprefix("transformer."): v for k, v in expected.items()} | masks
        base = plain
    for numerics in ("peft", "best"):
        merged(adapter, folder / numerics, "--base", base.path, "--numerics", numerics)
    return Merge(case, base, adapter, expected, folder / "peft", folder / "best")


@pytest.fixture(
    scope="module",
    params=[*COVERING, *(pytest.param(c, marks=pytest.mark.slow) for c in REST)],
    ids=str,
)
def merge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Merge:
    return carry_out(request.param, tmp_path_factory.mktemp("merge"))


def test_every_pair_of_values_occurs() -> None:
    values = (oracle.DTYPES, (False, True), (False, True), KINDS)
    cases = [dataclasses.astuple(case)[1:] for case in COVERING]
    assert {case.family for case in COVERING} >= set(oracle.FAMILIES)
    for one, other in itertools.combinations(range(len(values)), 2):
        assert {(c[one], c[other]) for c in cases} >= set(itertools.product(values[one], values[other]))


def test_peft_numerics_give_the_bits_of_pefts_own_merge(merge: Merge) -> None:
    oracle.same_bits(oracle.read_tensors(merge.peft), merge.expected)


def test_best_numerics_are_never_farther_from_fp64_than_peft(merge: Merge) -> None:
    found = oracle.read_tensors(merge.best)
    reference = oracle.reference64(merge.base, [(merge.adapter, 1.0)])
    assert len(reference) == 2 * len(merge.base.targets)
    for name, exact in reference.items():
        ours = oracle.errors_against(found[name], exact)
        theirs = oracle.errors_against(merge.expected[name], exact)
        assert ours[0] <= theirs[0], f"{name}: largest error {ours[0]:.3g}, PEFT {theirs[0]:.3g}"
        assert ours[1] <= theirs[1], f"{name}: rms error {ours[1]:.3g}, PEFT {theirs[1]:.3g}"
    untouched = {k: v for k, v in oracle.read_tensors(merge.base.path).items() if k not in reference}
    oracle.same_bits({k: v for k, v in found.items() if k not in reference}, untouched)


def test_output_loads_whole_and_says_what_the_unmerged_peft_model_says(merge: Merge) -> None:
    expected = oracle.peft_logits(merge.base, merge.adapter)
    assert oracle.effect(merge.base, expected) > 10 * TOLERANCE[merge.case.dtype]
    found = oracle.logits(oracle.load_output(merge.best), inputs_for(merge.base))
    assert oracle.relative_difference(found, expected) < TOLERANCE[merge.case.dtype]


def test_output_keeps_the_bases_shards_order_config_and_size(merge: Merge) -> None:
    for out in (merge.peft, merge.best):
        assert oracle.read_config(out) == oracle.read_config(merge.base.path)
        assert [f.name for f in sorted(out.glob("*.safetensors"))] == [
            f.name for f in sorted(merge.base.path.glob("*.safetensors"))
        ]
        index = "model.safetensors.index.json"
        assert (out / index).exists() == merge.case.sharded
        if merge.case.sharded:
            found, expected = (json.loads((p / index).read_text()) for p in (out, merge.base.path))
            assert found["weight_map"] == expected["weight_map"]
            size = sum(t.numel() * t.element_size() for t in oracle.read_tensors(out).values())
            assert found["metadata"]["total_size"] == size
        for file in merge.base.path.glob("*.safetensors"):
            assert _order(out / file.name) == _order(file)


def _order(file: Path) -> list[str]:
    """Tensor names by offset, from the header's own JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: (header[name]["data_offsets"], name))


TALL: dict[str, dict[str, Any]] = {
    "llama-bfloat16": {"target_modules": ["embed_tokens", "lm_head", "up_proj", "down_proj"]},
    "llama-float32": {"target_modules": ["embed_tokens", "lm_head", "up_proj", "down_proj"]},
    "qwen2-float32": {"target_modules": ["embed_tokens", "up_proj", "down_proj"], "use_dora": True},
    "gpt2-bfloat16": {"target_modules": ["c_fc", "mlp.c_proj"]},
    "gpt2-float32": {"target_modules": ["c_fc", "mlp.c_proj"], "use_dora": True},
    "gpt_neox-float16": {"target_modules": ["lm_head", "dense_h_to_4h", "dense_4h_to_h"]},
}


@pytest.mark.parametrize("name", one_in(2, TALL))
def test_matrices_of_several_chunks_of_odd_height_have_the_same_bits(name: str, tmp_path: Path) -> None:
    """9001 and 9003 rows of 136: more than one chunk each, and no multiple of 64 left over."""
    family, dtype = name.split("-")
    base = oracle.make_base(tmp_path / "base", family, dtype=dtype, vocab=9001, intermediate=9003, hidden=136)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, r=8, lora_alpha=13, **TALL[name])
    expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "peft", "--base", base.path, "--numerics", "peft")
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)
    merged(adapter, tmp_path / "best", "--base", base.path)
    found = oracle.read_tensors(tmp_path / "best")
    for tensor, exact in oracle.reference64(base, [(adapter, 1.0)]).items():
        ours, theirs = (oracle.errors_against(t[tensor], exact) for t in (found, expected))
        assert ours[0] <= theirs[0], tensor
        assert ours[1] <= theirs[1], tensor


@pytest.mark.parametrize("settings", [("--jobs", "1"), ("--jobs", "2", "--memory", "400MB")], ids=["one", "two"])
def test_jobs_and_memory_do_not_change_a_bit(settings: tuple[str, ...], tmp_path: Path) -> None:
    base = oracle.make_base(tmp_path / "base", vocab=9001, intermediate=9003, hidden=136, sharded=False)
    adapter = oracle.make_adapter(tmp_path / "adapter", base, r=8, lora_alpha=13)
    expected = oracle.peft_merge(base, adapter)
    merged(adapter, tmp_path / "out", "--base", base.path, "--numerics", "peft", *settings)
    oracle.same_bits(oracle.read_tensors(tmp_path / "out"), expected)


def test_a_merge_leaves_the_number_of_torchs_threads_alone(tmp_path: Path) -> None:
    """A program that calls the converter goes on with what it had set; SVDs have other bits on other numbers."""
    import torch

    base = oracle.make_base(tmp_path / "base")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        merged(adapter, tmp_path / "out", "--base", base.path, "--jobs", "2")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_adapter_files_in_bfloat16_merge_as_peft_reads_them(tmp_path: Path) -> None:
    import torch

    base = oracle.make_base(tmp_path / "base", dtype="bfloat16")
    adapter = oracle.make_adapter(tmp_path / "adapter", base, dtype=torch.bfloat16)
    assert {t.dtype for t in oracle.adapters.adapter_tensors(adapter).values()} == {torch.bfloat16}
    expected = oracle.peft_merge(base, adapter)
    for numerics in ("peft", "best"):  # one adapter, one rounding: the modes agree here
        merged(adapter, tmp_path / numerics, "--base", base.path, "--numerics", numerics)
    oracle.same_bits(oracle.read_tensors(tmp_path / "peft"), expected)


def test_merging_to_float32_keeps_what_bfloat16_would_round_away(tmp_path: Path) -> None:
    import torch

    base = oracle.make_base(tmp_path / "base", dtype="bfloat16")
    adapter = oracle.make_adapter(tmp_path / "adapter", base)
    merged(adapter, tmp_path / "out", "--base", base.path, "--dtype", "float32")
    found = oracle.read_tensors(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.float32}
    for name, exact in oracle.reference64(base, [(adapter, 1.0)]).items():
        worst, _ = oracle.errors_against(found[name], exact)
        assert worst <= 2e-7, name
    expected = oracle.peft_logits(base, adapter)
    found_logits = oracle.logits(oracle.load_output(tmp_path / "out"), inputs_for(base))
    assert oracle.relative_difference(found_logits, expected) < TOLERANCE["float32"]
    assert oracle.read_config(tmp_path / "out")["dtype"] == "float32"
