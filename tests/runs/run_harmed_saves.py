"""Saved runs with a harm done to them: each verb refuses or is right, and doctor names what it is. Slow.

    python tests/runs/run_harmed_saves.py SAVED                every file of every run below SAVED, harmed in every way
    python tests/runs/run_harmed_saves.py SAVED --draw 300     some of them, drawn; --from is where the drawing begins

SAVED has runs as the scripts here save them, with `fixture.json` and `oracle.safetensors`; a run of the same name below
SAVED/later is the same training at a later step, whose files take the place of a run's own, and one in SAVED/larger the
same on more ranks, whose files were left behind. Exits with 1 where a verb gives other weights, masters or moments than
those that lived, or where doctor is silent about what a verb refuses.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
RANKS = re.compile(r"-n\d+$")
OURS = ("fixture.json", "oracle.safetensors", "losses.json", "config.json", "adapter_config.json", "error.txt")
RANK = re.compile(r"(?<=zero_pp_rank_)\d+|(?<=^__)\d+|(?<=rank)\d+|(?<=rank_)\d+")


@dataclass(frozen=True)
class Harm:
    """What is done to a file of a run, by its path in the run; None where it can't be."""

    name: str
    do: Callable[[Path, Path, Path], bool]


def _missing(path: Path, run: Path, later: Path) -> bool:
    path.unlink()
    return True


def _empty(path: Path, run: Path, later: Path) -> bool:
    os.truncate(path, 0)
    return True


def _half(path: Path, run: Path, later: Path) -> bool:
    os.truncate(path, path.stat().st_size // 2)
    return True


def _like(path: Path) -> list[Path]:
    """Files of the same kind beside a file."""
    kind = RANK.sub("N", path.name)
    return sorted(p for p in path.parent.iterdir() if p != path and p.is_file() and RANK.sub("N", p.name) == kind)


def _exchanged(path: Path, run: Path, later: Path) -> bool:
    others = [p for p in _like(path) if p.read_bytes() != path.read_bytes()]
    if not others:
        return False
    aside = path.with_name("aside")
    path.rename(aside)
    others[0].rename(path)
    aside.rename(others[0])
    return True


def _renamed(path: Path, run: Path, later: Path) -> bool:
    """The number of a rank that there isn't."""
    if RANK.search(path.name) is None:
        return False
    path.rename(path.with_name(RANK.sub(str(len(_like(path)) + 1), path.name, count=1)))
    return True


def _copied(path: Path, run: Path, later: Path) -> bool:
    """A rank's file in the place of another's too."""
    others = [p for p in _like(path) if p.read_bytes() != path.read_bytes()]
    if others:
        shutil.copy(others[-1], path)
    return bool(others)


def _of_later(path: Path, run: Path, later: Path) -> bool:
    """The file of a later step."""
    other = later / path.relative_to(run)
    if not other.is_file() or other.read_bytes() == path.read_bytes():
        return False
    shutil.copy(other, path)
    return True


HARMS = (
    Harm("missing", _missing), Harm("empty", _empty), Harm("half", _half), Harm("exchanged", _exchanged),
    Harm("renamed", _renamed), Harm("copied", _copied), Harm("later", _of_later),
)  # fmt: skip


def _rename_latest(text: bytes) -> Callable[[Path, Path, Path], bool]:
    """`latest` says something else; `{}` is the name that it had."""

    def do(run: Path, _: Path, later: Path) -> bool:
        found = [p for p in (run / "latest", run / "latest_universal") if p.is_file()]
        for path in found:
            path.write_bytes(text.replace(b"{}", path.read_bytes()))
        return bool(found)

    return do


def _half_latest(run: Path, _: Path, later: Path) -> bool:
    """`latest` ends within a name, of which there is a folder too: `global_step2` and `global_step20`."""
    path = run / "latest"
    if not path.is_file() or not (later / path.read_text()).is_dir():
        return False
    tag = path.read_text()
    shutil.copytree(later / tag, run / f"{tag}0")
    path.write_text(tag[:-1])
    return True


def _all_later(*words: str) -> Callable[[Path, Path, Path], bool]:
    """All files with one of these words in their names are of a later step."""

    def do(run: Path, _: Path, later: Path) -> bool:
        found = [p for p in files_of(run) if any(w in p.name for w in words)]
        others = [p for p in files_of(run) if p not in found and p.name not in ("latest", "latest_universal")]
        changed = [_of_later(p, run, later) for p in found]
        return any(changed) and bool(others)

    return do


def _over_larger(first: int | None, words: str = "") -> Callable[[Path, Path, Path], bool]:
    """The run was saved over one of more ranks, whose files remain; or only ranks below `first` had been written."""

    def do(run: Path, _: Path, later: Path) -> bool:
        larger = next((later.parents[1] / "larger").glob(RANKS.sub("-n*", run.name)), None)
        if larger is None:
            return False
        for path in files_of(larger):
            own = run / path.relative_to(larger)
            rank = RANK.search(path.name)
            is_old = first is not None and rank is not None and int(rank[0]) >= first and words in path.name
            if not own.exists() or is_old:
                own.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, own)
        return True

    return do


