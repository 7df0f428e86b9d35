"""Pickles that would run something, or break what reads them. Every opcode that calls, imports or sets is here."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hostile.cases import DCP, ON_ADAPTER, ON_MODEL, ON_RANKS, ON_RUN, VERL, ZERO, Case, adapter, run, without_weights

COMMAND = b"touch canary"
TEXT = b"V" + COMMAND + b"\n"
SYSTEM = b"cposix\nsystem\n"
CALL = SYSTEM + TEXT + b"\x85R"
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def text(value: bytes) -> bytes:
    """A string of protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value


def named(path: str) -> bytes:
    """A name that is imported, by the opcode of protocol 4."""
    module, _, name = path.rpartition(".")
    return text(module.encode()) + text(name.encode()) + b"\x93"


def called(path: str, *args: bytes) -> bytes:
    """A call of a name with strings."""
    return b"\x80\x04" + named(path) + b"(" + b"".join(text(a) for a in args) + b"tR."


OPCODES: dict[str, bytes] = {
    "protocol-0": b"cos\nsystem\n(S'touch canary'\ntR.",
    "protocol-1": b"(dq\x00S'w'\n" + SYSTEM + b"(U\x0c" + COMMAND + b"tRs.",
    "protocol-2": b"\x80\x02" + SYSTEM + b"X\x0c\0\0\0" + COMMAND + b"\x85R.",
    "protocol-3": b"\x80\x03" + SYSTEM + b"C\x0c" + COMMAND + b"\x85R.",
    "protocol-4": b"\x80\x04\x95\x1f\0\0\0\0\0\0\0" + named("posix.system") + text(COMMAND) + b"\x85R.",
    "protocol-5": b"\x80\x05" + named("posix.system") + b"\x96\x0c\0\0\0\0\0\0\0" + COMMAND + b"\x85R.",
    "reduce-in-a-dictionary": b"\x80\x02}X\x01\0\0\0w" + CALL + b"s.",
    "newobj": b"\x80\x02" + SYSTEM + TEXT + b"\x85\x81.",
    "newobj-ex": b"\x80\x04" + SYSTEM + TEXT + b"\x85}\x92.",
    "inst": b"(" + TEXT + b"iposix\nsystem\n.",
    "obj": b"(" + SYSTEM + TEXT + b"o.",
    "stack-global-from-memo": b"\x80\x04"
    + text(b"posix")
    + b"\x94"
    + text(b"system")
    + b"\x94h\0h\x01\x93"
    + TEXT
    + b"\x85R.",
    "build-setstate": b"\x80\x02cbuiltins\nobject\n)\x81}V__setstate__\n" + SYSTEM + b"sb.",
    "build-reduce": b"\x80\x02ccollections\nOrderedDict\n)R}V__reduce__\n" + SYSTEM + b"sb.",
    "build-slots": b"\x80\x02cargparse\nNamespace\n)\x81N}Vx\n" + CALL + b"s\x86b.",
    "popped": b"\x80\x02" + CALL + b"0}.",
    "popped-mark": b"\x80\x02}(" + CALL + b"1.",
    "doubled": b"\x80\x02" + CALL + b"2.",
    "memo-overwritten": b"\x80\x02}q\0" + CALL + b"q\x00h\x00.",
    "set-item": b"\x80\x04\x8f(" + CALL + b"\x90.",
    "dictionary-of-mark": b"(Vw\n" + CALL + b"d.",
    "key": b"\x80\x02}" + CALL + b"K\x01s.",
    "persistent": b"\x80\x02" + CALL + b"Q.",
    "nested-call": b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\nV__call__\n\x86R" + TEXT + b"\x85R.",
    "twice": b"\x80\x02" + CALL + b"0" + CALL + b".",
    "after-stop": b"\x80\x02N." + b"\x80\x02" + CALL + b".",
    "then-broken": b"\x80\x02" + CALL + b"\xff\xfe",
    "dotted-name": b"\x80\x04" + text(b"posix") + text(b"system.__call__") + b"\x93" + TEXT + b"\x85R.",
}
"""The same call of os.system, spelled with every opcode that imports, calls, builds or refers."""

