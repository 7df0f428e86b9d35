"""Verbs that write a checkpoint: names, arguments, help. What each does is in a module imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from converter.cli.app import Out, verb
from converter.cli.options import INPUT, OUTPUT, Conversion, Dequantize, LoraAlpha
from converter.recipe.options import CombineChoice, EmitChoice, GatherEmit, NumericsChoice, PartChoice, RequantizeChoice

Requantize = Annotated[
    RequantizeChoice | None,
    typer.Option(
        help="same: write adapted weights of an FP8 or MXFP4 base back in its own format, rounded a second time.",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]

Residual = Annotated[
    bool,
    typer.Option(
        "--base-is-residual",
        help="BASE is the residual model that a PiSSA or OLoRA start saved.",
        rich_help_panel=INPUT,
    ),
]
Probe = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Preference pairs or texts (JSON lines, Parquet, .txt, hf://datasets/...): measure on them how far "
        "the merge is from what was trained, the adapter over the base's dequantised weights, unrounded.",
        show_default=False,
    ),
]
Entries = Annotated[int, typer.Option(metavar="N", min=1, help="How many entries of --probe, the first ones.")]
AgainstBase = Annotated[
    str | None,
    typer.Option(
        "--against-base",
        metavar="BASE",
        help="Another base, quantised or whole: --probe measures a merge into it too, and says which is nearer.",
        show_default=False,
    ),
]


@verb(
    "merge-lora",
    Conversion,
    short_help="Merge LoRA adapters into their base model.",
    help="Merge one or more LoRA adapters into their base model. A reward-model adapter over a causal base becomes a "
    "reward model.",
    examples=(
        "rlhf-convert merge-lora ./my-adapter ./merged --dtype bf16",
        "rlhf-convert merge-lora ./style ./merged --adapter ./facts --weight 0.5 --weight 1",
        "rlhf-convert merge-lora ./qlora ./merged --base ./base-4bit --dequantize --probe pairs.jsonl",
    ),
)
def merge_lora(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Adapter folder or Hub id.", show_default=False)],
    options: Conversion,
    out: Out = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Base model; default: the one the adapter records.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="A", help="Another adapter. Repeatable.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(metavar="W", help="Weight of each adapter, in order. Repeatable.", show_default=False),
    ] = None,
    numerics: Annotated[
        NumericsChoice, typer.Option(help="best: one rounding; peft: bit-identical to PEFT's merge.")
    ] = NumericsChoice.best,
    base_is_residual: Residual = False,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="lora_alpha of training, where adapter_config.json records none or 0.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    combine: Annotated[
        CombineChoice, typer.Option(help="How several adapters become one: sum is exact, the others are PEFT's.")
    ] = CombineChoice.sum,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="D", help="Share of elements that ties, magnitude_prune and dare keep.", show_default=False
        ),
    ] = None,
    svd_rank: Annotated[
        int, typer.Option("--svd-rank", metavar="R", help="Rank of --combine svd; 0: the adapters' largest.")
    ] = 0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of what dare draws.")] = 0,
    dequantize: Dequantize = False,
    requantize: Requantize = None,
    probe: Probe = None,
    pairs: Entries = 200,
    against_base: AgainstBase = None,
) -> int:
    """`rlhf-convert merge-lora`."""
    from converter.cli.run.merge import merge
    from converter.recipe.verbs.merge import MergeRequest

    asked = MergeRequest(
        adapter, base, tuple(more or ()), tuple(weight or ()), numerics.value, base_is_residual, lora_alpha,
        combine.value, density, svd_rank, seed, dequantize, None if requantize is None else requantize.value, probe,
        pairs, against_base,
    )  # fmt: skip
    return merge(asked, options.target(out), options)


Shards = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="Folder of shards (global_step500, checkpoint-500/pytorch_model_fsdp_0), its parent, or the run's.",
        show_default=False,
    ),
]


@verb(
    "gather",
    Conversion,
    short_help="Make a model or an adapter of a trainer's shards.",
    help="Make a model, or the LoRA adapter that was trained, of a trainer's shards: DeepSpeed (ZeRO-1, 2, 3, "
    "universal), FSDP and torch's distributed checkpoints (accelerate, torchtitan, torchtune), verl. Value-head "
    "wrappers of TRL, LLaMA-Factory and DeepSpeed-Chat come out as those trainers save them. Exact, in one pass, "
    "without the framework or a GPU.",
    examples=(
        "rlhf-convert gather ./run/checkpoint-500 ./model",
        "rlhf-convert gather ./run ./adapter --tag global_step500 --lora-alpha 16",
        "rlhf-convert gather ./run/global_step500 ./merged --emit merged --base Qwen/Qwen2.5-7B",
    ),
)
def gather(
    src: Shards,
    options: Conversion,
    out: Out = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help="Which checkpoint; default: what `latest` says.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Base model, for config, tokenizer and weights that aren't saved.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    master: Annotated[bool, typer.Option("--master", help="Keep the fp32 masters; the same as --dtype fp32.")] = False,
    emit: Annotated[
        GatherEmit | None,
        typer.Option(
            help="After LoRA: the adapter (default), the merged model, or both: the model in OUT, the adapter in "
            "OUT-adapter. state: the tensors under the names that the run has, for a module of your own: no model.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    part: Annotated[
        PartChoice | None,
        typer.Option(
            help="Which model, where a trainer's state holds several.", show_default=False, rich_help_panel=INPUT
        ),
    ] = None,
    lora_alpha: LoraAlpha = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Training set use_rslora, and no config records it.", rich_help_panel=INPUT)
    ] = False,
    dequantize: Dequantize = False,
) -> int:
    """`rlhf-convert gather`."""
    from converter.cli.run.gather import gather
    from converter.recipe.verbs.gather import GatherRequest

    asked = GatherRequest(
        src,
        tag=tag,
        base=base,
        master=master,
        emit=None if emit is None else emit.value,
        lora_alpha=lora_alpha,
        rslora=rslora,
        part=None if part is None else part.value,
        dequantize=dequantize,
    )
    return gather(asked, options.target(out), options)


@verb(
    "repair",
    Conversion,
    short_help="Fill what is empty or lost from where it still exists.",
    help="Fill tensors that are empty (torch.Size([0])), cut or missing from where their values still exist: the run's "
    "shards, a tied tensor, a copy, the base model for what was never trained. What exists nowhere is named, and "
    "nothing is written. Wrong names, indexes, ties and config entries are fixed on the way, where that is safe.",
    examples=(
        "rlhf-convert repair ./run/checkpoint-500 ./repaired",
        "rlhf-convert repair ./my-adapter ./repaired --weights-from ./run/global_step500",
        "rlhf-convert repair ./model ./repaired --for transformers@4 --link-unchanged",
    ),
)
def repair(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Model or adapter folder.", show_default=False)],
    options: Conversion,
    out: Out = None,
    weights_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DIR",
            help="Where lost weights may be: shards, a run, a copy. Repeatable.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="BASE",
            help="Base model; default: what is recorded, if at hand.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--for", metavar="TRAINER", help="transformers@4: old spellings too.", show_default=False),
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Merge LoRA layers left in a full model, with this alpha.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(
            metavar="rows|tokenizer|N",
            help="Reconcile the vocabulary: the config follows the embeddings' rows; or they get a row for each token, "
            "or N rows.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--set",
            metavar="FILE",
            help="Of several sets of weight files, FILE's.",
            show_default=False,
            rich_help_panel=INPUT,
        ),
    ] = None,
    emit: Annotated[
        EmitChoice | None,
        typer.Option(
            help="Of LoRA layers left in a full model: the merged model (default), the adapter, or both: the model in "
            "OUT, the adapter in OUT-adapter.",
            show_default=False,
            rich_help_panel=OUTPUT,
        ),
    ] = None,
) -> int:
    """`rlhf-convert repair`."""
    from converter.cli.run.repair import repair
    from converter.recipe.verbs.repair import RepairRequest

    chosen = None if emit is None else emit.value
    asked = RepairRequest(src, tuple(weights_from or ()), base, target, lora_alpha, vocab, weights, chosen)
    return repair(asked, options.target(out), options)
