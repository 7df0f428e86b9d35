"""One cause, one finding; and of each finding what to do next, where the diagnosis itself has no command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from converter.converters.heads.detect import head_like
from converter.core.files.names import ADAPTER_CONFIG, GENERATION_CONFIG, MODEL_INDEX
from converter.diagnostic import Again, Command, Next, Steps, is_command
from converter.examine.diagnoses.case import SEVERITIES, Case, Finding
from converter.examine.diagnoses.commands import convert_command, role_word
from converter.families.words import OUTPUT_PREFIXES

_ECHOES: Mapping[str, frozenset[str]] = {
    "fsdp-flat": frozenset({"names-wrapped"}),
    "head-reshaped": frozenset({"labels-mismatch"}),
    "names-in-memory": frozenset({"layers-missing"}),
    "names-of-a-trainer": frozenset({"head-named-otherwise", "head-dialect"}),
    "head-named-otherwise": frozenset({"head-dialect"}),
    "loader-random": frozenset({"head-named-otherwise", "head-dialect"}),
    "loader-changes": frozenset({"head-bias"}),
    "task-type-wrong": frozenset({"adapter-unmatched"}),
    "pickled-weights": frozenset({"stray-weights"}),
    "adapter-and-model": frozenset({"stray-weights"}),
    "tensor-twice": frozenset({"index-conflict"}),
    "launch-same-path": frozenset({"pair-same-path"}),
    "nonfinite": frozenset({"adapter-merge-refused"}),
}
"""By the code that names a cause: codes that the same cause shows itself under as well."""

_SAME_TENSORS = frozenset({"tensors-missing", "tensors-unexpected", "tensors-misshapen"})
_NAMES_THE_HEAD = frozenset({"head-missing", "output-embedding-missing", "head-named-otherwise", "head-dialect",
                             "head-reshaped", "labels-mismatch", "heads-several", "head-base-lost"})  # fmt: skip
_OTHER_NAMES = frozenset({"names-wrapped", "names-of-a-trainer", "names-doubled", "names-in-memory", "experts-twice",
                          "config-unreadable", "architecture-wrapper", "output-embedding-in-classifier",
                          "head-reshaped"})  # fmt: skip
"""Findings about names: what a class asks for is missing under its own, and too much under theirs."""

_OF_LOADERS = frozenset({"loader-random", "loader-refuses", "loader-changes"})
_STOPS = frozenset({"head-missing", "head-base-lost", "zero3-empty-tensors", "tensors-missing", "layers-missing"})
"""Losses that every conversion refuses."""

_UNDER_WAY = frozenset({"file-truncated", "shard-missing", "torch-zip", "torch-not"})
"""What a save that is under way looks like."""


def one_per_cause(findings: Iterable[Finding]) -> list[Finding]:
    """The findings without those that say the same again; a cause is as bad as the worst of what it shows itself as."""
    every = list(findings)
    kept: dict[Finding, Finding] = {f: f for f in every}
    for echo in every:
        causes = [c for c in every if echo.code in _ECHOES.get(c.code, ()) and _explains(c, echo)]
        if causes:
            kept.pop(echo)
            worst = min(causes[0].severity, echo.severity, key=SEVERITIES.index)
            if causes[0] in kept:
                kept[causes[0]] = replace(kept[causes[0]], severity=worst)
    return _said_once([f for f in kept.values() if f.code not in _SAME_TENSORS or not _is_said(f, every)])


def _is_said(finding: Finding, every: Sequence[Finding]) -> bool:
    """True where other findings name every one of its tensors."""
    if not finding.tensors:
        return False
    others = [f for f in every if f.code not in _SAME_TENSORS]
    named = {n for f in others if f.severity != "cosmetic" or f.code in _OTHER_NAMES for n in f.tensors}
    behind = {end for f in others if f.code in _OTHER_NAMES for n in f.tensors for end in _ends(n)}
    heads = [f for f in others if f.code in _NAMES_THE_HEAD and f.severity != "cosmetic"]
    return all(
        n in named or n in behind or (is_of_head(n) and any(_tells_of(f, n) for f in heads)) for n in finding.tensors
    )


def _tells_of(finding: Finding, name: str) -> bool:
    """True where a finding about a head is about this tensor: a trifle about another head explains no missing one."""
    if finding.code == "output-embedding-missing" and name.startswith(OUTPUT_PREFIXES):
        return True
    layer = name.rpartition(".")[0]
    return any(layer in text for text in (finding.text, *finding.evidence, *finding.tensors))


def _ends(name: str) -> list[str]:
    """What a name is without its first words: the model's own, behind a prefix."""
    words = name.split(".")
    return [".".join(words[at:]) for at in range(1, len(words))]


