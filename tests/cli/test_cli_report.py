"""Sizes, durations and the lines of a screen, against literals."""

from __future__ import annotations

import math

import pytest

from converter.cli.lines import adapter_kind, by_projection, checked_line, refusal, wrote_line
from converter.errors import Refused, UsageError, VerificationFailed
from converter.text import format_duration, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("200 MB", 200_000_000),
        ("20KB", 20_000),
        ("1.5gb", 1_500_000_000),
        ("512MiB", 536_870_912),
        ("1TB", 1_000_000_000_000),
        ("123456789012345678", 123456789012345678),
        ("9007199254740993", 2**53 + 1),
    ],
)
def test_sizes_are_decimal_as_in_huggingface_hub(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "0", "1e9", "5 G B", "five", "٥GB", "0.1B"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_size(text, what="--memory")
    assert caught.value.what.startswith("--memory is not a size")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 KB"),
        (999_499, "999 KB"),
        (999_500, "1 MB"),
        (14_100_000_000, "14.1 GB"),
        (4_976_698_672, "4.98 GB"),
        (141_107_412_992, "141 GB"),
        (2_500_000_000_000_000, "2500 TB"),
    ],
)
def test_a_size_is_shown_in_three_digits(count: int, text: str) -> None:
    assert format_size(count) == text


def test_a_duration_is_shown_as_a_clock_shows_it() -> None:
    assert [format_duration(s) for s in (0.2, 21.4, 59.6, 725, 3723)] == ["0:00", "0:21", "1:00", "12:05", "1:02:03"]


def test_an_adapter_is_named_by_method_ranks_and_task() -> None:
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "task_type": "SEQ_CLS"}
    assert adapter_kind(config) == "LoRA r=16 alpha=32 SEQ_CLS"
    patterns = {"rank_pattern": {"q_proj": 4, "v_proj": 64}, "alpha_pattern": {"q_proj": 8}}
    varied = config | {"use_dora": True, "use_rslora": True} | patterns
    assert adapter_kind(varied) == "DoRA rsLoRA r=4..64 alpha=8..32 SEQ_CLS"
    assert adapter_kind({}) == "?"
    assert adapter_kind({"peft_type": "IA3\x1b[2J", "r": None}) == "IA3\\x1b[2J"


def test_a_refusal_has_its_four_parts_and_its_consent() -> None:
    error = Refused("no-op", "nothing changes", where="./a", expected="x", got="y", next="look elsewhere", consent=True)
    assert refusal(error) == [
        "REFUSED no-op: nothing written",
        "  ./a: nothing changes",
        "expected x",
        "got      y",
        "consent  --allow no-op goes on all the same, and the receipt says so",
        "Next:    look elsewhere",
    ]
    assert refusal(error, writes=False)[0] == "REFUSED no-op"
    assert refusal(UsageError("usage", "what?"))[0] == "ERROR usage"
    assert refusal(VerificationFailed("written-differs", "it differs"))[0] == "FAILED written-differs"


def test_the_share_of_an_update_that_survives_is_given_by_projection_worst_first() -> None:
    measures = {
        "model.layers.0.self_attn.q_proj.weight": {"base": 100.0, "update": 4.0, "effective": 4.0},
        "model.layers.1.self_attn.q_proj.weight": {"base": 300.0, "update": 12.0, "effective": 12.0},
        "model.layers.0.mlp.up_proj.weight": {"base": 100.0, "update": 1.0, "effective": 0.5},
        "model.layers.0.mlp.down_proj.weight": {"base": 100.0, "update": 0.0, "effective": 0.0},
    }
    assert [" ".join(line.split()) for line in by_projection(measures)] == [
        "up_proj 50 % survives size 10 % 1 tensors",
        "q_proj 100 % survives size 20 % 2 tensors",
    ]


def test_values_that_were_not_finite_before_are_counted_and_named() -> None:
    measures = {"a.weight": {"update": math.inf, "nonfinite_kept": 3.0}, "b.weight": {"update": 1.0}}
    assert checked_line(2, 1, measures) == (
        "checked  2 re-read, 1 recomputed equal, 3 non-finite values kept from the inputs: a.weight (3)"
    )
    assert checked_line(0, 0, measures) == (
        "checked  nothing (--no-verify), 3 non-finite values kept from the inputs: a.weight (3)"
    )


def test_an_update_that_is_not_finite_is_left_out_of_the_shares() -> None:
    whole = {"base": 100.0, "update": 4.0, "effective": 2.0}
    broken = {"base": 100.0, "update": math.inf, "effective": math.nan}
    lines = by_projection({"l.0.q_proj.weight": whole, "l.1.q_proj.weight": broken})
    assert [" ".join(line.split()) for line in lines] == ["q_proj 50 % survives size 20 % 1 tensors"]


def test_what_was_written_is_named_by_class_labels_and_pad_token() -> None:
    config = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "pad_token_id": 7}
    assert wrote_line("./rm", config, "<|endoftext|>") == (
        "wrote    ./rm  Qwen2ForSequenceClassification, 1 label, pad <|endoftext|>"
    )
    assert wrote_line("./rm", config, None).endswith("1 label, pad 7")
    assert wrote_line("./rm", {"architectures": ["LlamaForCausalLM"]}, None) == "wrote    ./rm  LlamaForCausalLM"
