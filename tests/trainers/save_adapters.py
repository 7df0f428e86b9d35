"""Adapters as a trainer leaves them: its own training run, or its own saving function, over a tiny model.

    PY save_adapters.py TRAINER OUT

PY is the trainer's Python. OUT gets `base` and a folder for each case: `adapter`, what the trainer saved, and
`live.safetensors`, what the model said in memory (`logits`, `rewards`, or a value head's `values`) at `ids`. A case
that its trainer does not make has `not_made.txt`.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "converter" / "examine" / "verify" / "probes"))

from probe_common import stand_in_for  # noqa: E402

STOOD_IN = stand_in_for(
    "av", "gradio", "librosa", "modelscope", "ray", "sse_starlette", "fastapi", "uvicorn", "PIL", "torchaudio",
    "torchvision", "torchdata", "flash_attn", "ring_flash_attn", "deepspeed", "vllm", "bitsandbytes",
)  # fmt: skip

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 160, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 30, 7, 22, 41], [6, 8, 77, 90, 3, 12]])
TRAINING: dict[str, Any] = {
    "max_steps": 2, "save_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "learning_rate": 3e-2,
    "bf16": False,
}  # fmt: skip
PAIRS = [{"prompt": f"w{i}", "chosen": f"w{i + 1} w7", "rejected": f"w{i + 2}"} for i in range(8)]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}


def base(out: Path) -> Any:
    """A tiny Qwen2 and its tokenizer."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(150))]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    return tokenizer


