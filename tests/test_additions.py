"""The four additions, done as docs/plug-ins.md says them: a package of its blocks alone, and the commands it shows.

The package is installed as pip would lay it out (its own dist-info beside it) and used from another folder, by the
command line and by its own tests, each in a process of their own: a child of one that has imported our modules, and
looked for no plug-in.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import struct
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from converter.testing import tiny_reward_model, write_tensors
from served_shell import Shell, Typed

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plug-ins.md"
_FILE = re.compile(r"^`([\w./]+)`\n\n```(?:python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Addition:
    """A package installed in `site`, and the commands of its section of the page."""

    site: Path
    work: Path
    files: dict[str, str]
    commands: tuple[str, ...]
    shell: Shell

    def run(self, command: str, *, code: int = 0) -> str:
        """A command as the page has it, typed in the user's folder; what it printed, on one line."""
        assert command in self.commands
        done = self._type(command, self.work)
        assert done.code == code, f"{command}: exit {done.code}\n{done.out}\n{done.err}"
        return " ".join((done.out + " " + done.err).split())

    def own_tests(self) -> str:
        """The tests that the page has, by pytest."""
        found = [name for name in self.files if name.startswith("tests/")]
        done = self._type(shlex.join(["pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *found]), self.site)
        assert done.code == 0, done.out
        return done.out

    def _type(self, line: str, folder: Path) -> Typed:
        inherited = os.environ.get("PYTHONPATH", "")
        return self.shell.type(line, folder, PYTHONPATH=os.pathsep.join(filter(None, [str(self.site), inherited])))


@pytest.fixture(scope="module")
def cold() -> Iterator[Shell]:
    with Shell(warm=False) as shell:
        yield shell


def section(title: str) -> str:
    text = PAGE.read_text("utf-8")
    begin = text.index(f"\n## {title}\n")
    end = text.find("\n## ", begin + 4)
    return text[begin:] if end < 0 else text[begin:end]


def added(title: str, folder: Path, shell: Shell) -> Addition:
    """What the section says, done: files written, entry points registered."""
    text = section(title)
    files = dict(_FILE.findall(text))
    commands = tuple(line for block in _COMMANDS.findall(text) for line in block.splitlines())
    site, work = folder / "site", folder / "work"
    for name, content in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(content)
    work.mkdir()
    info = site / "acme_rl-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-rl\nVersion: 1.0\n")
    groups = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    assert [len(points) for points in groups.values()] == [1], "one line"
    assert len([n for n in files if n.startswith("acme_rl/")]) == 1, "one file"
    return Addition(site, work, files, commands, shell)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_trainer_is_one_file_and_one_line(tmp_path: Path, cold: Shell) -> None:
    acme = added("A trainer", tmp_path, cold)
    convert, verify, doctor = acme.commands
    tiny_reward_model(acme.work / "rm")
    acme.run(convert)
    written = load_file(acme.work / "critic" / "model.safetensors")
    score = load_file(acme.work / "rm" / "model.safetensors")["score.weight"]
    assert torch.equal(written["acme_head.weight"], score)
    assert json.loads((acme.work / "critic" / "config.json").read_text())["architectures"] == ["AcmeCritic"]
    assert "verified" in acme.run(verify).lower()

    edit(acme.work / "critic" / "config.json", architectures=["LlamaForCausalLM"])
    assert "acme-rl 2.0 stops at the first step" in acme.run(verify, code=4)
    (acme.work / "train.sh").write_text("/opt/bin/acme-train --policy ./actor --critic ./critic\n")
    said = acme.run(doctor, code=1)
    assert "stops at the first step" in said
    assert "launch-path-missing" in said
    assert "passed" in acme.own_tests()


def test_a_source_is_one_file_and_one_line(tmp_path: Path, cold: Shell) -> None:
    acme = added("A source", tmp_path, cold)
    inspect, gather = acme.commands
    rm = acme.work / "rm"
    tiny_reward_model(rm)
    tensors = load_file(rm / "model.safetensors")
    state = acme.work / "state"
    state.mkdir()
    index, data = [], b""
    for name, tensor in tensors.items():
        index.append({"name": name, "dtype": "F32", "shape": list(tensor.shape), "offset": len(data)})
        data += tensor.numpy().tobytes()
    (state / "acme_state.json").write_text(json.dumps(index))
    (state / "acme_state.data").write_bytes(data)
    (state / "config.json").write_text((rm / "config.json").read_text())
    assert "acme_state" in acme.run(inspect)
    acme.run(gather)
    written = load_file(acme.work / "model" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[n], t) for n, t in tensors.items())

    (state / "acme_state.data").write_bytes(data[:-4])
    (acme.work / "model").rename(acme.work / "before")
    assert "acme-cut" in acme.run(gather, code=3)
    assert not (acme.work / "model").exists()
    assert "passed" in acme.own_tests()


def test_a_peft_method_is_one_file_and_one_line(tmp_path: Path, cold: Shell) -> None:
    acme = added("A PEFT method", tmp_path, cold)
    (merge,) = acme.commands
    tiny_reward_model(acme.work / "base")
    adapter = acme.work / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "ROW_SCALE", "gain": 2.0}))
    module = "model.layers.0.mlp.up_proj"
    write_tensors(adapter / "adapter_model.safetensors", {f"base_model.model.{module}.row_scale": (16,)})
    acme.run(merge)
    base, merged = (load_file(acme.work / f / "model.safetensors") for f in ("base", "merged"))
    scale = load_file(adapter / "adapter_model.safetensors")[f"base_model.model.{module}.row_scale"]
    expected = (base[f"{module}.weight"].double() * (1 + 2.0 * scale.double()[:, None])).float()
    assert torch.equal(merged[f"{module}.weight"], expected)
    assert not torch.equal(merged[f"{module}.weight"], base[f"{module}.weight"])
    assert all(torch.equal(merged[n], t) for n, t in base.items() if n != f"{module}.weight")

    (acme.work / "merged").rename(acme.work / "before")
    edit(adapter / "adapter_config.json", gain="much")
    assert "`gain` is malformed" in acme.run(merge, code=3)
    edit(adapter / "adapter_config.json", gain=1.0, rotation=True)
    assert "adapter-field-unknown" in acme.run(merge, code=3)
    assert not (acme.work / "merged").exists()
    assert "passed" in acme.own_tests()


