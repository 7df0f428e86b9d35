"""Which adapters of which methods are merged: method x option x architecture x dtype, as PEFT itself makes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

LINEAR = ("llama", "qwen2", "opt", "bert")
MATRICES = (*LINEAR, "gpt2")
ANY = (*MATRICES, "resnet")
"""Architectures: of linear layers, of Conv1D too, and of convolutions too."""

_LLAMA = ("llama", "qwen2")
_SOME = {"target_modules": ["q_proj", "down_proj"]}


@dataclasses.dataclass(frozen=True)
class MethodCase:
    """An adapter to make, and how its merge is judged.

    Attributes:
        kind: PEFT's config class.
        exact: PEFT computes the merge in fp64 where its tensors are fp64, so that it is a reference for `best`.
    """

    kind: str
    family: str
    dtype: str
    settings: dict[str, Any]
    exact: bool = True


def _table() -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Config class, architectures, settings."""
    return [
        ("AdaLoraConfig", ANY, {"init_r": 4, "total_step": 10, "lora_alpha": 5}),
        ("IA3Config", _LLAMA, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("IA3Config", ("gpt2",), {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
        ("IA3Config", ("bert", "opt", "resnet"), {"feedforward_modules": []}),
        ("LoHaConfig", (*LINEAR, "resnet"), {"r": 3, "alpha": 5}),
        # PEFT has this scale in fp32 whatever its weights are: only one that fp32 holds makes it a reference in fp64.
        ("LoHaConfig", ("resnet",), {"r": 4, "alpha": 5, "use_effective_conv2d": True}),
        ("LoHaConfig", ("llama",), {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"down_proj": 3}}),
        ("LoKrConfig", (*LINEAR, "resnet"), {"r": 3, "alpha": 5}),
        ("LoKrConfig", ("llama", "resnet"), {"r": 2, "alpha": 5, "decompose_both": True}),
        ("LoKrConfig", ("resnet",), {"r": 2, "alpha": 5, "use_effective_conv2d": True}),
        ("LoKrConfig", ("opt",), {"r": 3, "alpha": 5, "decompose_factor": 8}),
        ("OFTConfig", LINEAR, {"oft_block_size": 8}),
        ("OFTConfig", ("bert", "opt"), {"oft_block_size": 16, "use_cayley_neumann": False}),
        ("OFTConfig", ("llama",), {"oft_block_size": 8, "num_cayley_neumann_terms": 3, "block_share": True}),
        ("OFTConfig", ("qwen2",), {"r": 4, "oft_block_size": 0, "coft": True, "eps": 0.05}),
        ("OFTConfig", ("llama",), {"oft_block_size": 6, "target_modules": ["embed_tokens"]}),
        ("LNTuningConfig", _LLAMA, {"target_modules": ["input_layernorm", "norm"]}),
        ("LNTuningConfig", ("bert",), {"target_modules": ["LayerNorm"]}),
        ("LNTuningConfig", ("gpt2",), {"target_modules": ["ln_1", "ln_f"]}),
        ("VeraConfig", MATRICES, {"r": 6}),
        ("VeraConfig", ("llama", "gpt2"), {"r": 6, "save_projection": False, "projection_prng_key": 7}),
        ("BOFTConfig", LINEAR, {"boft_block_size": 4}),
        ("BOFTConfig", ("llama",), {"boft_block_size": 0, "boft_block_num": 4}),
        ("MissConfig", LINEAR, {"r": 8}),
        ("MissConfig", ("llama", "opt"), {"r": 7}),
        ("MissConfig", _LLAMA, {"r": 8, "init_weights": "bat"} | _SOME),
        ("MissConfig", ("opt",), {"r": 8, "init_weights": "mini", "mini_r": 4}),
        ("HRAConfig", (*LINEAR, "resnet"), {"r": 4}),
        # No more vectors than inputs: a fourth one of three numbers is rounding alone once it is made orthogonal.
        ("HRAConfig", ("llama", "resnet"), {"r": 3, "apply_GS": True}),
        ("ShiraConfig", LINEAR, {"r": 3}),
        ("FourierFTConfig", MATRICES, {"n_frequency": 50}),
        ("FourierFTConfig", ("llama",), {"n_frequency": 50, "scaling": 3.0, "n_frequency_pattern": {"q_proj": 20}}),
        ("RandLoraConfig", MATRICES, {"r": 7}),
        ("RandLoraConfig", ("gpt2", "llama"), {"r": 7, "save_projection": False}),
        ("RandLoraConfig", ("opt",), {"r": 7, "save_projection": False, "sparse": True}),
        ("RandLoraConfig", ("qwen2",), {"r": 7, "save_projection": False, "very_sparse": True}),
        ("VBLoRAConfig", MATRICES, {"r": 3, "num_vectors": 20, "vector_length": 8}),
        ("VBLoRAConfig", ("gpt2", "llama"), {"num_vectors": 20, "vector_length": 8, "save_only_topk_weights": True}),
        ("RoadConfig", LINEAR, {"group_size": 8}),
        ("RoadConfig", ("bert", "opt"), {"group_size": 4, "variant": "road_2"}),
        ("RoadConfig", ("qwen2", "opt"), {"group_size": 4, "variant": "road_4"}),
        ("C3AConfig", LINEAR, {"block_size": 8}),
        ("C3AConfig", ("llama",), {"block_size": 8, "block_size_pattern": {"q_proj": 4}}),
        ("DeloraConfig", LINEAR, {"r": 3}),
        ("DeloraConfig", ("llama",), {"r": 3, "rank_pattern": {"q_proj": 5}}),
        ("HiraConfig", ANY, {"r": 3}),
        ("HiraConfig", ("llama",), {"r": 3, "target_modules": ["embed_tokens"]}),
        ("GraloraConfig", MATRICES, {"r": 4, "alpha": 7}),
        ("GraloraConfig", ("llama",), {"r": 8, "hybrid_r": 3, "gralora_k": 4}),
        ("WaveFTConfig", MATRICES, {"n_frequency": 50}),
        ("WaveFTConfig", ("llama", "gpt2"), {"n_frequency": 50, "wavelet_family": "db3"}),
        ("WaveFTConfig", ("opt",), {"n_frequency": 50, "use_idwt": False}),
        ("PveraConfig", MATRICES, {"r": 5}),
        ("PveraConfig", ("gpt2", "llama"), {"r": 5, "save_projection": False}),
        *_rarer(),
        *_of_lora(),
    ]


def _rarer() -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Methods that read the base, and others that few people have."""
    tokens = {"token_indices": list(range(3, 60))}
    mixed = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
    return [
        ("GloraConfig", LINEAR, {"r": 3}),
        ("GloraConfig", ("qwen2", "bert"), {"r": 3} | mixed),
        ("GloraConfig", ("bert",), {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"}),
        ("DeftConfig", MATRICES, {"r": 3}),
        ("DeftConfig", ("gpt2", "opt"), {"r": 3, "decomposition_method": "qr", "alpha": 5}),
        ("DeftConfig", ("opt",), {"r": 3, "para": True}),
        ("PsoftConfig", LINEAR, {"r": 5, "psoft_alpha": 7}),
        ("PsoftConfig", ("bert",), {"r": 5, "ab_svd_init": "pissa_init", "use_cayley_neumann": True}),
        ("PsoftConfig", ("llama",), {"r": 5, "use_cayley_neumann": True, "cayley_neumann_eps": 0.5}),
        ("PsoftConfig", ("opt",), {"r": 5, "psoft_orth": False, "psoft_mag_a": False}),
        ("OSFConfig", LINEAR, {}),
        ("OSFConfig", ("llama",), {"effective_rank": 10}),
        ("TinyLoraConfig", MATRICES, {"u": 8, "weight_tying": 1.0}),
        ("TinyLoraConfig", ("llama",), {"u": 8, "weight_tying": 1.0, "target_modules": ["embed_tokens"]}),
        ("UniLoraConfig", MATRICES, {"r": 3, "theta_d_length": 64, "save_indices": True}),
        ("PeanutConfig", LINEAR, {"r": 4, "depth": 2}),
        ("PeanutConfig", ("bert",), {"r": 4, "act_fn": "gelu", "scaling": 0.7}),
        ("SupertuningConfig", LINEAR, {"sparsity": 0.9}),
        ("SupertuningConfig", ("opt",), {"sparsity": 0.9, "r": 3, "lora_alpha": 5, "select_top": False}),
        ("SupertuningConfig", ("qwen2",), {"sparsity": 0.9, "save_precomputed_indices": False}),
        ("BeftConfig", ("opt", "bert"), {}),
        ("TrainableTokensConfig", _LLAMA, {"target_modules": ["embed_tokens"]} | tokens),
        ("TrainableTokensConfig", ("bert",), {"target_modules": ["word_embeddings"]} | tokens),
        ("TrainableTokensConfig", ("gpt2",), {"target_modules": ["wte"]} | tokens),
    ]


def _of_lora() -> list[tuple[str, tuple[str, ...], dict[str, Any]]]:
    """Variants of LoRA; their own configs are given by the class's name and its fields."""
    inner, outer = ["o_proj", "out_proj", "down_proj", "fc2"], ["q_proj", "k_proj", "v_proj", "gate", "up_proj", "fc1"]
    blocks = {"target_modules_bd_a": inner, "target_modules_bd_b": outer, "nblocks": 2}
    plain = {"r": 4, "lora_alpha": 5}
    return [
        ("LoraConfig", LINEAR, plain | {"kasa_config": ("KasaConfig", {})}),
        ("LoraConfig", (*_LLAMA, "opt"), plain | {"use_bdlora": blocks}),
        ("LoraConfig", MATRICES, plain | {"init_lora_weights": "mica"}),
        ("LoraConfig", ("llama", "opt"), plain | {"velora_config": ("VeloraConfig", {"num_groups": 4})}),
        ("LoraConfig", ("qwen2", "bert"), plain | {"monteclora_config": ("MontecloraConfig", {"num_samples": 2})}),
    ]


SINGLE = {"FourierFTConfig", "C3AConfig", "DeftConfig", "PsoftConfig", "OSFConfig", "TinyLoraConfig", "UniLoraConfig"}
"""What PEFT computes in fp32 whatever it is given."""

MOVED = {"OSFConfig", "PsoftConfig", "TinyLoraConfig", "UniLoraConfig", "SupertuningConfig"}
"""What PEFT makes of the base's own dtype when it loads the adapter: with an fp64 base it is something else."""

DRAWN = {"VeraConfig", "PveraConfig", "RandLoraConfig"}
"""What draws projections, and rounds them to the base's dtype: with an fp64 base they are others."""


def method_cases() -> dict[str, MethodCase]:
    """Every case by name."""
    return dict(_cases())


def _cases() -> Iterator[tuple[str, MethodCase]]:
    counted: dict[str, int] = {}
    for kind, families, settings in _table():
        number = counted[kind] = counted.get(kind, 0) + 1
        for family in families:
            for dtype in ("float32", "bfloat16"):
                is_moved = "kasa_config" in settings or kind in MOVED
                is_drawn = kind in DRAWN and not settings.get("save_projection", True)
                exact = not (is_drawn or is_moved or (kind in SINGLE and dtype == "float32"))
                name = f"{kind.removesuffix('Config').lower()}-{number}-{family}-{dtype}"
                yield name, MethodCase(kind, family, dtype, settings, exact)
