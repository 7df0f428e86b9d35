"""Ends of a run: tracebacks that nobody knows, workers that died, crashes below Python."""

from __future__ import annotations

from dataclasses import replace

from converter.diagnostic import Command, Next, Steps
from converter.examine.explanations.message import Message
from converter.examine.explanations.tracebacks import HEAD, Ended, Frame

UNKNOWN = Message(
    code="traceback-unknown",
    severity="error",
    keys=(HEAD,),
    pattern=r"Traceback \(most recent call last\)",
    text="The program ended with an error that is not known here ({what}), and what it means is not "
    "guessed. Messages beside it in the same log, harmless ones too, do not explain it.",
    next=Steps(Command("doctor", ("DIR",)), " where a checkpoint was being loaded or saved"),
)
"""A traceback whose last line is not a known message."""

CUT = replace(
    UNKNOWN,
    text="A traceback begins here and its last line, which names the error, is not in this text, so nothing can be "
    "said of it ({place}).",
    next="paste the text with the line that names the error, or give the whole log",
)

WORKER_FAILED = Message(
    code="worker-failed",
    severity="error",
    keys=("ChildFailedError",),
    pattern=r"ChildFailedError",
    text="torchrun reports that a worker ended, which is where the run stopped and no cause ({root}). The cause is in "
    "that worker's own output: its traceback, or nothing where it was killed from outside. "
    "The other ranks were stopped because of it.",
    next=Steps("before the run goes on: ", Command("doctor", ("LAST_CHECKPOINT",))),
    seen_in=("torch 2.13.0: torch/distributed/elastic/multiprocessing/errors/__init__.py",),
)

MESSAGES = (
    UNKNOWN,
    WORKER_FAILED,
    Message(
        code="exception-ignored",
        severity="cosmetic",
        keys=("Exception ignored ",),
        pattern=r"Exception ignored (?:in|on|while)\b",
        text="Python met an error while it was cleaning up, ignored it and went on: it ended nothing.",
        seen_in=("python 3.11: Python/errors.c",),
    ),
    Message(
        code="run-interrupted",
        severity="error",
        keys=("KeyboardInterrupt", "SignalException", "CANCELLED AT", "Terminated"),
        pattern=r"^(?:.{0,200}[\s:])?KeyboardInterrupt\s*$|SignalException: Process \d+ got signal|"
        r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT|^\s*Terminated\s*$",
        text="The run was stopped from outside: by hand, by a scheduler, or by its time limit. It did not fail by "
        "itself, and a checkpoint that it was writing then is not whole.",
        next=Command("doctor", ("LAST_CHECKPOINT",)),
        seen_in=("torch 2.13.0: torch/distributed/elastic/multiprocessing/api.py",),
    ),
    Message(
        code="collective-timeout",
        severity="error",
        keys=("Watchdog caught collective operation timeout", "Some NCCL operations have failed or timed out"),
        pattern=r"Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=\d+, OpType=(?P<name>\w+)|"
        r"Watchdog caught collective operation timeout|Some NCCL operations have failed or timed out",
        text="A rank waited for the others until NCCL's watchdog ended it ({name}). One rank had died, was far behind, "
        "or saved or loaded alone: under ZeRO-3 and FSDP every rank has to take part in a save. What was being saved "
        "is not whole.",
        next=Steps(
            "look for the first rank that stopped; before the run goes on: ", Command("doctor", ("LAST_CHECKPOINT",))
        ),
        seen_in=("torch 2.0.1: torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp",),
    ),
    Message(
        code="crash-below-python",
        severity="error",
        keys=(
            *("Segmentation fault", "core dumped", "Bus error", "Fatal Python error", "received signal SIG"),
            *("Signal 6 (SIGABRT", "Signal 7 (SIGBUS", "Signal 11 (SIGSEGV"),
        ),
        pattern=r"(?P<name>Segmentation fault|Bus error|Aborted) \(core dumped\)|Fatal Python error: |"
        r"Caught signal 11 \(Segmentation fault|received signal SIG(?:SEGV|BUS|ABRT)|"
        r"Signal (?:6 \(SIGABRT|7 \(SIGBUS|11 \(SIGSEGV)|^\s*(?:Segmentation fault|Bus error)\s*$",
        text="The process died below Python ({name}): in a driver, in a C++ extension, or, with a bus error, of shared "
        "memory that was full. No Python traceback explains it, and what it was writing is not whole.",
        next=Command("doctor", ("LAST_CHECKPOINT",)),
        seen_in=(
            "python 3.11: Modules/faulthandler.c",
            "torch 2.13.0: torch/distributed/elastic/multiprocessing/errors/__init__.py",
        ),
    ),
    Message(
        code="worker-ended",
        severity="error",
        keys=(") local_rank: ", "exits with return code = ", "exitcode  : "),
        pattern=r"failed \(exitcode: (?P<code>-?[1-9]\d*)\) local_rank: (?P<name>\d+)|"
        r"exits with return code = (?P<other>-?[1-9]\d*)|exitcode  : (?P<third>-?[1-8]\d*)\b",
        text="A launcher reports that a worker ended with an error. The cause is in that worker's own output, further "
        "up; -9 means that it was killed, nearly always for memory, and -15 that it was ended from outside.",
        next=Command("doctor", ("LAST_CHECKPOINT",)),
        seen_in=(
            "torch 2.13.0: torch/distributed/elastic/multiprocessing/api.py",
            "deepspeed 0.19.8: deepspeed/launcher/launch.py",
        ),
    ),
    Message(
        code="actor-died",
        severity="error",
        keys=("ActorDiedError", "RayActorError", "WorkerCrashedError", "The worker died unexpectedly"),
        pattern=r"ActorDiedError|RayActorError|WorkerCrashedError|The worker died unexpectedly",
        text="A Ray worker died and took its part of the model with it. Ray names what it saw; the cause is in the "
        "output of that worker, or it was killed for memory.",
        next=Command("doctor", ("LAST_CHECKPOINT",)),
        seen_in=("ray 2.60.0: ray/exceptions.py",),
    ),
)

