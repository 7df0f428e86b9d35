"""Tiny reward models in every dialect, written and scored by hand-written names: the oracle of the head tests.

Nothing here imports the code under test. Names, files and prefixes are literals, as each trainer's own code has them;
scores come from transformers' backbone in fp64 and two lines of algebra.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig

HIDDEN, VOCAB = 16, 64
Tensors = dict[str, torch.Tensor]
IDS = torch.tensor([[5, 9, 33, 60, 7, 11], [8, 4, 21, 2, 40, 6]])

_COMMON = {"vocab_size": VOCAB, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 3}
_LLAMA = {"hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2} | _COMMON
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": False},
    "qwen2": _LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 32} | _COMMON,
    "gpt_neox": _LLAMA | {"max_position_embeddings": 32, "tie_word_embeddings": False},
}
PREFIX = {"llama": "model.", "qwen2": "model.", "gpt2": "transformer.", "gpt_neox": "gpt_neox."}
CAUSAL = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}  # fmt: skip
STEM = {"llama": "Llama", "qwen2": "Qwen2", "gpt2": "GPT2", "gpt_neox": "GPTNeoX"}
TOKCLS = {"llama": "score", "qwen2": "score", "gpt2": "classifier", "gpt_neox": "classifier"}
TIED = {"qwen2", "gpt2"}


@dataclass(frozen=True)
class Form:
    """A dialect: what stands before AutoModel's names, the head's names, class and files."""

    backbone: str  # {P} is the family's prefix
    weight: str  # {T} is the family's token classification head
    bias: str | None = None
    lm_head: bool = False
    outer: str = ""
    architecture: str = "{causal}"
    config: tuple[tuple[str, Any], ...] = ()
    beside: str | None = None
    torch: bool = False
    subfolder: str = ""
    families: tuple[str, ...] = tuple(CONFIGS)
    mlp: bool = False


SEQCLS = Form("{P}", "score.weight", architecture="{stem}ForSequenceClassification", config=(("num_labels", 1),))
FORMS = {
    "hf-seqcls": SEQCLS,
    "hf-tokcls": Form("{P}", "{T}.weight", "{T}.bias", architecture="{stem}ForTokenClassification"),
    "openrlhf": Form("{P}", "score.weight", architecture="RewardModel", config=(("value_head_prefix", "score"),)),
    "openrlhf-old": Form("{P}", "value_head.weight", architecture="CriticModel"),
    "skyrl": Form("{P}", "value_head.weight", architecture="CriticModel"),
    "trl-vhead": Form("{P}", "v_head.summary.weight", "v_head.summary.bias", lm_head=True),
    "llamafactory": Form(
        "{P}", "v_head.summary.weight", "v_head.summary.bias", lm_head=True, beside="value_head.safetensors"
    ),
    "dschat": Form("rwtransformer.", "v_head.weight", torch=True),
    "dschat-old": Form("rwtranrsformer.", "v_head.weight", torch=True),
    "trlx": Form("base_model.{P}", "v_head", lm_head=True, outer="base_model.", torch=True, mlp=True),
    "trlx-rm": Form("transformer.", "v_head.weight"),
    "coati": Form("model.", "value_head.weight", "value_head.bias", subfolder="modeling"),
    "safe-rlhf": Form(
        "{P}", "score_head.weight", "score_head.bias", architecture="{stem}ForScore",
        config=(("score_dim", 1), ("bias", True), ("do_normalize", False)), families=("llama", "gpt2", "gpt_neox"),
    ),
    "torchtune": Form("{P}", "score.weight", architecture="{stem}ForSequenceClassification", families=("llama",)),
    "ms-swift": SEQCLS,
    "areal-mcore": Form("{P}", "weight", beside="value_head.pt"),
    "ultrarm": Form("{P}", "regression_head.weight", architecture="{stem}RewardModel"),
    "starling34": Form(
        "transformer.", "v_head.weight", architecture="LlamaForSequenceClassification", families=("llama",)
    ),
    "score-mlp": Form("{P}", "score", architecture="{stem}ForRewardModel", mlp=True),
    "grm": Form(
        "{P}", "v_head.summary.weight", "v_head.summary.bias", architecture="ValueHead",
        config=(("vhead_layer_type", "linear"),),
    ),
    "grm-mlp": Form("{P}", "v_head.summary", mlp=True, architecture="ValueHead", config=(("vhead_layer_type", "mlp"),)),
    "oasst": Form(
        "{P}", "out_proj.weight", "out_proj.bias", architecture="GPTNeoXRewardModel",
        config=(("model_type", "gpt_neox_reward_model"), ("pooling", "last")), families=("gpt_neox",),
    ),
}  # fmt: skip
"""Every dialect with a head of its own; `lm-head-row0` is a plain causal model."""


@dataclass(frozen=True)
class Mlp:
    """A head with one hidden layer."""

    w0: torch.Tensor
    b0: torch.Tensor
    w2: torch.Tensor
    b2: torch.Tensor


@dataclass(frozen=True)
class Live:
    """A model in memory: its causal state, and a head."""

    family: str
    state: Tensors
    weight: torch.Tensor
    bias: torch.Tensor
    mlp: Mlp


@cache
def live(family: str, dtype: torch.dtype = torch.bfloat16, units: int = 2 * HIDDEN) -> Live:
    """A seeded model; every parameter has been drawn, biases too."""
    torch.manual_seed(sum(map(ord, family)))
    config = AutoConfig.for_model(family, **CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    # GPT-NeoX's output embedding has the name that it has on disk.
    state = {
        n.replace("lm_head.", OUTPUT(family) + "."): t.detach().to(dtype).clone() for n, t in model.state_dict().items()
    }
    if family in TIED:
        state.pop(f"{OUTPUT(family)}.weight")
    drawn = [torch.randn(*s).to(dtype) for s in ((1, HIDDEN), (1,), (units, HIDDEN), (units,), (1, units), (1,))]
    return Live(family, state, drawn[0], drawn[1], Mlp(*drawn[2:]))


def OUTPUT(family: str) -> str:  # noqa: N802
    """Name of the output embedding on disk."""
    return "embed_out" if family == "gpt_neox" else "lm_head"


def embedding(family: str) -> str:
    """Name of the input embedding in a causal model."""
    return PREFIX[family] + {"gpt2": "wte", "gpt_neox": "embed_in"}.get(family, "embed_tokens") + ".weight"


def filled(template: str, family: str) -> str:
    """A name or class for one family."""
    known = {"P": PREFIX[family], "T": TOKCLS[family], "causal": CAUSAL[family], "stem": STEM[family]}
    for key, value in known.items():
        template = template.replace("{" + key + "}", value)
    return template


def tensors_of(
    form: Form, model: Live, *, bias: torch.Tensor | None = None, mlp: Mlp | None = None
) -> tuple[Tensors, Tensors]:
    """The tensors among the weights, and those of the file beside them."""
    family, prefix = model.family, PREFIX[model.family]
    main: Tensors = {}
    for name, tensor in model.state.items():
        if name.startswith(prefix):
            main[filled(form.backbone, family) + name.removeprefix(prefix)] = tensor
        elif form.lm_head:
            main[form.outer + name] = tensor
    if form.outer and family in TIED:
        main[f"{form.outer}{OUTPUT(family)}.weight"] = model.state[embedding(family)].clone()
    head: Tensors
    if form.mlp:
        given = mlp or model.mlp
        parts = {"0.weight": given.w0, "0.bias": given.b0, "2.weight": given.w2, "2.bias": given.b2}
        head = {f"{form.weight}.{n}": t for n, t in parts.items()}
    else:
        head = {filled(form.weight, family): model.weight}
        if form.bias is not None:
            head[filled(form.bias, family)] = torch.zeros_like(model.bias) if bias is None else bias
    return (main, head) if form.beside else (main | head, {})


def save(form: Form, model: Live, folder: Path, *, shards: int = 1, **head: Any) -> Path:
    """The model as a trainer would have left it."""
    main, beside = tensors_of(form, model, **head)
    config = {"model_type": model.family, "dtype": "bfloat16"} | CONFIGS[model.family]
    config |= {"architectures": [filled(form.architecture, model.family)]} | dict(form.config)
    weights = folder / form.subfolder
    weights.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if form.torch:
        torch.save(main, weights / "pytorch_model.bin")
    elif shards == 1:
        save_file(main, weights / "model.safetensors", metadata={"format": "pt"})
    else:
        _save_sharded(main, weights, shards)
    if form.beside:
        write = torch.save if form.beside.endswith((".pt", ".bin")) else save_file
        write(beside, folder / form.beside)
    return folder


def _save_sharded(main: Tensors, folder: Path, count: int) -> None:
    names = list(main)
    size = -(-len(names) // count)
    index: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * size : (number + 1) * size]
        save_file({n: main[n] for n in part}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in main.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


# Scores, as a trainer that reads the dialect would get them


def read_main(folder: Path, form: Form) -> Tensors:
    """Every tensor among the weights, read by torch or safetensors alone."""
    weights = folder / form.subfolder
    if form.torch:
        assert not list(folder.rglob("*.safetensors"))
        return loaded(weights / "pytorch_model.bin")
    return {n: t for f in sorted(weights.glob("model*.safetensors")) for n, t in load_file(f).items()}


def loaded(path: Path) -> Tensors:
    """A pickled file, as torch reads it."""
    return dict(torch.load(path, weights_only=True))  # noqa: TID251


def read_beside(folder: Path, form: Form) -> Tensors:
    """Every tensor of the file beside the weights."""
    if not form.beside:
        return {}
    path = folder / form.beside
    return load_file(path) if path.suffix == ".safetensors" else loaded(path)


def hidden_states(family: str, backbone: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Last hidden states of a backbone with AutoModel's names, loaded strictly, in fp64."""
    model = AutoModel.from_config(AutoConfig.for_model(family, **CONFIGS[family])).double()
    model.load_state_dict({n: t.double() for n, t in backbone.items()}, strict=True)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).last_hidden_state
    return found


