"""VeLoRA: plain LoRA once it is trained; what compressed its activations is left out.

Source: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/variants.py (`VeloraLinearVariant`)
"""

from __future__ import annotations

import dataclasses

from converter.converters.merge.methods import fields, lora

METHOD = dataclasses.replace(
    lora.METHOD,
    title="VeLoRA",
    switch="velora_config",
    factors=(*lora.METHOD.factors, "lora_velora_embed"),
    training=("lora_velora_embed",),
    fields={**lora.FIELDS, "velora_config": fields.ignored()},
)
