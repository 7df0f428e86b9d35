"""The command line. Importing this package imports no third-party module; `--help` imports typer and nothing else."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from converter.cli.sink import Failed, error_to_user
from converter.diagnostic import PROGRAM, Command, Steps
from converter.errors import EXIT_BUG, ConvertError, Interrupted, Refused, UsageError
from converter.text import show

VERBS = (
    "convert",
    "rm-to-critic",
    "critic-to-rm",
    "merge-lora",
    "gather",
    "repair",
    "reshard",
    "run",
    "average",
    "interpolate",
    "make-delta",
    "apply-delta",
    "extract-lora",
    "prune-lora",
    "convert-lora",
    "inspect",
    "doctor",
    "verify",
    "explain",
    "diff",
    "demo",
    "list",
    "env",
    "schema",
    "completion",
    "watch",
    "check",
    "push",
)

READING = ("inspect", "doctor", "watch", "verify", "explain", "diff", "list", "env", "schema", "completion")
"""Those that write nothing but what they print."""


class Bug(ConvertError):
    """An exception that nobody expected."""

    exit_code = EXIT_BUG


def run() -> None:
    """The console script."""
    # Torch brings a million objects that never become garbage; looking through them took a tenth of a 3 GB merge.
    gc.set_threshold(50_000, 50, 1_000)
    code = main()
    # Python looks through all of them once more when it ends, which took a fifth of `import torch`.
    gc.freeze()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; prints to stdout and stderr as they are when it is called."""
    arguments = with_verb(list(sys.argv[1:] if argv is None else argv))
    try:
        with _signals_raise() as received:
            return _run(arguments, received)
    except BrokenPipeError:
        # The reader of our output went away, as in `... | head`: not an error to talk about.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - kept open until the process ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args and isinstance(stop.args[0], int) else signal.SIGINT
        error: ConvertError = Interrupted(number, "interrupted")
    except ConvertError as known:
        error = known
    except OSError as failed:
        error = Failed("system", f"the system refused: {failed.strerror or show(failed)}", where=_of(failed))
        error.__cause__ = failed
    except Exception as bug:
        # No user shall read a traceback.
        error = Bug("bug", f"a bug in {PROGRAM}: {type(bug).__name__}: {show(bug)}")
        env = Command("env")
        error.next = Steps("report it with the output of this command under RLHF_CONVERT_DEBUG=1, and of ", env)
        error.__cause__ = bug
    _complete(error, arguments)
    writes = bool(arguments) and arguments[0] not in READING
    return error_to_user(error, as_json="--json" in arguments, writes=writes, one_line=arguments[:1] == ["watch"])


def _complete(error: ConvertError, arguments: list[str]) -> None:
    """Put the user's own words into what the error says to do next."""
    if not arguments or arguments[0] not in VERBS:
        return
    from converter.cli.next_step import complete

    complete(error, arguments[0], arguments[1:])


def with_verb(arguments: list[str]) -> list[str]:
    """`rlhf-convert PATH` is `rlhf-convert inspect PATH`; no argument at all asks for help."""
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    if not arguments:
        return ["--help"]
    first = arguments[0]
    if first.startswith("-") or first in VERBS:
        return arguments
    looks_like_path = "/" in first or first.startswith((".", "~")) or os.path.lexists(first)
    return ["inspect", *arguments] if looks_like_path else arguments


def _run(arguments: list[str], received: list[int]) -> int:
    if sys.platform == "win32":
        raise Refused("windows", "Windows is not supported", next="run it in WSL 2 or on Linux")
    if arguments[0] == "--version":
        from converter.version import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    if arguments[0] == "inspect" and len(arguments) == 2 and not arguments[1].startswith("-"):
        # Nothing to parse, so typer is not imported, which takes longer than a 70B model's headers.
        from converter.cli.sink import Sink
        from converter.cli.tell.inspect import inspect

        if not os.path.lexists(arguments[1]):
            from converter.sources.hub import patience

            patience.listener = Sink().tell
        return inspect(arguments[1], None, Sink())
    hook = sys.excepthook
    import typer

    from converter.cli.verbs.all import app, command_of

    verb, rest = arguments[0], arguments[1:]
    name = f"{PROGRAM} {verb}" if verb in VERBS else PROGRAM
    try:
        if verb in VERBS:
            command = command_of(verb)(rest, prog_name=name, standalone_mode=False)
        else:
            command = app(arguments, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        what = error.format_message()
        if verb not in VERBS and not verb.startswith("-"):
            what = what.replace("No such command", "no command and no folder is named").removesuffix(".")
        raise UsageError("usage", show(what), next=Command(verb if verb in VERBS else "", ("--help",))) from None
    finally:
        sys.excepthook = hook
    if received:
        # Typer makes exit code 130 of any signal that comes while it parses, and says nothing.
        raise KeyboardInterrupt(received[0])
    # Typer parses; what a verb does runs here, where interrupts and errors are ours to show.
    return command if isinstance(command, int) else int(command())


@contextmanager
def _signals_raise() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise KeyboardInterrupt with the signal's number; a second one ends the process at once.

    A signal that the caller has ignored (`nohup`, `trap '' INT`, a job in the background) stays ignored, as in other
    Unix programs. Yields the numbers of the signals that came.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is not signal.SIG_IGN]

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in wanted:
            signal.signal(each, signal.SIG_DFL)
        received.append(number)
        raise KeyboardInterrupt(number)

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        # An interrupt that comes while Python removes an object is lost, but for a traceback on the user's screen.
        if lost.exc_type is not KeyboardInterrupt or not received:
            unraisable(lost)
            return
        number = received.pop()
        signal.signal(number, stop)
        threading.Timer(0.01, os.kill, (os.getpid(), number)).start()

    unraisable, sys.unraisablehook = sys.unraisablehook, send_again
    before = {each: signal.signal(each, stop) for each in wanted}
    try:
        yield received
    finally:
        sys.unraisablehook = unraisable
        for each, handler in before.items():
            signal.signal(each, handler)


def _of(failed: OSError) -> str | None:
    """The path that an error of the system is about: the folder, where it lets nobody look for what is in it."""
    if not isinstance(failed.filename, str | os.PathLike):
        return None
    path = os.fspath(failed.filename)
    folder = os.path.dirname(path)
    is_closed = isinstance(failed, PermissionError) and os.path.isdir(folder) and not os.access(folder, os.X_OK)
    return show(folder if is_closed else path)
