"""What the loader of the trainer that `--for` names does with a folder: accept it, refuse it, or begin at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from converter.converters.heads.config import class_name
from converter.converters.heads.model import Linear, Reading
from converter.converters.heads.read import read
from converter.core.context import Context
from converter.diagnostic import Command, Severity
from converter.dialects.known import Target
from converter.dialects.spec import Role
from converter.errors import ConvertError, Refused, UsageError
from converter.examine.diagnoses.aims import aim, is_transformers_4, roles_of
from converter.examine.diagnoses.case import HERE, Case, Finding, diagnosis
from converter.examine.diagnoses.commands import convert_command, role_word
from converter.examine.diagnoses.config import architecture, label_count
from converter.examine.diagnoses.heads import dialect_of, heads_here, wanted_head
from converter.examine.diagnoses.whole import is_read_whole
from converter.families.family import family
from converter.text import fold, show


@dataclass
class _Verdict:
    """What one loader does in one role: each kind of trouble with its sentences.

    `is_meant` is False where the folder is a language model, which is an actor unless somebody says otherwise.
    """

    aim: Target | None
    role: Role
    is_meant: bool = True
    random: list[str] = field(default_factory=list)
    refuses: list[str] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    accepts: str = ""
    drops_bias: bool = False


def _verdicts(case: Case) -> list[_Verdict]:
    """One for each role that the folder may be used in; computed once."""
    return case.once("loader", lambda c: list(_judge(c)))


def _judge(case: Case) -> Iterator[_Verdict]:
    if case.target is None or is_transformers_4(case.target):
        return
    if case.kind in ("model", "adapter") and not is_read_whole(case):
        return  # what a loader says to a file that is cut is known; what it would say to the whole one is not
    seen = set()
    roles = _roles(case)
    is_said = case.launch is not None and bool(case.launch.roles_of(case.root))
    for role in roles:
        is_meant = is_said or role == "actor" or "actor" not in roles
        try:
            target = aim(case.target, role)
        except UsageError:
            continue
        except Refused as error:
            yield _Verdict(None, role, is_meant, refuses=[error.what])
            continue
        if (target.dialect.name, target.serves.labels) not in seen:
            seen.add((target.dialect.name, target.serves.labels))
            yield _of(case, target, is_meant=is_meant)


def _roles(case: Case) -> list[Role]:
    """The roles that a script says, else that a head suggests: a model without one is an actor first."""
    offered = roles_of(case.trainer)
    if case.launch is not None and (said := [r for r in case.launch.roles_of(case.root) if r in offered]):
        return said
    is_language_model = case.kind == "model" or (
        case.kind == "adapter" and case.adapter_config.get("task_type") == "CAUSAL_LM"
    )
    has_head = not is_language_model or bool(heads_here(case) or wanted_head(case))
    if "critic" in offered and role_word(case) == "critic":
        return ["critic"]
    heads: list[Role] = [r for r in offered if r != "actor"]
    return heads if has_head and heads else list(offered)


def _of(case: Case, target: Target, *, is_meant: bool) -> _Verdict:
    verdict = _Verdict(target, target.role, is_meant)
    if case.kind in ("training", "run", "unread"):
        verdict.refuses.append(f"{target.words} loads model folders, and these are a trainer's shards")
    elif case.kind == "weights":
        verdict.refuses.append(f"{target.words} needs a config.json beside the weights")
    elif case.kind == "adapter":
        _adapter(case, target, verdict)
    elif target.role == "actor":
        verdict.accepts = f"{target.words} reads it as an actor"
    else:
        _model(case, target, verdict)
    return verdict


def _adapter(case: Case, target: Target, verdict: _Verdict) -> None:
    if target.serves.leaves_heads:
        if target.role == "actor":
            verdict.accepts = f"{target.words} reads the adapter with its base, as an actor"
        else:
            text = f"{target.words} puts the LoRA on its base"
            verdict.random.append(f"{text}, and with transformers 5.15 leaves out the adapter's head (5.23 reads it)")
        return
    if not target.serves.reads_adapters:
        verdict.refuses.append(f"{target.words} loads whole models here: the adapter has to be merged into its base")
        return
    spec = target.dialect.head_of(target.role)
    files = () if spec is None else tuple(f for f in (spec.file, *spec.files) if f is not None)
    if files and not any(f in case.names for f in files) and target.role != "actor":
        verdict.random.append(f"{target.words} looks for {fold(files)} beside the adapter; without it: {spec_of(spec)}")
    else:
        verdict.accepts = f"{target.words} reads the adapter with its base"


def spec_of(spec: object) -> str:
    """What a loader does where the head is missing, in the dialect's words."""
    return str(getattr(spec, "missing", "random"))


def _model(case: Case, target: Target, verdict: _Verdict) -> None:
    _files(case, target, verdict)
    spec = target.dialect.head_of(target.role)
    if spec is None:
        return
    try:
        reading = read(case.checkpoint, target.dialect, Context(frozenset({"head-reshaped"})))
    except ConvertError as error:
        other = dialect_of(case)
        whose = f". The head here is {other.dialect.about}'s" if other is not None else ""
        text = f"{error.what}{whose}. {target.words}: {spec.missing}"
        kind = verdict.random if error.code == "head-missing" and "an error" not in spec.missing else verdict.refuses
        kind.append(text)
        return
    _head(case, target, reading, verdict)
    _config(case, target, verdict)
    empty = [n for n, t in case.shapes.items() if t.shape == (0,) and n not in reading.stored]
    if empty:
        verdict.refuses.append(f"{len(empty)} tensors are empty: {target.words} stops at their sizes")
    if not (verdict.refuses or verdict.random or case.survey.error()):
        verdict.accepts = f"{target.words} reads {fold(reading.stored)} as the head of a {target.role} model"