def _without_a_parameter(run: Path, _: Path, later: Path) -> bool:
    """A universal checkpoint without the folder of one parameter."""
    folders = sorted(p.parent for p in run.rglob("fp32.pt"))
    if folders:
        shutil.rmtree(folders[len(folders) // 2])
    return bool(folders)


def _parameter_of_later(run: Path, _: Path, later: Path) -> bool:
    """A universal checkpoint with the folder of one parameter, masters and moments, of a later step."""
    folders = sorted(p.parent for p in run.rglob("fp32.pt"))
    changed = [_of_later(p, run, later) for f in folders[len(folders) // 2 :][:1] for p in f.iterdir()]
    return any(changed)


WHOLE = (
    Harm("latest empty", _rename_latest(b"")),
    Harm("latest blank", _rename_latest(b" \n")),
    Harm("latest with a newline", _rename_latest(b"{}\r\n")),
    Harm("latest with a mark of its order of bytes", _rename_latest(b"\xef\xbb\xbf{}")),
    Harm("latest in UTF-16", _rename_latest("global_step2".encode("utf-16"))),
    Harm("latest outside", _rename_latest(b"../{}")),
    Harm("latest absolute", _rename_latest(b"/tmp")),
    Harm("latest of zeros", _rename_latest(b"\0" * 12)),
    Harm("latest half", _half_latest),
    Harm("optimizers later", _all_later("optim")),
    Harm("models later", _all_later("model_states", "model_world", "pytorch_model")),
    Harm("metadata later", _all_later(".metadata")),
    Harm("pieces later", _all_later(".distcp")),
    Harm("over larger", _over_larger(None)),
    Harm("over larger, rank 0 alone written", _over_larger(1)),
    Harm("over larger, optimizers of rank 0 alone written", _over_larger(1, "optim")),
    Harm("over larger, models of rank 0 alone written", _over_larger(1, "model")),
    Harm("parameter missing", _without_a_parameter),
    Harm("parameter later", _parameter_of_later),
)
"""What is done to a run as a whole."""


def files_of(run: Path) -> list[Path]:
    """What the trainer wrote that somebody reads."""
    return sorted(p for p in run.rglob("*") if p.is_file() and p.name not in OURS and not p.name.endswith(".py"))


def runs_below(saved: Path) -> list[Path]:
    return sorted(p.parent for p in saved.glob("*/fixture.json") if (p.parent / "oracle.safetensors").is_file())


def tries(saved: Path) -> Iterator[tuple[Path, Path, Harm]]:
    """Each run with each harm to the whole of it, and each of its files with each harm to a file."""
    for run in runs_below(saved):
        yield from ((run, Path(), harm) for harm in WHOLE)
        for file in files_of(run):
            for harm in HARMS:
                yield run, file.relative_to(run), harm


def named(run: Path) -> set[str]:
    """Codes of what doctor says is wrong, with where."""
    from converter.errors import ConvertError
    from converter.examine.doctor import DoctorRequest, examine

    try:
        report = examine(DoctorRequest(str(run)))
    except ConvertError as error:
        return {error.code}
    return {f.code for f in report.findings if f.severity != "cosmetic"}


def gathered(run: Path) -> list[str]:
    """What differs between what is read and what lived."""
    from converter.sources.finding import sources
    from dcp import compare as dcp
    from lived import facts, live
    from zero import compare as zero

    kind = kind_below(run)
    if kind in ("dcp", "lightning") and facts(run).get("layout") == "lightning":  # the module has the model as `model`
        found = zero.evaluated(sources()[kind].open(run, asked=run.name).tensors)
        return zero.differences({n.removeprefix("model."): t for n, t in found.items()}, live(run))
    if kind == "dcp":
        return without_moments(run, dcp.faults)
    if kind not in ("deepspeed", "deepspeed_universal"):
        from converter.errors import UsageError

        raise UsageError("no-shards", f"nothing is recognised here ({kind})")
    return zero.faults(run)


def without_moments(run: Path, compare: Callable[[Path], list[str]]) -> list[str]:
    """What differs, where a run that lost its optimizer's whole state is one that was saved without."""
    from converter.errors import ConvertError

    try:
        return compare(run)
    except ConvertError as error:
        if error.code != "dcp-no-moments":
            raise
        return []


def kind_below(run: Path) -> str | None:
    """The source of what lies in a run's folder or below."""
    from converter.recipe.verbs.run_state import place_of
    from converter.sources.finding import kind_of

    return kind_of(place_of(run, str(run), tag=None, part=None)[0].folder)


def resharded(run: Path) -> list[str] | None:
    """The same of what `reshard` writes; None where it has nothing to do."""
    from converter import reshard_state

    kind = kind_below(run)
    asked: list[dict[str, object]] = [{"to": "full"}, {"to": "sharded"}] if kind == "dcp" else []
    if kind in ("deepspeed", "deepspeed_universal"):
        asked = [{"world_size": 3}]
    from converter.errors import ConvertError

    for words in asked:
        with tempfile.TemporaryDirectory(dir=run.parent) as place:
            out = Path(place) / "out"
            try:
                reshard_state(run, out, **words)  # type: ignore[arg-type]
            except ConvertError as error:
                if error.code in ("usage", "reshard-kind", "reshard-any-ranks"):
                    continue
                raise
            for name in OURS:
                if (run / name).is_file():
                    shutil.copy(run / name, out)
            return gathered(out)
    return None


def outcome(work: Callable[[], list[str] | None]) -> str:
    """`equal`, `WRONG ...`, `refused CODE`, `none` or `CRASH ...`."""
    from converter.errors import ConvertError

    try:
        found = work()
    except ConvertError as error:
        return f"refused {error.code}"
    except Exception as error:
        return f"CRASH {type(error).__name__}: {error}"
    return "none" if found is None else f"WRONG {'; '.join(found[:2])}" if found else "equal"


def harmed(run: Path, later: Path, file: Path, harm: Harm, before: set[str]) -> tuple[str, str, str] | None:
    """What gather and reshard do, and what doctor says of it; None where the harm can't be done."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(run, Path(place) / run.name))
        if not harm.do(copy / file, copy, later):
            return None
        said = named(copy) - before
        return outcome(lambda: gathered(copy)), outcome(lambda: resharded(copy)), ", ".join(sorted(said))


def verdict(gather: str, reshard: str, doctor: str) -> str:
    """Empty where all is well, else why not; what changes nothing that is read is `harmless`."""
    both = (gather, reshard)
    if any(w.startswith(("WRONG", "CRASH")) for w in both):
        return "BAD"
    if any(w.startswith("refused") for w in both) and not doctor:
        return "SILENT"
    return "" if doctor else "harmless"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path)
    parser.add_argument("--draw", type=int)
    parser.add_argument("--from", dest="seed", type=int, default=0)
    parser.add_argument("--only", default="", help="runs with this in their names")
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args()
    whole: dict[Path, set[str]] = {}
    left_out: set[Path] = set()
    counted: Counter[str] = Counter()
    every = [t for t in tries(given.saved) if given.only in t[0].name]
    if given.draw is not None:
        every = random.Random(given.seed).sample(every, min(given.draw, len(every)))
    for run, file, harm in every:
        if run not in whole:
            whole[run] = named(run)
            state = outcome(lambda run=run: gathered(run)), outcome(lambda run=run: resharded(run))
            if state[0] != "equal" or state[1] not in ("equal", "none"):
                print(f"{run.name}: unharmed: gather {state[0]}, reshard {state[1]}; doctor {whole[run]}", flush=True)
                left_out.add(run)
        if run in left_out:
            continue
        found = harmed(run, given.saved / "later" / run.name, file, harm, whole[run])
        if found is None:
            continue
        said = verdict(*found)
        counted[said or "named"] += 1
        if said in ("BAD", "SILENT") or given.verbose or said == "harmless":
            print(f"{said:<9}{run.name}: {file} {harm.name}: gather {found[0]}; reshard {found[1]}; doctor {found[2]}")
    print(dict(counted))
    return 1 if counted["BAD"] or counted["SILENT"] else 0


if __name__ == "__main__":
    sys.exit(main())
