"""Links, pipes, devices and names that lead out of the folder; places that are read before anything is opened."""

from __future__ import annotations

import os
import pickle  # noqa: TID251 - the attack is written with it, and read by nobody
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hostile.cases import ADAPTER, BASE, DCP, ON_MODEL, ON_RANKS, VERL, ZERO, Case, adapter, model, run, with_config
from hostile.pickles import COMMAND, called, zipped

SECRET = "secret-of-somebody-else"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00001-of-00002.safetensors"


def _link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _loop(path: Path) -> None:
    other = path.with_name("other-" + path.name)
    path.symlink_to(other.name)
    other.symlink_to(path.name)


def _out(path: Path) -> None:
    """A link to a file of the same content outside of the folder: it would be read if links were followed."""
    secret = path.parent.parent / SECRET
    secret.write_bytes(kept.get(path, b"{}"))
    path.symlink_to(f"../{SECRET}")


kept: dict[Path, bytes] = {}

KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "link-to-etc-passwd": (_link("/etc/passwd"), "input-outside"),
    "link-to-dev-zero": (_link("/dev/zero"), "input-outside"),
    "link-to-proc-mem": (_link("/proc/self/mem"), "input-outside"),
    "link-out": (_out, "input-outside"),
    "link-nowhere": (_link("nowhere"), "input-missing|shard-missing|weights-missing|index-missing"),
    "link-loop": (_loop, "input-outside|input-missing|shard-missing"),
    "link-to-stdin": (_link("/dev/stdin"), "input-outside"),
    "pipe": (os.mkfifo, "input-not-a-file"),
    "socket": (lambda p: os.mknod(p, stat.S_IFSOCK | 0o600), "input-not-a-file"),
}


def replaced(make: Callable[[Path], None], file: str, folder: Path) -> None:
    """A model in which one file is something else."""
    path = model(folder) / file
    kept[path] = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    make(path)


def _is_folder(file: str, folder: Path) -> None:
    path = model(folder) / file
    path.unlink()
    path.mkdir()


def _folder_of_links(folder: Path) -> None:
    """The whole model folder is a link, and in it a link that leaves it."""
    root = model(folder, "real")
    (folder / SECRET).write_bytes((root / SHARD).read_bytes())
    (root / SHARD).unlink()
    (root / SHARD).symlink_to(folder / SECRET)
    (folder / "m").symlink_to("real")


def _latest(content: bytes | Callable[[Path], None], source: Path, name: str, folder: Path) -> None:
    path = run(folder, source) / name
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


_LATEST: dict[str, bytes | Callable[[Path], None]] = {
    "above": b"../../secret",
    "absolute": b"/etc",
    "nul": b"global\0step2",
    "escapes": b"\x1b[2J\x1b]0;x\x07",
    "long": b"x" * 5_000_000,
    "not-utf8": b"\xff\xfe",
    "itself": b".",
}
_NO_LATEST: dict[str, Callable[[Path], None]] = {"pipe": os.mkfifo, "zero": _link("/dev/zero"), "loop": _loop}


def _dcp_record(to: bytes, folder: Path) -> None:
    """A distributed checkpoint whose metadata places records in a file elsewhere; the name keeps its length."""
    root = run(folder, DCP)
    (path,) = root.rglob(".metadata")
    raw = path.read_bytes()
    assert b"__0_0.distcp" in raw
    path.write_bytes(raw.replace(b"__0_0.distcp", to))


def cached(change: Callable[[Path], None], folder: Path) -> None:
    """A model of the Hub's cache, as the Hub's client lays it out, and one thing about it that is not so."""
    repository = folder / "hub" / "models--me--m"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(BASE.iterdir())):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    change(repository)


def _reference(make: Callable[[Path], None], repository: Path) -> None:
    (repository / "refs" / "main").unlink()
    make(repository / "refs" / "main")


def _blob_outside(repository: Path) -> None:
    path = repository / "snapshots" / COMMIT / SHARD
    (repository.parents[1] / SECRET).write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(f"../../../../{SECRET}")


def _blob_links_on(repository: Path) -> None:
    """The link leads to the blobs, and the blob leads out of them."""
    blob = (repository / "snapshots" / COMMIT / SHARD).resolve()
    (repository.parents[1] / SECRET).write_bytes(blob.read_bytes())
    blob.unlink()
    blob.symlink_to(f"../../../{SECRET}")


