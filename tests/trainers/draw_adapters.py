"""Draws adapters, made and saved by whatever PEFT runs this, with what its live model said beside them.

    python draw_adapters.py FOLDER SEED FIRST COUNT [FAMILY ...]

A case is made from the seed and its number alone. Each gets a folder with `base`, `adapter`, `live.safetensors` (the
inputs, and the logits of the base, of the live model, of its own merge and of the adapter loaded again) and
`case.json`. Runs under PEFT 0.10 and transformers 4.47 as under those of today; it needs nothing of this project.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

from drawn_families import FAMILIES, VOCABULARY, Family

LORA_STARTS = (*[True] * 6, False, "gaussian", "pissa", "olora", "pissa_niter_4", "loftq", "eva", "orthogonal")
SINCE = {"pissa": (0, 11), "pissa_niter_4": (0, 11), "olora": (0, 12), "eva": (0, 14),
         "orthogonal": (0, 16)}  # fmt: skip
"""Starts that came with a release."""
KINDS = (
    *["LoraConfig"] * 14, "AdaLoraConfig", "LoHaConfig", "LoKrConfig", "LoKrConfig", "IA3Config", "IA3Config",
    "OFTConfig", "OFTConfig", "BOFTConfig", "VeraConfig", "VeraConfig", "FourierFTConfig", "HRAConfig",
    "LNTuningConfig", "VBLoRAConfig", "BoneConfig", "MissConfig", "RandLoraConfig", "RandLoraConfig", "ShiraConfig",
    "C3AConfig", "RoadConfig", "TrainableTokensConfig", "DeloraConfig", "WaveFTConfig", "GraloraConfig", "OSFConfig",
    "PveraConfig", "GloraConfig", "HiraConfig", "UniLoraConfig", "DeftConfig", "PsoftConfig", "TinyLoraConfig",
    "BeftConfig", "PeanutConfig", "SupertuningConfig", "PromptTuningConfig", "PrefixTuningConfig",
    "PromptEncoderConfig",
)  # fmt: skip


def make(folder: Path, seed: int, number: int, families: list[str]) -> dict[str, Any]:
    """One case: draws it, makes it, and says what came of it."""
    draw = random.Random(f"{seed}:{number}")
    name = draw.choice([f for f in families if hasattr(transformers, FAMILIES[f].config[0])])
    family = FAMILIES[name]
    lacks = {"TrainableTokensConfig"} if not family.embedding else set()
    kind = draw.choice([k for k in KINDS if hasattr(peft, k) and k not in lacks])
    torch.manual_seed(number)
    generator = torch.Generator().manual_seed(number + 7)
    case: dict[str, Any] = {"family": name, "kind": kind, "peft": peft.__version__,
                            "transformers": transformers.__version__}  # fmt: skip
    is_reward = family.reward and draw.random() < 0.2
    case["task"] = "SEQ_CLS" if is_reward else family.task
    base = save_base(folder / "base", family, draw, generator, case)
    auto = "AutoModelForSequenceClassification" if is_reward else family.auto
    labels = {"num_labels": 1, "pad_token_id": 0} if is_reward else {}

    def load() -> Any:
        torch.manual_seed(number)
        return getattr(transformers, auto).from_pretrained(base, **labels).float().eval()

    model = load()
    inputs = inputs_of(name)
    kept = {f"input.{k}": v for k, v in inputs.items()}
    if not is_reward:
        kept["base"] = say(model, inputs)
    config = config_of(kind, family, case["task"], draw, model)
    case["settings"] = {k: v for k, v in config.to_dict().items() if v and k not in ("peft_type", "peft_version")}
    adapter = draw.choice(["default", "default", "default", "reward"])
    case["adapter_name"] = adapter
    wrapped = _wrap(model, config, adapter, inputs, draw)
    fill(wrapped, kind, generator)
    wrapped.eval()
    kept["live"] = say(wrapped, inputs)
    is_safe = draw.random() < 0.8
    out = folder / "adapter"
    out.mkdir()
    wrapped.save_pretrained(out, safe_serialization=is_safe)
    if adapter != "default":
        for each in (out / adapter).iterdir():
            each.rename(out / each.name)
        (out / adapter).rmdir()
    case["file"] = next(p.name for p in out.iterdir() if p.name.startswith("adapter_model"))
    try:
        loaded = peft.PeftModel.from_pretrained(load(), out).eval()
        kept["loaded"] = say(loaded, inputs)
        merged = loaded.merge_and_unload()
        kept["merged"] = say(merged, inputs)
    except Exception as error:
        case["not_merged"] = f"{type(error).__name__}: {error}"[:300]
    save_file({k: v.contiguous().clone() for k, v in kept.items()}, folder / "live.safetensors")
    return case


def save_base(
    folder: Path, family: Family, draw: random.Random, generator: Any, case: dict[str, Any], dtype: Any = torch.float32
) -> Path:
    """A base model of random numbers, in one of the ways that they are saved."""
    name, settings = family.config
    config = getattr(transformers, name)(**settings)
    auto = getattr(transformers, family.auto)
    model = auto.from_config(config) if family.auto.startswith("Auto") else auto(config)
    with torch.no_grad():
        for key, value in model.named_parameters():
            drawn = torch.randn(value.shape, generator=generator)
            if value.dim() > 1:
                value.copy_(drawn / value.shape[-1] ** 0.5)
            else:
                value.copy_(drawn * 0.1 + (1 if key.endswith("weight") and family.config[0] != "GemmaConfig" else 0))
    case["base"] = draw.choice(["one file", "one file", "sharded", ".bin"])
    options: dict[str, Any] = {}
    if case["base"] == "sharded":
        options["max_shard_size"] = "40KB"
    if case["base"] == ".bin" and transformers.__version__.startswith("4"):
        options["safe_serialization"] = False
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def inputs_of(name: str) -> dict[str, Any]:
    """What a family's model is asked."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "resnet":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}
    if name == "llava":
        ids[ids == 60] = 61
        ids[:, 1:5] = 60
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": ids}
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)} if name.startswith("t5") else {"input_ids": ids}


