"""DoRA: LoRA whose result is rescaled, output by output, to magnitudes of its own.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/dora.py
"""

from __future__ import annotations

import dataclasses

from converter.converters.merge.methods import fields, lora
from converter.converters.merge.methods.method import Site, Update


def update(site: Site) -> tuple[Update, ...]:
    """LoRA's update with the magnitudes.

    Raises:
        Refused: the magnitudes are missing or of another length (`adapter-incomplete`); whatever LoRA refuses.
    """
    return lora.lora_updates(site, magnitude=site.take(lora.MAGNITUDE))


METHOD = dataclasses.replace(
    lora.METHOD,
    title="DoRA",
    switch="use_dora",
    factors=(*lora.METHOD.factors, lora.MAGNITUDE),
    layers="Linear, Conv1D, Embedding, convolutions",
    remark="",
    fields={**lora.FIELDS, "use_dora": fields.flag()},
    update=update,
    is_linear=False,
)
