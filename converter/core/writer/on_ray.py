"""Files of a plan as tasks of a Ray cluster: an executor whose tasks ask for the memory and the cores that they need.

The cluster's machines share the file system of the output, as the workers of any executor do. Ray starts a task again
whose machine is lost; it goes on in the same stage, once the lock of the lost one is gone. Nothing of a run is kept in
Ray: where the head is lost, the same command on another cluster goes on with what lies in the stages.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

from converter.core.files.opening import Identity
from converter.core.writer.plan import Plan
from converter.core.writer.preflight import needed_memory
from converter.core.writer.reporter import Silent
from converter.core.writer.tasks import Share, Written
from converter.errors import ConvertError, Refused
from converter.text import format_size, show

RETRIES = 20
"""How often Ray starts a task again whose machine or process was lost."""

WORKER_MEMORY = 130_000_000
"""Resident bytes of Ray's own part of a worker, about."""

BUSY_SECONDS = 300.0
"""How long a task waits for the lock of the one that it takes over from."""

TELL_SECONDS = 0.5

_PLACE = 0.0001
"""What a task takes of a resource that only says where it may run."""


class RayExecutor(Executor):
    """Runs shares of a plan in the workers of a Ray cluster.

    Args:
        address: of the cluster's head; None: RAY_ADDRESS, else the one that runs on this machine, else a new one.
        near: a custom resource of the machines that may be used, for example of those with the inputs on a disk of
            their own. A copy there has the size and the time of the file here (`cp -p`, `rsync -a`).

    Raises:
        Refused: Ray is not installed here (`ray-missing`), or no cluster answers there (`ray-unreachable`).
    """

    default_jobs = 1
    """Threads of a task where the user says nothing: a machine takes as many tasks as it has cores."""

    def __init__(self, address: str | None = None, *, near: str | None = None) -> None:
        if importlib.util.find_spec("ray") is None:
            what = "this needs Ray, which is not installed beside rlhf-convert"
            raise Refused("ray-missing", what, next="pip install 'rlhf-convert[ray]'")
        self._near = near
        self._is_ours = _connect(address)
        self._waiting: dict[Any, _RayFuture] = {}
        self._heard: dict[str, int] = {}
        self._advance: Callable[[int, str], None] = Silent().advance
        self._state = threading.Lock()
        self._ended = threading.Event()
        self._teller = _start_teller()
        self._thread = threading.Thread(target=self._collect, name="ray", daemon=True)
        self._thread.start()
        self.peaks: list[tuple[int, int]] = []

    def listen(self, advance: Callable[[int, str], None]) -> None:
        """Tell of bytes while they are written: see `Telling`."""
        self._heard.clear()
        self._advance = advance

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A share as a task.

        Raises:
            Refused: no machine of the cluster has what it asks for (`ray-no-room`).
        """
        import ray

        (share,) = args
        assert isinstance(share, Share)
        needed = declared_memory(share)
        self._expect_room(share, needed)
        resources = {self._near: _PLACE} if self._near else {}
        # A process for each: one that is used again holds 25 to 35 MB more after each file (measured).
        remote: Any = ray.remote(max_calls=1)(_work)
        task = remote.options(
            num_cpus=share.jobs, memory=needed, max_retries=RETRIES, resources=resources, name=share.stage.name
        )
        allowed = dataclasses.replace(share, memory=needed - WORKER_MEMORY)
        reference = task.remote(fn, allowed, self._teller, self._near is not None)
        future = _RayFuture(reference, needed)
        with self._state:
            self._waiting[reference] = future
        return future

    def _expect_room(self, share: Share, needed: int) -> None:
        import ray

        wanted = {"CPU": float(share.jobs), "memory": float(needed)} | ({self._near: _PLACE} if self._near else {})
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if any(all(m.get(name, 0.0) >= count for name, count in wanted.items()) for m in machines):
            return
        most = {name: max((m.get(name, 0.0) for m in machines), default=0.0) for name in wanted}
        raise Refused(
            "ray-no-room",
            "no machine of the cluster has what one file's task asks for",
            where=show(", ".join(s.file for s in share.plan.written)),
            expected=_resources(wanted),
            got=f"{len(machines)} machines; the most of each: {_resources(most)}",
            next="add a machine, or lower --jobs; --memory says what a task may hold",
        )

    def _collect(self) -> None:
        """Bring results and what workers tell to this process, until the end."""
        while not self._ended.wait(0.05):
            with self._state:
                waiting = list(self._waiting)
            self._hear()
            if waiting:
                self._look(waiting)

    def _look(self, waiting: list[Any]) -> None:
        import ray

        done, _ = ray.wait(waiting, num_returns=1, timeout=TELL_SECONDS)
        for reference in done:
            with self._state:
                future = self._waiting.pop(reference)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result, peak = ray.get(reference)
            except BaseException as error:
                future.set_exception(_in_our_words(error))
                continue
            self.peaks.append((future.memory, peak))
            if isinstance(result, ConvertError):
                future.set_exception(result)
            else:
                self._hear()
                self._catch_up(result)
                future.set_result(result)

    def _hear(self) -> None:
        import ray

        try:
            said: Mapping[str, tuple[int, str]] = ray.get(self._teller.heard.remote(), timeout=TELL_SECONDS)
        except Exception:  # the results come without it
            return
        for key, (count, tensor) in said.items():
            self._tell(key, count, tensor)

    def _catch_up(self, written: Written) -> None:
        """What a worker did not tell: the last bytes of its file, or a whole one of an earlier run."""
        for file, size, _ in written.files:
            self._tell(file, size, "")

    def _tell(self, key: str, count: int, tensor: str) -> None:
        """A task that was started again begins at zero: only what goes beyond is news."""
        more = count - self._heard.get(key, 0)
        if more > 0:
            self._heard[key] = count
            self._advance(more, tensor)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster; what still runs there is stopped."""
        import ray

        self._ended.set()
        self._thread.join()
        if self._is_ours:
            ray.shutdown()


