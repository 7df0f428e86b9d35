"""Megatron-core's tensors as those of transformers, by the table of `families.megatron` and the sizes of config.json.

Nothing is guessed: a family that the table lacks, a key that no row takes, and a config that is not of these tensors
are refused. An output layer with fewer rows than the vocabulary is the head of a critic or a reward model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from converter.converters.gather.classifier import as_classifier
from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.files.strict_json import parse_json
from converter.core.tensors.nodes import LazyTensor
from converter.diagnostic import Again, Command, Steps
from converter.errors import Refused
from converter.families.megatron.delta_net import with_parts_joined
from converter.families.megatron.formulas import SizeError, Sizes, sizes_of
from converter.families.megatron.names import ARGUMENTS_FILE, Value, layer_count, placed
from converter.families.megatron.next_tokens import MTP, after_the_last, count, with_copies
from converter.families.megatron.rows import EMBEDDING, OUTPUT, OUTPUT_BIAS, ROWS, ZERO_CENTRED
from converter.families.ties import is_tied
from converter.text import fold, show


def from_megatron(found: Checkpoint, context: Context, base: Checkpoint | None = None) -> Checkpoint:
    """The model under transformers' names; a critic or reward model as a classifier with one label a row.

    Args:
        base: whose config is gone by where the one beside the shards is of another model.

    Raises:
        Refused: see `_converted`.
    """
    try:
        return _converted(found, context)
    except Refused as error:
        if error.code != "megatron-config" or base is None or base.config == found.config:
            raise
        made = _converted(found.replace(config=base.config, config_bytes=base.config_bytes), context)
        text = f"the config.json beside the shards is of another model, and the base's is gone by ({error.what})"
        context.note("info", "found", text)
        return made


def _converted(found: Checkpoint, context: Context) -> Checkpoint:
    """The model by the config that it has.

    Raises:
        Refused: the family is not in the table (`megatron-family`), keys are not (`megatron-keys`), config.json is of
            another model (`megatron-config`), or a layout of values is not read (`megatron-backend`).
    """
    where = show(found.origin.asked)
    rows = ROWS.get(str(found.config.get("model_type")))
    if rows is None:
        kind = found.config.get("model_type")
        raise Refused(
            "megatron-family",
            f"which of its tensors Megatron's are is not known for the model type {show(kind)}",
            where=where,
            expected=", ".join(sorted(ROWS)),
            next="export it with the trainer that wrote it, or with Megatron-Bridge (AutoBridge.export_ckpt)",
        )
    try:
        sizes = sizes_of(found.config)
    except SizeError as error:
        raise _other_config(found, [str(error)]) from None
    arguments = _arguments(found)
    _expect_same_model(found, sizes, arguments, context)
    held, head = _without_head(found.tensors, sizes)
    held, dropped = _without_mtp(with_parts_joined(held), found, where, context)
    result = placed(after_the_last(held, sizes.layers), rows, sizes)
    if result.unknown:
        raise Refused(
            "megatron-keys",
            f"{len(result.unknown)} of {len(found.tensors)} tensors are none that a {show(found.config['model_type'])} "
            f"of Megatron's has: {fold(result.unknown)}",
            where=where,
            next="check that --base is the model that training began with; else export it with the trainer",
        )
    if result.misfits:
        raise _other_config(found, [f"{show(k)}: {why}" for k, why in result.misfits.items()])
    if result.twice:
        raise Refused("rename-collision", f"two tensors would be named {fold(result.twice)}", where=where)
    _say_padding(found, sizes, context)
    files = {n: f for n, f in found.side_files.items() if n != ARGUMENTS_FILE}
    tensors = with_copies(result.tensors, sizes.layers)
    made = found.replace(tensors=tensors, side_files=files, dropped={**found.dropped, **dropped})
    return as_classifier(made, head, context) if head else made


def _arguments(found: Checkpoint) -> dict[str, Value]:
    file = found.side_files.get(ARGUMENTS_FILE)
    value = {} if file is None or file.content is None else parse_json(file.content, where=ARGUMENTS_FILE)
    return value if isinstance(value, dict) else {}


def _without_head(held: Mapping[str, LazyTensor], sizes: Sizes) -> tuple[dict[str, LazyTensor], dict[str, LazyTensor]]:
    """The model's tensors, and a head in place of the output layer: it has fewer rows than any vocabulary."""
    weight, embedding = held.get(OUTPUT), held.get(EMBEDDING)
    if weight is None or len(weight.info.shape) != 2 or weight.info.shape[0] >= sizes.vocabulary:
        return dict(held), {}
    if embedding is None or embedding.info.shape[:1] == weight.info.shape[:1]:
        return dict(held), {}
    head = {n: t for k, n in ((OUTPUT, "score.weight"), (OUTPUT_BIAS, "score.bias")) if (t := held.get(k)) is not None}
    return {k: t for k, t in held.items() if k not in (OUTPUT, OUTPUT_BIAS)}, head


