"""Writes `converter/families/ties.json`: which tensors transformers makes one, and where config.json has to say so.

Run by hand for a release, in an environment with the pinned transformers (timm, pillow and scipy add a few classes):

    python tools/make_ties.py --older /path/to/python   # of an environment with transformers 4.57

Everything is read off transformers itself. Each class is built on the meta device, and its `_tied_weights_keys` are
expanded; the names on disk are those that its own save would write. Each config class is asked what it makes of a
config.json that is silent, of one that says false, and of a nested config that says true.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

OUT = Path(__file__).parent.parent / "converter" / "families" / "ties.json"
_MOST = 8  # groups of tied tensors; detectors that share a head in every layer have more, and no vocabulary
Group = tuple[str, ...]


def of_class(cls: type[PreTrainedModel]) -> list[tuple[str, Group, Group]] | None:
    """Groups of tied tensors: the config's part that has to say so, the names on disk, and those in memory.

    None for a class that can't be built.
    """
    from converter.families.disk_names import disk_names
    from converter.families.memory_names import architecture
    from make_memory_names import build

    model = build(cls)
    if model is None:
        print(f"not built: {cls.__name__}", file=sys.stderr)
        return None
    config = {**model.config.to_dict(), "architectures": [cls.__name__]}
    built = architecture(cls.__name__, config)
    found: dict[tuple[str, str], list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PreTrainedModel):
            part = "" if module.config is model.config else _part(model.config, module.config)
            module.config.tie_word_embeddings = True
            with contextlib.suppress(ValueError):
                for target, source in module.get_expanded_tied_weights_keys(all_submodels=False).items():
                    lead = f"{path}." if path else ""
                    found.setdefault((part, lead + source), [lead + source]).append(lead + target)
    if len(found) > _MOST:
        return None
    # A part that shares its embedding with the whole is listed once, with the whole.
    whole = {n for (part, _), names in found.items() if part == "" for n in names}
    groups: list[tuple[str, Group, Group]] = []
    for (part, _), names in found.items():
        memory = tuple(dict.fromkeys(names))
        if part and whole.issuperset(memory):
            continue
        disk = {} if built is None else disk_names(memory, built)
        groups.append((part, tuple(disk.get(n, n) for n in memory), memory))
    return sorted(groups)


def _part(config: Any, wanted: Any) -> str:
    """The key of config.json that holds a part; `?` where it is none, as for one that is made out of others."""
    keys = dict.fromkeys((*config.sub_configs, *vars(config)))
    return next((key for key in keys if getattr(config, key, None) is wanted), "?")


def of_configs() -> dict[str, list[str]]:
    """Model types by what their config class makes of config.json.

    `silent` ties where nothing is said, `always` whatever is said, `nested` where the text model's config says true
    and its own false; for `outer` the text model's config does not count even where its own is silent.
    """
    found: dict[str, list[str]] = {"silent": [], "always": [], "nested": [], "outer": []}
    for kind in CONFIG_MAPPING:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[kind]()
            if _ties(config):
                found["silent"].append(kind)
            no = {"model_type": kind, "tie_word_embeddings": False}
            if _ties(CONFIG_MAPPING[kind].from_dict(no)):
                found["always"].append(kind)
                continue
            text = getattr(config, "text_config", None)
            if hasattr(text, "model_type"):
                inner = {"model_type": text.model_type, "tie_word_embeddings": True}
                if _ties(CONFIG_MAPPING[kind].from_dict(no | {"text_config": inner})):
                    found["nested"].append(kind)
                elif not _ties(CONFIG_MAPPING[kind].from_dict({"model_type": kind, "text_config": inner})):
                    found["outer"].append(kind)
    return {key: sorted(kinds) for key, kinds in found.items()}


def _ties(config: Any) -> bool:
    return getattr(config, "tie_word_embeddings", False) is True


def of_older(python: str, kinds: list[str], silent: list[str], classes: list[str]) -> dict[str, Any]:
    """What another release makes of a silent config.json, where that differs; it asks the text model's config.

    `lacks`: classes that came after it.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made.json")
        subprocess.run([python, __file__, "--defaults", str(made)], check=True)
        version, defaults, known = json.loads(made.read_text())
    return {
        "transformers": version,
        "ties": sorted(k for k in kinds if defaults.get(k) is True and k not in silent),
        "does not": sorted(k for k in kinds if defaults.get(k) is False and k in silent),
        "lacks": sorted(set(classes) - set(known)),
    }


def _defaults(made: Path) -> None:
    """`tie_word_embeddings` of each text model's config, as `tie_weights` of transformers 4 asks for it."""
    found = {}
    for kind in CONFIG_MAPPING:
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[kind] = bool(CONFIG_MAPPING[kind]().get_text_config(decoder=True).tie_word_embeddings)
    made.write_text(json.dumps([transformers.__version__, found, dir(transformers)]))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--older", help="python of an environment with an older transformers")
    options.add_argument("--defaults", help=argparse.SUPPRESS)
    given = options.parse_args()
    transformers.utils.logging.set_verbosity_error()
    if given.defaults:
        _defaults(Path(given.defaults))
        return
    from make_memory_names import model_classes

    classes: dict[str, list[str]] = {}
    kinds: set[str] = set()
    for name, cls in model_classes().items():
        if cls.config_class is None or not hasattr(cls.config_class, "model_type"):
            continue
        groups = of_class(cls)
        if groups or (groups is not None and _has_output(name)):
            rows = [[p, list(disk)] if disk == memory else [p, list(disk), list(memory)] for p, disk, memory in groups]
            classes.setdefault(json.dumps(rows), []).append(name)
        if groups:
            kinds.add(cls.config_class.model_type)
    configs = of_configs()
    named = [name for names in classes.values() for name in names]
    older = of_older(given.older, sorted(kinds), configs["silent"], named) if given.older else {}
    data = {
        "about": "Tied tensors, from transformers; written by tools/make_ties.py",
        "transformers": transformers.__version__,
        "source": "https://github.com/huggingface/transformers/blob/"
        f"v{transformers.__version__}/src/transformers/modeling_utils.py",
        **configs,
        "older": older,
        "classes": [[json.loads(text), sorted(names)] for text, names in sorted(classes.items())],
    }
    OUT.write_text(_lines(data), encoding="utf-8")


def _has_output(name: str) -> bool:
    from converter.families.words import CLASSES_WITH_OUTPUT

    return name.endswith(CLASSES_WITH_OUTPUT)


def _lines(data: dict[str, Any]) -> str:
    """JSON with one line for each entry, so that a change of version can be read as a difference."""
    chunks = []
    for key, value in data.items():
        if key == "classes":
            rows = [f"  {json.dumps(each)}" for each in value]
            chunks.append(f" {json.dumps(key)}: [\n" + ",\n".join(rows) + "\n ]")
        else:
            chunks.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(chunks) + "\n}\n"


if __name__ == "__main__":
    main()
