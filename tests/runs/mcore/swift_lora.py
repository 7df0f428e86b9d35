"""ms-swift's own LoRA module on CPU, with megatron-core's classes in place of TransformerEngine's.

Needs `pip install --no-deps mcore-bridge ms-swift triton` beside megatron-core and PEFT.
"""

from __future__ import annotations

import ast
import sys
import types
from pathlib import Path
from typing import Any

from absent import Finder

_FILTER = "_filter_adapter_state_dict"
_WHERE = "swift/megatron/utils/megatron_lm_utils.py"


def lora_module() -> Any:
    """`mcore_bridge.tuners.lora.LoraParallelLinear`."""
    import megatron.core.models.mamba.mamba_layer_specs  # noqa: F401 - it asks for TransformerEngine
    import torch
    from megatron.core import parallel_state
    from megatron.core.extensions import transformer_engine as classes
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class Duplicated(torch.nn.Linear):
        """Whole on each rank."""

        def __init__(self, input_size: int, output_size: int, *, config: Any, bias: bool = False, **_: Any) -> None:
            super().__init__(input_size, output_size, bias=bias)
            self.config = config

        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), None

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            held = self.state_dict(prefix="", keep_vars=True)
            groups = {
                "tp_group": parallel_state.get_tensor_model_parallel_group(),
                "dp_cp_group": (metadata or {}).get("dp_cp_group"),
            }
            return make_sharded_tensors_for_checkpoint(held, prefix, {}, sharded_offsets, **groups)

    class Column(ColumnParallelLinear):
        """Split by rows."""

    class Row(RowParallelLinear):
        """Split by columns."""

    classes.TELinear, classes.TEColumnParallelLinear, classes.TERowParallelLinear = Duplicated, Column, Row
    for name in ("TEGroupedLinear", "TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear",
                 "TELayerNormColumnParallelLinear"):  # fmt: skip
        setattr(classes, name, type(name, (torch.nn.Module,), {}))
    sys.meta_path.append(Finder("transformer_engine"))  # type: ignore[arg-type]
    (root,) = (p / "mcore_bridge" for p in map(Path, sys.path) if (p / "mcore_bridge").is_dir())
    for name, folder in (("mcore_bridge", root), ("mcore_bridge.tuners", root / "tuners")):
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = [str(folder)]
    sys.modules["mcore_bridge.utils"] = utils = types.ModuleType("mcore_bridge.utils")
    utils.get_current_device = lambda: "cpu"  # type: ignore[attr-defined]
    from mcore_bridge.tuners.lora import LoraParallelLinear

    return LoraParallelLinear


def filtered(state: dict[str, Any]) -> dict[str, Any]:
    """What ms-swift's own function leaves of a state; its module wants far more than it."""
    (file,) = (p for p in (Path(s) / _WHERE for s in sys.path) if p.is_file())
    text = file.read_text()
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == _FILTER)
    names: dict[str, Any] = {}
    exec(compile(ast.Module([node], []), str(file), "exec"), names)
    names[_FILTER](state, True)
    return state
