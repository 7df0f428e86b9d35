"""Every source dialect into every target, judged by the trainers themselves.

A source is written by its trainer's save code and loaded by its trainer's loader; the target is converted by our
command line and loaded by the target's loader. What the two loaders hold and compute is compared: neither side is ours.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from cells import BIAS, MEAN, SOURCES, STD, TARGETS, Cell, Source, Target, inputs, table
from judging import judge

from converter.cli import main as command_line
from converter.shipped import shipped
from places import REPOSITORY

HERE = Path(__file__).resolve().parent
PROBES = HERE.parents[1] / "converter" / "examine" / "verify" / "probes"


def environment(home: Path) -> dict[str, str]:
    """For subprocesses: no network, no GPU, no tokens."""
    kept = {k: os.environ[k] for k in ("PATH", "LANG", "LD_LIBRARY_PATH") if k in os.environ}
    return kept | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_OFFLINE": "1"}


def python_of(envs: Path, name: str) -> Path:
    """An environment's interpreter."""
    return envs / name / "bin" / "python"


def installed_here(folder: Path) -> str:
    """A PYTHONPATH under which another Python has this package, and knows its plug-ins by the metadata of this install.

    Args:
        folder: is made; it holds a link to the metadata.
    """
    place = Path(str(importlib.metadata.distribution("rlhf-convert").locate_file("")))
    (metadata,) = place.glob("rlhf_convert*.dist-info")
    folder.mkdir(parents=True)
    (folder / metadata.name).symlink_to(metadata)
    return os.pathsep.join([str(REPOSITORY), str(folder)])


def make_base(folder: Path) -> None:
    """A tiny Llama, untied, that every trainer of the matrix takes; a tokenizer beside it."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.2 + (1.0 if "norm" in name else 0.0))
    model.save_pretrained(folder)
    # Trainers read rope_theta where transformers 4 wrote it.
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved["rope_theta"] = 10000.0
    path.write_text(json.dumps(saved))
    tokenizer = shipped("fixtures") / "tiny-qwen2-base"
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder)
    # transformers 5 names a class that transformers 4 lacks, and ms-swift's environment has 4.
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def make_head(source: Source, path: Path) -> None:
    """Numbers of a head, exact in fp32."""
    weight = [[((37 * i) % 101 - 50) / 64 for i in range(32)]]
    head: dict[str, Any] = {"weight": weight}
    head |= {"bias": [BIAS]} if source.bias else {}
    head |= {"mean": MEAN, "std": STD} if source.mean else {}
    path.write_text(json.dumps(head))


class Bench:
    """The folders and reports of one run."""

    def __init__(self, envs: Path, work: Path) -> None:
        self.envs, self.work = envs, work
        self.base = work / "base"
        self.made: dict[str, Path] = {}
        self.converted: dict[tuple[str, str], tuple[Path, str]] = {}
        self.failed: dict[tuple[str, str], str] = {}

    def make_sources(self) -> None:
        """Every source whose environment is built."""
        make_base(self.base)
        (self.work / "inputs.json").write_text(json.dumps(inputs()))
        for number, source in enumerate(SOURCES):
            python = python_of(self.envs, source.environment)
            if not python.exists():
                continue
            head, out = self.work / f"head{number}.json", self.work / f"source{number}"
            make_head(source, head)
            command = [python, HERE / "make_source.py", source.maker, self.base, out, head]
            done = subprocess.run(command, env=environment(self.work), capture_output=True, text=True, check=False)
            if done.returncode:
                raise AssertionError(f"{source.name} was not written:\n{done.stderr[-2000:]}")
            self.made[source.name] = out

    def convert_all(self) -> None:
        """Every cell, as it is and, where a constant is refused, with `--bias drop`."""
        for i, source in enumerate(SOURCES):
            for j, target in enumerate(TARGETS):
                if source.name in self.made and python_of(self.envs, target.environment).exists():
                    self._convert(source, target, self.work / f"out{i}-{j}")

    def _convert(self, source: Source, target: Target, out: Path) -> None:
        command = ["convert", str(self.made[source.name]), str(out), "--to", target.to, "--role", target.role, "--json"]
        command += (
            ["--base", str(self.base)] if target.lm_head and source.maker not in ("trl_vhead", "llamafactory") else []
        )
        code, said = run_command(command)
        refused = ""
        if code:
            refused = said.get("error", {}).get("code", f"exit code {code}")
            code, said = run_command([*command, "--bias", "drop"])
        if code:
            self.failed[source.name, target.name] = f"{refused}: {said.get('error', {}).get('what')}"
        else:
            self.converted[source.name, target.name] = (out, refused)

    def probe_all(self) -> dict[Any, dict[str, Any]]:
        """Reports by source name, and by cell; a process for each environment."""
        jobs: dict[str, list[tuple[Any, list[str]]]] = {}
        for source in SOURCES:
            if source.name in self.made:
                for role in source.roles:
                    key = (source.name, role)
                    jobs.setdefault(source.environment, []).append(
                        (key, self._job(key, source.probe, self.made[source.name], role, source.more))
                    )
        for target in TARGETS:
            for source in SOURCES:
                cell = (source.name, target.name)
                if cell in self.converted:
                    jobs.setdefault(target.environment, []).append(
                        (cell, self._job(cell, target.probe, self.converted[cell][0], target.role, ()))
                    )
        for name, each in jobs.items():
            todo = self.work / f"jobs-{name}.json"
            todo.write_text(json.dumps([job for _, job in each]))
            log = self.work / f"log-{name}.txt"
            with log.open("wb") as file:
                subprocess.run(
                    [python_of(self.envs, name), HERE / "probe_many.py", todo],
                    env=environment(self.work), stdout=file, stderr=file, check=False, cwd=self.work,
                )  # fmt: skip
        return {
            key: json.loads(Path(job[job.index("--out") + 1]).read_text())
            for each in jobs.values()
            for key, job in each
            if Path(job[job.index("--out") + 1]).exists()
        }

    def _job(self, key: tuple[str, str], probe: str, folder: Path, role: str, more: tuple[str, ...]) -> list[str]:
        out = self.work / f"report-{re.sub(r'[^a-z0-9]+', '-', '-'.join(key).lower())}.json"
        inputs_file = str(self.work / "inputs.json")
        shipped, own = PROBES / f"probe_{probe}.py", HERE / f"probe_{probe}.py"
        job = [str(shipped if shipped.exists() else own), str(folder), "--role", role, "--inputs", inputs_file]
        return [*job, "--out", str(out), *more]


def run_command(arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """Our command line, in this process; the exit code and the JSON it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        code = command_line(arguments)
    try:
        return code, json.loads(out.getvalue())
    except ValueError:
        return code, {}


def run_matrix(envs: Path, work: Path) -> dict[tuple[str, str], Cell]:
    """Every cell whose two environments are built."""
    bench = Bench(envs, work)
    bench.make_sources()
    bench.convert_all()
    reports = bench.probe_all()
    cells: dict[tuple[str, str], Cell] = {}
    for source in SOURCES:
        for target in TARGETS:
            key = (source.name, target.name)
            if key in bench.failed:
                told = bench.failed[key]
                impossible = source.mlp and told.startswith("head-not-linear")
                cells[key] = Cell("impossible" if impossible else "wrong", detail=told)
            elif key in bench.converted:
                own = {role: reports.get((source.name, role), {}) for role in source.roles}
                cells[key] = judge(source, target, own, reports.get(key, {}), *bench.converted[key])
    return cells


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True)
    results = run_matrix(Path(sys.argv[1]), folder)
    print(table(results))
    for key, cell in results.items():
        print(key, cell)
