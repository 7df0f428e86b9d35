"""From what a user typed to a folder: local paths, the Hub's cache. Mistyped paths are told so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from converter.errors import ConvertError, Refused, UsageError
from converter.sources.locate import Located, missing_files, resolve

FIRST, SECOND = "a" * 40, "b" * 40
HEADER = b"\x02\0\0\0\0\0\0\0{}"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors")


def folder(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(HEADER)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with an adapter and two runs, and an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    here = tmp_path / "here"
    folder(here / "my-adapter", *ADAPTER)
    folder(here / "outputs" / "run-1", *ADAPTER)
    folder(here / "outputs" / "run-2", *MODEL)
    (here / ".hidden").mkdir()
    monkeypatch.chdir(here)
    return here


def cached(hub: Path, repo: str, *snapshots: str, main: str | None = None, names: tuple[str, ...] = MODEL) -> Path:
    entry = hub / ("models--" + repo.replace("/", "--"))
    for commit in snapshots:
        folder(entry / "snapshots" / commit, *names)
    if main is not None:
        (entry / "refs").mkdir()
        (entry / "refs" / "main").write_text(main)
    return entry


def local(text: str, **options: Any) -> Located:
    return resolve(text, **{"allow_download": False} | options)


def refused(text: str, kind: type[ConvertError] = Refused, **options: Any) -> ConvertError:
    with pytest.raises(kind) as caught:
        resolve(text, **options)
    assert "huggingface.co" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return caught.value


# Local folders


@pytest.mark.parametrize("text", ["my-adapter", "./my-adapter", "my-adapter/", "../here/my-adapter", "outputs/run-1"])
def test_what_exists_is_local(here: Path, text: str) -> None:
    found = local(text)
    assert (found.path.resolve(), found.repo_id, found.revision) == ((here / text).resolve(), None, None)


def test_an_absolute_path_is_local(here: Path) -> None:
    assert local(str(here / "my-adapter")).path == here / "my-adapter"


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert local("~/my-adapter").path == here / "my-adapter"


def test_a_folder_wins_over_a_cache_entry_of_the_same_name(here: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "outputs/run-1", FIRST, main=FIRST)
    assert local("outputs/run-1").repo_id is None


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_a_checkpoint_stands_for_its_folder(here: Path, name: str) -> None:
    assert local(f"my-adapter/{name}").path.resolve() == here / "my-adapter"


def test_another_file_is_no_checkpoint(here: Path) -> None:
    (here / "notes.txt").touch()
    assert refused("notes.txt", UsageError).code == "path-not-a-folder"


def test_plain_folders_are_found_without_the_hubs_client(here: Path) -> None:
    code = (
        "import sys; from converter.sources.hf import peft, source as hf\n"
        "from converter.sources.locate import resolve\n"
        "path = resolve('my-adapter').path; assert peft.SOURCE.detect(path) and not hf.SOURCE.detect(path)\n"
        "sys.exit(bool({'huggingface_hub', 'torch', 'safetensors', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=here, check=False).returncode == 0


def test_a_revision_of_a_local_folder_is_a_mistake_unless_an_adapter_recorded_it(here: Path) -> None:
    assert refused("my-adapter", UsageError, revision="main").code == "revision-of-folder"
    assert local("my-adapter", revision="main").path == Path("my-adapter")


# Mistyped paths


@pytest.mark.parametrize(
    ("text", "listed", "near"),
    [
        ("./my-adaptr", "my-adapter, outputs", "did you mean ./my-adapter?"),
        ("my-adaptr", "my-adapter, outputs", "did you mean my-adapter?"),
        ("outputs/run-3", "run-1, run-2", "did you mean outputs/run-"),
        ("./outputs/run-3", "run-1, run-2", "did you mean ./outputs/run-"),
        ("./outptus/run-1/deep/er", "my-adapter, outputs", "did you mean ./outputs?"),
        ("../hree/my-adapter", "here", "did you mean ../here?"),
        ("a/b/c", "my-adapter, outputs", None),
        ("", "my-adapter, outputs", None),
        ("Qwen/with space", "my-adapter, outputs", None),
        ("Qwen/Qwen2.5-7B/", "my-adapter, outputs", None),
    ],
)
def test_a_mistyped_path_is_told_with_what_is_there(here: Path, text: str, listed: str, near: str | None) -> None:
    error = refused(text)
    assert (error.code, error.exit_code) == ("path-missing", 3)
    assert listed in (error.expected or "")
    assert ".hidden" not in (error.expected or "")
    assert str(error.next).startswith(near or "")
    assert bool(error.next) == bool(near)


def test_a_mistyped_folder_of_a_path_that_could_be_a_hub_id_is_told_as_either(here: Path) -> None:
    error = refused("outptus/run-1")
    assert error.code == "hub-not-cached"
    assert "neither a folder here nor in the Hub's cache" in error.what


def test_an_absolute_mistyped_path_is_answered_with_an_absolute_one(here: Path) -> None:
    assert str(refused(str(here / "my-adaptr")).next) == f"did you mean {here / 'my-adapter'}?"


def test_a_near_match_is_quoted_as_a_shell_needs_it(here: Path) -> None:
    (here / "it's $HOME").mkdir()
    error = refused("./its $HOME")
    assert error.what == "there is no folder './its $HOME'"
    assert str(error.next) == """did you mean './it'"'"'s $HOME'?"""


def test_control_characters_in_a_path_do_not_reach_the_screen(here: Path) -> None:
    (here / "evil\x1b[2J").mkdir()
    assert "\x1b" not in str(refused("./evil\x1b[2K"))


def test_a_long_list_is_cut(here: Path) -> None:
    for n in range(30):
        (here / "outputs" / f"folder-{n:02}").mkdir()
    assert "and 24 more" in (refused("./outputs/x").expected or "")


# The cache


def test_a_hub_id_is_taken_from_the_cache_by_its_main(here: Path, tmp_path: Path) -> None:
    entry = cached(tmp_path / "hub", "Qwen/Qwen2.5-7B", FIRST, SECOND, main=SECOND)
    assert local("Qwen/Qwen2.5-7B") == Located(entry / "snapshots" / SECOND, "Qwen/Qwen2.5-7B", SECOND)


def test_a_name_without_an_owner_is_taken_from_the_cache_too(here: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "gpt2", FIRST, main=FIRST)
    assert local("gpt2").repo_id == "gpt2"


def test_the_only_snapshot_needs_no_reference(here: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "owner/name", FIRST)
    assert local("owner/name").revision == FIRST


def test_of_several_snapshots_without_a_reference_one_must_be_named(here: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "owner/name", FIRST, SECOND)
    error = refused("owner/name", UsageError)
    assert (error.code, error.exit_code, error.got) == ("revision-needed", 2, f"{FIRST}, {SECOND}")
    assert "--revision" in str(error.next)
    assert local("owner/name", revision=FIRST).revision == FIRST


@pytest.mark.parametrize("revision", [FIRST, FIRST[:7], "v1", "refs/pr/3"])
def test_a_revision_is_a_commit_its_beginning_a_tag_or_a_branch(here: Path, tmp_path: Path, revision: str) -> None:
    entry = cached(tmp_path / "hub", "owner/name", FIRST, SECOND, main=SECOND)
    (entry / "refs" / "v1").write_text(FIRST + "\n")
    (entry / "refs" / "refs" / "pr").mkdir(parents=True)
    (entry / "refs" / "refs" / "pr" / "3").write_text(FIRST)
    assert local("owner/name", revision=revision).revision == FIRST


@pytest.mark.parametrize("revision", ["c" * 40, "nothing", "../refs/main", "/etc/passwd", "main\0", "c" * 9, ""])
def test_a_revision_that_is_not_cached_is_no_other_one(here: Path, tmp_path: Path, revision: str) -> None:
    cached(tmp_path / "hub", "owner/name", FIRST, main=FIRST)
    if not revision:
        assert local("owner/name", revision=None).revision == FIRST
        return
    assert refused("owner/name", revision=revision, allow_download=False).code == "hub-not-cached"


def test_a_main_whose_snapshot_is_gone_is_not_replaced_by_another(here: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "owner/name", FIRST, main=SECOND)
    assert refused("owner/name", allow_download=False).code == "hub-not-cached"


def test_the_caches_own_folder_stands_for_its_snapshot(here: Path, tmp_path: Path) -> None:
    entry = cached(tmp_path / "hub", "owner/name", FIRST, SECOND, main=SECOND)
    expected = Located(entry / "snapshots" / SECOND, "owner/name", SECOND)
    assert local(str(entry)) == expected
    assert local(str(entry / "snapshots" / SECOND)) == expected
    assert local(str(entry), revision=FIRST).revision == FIRST
    assert refused(str(entry), revision="c" * 40, allow_download=False).code == "hub-not-cached"


INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        (MODEL, []),
        (ADAPTER, []),
        (("config.json",), ["model.safetensors"]),
        (("model.safetensors",), ["config.json"]),
        (("adapter_model.safetensors",), ["adapter_config.json"]),
        (("tokenizer.json",), ["config.json", "model.safetensors"]),
        (("config.json", "model.safetensors.index.json"), re.findall(r"model-[\w-]+\.safetensors", INDEX)),
        (
            ("config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors"),
            ["model-00002-of-00002.safetensors"],
        ),
        (("config.json", "pytorch_model.bin"), []),
    ],
    ids=str,
)
def test_what_a_snapshot_lacks_is_known(tmp_path: Path, names: tuple[str, ...], missing: list[str]) -> None:
    folder(tmp_path, *names)
    if "model.safetensors.index.json" in names:
        (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    assert missing_files(tmp_path) == missing


def test_a_link_to_a_blob_that_is_gone_counts_as_missing(tmp_path: Path) -> None:
    folder(tmp_path, "config.json")
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    assert missing_files(tmp_path) == ["model.safetensors"]


def test_an_incomplete_snapshot_is_refused_with_what_it_lacks(here: Path, tmp_path: Path) -> None:
    entry = cached(tmp_path / "hub", "owner/name", FIRST, main=FIRST, names=("config.json",))
    (entry / "snapshots" / FIRST / "model.safetensors.index.json").write_text(INDEX)
    for download in (True, False):  # downloads are off in these tests
        error = refused("owner/name", allow_download=download)
        assert error.code == "cache-incomplete"
        assert "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors" in error.what
        assert str(error.next) == f"hf download owner/name --revision {FIRST}"


def test_what_is_not_cached_is_not_downloaded_unasked(here: Path) -> None:
    assert "nothing is downloaded unasked" in refused("owner/name", allow_download=False).what


def test_offline_is_honoured(here: Path) -> None:
    assert "HF_HUB_OFFLINE" in refused("owner/name").what