def is_of_head(name: str) -> bool:
    """True for a tensor of a head or an output embedding, by the first word of its name."""
    return bool(head_like([name])) or name.startswith(OUTPUT_PREFIXES)


def _explains(cause: Finding, echo: Finding) -> bool:
    if echo.code in ("names-wrapped", "labels-mismatch"):
        return set(echo.tensors) <= set(cause.tensors)
    if echo.code == "layers-missing":
        return cause.severity == "error"  # both forms lie in the folder: layers are under either
    if echo.code == "adapter-unmatched":
        return echo.fact("missing") == len(cause.tensors)
    if echo.code == "adapter-merge-refused":
        return echo.text.startswith(f"{cause.code}: ")
    return True


def _said_once(findings: list[Finding]) -> list[Finding]:
    """A file that is cut short and a save that is perhaps under way are one fault: the file's."""
    hint = next((f for f in findings if f.code == "being-written" and f.fact("sign") is not None), None)
    cut = next((f for f in findings if f.code in _UNDER_WAY), None)
    if hint is None or cut is None:
        return findings
    then = Steps("wait and look again; if nothing writes there any more, ", cut.next or "copy it again")
    joined = replace(cut, text=f"{cut.text}. It {hint.fact('sign')}", next=then)
    return [joined if f is cut else f for f in findings if f is not hint]


def with_steps(findings: Iterable[Finding], case: Case) -> list[Finding]:
    """Every finding that is not a trifle with a step: its own, the command that runs its fix, or what a person does."""
    every = list(findings)
    lost = next((f for f in every if f.severity == "error" and f.recoverability == "lost" and f.code in _STOPS), None)
    if lost is not None:
        every = [_after(lost, f) for f in every]
    return [replace(f, next=_step(f, case)) if _lacks_step(f) else f for f in every]


def _after(lost: Finding, finding: Finding) -> Finding:
    """A loader's verdict without its conversion, which would be refused for what is lost."""
    if finding.code not in _OF_LOADERS or not is_command(finding.next):
        return finding
    return replace(finding, recoverability="", next=f"nothing converts it without what {lost.code} says is lost")


def _lacks_step(finding: Finding) -> bool:
    return finding.code in ("index-conflict", "pickled-weights") or (
        finding.next is None and finding.severity != "cosmetic"
    )


def _step(finding: Finding, case: Case) -> Next | None:
    if finding.fix and finding.applicability == "safe" and finding.recoverability != "lost":
        return case.repair()
    known = _STEPS.get(finding.code)
    return known(finding, case) if callable(known) else known


def _again(finding: Finding, case: Case) -> str:
    return f"copy or download {finding.evidence[0] if finding.evidence else 'the file'} again"


def _restored(finding: Finding, case: Case) -> Next:
    file = finding.evidence[0] if finding.evidence else "the file"
    if finding.text.startswith(f"{file}: ") and "begins with a byte order mark" in finding.text:
        words = ("-i", r"1s/^\xEF\xBB\xBF//", f"{case.folder.rstrip('/')}/{file}")
        return Steps("take the mark away: ", Command("", words, program="sed"))
    if file == ADAPTER_CONFIG:
        return f"copy {file} from another checkpoint of the run"
    return f"copy {file} from the base model or from another checkpoint of the run"


