"""Expected values from outside: real models of transformers, real adapters of PEFT, PEFT's own merge, fp64 references.

Nothing here imports the code under test except `command.run`, which calls its command line.
"""

from oracle.adapters import lora, make_adapter, rewrite_adapter
from oracle.bases import DTYPES, FAMILIES, Base, make_base, read_config, read_tensors, untied_copy, write_tensors
from oracle.command import Ran, listing, run
from oracle.expected import (
    effect,
    errors_against,
    load_output,
    logits,
    peft_logits,
    peft_merge,
    relative_difference,
    same_bits,
)
from oracle.reference import reference64, rounded

__all__ = [
    "DTYPES",
    "FAMILIES",
    "Base",
    "Ran",
    "effect",
    "errors_against",
    "listing",
    "load_output",
    "logits",
    "lora",
    "make_adapter",
    "make_base",
    "peft_logits",
    "peft_merge",
    "read_config",
    "read_tensors",
    "reference64",
    "relative_difference",
    "rewrite_adapter",
    "rounded",
    "run",
    "same_bits",
    "untied_copy",
    "write_tensors",
]