def _snapshots_elsewhere(repository: Path) -> None:
    (repository / "refs" / "main").write_text("../../../../secret-model")


_FROM_CACHE = ("inspect me/m", "reshard me/m out")
_BASES = {
    "above": "../../secret-model",
    "etc": "/etc",
    "root": "/",
    "proc": "/proc/self/root",
    "address": "https://example.org/model",
    "file-address": "file:///etc/passwd",
    "nul": "a\0b",
    "home": "~nobody/secret",
    "escapes": "\x1b[2J/x",
    "hub": "attacker/not-downloaded-unasked",
    "long": "x" * 1_000_000,
    "long-parts": "/".join(["x" * 250] * 100),
    "deep": "x/" * 20_000,
    "empty": "",
    "number": 5,
    "list": ["../../x"],
    "pipe": "pipe",
}


def _base(name: object, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with_config(adapter(folder) / "adapter_config.json", base_model_name_or_path=name)


def _base_links_out(folder: Path) -> None:
    """The base that the adapter records is a model whose weights are a link out of it."""
    _base("base", folder)
    root = model(folder, "base")
    (folder / SECRET).write_bytes((root / SHARD).read_bytes())
    (root / SHARD).unlink()
    (root / SHARD).symlink_to(f"../{SECRET}")


def _pipes_around(folder: Path) -> None:
    """Pipes under every name that is looked for beside and above what was named."""
    (folder / "up").mkdir()
    root = Path(adapter(folder / "up"))
    for place in (folder / "up", root):
        for name in ("latest", "latest_universal", "metadata.json", ".metadata", "latest_checkpointed_iteration.txt",
                     "trainer_state.json", "fsdp_config.json", "value_head.safetensors", "value_head.bin", "README.md",
                     "regression_layer.pt", "config.json", "rlhf-convert.json", "zero_to_fp32.py"):  # fmt: skip
            os.mkfifo(place / name)
    (folder / "up" / "global_step1").mkdir()
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        os.mkfifo(folder / "up" / "global_step1" / name)


def _training_files(build: Callable[[Path], Path], folder: Path) -> None:
    """Files of a run that no conversion needs, each of them an attack."""
    root = build(folder)
    attack = zipped(called("posix.system", COMMAND))
    for name in SIDE_FILES:
        (root / name).write_bytes(attack)
    for name in ("optimizer_0", "planted_module", "__pycache__"):
        (root / name).mkdir()
        (root / name / "__init__.py").write_text("import os; os.system('touch canary')")


SIDE_FILES = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "trainer.pkl",
    "dataset.arrow",
    "events.out.tfevents.1",
    "run.sh",
    "planted_module.py",
    "sitecustomize.py",
    "torch.py",
    "typer.py",
    "conftest.py",
    ".env",
    "id_rsa",
    "tokenizer.pkl",
    "model.safetensors.pkl",
    "config.py",
    "json.py",
)

_HARMLESS_MODEL = ("inspect m", "doctor m", "reshard m out", "push m me/x --dry-run")


def _dumped(folder: Path) -> None:
    """What pickle writes for a class with `__reduce__`, as an optimizer's state beside a model."""

    class Attack:
        def __reduce__(self) -> object:
            return os.system, ("touch canary",)

    (model(folder) / "optimizer.pt").write_bytes(pickle.dumps(Attack()))


