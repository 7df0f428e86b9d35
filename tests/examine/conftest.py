"""Sound models that tests of doctor break."""

from __future__ import annotations

from doctored import causal, reward

__all__ = ["causal", "reward"]