_SIGNALS = {
    "-4": "SIGILL: a binary for another processor",
    "-6": "SIGABRT: a C++ library gave up, as NCCL's watchdog does",
    "-7": "SIGBUS: shared memory was full, as /dev/shm is in a container",
    "-8": "SIGFPE",
    "-9": "SIGKILL: killed from outside, nearly always for memory",
    "-11": "SIGSEGV: a crash below Python",
    "-15": "SIGTERM: ended from outside, as by a scheduler",
}

_SAVES = (
    "save_pretrained",
    "save_checkpoint",
    "_save_checkpoint",
    "save_model",
    "_save",
    "save_state",
    "save_file",
    "save_16bit_model",
    "save_fsdp_model",
    "export_model",
)
_RESUMES = ("load_checkpoint", "_load_checkpoint", "_load_from_checkpoint", "load_state", "deepspeed_load_checkpoint")
_ADAPTERS = ("load_adapter", "load_peft_weights", "set_peft_model_state_dict", "from_local_checkpoint", "_load_adapter")
_LOADS = (
    "from_pretrained",
    "load_state_dict",
    "load_weights",
    "load_model",
    "load_file",
    "safe_open",
    "_load_state_dict_into_model",
    "_load_pretrained_model",
    "load_pretrained_model",
)


def explains(message: Message) -> bool:
    """True for a message that says why a traceback came: not a harmless one, nor the report of a worker's end."""
    consequences = ("worker-failed", "worker-ended", "collective-timeout", "crash-below-python", UNKNOWN.code)
    return message.severity in ("error", "changes-numbers") and message.code not in consequences


def of(ended: Ended) -> tuple[Message, dict[str, str]]:
    """The message for a traceback that is not known, and the names of this case."""
    if ended.exception.endswith("ChildFailedError"):
        return WORKER_FAILED, {"root": _root(ended.root)}
    at = ended.raised_in
    place = {"place": at.place} if at else {}
    if not ended.exception:
        return CUT, place
    package = next((f.package for f in reversed(ended.frames) if f.package), None)
    what = ended.exception + (f" in {at.place}" if at else "")
    groups = {"what": what, "exception": ended.exception, "package": package or "a script of your own"}
    return replace(UNKNOWN, next=_next(ended.frames, package)), groups | place


def _root(rows: dict[str, str]) -> str:
    if not rows:
        return "which one is not in this text"
    code = rows.get("exitcode", "").split(" ")[0]
    means = _SIGNALS.get(code, "an error of Python's, or the script's own exit code" if code == "1" else "")
    rank, host = rows.get("rank", "").split(" ")[0], rows.get("host", "")
    who = [f"rank {rank}"] * bool(rank) + [f"on {host}"] * bool(host) + ["ended first"]
    return " ".join(who) + (f", exit code {code}" if code else "") + (f" = {means}" if means else "")


def _next(frames: tuple[Frame, ...], package: str | None) -> Next:
    """The command that most likely helps: by what the program was doing, as its functions are named."""
    functions = {frame.function for frame in frames}
    packages = {frame.package for frame in frames}
    sound = "; where that finds nothing the files are sound, and the error is the program's"
    if functions & {*_SAVES}:
        return Steps("it was saving, and what it wrote may be unfinished: ", Command("doctor", ("DIR",)))
    if functions & {*_ADAPTERS}:
        return Steps("it was loading an adapter: ", Command("doctor", ("ADAPTER", "--base", "BASE")), sound)
    if functions & {*_RESUMES}:
        return Steps("it was resuming from a checkpoint: ", Command("doctor", ("CHECKPOINT",)), sound)
    if functions & {*_LOADS} and packages & {"vllm", "sglang"}:
        return Steps("an engine was loading the model: ", Command("doctor", ("DIR", "--for", "vllm")), sound)
    if functions & {*_LOADS}:
        return Steps("it was loading a model: ", Command("doctor", ("DIR",)), sound)
    if not frames:
        return Steps(
            "the whole traceback shows what the program was doing: paste it, or ", Command("explain", ("LOG",))
        )
    whose = f"{package}'s issues" if package else "your own script"
    return f"the traceback shows no checkpoint being read or written, so no command here helps: see {whose}"
