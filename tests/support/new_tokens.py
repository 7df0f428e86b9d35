"""Adapters with embeddings of their own, made by whatever PEFT runs this, with the live model's logits beside them.

    python new_tokens.py FOLDER [FAMILY ...]

Runs under PEFT 0.13 and transformers 4.46 as well as under those of today; it needs nothing of this project.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft
    import torch
    import transformers
    from safetensors.torch import save_file

VOCABULARY, RESIZED = 163, 171
KINDS = (
    "save-both", "save-embed", "save-head", "all-linear", "rows", "rows-list", "lora-both", "lora-embed", "lora-head",
    "auto", "true",
)  # fmt: skip
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "max_position_embeddings": 64}
NAMES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size",
         "n_positions": "max_position_embeddings"}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "llama": ("LlamaConfig", {"intermediate_size": 48, "num_key_value_heads": 2}, ["q_proj", "v_proj"], "embed_tokens"),
    "gpt2": ("GPT2Config", {}, ["c_attn"], "wte"),
    "gpt_neox": ("GPTNeoXConfig", {"intermediate_size": 48}, ["query_key_value"], "embed_in"),
    "phi": ("PhiConfig", {"intermediate_size": 48}, ["q_proj", "v_proj"], "embed_tokens"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One way to train and save new tokens."""

    family: str
    kind: str
    tied: bool
    resized: bool

    @property
    def name(self) -> str:
        return "-".join(
            [self.family, self.kind, "tied" if self.tied else "untied", "resized" if self.resized else "same"]
        )

    @property
    def is_saved_whole(self) -> bool:
        """False where PEFT saves one side of the resized pair alone: the other's new rows are in no file.

        It saves a targeted `lm_head` or `embed_tokens` and nothing else; of other names it takes no notice. Where the
        two are tied that is enough, but for the bias that phi's head has.
        """
        embed = self.kind == "lora-embed" and FAMILIES[self.family][3] == "embed_tokens"
        alone = embed or self.kind == "lora-head"
        is_enough = self.tied and not (embed and self.family == "phi")
        return not (alone and self.resized) or is_enough


def cells(*families: str) -> list[Cell]:
    """Every way, for some families."""
    return [Cell(*each) for each in itertools.product(families, KINDS, (True, False), (True, False))]


def make(cell: Cell, folder: Path) -> None:
    """`base`, `adapter` and `live.safetensors` in a folder: ids, and what the live model says of them in fp32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generator = torch.Generator().manual_seed(3)
        model = _base(cell, folder / "base", generator)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **_settings(cell, model)))
        with torch.no_grad():
            for value in (p for p in wrapped.parameters() if p.requires_grad):
                value.add_((torch.randn(value.shape, generator=generator) * 0.1).to(value.dtype))
        options = {"save_embedding_layers": True} if cell.kind == "true" else {}
        (folder / "adapter").mkdir()
        # PEFT adds to a card that is there, and else builds a template, which takes a third of its save.
        (folder / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n\n# An adapter\n")
        wrapped.eval().save_pretrained(folder / "adapter", **options)
        ids = torch.arange(100, RESIZED if cell.resized else VOCABULARY)[None][:, -60:]
        with torch.no_grad():
            logits = wrapped.float()(input_ids=ids).logits
        save_file({"ids": ids, "logits": logits.contiguous()}, folder / "live.safetensors")


def _base(cell: Cell, folder: Path, generator: Any) -> Any:
    """The base saved, and then its vocabulary resized in memory, as training scripts do."""
    config, more, _, _ = FAMILIES[cell.family]
    sizes = SIZES if cell.family != "gpt2" else {new: SIZES[old] for new, old in NAMES.items()}
    torch.manual_seed(0)
    built = getattr(transformers, config)(
        vocab_size=VOCABULARY, tie_word_embeddings=cell.tied, bos_token_id=1, eos_token_id=2, **sizes, **more
    )
    model = transformers.AutoModelForCausalLM.from_config(built).to(torch.bfloat16)
    with torch.no_grad():
        for value in model.parameters():
            value.add_((torch.randn(value.shape, generator=generator) * 0.05).to(value.dtype))
    model.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).eval()
    if cell.resized:
        model.resize_token_embeddings(RESIZED, mean_resizing=False)
        with torch.no_grad():
            for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
                for value in layer.parameters():
                    drawn = torch.randn(value[VOCABULARY:].shape, generator=generator) * 0.3
                    value[VOCABULARY:] = drawn.to(value.dtype)
    return model


def _settings(cell: Cell, model: Any) -> dict[str, Any]:
    _, _, targets, embed = FAMILIES[cell.family]
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output).rpartition(".")[2]
    rows = [5, 9, *(range(VOCABULARY, RESIZED) if cell.resized else [150])]
    own: dict[str, dict[str, Any]] = {
        "save-both": {"modules_to_save": [embed, head]},
        "save-embed": {"modules_to_save": [embed]},
        "save-head": {"modules_to_save": [head]},
        "all-linear": {"target_modules": "all-linear", "modules_to_save": [embed, head]},
        "rows": {"trainable_token_indices": {embed: rows}},
        "rows-list": {"trainable_token_indices": rows},
        "lora-both": {"target_modules": [*targets, embed, head]},
        "lora-embed": {"target_modules": [*targets, embed]},
        "lora-head": {"target_modules": [*targets, head]},
    }
    return {"task_type": "CAUSAL_LM", "target_modules": targets} | own.get(cell.kind, {})


def is_made_by(version: str, cell: Cell) -> bool:
    """True where that PEFT has what the cell needs: token rows came with 0.15.

    0.18.1 stands beside transformers 5.5, whose resize leaves a tied head's `out_features`: no LoRA on it can run.
    """
    if version == "0.18.1" and cell.kind in ("lora-both", "lora-head") and cell.tied and cell.resized:
        return False
    return not cell.kind.startswith("rows") or tuple(map(int, version.split(".")[:2])) >= (0, 15)


if __name__ == "__main__":
    for each in cells(*(sys.argv[2:] or FAMILIES)):
        if is_made_by(peft.__version__, each):
            make(each, Path(sys.argv[1]) / each.name)
