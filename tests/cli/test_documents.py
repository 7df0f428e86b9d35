"""README and docs tell the truth: screens are what the commands print, tables are generated, names and links exist."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import screens
import write_tables
from converter.cli import VERBS
from converter.examine.explanations.log import match
from places import REPOSITORY
from screens import Screen, workplace

READMES = ("README.md", "README.zh-CN.md")
DOCUMENTS = write_tables.documents()
WITH_SCREENS = [page for page in screens.PAGES if screens.screens((REPOSITORY / page).read_text("utf-8"))]


def text(page: str) -> str:
    return (REPOSITORY / page).read_text("utf-8")


@pytest.mark.parametrize("page", WITH_SCREENS)
def test_the_screens_of_a_page_are_what_its_commands_print_in_order(page: str, tmp_path: Path) -> None:
    with workplace(tmp_path):
        for screen in screens.screens(text(page)):
            printed = screens.printed(screen)
            assert screen.fits(printed), "\n".join(
                [f"$ {screen.command}", *printed, "python tools/write_tables.py --screens renews it"]
            )


def test_both_readmes_and_at_least_five_pages_have_screens() -> None:
    assert set(READMES) <= set(WITH_SCREENS)
    assert len(WITH_SCREENS) >= 7


def test_no_command_stands_in_a_block_that_is_not_run() -> None:
    for page in screens.PAGES:
        assert len(screens.screens(text(page))) == text(page).count("$ rlhf-convert "), page


def test_a_screen_fits_up_to_what_varies_and_what_is_left_out_and_nothing_else() -> None:
    shown = Screen("rlhf-convert x", ("first", "...", "needs    5 MB disk (1.2 GB free), 300 MB memory", "last"))
    assert shown.fits(["first", "a", "b", "needs    5 MB disk (77 GB free), 900 MB memory", "last"])
    assert not shown.fits(["first", "needs    5 MB disk (1.2 GB free), 300 MB memory", "last"])  # nothing was left out
    assert not shown.fits(["first", "a", "needs    6 MB disk (1.2 GB free), 300 MB memory", "last"])
    assert not shown.fits(["first", "a", "needs    5 MB disk (1.2 GB free), 300 MB memory", "last", "more"])


def test_a_renewed_screen_keeps_the_lines_that_were_shown_and_fits() -> None:
    shown = Screen("rlhf-convert x", ("...", "ERROR three tensors are empty", "...", "Next:    repair"))
    printed = ["head", "ERROR four tensors are empty", "why", "Next:    repair"]
    renewed = shown.renewed(printed)
    assert renewed.lines == ("...", "ERROR four tensors are empty", "...", "Next:    repair")
    assert renewed.fits(printed)


@pytest.mark.parametrize("page", sorted(DOCUMENTS))
def test_every_generated_table_is_what_the_generator_writes(page: str) -> None:
    assert write_tables.with_tables(DOCUMENTS[page]) == DOCUMENTS[page], "python tools/write_tables.py writes it"


def test_every_generator_has_a_place_and_every_place_a_generator() -> None:
    placed = re.findall(r"^<!-- generated: (\S+) -->$", "".join(DOCUMENTS.values()), re.MULTILINE)
    assert {*placed} == {*write_tables.TABLES}
    assert "".join(DOCUMENTS.values()).count("<!-- end -->") == len(placed)


@pytest.mark.parametrize("page", READMES)
def test_a_readme_is_under_12_kilobytes(page: str) -> None:
    assert (REPOSITORY / page).stat().st_size < 12_000


@pytest.mark.parametrize("page", READMES)
def test_the_first_screen_has_the_two_errors_that_bring_people_here_and_explain_knows_them(page: str) -> None:
    first, second = re.findall(r"^```\n(.*\n)(.*\n)```$", text(page), re.MULTILINE)[0]
    names = [found[0].code for line in (first, second) if (found := match(line)) is not None]
    assert names == ["head-newly-initialised", "size-mismatch-empty-file"]
    assert text(page).index(first) < text(page).index("pip install") < text(page).index("$ rlhf-convert")


@pytest.mark.parametrize("page", READMES)
def test_the_story_is_doctor_the_command_that_it_printed_and_verify_with_few_lines_each(page: str) -> None:
    story = screens.screens(text(page))
    assert [s.arguments[0] for s in story] == ["doctor", "convert", "verify"]
    for screen, following in itertools.pairwise(story):
        assert f"Next:    {following.command}" in screen.lines
    assert max(len(s.lines) for s in story) <= 12


def test_both_languages_show_the_same_screens_commands_and_pages() -> None:
    english, chinese = (text(page) for page in READMES)
    assert screens.screens(english) == screens.screens(chinese)
    assert re.findall(r"^    (\S.*)$", english, re.MULTILINE) == re.findall(r"^    (\S.*)$", chinese, re.MULTILINE)
    commands = [set(re.findall(r"`(rlhf-convert [^`]+)`", each)) for each in (english, chinese)]
    assert commands[0] <= commands[1]
    links = [set(re.findall(r"\]\(([^)]+)\)", each)) - set(READMES) for each in (english, chinese)]
    assert links[0] == links[1]
    assert english.count("\n## ") == chinese.count("\n## ")


def test_ci_runs_the_test_command_of_the_readme() -> None:
    (command,) = re.findall(r"^    (pip install .*\.\[test\].*)$", text("README.md"), re.MULTILINE)
    install, tests = command.split(" && ")
    steps = text(".ci/run")
    assert tests == "pytest"
    assert f'step "{install}"\n{install.replace("pip install", "pip install --quiet")}\n' in steps
    assert f'\nstep "{tests}"\n{tests}\n' in steps


@pytest.mark.parametrize("page", sorted(DOCUMENTS))
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", DOCUMENTS[page])
    assert [link for link in links if not ((REPOSITORY / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", sorted(DOCUMENTS))
def test_every_test_that_a_page_names_exists(page: str) -> None:
    named = re.findall(r"\b((?:[\w.]+/)*(?:test|fuzz|run)_\w+\.py)\b", DOCUMENTS[page])
    named = [name for name in named if "acme" not in name]  # of the package that the page on plug-ins makes up
    assert [name for name in named if not [*REPOSITORY.glob(f"**/{name}")]] == []


def test_every_verb_is_described_and_every_verb_named_exists() -> None:
    everything = "".join(DOCUMENTS.values())
    assert {*re.findall(r"rlhf-convert ([a-z][a-z-]+)", everything)} <= set(VERBS)
    pages = "".join(DOCUMENTS[page] for page in DOCUMENTS if page.startswith("docs/"))
    assert [verb for verb in VERBS if not re.search(rf"`(?:rlhf-convert )?{verb}[ `]", pages)] == []


def test_every_refusal_code_is_one_that_the_code_raises() -> None:
    source = "".join(p.read_text("utf-8") for p in (REPOSITORY / "converter").rglob("*.py"))
    table = DOCUMENTS["docs/merge.md"].partition("## What is refused by name")[2]
    codes = re.findall(r"`([a-z0-9]+(?:-[a-z0-9]+)+)`", re.sub(r"^\|[^|]*\|", "", table, flags=re.MULTILINE))
    assert len(codes) >= 9
    assert [code for code in codes if f'"{code}"' not in source] == []
