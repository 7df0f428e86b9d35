"""Recipes are strict: every mistake is an error with file and line, and nothing in one is executed or expanded."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from converter.core.files.strict_yaml import read_values
from converter.errors import UsageError
from converter.recipe.fields import check
from converter.recipe.recipe import Output, Recipe, load_recipe, parse_recipe, shipped_recipes
from converter.sources.opening import InputSpec

GOOD = """\
version: 1
inputs:
  source: {base-of: first}
  first: ./first
  second:
    path: owner/second
    revision: abc1234
steps:
  - merge-lora:
      adapters: [first, second]
      weights: [0.5, 1]
  - cast: {dtype: bfloat16}
output:
  layout: pack
  max-shard-size: 5GB
"""


def parsed(text: str) -> Recipe:
    return parse_recipe(dedent(text).encode(), file="r.yaml")


def refused(text: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        check(parsed(text))
    assert caught.value.exit_code == 2
    return caught.value


def test_a_recipe_says_what_it_says() -> None:
    recipe = parsed(GOOD)
    assert recipe.inputs == {
        "source": InputSpec(base_of="first"),
        "first": InputSpec("./first"),
        "second": InputSpec("owner/second", revision="abc1234"),
    }
    assert recipe.steps_to_value() == [
        {"merge-lora": {"adapters": ["first", "second"], "weights": [0.5, 1]}},
        {"cast": {"dtype": "bfloat16"}},
    ]
    assert recipe.output == Output("pack", 5_000_000_000)
    check(recipe)


def test_a_printed_recipe_parses_to_the_same_recipe() -> None:
    recipe = parsed(GOOD)
    again = parse_recipe(recipe.to_yaml().encode(), file="again.yaml")
    assert (again.inputs, again.steps, again.output) == (recipe.inputs, recipe.steps, recipe.output)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("version: 2\ninputs: {source: x}\n", "r.yaml:1", "`version`: Input should be 1"),
        ("inputs: {source: x}\n", "r.yaml:1", "the key `version` is missing"),
        ("version: 1\n", "r.yaml:1", "the key `inputs` is missing"),
        ("version: 1\ninputs: {source: x}\nstep: []\n", "r.yaml:3", "unknown key `step`"),
        ("version: 1\ninputs:\n  source:\n    pth: x\n", "r.yaml:4", "unknown key `pth`"),
        ("version: 1\ninputs:\n  source: x\n  My_Input: y\n", "r.yaml:4", "not a name of an input: My_Input"),
        (
            "version: 1\ninputs:\n  other: x\n",
            "r.yaml:2",
            "an input must be named `source`: it flows through the steps",
        ),
        ("version: 1\ninputs:\n  source: x\n  spare: y\n", "r.yaml:4", "no step uses the input `spare`"),
        ("version: 1\ninputs:\n  source:\n", "r.yaml:3", "the input `source` has no path"),
        ("version: 1\ninputs:\n  source: {base-of: nobody}\n", "r.yaml:3", "`base-of` names no other input: nobody"),
        (
            "version: 1\ninputs:\n  source: {path: x, base-of: y}\n  y: z\n",
            "r.yaml:3",
            "an input has a `path` or is `base-of` another, not both",
        ),
        (
            "version: 1\ninputs: {source: x}\nsteps:\n  - cast: {dtype: bf16}\n    merge-lora: {}\n",
            "r.yaml:4",
            "a step is one converter's name and its fields",
        ),
        ("version: 1\ninputs: {source: x}\nsteps:\n  - kast: {}\n", "r.yaml:4", "no converter is named `kast`"),
        ("version: 1\ninputs: {source: x}\nsteps:\n  - cast:\n      dtipe: bf16\n", "r.yaml:5", "unknown key `dtipe`"),
        ("version: 1\ninputs: {source: x}\nsteps:\n  - cast: {}\n", "r.yaml:4", "the key `dtype` is missing"),
        (
            "version: 1\ninputs: {source: x}\nsteps:\n  - cast: {dtype: 3}\n",
            "r.yaml:4",
            "`dtype`: Input should be a valid string",
        ),
        (
            "version: 1\ninputs: {source: x}\nsteps:\n  - merge-lora:\n      adapters:\n        - nobody\n",
            "r.yaml:5",
            "no input is named `nobody`",
        ),
        (
            "version: 1\ninputs: {source: x}\nsteps:\n  - merge-lora: {adapters: [source]}\n",
            "r.yaml:4",
            "`source` flows through the steps and can't be an input of one as well",
        ),
        (
            "version: 1\ninputs: {source: x}\noutput:\n  max-shard-size: 5 apples\n",
            "r.yaml:4",
            "max-shard-size is not a size: 5 apples",
        ),
        (
            "version: 1\ninputs: {source: x}\noutput: {layout: any}\n",
            "r.yaml:3",
            "`layout`: Input should be 'auto', 'preserve' or 'pack'",
        ),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_line(text: str, where: str, what: str) -> None:
    error = refused(text)
    assert (error.where, error.what) == (where, what)


def test_a_weight_that_is_text_or_a_boolean_is_no_number() -> None:
    for wrong in ('"0.5"', "true", "null"):
        text = (
            f"version: 1\ninputs: {{source: x, a: y}}\nsteps:\n  - merge-lora: {{adapters: [a], weights: [{wrong}]}}\n"
        )
        assert "valid number" in refused(text).what


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key `a` appears twice, first on line 1"),
        ("a: &x [1]\nb: *x\n", "anchors (&name) are not allowed"),
        (
            "a: !!python/object/apply:os.system ['true']\n",
            "tags are not allowed: tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("a: !secret x\n", "tags are not allowed: !secret"),
        ("a: 1\n---\nb: 2\n", "a recipe is one document"),
        ("1: a\n", "a key must be text"),
        ("[a]: b\n", "a key must be text"),
        ("a: " + "[" * 33 + "]" * 33 + "\n", "nested deeper than 32"),
    ],
)
def test_yaml_that_expands_hides_or_executes_is_refused(text: str, what: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_values(text.encode(), file="r.yaml")
    assert caught.value.code == "recipe-syntax"
    assert caught.value.what == what


def test_an_alias_bomb_is_refused_before_it_is_expanded() -> None:
    levels = "".join(f"l{n}: &l{n} [{','.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 10))
    with pytest.raises(UsageError, match="anchors"):
        read_values(("l0: &l0 [x]\n" + levels).encode(), file="r.yaml")


def test_a_hundred_thousand_brackets_do_not_exhaust_the_stack() -> None:
    with pytest.raises(UsageError, match="nested deeper"):
        read_values(b"[" * 100_000, file="r.yaml")


def test_a_recipe_over_a_megabyte_or_not_in_utf8_is_refused() -> None:
    with pytest.raises(UsageError, match="at most 1000000 bytes"):
        read_values(b"#" * 1_000_001, file="r.yaml")
    with pytest.raises(UsageError, match="not UTF-8 at byte 3"):
        read_values(b"a: \xff", file="r.yaml")


def test_scalars_follow_yaml_1_2_and_not_1_1() -> None:
    text = b"[no, off, 010, 1:30, 2024-01-01, 1e-3, 0x1f, .inf, true, ~, '12', 1_000]"
    expected = ["no", "off", 10, "1:30", "2024-01-01", 0.001, "0x1f", ".inf", True, None, "12", "1_000"]
    assert read_values(text, file="r.yaml").value == expected


def test_a_template_in_a_recipe_is_just_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "leaked")
    recipe = parsed("version: 1\ninputs: {source: '${SECRET}/{{ SECRET }}'}\n")
    assert recipe.inputs["source"].path == "${SECRET}/{{ SECRET }}"


def test_a_missing_recipe_is_named_and_a_near_name_is_offered(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(str(tmp_path / "none.yaml"))
    assert caught.value.what == "there is no such recipe"
    with pytest.raises(UsageError) as caught:
        load_recipe("merge-reward-lra")
    assert caught.value.next == "did you mean `merge-reward-lora`?"


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_a_shipped_recipe_is_valid_once_its_inputs_are_given(name: str) -> None:
    recipe = load_recipe(name)
    missing = {
        n: InputSpec("./somewhere") for n, spec in recipe.inputs.items() if spec.path is None and spec.base_of is None
    }
    assert missing, "a shipped recipe names no folder of its author's"
    check(recipe.with_inputs(missing))


def test_an_input_that_the_recipe_does_not_have_can_t_be_given() -> None:
    with pytest.raises(UsageError, match="the recipe has no input `adaptr`"):
        load_recipe("merge-reward-lora").with_inputs({"adaptr": InputSpec("./x")})
