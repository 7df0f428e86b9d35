"""Biases that an adapter's config says were trained, and that PEFT did not save.

PEFT before 0.21 looks for a bias under the name that its module had before a layer of the method was put around it. So
`bias="lora_only"`, and for methods other than LoRA any `bias`, saves no bias of a trained module, and says nothing.

Source: `get_peft_model_state_dict`, https://github.com/huggingface/peft/blob/v0.20.0/src/peft/utils/save_and_load.py
"""

from __future__ import annotations

from collections.abc import Iterable

from converter.converters.merge.methods.method import AdapterConfig, Site
from converter.core.context import Context
from converter.diagnostic import Again, Steps
from converter.errors import Refused
from converter.text import fold


def expect_biases(sites: Iterable[Site], config: AdapterConfig, context: Context, where: str, *, own: bool) -> None:
    """Go on where every trained bias of an adapted module is in the adapter.

    Args:
        own: the base is that of the same run, and has the biases as they were trained.

    Raises:
        Refused: one is not, and `--allow adapter-biases-lost` was not given.
    """
    if config.bias == "none" or own:
        return
    lost = [s.module.name for s in sites if "bias" in s.base and "bias" not in s.module.replaced]
    if lost:
        context.consent(
            Refused(
                "adapter-biases-lost",
                f"`bias` is {config.bias}, so the biases of {fold(dict.fromkeys(lost))} were trained, and the adapter "
                "does not hold them: PEFT before 0.21 does not save them, and loads the base's",
                where=where,
                next=Steps(
                    "take the trained biases from the run, or the base's, as PEFT does: ",
                    Again(("--allow", "adapter-biases-lost")),
                ),
            )
        )
