"""Dialects are data: every row of the table is there, versions mean what they meant, strangers add theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

import pytest
from safetensors.torch import load_file

import heads_zoo as zoo
from converter import plugins as registry
from converter.converters.heads import matrix as head_matrix
from converter.dialects import known
from converter.dialects.known import dialects, target
from converter.errors import Refused, UsageError
from oracle.command import run

ROWS = {
    1: "hf-seqcls", 2: "hf-tokcls", 3: "openrlhf", 4: "openrlhf-old", 5: "skyrl", 6: "trl-vhead", 7: "llamafactory",
    8: "dschat", 9: "dschat-old", 10: "trlx", 11: "trlx-rm", 12: "coati", 13: "safe-rlhf", 14: "torchtune",
    15: "ms-swift", 16: "verl-megatron", 17: "mcore-output-layer", 18: "areal-mcore", 19: "nemo-aligner", 20: "ultrarm",
    21: "starling34", 22: "internlm2-reward", 23: "score-mlp", 24: "grm", 25: "oasst", 26: "gated-multi-objective",
    27: "lm-head-row0",
}  # fmt: skip
REFUSED = {19, 26}

COLUMNS = [
    "hf-seqcls", "hf-tokcls", "openrlhf", "skyrl", "trl-vhead", "llamafactory", "dschat", "trlx", "coati", "safe-rlhf",
    "torchtune",
]  # fmt: skip
MATRIX = {
    "hf-seqcls": "= L L L Llm Llm L Elm L L L",
    "hf-tokcls": "B = B B Llm Llm B Elm L L B",
    "openrlhf": "L L = L Llm Llm L Elm L L L",
    "openrlhf + mean/std": "S L = S Llm Llm S Elm L L S",
    "skyrl": "L L L = Llm Llm L Elm L L L",
    "trl-vhead": "B L B B = L B E L L B",
    "llamafactory": "B L B B L = B E L L B",
    "dschat": "L L L L Llm Llm = Elm L L L",
    "trlx": "X X X X X X X = X X X",
    "coati": "B L B B Llm Llm B Elm = L B",
    "ultrarm": "L L L L Llm Llm L Elm L L L",
    "starling34": "L L L L Llm Llm L Elm L L L",
    "internlm2-reward": "X X X X X X X X X X X",
    "oasst": "B L B B Llm Llm B Elm L L B",
    "grm": "B L B B Llm Llm B Elm L L B",
    "score-mlp": "X X X X X X X Elm X X X",
    "grm-mlp": "X X X X X X X Elm X X X",
    "gated-multi-objective": "X X X X X X X X X X X",
    # The newest OpenRLHF loses mean and std under transformers 5, so they are folded in.
    "safe-rlhf + mean/std": "S L S S Llm Llm S Elm L = S",
    # A causal model has its own output embedding.
    "lm-head-row0": "L L L L L L L E L L L",
}
"""Section 5 of the survey from which the literals were written."""


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_survey_is_a_dialect_and_says_what_it_rests_on(row: int) -> None:
    found = dialects()[ROWS[row]]
    assert found.evidence
    assert found.head.missing
    assert bool(found.refused) == (row in REFUSED)


def test_every_literal_in_the_package_is_registered_under_its_own_name() -> None:
    folder = Path(known.__file__).parent
    literals = {p.stem for p in folder.glob("*.py")} - {"__init__", "spec", "known"}
    points = [p for p in registry.plug_ins([registry.DIALECTS]) if p.target.startswith("converter.")]
    assert {p.target.partition(":")[0].rpartition(".")[2] for p in points} == literals
    assert {p.name for p in points} == set(known.dialects())
    assert not [p for p in points if p.fault]


def test_no_two_entries_of_a_trainer_claim_one_version_in_one_role() -> None:
    claims: dict[tuple[str, str], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for dialect in dialects().values():
        for serves in dialect.serves:
            for role in serves.roles:
                span = known.numbers(serves.since), known.numbers(serves.until)
                claims.setdefault((serves.trainer, role), []).append(span)
    for spans in claims.values():
        ordered = sorted(spans)
        assert all(before[1] < after[0] for before, after in pairwise(ordered))


@pytest.mark.parametrize(
    ("asked", "role", "dialect", "version"),
    [
        ("openrlhf", "critic", "openrlhf", "0.11.2"),
        ("openrlhf@0.5.2", "critic", "openrlhf-old", "0.5.2"),
        ("openrlhf@0.5.3", "reward", "openrlhf-old", "0.5.3"),
        ("openrlhf@0.5.4", "reward", "openrlhf", "0.5.4"),
        ("openrlhf@0.10.3", "reward", "openrlhf", "0.10.3"),
        ("trl", "critic", "hf-seqcls", "1.12.0"),
        ("trl", "reward", "hf-seqcls", "1.13.0"),
        ("trl-valuehead", "critic", "trl-vhead", "1.12.0"),
        ("verl", "critic", "hf-tokcls", "0.9.1"),
        ("verl", "reward", "hf-seqcls", "0.9.1"),
        ("verl@0.7", "reward", "hf-tokcls", "0.7"),
        ("verl@0.8.1", "reward", "hf-tokcls", "0.8.1"),
        ("llamafactory", "reward", "llamafactory", "0.9.5"),
        ("deepspeed-chat", "critic", "dschat", ""),
        ("trlx", "critic", "trlx", "0.7.0"),
        ("colossalchat", "reward", "coati", ""),
        ("safe-rlhf", "critic", "safe-rlhf", ""),
        ("skyrl", "critic", "skyrl", "0.3.0"),
        ("areal", "critic", "hf-tokcls", "1.0.4"),
        ("areal-megatron", "critic", "areal-mcore", "1.0.4"),
        ("ms-swift", "reward", "ms-swift", "4.6.0"),
        ("nemo-rl", "reward", "hf-seqcls", ""),
        ("roll", "critic", "hf-tokcls", ""),
        ("vllm", "reward", "hf-seqcls", ""),
        ("openrlhf", "actor", "hf-causal", "0.11.2"),
    ],
)
def test_a_trainer_s_name_and_version_mean_a_dialect(asked: str, role: str, dialect: str, version: str) -> None:
    found = target(asked, role)  # type: ignore[arg-type]
    assert (found.dialect.name, found.version) == (dialect, version)


@pytest.mark.parametrize(
    ("asked", "role", "code", "says"),
    [
        ("nemo-rl", "critic", "trainer-unusable", "skips every tensor named score"),
        ("trl@1.13.0", "critic", "trainer-unusable", "PPO is gone"),
        ("trl-valuehead@1.13.0", "critic", "trainer-unusable", "no value head wrapper"),
        ("slime", "critic", "trainer-unusable", "sharded layout"),
        ("vllm", "critic", "trainer-role", "no critic"),
        ("skyrl", "reward", "trainer-role", "no reward"),
        ("ultrarm", "reward", "dialect-refused", "read, and not written"),
        ("gated-multi-objective", "reward", "dialect-refused", "gate computes from the prompt"),
    ],
)
def test_a_trainer_that_can_t_use_such_a_model_is_refused_with_the_reason(
    asked: str, role: str, code: str, says: str
) -> None:
    with pytest.raises(Refused, match=says) as caught:
        target(asked, role)  # type: ignore[arg-type]
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("asked", "code", "next"),
    [
        ("openrlfh", "unknown-trainer", "did you mean `openrlhf`?"),
        ("openrlhf@0.2.0", "trainer-version", "the same command with --to openrlhf@0.11.2"),
        ("openrlhf@99", "trainer-version", "the same command with --to openrlhf@0.11.2"),
        ("deepspeed-chat@1", "trainer-version", "the same command with --to deepspeed-chat"),
    ],
)
def test_an_unknown_trainer_or_version_is_a_usage_error_with_a_way_out(asked: str, code: str, next: str) -> None:
    with pytest.raises(UsageError) as caught:
        target(asked, "critic")
    assert (caught.value.code, str(caught.value.next)) == (code, next)


@pytest.mark.parametrize("row", MATRIX)
def test_the_matrix_says_what_the_survey_found(row: str) -> None:
    names = [t.name for t in head_matrix.targets()]
    cells = dict(zip(names, dict(head_matrix.rows())[row], strict=True))
    assert [str(cells[c]).replace(" ", "") for c in COLUMNS] == MATRIX[row].split()


def test_the_matrix_is_a_table_with_a_legend() -> None:
    text = head_matrix.markdown()
    assert "| openrlhf + mean/std |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    assert all(f"`{kind}`" in text for kind in "=LBSEX")


STRANGER = """
from converter.dialects.spec import ConfigRules, Dialect, Evidence, HeadSpec, Marks, Serves