def say(model: Any, inputs: dict[str, Any]) -> Any:
    """Its logits."""
    with torch.no_grad():
        return model(**inputs).logits.float()


def config_of(kind: str, family: Family, task: str, draw: random.Random, model: Any) -> Any:
    """An adapter's configuration."""
    made = getattr(peft, kind)
    settings = SETTINGS[kind](family, draw, model) if kind in SETTINGS else {}
    if kind not in ("LNTuningConfig", "TrainableTokensConfig", *PROMPTS):
        where = {} if "target_modules" in settings else _where(family, draw)
        settings |= where
        if task != "SEQ_CLS" and draw.random() < 0.15:
            settings["modules_to_save"] = draw.sample(family.whole, draw.randint(1, len(family.whole)))
    known = {f.name for f in dataclasses.fields(made)}
    return made(task_type=task or None, **{k: v for k, v in settings.items() if k in known})


def _where(family: Family, draw: random.Random) -> dict[str, Any]:
    """Which modules are trained, in one of the ways to say so."""
    chosen = draw.sample(family.targets, draw.randint(1, len(family.targets)))
    way = draw.random()
    if way < 0.1 and family.layers:
        return {"target_modules": rf".*\.{family.layers}\.1\..*\.({'|'.join(chosen)})"}
    if way < 0.2:
        return {"target_modules": chosen, "layers_to_transform": [1]}
    if way < 0.25:
        return {"target_modules": chosen, "layers_to_transform": [0], "layers_pattern": family.layers}
    return {"target_modules": chosen}


