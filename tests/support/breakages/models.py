"""Breakages of models: containers, indexes, configs, names, heads, ties, values."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from breakages.sound import (
    FIRST,
    HIDDEN,
    INDEX,
    PT,
    SHARD,
    UP,
    WEIGHTS,
    Breakage,
    beside,
    copied_over,
    edit,
    pickled,
    renamed,
    shuffle,
    store,
    whole,
)

Change = Callable[[Path], object]
SCORE = "score.weight"


class Hostile:
    """What a pickle may ask a reader to run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run",)


def index_of(folder: Path, change: Callable[[dict[str, str]], object], **metadata: int) -> None:
    value = json.loads((folder / INDEX).read_text())
    change(value["weight_map"])
    value["metadata"].update(metadata)
    (folder / INDEX).write_text(json.dumps(value))


def config(drop: tuple[str, ...] = (), **changes: Any) -> Change:
    return lambda f: edit(f, drop=drop, **changes)


def add(**tensors: torch.Tensor) -> Change:
    named = {n.replace("__", "."): t for n, t in tensors.items()}
    return lambda f: store(f, lambda t: {**t, **named})


def without(name: str) -> Change:
    return lambda f: store(f, lambda t: {n: v for n, v in t.items() if n != name})


def at(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda f: store(f, lambda t: {n: change(v).contiguous() if n == name else v for n, v in t.items()})


def both(*changes: Change) -> Change:
    def run(folder: Path) -> None:
        for change in changes:
            change(folder)

    return run


def huge_header(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(300_000_000)


def twice(folder: Path) -> None:
    name = min(load_file(folder / SHARD))
    first = load_file(folder / FIRST)
    save_file({**first, name: load_file(folder / SHARD)[name]}, folder / FIRST, metadata=PT)


def flat(folder: Path) -> None:
    save_file({"_fsdp_wrapped_module._flat_param": torch.ones(9)}, folder / WEIGHTS, metadata=PT)


def with_lora(folder: Path) -> None:
    """A model whose q_proj are PEFT's layers, neither merged nor split off."""

    def change(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = {}
        for n, v in t.items():
            if "q_proj" in n:
                stem = n.removesuffix(".weight")
                out |= {f"{stem}.base_layer.weight": v, f"{stem}.lora_A.default.weight": torch.ones(2, HIDDEN),
                        f"{stem}.lora_B.default.weight": torch.ones(HIDDEN, 2)}  # fmt: skip
            else:
                out[n] = v
        return out

    store(folder, change)


def value_head(folder: Path, name: str = "value_head.safetensors") -> None:
    """As LLaMA-Factory's callback writes it."""
    head = {"v_head.summary.weight": torch.randn(1, HIDDEN), "v_head.summary.bias": torch.zeros(1)}
    if name.endswith(".bin"):
        torch.save(head, folder / name)
    else:
        save_file(head, folder / name, metadata=PT)


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    os.rename(folder / SHARD, target)
    (folder / SHARD).symlink_to(target)


def left_beside(folder: Path) -> None:
    """As verl's merger leaves an adapter inside of its base."""
    os.rename(beside(folder, "adapter", "a"), folder / "lora_adapter")


def unmoved(folder: Path) -> None:
    os.rename(beside(folder, "reward", "other"), folder.parent / "checkpoint-1")


def normalised(folder: Path) -> None:
    edit(beside(folder, "reward", "before"), mean=0.5, std=2.0)


FILES: dict[str, Breakage] = {
    "git-lfs-pointer": Breakage(
        "model",
        lambda f: (f / SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "advice",
    ),
    "file-truncated": Breakage("model", lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-9]), "advice"),
    "safetensors-header": Breakage(
        "model", lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes() + b"more"), "advice"
    ),
    "safetensors-not": Breakage("model", lambda f: (f / SHARD).write_bytes(b"<html><body>404</body></html>"), "advice"),
    "safetensors-header-huge": Breakage("whole", huge_header, "advice"),
    "shard-missing": Breakage("model", lambda f: (f / SHARD).unlink(), "advice"),
    "index-missing": Breakage("model", lambda f: (f / INDEX).unlink(), "fixed"),
    "index-malformed": Breakage("model", lambda f: (f / INDEX).write_text("{"), "fixed"),
    "index-phantom": Breakage("model", lambda f: index_of(f, lambda m: m.update({"no.such.weight": SHARD})), "advice"),
    "index-conflict": Breakage(
        "model", lambda f: index_of(f, lambda m: m.update({min(n for n in m if m[n] == SHARD): FIRST})), "fixed"
    ),
    "index-unlisted": Breakage("model", lambda f: index_of(f, lambda m: m.pop("model.norm.weight")), "fixed"),
    "index-total-size": Breakage("model", lambda f: index_of(f, lambda m: None, total_size=12), "fixed"),
    "weight-sets": Breakage("model", twice, "fixed"),
    "layers-missing": Breakage(
        "whole", lambda f: store(f, lambda t: {n: v for n, v in t.items() if ".1." not in n}), "lost"
    ),
    "config-missing": Breakage("model", lambda f: (f / "config.json").unlink(), "advice"),
    "adapter-config-stray": Breakage(
        "model", lambda f: (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'), "fixed"
    ),
    "stray-weights": Breakage(
        "model", lambda f: save_file({"a": torch.ones(1)}, f / "leftover.safetensors", metadata=PT), "told"
    ),
    "download-unfinished": Breakage("model", lambda f: (f / f"{FIRST}.incomplete").write_bytes(b""), "advice"),
    "pickle-names": Breakage("model", lambda f: pickled(f, {"a": torch.ones(1), "b": Hostile()}), "advice"),
    "pickled-weights": Breakage("model", lambda f: pickled(f, whole(f), "consolidated.00.pth"), "fixed"),
    "weights-wrapped": Breakage("model", lambda f: pickled(f, {"model": whole(f), "step": 1}), "fixed"),
    "torch-not": Breakage(
        "model",
        lambda f: (pickled(f, whole(f)), (f / "pytorch_model.bin").write_bytes(b"<html>not found</html>")),
        "advice",
    ),
    "torch-zip": Breakage(
        "model",
        lambda f: (
            pickled(f, whole(f)),
            (f / "pytorch_model.bin").write_bytes(
                (f / "pytorch_model.bin").read_bytes().replace(b"data.pkl", b"data.pkx", 1)
            ),
        ),
        "advice",
    ),
    "pickle-malformed": Breakage(
        "model", lambda f: (pickled(f, whole(f)), cut_pickle(f / "pytorch_model.bin")), "advice"
    ),
    "no-tensors": Breakage("whole", lambda f: save_file({}, f / WEIGHTS, metadata=PT), "lost"),
    "weights-missing": Breakage("whole", lambda f: (f / WEIGHTS).unlink(), "advice"),
    "config-unreadable-list": Breakage("model", lambda f: (f / "config.json").write_text("[1]"), "advice"),
    "config-unreadable": Breakage("model", lambda f: (f / "generation_config.json").write_text("{"), "advice"),
    "input-outside": Breakage("model", link_out, "advice"),
    "input-not-a-file": Breakage("whole", lambda f: ((f / WEIGHTS).unlink(), os.mkfifo(f / WEIGHTS)), "advice"),
    "format-missing": Breakage("whole", lambda f: save_file(load_file(f / WEIGHTS), f / WEIGHTS), "fixed"),
    "being-written": Breakage("model", lambda f: (f / f"{FIRST}.tmp").write_bytes(b""), "told"),
    "weights-alone": Breakage(
        "whole",
        lambda f: ([p.unlink() for p in f.glob("*.json")], os.rename(f / WEIGHTS, f / "rm_weights.safetensors")),
        "advice",
    ),
    "shards-deleted": Breakage("whole", lambda f: (f / "latest").write_text("global_step5"), "told"),
    "adapter-left-beside": Breakage(
        "whole", left_beside, "fixed", kept=lambda n: "q_proj" not in n and "v_proj" not in n
    ),
}


def cut_pickle(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        parts = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, raw in parts.items():
            new.writestr(name, raw[:-40] if name.endswith("data.pkl") else raw)


MATRIX = "model.layers.1.mlp.up_proj.weight"


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A model whose tensors are changed."""

    def do(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return do


CONFIGS: dict[str, Breakage] = {
    "architecture-missing": Breakage("whole", config(drop=("architectures",)), "told"),
    "architecture-wrapper": Breakage("whole", config(architectures=["FSDPLlamaForCausalLM"]), "fixed"),
    "architecture-openrlhf": Breakage(
        "reward", config(architectures=["RewardModel"], value_head_prefix="score"), "fixed"
    ),
    "labels-mismatch": Breakage("reward", config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}), "fixed"),
    "pad-token-missing": Breakage("reward", config(pad_token_id=None), "fixed"),
    "tensors-missing": Breakage("whole", changed(lambda t: t.pop(MATRIX)), "lost"),
    "tensors-misshapen": Breakage(
        "whole", changed(lambda t: t.update({MATRIX: t[MATRIX][: t[MATRIX].shape[0] // 2].clone()})), "lost"
    ),
    "tensors-unexpected": Breakage("whole", changed(lambda t: t.update({"odd.weight": t[MATRIX].clone()})), "advice"),
    "tensors-mistyped": Breakage("whole", changed(lambda t: t.update({MATRIX: t[MATRIX].to(torch.int32)})), "advice"),
    "family-unknown": Breakage("whole", config(model_type="unheard-of", architectures=["UnheardOf"]), "told"),
    "config-refused": Breakage("whole", config(num_attention_heads="many"), "advice"),
    "architecture-head": Breakage("reward", config(architectures=["LlamaForCausalLM"]), "fixed"),
    "pad-is-eos": Breakage("reward", config(pad_token_id=2), "told"),
    "vocabulary-rows": Breakage("whole", config(vocab_size=31), "fixed"),
    "end-tokens-lost": Breakage(
        "whole",
        lambda f: edit(beside(f, "whole", "base"), "generation_config.json", eos_token_id=[2, 5]),
        "fixed",
        ("--base", "{here}/base"),
    ),
    "tokenizer-broken": Breakage("reward", lambda f: (f / "tokenizer.json").unlink(), "advice"),
    "tokens-without-rows": Breakage("whole", config(eos_token_id=9000), "told"),
    "tokenizer-of-transformers-5": Breakage(
        "reward",
        lambda f: edit(f, "tokenizer_config.json", tokenizer_class="TokenizersBackend"),
        "fixed",
        ("--for", "transformers@4"),
    ),
    "rope-of-transformers-5": Breakage(
        "whole",
        config(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
        "fixed",
        ("--for", "transformers@4"),
    ),
    "remote-code-missing": Breakage("whole", config(auto_map={"AutoModel": "modeling_x.Model"}), "advice"),
    "quantisation-left": Breakage("whole", config(quantization_config={"quant_method": "gptq", "bits": 4}), "advice"),
    "quantised-incomplete": Breakage(
        "whole", changed(lambda t: t.update({MATRIX: t[MATRIX].to(torch.float8_e4m3fn)})), "advice"
    ),
    "dtype-differs": Breakage("whole", config(dtype="bfloat16"), "fixed"),
    "rope-lost": Breakage(
        "whole",
        lambda f: edit(
            beside(f, "whole", "base"),
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            },
        ),
        "advice",
        ("--base", "{here}/base"),
    ),
    "names-wrapped": Breakage("whole", renamed(lambda n: f"_orig_mod.{n}"), "fixed"),
    "names-doubled": Breakage("whole", renamed(lambda n: f"model.{n}" if n.startswith("model.") else n), "fixed"),
    "names-of-a-trainer": Breakage(
        "whole",
        both(
            renamed(lambda n: f"pretrained_model.{n}"),
            lambda f: store(
                f,
                lambda t: {**t, "v_head.summary.weight": torch.ones(1, HIDDEN), "v_head.summary.bias": torch.zeros(1)},
            ),
        ),
        "fixed",
        kept=lambda n: n != "lm_head.weight",
    ),
    "lora-unmerged": Breakage("whole", with_lora, "fixed", fill=(("--lora-alpha", "4"),), kept=lambda n: False),
    "fsdp-flat": Breakage("whole", flat, "lost"),
    "output-embedding-missing": Breakage("whole", without("lm_head.weight"), "advice"),
    "tied-copies": Breakage(
        "tied", lambda f: store(f, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}), "fixed"
    ),
    "tied-copies-deep": Breakage(
        "tied",
        lambda f: store(f, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}),
        "fixed",
        ("--deep",),
    ),
    "output-embedding-in-classifier": Breakage("reward", add(lm_head__weight=torch.ones(32, HIDDEN)), "told"),
    "head-missing": Breakage("reward", without(SCORE), "lost"),
    "head-named-otherwise": Breakage("reward", renamed(lambda n: "value_head.weight" if n == SCORE else n), "fixed"),
    "head-dialect": Breakage("whole", value_head, "fixed"),
    "heads-several": Breakage(
        "reward", add(value_head__weight=torch.ones(1, HIDDEN)), "fixed", fill=(("--from", "hf-seqcls"),)
    ),
    "head-rows": Breakage(
        "reward",
        both(at(SCORE, lambda v: v.repeat(2, 1)), config(id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})),
        "fixed",
        fill=(("--label", "0"),),
    ),
    "head-reshaped": Breakage("reward", at(SCORE, lambda v: v.reshape(8, 2)), "fixed"),
    "head-bias": Breakage("reward", add(score__bias=torch.ones(1)), "fixed"),
    "normaliser-broken": Breakage(
        "reward", config(architectures=["RewardModel"], value_head_prefix="score", mean=1.0), "advice"
    ),
    "normaliser-lost": Breakage("reward", normalised, "advice", ("--weights-from", "{here}/before")),
    "merged-without-head": Breakage(
        "whole",
        lambda f: beside(f, "reward-adapter", "ra"),
        "fixed",
        ("--weights-from", "{here}/ra"),
        kept=lambda n: "q_proj" not in n and "v_proj" not in n,
    ),
    "loader-random": Breakage(
        "reward", renamed(lambda n: "value_head.weight" if n == SCORE else n), "fixed", ("--for", "openrlhf")
    ),
    "loader-refuses": Breakage(
        "plain-reward", lambda f: None, "fixed", ("--for", "deepspeed-chat"), kept=lambda n: False
    ),
    "loader-changes": Breakage("reward", add(score__bias=torch.ones(1)), "fixed", ("--for", "trl")),
    "loader-accepts": Breakage("reward", lambda f: None, "told", ("--for", "trl")),
    "nonfinite": Breakage("whole", at("model.norm.weight", lambda v: v * torch.nan), "values", ("--deep",)),
    "zero-tensors": Breakage("whole", at(UP, torch.zeros_like), "values", ("--deep",)),
    "suspicious-values": Breakage("whole", at(UP, lambda v: torch.full_like(v, 0.02)), "values", ("--deep",)),
    "copied-tensors": Breakage("whole", copied_over, "values", ("--deep",)),
    "head-untrained": Breakage("reward", at(SCORE, torch.zeros_like), "told", ("--deep",)),
    "head-unmoved": Breakage("reward", unmoved, "values", ("--deep",), name="checkpoint-2"),
    "merged-equals-base": Breakage(
        "whole", lambda f: beside(f, "whole", "base"), "advice", ("--deep", "--base", "{here}/base")
    ),
    "zero3-empty-tensors": Breakage("whole", at(UP, lambda v: torch.empty(0)), "lost"),
    "pair-same-path": Breakage("reward", lambda f: None, "advice", ("--with-actor", "{folder}")),
    "pair-vocabulary": Breakage(
        "reward",
        lambda f: store(
            beside(f, "whole", "actor"),
            lambda t: {
                n: v[:31] if v.shape[0] == 32 and v.shape[1:] == (HIDDEN,) and "mlp" not in n else v
                for n, v in t.items()
            },
        ),
        "advice",
        ("--with-actor", "{here}/actor"),
    ),
    "pair-special-tokens": Breakage(
        "reward",
        lambda f: edit(beside(f, "whole", "actor"), pad_token_id=5),
        "advice",
        ("--with-actor", "{here}/actor"),
    ),
    "pair-dtype": Breakage(
        "reward",
        lambda f: store(beside(f, "whole", "actor"), lambda t: {n: v.bfloat16() for n, v in t.items()}),
        "told",
        ("--with-actor", "{here}/actor"),
    ),
    "pair-tokenizer": Breakage(
        "reward", lambda f: shuffle(beside(f, "whole", "actor")), "advice", ("--with-actor", "{here}/actor")
    ),
    "pair-chat-template": Breakage(
        "reward",
        lambda f: [(p / "chat_template.jinja").write_text(p.name) for p in (f, beside(f, "whole", "actor"))],
        "told",
        ("--with-actor", "{here}/actor"),
    ),
}
