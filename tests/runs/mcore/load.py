"""Loads a checkpoint that `convert --to megatron` wrote into megatron-core's GPTModel, and compares every parameter.

Needs what `save.py` needs. Starts one process a rank; ends with an error where anything differs, or is not loaded:

    python tests/runs/mcore/load.py WRITTEN --model MODEL --tp 2 --pp 2
    python tests/runs/mcore/load.py FOLDER --many LOADS.json    many in one start: {NAME: ARGUMENTS}

MODEL is the folder of transformers that was converted: the oracle, put into Megatron's modules by `models.py`. Keys
that local specs call otherwise than TransformerEngine's, which are written, are renamed in what Megatron asks for. The
old format is loaded by the file of each rank, with every name as it stands: it is written with `--modules local`.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from models import VOCABULARY, in_megatron
from save import _LOCAL_EXPERT, _LOCAL_LAYER, add_head, model_chunks, replicas, sliced

from ranks import expert_tp, join, launch, place, ranks_for, sizes_of


def work(asked: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from safetensors.torch import load_file
    from transformers import AutoConfig

    place(asked)
    config = AutoConfig.from_pretrained(asked.model)
    held = load_file(asked.model / "model.safetensors")
    asked.critic = held["score.weight"].shape[0] if "score.weight" in held else 0
    asked.head_bias = False
    whole = in_megatron(held, config) | ({"output_layer.weight": held["score.weight"]} if asked.critic else {})
    is_old = not (asked.written / "release" / ".metadata").is_file()
    if is_old:
        own = _rank_file(asked)
        asked.padded = own["args"].padded_vocab_size
    (model,) = model_chunks(config, asked)
    model.to(held["model.norm.weight"].dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.data = buffer.data.float()
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    held_by_rank = own["model"] if is_old else _loaded(model, asked, config)
    missing = model.load_state_dict(held_by_rank, strict=False)
    assert all(k.endswith("_extra_state") for k in (*missing.missing_keys, *missing.unexpected_keys)), missing
    count = 0
    rank, expert_rank = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_expert_model_parallel_rank()
    expert_tp_rank = parallel_state.get_expert_tensor_parallel_rank()
    for name, parameter in (*model.named_parameters(), *(b for b in model.named_buffers() if "expert_bias" in b[0])):
        key = _global_name(name, model, whole, asked.ep, expert_rank)
        have, wanted = parameter.detach(), whole[key]
        is_expert = ".local_experts." in key
        at, many = (expert_tp_rank, expert_tp(asked)) if is_expert else (rank, asked.tp)
        if "word_embeddings" in key or (key == "output_layer.weight" and not asked.critic):
            begin = rank * have.shape[0]
            rows = max(0, min(have.shape[0], VOCABULARY - begin))
            have, wanted = have[:rows], wanted[begin : begin + rows]
        else:
            wanted = sliced(key, wanted, tuple(have.shape), at, many)
        assert torch.equal(have, wanted.to(have.dtype)), (name, have.shape)
        assert have.dtype == whole[key].dtype, name
        count += 1
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"{asked.written}: {count} tensors of rank 0 are those of the model", flush=True)


def _rank_file(asked: argparse.Namespace) -> dict[str, Any]:
    """This rank's file of the old format, by the name that Megatron looks for."""
    import torch
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if asked.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if asked.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    file = asked.written / "release" / name / "model_optim_rng.pt"
    found: dict[str, Any] = torch.load(file, weights_only=False, map_location="cpu")  # noqa: TID251
    return found


