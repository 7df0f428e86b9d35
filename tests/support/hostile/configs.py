"""Configs, recipes, logs, receipts and cards that attack whoever believes them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from hostile.cases import ADAPTER, BASE, ON_ADAPTER, ON_MODEL, Case, Content, adapter, content_of, model, with_config

DEEP: Any = {}
for _ in range(60):
    DEEP = {"text_config": DEEP}
SLOW = ("(a+)+$", "(a|a)*b", "(.*)*x", "(?:(?:a*)*)*c", "(.*a){25}", "^(([a-z._0-9])+.?)+$", "(x+x+)+y", r"(\w+\s?)*$")
"""Patterns over which Python's matcher takes longer than anybody waits."""


def text(file: str, given: Content, folder: Path) -> None:
    """A model with this as one of its small files."""
    (model(folder) / file).write_bytes(content_of(given))


def adapter_text(given: Content, folder: Path) -> None:
    """An adapter with this as its config."""
    (adapter(folder) / "adapter_config.json").write_bytes(content_of(given))


def of_model(changes: dict[str, Any], folder: Path) -> None:
    """A model with other keys in its config, and the code that they name."""
    root = model(folder)
    with_config(root / "config.json", **changes)
    for name in ("planted_module.py", "modeling_planted_.py", "configuration_planted_.py"):
        (root / name).write_text("import os; os.system('touch canary')")


def of_adapter(changes: dict[str, Any], folder: Path) -> None:
    """An adapter with other keys in its config."""
    root = adapter(folder)
    with_config(root / "adapter_config.json", **changes)
    (root / "planted_module.py").write_text("import os; os.system('touch canary')")


