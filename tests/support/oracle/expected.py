"""What PEFT makes of an adapter: its merge in on-disk names, and its unmerged forward pass."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oracle.bases import Base, digest, kept, quiet, read_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers


def _wrap(
    base: Base,
    adapters: Sequence[Path],
    *,
    task: str,
    dtype: Any,
    labels: int,
    prepare: Callable[[Any], Any] | None,
    config: dict[str, Any] | None = None,
) -> Any:
    settings = ({"num_labels": labels, "pad_token_id": 0} if task == "SEQ_CLS" else {}) | (config or {})
    model = base.load(task=task, dtype=dtype, **settings)
    if prepare is not None:
        model = prepare(model) or model
    wrapped = peft.PeftModel.from_pretrained(model, adapters[0])
    for number, adapter in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(adapter, adapter_name=f"adapter{number}")
    return wrapped.eval()


def peft_merge(
    base: Base,
    *adapters: Path,
    task: str = "CAUSAL_LM",
    labels: int = 1,
    prepare: Callable[[Any], Any] | None = None,
    dtype: Any = "auto",
) -> dict[str, Any]:
    """`merge_and_unload` of the adapters in order, saved by transformers and read back: tensors in on-disk names."""

    def make(home: Path) -> None:
        wrapped = _wrap(base, adapters, task=task, dtype=dtype, labels=labels, prepare=prepare)
        names = ["default", *(f"adapter{n}" for n in range(1, len(adapters)))]
        wrapped.merge_and_unload(adapter_names=names).save_pretrained(home)

    with quiet(), tempfile.TemporaryDirectory() as folder:
        if prepare is None:
            kept(Path(folder), ("merge", _key(base, adapters), task, labels, dtype), make)
        else:
            make(Path(folder))
        return read_tensors(Path(folder))


def _key(base: Base, adapters: Sequence[Path]) -> tuple[str, ...]:
    return (base.auto, digest(base.path), *(digest(adapter) for adapter in adapters))


@functools.lru_cache(maxsize=1)
def _unmerged(_key: tuple[str, ...], base: Base, adapters: tuple[Path, ...], task: str, labels: int) -> Any:
    """The last one is kept: tests ask it about several inputs."""
    return _wrap(base, adapters, task=task, dtype=torch.float32, labels=labels, prepare=None)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """SVD, QR and convolutions give other last bits on two threads than on one; one is what can be repeated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inputs_for(base: Base, *, batch: int = 2, length: int = 9, seed: int = 5) -> dict[str, Any]:
    """Token ids (or pixels) of a fixed draw; 0, the padding token, is not among them."""
    generator = torch.Generator().manual_seed(seed)
    if base.auto == "AutoModelForImageClassification":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    return {"input_ids": torch.randint(3, 150, (batch, length), generator=generator)}


def logits(model: Any, inputs: dict[str, Any]) -> Any:
    with torch.no_grad(), quiet():
        return model(**inputs).logits.double()


def peft_logits(
    base: Base,
    *adapters: Path,
    task: str = "CAUSAL_LM",
    labels: int = 1,
    prepare: Callable[[Any], Any] | None = None,
    inputs: dict[str, Any] | None = None,
) -> Any:
    """The unmerged PEFT model's forward in fp32: weights as stored, adapters as stored, no merge anywhere."""
    with quiet():
        if prepare is None:
            wrapped = _unmerged(_key(base, adapters), base, adapters, task, labels)
        else:
            wrapped = _wrap(base, adapters, task=task, dtype=torch.float32, labels=labels, prepare=prepare)
        if len(adapters) > 1:
            names = ["default", *(f"adapter{n}" for n in range(1, len(adapters)))]
            wrapped.base_model.set_adapter(names)
        return logits(wrapped, inputs or inputs_for(base))


def load_output(path: Path, auto: str = "AutoModelForCausalLM", dtype: Any = torch.float32) -> Any:
    """The output as transformers loads it; no key may be missing, unexpected, mismatched or in error."""
    with quiet():
        model, info = getattr(transformers, auto).from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), {k: v for k, v in info.items() if v}
    return model.eval()


def relative_difference(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of `b`."""
    return float((a - b).norm() / b.norm())


def effect(base: Base, expected: Any, *, task: str = "CAUSAL_LM", inputs: dict[str, Any] | None = None) -> float:
    """How far the adapter moves the logits; a test that compares logits is worth nothing where this is small."""
    return relative_difference(logits(base.load(task=task, dtype=torch.float32), inputs or inputs_for(base)), expected)


def same_bits(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Asserts that two dictionaries hold the same names, dtypes, shapes and bytes."""
    assert sorted(found) == sorted(expected)
    wrong = []
    for name, value in expected.items():
        other = found[name]
        if other.dtype != value.dtype or other.shape != value.shape:
            wrong.append(f"{name}: {other.dtype} {tuple(other.shape)}, expected {value.dtype} {tuple(value.shape)}")
        elif other.contiguous().view(-1).view(torch.uint8).ne(value.contiguous().view(-1).view(torch.uint8)).any():
            unequal = int(other.ne(value).sum())
            worst = float((other.double() - value.double()).abs().max())
            wrong.append(f"{name}: {unequal} of {value.numel()} elements differ, by at most {worst:.3g}")
    assert not wrong, "\n".join(wrong)


def errors_against(tensor: Any, reference: Any) -> tuple[float, float]:
    """The largest and the root mean square distance from an fp64 reference."""
    distance = (tensor.double() - reference).abs()
    return float(distance.max()), float(distance.square().mean().sqrt())
