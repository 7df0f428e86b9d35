"""Faults that a source sees while it reads headers, each with its explanation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from converter.core.context import Context
from converter.diagnostic import Again, Command, Next, Severity, Steps
from converter.examine.diagnoses.case import ALL_KINDS, HERE, LOST, Case, Diagnosis, Finding
from converter.examine.diagnoses.shard_faults import DOCUMENTED
from converter.sources import one_file
from converter.sources.survey import Fault
from converter.text import show

_COPY = "from another copy of the file"
_WRITTEN_ANEW = frozenset(
    {
        "index-missing",
        "index-unlisted",
        "index-total-size",
        "stale-shards",
        "stray-weights",
        "adapter-empty-twin",
        "adapter-named-otherwise",
        "adapter-config-stray",
    }
)
"""Faults that no output has: its index is made from its headers, and only what is read is written."""

_WORSE: dict[str, Severity] = {
    "adapter-named-otherwise": "error",
    "index-missing": "error",
    "index-unlisted": "changes-numbers",
    "adapter-config-stray": "changes-numbers",
}
"""Faults that are read here all the same, and that transformers stops at or applies twice."""

NOT_READ_HERE = frozenset({"megatron-backend"})
"""Layouts that their own trainers resume from: no fault of the folder, as a state that `gather` reads is none."""

# Code: (recoverability, what `explain` says).
_DOCUMENTED: dict[str, tuple[str, str]] = {
    **DOCUMENTED,
    "file-truncated": (
        _COPY,
        (
            "A weight file is shorter than its header says: a download or a copy that stopped, or a full disk. The "
            "tensors that lie past the end are gone from this file; the other files are sound. A file of about 130 "
            "bytes that begins with `version https://git-lfs` is a pointer: run `git lfs pull`. Nothing repairs the "
            "file; fetch it again."
        ),
    ),
    "git-lfs-pointer": (
        "from git lfs",
        "The file is a pointer of git-lfs and not the weights: `git lfs pull` in that clone fetches them.",
    ),
    "safetensors-header": (
        _COPY,
        (
            "The header of a safetensors file is not what the format allows: names twice, holes or overlaps between "
            "tensors, sizes that do not fit. Loaders that are less strict may read it, and may read it wrongly."
        ),
    ),
    "safetensors-not": (
        _COPY,
        "A file is named .safetensors and does not begin as one: another format or an error page.",
    ),
    "header-too-large": ("", "The header is larger than any model needs; reading it could exhaust memory."),
    "weights-missing": (
        "",
        (
            "There is a config and no weight file that transformers would read. After ZeRO-3 without "
            "stage3_gather_16bit_weights_on_model_save, and in verl's `huggingface` folder, this is normal: the "
            "weights are in the trainer's shards beside or above it, and `gather` makes a model of them."
        ),
    ),
    "pickled-weights": (HERE, "The weights are pickled under a name that transformers does not read."),
    "no-tensors": (
        LOST,
        (
            "The weight files are sound and hold no tensor at all: an adapter of 443 bytes, or a callback that saved "
            "an empty state."
        ),
    ),
    "config-missing": (
        "from the base model",
        (
            "There is no config.json, without which nothing says what the weights are. The base model's own fits, but "
            "for the number of labels and the architecture of a reward model."
        ),
    ),
    "shard-missing": (
        _COPY,
        (
            "The index or the files' own numbers name shards that are not here. The tensors in them are lost with "
            "them; transformers would refuse, other loaders may start with random values."
        ),
    ),
    "index-missing": (
        HERE,
        (
            "All shards are here and the index is not: transformers refuses the folder. A new index is made from the "
            "headers."
        ),
    ),
    "index-malformed": (
        HERE,
        "The index can't be read as JSON of the known form; the headers of the shards say all that it would.",
    ),
    "index-phantom": (
        _COPY,
        "The index promises tensors that no shard holds. Either a shard is of another save, or the index is.",
    ),
    "index-conflict": (
        HERE,
        (
            "The index places tensors in other shards than they are in: a loader that trusts it fails or reads the "
            "wrong one."
        ),
    ),
    "index-unlisted": (
        HERE,
        (
            "Tensors lie in the shards that the index does not list: a loader that goes by the index leaves them out, "
            "silently."
        ),
    ),
    "index-total-size": (
        HERE,
        (
            "`total_size` of the index is not the number of bytes. Tools use it to reserve memory; some mergers write "
            "the number of tensors there."
        ),
    ),
    "stale-shards": (
        HERE,
        (
            "A whole file and a set of shards lie side by side: two saves into one folder. Loaders choose one; not all "
            "choose the same."
        ),
    ),
    "tensor-twice": (
        "",
        "One name is in two weight files, perhaps with different values: which one counts depends on the loader.",
    ),
    "stray-weights": (
        HERE,
        "Weight files lie here that no loader of this kind of folder reads: leftovers of another save.",
    ),
    "download-unfinished": (_COPY, "A download into this folder did not finish."),
    "adapter-config-stray": (
        HERE,
        (
            "adapter_config.json lies beside the weights of a whole model. transformers then looks for an adapter, and "
            "either fails or applies LoRA a second time. After a merge it has no use: `repair` writes "
            "the model without it."
        ),
    ),
    "adapter-and-model": (HERE, "An adapter and a whole model lie in one folder; transformers takes the adapter."),
    "adapter-named-otherwise": (
        HERE,
        (
            "The adapter lies in pytorch_model_fsdp.bin, as accelerate saves the state of a PEFT model under FSDP. "
            "PEFT looks for adapter_model.safetensors and finds none; `repair` writes it."
        ),
    ),
    "adapter-empty-twin": (
        HERE,
        (
            "adapter_model.safetensors holds empty tensors and adapter_model.bin beside it holds all of them. OpenRLHF "
            "up to 0.5.5 leaves both after a ZeRO-3 run, and PEFT reads the empty one: `size mismatch ... "
            "torch.Size([0])`. The good file is used here; moving the empty one away cures PEFT."
        ),
    ),
    "adapter-empty": (LOST, "The adapter file holds no tensor."),
    "adapter-config-missing": (
        "",
        "There is no adapter_config.json: rank and names can be inferred from the tensors, lora_alpha can't.",
    ),
    "zero3-empty-tensors": (
        "",
        (
            "Tensors have the shape torch.Size([0]): under ZeRO-3 a parameter outside of a gather is an empty "
            "placeholder, and a plain save_pretrained or state_dict writes just that. Loaders say `size mismatch ... "
            "copying a param with shape torch.Size([0])`. The values are not in these files. They may be in the run's "
            "shards (global_step*), in a sibling file, or, for what was frozen, in the base model: `repair` takes each "
            "from the first place that holds it exactly. ignore_mismatched_sizes=True does not help: it fills them "
            "with random values. Removing --gradient_checkpointing does not help either. If the message reads the "
            "other way round (the current model is torch.Size([0])), the file is sound, and the loader runs under "
            "ZeRO-3."
        ),
    ),
    "json-malformed": (HERE, "A JSON file can't be read: cut, edited by hand, or with a key twice."),
    "input-unreadable": ("", "A file can't be read by this user."),
    "input-outside": ("", "A link leads out of the folder; it is not followed."),
    "input-not-a-file": ("", "A name of a weight file is a folder, a device or a pipe."),
    "torch-zip": (_COPY, "A .bin or .pt file is not a sound zip container as torch.save writes it."),
    "torch-not": (_COPY, "A .bin or .pt file is not a file of torch.save."),
    "pickle-malformed": (_COPY, "The pickle inside of a .bin or .pt file can't be read."),
    "pickle-names": (
        "",
        (
            "A pickled file names code that no checkpoint needs. torch.load would run it. Do not load this file "
            "anywhere; if the names are your own trainer's classes, --allow-name lets them pass, still without running "
            "anything."
        ),
    ),
    "zero-note": ("", "Something about a trainer's shards that is good to know and changes nothing."),
    "zero-mixed": (
        _COPY,
        "Shard files of two runs, or of two world sizes, lie in one folder: they do not belong together.",
    ),
    "zero-rank-missing": (
        _COPY,
        (
            "Shard files of some ranks are missing. In stage 3 every parameter loses a part with each; in stages 1 and "
            "2 the 16-bit weights are whole in the model file, and only masters and moments are lost."
        ),
    ),
    "zero-model-file": (
        _COPY,
        (
            "The model file (*model_states.pt) is missing: parameters' names and shapes are in it, and without it the "
            "partitions can't be told apart. Copy it from the first node of the run."
        ),
    ),
    "zero-parameter-missing": (
        "from the ranks' files, which the universal checkpoint was made of",
        (
            "A universal checkpoint has one folder a parameter in `zero`, and some of them are not there, or have no "
            "master: a copy that stopped, or parameters that never got a gradient."
        ),
    ),
    "zero-round-robin": (
        "from the ranks' files, which the universal checkpoint was made of",
        (
            "DeepSpeed's ds_to_universal.py cuts the partitions of a run with round_robin_gradients at the wrong "
            "places: masters and moments in `zero` belong to other parameters, and loading them trains another model. "
            "The 16-bit weights in the model file are exact. The ranks' own files are read in the right order."
        ),
    ),
    "zero-sizes": ("", "The shards' sizes do not add up to the parameters that they are said to hold."),
    "zero-malformed": ("", "A shard file lacks what DeepSpeed writes into it."),
    "zero-latest": ("", "`latest` names a checkpoint that is not here: it was deleted, or the copy left it out."),
    "zero-no-masters": ("", "There are no fp32 masters in these shards."),
    "zero-offloaded": (
        "from the NVMe folder of the run",
        "The optimizer state was offloaded to NVMe and is not in the shards.",
    ),
    "zero-pipeline": (
        "",
        "A pipeline's checkpoint: files of layers or stages are missing, or tensors were split too, which isn't read.",
    ),
    "zero-experts": (
        "",
        "Experts were spread over the ranks: files of some are missing, or they are in a form that is not read.",
    ),
    "zero-tensor-parallel": (
        "",
        "Tensors were split over ranks: ranks are missing, or nothing says how the slices lie in the whole.",
    ),
}


def finding_of(fault: Fault, case: Case) -> Finding:
    """A source's fault as a finding."""
    recoverability = _DOCUMENTED.get(fault.code, ("", ""))[0]
    file = Path(fault.where).name if fault.where and fault.where != show(case.root) else ""
    is_fixed = fault.code in _WRITTEN_ANEW
    command = case.repair() if is_fixed and fault.code != "stray-weights" else None
    places = case.training_near() if fault.code == "weights-missing" else []
    if places:
        above = places[0] if case.root.is_relative_to(places[0].path) else None
        command = Command("gather", (places[0].argument, case.out("gathered", above)))
        recoverability = f"from {places[0].asked}"
    elif fault.code == "weights-missing" and case.kind == "model" and one_file.names_in(case.root):
        command, recoverability = case.command("gather", out="gathered"), HERE
    is_foreign = fault.code in NOT_READ_HERE
    return Finding(
        code=fault.code,
        severity="cosmetic" if is_foreign else _WORSE.get(fault.code, fault.severity),
        text=f"not read here: {fault.text}" if is_foreign else fault.text,
        evidence=(file,) if file else (),
        recoverability=recoverability if fault.severity == "error" else "",
        applicability="safe" if is_fixed else "display-only",
        next=command or _typed(fault.next, case),
        facts=fault.facts,
    )


