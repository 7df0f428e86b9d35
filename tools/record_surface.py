"""What a user can do: verbs, flags, exit codes, the keys of every `--json` output, the steps of recipes; as JSON.

    python tools/record_surface.py > surface.json

It runs under any tree of rlhf-convert that `python` imports as `converter`; inputs are the fixtures and stored runs
beside this file, so that two trees are asked the same. `tests/cli/surface.json` is its output for release 0.1.0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import io
import json
import os
import shutil
import struct
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from surface_commands import COMMANDS, SCREENS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

OFFLINE = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}

RUNS = {
    "zero": "zero/runs/lora-z3-n2",
    "full": "zero/runs/reward-z2-n2",
    "universal": "zero/universal_runs/lora-z3-n2",
    "dcp": "dcp/runs/accelerate-adapter-n2",
    "verl": "verl_saves/runs/critic-fsdp2-n4",
}

NAMED = {"code", "severity", "outcome", "recoverability", "applicability"}
"""Keys whose values are words that programs compare."""


def stored_run(name: str) -> Path:
    """A run beside the tests, wherever below `tests/` it lies."""
    return next(p for p in sorted((ROOT / "tests").rglob(Path(name).name)) if p.as_posix().endswith(name))


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def empty_one_tensor(path: Path, ending: str) -> None:
    """Give the tensor with this ending the shape (0,), as ZeRO-3 does."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    kept = b""
    entries = {n: e for n, e in header.items() if n != "__metadata__"}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        part = b"" if name.endswith(ending) else data[begin:end]
        entry["shape"] = [0] if name.endswith(ending) else entry["shape"]
        entry["data_offsets"] = [len(kept), len(kept) + len(part)]
        kept += part
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + kept)


def make_inputs() -> None:
    """The folders that the commands name, in the current folder."""
    for name, fixture in {
        "base": "tiny-qwen2-base",
        "adapter": "tiny-reward-adapter",
        "run": "tiny-reward-run",
        "cut": "tiny-qwen2-base",
    }.items():
        shutil.copytree(ROOT / "fixtures" / fixture, name)
    for name, run in RUNS.items():
        shutil.copytree(stored_run(run), name)
    change_json(Path("adapter/adapter_config.json"), base_model_name_or_path="base")
    shutil.copytree("adapter", "adapter-alone")
    change_json(Path("adapter-alone/adapter_config.json"), base_model_name_or_path="./gone/model")
    shutil.copytree("adapter", "lost")
    empty_one_tensor(Path("lost/adapter_model.safetensors"), "layers.0.self_attn.q_proj.lora_B.weight")
    shard = next(Path("cut").glob("*00001*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64])
    Path("empty").mkdir()
    Path("train.sh").write_text(
        "deepspeed --module openrlhf.cli.train_ppo_ray --pretrain base "
        "--reward_pretrain adapter --critic_pretrain base\n"
    )
    Path("train.log").write_text(
        "loading\nSome weights of Qwen2ForSequenceClassification were not initialized from the model checkpoint at "
        "./rm and are newly initialized: ['score.weight']\nepoch 1\n"
    )
    pairs = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}]
    Path("pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    Path("recipe.yaml").write_text(
        "version: 1\ninputs: {source: base, adapter: adapter}\nsteps:\n  - merge-lora: {adapters: [adapter]}\n"
    )
    Path("wrong.yaml").write_text("version: 1\ninputs: {source: base}\nsteps:\n  - no-such-step: {}\n")


def run(arguments: list[str]) -> tuple[int, str]:
    """One command line in this process: its exit code, and what it printed on stdout."""
    from converter.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = main(list(arguments))
    return code, out.getvalue()


def tamper() -> None:
    """A copy of what merge-lora wrote with one byte changed."""
    if Path("rm").is_dir() and not Path("tampered").exists():
        shutil.copytree("rm", "tampered")
        shard = max(Path("tampered").glob("*.safetensors"))
        content = bytearray(shard.read_bytes())
        content[-1] ^= 0x40
        shard.write_bytes(bytes(content))


def keys(value: Any, path: str, found: dict[str, set[str]], words: dict[str, set[str]]) -> None:
    """Every path of keys with the types that lie there. Keys that are names of tensors, files or modules become `*`."""
    kind = {str: "text", bool: "truth", int: "number", float: "number", type(None): "null"}.get(type(value))
    if isinstance(value, dict):
        found.setdefault(path, set()).add("object")
        for key, inner in value.items():
            name = key if key.isidentifier() else "*"
            keys(inner, f"{path}.{name}" if path else name, found, words)
            if key in NAMED and isinstance(inner, str):
                words.setdefault(f"{path}.{key}", set()).add(inner)
    elif isinstance(value, list):
        found.setdefault(path, set()).add("list")
        for inner in value:
            keys(inner, f"{path}[]", found, words)
    else:
        assert kind is not None, value
        found.setdefault(path, set()).add(kind)


def commands_of(verb: str) -> Any:
    """The command that Typer builds for a verb, caught when the command line would call it, or the program of it."""
    import typer
    from typer.core import TyperCommand

    from converter.cli import main

    caught: list[Any] = []

    def call(self: Any, *_arguments: Any, **_options: Any) -> int:
        caught.append(self)
        return 0

    kinds: tuple[Any, ...] = (typer.Typer, TyperCommand)
    before = [vars(kind).get("__call__") for kind in kinds]
    for kind in kinds:
        kind.__call__ = call
    try:
        main([verb, "--help"])
    finally:
        for kind, own in zip(kinds, before, strict=True):
            if own is None:
                del kind.__call__
            else:
                kind.__call__ = own
    command = typer.main.get_command(caught[0]) if isinstance(caught[0], typer.Typer) else caught[0]
    return getattr(command, "commands", {}).get(verb, command)


