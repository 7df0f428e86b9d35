"""Which files travel with the weights: an allow-list; nothing that runs, nothing that belongs to a training run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from converter.core.files.opening import identity
from converter.core.side_files import find_side_files
from converter.errors import Refused

CARRIED = [
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model.v3",
    "qwen.tiktoken", "tekken.json", "source.spm", "chat_template.jinja", "chat_template.json",
    "chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja", "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "NOTICE.md",
    "USE_POLICY.md",
]  # fmt: skip

LEFT = [
    "config.json", "adapter_config.json", "model.safetensors", "model.safetensors.index.json", "training_args.bin",
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "README.md", "rlhf-convert.json", "run.sh",
    "events.out.tfevents.1", ".gitattributes", "notes.txt", "tokenizer.json.bak", "my-tokenizer.json",
    "eval/vocab.json", "chat_templates/run.sh", "global_step10/tokenizer.json", "requirements.txt", "LICENSES/x",
    "model.pkl",
]  # fmt: skip

CODE = ["modeling_own.py", "configuration_own.py"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*CARRIED, *LEFT, *CODE):
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "model"


def test_exactly_the_allowed_files_travel(folder: Path) -> None:
    files, _ = find_side_files(folder, keep_code=False)
    assert sorted(files) == sorted(CARRIED)


def test_code_travels_only_when_it_is_asked_for(folder: Path) -> None:
    files, _ = find_side_files(folder, keep_code=True)
    assert sorted(files) == sorted([*CARRIED, *CODE])


def test_files_are_named_by_their_absolute_path_and_identified(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    files, identities = find_side_files(Path("model"), keep_code=False)
    assert {f.source for f in files.values()} == {str(folder / n) for n in CARRIED}
    assert identities == {str(folder / n): identity(folder / n) for n in CARRIED}


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "chat_templates/tool_use.jinja"])
def test_an_allowed_name_that_links_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_text("secret")
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "secret")
    with pytest.raises(Refused, match=Path(name).name) as caught:
        find_side_files(folder, keep_code=False)
    assert caught.value.code == "input-outside"


def test_a_folder_of_templates_that_links_out_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jinja").write_text("x")
    for path in (folder / "chat_templates").iterdir():
        path.unlink()
    (folder / "chat_templates").rmdir()
    (folder / "chat_templates").symlink_to("../elsewhere")
    with pytest.raises(Refused, match=r"a\.jinja") as caught:
        find_side_files(folder, keep_code=False)
    assert caught.value.code == "input-outside"


def test_an_allowed_name_that_is_a_pipe_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(Refused, match="a pipe"):
        find_side_files(folder, keep_code=False)


def test_a_link_that_is_not_allowed_by_name_is_no_concern(folder: Path) -> None:
    (folder / "dataset").symlink_to("/nowhere")
    assert find_side_files(folder, keep_code=False)[0]