class _RayFuture(Future[Any]):
    """A task; cancelling one that runs kills its process, whose stage stays for the next run."""

    def __init__(self, reference: Any, memory: int) -> None:
        super().__init__()
        self.memory = memory
        self._reference = reference

    def cancel(self) -> bool:
        import ray

        if not self.done():
            ray.cancel(self._reference, force=True)
        return super().cancel()


def declared_memory(share: Share) -> int:
    """Bytes that a task asks Ray for: what the plan says of its largest chunk, or what the user allows."""
    return WORKER_MEMORY + (share.memory or needed_memory(share.plan, share.jobs))


def _connect(address: str | None) -> bool:
    """Join the cluster; False where this process is in one already."""
    import ray

    if ray.is_initialized():
        return False
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if is_main else {}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        init: Any = ray.init
        init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=None)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise Refused(
            "ray-unreachable",
            "no Ray cluster can be joined",
            where=show(address or os.environ.get("RAY_ADDRESS", "this machine")),
            got=show(str(error).strip().partition("\n")[0]),
            next="ray start --head on one machine, ray start --address HEAD:6379 on the others; then --ray-address",
        ) from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return True


def _start_teller() -> Any:
    """Who hears of progress: a process on this machine, so that it is lost with nobody but us."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    remote: Any = ray.remote(_Teller)
    return remote.options(num_cpus=0, scheduling_strategy=here, max_restarts=-1).remote()


class _Teller:
    """The last word of each worker."""

    def __init__(self) -> None:
        self._said: dict[str, tuple[int, str]] = {}

    def say(self, file: str, count: int, tensor: str) -> None:
        self._said[file] = (count, tensor)

    def heard(self) -> dict[str, tuple[int, str]]:
        said, self._said = self._said, {}
        return said


class _Saying(Silent):
    """Tells of bytes, seldom."""

    def __init__(self, teller: Any, file: str) -> None:
        self._teller, self._file = teller, file
        self._count, self._next = 0, 0.0
        self._lock = threading.Lock()

    def advance(self, count: int, tensor: str) -> None:
        with self._lock:
            self._count += count
            now = time.monotonic()
            if now < self._next:
                return
            self._next, total = now + TELL_SECONDS, self._count
        self._teller.say.remote(self._file, total, tensor)


def _work(
    fn: Callable[[Share, Silent], Written], share: Share, teller: Any, is_near: bool
) -> tuple[Written | ConvertError, int]:
    """What runs in a worker: its result or its refusal, and the most memory that it held."""
    if is_near:
        share = dataclasses.replace(share, plan=seen_here(share.plan))
    file = next((s.file for s in share.plan.written), "")
    patience = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return fn(share, _Saying(teller, file)), _peak()
        except ConvertError as error:
            if error.code != "output-busy" or time.monotonic() > patience:
                return error, _peak()
        time.sleep(TELL_SECONDS)


def seen_here(plan: Plan) -> Plan:
    """The plan with this machine's copies of its inputs: of the same size and time, under another inode number."""
    inputs = dict(plan.inputs)
    for path, planned in plan.inputs.items():
        try:
            here = Identity.of(os.stat(path))
        except OSError:
            continue  # opening it says why
        if (here.size, here.mtime_ns) == (planned.size, planned.mtime_ns):
            inputs[path] = here
    return dataclasses.replace(plan, inputs=inputs)


def _peak() -> int:
    """The most resident bytes of this process so far, without what it shares with others of Ray's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _in_our_words(error: BaseException) -> BaseException:
    import ray

    errors: Any = ray.exceptions
    if isinstance(error, errors.RayTaskError):
        cause = error.cause
        if isinstance(cause, ModuleNotFoundError) and (cause.name or "").partition(".")[0] == "converter":
            what = "a machine of the cluster does not have this version of rlhf-convert"
            return Refused("ray-worker", what, got=show(str(cause)), next="install the same version on all of them")
        return cause if isinstance(cause, BaseException) else error
    return Refused(
        "ray-lost",
        "the cluster lost a task and did not start it again, or was lost itself; nothing was published",
        got=show(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"),
        next="repeat the same command once the cluster is up; it goes on with what is written",
    )


def _resources(found: Mapping[str, float]) -> str:
    names = {"CPU": lambda n: f"{n:g} CPUs", "memory": lambda n: format_size(int(n))}
    return ", ".join(names[k](n) if k in names else f"resource {show(k)}" for k, n in found.items() if n)