DIALECT = Dialect(
    "acme",
    "Acme RL",
    reward=None,
    critic=HeadSpec("acme_value", bias="always"),
    config=ConfigRules(critic="AcmeCritic", sets=(("acme", True),), keys=("acme",)),
    marks=(Marks(("acme_value.weight", "acme_value.bias")),),
    serves=(Serves("acme", ("critic",), "1.0", "2.1", launch="acme train --critic {out}"),),
    evidence=(Evidence("experiment", "acme 2.1"),),
    traps=("acme is picky",),
)
"""


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stranger's package: one file and one entry point."""
    info = tmp_path / "site" / "acme-1.0.dist-info"
    info.mkdir(parents=True)
    (tmp_path / "site" / "acme_dialect.py").write_text(dedent(STRANGER))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rlhf_convert.dialects]\nacme = acme_dialect:DIALECT\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "acme_dialect", raising=False)
    dialects.cache_clear()
    yield
    dialects.cache_clear()


def test_a_third_party_adds_a_dialect_with_one_file_and_one_entry_point(tmp_path: Path, acme: None) -> None:
    model = zoo.live("llama")
    source = zoo.save(zoo.FORMS["hf-seqcls"], model, tmp_path / "rm")
    ran = run("rm-to-critic", source, tmp_path / "critic", "--to", "acme")
    assert ran.code == 0, ran.err
    assert f"acme train --critic {tmp_path / 'critic'}" in ran.text
    assert "acme is picky" in ran.text
    written = load_file(tmp_path / "critic" / "model.safetensors")
    assert written["acme_value.weight"].equal(model.weight)
    assert written["acme_value.bias"].tolist() == [0.0]
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert (config["architectures"], config["acme"]) == (["AcmeCritic"], True)

    back = run("critic-to-rm", tmp_path / "critic", tmp_path / "again", "--to", "transformers")
    assert back.code == 0, back.err
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == load_file(source / "model.safetensors").keys()
    assert "acme" not in json.loads((tmp_path / "again" / "config.json").read_text())


def test_a_stranger_s_broken_dialect_harms_no_other(tmp_path: Path, acme: None) -> None:
    (tmp_path / "site" / "acme_dialect.py").write_text("raise RuntimeError('no such luck')")
    assert "acme" not in dialects()
    assert "openrlhf" in dialects()
    ran = run("list", "--json")
    assert "no such luck" in {p["name"]: p for p in json.loads(ran.out)["plug_ins"]}["acme"]["fault"]