def _without_mtp(
    held: Mapping[str, LazyTensor], found: Checkpoint, where: str, context: Context
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The model without layers for multi-token prediction that its config does not have, where the user says so."""
    extra = [k for k in held if k.startswith(MTP)]
    layers = len({k.split(".")[2] for k in extra})
    said = count(found.config)
    if layers == said:
        return dict(held), {}
    if not extra:
        text = f"config.json has {said} layers for multi-token prediction, and the run trained none: they are left out"
        context.note("info", "megatron-mtp", text)
        return dict(held), {}
    context.consent(
        Refused(
            "megatron-mtp",
            f"{len(extra)} tensors are of {layers} layers for multi-token prediction, and config.json has {said} such "
            f"(num_nextn_predict_layers): they would be left out, and transformers does not use them: {fold(extra)}",
            where=where,
        )
    )
    why = "of layers for multi-token prediction, left out as asked"
    return {k: t for k, t in held.items() if k not in set(extra)}, dict.fromkeys(extra, why)


def _say_padding(found: Checkpoint, sizes: Sizes, context: Context) -> None:
    embedding = found.tensors.get(EMBEDDING)
    if embedding is not None and embedding.info.shape[0] > sizes.vocabulary:
        rows = embedding.info.shape[0]
        text = f"{rows - sizes.vocabulary} of {rows} rows of the vocabulary are padding that no token has; they are cut"
        context.note("info", "vocabulary-padding", text)


# What config.json must agree with


def _expect_same_model(found: Checkpoint, sizes: Sizes, arguments: Mapping[str, Value], context: Context) -> None:
    """Go on where config.json, the tensors and the arguments of the training script are of one model.

    Raises:
        Refused: they are not (`megatron-config`), or a layout of values is not read (`megatron-backend`).
    """
    keys = ["rotary_interleaved", "apply_layernorm_1p"]
    if found.config.get("model_type") in ZERO_CENTRED:
        _expect_centred(arguments.get(keys.pop()), found, context)
    odd = [key for key in keys if arguments.get(key) is True]
    if odd:
        raise Refused(
            "megatron-backend",
            f"the model was trained with {' and '.join(odd)}: its weights mean something else than those of "
            "transformers",
            where=show(found.origin.asked),
            next="export it with the trainer that wrote it",
        )
    wrong = [f"{words} {have}, and config.json {said}" for words, have, said in _differences(found, sizes, arguments)]
    tokens = arguments.get("vocab_size")
    if type(tokens) is int and tokens > sizes.vocabulary:  # fewer are usual: a tokenizer need not fill its rows
        wrong.append(f"the training script's vocab_size is {tokens}, and config.json {sizes.vocabulary}")
    if wrong:
        raise _other_config(found, wrong)
    _expect_output(found)
    _expect_same_numbers(found, arguments, context)
    embedding = found.tensors.get(EMBEDDING)
    step, ranks = arguments.get("make_vocab_size_divisible_by"), arguments.get("tensor_model_parallel_size")
    if embedding is not None and isinstance(step, int) and isinstance(ranks, int):
        padding = embedding.info.shape[0] - sizes.vocabulary
        if padding >= step * ranks > 0:
            error = _other_config(
                found, [f"{padding} rows of padding, and Megatron pads to multiples of {step * ranks}"]
            )
            error.consent = True
            context.consent(error)


def _expect_centred(is_centred: Value, found: Checkpoint, context: Context) -> None:
    """Go on where norms of a family that multiplies by 1 + w do so in Megatron too, or the user says so.

    Raises:
        Refused: they do not, or nothing says whether they do (`megatron-norms`).
    """
    if is_centred is True:
        return
    kind = show(found.config["model_type"])
    what = f"norms of a {kind} multiply by 1 + w. "
    if is_centred is False:
        what += "The run was without --apply-layernorm-1p (layernorm_zero_centered_gamma), and its weights are 1 + w"
        step = "export it with the trainer that wrote it"
        raise Refused("megatron-norms", what, where=show(found.origin.asked), next=step)
    what += "Whether Megatron's did (layernorm_zero_centered_gamma, which Megatron-Bridge sets) is recorded nowhere"
    context.consent(Refused("megatron-norms", what, where=show(found.origin.asked)))


def _differences(found: Checkpoint, sizes: Sizes, arguments: Mapping[str, Value]) -> list[tuple[str, Any, Any]]:
    """What the checkpoint says in words, with its value and that of config.json, where they are two."""
    config = found.config
    pairs: list[tuple[str, Any, Any]] = [("the checkpoint's layers are", layer_count(found.tensors), sizes.layers)]
    is_latent = arguments.get("multi_latent_attention") is True
    is_grouped = arguments.get("group_query_attention") is not False
    experts = next((config[k] for k in ("n_routed_experts", "num_local_experts", "num_experts") if config.get(k)), None)
    width = config.get("moe_intermediate_size") or config.get("intermediate_size")
    implied = {
        "num_layers": sizes.layers,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": sizes.heads,
        "num_query_groups": None if is_latent or not is_grouped else sizes.groups,
        "kv_channels": None if is_latent else sizes.head,
        "ffn_hidden_size": config.get("intermediate_size"),
        "num_experts": experts,
        "moe_ffn_hidden_size": width if experts else None,
        **({ours: config.get(theirs) for ours, theirs in _LATENT.items()} if is_latent else {}),
    }
    for key, said in implied.items():
        have = arguments.get(key)
        if type(have) is int and type(said) is int:
            pairs.append((f"the training script's {key} is", have, said))
    return [pair for pair in pairs if pair[1] != pair[2]]


_LATENT = {
    "q_lora_rank": "q_lora_rank", "kv_lora_rank": "kv_lora_rank", "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim", "v_head_dim": "v_head_dim",
}  # fmt: skip


def _expect_same_numbers(found: Checkpoint, arguments: Mapping[str, Value], context: Context) -> None:
    """Go on where what a model computes with beside its weights is the same, or the user says so.

    Raises:
        Refused: positions or norms are of other numbers than config.json says (`megatron-config`).
    """
    config = found.config
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    implied = {
        "rotary_base": rope.get("rope_theta", config.get("rope_theta")),
        "norm_epsilon": config.get("rms_norm_eps"),
    }
    wrong = []
    for key, said in implied.items():
        have = arguments.get(key)
        is_used = key != "rotary_base" or arguments.get("position_embedding_type") in (None, "rope", "yarn")
        if is_used and _is_number(have) and _is_number(said) and not math.isclose(float(have), float(said)):  # type: ignore[arg-type]
            wrong.append(f"the training script's {key} is {have}, and config.json {said}")
    if wrong:
        error = _other_config(found, wrong)
        error.consent = True
        context.consent(error)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _expect_output(found: Checkpoint) -> None:
    """Go on where the output embedding is there, or config.json says that it is the embedding.

    Raises:
        Refused: config.json does not tie the two, and there is one alone (`megatron-config`).
    """
    if OUTPUT not in found.tensors and EMBEDDING in found.tensors and not is_tied(found.config):
        raise _other_config(found, [f"there is no {OUTPUT}, as of tied embeddings, and config.json does not tie them"])


def _other_config(found: Checkpoint, wrong: list[str]) -> Refused:
    asked = show(found.origin.asked)
    return Refused(
        "megatron-config",
        f"config.json is not of this model: {'; '.join(wrong[:4])}",
        where=asked,
        next=Steps(
            Again(("--base", "BASE"), otherwise=Command("gather", (asked, "OUT", "--base", "BASE"))),
            ", the model that training began with",
        ),
    )
