"""`verify --probe` scores pairs as transformers does, and says what moved the scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForSequenceClassification

from converter.cli import main
from converter.shipped import shipped
from verify_folders import WEIGHT, codes, copy, edit, make_rm, rewrite, text_of, verify

TOKENIZER = shipped("fixtures") / "tiny-qwen2-base"
PAIRS = [
    {"prompt": "What is two and two?", "chosen": "Four.", "rejected": "I can't say."},
    {"prompt": "Name a colour", "chosen": "Blue", "rejected": "Blue is not what I would name here"},
    {"prompt": "Is water wet", "chosen": "Yes, it is", "rejected": "no"},
]


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that transformers saved."""
    return make_rm(tmp_path_factory.mktemp("rm") / "rm")


@pytest.fixture
def scored(rm: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The reward model with a tokenizer, and a file of pairs."""
    folder = with_tokenizer(copy(rm, tmp_path / "scored"))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in PAIRS))
    return folder, tmp_path / "pairs.jsonl"


def with_tokenizer(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def ask(capsys: pytest.CaptureFixture[str], folder: Path, pairs: Path, *more: str) -> tuple[int, dict[str, Any]]:
    return verify(capsys, str(folder), "--for", "trl", "--role", "reward", "--probe", str(pairs), *more)


def test_scores_are_those_that_transformers_gives(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = scored
    code, found = ask(capsys, folder, pairs)
    assert code == 0
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for row, pair in zip(found["pairs"], PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            messages = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                assert row[side] == pytest.approx(model(ids).logits.item(), abs=1e-4)
    right = sum(row["chosen"] > row["rejected"] for row in found["pairs"])
    assert any(f"{right} of 3 pairs" in c["text"] for c in found["checks"])


@pytest.mark.parametrize(
    ("change", "cause"),
    [("head", "head"), ("base", "base"), ("template", "template"), ("nothing", "")],
)
def test_a_drift_is_put_down_to_what_was_changed(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, cause: str
) -> None:
    source, pairs = scored
    folder = copy(source, tmp_path / "changed")

    def double(tensors: dict[str, torch.Tensor]) -> None:
        name = "score.weight" if change == "head" else WEIGHT
        tensors[name] = tensors[name].flip(-1).contiguous()

    if change in ("head", "base"):
        rewrite(folder, double)
    elif change == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    _, found = ask(capsys, folder, pairs, "--against", str(source))
    if not cause:
        assert "drift" not in codes(found, "note")
        return
    told = text_of(found, "drift")
    causes = [
        c
        for c in ("template", "base", "head", "normalisation", "pad token")
        if f"{c} " in told.partition("Due to: ")[2]
    ]
    assert causes == [cause]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("dtype", "rounding of the base to another dtype"),
        ("pad token", "pad token"),
        ("half head", "head"),
        ("head row", "head"),
    ],
)
def test_what_conversions_get_wrong_is_named(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, cause: str
) -> None:
    source, pairs = scored
    folder = copy(source, tmp_path / "changed")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("model.")] if damage == "dtype" else []:
            tensors[name] = tensors[name].bfloat16()
        if damage == "half head":
            tensors["score.weight"] = tensors["score.weight"] / 2
        if damage == "head row":
            tensors["score.weight"] = tensors["score.weight"].roll(1, -1).contiguous()

    rewrite(folder, change)
    if damage == "pad token":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        last = tokenizer.apply_chat_template([{"role": "assistant", "content": "no"}], tokenize=True)["input_ids"][-1]
        edit(folder, pad_token_id=last)
    _, found = ask(capsys, folder, pairs, "--against", str(source))
    told = " ".join(c["text"] for c in found["checks"] if c["label"] == "drift")
    listed = told.partition("Due to: ")[2]
    assert [part.rpartition(" ")[0] for part in listed.split(", ")] == [cause]


@pytest.mark.parametrize("device", [None, "cpu"])
def test_scores_of_a_model_that_memory_does_not_hold_are_the_same(
    device: str | None, scored: tuple[Path, Path]
) -> None:
    """Where it runs on a device, too; the CPU is one."""
    from converter.converters.heads.detect import detect
    from converter.converters.heads.read import read
    from converter.core.context import Context
    from converter.examine.verify.pairs import Scored, check_pairs
    from converter.examine.verify.pairs import scored as side
    from converter.examine.verify.pairs_file import read_pairs
    from converter.examine.verify.values import Reference
    from converter.sources.opening import input_spec, open_checkpoint

    folder, pairs = scored
    checkpoint = open_checkpoint(input_spec(str(folder)), token=None, keep_code=False)
    detected = detect(checkpoint)
    assert detected is not None
    reading = read(checkpoint, detected.dialect, Context(frozenset()))
    held = side(reading, "last-non-pad")
    streamed = Scored(Reference(reading, held=0, device=device), held.tokenizer, held.pooling, held.pad)
    told: list[str] = []
    found = read_pairs(str(pairs), 200)
    checks, table = check_pairs(found, streamed, held, told=told.append)
    assert [c.outcome for c in checks] == ["holds", "holds"]
    assert [r["chosen"] for r in table] == pytest.approx([r["source_chosen"] for r in table], abs=1e-12)
    assert told[0].startswith("scoring 6 sequences of ")
    assert told[-1].startswith("6 of 6 sequences")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.parametrize(("device", "said"), [("cuda", True), ("cuda:1", True), ("auto", False)])
def test_without_a_gpu_pairs_are_scored_on_the_cpu_and_it_is_said_where_one_was_asked_for(
    device: str, said: bool, scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = scored
    main(["verify", str(folder), "--probe", str(pairs), "--device", device])
    out, err = capsys.readouterr()
    assert ("no CUDA device answers here" in err) is said
    assert "pairs in the right order" in out
    assert main(["verify", str(folder), "--device", device]) == 2
    assert "there is no --probe" in capsys.readouterr().err


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_of_the_cpu(scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, pairs = scored
    _, here = ask(capsys, folder, pairs)
    _, there = ask(capsys, folder, pairs, "--device", "cuda")
    for side in ("chosen", "rejected"):
        assert [r[side] for r in there["pairs"]] == pytest.approx([r[side] for r in here["pairs"]], abs=1e-9)


MESSAGES = [{"role": "user", "content": "Name a colour"}]
ANSWERS = {
    side: [*MESSAGES, {"role": "assistant", "content": text}] for side, text in (("chosen", "Blue"), ("rejected", "no"))
}


@pytest.mark.parametrize("layout", ["list", "parquet", "parquet of messages", "messages in the prompt", "no prompt"])
def test_pairs_are_read_as_people_keep_them(
    scored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    folder, _ = scored
    plain = {"prompt": "Name a colour", "chosen": "Blue", "rejected": "no"}
    expected = write_and_score(capsys, folder, tmp_path / "plain.jsonl", json.dumps(plain))
    file = tmp_path / "pairs"
    if layout.startswith("parquet"):
        import pyarrow
        import pyarrow.parquet

        row = plain if layout == "parquet" else ANSWERS
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": 1, **row}]), file)
        found = ask(capsys, folder, file)[1]["pairs"]
    else:
        entry = {"list": [plain], "messages in the prompt": plain | {"prompt": MESSAGES}, "no prompt": ANSWERS}[layout]
        found = write_and_score(capsys, folder, file, json.dumps(entry))
    assert [(r["chosen"], r["rejected"]) for r in found] == [(r["chosen"], r["rejected"]) for r in expected]


def write_and_score(capsys: pytest.CaptureFixture[str], folder: Path, file: Path, text: str) -> list[dict[str, float]]:
    file.write_text(text)
    found: list[dict[str, float]] = ask(capsys, folder, file)[1]["pairs"]
    return found


def test_whole_texts_are_scored_as_they_are(scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, pairs = scored
    texts = {"chosen": "Human: Hi Assistant: Hello", "rejected": "Human: Hi Assistant: No"}
    row = write_and_score(capsys, folder, pairs, json.dumps(texts))[0]
    model = LlamaForSequenceClassification.from_pretrained(folder).double().eval()
    ids = AutoTokenizer.from_pretrained(folder)(texts["chosen"], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert row["chosen"] == pytest.approx(model(ids).logits.item(), abs=1e-6)


def test_how_many_of_the_files_pairs_were_scored_is_said(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = scored
    _, found = ask(capsys, folder, pairs, "--pairs", "2")
    assert len(found["pairs"]) == 2
    assert any("of the first 2 of 3 pairs in the right order" in c["text"] for c in found["checks"])


def test_pairs_that_were_asked_for_and_not_scored_fail(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, pairs = scored
    rewrite(folder, lambda tensors: tensors.pop("score.weight"))
    code, found = ask(capsys, folder, pairs)
    assert code == 4
    assert "not-compared" in codes(found)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"prompt": "x", "chosen": "y"}\n', "line 1"),
        ('{"prompt": "x", "chosen": "y", "rejected": 3}\n', "line 1"),
        ("\n[1]\n", "entry 1"),
        ('{"chosen": [{"role": "user", "content": "a"}], "rejected": []}\n', "line 1"),
        ("PAR1 and no more", "Parquet"),
    ],
)
def test_what_is_no_pair_is_a_usage_error_that_says_where(
    scored: tuple[Path, Path], capsys: pytest.CaptureFixture[str], text: str, place: str
) -> None:
    from converter.cli import main

    folder, pairs = scored
    pairs.write_text(text)
    assert main(["verify", str(folder), "--for", "trl", "--role", "reward", "--probe", str(pairs)]) == 2
    assert place in capsys.readouterr().err


def test_a_file_that_is_not_there_is_a_usage_error(scored: tuple[Path, Path]) -> None:
    from converter.cli import main

    folder, pairs = scored
    assert main(["verify", str(folder), "--for", "trl", "--role", "reward", "--probe", f"{pairs}.gone"]) == 2
