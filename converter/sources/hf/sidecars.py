"""Weight files beside the main ones that belong to the model: a value head that its trainer keeps in a file of its own.

Sources: LLaMA-Factory's `value_head.safetensors` or `.bin`,
https://github.com/hiyouga/LLaMA-Factory/blob/v0.9.3/src/llamafactory/train/callbacks.py (`fix_valuehead_checkpoint`);
AReaL's `value_head.pt` (`areal/engine/core/hf_save.py`, 1.0.4); TRL's value-head wrapper, whose PEFT branch saves the
head alone as `pytorch_model.bin`, https://github.com/huggingface/trl/blob/v0.24.0/trl/models/modeling_base.py
(`save_pretrained`); LDL reward models' `regression_layer.pt` and `gating_layer.pt`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from converter.core.checkpoint import RecordCheck
from converter.core.files.names import MODEL_PICKLED
from converter.core.files.opening import Identity
from converter.core.formats.weight_file import WeightFile, read_weights
from converter.core.tensors.nodes import LazyTensor
from converter.errors import Refused
from converter.families.words import HEAD_FILES
from converter.sources.survey import Fault, StoredTensor, Survey, empty_tensors
from converter.text import show

OTHER_LAYERS = ("regression_layer.pt", "gating_layer.pt")
TRL_HEAD = "v_head."

TRAINED_BESIDE = ("non_lora_trainables.bin", "non_lora_state_dict.bin", "mm_projector.bin")
"""Where trainers of multi-modal models keep what they trained whole beside an adapter: a projector, a vision tower.

Source: `safe_save_model_for_hf_trainer` and `train`,
https://github.com/haotian-liu/LLaVA/blob/v1.2.0/llava/train/train.py
"""


def read_sidecars(root: Path, names: Collection[str], survey: Survey, *, adapter: bool = False) -> None:
    """Add the files beside the weights to a survey; a value head that can't be read, or is empty, is a fault."""
    for name in (*HEAD_FILES, *OTHER_LAYERS, *((MODEL_PICKLED, *TRAINED_BESIDE) if adapter else ())):
        if name not in names:
            continue
        try:
            file = read_weights(root / name, root=root, named=str(root.resolve() / name))
        except Refused as error:
            # Of another name it may be anything; it stays among the files that are not read.
            if name in (*HEAD_FILES, *TRAINED_BESIDE):
                survey.faults.append(Fault.of(error))
            continue
        if name == MODEL_PICKLED and not _is_head_alone(file):
            continue
        survey.beside[name] = file
        entries = {n: StoredTensor(t, str(root.resolve() / name)) for n, t in file.tensors.items()}
        if empty := [n for n, t in file.tensors.items() if t.info.numel == 0]:
            survey.faults.append(empty_tensors(empty, entries, show(root / name)))


def _is_head_alone(file: WeightFile) -> bool:
    """True for what TRL saves beside an adapter; a whole model may lie there as well."""
    return bool(file.tensors) and all(n.startswith(TRL_HEAD) for n in file.tensors)


def tensors_beside(survey: Survey) -> dict[str, Mapping[str, LazyTensor]]:
    """The tensors of each file beside, by file name."""
    return {name: file.tensors for name, file in survey.beside.items()}


def identities_beside(root: Path, survey: Survey) -> dict[str, Identity]:
    """The identities of the files beside, by absolute path."""
    return {str(root.resolve() / name): file.identity for name, file in survey.beside.items()}


def checks_beside(survey: Survey) -> Iterable[RecordCheck]:
    """What torch's files record of their bytes."""
    return (check for file in survey.beside.values() for check in file.checks)
