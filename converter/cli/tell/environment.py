"""`rlhf-convert list` and `rlhf-convert env`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from converter.version import __version__

if TYPE_CHECKING:
    from converter.cli.options import Display

PACKAGES = (
    "torch", "safetensors", "peft", "transformers", "accelerate", "huggingface_hub",
    "typer", "pydantic", "PyYAML", "rich",
)  # fmt: skip
"""What a bug report needs: our dependencies, and what loads our output."""


def list_plug_ins(options: Display) -> int:
    """Everything that is registered, and the shipped recipes; exit code 1 where a plug-in is broken."""
    from converter.plugins import plug_ins
    from converter.recipe.recipe import shipped_recipes

    found = plug_ins()
    recipes = {name: _first_comment(text) for name, text in shipped_recipes().items()}
    sink = options.sink
    if not options.as_json:
        width = max(map(len, [*(p.name for p in found), *recipes]), default=0)
        for each in found:
            fault = f"  BROKEN: {each.fault}" if each.fault else ""
            sink.data(f"{each.kind:<10} {each.name:<{width}}  {each.package}{fault}")
        for name, about in recipes.items():
            sink.data(f"{'recipe':<10} {name:<{width}}  {about}")
    sink.json(
        {
            "plug_ins": [
                {"kind": p.kind, "name": p.name, "target": p.target, "package": p.package, "fault": p.fault}
                for p in found
            ],
            "recipes": [{"name": n, "about": about} for n, about in recipes.items()],
        }
    )
    return 1 if any(p.fault for p in found) else 0


def env(options: Display) -> int:
    """Versions of what matters for a bug report."""
    packages = {name: _version(name) for name in PACKAGES}
    system = {
        "rlhf-convert": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    sink = options.sink
    if not options.as_json:
        for name, value in (system | packages).items():
            sink.data(f"{name:<16} {value or 'not installed'}")
    sink.json({**{k.replace("rlhf-convert", "rlhf_convert"): v for k, v in system.items()}, "packages": packages})
    return 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_comment(text: str) -> str:
    """What a shipped recipe says of itself: its first line."""
    return text.splitlines()[0].lstrip("# ").rstrip()
