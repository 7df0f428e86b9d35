"""What an adapter without a task type was trained as: the class that it names, or the head that it brings.

PEFT writes `task_type: null` where the model was wrapped without one, and the class in `auto_mapping`; transformers'
`add_adapter` writes neither.
"""

from __future__ import annotations

from collections.abc import Collection

from converter.converters.merge.adapter_keys import Module, read_modules
from converter.core.checkpoint import Checkpoint
from converter.errors import Refused
from converter.families.adapter_task import TASK_SUFFIX, task_of_class
from converter.families.memory_names import classifier, without_numbers
from converter.text import fold, show


def with_task(adapter: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The adapter with the task type that its class or its head implies; as it is where it states one, or none does.

    Raises:
        Refused: the head is one of several classes' (`adapter-task-unknown`).
    """
    if adapter.config.get("task_type"):
        return adapter
    task = task_of_class(adapter.config) or _task_of_head(adapter, base)
    return adapter if task is None else adapter.replace(config={**adapter.config, "task_type": task})


def _task_of_head(adapter: Checkpoint, base: Checkpoint) -> str | None:
    """The task of the class whose head is what the adapter holds whole and the base lacks."""
    saved = adapter.config.get("modules_to_save")
    names = {n for n in saved if isinstance(n, str)} if isinstance(saved, list) else set()
    modules = read_modules(adapter.tensors, show(adapter.origin.asked)).modules
    brought = {f"{n}.{leaf}" for n, m in modules.items() if _is_saved(n, m, names) for leaf in m.replaced}
    brought = {n for n in brought if n not in base.tensors and not any(n in group for group in base.ties)}
    fitting = [task for task in TASK_SUFFIX if brought and _is_head_of(task, brought, base)]
    if len(fitting) > 1:
        raise Refused(
            "adapter-task-unknown",
            f"{fold(sorted(brought))} is a head of {' and of '.join(fitting)}, and the adapter has no task_type",
            where=show(adapter.origin.asked),
            next="set task_type in adapter_config.json to the one that training used",
        )
    return fitting[0] if fitting else None


def _is_saved(name: str, module: Module, names: Collection[str]) -> bool:
    return bool(module.replaced) and (module.saved or any(name == n or name.endswith(f".{n}") for n in names))


def _is_head_of(task: str, brought: Collection[str], base: Checkpoint) -> bool:
    """True where the class of that task is the base and exactly this head."""
    found = classifier(base.config, {"task_type": task})
    if found is None or set(found.own).isdisjoint(brought):
        return False
    head = {n for n in brought if n in found.own or without_numbers(n) in found.adds}
    inside = [f"{found.architecture.prefix}.{n}" for n in base.tensors]  # a bare backbone is stored without its prefix
    return head == set(brought) and not found.missing([*base.tensors, *inside, *brought])
