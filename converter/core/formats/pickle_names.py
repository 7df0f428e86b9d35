"""Names of a user's own trainer that pickled files may mention: what `--allow-name` says, while a command runs.

A name that is allowed is data like any other: its class is not imported, and becomes a bag of what was saved in it.
Names are matched by the user's pattern, and files choose the names; so the pattern's language is small enough that no
name of 512 characters can keep the matcher busy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from converter.errors import UsageError
from converter.text import show

CODE = "pickle-names"
MAX_PATTERN = 200
MAX_NAMES = 256
"""Unknown names in one file beyond which it is refused unmatched: trainers save a few."""

KNOWN_NAMES = re.compile(
    r"""
    torch\.(Tensor|Size|device|dtype|\w*Storage|(b?float|u?int|complex|bool|half|double|long|short)\w*|strided|[a-z_]+_format)
    | torch\._utils\._rebuild_\w+ | torch\._tensor\._rebuild_from_type_v2 | torch\.nn\.parameter\.(Parameter|Buffer)
    | torch\.storage\.(\w*Storage|_load_from_bytes) | torch\.serialization\._get_layout
    | torch\.distributed\.tensor\.[\w.]+ | torch\.distributed\._tensor\.[\w.]+ | torch\.distributed\.device_mesh\.\w+
    | torch\.distributed\._mesh_layout\.\w+ | torch\.distributed\.checkpoint\.[\w.]+
    | torch\.distributed\._shard\.[\w.]+ | pathlib\._local\.(Pure)?(Posix|Windows)?Path
    | collections\.(OrderedDict|defaultdict|Counter) | _codecs\.encode | pathlib\.(Pure)?(Posix|Windows)?Path
    | (builtins|__builtin__)\.(dict|list|tuple|set|frozenset|int|float|bool|str|bytes|bytearray|complex|slice|range)
    | (builtins|__builtin__)\.object | __builtin__\.(long|unicode|xrange)
    | copyreg\._reconstructor | copy_reg\._reconstructor | datetime\.\w+
    | numpy\.(dtype|ndarray|generic|number|void|half|single|double|u?(byte|short|intc|long|longlong))
    | numpy\.(bool|str|bytes|object|u?int\d*|float\d*|complex\d*|c?longdouble|datetime64|timedelta64)_?
    | numpy\.(_core|core)\.multiarray\.(_reconstruct|scalar)
    | numpy\.dtypes\.\w+ | argparse\.Namespace
    | deepspeed\.(runtime|utils)\.[\w.]+ | deepspeed\.checkpoint\.universal_checkpoint\.SubparamShape
    """,
    re.VERBOSE | re.ASCII,
)
"""Names that checkpoints of torch and of its frameworks mention."""

# Modules that pickles call to run code. A checkpoint never needs them, so that no wish for them is one of a trainer's.
_RUNS_CODE = re.compile(
    r"(?:os|posix|nt|subprocess|sys|builtins|__builtin__|runpy|importlib|imp|ctypes|_ctypes|socket|pty|shutil|code|"
    r"codeop|commands|popen2|webbrowser|pickle|_pickle|cPickle|dill|cloudpickle|joblib|marshal|operator|_operator|functools|"
    r"_functools|asyncio|multiprocessing|threading|_thread|signal|platform|pdb|bdb|timeit|trace|profile|cProfile|"
    r"unittest|doctest|distutils|setuptools|pip|venv|ensurepip|urllib|http|requests|ftplib|smtplib|tempfile|io|_io|"
    r"pkgutil|shelve|zipimport|py_compile|compileall|inspect|sqlite3|mmap|idlelib|lib2to3|xmlrpc|telnetlib|yaml|"
    r"torch\.(?:load|save|compile|hub|jit|package|fx|export|ops|library|_C|_inductor|_dynamo)|"
    r"torch\.utils\.(?:cpp_extension|collect_env|model_zoo|bottleneck)|torch\.distributed\.(?:rpc|run|launch\w*)|"
    r"types\.(?:CodeType|FunctionType)|numpy\.(?:load|save|memmap|fromfile|f2py|distutils|testing|ctypeslib)|"
    r"huggingface_hub|converter)"
    r"(?:\..*)?",
    re.ASCII,
)
_CANARIES = ("os.system", "posix.system", "builtins.eval", "builtins.exec", "subprocess.Popen")
_QUANTIFIED_GROUP = re.compile(r"\)[*+?{]")
_ESCAPED = re.compile(r"\\.", re.DOTALL)


@dataclass
class AllowedNames:
    """A user's pattern, and the names that needed it."""

    pattern: re.Pattern[str]
    used: set[str] = field(default_factory=set)

    def allows(self, name: str) -> bool:
        """True where the whole name matches and is none that runs code."""
        if self.pattern.fullmatch(name) is None or runs_code(name):
            return False
        self.used.add(name)
        return True


_ALLOWED: ContextVar[AllowedNames | None] = ContextVar("allowed_names", default=None)


def allowed_names() -> AllowedNames | None:
    """What is allowed now; None outside of `allowing_names`."""
    return _ALLOWED.get()


@contextmanager
def allowing_names(patterns: Sequence[str]) -> Iterator[AllowedNames]:
    """Let pickled files that are read inside mention names that match one of the patterns whole.

    Raises:
        UsageError: a pattern is none, or beyond the language described above (`allow-name`).
    """
    allowed = AllowedNames(compile_names(patterns))
    token = _ALLOWED.set(allowed)
    try:
        yield allowed
    finally:
        _ALLOWED.reset(token)


def runs_code(name: str) -> bool:
    """True for names of modules with which pickles run code."""
    return _RUNS_CODE.fullmatch(name) is not None


def compile_names(patterns: Iterable[str]) -> re.Pattern[str]:
    """One pattern of several, each checked.

    Raises:
        UsageError: see `allowing_names`.
    """
    return re.compile("|".join(f"(?:{_checked(p)})" for p in patterns), re.ASCII)


def _checked(pattern: str) -> str:
    plain = _ESCAPED.sub("x", pattern)
    wrong = None
    if not pattern or len(pattern) > MAX_PATTERN:
        wrong = f"it has {len(pattern)} characters, and may have 1 to {MAX_PATTERN}"
    elif "(?" in plain.replace("(?:", "(") or re.search(r"\\[1-9]", pattern):
        wrong = "it looks ahead, behind or back"
    elif _QUANTIFIED_GROUP.search(plain):
        wrong = "it repeats a group"
    elif sum(map(plain.count, "*+{")) > 2 or plain.count("?") > 4 or plain.count("|") > 8:
        wrong = "it has more than two of `*`, `+` and `{}`, or too many alternatives"
    try:
        compiled = re.compile(pattern, re.ASCII)
    except (re.error, OverflowError, RecursionError) as error:
        raise _refused(pattern, show(error)) from None
    if wrong is None and any(compiled.fullmatch(c) for c in _CANARIES):
        wrong = f"it matches {next(c for c in _CANARIES if compiled.fullmatch(c))}, which no trainer's checkpoint needs"
    if wrong is not None:
        raise _refused(pattern, wrong)
    return pattern


def _refused(pattern: str, why: str) -> UsageError:
    return UsageError(
        "allow-name",
        f"--allow-name {show(pattern)} can't be used: {why}",
        expected=r"a regular expression for whole names of your own trainer, as 'mytrainer\.state\..*'",
    )
