"""`verify --probe` with a data set on the Hub: the file is found, checked and scored, subset by subset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from converter.shipped import shipped
from fake_hub import FakeHub, running
from hub_here import client_of, run
from verify_folders import make_rm

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
ANSWERS = ("Four", "Blue and green", "Yes, it is wet", "no", "I would rather not say", "seven and one")
ROWS = [
    {
        "prompt": f"Question {i}", "chosen": a, "rejected": ANSWERS[(i + 1) % 6], "id": i,
        "subset": "alpacaeval-easy" if i < 4 else "hep-python",
    }
    for i, a in enumerate(ANSWERS)
]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
SET = "hf://datasets/allenai/reward-bench"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_rm(tmp_path_factory.mktemp("probe") / "rm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    with running(FakeHub()) as found, client_of(found, tmp_path):
        yield found


def verified(model: Path, probe: str) -> tuple[int, dict[str, object]]:
    done = run("verify", model, "--for", "trl", "--role", "reward", "--probe", probe, "--json")
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("name", [SET, f"{SET}/data", f"{SET}/data/filtered.jsonl", f"{SET}@main/data/filtered.jsonl"])
def test_the_rows_are_those_of_the_file_and_each_subset_has_its_share(name: str, hub: FakeHub, model: Path) -> None:
    hub.add(
        "datasets/allenai/reward-bench", {"data/filtered.jsonl": LINES, "README.md": b"#", "dataset_infos.json": b"{}"}
    )
    code, found = verified(model, name)
    assert code == 0
    rows = found["pairs"]
    assert isinstance(rows, list)
    assert [r["prompt"] for r in rows] == [r["prompt"] for r in ROWS]
    right = [r["chosen"] > r["rejected"] for r in rows]
    checks = found["checks"]
    assert isinstance(checks, list)
    subsets = [c["text"] for c in checks if c["label"] == "subset"]
    assert [t.partition(",")[0] for t in subsets] == [
        f"alpacaeval-easy: {sum(right[:4])} of 4",
        f"hep-python: {sum(right[4:])} of 2",
    ]


def test_parquet_of_a_data_set_is_read(hub: FakeHub, model: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    hub.add("datasets/allenai/reward-bench", {"data/filtered-0.parquet": (tmp_path / "rows.parquet").read_bytes()})
    _, found = verified(model, SET)
    assert [r["prompt"] for r in found["pairs"]] == [r["prompt"] for r in ROWS]  # type: ignore[attr-defined]


def test_of_several_files_one_has_to_be_named(hub: FakeHub, model: Path) -> None:
    hub.add("datasets/allenai/reward-bench", {"data/filtered.jsonl": LINES, "data/raw.jsonl": LINES})
    code, found = verified(model, SET)
    error = found["error"]
    assert (code, error["code"]) == (2, "probe-which")  # type: ignore[index]
    for name in error["expected"].split(", "):  # type: ignore[index]
        assert verified(model, name)[0] == 0


@pytest.mark.parametrize(
    ("name", "code"),
    [(f"{SET}-2", "hub-download"), (f"{SET}/other", "path-missing"), ("hf://datasets/allenai", "hub-repo-id")],
)
def test_what_is_not_there_is_said(name: str, code: str, hub: FakeHub, model: Path) -> None:
    hub.add("datasets/allenai/reward-bench", {"data/filtered.jsonl": LINES})
    done, found = verified(model, name)
    assert done in (2, 3)
    assert found["error"]["code"] == code  # type: ignore[index]


def test_bytes_that_are_not_those_that_the_hub_lists_are_refused(hub: FakeHub, model: Path) -> None:
    hub.add("datasets/allenai/reward-bench", {"data/filtered.jsonl": LINES})
    listed = hub.repos["datasets/allenai/reward-bench"].commit("main")
    assert listed is not None
    stored = listed.files["data/filtered.jsonl"]
    assert stored.blob_id, "the Hub lists what the file was"
    stored.content = LINES.replace(b"Four", b"Five")
    code, found = verified(model, SET)
    assert (code, found["error"]["code"]) == (3, "download-corrupt")  # type: ignore[index]