def _loaded(model: Any, asked: argparse.Namespace, config: Any) -> dict[str, Any]:
    """What Megatron's own loader makes of a torch_dist checkpoint for this rank's model."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace

    state = model.sharded_state_dict(metadata=replicas())
    if asked.critic and hasattr(model, "output_layer") and "output_layer.weight" not in state:
        add_head(state, model)
    state = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    latent = hasattr(config, "kv_lora_rank")
    layers = _layers_with_experts(asked.model / "config.json")

    def renamed(tensor: Any) -> Any:
        if hasattr(tensor, "key"):
            tensor.key = _key(tensor.key, latent, layers)
        return tensor

    asked_for = {"model": dict_list_map_inplace(renamed, state)}
    found: dict[str, Any] = dist_checkpointing.load(asked_for, str(asked.written / "release"))["model"]
    return found


def _layers_with_experts(config: Path) -> frozenset[int] | None:
    """Numbers of layers with experts; None: all that there are."""
    held = json.loads(config.read_text())
    if not any(held.get(k) for k in ("n_routed_experts", "num_local_experts", "num_experts")):
        return frozenset()
    first = held.get("first_k_dense_replace", 0)
    return frozenset(range(first, held["num_hidden_layers"])) if first else None


def _key(key: str, latent: bool, layers: frozenset[int] | None) -> str:
    """The key that modules of TransformerEngine have for the same tensor."""
    match = _LOCAL_LAYER.match(key)
    has_experts = layers is None or (match is not None and int(match[1]) in layers)
    if has_experts:
        key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    else:
        key = key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
    if latent:
        key = key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
        for which in ("q", "kv"):
            key = key.replace(f".{which}_layernorm.weight", f".linear_{which}_up_proj.layer_norm_weight")
    else:
        key = key.replace(".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight")
    return key


def _global_name(name: str, model: Any, whole: dict[str, Any], ep: int, expert_rank: int) -> str:
    key = name
    if found := _LOCAL_LAYER.match(key):
        number = model.decoder.layers[int(found[1])].layer_number - 1
        key = f"decoder.layers.{number}." + key[found.end() :]
    key = key.replace(".mtp_model_layer.", ".transformer_layer.")
    if found := _LOCAL_EXPERT.search(key):
        pattern = key.replace(found[0], ".local_experts.#.")
        here = sum(pattern == _LOCAL_EXPERT.sub(".local_experts.#.", n) for n in whole)
        key = key.replace(found[0], f".local_experts.{int(found[1]) + expert_rank * here // ep}.")
    if key not in whole and key == "output_layer.weight":
        key = "embedding.word_embeddings.weight"
    return key


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("written", type=Path)
    parser.add_argument("--model", type=Path)
    for name in ("tp", "pp", "ep"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--many", type=Path, metavar="JSON")
    parser.add_argument("--worker", action="store_true")
    parser.set_defaults(vpp=None, etp=None, first_stage=None)
    return parser


def _runs(asked: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Loads that are not done yet, by their names."""
    if asked.many is None:
        return {"": asked}
    every = {name: _parser().parse_args(given) for name, given in json.loads(asked.many.read_text()).items()}
    left = {name: run for name, run in every.items() if not _done(asked, name).is_file()}
    return dict(sorted(left.items(), key=lambda pair: sizes_of(pair[1])))


def _done(asked: argparse.Namespace, name: str) -> Path:
    found: Path = asked.written / f"{name}.loaded"
    return found


def main() -> None:
    """Read the command line."""
    import torch.distributed as dist

    asked = _parser().parse_args()
    if asked.worker:
        warnings.simplefilter("ignore")
        join()
        for name, run in _runs(asked).items():
            run.per_layer = not list_is_stacked(run.written)
            work(run)
            if asked.many is not None and dist.get_rank() == 0:
                _done(asked, name).touch()
            dist.barrier()
        return
    is_failed = False
    while left := _runs(asked):
        if launch(max(ranks_for(r) for r in left.values()), sys.argv):
            break
        is_failed = True
        (first, *_) = _runs(asked)
        print(f"NOT LOADED: {first}", flush=True)
        if asked.many is None:
            break
        kept = {n: v for n, v in json.loads(asked.many.read_text()).items() if n != first}
        asked.many.write_text(json.dumps(kept))
    raise SystemExit(is_failed)


def list_is_stacked(written: Path) -> bool:
    """True where layers are one tensor of each kind, as Megatron asks for them then."""
    metadata = written / "release" / ".metadata"
    return metadata.is_file() and b"decoder.layers.0." not in metadata.read_bytes()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
