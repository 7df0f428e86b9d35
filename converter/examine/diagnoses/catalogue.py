"""The catalogue of what fails when a checkpoint does not load, and which diagnoses show each of it.

A row is a failure that users reported; its codes are what `doctor` says of it. Rows without codes can't be seen in
files, for the reason given. The README's table is made of this.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A failure: its title, the codes that show it, or why files can't."""

    title: str
    codes: tuple[str, ...] = ()
    unseen: str = ""


def _row(title: str, *codes: str, unseen: str = "") -> Row:
    return Row(title, codes, unseen)


ROWS: dict[str, Row] = {
    "A1": _row("empty tensors in a model", "zero3-empty-tensors"),
    "A2": _row(
        "the model is torch.Size([0]), the file is sound",
        unseen="the file is sound: the loader runs under ZeRO-3; `explain` knows the message",
    ),
    "A3": _row("empty tensors in an adapter", "zero3-empty-tensors", "adapter-empty-twin"),
    "A4": _row("an adapter of 443 bytes", "no-tensors", "adapter-empty", "adapter-targets-missing"),
    "A5": _row("no weights at the top, only global_step*", "training-state", "weights-missing"),
    "A6": _row("global_step* was deleted", "shards-deleted", "zero-latest", "sole-copy"),
    "A7": _row("ranks' files missing or of two runs", "zero-rank-missing", "zero-mixed", "zero-model-file"),
    "A8": _row("ZeRO stages 0 and 1, experts", "training-state", "zero-experts"),
    "A9": _row("consumed N numels out of M", "zero-sizes"),
    "A10": _row("ranks sorted as text", unseen="no fault of a file: ranks are read by their numbers here"),
    "A11": _row("what zero_to_fp32 leaves", "weights-alone", "config-missing", "dtype-differs", "lora-unmerged"),
    "A12": _row("one node's ranks only", "verl-rank-missing", "dcp-file-missing"),
    "A13": _row("fsdp_config.json is missing", "training-state"),
    "A14": _row("huggingface/ without weights", "weights-missing"),
    "A15": _row("torch's distributed checkpoint", "training-state"),
    "A16": _row("Megatron's shards", "megatron-unfinished", "megatron-rank-missing", "megatron-backend"),
    "A17": _row("resumed at another world size", "resume-on"),
    "A18": _row("flat parameters of FSDP", "fsdp-flat", "adapter-named-otherwise"),
    "B1": _row("the head is absent", "head-missing"),
    "B2": _row("the head in a file of its own", "head-dialect", "heads-several", "loader-random"),
    "B3": _row("the head under another name", "head-named-otherwise", "head-dialect", "launch-head-name"),
    "B4": _row("two labels against one", "labels-mismatch", "head-rows", "loader-refuses"),
    "B5": _row("a reward model merged as a language model", "merged-without-head", "head-missing", "launch-role"),
    "B6": _row("an output embedding in a reward model", "output-embedding-in-classifier"),
    "B7": _row("LoRA on the head itself", "head-base-lost"),
    "B8": _row("a head that never learnt", "head-unmoved", "head-untrained"),
    "B9": _row("a bias that has no place", "head-bias", "loader-changes"),
    "B10": _row("a head in a sharded shape", "head-reshaped"),
    "B11": _row("prefixes of trainers' wrappers", "names-of-a-trainer", "head-dialect"),
    "B12": _row("what DeepSpeed-Chat demands", "loader-refuses", "loader-random"),
    "B13": _row("normalisation of rewards lost", "normaliser-lost", "normaliser-broken", "loader-changes"),
    "B14": _row("no pad token in a reward model", "pad-token-missing", "pad-is-eos"),
    "B15": _row("critic and actor of other vocabularies", "pair-tokenizer", "pair-vocabulary"),
    "B16": _row("a reward model that no engine serves", "architecture-openrlhf", "loader-refuses"),
    "C1": _row("adapter keys that are ignored", "adapter-unmatched", "adapter-keys-named"),
    "C2": _row("the merge is the base", "merged-equals-base", "adapter-left-beside", "lora-alpha-zero", "no-op"),
    "C3": _row("unmerged LoRA in a model", "lora-unmerged"),
    "C4": _row("prefixes twice or three times", "names-doubled", "adapter-keys-named"),
    "C5": _row("the adapter's name in its keys", "adapter-keys-named"),
    "C6": _row("an adapter across the renames of transformers", "adapter-unmatched", "adapter-ambiguous"),
    "C7": _row("another base", "base-differs", "adapter-shape"),
    "C8": _row("a quantised base", "base-quantised"),
    "C9": _row("an fp8 or mxfp4 base", "base-quantised", "quantised-incomplete"),
    "C10": _row("LoRA on fused experts", "adapter-fused", "adapter-targets-missing"),
    "C11": _row("arithmetic that mergers get wrong", "adapter-field-unsupported", "adapter-pattern", "adapter-rank"),
    "C12": _row("rounding of a merge", unseen="a merge reports how much of its update survives; no file records it"),
    "C13": _row("modules_to_save and resized embeddings", "adapter-tokens", "adapter-unexpected"),
    "C14": _row("another vocabulary than the base", "vocab-mismatch", "adapter-shape"),
    "C15": _row("the wrong task_type", "task-type-wrong"),
    "C16": _row("a bad path told as an error of the Hub", "launch-path-missing", "several-checkpoints"),
    "C17": _row("adapter_config.json beside merged weights", "adapter-config-stray", "adapter-and-model"),
    "C18": _row("adapters on adapters", unseen="an adapter records one base; which others were below is in no file"),
    "C19": _row("mergers that drop the adapter's own tensors", "merged-without-head", "index-total-size"),
    "D1": _row("_orig_mod.", "names-wrapped"),
    "D2": _row("module., _fsdp_wrapped_module.", "names-wrapped"),
    "D3": _row("a wrapper in `architectures`, or nothing", "architecture-wrapper", "architecture-missing"),
    "D4": _row("multi-modal models' renames", "names-in-memory"),
    "D5": _row("experts fused and one by one", "experts-twice"),
    "D6": _row("untied, and no output embedding", "output-embedding-missing"),
    "D7": _row("tied, and stored twice, equal", "tied-copies"),
    "D8": _row("tied, and stored twice, different", "tied-copies"),
    "D9": _row("tensors share memory on save", unseen="raised by the save; what reaches the disk is `tied-copies`"),
    "D10": _row("the index and the shards disagree", "index-phantom", "index-conflict", "index-unlisted",
                "index-missing", "stale-shards", "weight-sets", "shard-missing", "layers-missing"),
    "D11": _row("a file that is cut short", "file-truncated", "git-lfs-pointer", "being-written"),
    "D12": _row("no format in the metadata", "format-missing"),
    "D13": _row("pickles refused", "pickle-names", "pickled-weights", "weights-wrapped"),
    "D14": _row("NaN and infinite values", "nonfinite"),
    "D15": _row("a dtype that surprises", "dtype-differs", "pair-dtype"),
    "D16": _row("padded vocabularies", "vocabulary-rows", "pair-vocabulary", "tokens-without-rows"),
    "E1": _row("end tokens lost", "end-tokens-lost"),
    "E2": _row("chat template or end token changed", "pair-chat-template", "pair-special-tokens", "end-tokens-lost",
               "tokenizer-broken"),
    "E3": _row("a tokenizer of transformers 5", "tokenizer-of-transformers-5"),
    "E4": _row("rope_parameters read by transformers 4", "rope-of-transformers-5"),
    "E5": _row("rope scaling not carried", "rope-lost"),
    "E6": _row("remote code not copied", "remote-code-missing"),
    "E7": _row("save_pretrained of transformers 5 raises", unseen="no file is written; conversions here do not use it"),
    "E8": _row("a quantisation config that does not fit", "quantisation-left"),
    "F1": _row("out of memory", unseen="of the machine, not of files; plans say their memory beforehand"),
    "F2": _row("slow, without progress", unseen="of the tool, not of files"),
    "F3": _row("half-written output that looks whole", "file-truncated", "shard-missing", "being-written"),
    "F4": _row("a push that loses files", "index-missing", "layers-missing", "head-missing", "download-unfinished"),
    "F5": _row("the source was removed after a success", "shards-deleted"),
}  # fmt: skip
"""By their codes, A1 to F5."""

FROM_USAGE = frozenset({"several-checkpoints"})
"""Codes of errors in what was asked, before any diagnosis runs."""


def covered() -> list[str]:
    """Rows that some code shows."""
    return [name for name, row in ROWS.items() if row.codes]


def table() -> list[str]:
    """The README's table, as Markdown."""
    lines = ["| | failure | codes |", "|---|---|---|"]
    for name, row in ROWS.items():
        codes = ", ".join(f"`{c}`" for c in row.codes) or f"not in files: {row.unseen}"
        lines.append(f"| {name} | {row.title} | {codes} |")
    return lines