def kind_of(parameter: Any) -> tuple[str, list[str]]:
    """What a parameter takes: the type's name, and the values to choose from."""
    annotation = parameter.type_descriptor.annotation
    inner = [a for a in typing.get_args(annotation) if a is not type(None)]
    annotation = inner[0] if inner else annotation
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return "choice", [str(each.value) for each in annotation]
    return annotation.__name__, []


def parameters_of(verb: str) -> dict[str, dict[str, Any]]:
    """Arguments and options of a verb: how each is spelt, what it takes, and what it is without being given."""
    found: dict[str, dict[str, Any]] = {}
    for each in commands_of(verb).params:
        option = each.opts[0].startswith("-")
        kind, choices = kind_of(each)
        default = each.default.value if isinstance(each.default, enum.Enum) else each.default
        found[max(each.opts, key=len) if option else each.metavar] = {
            "spelt": sorted(each.opts) if option else [],
            "required": each.required,
            "repeatable": each.multiple,
            "takes": "nothing" if option and each.is_flag else kind,
            "choices": choices,
            "metavar": each.metavar,
            "least": each.type_descriptor.parameter_info.min,
            "default": list(default) if isinstance(default, tuple) else default,
        }
    return found


def verbs() -> list[str]:
    """What `--help` lists."""
    _, screen = run(["--help"])
    lines = screen[screen.index("Commands:") :].splitlines()[1:]
    return [line.split()[0] for line in lines if line.startswith("  ") and line.strip() and line[2] != " "]


def steps() -> dict[str, dict[str, bool]]:
    """Steps that a recipe may name, with their keys and whether each must be given."""
    missing = dataclasses.MISSING
    return {
        each.name: {
            f.name: f.default is missing and f.default_factory is missing for f in dataclasses.fields(each.load())
        }
        for each in sorted(entry_points(group="rlhf_convert.converters"))
        if each.value.startswith("converter.")
    }


def plug_ins() -> dict[str, list[str]]:
    """Names that users write or see: sources, kernels, dialects; and shipped recipes."""
    value = json.loads(run(["list", "--json"])[1])
    found: dict[str, list[str]] = {}
    for each in value["plug_ins"]:
        found.setdefault(each["kind"], []).append(each["name"])
    return {kind: sorted(names) for kind, names in found.items()}


@contextlib.contextmanager
def a_hub() -> Iterator[None]:
    """The Hub's client talks to one on loopback; set before huggingface_hub is imported."""
    from fake_hub import FakeHub, running

    with running(FakeHub()) as hub:
        os.environ.update(hub.environment() | {"HF_HOME": str(Path("hub").resolve())})
        hub.add("me/some", {"config.json": b"{}"})
        yield


def record() -> dict[str, Any]:
    """Everything, in the current folder, which is empty."""
    return {
        "verbs": {verb: parameters_of(verb) for verb in verbs()},
        "steps": steps(),
        "plug_ins": plug_ins(),
        **record_commands(),
    }


def record_commands(
    printed: dict[str, str] | None = None, served: Callable[[], contextlib.AbstractContextManager[None]] = a_hub
) -> dict[str, Any]:
    """What every command returns, and the keys of what it prints; `printed` gets the texts.

    Args:
        served: while it lasts, there is a Hub with a model `me/some`.
    """
    exits: dict[str, Any] = {}
    outputs: dict[str, Any] = {}
    with served():
        make_inputs()
        for title, command in COMMANDS.items():
            tamper()
            code, text = run([*command, "--json"])
            exits[title] = {"command": [*command, "--json"], "exit": code}
            if printed is not None:
                printed[title] = text
            found: dict[str, set[str]] = {}
            words: dict[str, set[str]] = {}
            for value in values_of(text):
                keys(value, "", found, words)
            outputs[title] = {
                "keys": {k: "/".join(sorted(v)) for k, v in sorted(found.items())},
                "words": {k: sorted(v) for k, v in sorted(words.items())},
            }
        for title, command in SCREENS.items():
            code, text = run(command)
            exits[title] = {"command": command, "exit": code}
            if "--print-recipe" in command:
                exits[title]["steps"] = steps_in(text)
    return {"commands": exits, "json": outputs}


def values_of(text: str) -> list[Any]:
    """The JSON values of an output: one, or one a line."""
    try:
        return [json.loads(text)]
    except ValueError:
        return [json.loads(line) for line in text.splitlines()]


def steps_in(recipe: str) -> list[str]:
    """Names of the steps of a printed recipe."""
    import yaml

    return [next(iter(step)) if isinstance(step, dict) else step for step in yaml.safe_load(recipe)["steps"]]


def as_text(found: dict[str, dict[str, Any]]) -> str:
    """The record as JSON, a line for each verb, command and output."""
    parts = []
    for name, part in sorted(found.items()):
        lines = [f"  {json.dumps(k)}: {json.dumps(v, sort_keys=True)}" for k, v in sorted(part.items())]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}"


def main() -> None:
    """Prints what was found."""
    os.environ.update(OFFLINE)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = record()
        os.chdir(ROOT)
    print(as_text(found))


if __name__ == "__main__":
    main()