def test_a_finding_is_one_function(tmp_path: Path, cold: Shell) -> None:
    acme = added("A finding", tmp_path, cold)
    doctor, explain = acme.commands
    tiny_reward_model(acme.work / "early")
    assert "acme-warm-up" not in acme.run(doctor)
    edit(acme.work / "early" / "config.json", acme_phase="warm-up")
    said = acme.run(doctor, code=1)
    assert "acme-warm-up" in said
    assert "rlhf-convert inspect ./early" in said
    assert "in which the head is not trained" in acme.run(explain)
    assert len(re.findall(r"^def ", acme.files["acme_rl/checks.py"], re.MULTILINE)) == 1
    assert "passed" in acme.own_tests()


@pytest.mark.parametrize("title", ["A trainer", "A source", "A PEFT method", "A finding"])
def test_without_its_line_an_addition_is_not_there(title: str, tmp_path: Path, cold: Shell) -> None:
    """The entry point is what makes it known: the same package without one fails at the page's first command."""
    acme = added(title, tmp_path, cold)
    (acme.site / "acme_rl-1.0.dist-info" / "entry_points.txt").unlink()
    for folder in ("rm", "base", "early"):
        tiny_reward_model(acme.work / folder)
    (acme.work / "state").mkdir()
    (acme.work / "state" / "acme_state.data").write_bytes(struct.pack("<f", 1))
    (acme.work / "adapter").mkdir()
    (acme.work / "adapter" / "adapter_config.json").write_text('{"peft_type": "ROW_SCALE"}')
    name = "base_model.model.model.layers.0.mlp.up_proj.row_scale"
    write_tensors(acme.work / "adapter" / "adapter_model.safetensors", {name: (16,)})
    acme.run(acme.commands[-1 if title == "A finding" else 0], code={"A PEFT method": 3}.get(title, 2))