def _typed(step: Next | None, case: Case) -> Next | None:
    """A source's command with the user's own path, and a place to write to: sources know a folder's name only."""
    if isinstance(step, Again):
        step = step.otherwise or step
    if isinstance(step, Steps):
        return Steps(*(_typed(part, case) for part in step.parts))
    if not isinstance(step, Command) or "OUT" not in step.arguments or not step.arguments:
        return step
    path, *more = step.arguments
    root = next((r for r in (str(case.root), case.root.name) if path == r or path.startswith(f"{r}/")), None)
    if root is None:
        return step
    typed = f"{case.folder.rstrip('/')}{path.removeprefix(root)}" if path != root else case.folder
    out = "fixed" if step.verb == "repair" else "gathered"
    return Command(step.verb, (typed, *(case.out(out) if w == "OUT" else w for w in more)))


def explanation(code: str) -> str:
    """What is known of a fault, as one paragraph."""
    return _DOCUMENTED[code][1]


def _named(fault: Fault) -> Fault:
    """The fault under the code that says most: a pointer of git-lfs is not a cut file, though it reads as one."""
    return replace(fault, code="git-lfs-pointer") if fault.fact("instead") == "git-lfs" else fault


def _fault(code: str) -> Diagnosis:
    def find(case: Case, context: Context) -> Iterable[Finding]:
        return [finding_of(f, case) for f in map(_named, case.survey.faults) if f.code == code]

    return Diagnosis(code, find, frozenset(ALL_KINDS), False, explanation(code))


def undocumented(case: Case, known: Mapping[str, Diagnosis]) -> list[Finding]:
    """Faults whose code no diagnosis of such folders explains: a plug-in's source may have its own."""
    codes = frozenset(code for code, each in known.items() if case.kind in each.kinds)
    return [finding_of(f, case) for f in case.survey.faults if f.code not in codes]


DIAGNOSES = tuple(_fault(code) for code in _DOCUMENTED if code != "zero3-empty-tensors")
