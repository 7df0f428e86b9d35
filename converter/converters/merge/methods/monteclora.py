"""MonteCLoRA: plain LoRA once it is trained; its sampler is left out.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/variants.py (`MontecloraLinearVariant`)
"""

from __future__ import annotations

import dataclasses

from converter.converters.merge.methods import fields, lora

METHOD = dataclasses.replace(
    lora.METHOD,
    title="MonteCLoRA",
    switch="monteclora_config",
    factors=(*lora.METHOD.factors, "lora_monteclora_sampler"),
    training=("lora_monteclora_sampler",),
    fields={**lora.FIELDS, "monteclora_config": fields.ignored()},
)