def _lora(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"r": draw.choice([2, 4, 8]), "lora_alpha": draw.choice([4, 7, 16, 32])}
    here = tuple(map(int, peft.__version__.split(".")[:2]))
    start = draw.choice([s for s in LORA_STARTS if SINCE.get(str(s), (0,)) <= here])
    if start is not True:
        made["init_lora_weights"] = start
    if start == "loftq":
        made["loftq_config"] = peft.LoftQConfig(loftq_bits=2)
    made |= _patterns(family, draw, "rank_pattern", "alpha_pattern")
    for key, odds in (("use_rslora", 0.25), ("use_dora", 0.2), ("fan_in_fan_out", 0.1)):
        if draw.random() < odds:
            made[key] = True
    made["bias"] = draw.choice(["none", "none", "none", "all", "lora_only"])
    if draw.random() < 0.08:
        made["lora_bias"] = True
    more = draw.random()
    if more < 0.1:
        made["target_modules"] = "all-linear"
    elif more < 0.2 and family.embedding:
        made["target_modules"] = [family.targets[0], family.embedding]
    elif more < 0.27:
        made["target_modules"] = [family.targets[0], family.head]
    elif more < 0.3:
        made["target_modules"] = [n for n in (family.targets[0], family.head, family.embedding) if n]
    elif more < 0.36:
        made |= {"target_modules": list(family.targets), "exclude_modules": [family.targets[0]]}
    elif more < 0.42 and family.embedding:
        made["trainable_token_indices"] = draw.choice([[3, 9], {family.embedding: [5, 7]}])
    elif more < 0.46 and family.layers == "layers" and family.task == "CAUSAL_LM":
        made["layer_replication"] = [(0, 2), (1, 2)]
    parameters = [n for n in family.parameters if any(k.endswith(n) for k, _ in model.named_parameters())]
    if parameters and draw.random() < 0.6:
        chosen = draw.sample(parameters, draw.randint(1, len(parameters)))
        made |= {"target_parameters": chosen, "bias": "none", "use_dora": False, "lora_bias": False}
        made["init_lora_weights"] = draw.choice([True, False])
    return made


def _patterns(family: Family, draw: random.Random, ranks: str, alphas: str) -> dict[str, Any]:
    first = draw.choice(family.targets)
    keys = [first, rf".*\.1\..*{first}", rf"{family.layers}.0.*{first}", first[-4:]]
    made: dict[str, Any] = {}
    if draw.random() < 0.25:
        made[ranks] = {draw.choice(keys): draw.choice([1, 3, 6])}
    if draw.random() < 0.25:
        made[alphas] = {draw.choice(keys): draw.choice([2, 5, 24])}
    return made


