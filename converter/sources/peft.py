"""PEFT adapter folders: adapter_config.json with adapter_model.safetensors."""

from __future__ import annotations

from pathlib import Path

from converter.checkpoint import Checkpoint
from converter.errors import Refused, show
from converter.files import read_limited
from converter.safetensors_io import Header, read_header
from converter.sources.hf import lazy, origin, parse_config
from converter.side_files import find_side_files
from converter.sources.survey import Fault, StoredTensor, Survey, empty_tensors
from converter.strict_json import MAX_JSON_BYTES

WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CONFIG = "adapter_config.json"


class PeftSource:
    """An adapter in PEFT's format."""

    name = "peft"

    def detect(self, root: Path) -> str | None:
        """Why a folder is an adapter, or None."""
        found = [n for n in (CONFIG, WEIGHTS, PICKLED) if (root / n).exists()]
        return f"{found[0]} is there" if found else None

    def survey(self, root: Path) -> Survey:
        """The adapter's tensors and faults; content never raises."""
        return _read(root)[0]

    def open(self, root: Path, *, asked: str, revision: str | None = None, keep_code: bool = False) -> Checkpoint:
        """The adapter, by its header.

        Raises:
            Refused: no config, no or pickled weights, empty tensors, a broken file.
        """
        survey, header = _read(root)
        error = survey.error()
        if error is not None:
            raise error
        assert header is not None
        config_bytes = read_limited(root / CONFIG, limit=MAX_JSON_BYTES, root=root)
        side_files, identities = find_side_files(root, keep_code=keep_code)
        identities[str((root / WEIGHTS).absolute())] = header.identity
        return Checkpoint(
            tensors=lazy(survey),
            config=parse_config(config_bytes, root / CONFIG),
            origin=origin("adapter", root, asked, revision, {WEIGHTS: header}),
            side_files=side_files,
            shards=dict.fromkeys(survey.entries, WEIGHTS),
            config_bytes=config_bytes,
            metadata=header.metadata,
            inputs=identities,
        )


def _read(root: Path) -> tuple[Survey, Header | None]:
    survey = Survey(root)
    where = show(root)
    header = None
    if not (root / CONFIG).is_file():
        text = f"{WEIGHTS} is there and {CONFIG} is not: rank and alpha are unknown"
        next_step = "copy adapter_config.json from the training run's folder into it"
        survey.faults.append(Fault("adapter-config-missing", "error", text, where, next_step))
    if not (root / WEIGHTS).exists():
        survey.faults.append(_no_weights(root))
        return survey, None
    try:
        header = read_header(root / WEIGHTS, root=root)
    except Refused as error:
        text = error.what + (f" (expected {error.expected}, got {error.got})" if error.expected else "")
        survey.faults.append(Fault(error.code, "error", text, error.where or where, error.next))
        return survey, None
    path = str((root / WEIGHTS).absolute())
    survey.files[WEIGHTS] = header.file_size
    survey.entries = {
        name: StoredTensor(info, path, header.data_start + begin) for name, (info, begin, _) in header.tensors.items()
    }
    empty = [n for n, e in survey.entries.items() if e.info.numel == 0]
    if empty:
        survey.faults.append(empty_tensors(empty, len(survey.entries), show(root / WEIGHTS)))
    if not survey.entries:
        text = "the file holds no tensor: the adapter was saved from the wrong process or at the wrong time"
        survey.faults.append(Fault("adapter-empty", "error", text, show(root / WEIGHTS)))
    return survey, header


def _no_weights(root: Path) -> Fault:
    if (root / PICKLED).exists():
        text = f"the adapter's weights are pickled ({PICKLED}); this version reads {WEIGHTS} only"
        return Fault("pickled-weights", "error", text, show(root), "save it with save_pretrained(..., safe_serialization=True)")
    return Fault("weights-missing", "error", f"{CONFIG} is there and {WEIGHTS} is not", show(root))


SOURCE = PeftSource()
