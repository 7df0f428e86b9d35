"""Builds transformers' models without memory or values, and says what each would load and save. A program of its own.

Run as a child process by `expected_child`, never imported. It reads one request a line on standard input, `{"class":
NAME, "config": {...}}`, and writes one answer a line. transformers is offline, remote code is never run, and a model on
the meta device holds names and shapes alone.

Source: `from_pretrained`, `save_pretrained` and `_adjust_missing_and_unexpected_keys`,
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/modeling_utils.py
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import sys
import warnings
from typing import Any

_FORGET = (
    "quantization_config", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "auto_map",
    "torch_dtype", "dtype", "_name_or_path", "compression_config",
)  # fmt: skip

_MOST_SECONDS = 120
"""Of the processor's time for one model, torch's and transformers' import included: the largest that are published
take a second or two. By the clock a busy machine would answer that it does not know the class.
"""

_MOST_MEMORY = 8 << 30
"""Bytes; a config may claim any number of layers."""


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """What the class of a request asks for, or why it can't be built."""
    import torch
    import transformers
    from transformers import PreTrainedModel

    model_class = getattr(transformers, request["class"], None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return {"unknown": f"transformers {transformers.__version__} has no class {request['class']}"}
    config = _config(model_class, request["config"])
    with contextlib.ExitStack() as stack:
        for each in _contexts(model_class):
            stack.enter_context(each)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = model_class(config)
    del torch
    model.tie_weights()
    return _described(model)


def _is_of_config(error: Exception) -> bool:
    """True where the class refuses the config's numbers; False where a library lacks, or the child has no room."""
    return not isinstance(error, ImportError | MemoryError | OSError | RuntimeError)  # NotImplementedError is one


def _config(model_class: Any, value: dict[str, Any]) -> Any:
    """The config as `from_pretrained` makes it of config.json, without what asks for kernels or quantised layers."""
    kept = _forgotten(value)
    decode = getattr(model_class.config_class, "_decode_special_floats", None)  # infinity is an object in JSON
    kept = kept if decode is None else decode(kept)
    return model_class.config_class.from_dict(kept)


def _forgotten(value: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in value.items() if k not in _FORGET}
    return {k: _forgotten(v) if isinstance(v, dict) and k.endswith("_config") else v for k, v in kept.items()}


def _contexts(model_class: Any) -> list[Any]:
    import torch

    try:
        from transformers import initialization
    except ImportError:
        from transformers.modeling_utils import no_init_weights

        return [no_init_weights(), torch.device("meta")]
    # As from_pretrained makes it; nothing is drawn, and nothing of it is read.
    made = model_class.get_init_context(torch.float32, False, False, None)
    return [initialization.no_init_weights(), *made]


def _described(model: Any) -> dict[str, Any]:
    """Names and shapes in memory and on disk, ties, and what a load passes over."""
    import transformers

    memory = {n: tuple(t.shape) for n, t in model.state_dict().items() if hasattr(t, "shape")}
    tied = {str(k): str(v) for k, v in (getattr(model, "all_tied_weights_keys", None) or {}).items()}
    saved, is_exact = _saved(model)
    return {
        "transformers": transformers.__version__,
        "memory": memory,
        "saved": saved,
        "exact": is_exact,
        "ties": _groups(model, tied),
        "unsaved": sorted(set(getattr(model, "_keys_to_ignore_on_save", None) or ()) & set(memory)),
        "passes_missing": sorted(getattr(model, "_keys_to_ignore_on_load_missing", None) or ()),
        "passes_unexpected": _passes_unexpected(model),
        "prefix": model.base_model_prefix or "",
    }


def _groups(model: Any, tied: dict[str, str]) -> list[list[str]]:
    """Names in memory that are one tensor: by the class's own word, and by identity."""
    homes: dict[int, list[str]] = {}
    everything = [
        *model.named_parameters(remove_duplicate=False),
        *((n, b) for n, b in model.named_buffers(remove_duplicate=False) if n in model.state_dict()),
    ]
    for name, tensor in everything:
        homes.setdefault(id(tensor), []).append(name)
    groups = [names for names in homes.values() if len(names) > 1]
    for name, source in tied.items():
        for group in groups:
            if name in group or source in group:
                group += [n for n in (source, name) if n not in group]
                break
        else:
            groups.append([source, name])
    return [sorted(dict.fromkeys(g)) for g in groups]


def _passes_unexpected(model: Any) -> list[str]:
    found = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(n.endswith("rotary_emb.inv_freq") for n in buffers):
        found.add(r"rotary_emb\.inv_freq")
    if any(n.endswith("position_ids") for n in buffers):
        found.add(r"(^|\.)position_ids$")
    return sorted(found)


def _saved(model: Any) -> tuple[dict[str, tuple[int, ...]], bool]:
    """What `save_pretrained` writes; False with names in memory where they can't be taken back."""
    from transformers import modeling_utils

    state = {n: t for n, t in model.state_dict().items() if hasattr(t, "shape")}
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    try:
        if hasattr(modeling_utils, "revert_weight_conversion"):
            state = modeling_utils.remove_tied_weights_from_state_dict(state, model)
            state = modeling_utils.revert_weight_conversion(model, state)
        else:
            state = _saved_by_4(model, state)
    except Exception:
        return {n: tuple(t.shape) for n, t in state.items()}, False
    return {n: tuple(t.shape) for n, t in state.items() if hasattr(t, "shape")}, True


def _saved_by_4(model: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Source: `save_pretrained` of transformers 4.57."""
    from transformers import modeling_utils

    homes: dict[int, list[str]] = {}
    for name in state:
        homes.setdefault(id(_at(model, name)), []).append(name)
    tied = list(getattr(model, "_tied_weights_keys", None) or ())
    for names in homes.values():
        found = [n for n in sorted(names) if any(re.search(p, n) for p in tied)]
        gone = found if len(found) < len(names) else found[1:]
        others = [n for n in sorted(names) if n not in found]
        for name in [*gone, *others[1:]]:
            state.pop(name, None)
    names_of_vlms = getattr(modeling_utils, "VLMS", ())
    if any(word in type(model).__name__.lower() for word in names_of_vlms):
        reverse = {v: k for k, v in (getattr(model, "_checkpoint_conversion_mapping", None) or {}).items()}
        made: dict[str, Any] = {}
        for key, value in state.items():
            for pattern, replacement in reverse.items():
                replacement = re.sub(r"\(.*\)", "", replacement.lstrip("^"))
                key, count = re.subn(pattern, replacement, key)
                if count:
                    break
            made[key] = value
        return made
    return state


def _at(model: Any, name: str) -> Any:
    where: Any = model
    for part in name.split("."):
        where = getattr(where, part)
    return where


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not an answer
    for line in sys.stdin:
        spent = resource.getrusage(resource.RUSAGE_SELF)
        most = int(spent.ru_utime + spent.ru_stime) + _MOST_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            found = _answer(json.loads(line))
        except Exception as error:
            found = {"unknown": f"{type(error).__name__}: {error}"[:300], "refused": _is_of_config(error)}
        out.write(json.dumps(found) + "\n")
        out.flush()


if __name__ == "__main__":
    _main()