def _ia3(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    chosen = list(dict.fromkeys([*draw.sample(family.targets, min(2, len(family.targets))), *family.feedforward]))
    return {"target_modules": chosen, "feedforward_modules": draw.choice([[], list(family.feedforward)])}


def _oft(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(peft.OFTConfig)}
    made: dict[str, Any] = {"coft": draw.random() < 0.2, "block_share": draw.random() < 0.3}
    if "oft_block_size" in fields and draw.random() < 0.6:
        made |= {"r": 0, "oft_block_size": draw.choice([4, 8])}
    else:
        made |= {"r": draw.choice([2, 4])} | ({"oft_block_size": 0} if "oft_block_size" in fields else {})
    if made["coft"]:
        made["eps"] = 0.1
    if draw.random() < 0.3:
        made["use_cayley_neumann"] = False
    return made


def _loha(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    made = {"r": draw.choice([2, 4]), "alpha": draw.choice([2, 4, 8])}
    return made | _patterns(family, draw, "rank_pattern", "alpha_pattern")


def _lokr(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    made: dict[str, Any] = _loha(family, draw, model)
    made |= {"decompose_both": draw.random() < 0.5, "decompose_factor": draw.choice([-1, 2, 4])}
    return made


def _adalora(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    return {"init_r": draw.choice([4, 6]), "target_r": 2, "lora_alpha": draw.choice([4, 16]), "total_step": 100,
            "tinit": 1, "tfinal": 1}  # fmt: skip


def _boft(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"bias": draw.choice(["none", "all", "boft_only"]), "boft_block_size": draw.choice([2, 4])}
    return made | {"boft_n_butterfly_factor": 1}


def _vera(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    return {"r": draw.choice([4, 8]), "save_projection": draw.random() < 0.5, "projection_prng_key": 3,
            "target_modules": draw.sample(family.targets, min(len(family.targets), draw.choice([1, 2])))}  # fmt: skip


def _randlora(family: Family, draw: random.Random, model: Any) -> dict[str, Any]:
    sparse = draw.choice([{}, {}, {"sparse": True}, {"very_sparse": True}])
    few = draw.sample(family.targets, min(len(family.targets), draw.choice([1, 2])))
    made = {"r": draw.choice([4, 8]), "randlora_alpha": draw.choice([8, 64]), "target_modules": few, **sparse}
    return made | {"save_projection": draw.random() < 0.5}


SETTINGS: dict[str, Callable[[Family, random.Random, Any], dict[str, Any]]] = {
    "LoraConfig": _lora,
    "AdaLoraConfig": _adalora,
    "LoHaConfig": _loha,
    "LoKrConfig": _lokr,
    "IA3Config": _ia3,
    "OFTConfig": _oft,
    "BOFTConfig": _boft,
    "VeraConfig": _vera,
    "RandLoraConfig": _randlora,
    "FourierFTConfig": lambda f, d, m: {"n_frequency": 20, "scaling": d.choice([5.0, 150.0]),
                                        "n_frequency_pattern": d.choice([{}, {f.targets[0]: 11}])},
    "WaveFTConfig": lambda f, d, m: {"n_frequency": 20, "scaling": 25.0, "use_idwt": d.random() < 0.7},
    "HRAConfig": lambda f, d, m: {"r": d.choice([2, 4]), "apply_GS": d.random() < 0.5},
    "LNTuningConfig": lambda f, d, m: {"target_modules": list(f.norms)},
    "VBLoRAConfig": lambda f, d, m: {"r": 2, "num_vectors": 12, "vector_length": 4, "topk": 2,
                                     "save_only_topk_weights": d.random() < 0.5},
    "BoneConfig": lambda f, d, m: {"r": d.choice([4, 8]), "init_weights": d.choice([True, "bat"])},
    "MissConfig": lambda f, d, m: {"r": 8, "mini_r": 4, "init_weights": d.choice([True, "bat", "mini"])},
    "ShiraConfig": lambda f, d, m: {"r": d.choice([1, 4])},
    "C3AConfig": lambda f, d, m: {"block_size": d.choice([2, 8])},
    "RoadConfig": lambda f, d, m: {"variant": d.choice(["road_1", "road_2", "road_4"]), "group_size": d.choice([4, 8])},
    "TrainableTokensConfig": lambda f, d, m: {"token_indices": [4, 8, 15], "target_modules": [f.embedding]},
    "GraloraConfig": lambda f, d, m: {"r": 4, "gralora_k": 2, "alpha": 8, "hybrid_r": d.choice([0, 2])},
    "OSFConfig": lambda f, d, m: {"effective_rank": 4},
    "PveraConfig": lambda f, d, m: {"r": 5, "save_projection": d.random() < 0.5},
    "GloraConfig": lambda f, d, m: {"r": 3, "config_A_B": d.choice(["lora", "constant"])},
    "HiraConfig": lambda f, d, m: {"r": 3},
    "UniLoraConfig": lambda f, d, m: {"r": 3, "theta_d_length": 64, "save_indices": True},
    "DeftConfig": lambda f, d, m: {"r": 3, "decomposition_method": d.choice(["relu", "qr"])},
    "PsoftConfig": lambda f, d, m: {"r": 5, "psoft_alpha": 7, "use_cayley_neumann": d.random() < 0.5},
    "TinyLoraConfig": lambda f, d, m: {"u": 8, "weight_tying": 1.0},
    "PeanutConfig": lambda f, d, m: {"r": 4, "depth": 2, "act_fn": d.choice(["relu", "gelu"])},
    "SupertuningConfig": lambda f, d, m: {"sparsity": 0.9, "r": d.choice([0, 3])},
    "PromptTuningConfig": lambda f, d, m: {"num_virtual_tokens": 3},
    "PrefixTuningConfig": lambda f, d, m: {"num_virtual_tokens": 3},
    "PromptEncoderConfig": lambda f, d, m: {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}  # fmt: skip
PROMPTS = ("PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig")


def _wrap(model: Any, config: Any, name: str, inputs: dict[str, Any], draw: random.Random) -> Any:
    start = getattr(config, "init_lora_weights", None)
    wrapped = peft.get_peft_model(model, config, adapter_name=name)
    if start == "eva":
        peft.initialize_lora_eva_weights(wrapped, [inputs], adapter_name=name, show_progress_bar=False)
    if type(config).__name__ == "AdaLoraConfig" and draw.random() < 0.5:
        _cut(wrapped, config, name)
    return wrapped


def _cut(wrapped: Any, config: Any, name: str) -> None:
    """AdaLoRA's budget at the end of a training: singular values of 0, and the pattern that says which."""
    pattern = {}
    for key, value in wrapped.named_parameters():
        if "lora_E" in key:
            pattern[key.replace("base_model.model.", "", 1)] = [n % 2 == 0 for n in range(len(value))]
    config.rank_pattern = pattern


def fill(wrapped: Any, kind: str, generator: Any) -> None:
    """Every trained tensor is drawn, of a size that moves the model and leaves it whole."""
    cut = getattr(next(iter(wrapped.peft_config.values())), "rank_pattern", None) if kind == "AdaLoraConfig" else None
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if not value.requires_grad or not value.is_floating_point():
                continue
            drawn = torch.randn(value.shape, generator=generator)
            if "magnitude" in name or "ia3" in name or "delora_lambda" in name or "w_norm" in name or "boft_s" in name:
                value.copy_(value * (1 + drawn / 4))
            elif any(k in name for k in ("vera_lambda", "randlora_", "fourierft", "waveft", "shira", "c3a", "vblora")):
                value.copy_(value + drawn / 3)
            elif "road_theta" in name or "road_alpha" in name or "oft_" in name or "hra_u" in name:
                value.copy_(value + drawn / 5)
            elif "original" in name or "_U_low" in name or "_S_low" in name or "_V_low" in name:
                value.copy_(value + drawn / 20)
            elif "modules_to_save" in name or "trainable_tokens" in name or "score" in name or "classifier" in name:
                value.copy_(value + drawn / 6)
            else:
                value.copy_(value + drawn / 5)
            for key, mask in (cut or {}).items():
                if name.endswith(key):
                    value[[not m for m in mask]] = 0


def quiet() -> None:
    """Nothing but results is printed, and one thread computes."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)


def main(make: Callable[[Path, int, int, list[str]], dict[str, Any]] = make) -> int:
    """Make the cases that were asked for; one line of JSON for each."""
    folder, seed, first, count = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    quiet()
    for number in range(first, first + count):
        home = folder / f"{number:05d}"
        home.mkdir(parents=True)
        try:
            case = make(home, seed, number, sys.argv[5:] or list(FAMILIES))
        except Exception as error:
            shutil.rmtree(home)
            at = traceback.format_exc().strip().splitlines()[-3].strip()
            line = {"number": number, "not_made": f"{type(error).__name__}: {error}"[:200], "at": at}
            print(json.dumps(line), flush=True)
            continue
        (home / "case.json").write_text(json.dumps(case, default=str, indent=1))
        print(json.dumps({"number": number, "made": f"{case['family']} {case['kind']}"}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