def _index_moved(finding: Finding, case: Case) -> Next:
    """The command that puts a wrong index aside, after which a new one is made from the headers."""
    name = finding.evidence[0] if finding.evidence else MODEL_INDEX
    index = f"{case.folder.rstrip('/')}/{name}"
    return Steps(_move(index, f"{index}.old"), case.repair())


def _move(file: str, to: str) -> Command:
    return Command("", (file, to), program="mv")


def _named_rightly(finding: Finding, case: Case) -> Next | None:
    """The command that gives the only weight file the name that transformers reads."""
    file = finding.fact("file")
    if file is None:
        return finding.next
    folder = case.folder.rstrip("/")
    return _move(f"{folder}/{file}", f"{folder}/pytorch_model.bin")


def _ends_copied(finding: Finding, case: Case) -> Next | None:
    if case.base is None:
        return None
    name = GENERATION_CONFIG
    source, out = f"{case.base.folder.rstrip('/')}/{name}", f"{case.folder.rstrip('/')}/{name}"
    return Command("", (source, out), program="cp")


def _which_head(finding: Finding, case: Case) -> Next:
    if not finding.tensors:
        return "move the file that is not meant out of the folder"
    return convert_command(case, role_word(case), None, "--from", "DIALECT")


def _merged_again(finding: Finding, case: Case) -> Next:
    near = next((n.argument for n in case.near if n.kind == "adapter"), "ADAPTER")
    base = ("--base", case.base.folder) if case.base is not None else ()
    return Command("merge-lora", (near, case.out("merged"), *base))


def _of_base(what: str) -> Callable[[Finding, Case], str]:
    def step(finding: Finding, case: Case) -> str:
        return f"copy {what} from {case.base.asked if case.base is not None else 'the base model'}"

    return step


def _of_source(finding: Finding, case: Case) -> str:
    return f"copy mean and std {finding.recoverability}/config.json into this config.json"


def _compared(finding: Finding, case: Case) -> Next:
    aim = ("--for", case.target) if case.target else ()
    return Steps("compare rewards: ", Command("verify", (case.folder, *aim, "--against", "SRC", "--probe", "FILE")))


_ANOTHER = "take another checkpoint of the run; nothing in this folder brings the values back"
_SHARDS = "look for the run's shards (global_step*), which `gather` reads, or train it again"
_SAVED_AGAIN = "save the adapter again with PEFT, from the run that trained it"
_OF_ONE_SAVE = "take the files of one save: copy the folder again from where it was written"
_WITH_TRAINER = "convert it with the trainer that wrote it"

