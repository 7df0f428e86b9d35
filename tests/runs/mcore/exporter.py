"""What mbridge, verl's exporter, makes of saved runs, against the models that were put into Megatron: a second witness.

    python tests/runs/mcore/exporter.py OUT                 a folder that `run_mcore_matrix.py` has filled
    python tests/runs/mcore/exporter.py OUT --only qwen3 mixtral

Needs `pip install --no-deps mbridge==0.15.1 megatron-core` beside torch and transformers. Tensors are read by torch's
own loader of distributed checkpoints, renamed by mbridge's tables and cut by its formulas; no rank, no GPU and nothing
of rlhf-convert takes part. Where a run says equal, a program that shares no line with it agrees with the live model.
"""

from __future__ import annotations

import argparse
import json
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_STACKED = re.compile(r"decoder\.layers\.(?!\d)(.+)", re.ASCII)
_EXPERTS = re.compile(r"(.+\.mlp\.experts\.)experts\.(linear_fc[12]\.weight)", re.ASCII)
_LATENT = {".q_layernorm.": ".linear_q_up_proj.layer_norm_", ".kv_layernorm.": ".linear_kv_up_proj.layer_norm_"}


def saved(folder: Path) -> dict[str, Any]:
    """Tensors of the model by Megatron's keys, by torch's own loader."""
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(folder)
    held = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in held.items()
        if hasattr(entry, "size") and not key.startswith("optimizer.") and "tokens_per_expert" not in key
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def by_module(held: dict[str, Any], config: Any) -> Iterator[tuple[str, Any]]:
    """The same by the names of TransformerEngine's modules, layers and experts apart: what mbridge is given."""
    is_latent = hasattr(config, "kv_lora_rank")
    for key, tensor in held.items():
        apart = [(key, tensor)]
        if found := _STACKED.fullmatch(key):
            apart = [(f"decoder.layers.{n}.{found[1]}", layer) for n, layer in enumerate(tensor)]
        for name, one in apart:
            layer = name.rpartition(".mlp.")[0]
            if name.endswith("mlp.linear_fc1.layer_norm_weight") and _has_experts(layer, held):
                name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            if is_latent:
                name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
                for ours, theirs in _LATENT.items():
                    name = name.replace(ours, theirs)
            if found := _EXPERTS.fullmatch(name):
                yield from ((f"{found[1]}{found[2]}{n}", expert) for n, expert in enumerate(one))
            else:
                yield name, one


def _has_experts(layer: str, held: dict[str, Any]) -> bool:
    return any(k in held for k in (f"{layer}.mlp.router.weight", "decoder.layers.mlp.router.weight"))


def exported(held: dict[str, Any], config: Any) -> dict[str, Any]:
    """What mbridge's bridge for the model type makes of it."""
    import mbridge  # noqa: F401
    from mbridge.core.bridge import _MODEL_REGISTRY

    kind = _MODEL_REGISTRY[config.model_type]
    bridge = kind.__new__(kind)  # its constructor asks for ranks, and for TransformerEngine
    further = getattr(config, "num_nextn_predict_layers", 0)
    layers = types.SimpleNamespace(num_layers=config.num_hidden_layers, mtp_num_layers=further)
    if getattr(config, "head_dim", 0) is None:  # as transformers 5 has it for Mixtral
        config.head_dim = config.hidden_size // config.num_attention_heads
    bridge.hf_config, bridge.config, bridge.make_vocab_size_divisible_by = config, layers, 1
    bridge.vocab_size = config.vocab_size
    # Of a tied model it changes the table of its class, and the next model of the process would lose its output.
    bridge._DIRECT_MAPPING = dict(kind._DIRECT_MAPPING)
    bridge._adjust_mapping_for_shared_weights()
    made: dict[str, Any] = {}
    for name, tensor in by_module(held, config):
        bridge.padded_vocab_size = tensor.shape[0] if tensor.ndim else 0
        names, parts = bridge._weight_to_hf_format(name, tensor)
        made |= dict(zip(names, parts, strict=True))
    return made


def differences(run: Path) -> list[str]:
    """Names in which the export is not the model; why there is none."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(run / "hf")
    wanted = load_file(run / "hf" / "model.safetensors")
    (folder,) = run.glob("iter_*")
    try:
        made = exported(saved(folder), config)
    except (NotImplementedError, AssertionError, KeyError, IndexError) as error:
        return [f"mbridge has none: {type(error).__name__} {error}"]
    odd = sorted(made.keys() ^ wanted.keys())
    return odd + [n for n in made.keys() & wanted.keys() if not torch.equal(made[n], wanted[n])]


def main() -> None:
    """Every run of a folder that is of the newer format, and of a language model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=[""])
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    for file in sorted(asked.out.glob("*/fixture.json")):
        facts = json.loads(file.read_text())
        if facts["format"] != "torch_dist" or facts["critic"] or not any(o in file.parent.name for o in asked.only):
            continue
        found = differences(file.parent)
        print(f"{file.parent.name:32} {'; '.join(found[:3]) if found else 'equal'}", flush=True)


if __name__ == "__main__":
    main()
