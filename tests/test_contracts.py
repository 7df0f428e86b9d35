"""Our own plug-ins keep the contracts that `converter.testing` ships for those of others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import heads_zoo as zoo
from converter import testing
from converter.converters.cast import Cast
from converter.converters.finding import Converter
from converter.converters.heads.remap import RemapHead
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.methods.finding import find_method, methods
from converter.converters.merge.methods.method import Method
from converter.core.checkpoint import Checkpoint
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.known import dialects
from converter.dialects.spec import Dialect
from converter.errors import Refused
from converter.examine.diagnoses.case import Diagnosis
from converter.examine.doctor import diagnoses
from converter.shipped import shipped
from converter.sources.finding import Source, kind_of, sources
from oracle.adapters import make_adapter
from oracle.bare_adapters import Bare, bare_adapters
from oracle.bases import Base, make_base


def opened(folder: Path) -> Checkpoint:
    return sources()[kind_of(folder) or ""].open(folder, asked=str(folder))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base of more than one chunk of rows, and an adapter of each method over it, by PEFT."""
    folder = tmp_path_factory.mktemp("pair")
    base: Base = make_base(folder / "base", hidden=96, intermediate=160)
    made = {"base": folder / "base"}
    for title, settings in (("LoRA", {}), ("DoRA", {"use_dora": True})):
        made[title] = make_adapter(folder / title, base, **settings)
    made["biased"] = make_base(folder / "biased", "qwen2", hidden=96, intermediate=160).path
    beft = Bare("BEFT", {}, {"beft_bias": (1, 96)})
    made["BEFT"] = beft.write(folder / "BEFT")
    for bare in bare_adapters(96).values():
        title = find_method({"peft_type": bare.peft_type} | bare.config, "").title
        if title not in made:
            made[title] = bare.write(folder / title)
    made["LoRA of mlx-lm"] = _of_mlx(make_adapter(folder / "mlx", base, target_modules=["q_proj", "o_proj"]))
    return made