CASES: list[Case] = [
    *(
        Case(
            f"{file}-{kind}",
            15,
            partial(replaced, make, file),
            ON_MODEL,
            file,
            f"{says}|config-unreadable|tensors-lost",
        )
        for file in (SHARD, "config.json", "model.safetensors.index.json")
        for kind, (make, says) in KINDS.items()
        if (file, kind) != ("config.json", "link-nowhere")
    ),
    *(
        Case(
            f"tokenizer-{kind}",
            15,
            partial(replaced, make, "tokenizer.json"),
            ("reshard m out", "push m me/x --dry-run", f"merge-lora {ADAPTER} out --base m"),
            "tokenizer.json",
            "input-",
        )
        for kind, (make, _) in KINDS.items()
    ),
    Case("weights-are-a-folder", 15, partial(_is_folder, SHARD), ON_MODEL, SHARD, "shard-missing|input-not-a-file"),
    Case("link-in-a-linked-folder", 15, _folder_of_links, ON_MODEL, SHARD, "input-outside"),
    *(
        Case(
            f"latest-{n}",
            14,
            partial(_latest, content, ZERO, "latest"),
            ("gather r out", "inspect r", ON_RANKS),
            "latest",
            "zero-latest|input-",
        )
        for n, content in _LATEST.items()
    ),
    *(
        Case(
            f"latest-{n}",
            15,
            partial(_latest, make, ZERO, "latest"),
            ("gather r out", "inspect r", ON_RANKS),
            exits={"inspect": (0, 1), "gather": (0, 3), "reshard": (0, 3)},
            harmless=True,
        )
        for n, make in _NO_LATEST.items()
    ),
    *(
        Case(
            f"verl-tracker-{n}",
            14,
            partial(_latest, content, VERL, "latest_checkpointed_iteration.txt"),
            ("inspect r", "gather r out --dry-run", ON_RANKS),
            exits={"inspect": (0, 1), "gather": (0, 2, 3), "reshard": (0, 2, 3)},
            harmless=True,
        )
        for n, content in [*_LATEST.items(), *_NO_LATEST.items()]
    ),
    *(
        Case(f"record-{n}", 14, partial(_dcp_record, to), ("inspect r", "gather r out", "doctor r"), to.decode(), "dcp")
        for n, to in {"above": b"../aa.distcp", "absolute": b"/etc//passwd", "deep": b"a/b/c/..cp.x"}.items()
    ),
    *(
        Case(
            f"cache-{n}",
            15,
            partial(cached, partial(_reference, make)),
            _FROM_CACHE,
            exits={"inspect": (0, 2, 3), "reshard": (0, 2, 3)},
            harmless=True,
        )
        for n, (make, _) in KINDS.items()
    ),
    Case(
        "cache-reference-above",
        14,
        partial(cached, _snapshots_elsewhere),
        _FROM_CACHE,
        exits={"inspect": (0, 2, 3), "reshard": (0, 2, 3)},
        harmless=True,
    ),
    Case("cache-blob-outside", 15, partial(cached, _blob_outside), _FROM_CACHE, SHARD, "input-outside"),
    Case("cache-blob-links-on", 15, partial(cached, _blob_links_on), _FROM_CACHE, SHARD, "input-outside"),
    *(
        Case(
            f"base-{n}",
            14,
            partial(_base, name),
            ("inspect a", "doctor a", "merge-lora a out"),
            exits={"inspect": (0, 1), "doctor": (0, 1), "merge-lora": (2, 3)},
            harmless=True,
        )
        for n, name in _BASES.items()
    ),
    Case("base-links-out", 14, _base_links_out, ("merge-lora a out",), SHARD, "input-outside"),
    Case(
        "pipes-around",
        15,
        _pipes_around,
        (
            "inspect up/a",
            "doctor up/a",
            "repair up/a out",
            f"merge-lora up/a out --base {BASE}",
            "gather up out",
            "inspect up",
        ),
        exits={"inspect": (0, 1, 2, 3), "doctor": (0, 1), "repair": (2, 3), "merge-lora": (0, 3), "gather": (2, 3)},
        harmless=True,
    ),
    Case(
        "training-files-of-a-model",
        5,
        partial(_training_files, model),
        _HARMLESS_MODEL,
        closed=SIDE_FILES,
        harmless=True,
        absent=SIDE_FILES,
    ),
    Case(
        "training-files-of-an-adapter",
        5,
        partial(_training_files, adapter),
        ("inspect a", f"doctor a --base {BASE}", f"merge-lora a out --base {BASE}"),
        closed=SIDE_FILES,
        harmless=True,
        absent=SIDE_FILES,
    ),
    Case(
        "optimizer-by-pickle",
        5,
        _dumped,
        _HARMLESS_MODEL,
        closed=("optimizer.pt",),
        harmless=True,
        absent=("optimizer.pt",),
    ),
    Case(
        "code-is-copied-and-not-run",
        16,
        partial(_training_files, model),
        ("reshard m out --keep-code",),
        closed=tuple(n for n in SIDE_FILES if not n.endswith(".py")),
        harmless=True,
    ),
]
