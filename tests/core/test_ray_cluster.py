"""Files written by a real Ray cluster of three nodes on this machine: the bytes of one run, whichever node is lost.

pytest -m ray, with a Python that has Ray beside this package: pip install 'rlhf-convert[ray]'
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converter.core.files.opening import Identity
from converter.core.tensors import nodes as tensors
from converter.core.tensors.dtypes import DType
from converter.core.writer.plan import Plan
from converter.core.writer.tasks import write_with
from converter.errors import Refused
from durability import Quiet, tree
from small_models import numbers, open_model, plan_of, save_model, written

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]

STORE = 80_000_000
"""Bytes of each node's object store."""

FILES = 9
RECIPE = "version: 1\ninputs: {source: %s}\nsteps: [{cast: {dtype: bfloat16}}]\n"


class Watched(Quiet):
    """A reporter that does something once a file is there."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._then = then

    def shard_done(self, file: str, size: int, resumed: bool) -> None:
        super().shard_done(file, size, resumed)
        if len(self.written) == 1:
            self._then()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine files of 24 MB in fp32."""
    shards = [{f"w.{i}": numbers(1500, 4000, seed=i)} for i in range(FILES)]
    return save_model(tmp_path_factory.mktemp("ray") / "model", *shards)


def halved(model: Path) -> Plan:
    given = open_model(model)
    return plan_of(given.replace(tensors={n: tensors.cast(t, DType.BF16) for n, t in given.tensors.items()}))


@pytest.fixture(scope="module")
def local(model: Path) -> dict[str, str]:
    """What one process makes."""
    written(halved(model), model.with_name("local"))
    return tree(model.with_name("local"))


def started(nodes: int = 2) -> Any:
    """A head and two nodes beside it, with one core each; the two have the resource `near`."""
    from ray.cluster_utils import Cluster

    limits = {"num_cpus": 1, "object_store_memory": STORE}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args={**limits, "include_dashboard": False}))
    for _ in range(nodes):
        patiently(lambda: cluster.add_node(**limits, resources={"near": 1}))
    return cluster


def patiently(start: Callable[[], Any]) -> Any:
    """A node's agent has to answer within seconds, which it can't where the machine is busy: then once more."""
    for _ in range(5):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    raise AssertionError("the machine is too busy to start a node of Ray")


@pytest.fixture(scope="module")
def cluster(has_ray: None) -> Iterator[Any]:
    made = started()
    yield made
    import ray

    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module", autouse=True)
def has_ray() -> None:
    """Ray is there."""
    pytest.importorskip("ray")


def executor(cluster: Any, **given: Any) -> Any:
    from converter.core.writer.on_ray import RayExecutor

    return RayExecutor(cluster.address, **given)


def test_three_nodes_make_what_one_process_makes_and_hold_what_they_asked_for(
    cluster: Any, model: Path, local: dict[str, str], tmp_path: Path
) -> None:
    reporter = Watched()
    with executor(cluster) as ray:
        write_with(ray, halved(model), tmp_path / "out", reporter=reporter)
    assert tree(tmp_path / "out") == local
    assert os.listdir(tmp_path) == ["out"]
    assert len(reporter.written) == FILES
    assert reporter.bytes == halved(model).total_bytes
    assert len(ray.peaks) == FILES
    print("declared and held:", sorted({(d // 1_000_000, p // 1_000_000) for d, p in ray.peaks}))
    assert all(held <= declared for declared, held in ray.peaks)


def test_tasks_run_only_where_the_resource_is_that_says_so(
    cluster: Any, model: Path, local: dict[str, str], tmp_path: Path
) -> None:
    with executor(cluster, near="near") as ray:
        write_with(ray, halved(model), tmp_path / "out", reporter=Quiet())
    assert tree(tmp_path / "out") == local
    with executor(cluster, near="nowhere") as ray, pytest.raises(Refused, match="resource nowhere") as caught:
        write_with(ray, halved(model), tmp_path / "other", reporter=Quiet())
    assert caught.value.code == "ray-no-room"
    assert not (tmp_path / "other").exists()


def test_a_task_that_asks_for_more_than_a_node_has_is_refused_and_does_not_wait_for_ever(
    cluster: Any, model: Path, tmp_path: Path
) -> None:
    with executor(cluster) as ray, pytest.raises(Refused, match="asks for") as caught:
        write_with(ray, halved(model), tmp_path / "out", reporter=Quiet(), jobs=8)
    assert caught.value.expected is not None
    assert "8 CPUs" in caught.value.expected
    assert os.listdir(tmp_path) == []


def test_a_node_that_is_killed_in_the_middle_changes_no_byte(
    model: Path, local: dict[str, str], tmp_path: Path, cluster: Any
) -> None:
    node = next(iter(cluster.worker_nodes))
    reporter = Watched(lambda: cluster.remove_node(node, allow_graceful=False))
    with executor(cluster) as ray:
        write_with(ray, halved(model), tmp_path / "out", reporter=reporter)
    assert node not in cluster.worker_nodes
    assert tree(tmp_path / "out") == local
    assert os.listdir(tmp_path) == ["out"]
    assert reporter.bytes == halved(model).total_bytes


def test_a_worker_that_refuses_refuses_for_all(cluster: Any, model: Path, tmp_path: Path) -> None:
    plan = halved(model)
    changed = next(path for path in plan.inputs if path.endswith("00002-of-00009.safetensors"))
    plan.inputs[changed] = Identity(1, 2, 3)  # type: ignore[index]
    with executor(cluster) as ray, pytest.raises(Refused) as caught:
        write_with(ray, plan, tmp_path / "out", reporter=Quiet())
    assert caught.value.code == "input-changed"
    assert not (tmp_path / "out").exists()


def test_where_the_head_is_lost_the_same_command_finishes_on_another_cluster(
    model: Path, local: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE % model)
    first = started()
    command = [sys.executable, "-m", "converter", "run", "recipe.yaml", "out", "--executor", "ray", "-j", "1"]
    command += ["--allow", "tensors-missing", "--allow", "tensors-unexpected"]
    process = subprocess.Popen(
        [*command, "--ray-address", first.address], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    told = process.stderr.readline()
    assert told.startswith("1/9"), told
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(process.stderr or ()))
    reader.start()
    first.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    begun = time.monotonic()
    code = process.wait(timeout=240)
    reader.join()
    print("ended", code, f"{time.monotonic() - begun:.0f} s later:", "".join(rest)[-600:])
    for node in list(first.worker_nodes):
        node.kill_all_processes(check_alive=False, allow_graceful=False)
    assert code != 0
    assert not (tmp_path / "out").exists()
    second = started()
    try:
        again = subprocess.run([*command, "--ray-address", second.address], cwd=tmp_path, check=False)
    finally:
        second.shutdown()
    assert again.returncode == 0
    made = tree(tmp_path / "out")
    assert {n: d for n, d in made.items() if n != "rlhf-convert.json"} == {
        n: d for n, d in local.items() if n != "rlhf-convert.json"
    }
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe.yaml"]