def score(family: str, folder: Path, form: Form) -> torch.Tensor:
    """A value for each token, from what lies in a folder, by the names of a dialect; every tensor has its place."""
    main, beside = read_main(folder, form), read_beside(folder, form)
    prefix = filled(form.backbone, family)
    backbone = {
        n.removeprefix(prefix): t for n, t in main.items() if n.startswith(prefix) and not _is_head(n, form, family)
    }
    hidden = hidden_states(family, backbone)
    rest = {n: t.double() for n, t in ({**main, **beside}).items() if n.removeprefix(prefix) not in backbone}
    outputs = {n for n in rest if n.startswith(form.outer + OUTPUT(family))}
    assert bool(outputs) == (form.lm_head and (family not in TIED or bool(form.outer)))
    for name in outputs:
        rest.pop(name)
    if form.mlp:
        w0, b0, w2, b2 = (rest.pop(f"{form.weight}.{n}") for n in ("0.weight", "0.bias", "2.weight", "2.bias"))
        assert not rest
        return torch.relu(hidden @ w0.T + b0) @ w2.T + b2
    weight = rest.pop(filled(form.weight, family))
    # safe-rlhf's config says whether there is one; every other loader with a bias demands it.
    optional = json.loads((folder / "config.json").read_text()).get("bias") is False
    bias = rest.pop(filled(form.bias, family)) if form.bias and not optional else torch.zeros(1)
    assert not rest
    return hidden @ weight.T + bias.double()


def _is_head(name: str, form: Form, family: str) -> bool:
    return name.startswith(filled(form.weight, family).removesuffix(".weight") + ".")


def expected(model: Live, *, bias: torch.Tensor | None = None, mlp: Mlp | None = None) -> torch.Tensor:
    """The same, from the live model."""
    prefix = PREFIX[model.family]
    backbone = {n.removeprefix(prefix): t for n, t in model.state.items() if n.startswith(prefix)}
    hidden = hidden_states(model.family, backbone)
    if mlp is not None:
        w0, b0, w2, b2 = (t.double() for t in (mlp.w0, mlp.b0, mlp.w2, mlp.b2))
        return torch.relu(hidden @ w0.T + b0) @ w2.T + b2
    return hidden @ model.weight.double().T + (0 if bias is None else bias.double())


def architecture(folder: Path) -> str:
    """What config.json says the class is; the config must be one that transformers reads."""
    config = PretrainedConfig.from_pretrained(folder)
    return str(config.architectures[0])