def keep(folder: Path, **said: Any) -> None:
    """What the live model said."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"ids": IDS, **{k: v.detach().float().contiguous() for k, v in said.items()}}, folder / "live.safetensors"
    )


@torch.no_grad()
def say(model: Any) -> dict[str, Any]:
    """Logits, rewards or values of a model in memory."""
    found = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    if isinstance(found, tuple):  # a value head's wrapper: logits, loss, values
        return {"values": found[2]}
    return {"rewards" if found.logits.dim() == 2 else "logits": found.logits}


def llamafactory(out: Path) -> dict[str, Callable[[], None]]:
    """`llamafactory-cli train`, in process: `run_exp`."""
    from llamafactory.train.tuner import run_exp

    base(out)
    data = out / "data"
    data.mkdir()
    rows = [{"instruction": p["prompt"], "input": "", "output": p["chosen"], **p} for p in PAIRS]
    (data / "pairs.json").write_text(json.dumps(rows))
    ranked = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    described = {"texts": {"file_name": "pairs.json"},
                 "pairs": {"file_name": "pairs.json", "ranking": True, "columns": ranked}}  # fmt: skip
    (data / "dataset_info.json").write_text(json.dumps(described))

    class Keep(transformers.TrainerCallback):
        def __init__(self, folder: Path) -> None:
            self.folder = folder

        def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
            model = known["model"]
            keep(self.folder, **say(model))
            model.train()

    def case(name: str, stage: str = "sft", **more: Any) -> Callable[[], None]:
        def run() -> None:
            run_exp(
                {
                    "model_name_or_path": str(out / "base"), "stage": stage, "do_train": True,
                    "finetuning_type": "lora", "lora_rank": 4, "lora_alpha": 6, "lora_target": "q_proj,v_proj",
                    "dataset": "texts" if stage == "sft" else "pairs", "dataset_dir": str(data), "template": "default",
                    "output_dir": str(out / name / "adapter"), "report_to": "none", "trust_remote_code": False,
                    **TRAINING, **more,
                },
                callbacks=[Keep(out / name)],
            )  # fmt: skip

        return run

    tokens = {"add_special_tokens": "<one>,<two>", "resize_vocab": True}
    asked: dict[str, dict[str, Any]] = {
        "sft": {}, "dpo": {"stage": "dpo"}, "rm": {"stage": "rm"}, "orpo": {"stage": "dpo", "pref_loss": "orpo"},
        "dora": {"use_dora": True, "use_rslora": True}, "pissa": {"pissa_init": True},
        "pissa-converted": {"pissa_init": True, "pissa_convert": True},
        "all-layers": {"lora_target": "all", "loraplus_lr_ratio": 4.0},
        "whole-embeddings": {"additional_target": "embed_tokens,lm_head"},
        "new-tokens": tokens, "new-tokens-whole": tokens | {"additional_target": "embed_tokens,lm_head"},
        "oft": {"finetuning_type": "oft", "oft_rank": 0, "oft_block_size": 4, "oft_target": "q_proj,v_proj"},
    }  # fmt: skip

    def converted() -> None:
        """What `pissa_convert` leaves beside the adapter."""
        shutil.copytree(out / "pissa-converted" / "adapter" / "pissa_converted", out / "pissa-beside" / "adapter")
        shutil.copy(out / "pissa-converted" / "live.safetensors", out / "pissa-beside")

    return {name: case(name, **more) for name, more in asked.items()} | {"pissa-beside": converted}


def trl(out: Path) -> dict[str, Callable[[], None]]:
    """TRL's trainers, and `save_model` at the end."""
    import peft
    import trl as library
    from datasets import Dataset

    tokenizer = base(out)
    texts = [{"text": f"{p['prompt']} {p['chosen']}"} for p in PAIRS]

    def case(name: str, kind: str, task: str = "CAUSAL_LM", **lora: Any) -> Callable[[], None]:
        def run() -> None:
            auto = "AutoModelForSequenceClassification" if task == "SEQ_CLS" else "AutoModelForCausalLM"
            labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
            torch.manual_seed(0)
            made = getattr(peft, lora.pop("config", "LoraConfig"))
            arguments = {"report_to": [], "gradient_checkpointing": False, "disable_tqdm": True, **TRAINING}
            trainer = getattr(library, f"{kind}Trainer")(
                model=getattr(transformers, auto).from_pretrained(out / "base", dtype=torch.float32, **labels),
                args=getattr(library, f"{kind}Config")(output_dir=str(out / name / "run"), **arguments),
                processing_class=tokenizer,
                train_dataset=Dataset.from_list(texts if kind == "SFT" else PAIRS),
                peft_config=made(task_type=task, **{**(LORA if made is peft.LoraConfig else {}), **lora}),
            )
            trainer.train()
            trainer.save_model(str(out / name / "adapter"))
            keep(out / name, **say(trainer.model))

        return run

    return {
        "sft": case("sft", "SFT"),
        "dpo": case("dpo", "DPO"),
        "reward": case("reward", "Reward", "SEQ_CLS"),
        "reward-score-named": case("reward-score-named", "Reward", "SEQ_CLS", modules_to_save=["score"]),
        "dora-biases": case("dora-biases", "SFT", use_dora=True, bias="all"),
        "whole-embeddings": case("whole-embeddings", "SFT", modules_to_save=["embed_tokens", "lm_head"]),
        "token-rows": case("token-rows", "SFT", trainable_token_indices=[5, 9]),
        "all-linear": case("all-linear", "SFT", target_modules="all-linear", use_rslora=True),
        "oft": case("oft", "SFT", config="OFTConfig", r=0, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
        "lokr": case("lokr", "SFT", config="LoKrConfig", r=4, alpha=6, target_modules=["q_proj", "v_proj"]),
    }


def openrlhf(out: Path) -> dict[str, Callable[[], None]]:
    """Models as OpenRLHF builds them, drawn, and `DeepspeedStrategy.save_model` without its engine."""
    cloning = types.ModuleType("deepspeed.checkpoint.utils")
    cloning.clone_tensors_for_torch_save = lambda held: {k: v.clone() for k, v in held.items()}  # type: ignore[attr-defined]
    sys.modules["deepspeed.checkpoint.utils"] = cloning
    from openrlhf.models import Actor, get_llm_for_sequence_regression
    from openrlhf.utils.deepspeed import deepspeed as engine

    tokenizer = base(out)
    lora = {"lora_rank": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "attn_implementation": "eager"}
    engine.torch_dist_barrier_and_cuda_sync = lambda: None

    def save(model: Any, folder: Path) -> None:
        plain = types.SimpleNamespace(zero_stage=2, tensor_parallel_size=1)
        strategy = types.SimpleNamespace(
            args=types.SimpleNamespace(ds=plain), is_rank_0=lambda: True, stage=2, ds_tensor_parallel_size=1,
            _unwrap_model=lambda held: held.model if isinstance(held, Actor) else held,
        )  # fmt: skip
        engine.DeepspeedStrategy.save_model(strategy, model, tokenizer, str(folder))

    def drawn(model: Any) -> Any:
        generator = torch.Generator().manual_seed(2)
        for value in model.parameters():
            if value.requires_grad:
                value.data += (torch.randn(value.shape, generator=generator) / 8).to(value.dtype)
        return model

    def actor() -> None:
        model = drawn(Actor(str(out / "base"), **lora))
        save(model, out / "actor" / "adapter")
        keep(out / "actor", **say(model.model.float()))

    def regression(name: str, kind: str) -> Callable[[], None]:
        def run() -> None:
            torch.manual_seed(0)
            model = drawn(get_llm_for_sequence_regression(str(out / "base"), kind, init_value_head=True, **lora))
            save(model, out / name / "adapter")
            found = model.float().eval()(IDS, attention_mask=torch.ones_like(IDS))
            keep(out / name, **{"rewards" if kind == "reward" else "values": found})

        return run

    return {"actor": actor, "reward": regression("reward", "reward")}


def verl(out: Path) -> dict[str, Callable[[], None]]:
    """The adapter that `verl.model_merger` takes out of a run's shards."""
    import peft
    from verl.model_merger.base_model_merger import BaseModelMerger

    base(out)

    def case(name: str, meta: dict[str, Any] | None, **lora: Any) -> Callable[[], None]:
        def run() -> None:
            model = transformers.AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
            torch.manual_seed(2)  # two cases are the same adapter
            wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **(LORA | lora)))
            generator = torch.Generator().manual_seed(2)
            for value in wrapped.parameters():
                if value.requires_grad:
                    value.data += torch.randn(value.shape, generator=generator) / 8
            keep(out / name, **say(wrapped))
            held = types.SimpleNamespace(
                config=types.SimpleNamespace(target_dir=str(out / name)), _load_lora_train_meta=lambda: meta
            )
            BaseModelMerger.save_lora_adapter(held, dict(wrapped.state_dict()))
            (out / name / "lora_adapter").rename(out / name / "adapter")

        return run

    known = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    return {"merger": case("merger", known), "merger-alpha-lost": case("merger-alpha-lost", None),
            "merger-all-linear": case("merger-all-linear", known, target_modules="all-linear")}  # fmt: skip


TRAINERS = {each.__name__: each for each in (llamafactory, trl, openrlhf, verl)}


def main() -> int:
    """Make every case of a trainer, or those that are named."""
    name, out = sys.argv[1], Path(sys.argv[2])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    for case, make in TRAINERS[name](out).items():
        if sys.argv[3:] and case not in sys.argv[3:]:
            continue
        try:
            make()
        except Exception:
            (out / case).mkdir(exist_ok=True)
            (out / case / "not_made.txt").write_text(traceback.format_exc())
    return 0


if __name__ == "__main__":
    sys.exit(main())
