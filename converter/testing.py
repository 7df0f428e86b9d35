"""Contracts that plug-ins keep, as classes of tests: a plug-in's own tests inherit one and say what is tested.

    class TestMine(DialectContract):
        @pytest.fixture
        def dialect(self) -> Dialect:
            return my_package.DIALECT

A contract's arguments (`dialect`, `folder`, ...) are fixtures of the inheriting class; the plug-in has to be installed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from converter.converters.finding import Converter, find_converter
from converter.converters.heads.detect import detect
from converter.converters.heads.model import Linear
from converter.converters.heads.read import read
from converter.converters.heads.remap import RemapHead
from converter.converters.merge.adapter_config import read_adapter_config
from converter.converters.merge.adapter_keys import read_modules
from converter.converters.merge.merge_lora import MergeLora
from converter.converters.merge.methods.finding import methods
from converter.converters.merge.methods.method import Method
from converter.core.checkpoint import Checkpoint
from converter.core.compute.evaluate import to_torch
from converter.core.context import MAX_READ, Context
from converter.core.files.names import MODEL_CONFIG, MODEL_WEIGHTS
from converter.core.tensors import kernel_specs, nodes
from converter.core.tensors.byte_runs import leaves
from converter.core.tensors.nodes import LazyTensor
from converter.dialects.known import dialects, numbers
from converter.dialects.spec import Dialect, Role
from converter.errors import ConvertError, Refused
from converter.examine.diagnoses.case import SEVERITIES, Diagnosis, Finding
from converter.examine.doctor import DoctorRequest, case_of, diagnoses
from converter.examine.verify.live import probe_script
from converter.families.factors import factor_names, shared_names
from converter.sources.finding import Source, kind_of, sources
from converter.sources.hf import source as hf

_KINDS = ("model", "adapter", "training", "unread")
_CODE = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)+|[a-z]+")
_HIDDEN, _VOCABULARY = 8, 16
_CHUNK = 64
"""Rows of a chunk: the bits of a kernel do not depend on the chunking at multiples of it."""

PLANNED_WITHOUT_TORCH = """
import sys
from pathlib import Path
from converter.converters.merge.merge_lora import MergeLora
from converter.core.context import Context
from converter.sources.finding import kind_of, sources
*adapters, base = (sources()[kind_of(Path(p))].open(Path(p), asked=p) for p in sys.argv[1:])
[MergeLora(adapters=(adapter,))(base, Context()) for adapter in adapters]
heavy = sorted({"torch", "transformers", "peft", "numpy"} & set(sys.modules))
sys.exit(f"planning imported {heavy}" if heavy else 0)
"""


@dataclass
class DeclaredReads(Context):
    """A context that fails where values are read that were not declared to be needed.

    Attributes:
        declared: tensors whose values may be read; all of a tensor's bytes may be.
    """

    declared: tuple[LazyTensor, ...] = ()

    def read(self, tensor: LazyTensor, *, max_bytes: int = MAX_READ) -> bytes:
        """The bytes of a declared tensor."""
        self._expect(tensor)
        return super().read(tensor, max_bytes=max_bytes)

    def is_zero(self, tensor: LazyTensor) -> bool:
        """True where every element of a declared tensor is zero."""
        self._expect(tensor)
        return super().is_zero(tensor)

    def nonfinite(self, tensor: LazyTensor) -> int:
        """Elements of a declared tensor that are not finite."""
        self._expect(tensor)
        return super().nonfinite(tensor)

    def equal(self, a: LazyTensor, b: LazyTensor) -> bool:
        """True where two declared tensors are equal."""
        self._expect(a, b)
        return super().equal(a, b)

    def _expect(self, *tensors: LazyTensor) -> None:
        known = {leaf for each in self.declared for leaf in leaves(each)}
        undeclared = [leaf for tensor in tensors for leaf in leaves(tensor) if leaf not in known]
        assert not undeclared, f"values are read that were not declared: {undeclared[0]}"


class DialectContract:
    """What holds of every dialect. The inheriting class has a fixture `dialect`."""

    def test_it_is_registered_under_its_own_name(self, dialect: Dialect) -> None:
        """`--from NAME` and `--to NAME` find it."""
        assert dialects().get(dialect.name) is dialect

    def test_it_says_what_it_rests_on(self, dialect: Dialect) -> None:
        """A literal without evidence is a guess."""
        assert dialect.about
        assert dialect.evidence
        assert all(e.of and (not e.link or e.link.startswith("https://")) for e in dialect.evidence)

    def test_versions_run_forwards(self, dialect: Dialect) -> None:
        """A range begins before it ends."""
        for serves in dialect.serves:
            assert bool(serves.since) == bool(serves.until), serves
            assert numbers(serves.since) <= numbers(serves.until), serves

    def test_every_role_that_is_served_has_a_head(self, dialect: Dialect) -> None:
        """`--role` would find nothing to write."""
        for serves in dialect.serves:
            assert serves.roles
            assert all(dialect.head_of(role) is not None for role in serves.roles), serves

    def test_facts_of_a_launch_can_be_used(self, dialect: Dialect) -> None:
        """Regular expressions compile, roles are roles, and the probe is there."""
        for serves in dialect.serves:
            assert all(re.compile(mark) for mark in serves.launch_marks)
            assert {role for _, role in serves.launch_roles} <= {"reward", "critic", "actor"}
            assert not serves.probe or probe_script(serves.trainer).is_file()
        assert not dialect.files_of_its_own or dialect.maker

    def test_a_head_comes_back_as_it_went_in(self, dialect: Dialect, tmp_path: Path) -> None:
        """What is written in this dialect is recognised as it, and read back with the same values."""
        given = tiny_reward_model(tmp_path / "rm")
        for role in _roles_written(dialect):
            made = RemapHead(to=dialect.name, role=role, read_as="hf-seqcls")(given, Context())
            found = dialect if not dialect.marks else getattr(detect(made), "dialect", None)
            assert found is dialect, f"as {role} it is recognised as {found and found.name}"
            head = read(made, dialect, Context()).head
            if isinstance(head, Linear):
                assert bool((to_torch(head.weight) == to_torch(given.tensors["score.weight"])).all())


def _roles_written(dialect: Dialect) -> list[Role]:
    """Roles in which a llama reward model can be written in a dialect."""
    if dialect.refused or not dialect.writable or (dialect.families and "llama" not in dialect.families):
        return []
    heads: tuple[Role, ...] = ("reward", "critic")
    return [r for r in heads if (spec := dialect.head_of(r)) is not None and spec.kind in ("linear", "mlp")]


class SourceContract:
    """What holds of every source. The inheriting class has fixtures `source`, and `folder`: one that it reads."""

    def test_it_is_registered_under_its_own_name(self, source: Source) -> None:
        """`list` shows it, and folders find it."""
        assert sources().get(source.name) is source
        assert source.kind in _KINDS

    def test_it_takes_its_own_folder_and_says_why(self, source: Source, folder: Path) -> None:
        """No other source is asked before it."""
        assert source.detect(folder)
        assert kind_of(folder) == source.name

    def test_it_does_not_take_an_empty_folder(self, source: Source, tmp_path: Path) -> None:
        """A folder without a sign of it is another's."""
        (tmp_path / "empty").mkdir()
        assert source.detect(tmp_path / "empty") is None
        assert source.detect(tmp_path / "nowhere") is None

    def test_a_survey_and_an_opened_checkpoint_hold_the_same(self, source: Source, folder: Path) -> None:
        """doctor judges what a conversion would read."""
        survey = source.survey(folder)
        error = survey.error()
        assert error is None, error
        opened = source.open(folder, asked=str(folder))
        surveyed = {name: entry.info for name, entry in survey.entries.items()}
        assert {name: tensor.info for name, tensor in opened.tensors.items()} == surveyed
        assert opened.origin.kind == source.kind

    def test_reading_twice_gives_one_thing_and_changes_nothing(self, source: Source, folder: Path) -> None:
        """Inputs are never modified."""
        before = _listing(folder)
        first, second = (source.open(folder, asked=str(folder)) for _ in range(2))
        assert first.tensors == second.tensors
        assert source.survey(folder).entries == source.survey(folder).entries
        assert _listing(folder) == before

    def test_what_is_broken_is_a_fault_and_never_a_crash(self, source: Source, folder: Path, tmp_path: Path) -> None:
        """Every file of the folder in turn is cut in half, emptied, and filled with other bytes."""
        for name in sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file()):
            whole = (folder / name).read_bytes()
            for damaged in (whole[: len(whole) // 2], b"", b"\xff" * len(whole)):
                copy = Path(shutil.copytree(folder, tmp_path / "broken"))
                (copy / name).write_bytes(damaged)
                source.survey(copy)
                with suppress(ConvertError):
                    source.open(copy, asked=str(copy))
                shutil.rmtree(copy)


class ConverterContract:
    """What holds of every converter. The inheriting class has fixtures `converter`, one with its fields filled,
    `checkpoint`, what flows through, and `declared`: the tensors whose values it may read while planning.
    """

    def test_it_is_registered_under_its_own_name(self, converter: Converter) -> None:
        """A recipe's step finds it; its fields are keys."""
        assert find_converter(converter.name) is type(converter)
        assert getattr(type(converter), "__dataclass_params__").frozen  # noqa: B009  # typeshed does not have it

    def test_it_reads_no_value_that_it_does_not_declare(
        self, converter: Converter, checkpoint: Checkpoint, declared: Iterable[LazyTensor]
    ) -> None:
        """Planning stays a matter of headers."""
        converter(checkpoint, DeclaredReads(declared=tuple(declared)))

    def test_it_is_pure(self, converter: Converter, checkpoint: Checkpoint) -> None:
        """The same checkpoint gives the same, and stays what it was."""
        before, contexts = dataclasses.replace(checkpoint), (Context(), Context())
        first, second = (converter(checkpoint, context) for context in contexts)
        assert first == second
        assert contexts[0] == contexts[1]
        assert checkpoint == before

    def test_every_tensor_is_kept_used_or_dropped_by_name(self, converter: Converter, checkpoint: Checkpoint) -> None:
        """Nothing vanishes without a word."""
        made = converter(checkpoint, Context())
        used = {leaf for tensor in made.all_tensors() for leaf in leaves(tensor)}
        lost = [n for n, t in checkpoint.tensors.items() if not used.intersection(leaves(t)) and n not in made.dropped]
        assert [n for n in lost if any(True for _ in leaves(checkpoint.tensors[n]))] == []


class DiagnosisContract:
    """What holds of every diagnosis. The inheriting class has fixtures `diagnosis`, `faulty`: a folder that has the
    fault, and `sound`: one of the same kind that has not.
    """

    def test_it_is_registered_and_explained(self, diagnosis: Diagnosis) -> None:
        """`explain CODE` prints its docstring."""
        assert diagnoses().get(diagnosis.code) is diagnosis
        assert _CODE.fullmatch(diagnosis.code)
        assert len(diagnosis.doc.split()) >= 8

    def test_it_finds_the_fault(self, diagnosis: Diagnosis, faulty: Path) -> None:
        """Every finding has its code."""
        found = _findings(diagnosis, faulty)
        assert found
        assert {f.code for f in found} == {diagnosis.code}
        assert {f.severity for f in found} <= set(SEVERITIES)
        assert json.dumps([f.to_json() for f in found])

    def test_it_finds_nothing_in_a_sound_folder(self, diagnosis: Diagnosis, sound: Path) -> None:
        """A false alarm costs more than a miss."""
        assert _findings(diagnosis, sound) == []

    def test_it_changes_nothing_and_reads_values_only_if_it_says_so(self, diagnosis: Diagnosis, faulty: Path) -> None:
        """A diagnosis without `deep` reads headers only."""
        before = _listing(faulty)
        _findings(diagnosis, faulty, Context() if diagnosis.deep else DeclaredReads())
        assert _listing(faulty) == before


def _findings(diagnosis: Diagnosis, folder: Path, context: Context | None = None) -> list[Finding]:
    return diagnosis(case_of(DoctorRequest(str(folder), deep=diagnosis.deep)), context or Context())


class MethodContract:
    """What holds of every PEFT method. The inheriting class has fixtures `method`, `adapter`: a folder with one of its
    adapters, trained, and `base`: the model that it is over.
    """

    def test_it_is_registered_and_its_adapter_finds_it(self, method: Method, adapter: Path) -> None:
        """`peft_type` and switch together mean this method and no other."""
        assert method in methods()
        assert read_adapter_config(_opened(adapter)).method is method

    def test_its_tensors_and_kernels_are_known_everywhere(self, method: Method) -> None:
        """Gathering, repairing and doctor ask for names; plans name kernels."""
        assert set(method.factors) <= set(factor_names())
        assert set(method.shared) <= set(shared_names())
        assert {f for pair in method.pairs for f in pair} | set(method.zeros) <= set(method.factors)
        assert all(kernel_specs.find(spec.name) is spec for spec in method.kernels)
        assert not method.switch or method.switch in method.fields

    def test_every_tensor_of_the_adapter_is_read(self, method: Method, adapter: Path) -> None:
        """A tensor that nobody reads is trained for nothing."""
        given = _opened(adapter)
        found = read_modules(given.tensors, str(adapter))
        parts = {f for module in found.modules.values() for f in module.factors}
        assert parts | set(found.shared)
        assert all(f in method.factors or f.partition(".")[0] in method.factors for f in parts)
        assert sum(len(m.keys) for m in found.modules.values()) + len(found.shared) == len(given.tensors)

    def test_a_field_that_nobody_knows_stops_the_merge(self, method: Method, adapter: Path, base: Path) -> None:
        """What it means for the arithmetic is unknown."""
        given = _opened(adapter)
        odd = given.replace(config={**given.config, "a_field_that_nobody_knows": True})
        assert _refusal(odd, base) == "adapter-field-unknown"

    def test_half_of_a_pair_stops_the_merge(self, method: Method, adapter: Path, base: Path) -> None:
        """One factor without the other means nothing."""
        given = _opened(adapter)
        for half in {name for pair in method.pairs for name in pair}:
            gone = next((n for n in given.tensors if f".{half}" in n), None)
            if gone is not None:
                rest = {n: t for n, t in given.tensors.items() if n != gone}
                assert _refusal(given.replace(tensors=rest), base) == "adapter-incomplete"

    def test_a_merge_changes_what_the_adapter_is_over_and_nothing_else(self, adapter: Path, base: Path) -> None:
        """Names, shapes and dtypes stay the base's."""
        under, made = _opened(base), _merged(_opened(adapter), base)
        assert {n: t.info for n, t in made.tensors.items()} == {n: t.info for n, t in under.tensors.items()}
        changed = [n for n, t in made.tensors.items() if t != under.tensors[n]]
        assert changed
        assert any(bool((to_torch(made.tensors[n]) != to_torch(under.tensors[n])).any()) for n in changed)

    def test_rows_that_are_computed_in_pieces_are_those_of_the_whole(self, adapter: Path, base: Path) -> None:
        """A kernel's `needs` are what its rows need, to the bit at multiples of 64."""
        for tensor in _merged(_opened(adapter), base).tensors.values():
            if isinstance(tensor, nodes.Apply) and tensor.info.shape[0] > _CHUNK and nodes.is_separable(tensor):
                whole = to_torch(tensor)
                for start in range(0, tensor.info.shape[0], _CHUNK):
                    piece = to_torch(nodes.rows(tensor, start, min(start + _CHUNK, tensor.info.shape[0])))
                    assert bool((piece == whole[start : start + _CHUNK]).all())

    def test_planning_imports_no_torch(self, adapter: Path, base: Path) -> None:
        """`--dry-run` of 70B takes no second more for it."""
        command = [sys.executable, "-c", PLANNED_WITHOUT_TORCH, str(adapter), str(base)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def _opened(folder: Path) -> Checkpoint:
    return sources()[kind_of(folder) or ""].open(folder, asked=str(folder))


def _merged(adapter: Checkpoint, base: Path) -> Checkpoint:
    return MergeLora(adapters=(adapter,))(_opened(base), Context())


def _refusal(adapter: Checkpoint, base: Path) -> str:
    try:
        _merged(adapter, base)
    except Refused as error:
        return error.code
    return "merged"


def _listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tiny_reward_model(folder: Path) -> Checkpoint:
    """A llama for sequence classification of a few kilobytes, in transformers' own names, written and opened."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForSequenceClassification"], "hidden_size": _HIDDEN,
        "intermediate_size": 2 * _HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "vocab_size": _VOCABULARY, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3, "num_labels": 1,
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    write_tensors(folder / MODEL_WEIGHTS, dict(_llama()))
    return hf.SOURCE.open(folder, asked=str(folder))


def _llama() -> Iterator[tuple[str, tuple[int, ...]]]:
    square, wide = (_HIDDEN, _HIDDEN), (2 * _HIDDEN, _HIDDEN)
    yield "model.embed_tokens.weight", (_VOCABULARY, _HIDDEN)
    layer = "model.layers.0."
    yield from ((f"{layer}self_attn.{n}_proj.weight", square) for n in "qkvo")
    yield from ((f"{layer}mlp.{n}_proj.weight", wide) for n in ("gate", "up"))
    yield f"{layer}mlp.down_proj.weight", (_HIDDEN, 2 * _HIDDEN)
    yield from ((f"{layer}{n}_layernorm.weight", (_HIDDEN,)) for n in ("input", "post_attention"))
    yield "model.norm.weight", (_HIDDEN,)
    yield "score.weight", (1, _HIDDEN)


def write_tensors(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of fp32 tensors with these shapes; no two elements of a tensor are equal, and none is zero."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = b""
    for seed, (name, shape) in enumerate(shapes.items(), 1):
        count = math.prod(shape)
        values = struct.pack(f"<{count}f", *((n + 1) / (count + 1) - 1 / (seed + 1.5) for n in range(count)))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