def _files(case: Case, target: Target, verdict: _Verdict) -> None:
    dialect = target.dialect
    if dialect.container == "torch" and case.checkpoint.origin.stored_format == "safetensors":
        verdict.refuses.append(f"{target.words} reads pytorch_model.bin alone, and the weights are safetensors")
    if dialect.one_file and len(case.survey.files) > 1:
        verdict.refuses.append(f"{target.words} reads no sharded folder, and there are {len(case.survey.files)} files")
    if dialect.subfolder and not (case.root / dialect.subfolder).is_dir():
        verdict.refuses.append(f"{target.words} looks for weights in {dialect.subfolder}/, which isn't there")


def _head(case: Case, target: Target, reading: Reading, verdict: _Verdict) -> None:
    head = reading.head
    if head is None:
        return
    names = fold(reading.stored)
    if any(t.info.numel == 0 for t in reading.stored.values()):
        verdict.refuses.append(f"{names} is empty: {target.words} stops at the sizes")
    elif head.rows != 1 and not target.serves.labels:
        verdict.refuses.append(f"{names} has {head.rows} rows, and {target.words} builds one: it stops at the sizes")
    spec = target.dialect.head_of(target.role)
    keeps = spec is not None and (spec.bias == "always" or (spec.bias == "config" and bool(case.config.get("bias"))))
    if isinstance(head, Linear) and head.bias is not None and not keeps:
        verdict.changes.append(f"{target.words} has no bias and ignores this head's: every score shifts by it")
        verdict.drops_bias = True
    if reading.normaliser is not None and not target.serves.keeps_mean and target.dialect.normaliser == "mean-std":
        text = f"{target.words} reads {reading.normaliser.keys} from uninitialised memory under transformers 5"
        verdict.changes.append(f"{text}: leave normalisation off, or fold it into the head with `convert`")


def _config(case: Case, target: Target, verdict: _Verdict) -> None:
    rules, serves = target.dialect.config, target.serves
    try:
        wanted = class_name(rules, family(case.config), target)
    except ConvertError as error:
        verdict.refuses.append(error.what)
        return
    said = architecture(case)
    if serves.goes_by_class and said != wanted:
        text = f"architectures says {show(said) or 'nothing'}, not {wanted}: {target.words} {serves.goes_by_class}"
        verdict.refuses.append(text)
    if rules.labels and not serves.sets_labels and label_count(case.config) != 1 and not serves.labels:
        text = f"config.json says {label_count(case.config)} labels, and {target.words} needs one"
        verdict.refuses.append(text)
    odd = [key for key in rules.drops if key in case.config]
    verdict.refuses += [f"{key} must not be in config.json for {target.words}" for key in odd]
    if rules.pad and case.config.get("pad_token_id") is None:
        verdict.changes.append(f"{target.words} finds the scored token by pad_token_id, and config.json has none")


def _command(case: Case, verdict: _Verdict) -> Command:
    """What makes a folder that this loader accepts; from shards at hand, where the head is nowhere else."""
    places = [] if case.kind != "model" or heads_here(case) else case.training_near()
    more = ("--weights-from", places[0].argument) if places else ()
    if verdict.drops_bias:
        more = (*more, "--bias", "drop")
    return convert_command(case, verdict.role, None, *more)


def _findings(case: Case, code: str, severity: Severity, which: str, lead: str) -> Iterable[Finding]:
    for verdict in _verdicts(case):
        texts: list[str] = getattr(verdict, which)
        if texts:
            can_read = verdict.aim is not None
            worst: Severity = severity if verdict.is_meant else "cosmetic"
            yield Finding(
                code=code, severity=worst, text=f"as {verdict.role}: {lead}{'; '.join(texts)}", evidence=(),
                recoverability=HERE if can_read and which != "random" else "",
                fix=("remap-head",) if can_read else (),
                next=_command(case, verdict) if can_read else None,
            )  # fmt: skip


@diagnosis("loader-random")
def loader_random(case: Case, context: Context) -> Iterable[Finding]:
    """The loader of the trainer that --for names does not find the head of this folder, and begins with a RANDOM one:
    no error, a warning at most. Training runs, and its rewards or values mean nothing. `convert` writes the folder as
    this trainer reads it.
    """
    return _findings(case, "loader-random", "error", "random", "SILENTLY RANDOM. ")


@diagnosis("loader-refuses")
def loader_refuses(case: Case, context: Context) -> Iterable[Finding]:
    """The loader of the trainer that --for names stops at this folder, or takes it for something else: another
    container, shards, an adapter that is not merged, other rows than it builds. `convert` writes what it reads.
    """
    return _findings(case, "loader-refuses", "error", "refuses", "refused. ")


@diagnosis("loader-changes")
def loader_changes(case: Case, context: Context) -> Iterable[Finding]:
    """The trainer that --for names loads this folder, and scores come out otherwise than where it was trained: it has
    no place for a bias or a normalisation, or finds the scored token in another way.
    """
    return _findings(case, "loader-changes", "changes-numbers", "changes", "")


@diagnosis("loader-accepts")
def loader_accepts(case: Case, context: Context) -> Iterable[Finding]:
    """The trainer that --for names reads this folder as it is. What goes wrong with that trainer all the same, though
    its files are right, is listed.
    """
    for verdict in _verdicts(case):
        if verdict.accepts and verdict.aim is not None:
            launch = verdict.aim.serves.launch_line(case.folder)
            traps = verdict.aim.traps[:3]
            yield Finding(
                code="loader-accepts", severity="cosmetic", text=verdict.accepts, evidence=traps, next=launch or None
            )
