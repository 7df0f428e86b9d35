"""The tokenizer of a merged model is the adapter's or the base's, never a mixture."""

from __future__ import annotations

from converter.core.side_files import SideFile, adapter_first


def files(*names: str, by: str) -> dict[str, SideFile]:
    return {name: SideFile(f"/{by}/{name}") for name in names}


BASE = files(
    "tokenizer.json",
    "tokenizer_config.json",
    "merges.txt",
    "vocab.json",
    "generation_config.json",
    "README.txt",
    by="base",
)  # fmt: skip


def owners(found: dict[str, SideFile]) -> dict[str, str]:
    return {name: str(file.source).split("/")[1] for name, file in found.items()}


def test_an_adapter_with_a_tokenizer_brings_all_of_it_and_the_base_s_is_left() -> None:
    adapter = files("tokenizer.json", "special_tokens_map.json", by="adapter")
    assert owners(adapter_first(BASE, adapter)) == {
        "tokenizer.json": "adapter",
        "special_tokens_map.json": "adapter",
        "generation_config.json": "base",
        "README.txt": "base",
    }


def test_an_adapter_without_a_tokenizer_leaves_the_base_s_whole() -> None:
    found = owners(adapter_first(BASE, files("notes.txt", "generation_config.json", by="adapter")))
    assert found == {**dict.fromkeys(BASE, "base"), "notes.txt": "adapter"}
