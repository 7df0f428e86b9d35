"""Sound models that tests of doctor break."""

from __future__ import annotations

from doctor_walk import here, sound
from doctored import causal, reward

__all__ = ["causal", "here", "reward", "sound"]