MALFORMED: dict[str, bytes] = {
    "ext1": b"\x80\x02\x82\x01" + TEXT + b"\x85R.",
    "ext2": b"\x80\x02\x83\x01\x00" + TEXT + b"\x85R.",
    "ext4": b"\x80\x02\x84\x01\x00\x00\x00" + TEXT + b"\x85R.",
    "build-on-a-function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}V__defaults__\nK\x01\x85sb.",
    "build-on-a-class": b"\x80\x02ccollections\nOrderedDict\n}V__init__\nctorch\nSize\nsb.",
    "item-set-on-a-name": b"\x80\x02ctorch\nSize\nVx\nK\x01s.",
    "appended-to-a-name": b"\x80\x02ctorch\nSize\nK\x01a.",
    "arguments-are-a-list": b"\x80\x02ctorch\nSize\n]R.",
    "memo-that-is-not-there": b"\x80\x02h\x07.",
    "memo-of-nothing": b"\x80\x02q\x00.",
    "name-is-a-number": b"\x80\x04K\x01K\x02\x93.",
    "buffer": b"\x80\x05\x97.",
    "read-only-buffer": b"\x80\x05N\x98.",
    "unknown-opcode": b"\x80\x02\xff.",
    "protocol-that-is-none": b"\x80\x7fcbuiltins\nobject\n.",
    "no-stop": b"\x80\x02}",
    "empty-stack": b"\x80\x02.",
    "mark-left": b"\x80\x02(.",
    "frame-beyond-the-end": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}",
    "escape-in-a-string": b"S'\\x'\n.",
    "bytearray-of-ten-gigabytes": b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b".",
    "string-of-2-62": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",
    "bytes-of-2-63": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"x.",
    "negative-number-length": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"x.",
    "number-of-a-gigabyte": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.",
    "number-of-60000-digits": b"I" + b"9" * 60_000 + b"\n.",
    "line-without-end": b"V" + b"a" * 1_000_000,
    "tuples-as-a-key": b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.",
    "list-as-a-key": b"\x80\x02}]K\x01s.",
    "key-without-value": b"\x80\x02}(K\x01u.",
    "name-of-5000": b"\x80\x04X" + struct.pack("<I", 5000) + b"a" * 5000 + text(b"d") + b"\x93.",
}

NO_WEIGHTS: dict[str, bytes] = {
    "nested-torch-load": b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x20" + CALL[:32].ljust(32, b".") + b"\x85R.",
    "name-like-deepspeed": called("deepspeed.runtime.os.system", COMMAND),
    "name-like-a-rebuild": called("torch._utils._rebuild_system", COMMAND),
    "lists-200000-deep": b"\x80\x02" + b"](" * 100_000 + b".",
    "tuples-100000-deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "list-in-itself": b"\x80\x02]q\x00h\x00a.",
    "dictionary-in-itself": b"\x80\x02}q\x00Vw\nh\x00s.",
    "lists-doubled-60-times": b"\x80\x02]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60)) + b".",
    "uninitialised-tensor": b"\x80\x02}Vw\nctorch\nTensor\nK\x09\x85Rs.",
    "nothing": b"\x80\x02N.",
    "empty-dictionary": b"\x80\x02}.",
    "fifty-thousand-names": b"\x80\x02}(" + b"".join(b"Vw%d\nN" % i for i in range(50_000)) + b"u.",
}
"""What holds no attack that is refused by name, and no weights either; or too deep to be looked at."""

GADGETS = (
    "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.compile", "builtins.open", "builtins.getattr",
    "__builtin__.eval", "os.popen", "nt.system", "subprocess.Popen", "subprocess.check_output", "pty.spawn",
    "runpy.run_path", "importlib.import_module", "pkgutil.resolve_name", "timeit.timeit", "operator.attrgetter",
    "functools.partial", "ctypes.CDLL", "socket.create_connection", "urllib.request.urlopen", "webbrowser.open",
    "pickle.loads", "_pickle.loads", "shelve.open", "marshal.loads", "types.CodeType", "bdb.Bdb", "cProfile.run",
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.utils.collect_env.run", "torch.package.PackageImporter",
    "torch._C._nn.gelu", "torch.utils.cpp_extension.load", "torch.fx._symbolic_trace.Tracer", "numpy.load",
    "numpy.testing._private.utils.runstring", "numpy.f2py.crackfortran.getlincoef", "transformers.AutoModel",
    "huggingface_hub.snapshot_download", "planted_module.attack", "converter.core.writer.write.write",
    "yaml.unsafe_load",
)  # fmt: skip

CONTROL_NAMES = {
    "screen-cleared": "evil\x1b[2J\x1b[1;1H.name",
    "lines-in-a-name": "a\nwrote    ./out.b",
    "text-turned-around": "a\u202e.gnp",
    "nul-in-a-name": "a\0b.c",
}


def zipped(pickled: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A zip as torch.save writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)
        archive.writestr("archive/version", b"3\n")
    return out.getvalue()


