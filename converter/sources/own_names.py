"""Ranks' files under the names of other ranks: exchanged, renamed, or copied over one another.

torch.save calls the archive inside a file as it was told to call the file, and neither a copy nor a new name changes
that. Pieces that record no rank of their own (partitions of ZeRO, flat parameters of FSDP) tell nothing else by which
an exchange of equally long ones could be seen.

Source: https://github.com/pytorch/pytorch/blob/v2.13.0/caffe2/serialize/inline_container.cc (`PyTorchStreamWriter`)
"""

from __future__ import annotations

import re
from pathlib import PurePath

from converter.text import show

OWN_NAMES = "copy the files again from where they were written, or give each the name that it was saved under"
_NUMBER = re.compile(r"[0-9]+", re.ASCII)


def saved_as_another(file: str, name: str) -> str | None:
    """What a rank's file was saved as, in words, where its numbers are others; None where they are its own.

    Args:
        name: what the archive in it is called; a name of other words tells nothing.
    """
    own = PurePath(file)
    if _NUMBER.sub("#", name) != _NUMBER.sub("#", own.stem) or _numbers(name) == _numbers(own.stem):
        return None
    return f"{show(file)} was saved as {show(name + own.suffix)}: files were exchanged, renamed or copied over others"


def _numbers(name: str) -> list[int]:
    return [int(n) for n in _NUMBER.findall(name)]