MALFORMED: dict[str, tuple[int, Content]] = {
    "empty": (12, b""),
    "zeros": (12, b"\0" * 64),
    "array": (12, b"[]"),
    "text": (12, b'"config"'),
    "cut": (12, b'{"model_type": "qwen2", "hidd'),
    "deep": (12, b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "brackets": (12, lambda: b"[" * 2_000_000),
    "ten-million-lists": (9, lambda: b'{"a":[' + b"[]," * 10_000_000 + b"[]]}"),
    "duplicate-key": (13, b'{"model_type": "qwen2", "model_type": "llama"}'),
    "not-utf8": (12, b'{"model_type": "\xff"}'),
    "byte-order-mark": (12, b"\xef\xbb\xbf{}"),
    "number-of-5000-digits": (19, b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"),
    "eighty-megabytes": (9, lambda: b'{"a": "' + b"x" * 80_000_000 + b'"}'),
    "pickle": (7, b"\x80\x02cposix\nsystem\nX\x0c\0\0\0touch canary\x85R."),
    "string-without-end": (9, lambda: b'{"a":"' + b'\\"' * 1_000_000),
}

_HUGE = 10**400
MODEL: dict[str, tuple[int, dict[str, Any]]] = {
    "auto-map": (16, {"auto_map": {"AutoConfig": "configuration_planted_.C", "AutoModel": "planted_module.M"}}),
    "auto-map-remote": (16, {"auto_map": {"AutoModel": "attacker/repo--planted_module.M"}, "trust_remote_code": True}),
    "custom-pipeline": (16, {"custom_pipelines": {"x": {"impl": "planted_module.P"}}, "auto_map": None}),
    "layers-of-10-400": (19, {"num_hidden_layers": _HUGE, "n_layer": _HUGE}),
    "layers-of-10-18": (19, {"num_hidden_layers": 10**18}),
    "layers-negative": (19, {"num_hidden_layers": -(10**18)}),
    "layers-text": (19, {"num_hidden_layers": "1e9", "hidden_size": []}),
    "vocabulary-huge": (19, {"vocab_size": 10**18, "hidden_size": 10**18, "pad_token_id": 10**30}),
    "labels-huge": (19, {"num_labels": 10**12}),
    "labels-a-hundred-thousand": (19, {"id2label": {str(i): "x" for i in range(100_000)}}),
    "labels-escapes": (25, {"id2label": {"\x1b[2J": "\x1b]0;x\x07"}, "problem_type": "\x1b[2J"}),
    "architecture-escapes": (25, {"architectures": ["\x1b[2J\x1b[1;1Hevil\u202e"], "model_type": "\x1b[31m\n\n"}),
    "architecture-number": (19, {"architectures": [5, {"a": []}], "model_type": 5}),
    "architecture-text": (19, {"architectures": "Qwen2ForCausalLM" * 10_000, "model_type": ["x"]}),
    "architecture-traversal": (14, {"architectures": ["../../x"], "model_type": "../../etc/passwd"}),
    "nested": (12, DEEP),
    "nested-not-objects": (19, {"text_config": 5, "quantization_config": None, "rope_scaling": [[]]}),
    "tie-text": (19, {"tie_word_embeddings": "yes"}),
    "dtype-escapes": (25, {"torch_dtype": "\x1b[2J", "dtype": ["bfloat16"]}),
    "infinite": (19, {"hidden_size": float("inf"), "vocab_size": float("nan"), "pad_token_id": float("nan")}),
    "key-escapes": (25, {"\x1b[2J": 1, "x\n---\nlicense: mit": 2, "a" * 100_000: 3}),
    "half-a-pair": (25, {"architectures": ["\ud800ForCausalLM"], "model_type": "\udfff", "_name_or_path": "\ud800"}),
}
"""Configs that are believed in nothing but what the weights bear out."""

TOKENIZER: dict[str, tuple[int, str, bytes]] = {
    "template-runs": (16, "chat_template.jinja", b"{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "template-loops": (9, "chat_template.jinja", b"{% for i in range(10**12) %}x{% endfor %}"),
    "config-escapes": (25, "tokenizer_config.json", b'{"pad_token": "\\u001b[2J", "eos_token": "\\ud800"}'),
    "config-auto-map": (
        16,
        "tokenizer_config.json",
        b'{"auto_map": {"AutoTokenizer": ["planted_module.T", null]}, "pad_token": 5}',
    ),
    "config-deep": (12, "tokenizer_config.json", b"[" * 500_000),
    "config-not-json": (12, "tokenizer_config.json", b"\xff\xfe"),
    "tokenizer-deep": (12, "tokenizer.json", b'{"a":' * 500_000),
    "generation-deep": (12, "generation_config.json", b"[" * 500_000),
}

ADAPTERS: dict[str, tuple[int, dict[str, Any]]] = {
    "rank-of-10-400": (19, {"r": _HUGE}),
    "rank-negative": (19, {"r": -1}),
    "rank-text": (19, {"r": "8"}),
    "rank-fraction": (19, {"r": 8.5}),
    "rank-true": (19, {"r": True}),
    "alpha-nan": (19, {"lora_alpha": float("nan")}),
    "alpha-infinite": (19, {"lora_alpha": float("inf")}),
    "alpha-of-10-400": (19, {"lora_alpha": _HUGE}),
    "alpha-list": (19, {"lora_alpha": [16]}),
    "rank-pattern-list": (19, {"rank_pattern": [1]}),
    "rank-pattern-hundred-thousand": (9, {"rank_pattern": {f"layer{i}": 8 for i in range(100_000)}}),
    "rank-pattern-of-10-400": (19, {"rank_pattern": {"q_proj": _HUGE}}),
    "alpha-pattern-broken": (18, {"alpha_pattern": {"(": 8}}),
    "type-escapes": (25, {"peft_type": "\x1b[2J\x1b[1;1H"}),
    "type-number": (19, {"peft_type": 5}),
    "type-unknown": (16, {"peft_type": "planted_module.Attack"}),
    "field-unknown": (16, {"planted_module": "run"}),
    "field-escapes": (25, {"\x1b[2J\u202e": "run"}),
    "bias-escapes": (25, {"bias": "\x1b[2J"}),
    "start-escapes": (25, {"init_lora_weights": "\x1b[2J"}),
    "start-traversal": (14, {"init_lora_weights": "../../x.py"}),
    "layers-10-12": (19, {"layers_to_transform": list(range(1000)), "layer_replication": [[0, 10**12]]}),
    "tokens-that-are-not-there": (20, {"trainable_token_indices": [10**18]}),
    "megatron": (16, {"megatron_config": {"a": 1}, "megatron_core": "planted_module"}),
    "quantised-start": (16, {"loftq_config": {"x": "planted_module"}, "init_lora_weights": "loftq"}),
    **{f"slow-rank-{i}": (18, {"rank_pattern": {p: 8}}) for i, p in enumerate(SLOW)},
    **{f"slow-alpha-{i}": (18, {"alpha_pattern": {p: 8}}) for i, p in enumerate(SLOW[:3])},
}
"""Configs whose fields say something that can't be done, and so nothing is."""

BELIEVED: dict[str, tuple[int, dict[str, Any]]] = {
    "auto-mapping": (16, {"auto_mapping": {"base_model_class": "planted_", "parent_library": "planted_module"}}),
    **{f"slow-targets-{i}": (18, {"target_modules": p}) for i, p in enumerate(SLOW)},
    "targets-hundred-thousand": (9, {"target_modules": ["x" * 20 + str(i) for i in range(100_000)]}),
    "targets-escapes": (25, {"target_modules": ["\x1b[2J", "\u202e"]}),
    "modules-traversal": (14, {"modules_to_save": ["../../etc/passwd", "score"]}),
    "revision-traversal": (14, {"revision": "../../../../secret"}),
    "revision-number": (14, {"revision": 5}),
    "task-escapes": (25, {"task_type": "\x1b[2J"}),
    "task-list": (25, {"task_type": ["SEQ_CLS"]}),
    "version-escapes": (25, {"peft_version": "\x1b[2J\n"}),
    "exclude-slow": (18, {"exclude_modules": SLOW[0]}),
    "layers-pattern-slow": (18, {"layers_pattern": SLOW[0], "layers_to_transform": [0]}),
}
"""What may be merged or refused, so long as nothing runs and nobody waits."""


CASES: list[Case] = [
    *(
        Case(
            f"config-{n}",
            row,
            partial(text, "config.json", raw),
            ON_MODEL,
            "config.json",
            "json-malformed|config-|input-",
        )
        for n, (row, raw) in MALFORMED.items()
    ),
    *(
        Case(
            f"adapter-config-{n}",
            row,
            partial(adapter_text, raw),
            ON_ADAPTER,
            "adapter_config.json",
            "json-malformed|config-|input-",
        )
        for n, (row, raw) in MALFORMED.items()
    ),
    *(
        Case(
            f"config-{n}",
            row,
            partial(of_model, changes),
            ("inspect m", "doctor m", "reshard m out", "push m me/x --dry-run", f"merge-lora {ADAPTER} out2 --base m"),
            exits={"inspect": (0, 1), "doctor": (0, 1), "reshard": (0, 3), "push": (0, 3), "merge-lora": (0, 2, 3)},
            harmless=True,
            closed=("planted_module.py", "modeling_planted_.py", "configuration_planted_.py"),
            absent=("planted_module.py",),
        )
        for n, (row, changes) in MODEL.items()
    ),
    *(
        Case(
            f"tokenizer-{n}",
            row,
            partial(text, file, raw),
            (
                "inspect m",
                "reshard m out",
                "push m me/x --dry-run",
                "convert m out2 --to openrlhf --role reward",
                "verify m --for openrlhf",
            ),
            exits={"inspect": (0, 1), "reshard": (0, 3), "push": (0, 3), "convert": (0, 2, 3, 4), "verify": (0, 3, 4)},
            harmless=True,
        )
        for n, (row, file, raw) in TOKENIZER.items()
    ),
    *(
        Case(
            f"adapter-{n}",
            row,
            partial(of_adapter, changes),
            (f"merge-lora a out --base {BASE}", "inspect a", f"doctor a --base {BASE}"),
            says="",
            exits={"inspect": (0, 1), "doctor": (0, 1)},
        )
        for n, (row, changes) in ADAPTERS.items()
    ),
    *(
        Case(
            f"adapter-{n}",
            row,
            partial(of_adapter, changes),
            (f"merge-lora a out --base {BASE}", "inspect a", f"doctor a --base {BASE}", "push a me/x --dry-run"),
            exits={"merge-lora": (0, 3), "inspect": (0, 1), "doctor": (0, 1), "push": (0, 3)},
            harmless=True,
            closed=("planted_module.py",),
            absent=("planted_module.py",),
        )
        for n, (row, changes) in BELIEVED.items()
    ),
]