def legacy(pickled: bytes, *, first: bytes = MAGIC, keys: bytes = b"\x80\x02].") -> bytes:
    """The layout before the zip: five pickles in a row."""
    return first + b"\x80\x02M\xe9\x03." + b"\x80\x02}X\x0d\0\0\0little_endian\x88s." + pickled + keys


def tarred(pickled: bytes) -> bytes:
    """The layout of 2017."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return out.getvalue()


def in_model(raw: bytes, folder: Path, *, file: str = "pytorch_model.bin") -> None:
    """A model with this as its weights."""
    (without_weights(folder) / file).write_bytes(raw)


def in_adapter(raw: bytes, folder: Path) -> None:
    """An adapter with this as its weights."""
    root = adapter(folder)
    (root / "adapter_model.safetensors").unlink()
    (root / "adapter_model.bin").write_bytes(raw)


def in_run(raw: bytes, source: Path, pattern: str, folder: Path) -> None:
    """A trainer's run in which one file is this."""
    root = run(folder, source)
    min(p for p in root.rglob(pattern)).write_bytes(raw)


def _of(kind: str, row: int, contents: dict[str, bytes], says: str) -> list[Case]:
    file = "pytorch_model.bin"
    return [
        Case(f"{kind}-{n}", row, partial(in_model, zipped(raw)), ON_MODEL, file, says) for n, raw in contents.items()
    ]


def _layouts() -> list[Case]:
    attack = OPCODES["protocol-2"]
    hidden = legacy(b"\x80\x02}.", first=attack)
    files = {
        "legacy": (legacy(attack), "pickle-names"),
        "legacy-keys": (legacy(b"\x80\x02}.", keys=attack), "pickle-names"),
        "legacy-first-pickle": (hidden, "torch-not|pickle-names"),
        "legacy-of-4-pickles": (legacy(attack)[:80], "pickle-malformed|file-truncated|torch-not"),
        "tar": (tarred(attack), "torch-not"),
        "bare": (attack, "torch-not|pickle-names"),
        "bare-text": (OPCODES["protocol-0"], "torch-not"),
    }
    return [
        Case(f"layout-{n}", 6, partial(in_model, raw), ON_MODEL, "pytorch_model.bin", says)
        for n, (raw, says) in files.items()
    ]


def _places() -> list[Case]:
    """The same attack in every kind of file that is a pickle."""
    attack = OPCODES["reduce-in-a-dictionary"]
    says = "pickle-names"
    cases = [
        Case("in-adapter", 1, partial(in_adapter, zipped(attack)), ON_ADAPTER, "adapter_model.bin", says),
        Case("in-adapter-legacy", 6, partial(in_adapter, legacy(attack)), ON_ADAPTER, "adapter_model.bin", says),
        Case(
            "in-safetensors",
            7,
            partial(in_model, attack, file="model.safetensors"),
            ON_MODEL,
            "model.safetensors",
            "safetensors-not",
        ),
        Case(
            "zip-in-safetensors",
            7,
            partial(in_model, zipped(attack), file="model.safetensors"),
            ON_MODEL,
            "model.safetensors",
            "safetensors-not",
        ),
    ]
    runs: list[tuple[str, Path, str, Callable[[bytes], bytes]]] = [
        ("zero-model", ZERO, "*model_states.pt", zipped),
        ("zero-optimizer", ZERO, "*optim_states.pt", zipped),
        ("zero-legacy", ZERO, "*optim_states.pt", legacy),
        ("dcp-metadata", DCP, ".metadata", bytes),
        ("verl-model", VERL, "model_world*_rank_1.pt", zipped),
    ]
    for name, source, pattern, container in runs:
        build = partial(in_run, container(attack), source, pattern)
        lines = ON_RUN if source == DCP else (*ON_RUN, ON_RANKS)
        cases.append(Case(f"in-{name}", 1, build, lines, pattern.rpartition("*")[2], says))
    return cases


CASES: list[Case] = [
    *_of("opcode", 1, OPCODES, "pickle-names|pickle-malformed|pickled-not-weights"),
    *_of("malformed", 3, MALFORMED, "pickle-malformed|torch-tensor|pickled-not-weights"),
    *_of("value", 9, NO_WEIGHTS, "pickled-not-weights|torch-tensor|pickle-malformed"),
    *_of("gadget", 2, {g: called(g, COMMAND) for g in GADGETS}, "pickle-names"),
    *_of("name", 25, {n: called(g, b"x") for n, g in CONTROL_NAMES.items()}, "pickle-names|pickle-malformed"),
    *_layouts(),
    *_places(),
]
