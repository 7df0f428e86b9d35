"""A gathered backbone with a head that its config does not speak of: the config of the classifier that it is."""

from __future__ import annotations

from collections.abc import Mapping

from converter.core.checkpoint import Checkpoint
from converter.core.context import Context
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.memory_names import auto_class
from converter.text import show


def as_classifier(found: Checkpoint, head: Mapping[str, LazyTensor], context: Context) -> Checkpoint:
    """The model with the head, as transformers' class for it: of sequences, or of tokens where the head has a bias.

    Raises:
        Refused: transformers has no such class (`no-class`), or the head is not a linear layer on it (`head-shape`).
    """
    weight, bias = head["score.weight"], head.get("score.bias")
    hidden = found.config.get("hidden_size")
    if len(weight.info.shape) != 2 or weight.info.shape[1] != hidden:
        what = f"the head is {list(weight.info.shape)}, and the hidden size is {show(hidden)}"
        raise Refused("head-shape", what, where=show(found.origin.asked), expected=f"[n, {show(hidden)}]")
    if bias is not None and bias.info.shape != weight.info.shape[:1]:
        what = f"the head's bias is {list(bias.info.shape)}, and its weight {list(weight.info.shape)}"
        raise Refused("head-shape", what, where=show(found.origin.asked))
    task, words = ("SEQ_CLS", "sequence") if bias is None else ("TOKEN_CLS", "token")
    kind = found.config.get("model_type")
    name = auto_class(task, str(kind))
    if name is None:
        raise Refused("no-class", f"transformers has no {words} classifier for {show(kind)}")
    rows = weight.info.shape[0]
    labels = {str(i): f"LABEL_{i}" for i in range(rows)}
    config = {**found.config, "architectures": [name], "num_labels": rows, "id2label": labels}
    config["label2id"] = {label: int(i) for i, label in labels.items()}
    context.note("info", "head", f"the output layer has {rows} {'row' if rows == 1 else 'rows'}: a head; made a {name}")
    return found.replace(tensors={**found.tensors, **head}, config=config)