_STEPS: Mapping[str, Next | Callable[[Finding, Case], Next | None]] = {
    **dict.fromkeys(
        ("safetensors-header", "safetensors-not", "torch-zip", "torch-not", "pickle-malformed", "zero-malformed",
         "dcp-malformed", "dcp-record", "verl-malformed", "megatron-malformed"), _again,
    ),
    **dict.fromkeys(("config-unreadable", "config-refused", "json-malformed"), _restored),
    **dict.fromkeys(("zero-mixed", "zero-sizes", "verl-mixed", "verl-sizes", "dcp-chunks",
                     "megatron-mixed", "megatron-copies"), _OF_ONE_SAVE),
    **dict.fromkeys(("no-tensors", "adapter-empty", "weights-missing", "shards-deleted", "head-missing",
                     "head-base-lost", "fsdp-flat", "adapter-half", "layers-missing"), _SHARDS),
    **dict.fromkeys(("no-op", "zero-tensors", "suspicious-values", "copied-tensors", "zero-latest", "verl-latest",
                     "megatron-unfinished"), _ANOTHER),
    **dict.fromkeys(("adapter-incomplete", "adapter-unexpected", "adapter-tokens", "adapter-bias"), _SAVED_AGAIN),
    **dict.fromkeys(("verl-placement", "dcp-no-model", "dcp-several-models", "dcp-transformed",
                     "megatron-backend", "dcp-adapter-names", "adapter-fused"), _WITH_TRAINER),
    **dict.fromkeys(("index-malformed", "index-conflict"), _index_moved),
    "pickled-weights": _named_rightly,
    "tensor-twice": "keep the file that is of this save, and move the other out of the folder",
    "input-unreadable": "ask whoever owns the file for the right to read it",
    "input-not-a-file": "copy the file itself into the folder",
    "remote-code-missing": _of_base("those files, once you have read them,"),
    "quantised-incomplete": "get the file again, from where the quantised model was made",
    "tokenizer-broken": _of_base("the tokenizer's files"),
    "tokens-without-rows": "take the tokenizer and the weights of one checkpoint; or resize the embedding and train on",
    "quantisation-left": "take quantization_config out of config.json",
    "rope-lost": _of_base("rope_scaling (rope_parameters in transformers 5) of config.json"),
    "end-tokens-lost": _ends_copied,
    "output-embedding-missing":
        "set tie_word_embeddings to true in config.json if the base model ties them; else save or merge it again",
    "heads-several": _which_head,
    "normaliser-broken": "set mean and std in config.json to one number each, or take both out",
    "normaliser-lost": _of_source,
    "nonfinite": "take an earlier checkpoint; if a merge overflowed, merge again with --dtype bf16",
    **dict.fromkeys(("moments-nonfinite", "moments-zero", "moments-older", "optimizer-damaged"),
                    "go on from a checkpoint whose moments are sound, or knowingly with a new optimizer; gather reads "
                    "the weights as they are"),
    "head-unmoved": "train the head: it has to be in modules_to_save or require gradients, and be gathered on saving",
    "merged-equals-base": _merged_again,
    "adapter-config": "set what it names in adapter_config.json to what training used",
    "adapter-rank": "copy adapter_config.json from the run that wrote these tensors",
    "adapter-targets-missing": _SAVED_AGAIN,
    "adapter-pattern": "write the pattern in adapter_config.json as a plain regular expression",
    "adapter-field-unsupported": "merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()",
    "adapter-merge-refused": "merge it with PEFT itself: PeftModel.from_pretrained(...).merge_and_unload()",
    "adapter-ambiguous": _SAVED_AGAIN,
    "peft-type-unmergeable": "load it beside its base with PEFT: PeftModel.from_pretrained(base, adapter)",
    "head-class": Steps("name the base whose class has that head: ", Again(("--base", "DIR"))),
    "head-incomplete": _SHARDS,
    "tied-copies-differ": Steps("fix the base first: ", Command("doctor", ("BASE", "--deep"))),
    "experts-twice": "move the files of one save out of the folder",
    "pair-tokenizer": "train the critic from a model with the actor's tokenizer; a reward model may get texts instead",
    "pair-vocabulary": "start both from models with one vocabulary",
    "pair-special-tokens": "set it in config.json to what the actor has, if training used that",
    "launch-path-missing": "fix the path in the script, or run it where the folder is",
    "launch-role": "name a folder with a reward head in the script, and a language model as the actor",
    "launch-lora": "set it in the script to what adapter_config.json says",
    "loader-changes": _compared,
}  # fmt: skip
"""What follows a finding that has no command of its own: words, or what makes them."""


def commands_of(findings: Sequence[Finding]) -> list[Next]:
    """Commands to type next; those of trifles only where there is nothing worse, since they write to the same place."""
    worst = min((SEVERITIES.index(f.severity) for f in findings), default=0)
    limit = max(worst, SEVERITIES.index("changes-numbers"))
    found = [f for f in findings if SEVERITIES.index(f.severity) <= limit]
    return list(dict.fromkeys(f.next for f in found if f.next and is_command(f.next)))
