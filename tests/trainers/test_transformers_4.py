"""`repair --for transformers@4`: what transformers 5 saved says the same in transformers 4, which reads other keys."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from matrix import python_of

from converter.cli import main
from rope_models import CASES, save

pytestmark = pytest.mark.trainer

OLD = "trl-0.28"
"""An environment with transformers 4.57.6."""


@pytest.fixture(scope="module")
def loaded(envs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Every case saved, fixed and loaded by transformers 4; what transformers 5 said of it."""
    root = tmp_path_factory.mktemp("spellings")
    expected = {name: save(name, root / "saved" / name) for name in CASES}
    for name in CASES:
        command = ["repair", str(root / "saved" / name), str(root / "fixed" / name), "--for", "transformers@4", "-q"]
        assert main(command) == 0
    script = Path(__file__).with_name("load_rope_models.py")
    folders = [root / kind / name for kind in ("saved", "fixed") for name in CASES]
    subprocess.run([python_of(envs, OLD), script, *folders], check=True, capture_output=True)
    return root, expected


@pytest.mark.parametrize("name", CASES)
def test_a_fixed_model_says_in_transformers_4_what_it_said_in_5(
    name: str, loaded: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder = loaded[0] / "fixed" / name
    assert not (folder / "error.txt").exists(), (folder / "error.txt").read_text()
    said = torch.load(folder / "said.pth")  # noqa: TID251 - made by the test itself
    torch.testing.assert_close(said, loaded[1][name], rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_without_the_fix_transformers_4_says_something_else(
    name: str, loaded: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    folder = loaded[0] / "saved" / name
    if not (folder / "error.txt").exists():
        said = torch.load(folder / "said.pth")  # noqa: TID251 - made by the test itself
        assert (said - loaded[1][name]).abs().max() > 1e-4
