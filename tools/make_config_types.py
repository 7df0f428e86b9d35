"""Writes `converter/families/config_types.json`: what transformers takes for each field of a config.

Types of JSON, and the words that it knows where a field is a word, for the configs of the classes in
`implied_shapes.json`; and every model type of the release.

Run by hand for a release, in an environment with the pinned transformers (half a minute):

    python tools/make_config_types.py

A type counts if transformers makes a config of it. Words are a field's default, and where that is an activation all
activations.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")
import transformers  # noqa: E402
from transformers.activations import ACT2CLS  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # noqa: E402

from converter.families import config_types  # noqa: E402

OUT = Path(config_types.__file__).with_name("config_types.json")
SAMPLES: dict[str, tuple[Any, ...]] = {
    "null": (None,),
    "bool": (True, False),
    "int": (1, 2, 4, 64, 4096),
    "float": (0.5, 1e-5),
    "str": ("relu", "x"),
    "list": ([1], ["x"]),
    "dict": ({},),
}
TESTED_ELSEWHERE = {"rope_parameters", "rope_scaling", "layer_types"}


def main() -> None:
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    classes = json.loads(OUT.with_name("implied_shapes.json").read_text("utf-8"))["classes"]
    made = {}
    for name in classes:
        kind = getattr(transformers, name).config_class
        if kind.model_type not in made:
            made[kind.model_type] = fields_of(kind)
    told = {"about": "Written by tools/make_config_types.py", "transformers": transformers.__version__}
    told |= {"activations": sorted(ACT2CLS), "kinds": model_types()}
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(made.items()))
    OUT.write_text(f'{json.dumps(told)[:-1]}, "fields": {{\n{lines}\n}}}}\n', "utf-8")


def model_types() -> list[str]:
    """Those that `AutoConfig` knows, and those of configs that are parts of others."""
    found = set(CONFIG_MAPPING_NAMES)
    for kind in CONFIG_MAPPING_NAMES:
        module = sys.modules[CONFIG_MAPPING[kind].__module__]
        configs = (
            c for c in vars(module).values() if isinstance(c, type) and issubclass(c, transformers.PreTrainedConfig)
        )
        found |= {c.model_type for c in configs if c.model_type}
    return sorted(found)


def fields_of(kind: Any) -> dict[str, Any]:
    """Of each field of a config class the types that it takes, or, for a word, the words besides activations."""
    defaults = {k: v for k, v in kind().to_dict().items() if k not in TESTED_ELSEWHERE}
    common = transformers.PreTrainedConfig().to_dict()
    found = {}
    for key, default in defaults.items():
        if key in common and key not in ("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id"):
            continue
        taken = [name for name, samples in SAMPLES.items() if any(is_taken(kind, defaults, key, s) for s in samples)]
        if taken:
            found[key] = {"types": taken, **({"word": default} if isinstance(default, str) else {})}
    return found


def is_taken(kind: Any, defaults: dict[str, Any], key: str, value: Any) -> bool:
    try:
        kind.from_dict({**defaults, key: value})
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
