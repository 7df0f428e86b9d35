"""Small sound adapters of every method, written by hand for one layer `[48, 48]`: the material for broken ones.

Names, shapes and fields are those that PEFT 0.21.2 saves; that each is sound is a test of its own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
NORM = "base_model.model.model.layers.0.input_layernorm"
WIDTH = 48

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Bare:
    """An adapter of one method.

    Attributes:
        config: fields beside `peft_type`.
        factors: shapes by name; whole-number ones are positions.
        shared: shapes of what the model has once.
        rank: the field that a tensor's shape must agree with, and another value for it.
        module: the layer's key.
    """

    peft_type: str
    config: dict[str, Any]
    factors: dict[str, Shape]
    shared: dict[str, Shape] = dataclasses.field(default_factory=dict)
    rank: tuple[str, Any] | None = ("r", 5)
    module: str = MODULE

    @property
    def keys(self) -> list[str]:
        return [f"{self.module}.{name}" for name in self.factors] + [f"base_model.{name}" for name in self.shared]

    def tensors(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(3)
        shapes = [*self.factors.values(), *self.shared.values()]
        made = {}
        for key, shape in zip(self.keys, shapes, strict=True):
            if "indices" in key:
                high = 12 if "topk" in key or "unilora" in key else WIDTH
                made[key] = torch.randint(0, high, shape, generator=generator, dtype=torch.int32)
            else:
                made[key] = torch.randn(shape, generator=generator) * 0.1
        if self.peft_type == "VBLORA" and any("topk" in key for key in made):
            made |= {key: torch.full_like(value, 0.3) for key, value in made.items() if "topk_weights" in key}
        return made

    def write(self, folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
        folder.mkdir(parents=True)
        fields = {"peft_type": self.peft_type, "target_modules": [self.module.split(".", 3)[3]]} | self.config | config
        (folder / "adapter_config.json").write_text(json.dumps(fields))
        held = self.tensors() if tensors is None else tensors
        save_file({k: v.contiguous() for k, v in held.items()}, folder / "adapter_model.safetensors")
        return folder


def _lora(**more: Shape) -> dict[str, Shape]:
    return {"lora_A.weight": (4, 48), "lora_B.weight": (48, 4)} | {k.replace("__", "."): v for k, v in more.items()}


BARE = {
    "adalora": Bare(
        "ADALORA", {"init_r": 4}, {"lora_A": (4, 48), "lora_B": (48, 4), "lora_E": (4, 1)}, rank=("init_r", 5)
    ),
    "ia3": Bare("IA3", {"feedforward_modules": []}, {"ia3_l": (48, 1)}, rank=("feedforward_modules", ["q_proj"])),
    "loha": Bare(
        "LOHA", {"r": 4, "alpha": 3},
        {"hada_w1_a": (48, 4), "hada_w1_b": (4, 48), "hada_w2_a": (48, 4), "hada_w2_b": (4, 48)},
    ),
    "lokr": Bare("LOKR", {"r": 2, "alpha": 3}, {"lokr_w1": (6, 6), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}),
    "oft": Bare("OFT", {"oft_block_size": 8}, {"oft_R.weight": (6, 28)}, rank=None),
    "boft": Bare("BOFT", {"boft_block_size": 4}, {"boft_R": (1, 12, 4, 4), "boft_s": (48, 1)}, rank=None),
    "hra": Bare("HRA", {"r": 4}, {"hra_u": (48, 4)}),
    "vera": Bare(
        "VERA", {"r": 4}, {"vera_lambda_b": (48,), "vera_lambda_d": (4,)}, {"vera_A": (4, 48), "vera_B": (48, 4)}
    ),
    "pvera": Bare(
        "PVERA", {"r": 4}, {"pvera_lambda_b": (48,), "pvera_lambda_d": (8,)}, {"pvera_A": (8, 48), "pvera_B": (48, 4)}
    ),
    "randlora": Bare(
        "RANDLORA", {"r": 6}, {"randlora_lambda": (6, 8), "randlora_gamma": (8, 48)},
        {"randlora_A": (6, 1, 48), "randlora_B": (48, 8, 6)},
    ),
    "vblora": Bare(
        "VBLORA", {"r": 3, "num_vectors": 12, "vector_length": 8},
        {"vblora_logits_A": (3, 6, 12), "vblora_logits_B": (6, 3, 12)}, {"vblora_vector_bank": (12, 8)},
    ),
    "vblora-topk": Bare(
        "VBLORA", {"r": 3, "num_vectors": 12, "vector_length": 8, "save_only_topk_weights": True},
        {
            "vblora_logits_A_topk_indices": (3, 6, 2), "vblora_logits_A_topk_weights": (3, 6, 1),
            "vblora_logits_B_topk_indices": (6, 3, 2), "vblora_logits_B_topk_weights": (6, 3, 1),
        },
        {"vblora_vector_bank": (12, 8)},
    ),
    "fourierft": Bare("FOURIERFT", {"n_frequency": 30}, {"fourierft_spectrum": (30,)}, rank=("n_frequency", 31)),
    "waveft": Bare("WAVEFT", {"n_frequency": 30}, {"waveft_spectrum": (30,)}, rank=("n_frequency", 31)),
    "ln-tuning": Bare("LN_TUNING", {}, {"ln_tuning_layers.weight": (48,)}, rank=None, module=NORM),
    "miss": Bare("MISS", {"r": 8}, {"miss_block": (8, 48)}),
    "miss-bat": Bare("MISS", {"r": 8, "init_weights": "bat"}, {"miss_block": (6, 8, 8)}, rank=("init_weights", True)),
    "bone": Bare("BONE", {"r": 8, "init_weights": True}, {"bone_block": (8, 48)}),
    "shira": Bare("SHIRA", {"r": 2}, {"shira_weight": (192,), "shira_indices": (2, 192)}),
    "c3a": Bare("C3A", {"block_size": 8}, {"c3a_kernel": (6, 6, 8)}, rank=("block_size", 6)),
    "road": Bare("ROAD", {"group_size": 8}, {"road_theta": (24,), "road_alpha": (24,)}, rank=("variant", "road_2")),
    "delora": Bare(
        "DELORA", {"r": 4},
        {"delora_A": (4, 48), "delora_B": (48, 4), "delora_lambda": (1,), "delora_w_norm": (48,)},
    ),
    "gralora": Bare("GRALORA", {"r": 4}, {"gralora_A": (2, 24, 4), "gralora_B": (2, 4, 24)}),
    "hira": Bare("HIRA", {"r": 4}, {"hira_A": (4, 48), "hira_B": (48, 4)}),
    "glora": Bare(
        "GLORA", {"r": 4},
        {
            "glora_A.Xd": (48, 4), "glora_A.Xu": (4, 48), "glora_B.X": (48, 1), "glora_C.zeros": (48, 1),
            "glora_D.zeros": (48,), "glora_E.zeros": (48,),
        },
    ),
    "deft": Bare("DEFT", {"r": 4}, {"deft_P": (48, 4), "deft_R": (4, 48)}),
    "psoft": Bare(
        "PSOFT", {"r": 4}, {"psoft_R.weight": (6,), "psoft_R.vector_a": (4,), "psoft_R.vector_b": (4,)}
    ),
    "osf": Bare(
        "OSF", {},
        {"osf_svd_params.U_low": (48, 30), "osf_svd_params.S_low": (30,), "osf_svd_params.V_low": (30, 48)}, rank=None,
    ),
    "tinylora": Bare(
        "TINYLORA", {"u": 8, "weight_tying": 1.0},
        {"tinylora_A": (2, 48), "tinylora_B": (48, 2), "tinylora_P": (8, 2, 2)}, {"tinylora_v.0": (8,)},
        rank=("weight_tying", 0.5),
    ),
    "unilora": Bare(
        "UNILORA", {"r": 4, "theta_d_length": 12, "save_indices": True},
        {
            "unilora_indices_A": (4, 48), "unilora_indices_B": (48, 4),
            "unilora_scales_A": (4, 48), "unilora_scales_B": (48, 4),
        },
        {"unilora_theta_d": (12,)},
    ),
    "peanut": Bare(
        "PEANUT", {"r": 4, "depth": 1},
        {
            "peanut_A.weight": (4, 48), "peanut_B.weight": (48, 4), "peanut_encoders.0.weight": (4, 4),
            "peanut_decoders.0.weight": (4, 4),
        },
    ),
    "supertuning": Bare(
        "SUPERTUNING", {"sparsity": 0.9}, {"supertuning_values": (230,), "supertuning_indices": (230,)},
        rank=("sparsity", 0.5),
    ),
    "kasa": Bare("LORA", {"r": 4, "lora_alpha": 3, "kasa_config": {"beta": 0.1}}, _lora(lora_diag=(4,))),
    "bdlora": Bare(
        "LORA", {"r": 4, "lora_alpha": 3, "use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        {"lora_A.weight": (4, 24), "lora_B.weight": (48, 4)},
    ),
    "velora": Bare(
        "LORA", {"r": 4, "lora_alpha": 3, "velora_config": {"num_groups": 4}}, _lora(lora_velora_embed=(12,))
    ),
    "monteclora": Bare(
        "LORA", {"r": 4, "lora_alpha": 3, "monteclora_config": {"num_samples": 2}},
        _lora(lora_monteclora_sampler__std_prior=(4,)),
    ),
}  # fmt: skip
"""By the method's name, as its entry point has it."""