def _of_mlx(adapter: Path) -> Path:
    """An adapter of PEFT's as mlx-lm would have saved it: factors transposed, a scale of its own."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = {
        k: k.removeprefix("base_model.model.").replace("_A.weight", "_a").replace("_B.weight", "_b") for k in tensors
    }
    save_file({names[k]: t.T.contiguous() for k, t in tensors.items()}, adapter / "adapters.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    scale = config["lora_alpha"] / config["r"]
    plain = {"fine_tune_type": "lora", "model": "x/y", "lora_parameters": {"rank": config["r"], "scale": scale}}
    (adapter / "adapter_config.json").write_text(json.dumps(plain))
    return adapter


class TestDialects(testing.DialectContract):
    @pytest.fixture(params=sorted(dialects()))
    def dialect(self, request: pytest.FixtureRequest) -> Dialect:
        return dialects()[request.param]


class TestSources(testing.SourceContract):
    @pytest.fixture(params=["hf", "peft", "modeling", "deepspeed"])
    def source(self, request: pytest.FixtureRequest) -> Source:
        return sources()[request.param]

    @pytest.fixture
    def folder(self, source: Source, pair: dict[str, Path], tmp_path: Path) -> Path:
        if source.name == "modeling":
            return zoo.save(zoo.FORMS["coati"], zoo.live("llama"), tmp_path / "coati")
        if source.name == "deepspeed":
            run = Path(shutil.copytree(shipped("fixtures") / "tiny-reward-run", tmp_path / "run"))
            return next(p for p in sorted(run.rglob("global_step*")) if p.is_dir())
        return pair["base" if source.name == "hf" else "LoRA"]


class TestMethods(testing.MethodContract):
    @pytest.fixture(params=[m.title for m in methods() if m.factors])
    def method(self, request: pytest.FixtureRequest) -> Method:
        return next(m for m in methods() if m.title == request.param)

    @pytest.fixture
    def adapter(self, method: Method, pair: dict[str, Path]) -> Path:
        return pair[method.title]

    @pytest.fixture
    def base(self, method: Method, pair: dict[str, Path]) -> Path:
        return pair["biased" if method.title == "BEFT" else "base"]

    def test_planning_imports_no_torch(self, pair: dict[str, Path]) -> None:
        """All methods in one process: each would cost a second of its own."""
        adapters = [str(folder) for title, folder in pair.items() if title not in ("base", "biased", "BEFT")]
        command = [sys.executable, "-c", testing.PLANNED_WITHOUT_TORCH, *adapters, str(pair["base"])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


class TestConverters(testing.ConverterContract):
    @pytest.fixture(params=["cast", "merge-lora", "remap-head"])
    def name(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def converter(self, name: str, pair: dict[str, Path]) -> Converter:
        known: dict[str, Converter] = {
            "cast": Cast(dtype="bf16"),
            "merge-lora": MergeLora(adapters=(opened(pair["LoRA"]),)),
            "remap-head": RemapHead(to="openrlhf", role="critic"),
        }
        return known[name]

    @pytest.fixture
    def checkpoint(self, name: str, pair: dict[str, Path], tmp_path: Path) -> Checkpoint:
        return testing.tiny_reward_model(tmp_path / "rm") if name == "remap-head" else opened(pair["base"])

    @pytest.fixture
    def declared(self, name: str, pair: dict[str, Path]) -> Iterable[LazyTensor]:
        """A merge asks whether every lora_B is zero, and whether every tensor of the adapter is finite."""
        return opened(pair["LoRA"]).tensors.values() if name == "merge-lora" else []


class TestDiagnoses(testing.DiagnosisContract):
    @pytest.fixture(params=["architecture-missing", "architecture-openrlhf", "labels-mismatch", "lora-alpha-zero"])
    def diagnosis(self, request: pytest.FixtureRequest) -> Diagnosis:
        return diagnoses()[request.param]

    @pytest.fixture
    def sound(self, diagnosis: Diagnosis, pair: dict[str, Path], tmp_path: Path) -> Path:
        if "adapter" in diagnosis.kinds:
            return Path(shutil.copytree(pair["LoRA"], tmp_path / "sound"))
        testing.tiny_reward_model(tmp_path / "sound")
        return tmp_path / "sound"

    @pytest.fixture
    def faulty(self, diagnosis: Diagnosis, sound: Path, tmp_path: Path) -> Path:
        folder = Path(shutil.copytree(sound, tmp_path / "faulty"))
        file = folder / ("adapter_config.json" if "adapter" in diagnosis.kinds else "config.json")
        changes = {
            "architecture-missing": {"architectures": None},
            "architecture-openrlhf": {"architectures": ["RewardModel"]},
            "labels-mismatch": {"num_labels": 2, "id2label": {"0": "a", "1": "b"}},
            "lora-alpha-zero": {"lora_alpha": 0},
        }[diagnosis.code]
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder


def test_a_read_that_was_not_declared_fails(tmp_path: Path) -> None:
    """The context would otherwise pass everything."""
    model = testing.tiny_reward_model(tmp_path / "rm")
    score, norm = model.tensors["score.weight"], model.tensors["model.norm.weight"]
    context = testing.DeclaredReads(declared=(score,))
    assert context.is_zero(score) is False
    for read in (context.read, context.is_zero, context.nonfinite, lambda t: context.equal(score, t)):
        with pytest.raises(AssertionError, match="not declared"):
            read(norm)


class _Silent:
    """A converter that loses tensors without a word, and reads what it does not declare."""

    name = "cast"

    def __call__(self, checkpoint: Checkpoint, context: testing.Context) -> Checkpoint:
        context.is_zero(checkpoint.tensors["score.weight"])
        kept = {n: t for n, t in checkpoint.tensors.items() if n != "score.weight"}
        return checkpoint.replace(tensors=kept)


def test_contracts_fail_for_plug_ins_that_break_them(tmp_path: Path) -> None:
    model = testing.tiny_reward_model(tmp_path / "rm")
    contract = testing.ConverterContract()
    with pytest.raises(AssertionError):
        contract.test_every_tensor_is_kept_used_or_dropped_by_name(_Silent(), model)
    with pytest.raises(AssertionError, match="not declared"):
        contract.test_it_reads_no_value_that_it_does_not_declare(_Silent(), model, ())
    with pytest.raises(AssertionError):
        testing.DialectContract().test_it_says_what_it_rests_on(Dialect("mine", "mine", None, None, ()))


def test_an_adapter_whose_tensors_no_method_declares_breaks_the_contract(pair: dict[str, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(pair["LoRA"], tmp_path / "odd"))
    tensors = load_file(copy / "adapter_model.safetensors")
    first = next(n for n in tensors if "lora_A" in n)
    odd = {**tensors, first.replace("lora_A", "hada_w9_z"): tensors[first].clone()}
    save_file(odd, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Refused, match=r"match(es)? no weight"):
        testing.MethodContract().test_a_merge_changes_what_the_adapter_is_over_and_nothing_else(copy, pair["base"])
