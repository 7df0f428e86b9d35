"""What is known of the faults of distributed checkpoints: torch's and verl's, by code."""

from __future__ import annotations

_NODES = "from the nodes that wrote them"

DOCUMENTED: dict[str, tuple[str, str]] = {
    "dcp-file-missing": (
        _NODES,
        (
            "Files that a distributed checkpoint's .metadata names are not here: each node saved its own on its disk, "
            "or a copy stopped. Every tensor with a piece in them is lost without them."
        ),
    ),
    "dcp-metadata-missing": (
        _NODES,
        (
            "The .metadata of a distributed checkpoint is missing: names, shapes and places of all pieces are in it. A "
            "copy that leaves out hidden files loses it (`cp dir/*`)."
        ),
    ),
    "dcp-rank-metadata": (
        _NODES,
        "Ranks left metadata of their own, and the one that joins them is missing: the save did not finish.",
    ),
    "dcp-malformed": ("", "The .metadata of a distributed checkpoint lacks what torch writes into it."),
    "dcp-record": ("", "A piece in a .distcp file is not what .metadata says of it."),
    "dcp-chunks": ("", "The pieces of a tensor overlap or leave holes: files of two saves lie in one folder."),
    "dcp-no-model": ("", "The distributed checkpoint holds an optimizer or other state, and no model's weights."),
    "dcp-optimizer-alone": (
        "",
        (
            "This folder is the optimizer's half of a checkpoint (optimizer_0); the model's is beside it "
            "(pytorch_model_fsdp_0)."
        ),
    ),
    "dcp-several-models": ("", "The distributed checkpoint holds several models; which one is meant has to be said."),
    "dcp-adapter-names": ("", "Names of LoRA parts are in the checkpoint that no adapter of PEFT has."),
    "dcp-transformed": (
        "",
        "Pieces were quantised or otherwise changed by the writer, in a form that is not read back here.",
    ),
    "dcp-no-masters": ("", "There are no fp32 masters in this checkpoint: its weights are of the training dtype."),
    "dcp-no-moments": ("", "There is no state of Adam in this checkpoint."),
    "verl-rank-missing": (
        _NODES,
        (
            "verl's FSDP files of some ranks are missing (model_world_size_W_rank_R.pt): on several nodes each saved "
            "its own on a local disk. With each, a part of every tensor is lost."
        ),
    ),
    "verl-mixed": ("", "Files of verl runs with several numbers of ranks lie in one folder."),
    "verl-latest": ("", "latest_checkpointed_iteration.txt names a step that is not here: deleted, or not copied."),
    "verl-sizes": ("", "The ranks' pieces of a tensor do not add up to its shape: files of two saves."),
    "verl-malformed": ("", "A rank's file lacks what verl's FSDP saves have in it."),
    "verl-placement": ("", "A tensor is laid over the ranks in a way that is not read (not sharded or replicated)."),
    "verl-optimizer": ("", "The ranks' optimizer files are missing or not of these model files."),
    "verl-note": ("", "Something about verl's files that is good to know and changes nothing."),
    "megatron-note": (
        "",
        (
            "What kind of Megatron's checkpoint it is, and over how many ranks the run split its model, where that is "
            "recorded. Nothing depends on it: `gather` puts all of them together."
        ),
    ),
    "megatron-rank-missing": (
        _NODES,
        (
            "Files of Megatron's old format (mp_rank_*/model_optim_rng.pt) are missing: on several nodes each saved "
            "its own on a local disk. With each, a part of every tensor on that rank is lost."
        ),
    ),
    "megatron-mixed": (
        "",
        (
            "Files of several saves of Megatron, or of runs of other sizes, lie in one folder, or ranks' files in the "
            "folders of other ranks."
        ),
    ),
    "megatron-copies": (
        "",
        (
            "A tensor that every TP rank holds a copy of (a norm, a router) is not the same on all of them: files of "
            "two saves lie in one folder."
        ),
    ),
    "megatron-malformed": ("", "A rank's file lacks what Megatron's saves have in it: a model, and the arguments."),
    "megatron-unfinished": (
        "",
        (
            "Megatron-core writes metadata.json last, and it is missing: the save was cut off before it was whole, or "
            "a copy left it out. What is here may look complete and hold pieces of two steps."
        ),
    ),
    "megatron-backend": (
        "",
        (
            "metadata.json names a layout that is not read: zarr (a folder for each tensor, of older versions), "
            "Megatron-FSDP's, torch's FSDP2; or the weights themselves are stretches of flat buffers. The same of "
            "weights whose values mean something else than those of transformers (rotary_interleaved)."
        ),
    ),
    "several-parts": ("", "The run holds several models (actor, critic, ...): say with --part which one is meant."),
}
"""Code: where the values still are, what `explain` says."""
