"""Singular values of an update that a pair of factors makes, from the factors: no matrix of the weight's size."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(a: Tensor, b: Tensor, scale: float) -> list[float]:
    """Those of `scale * B @ A`, the largest first.

    B = Q_b R_b and A^T = Q_a R_a, so they are those of the small `R_b R_a^T`.

    Args:
        a: `[r, in]`, and `b` `[out, r]`; further dimensions of a convolution are taken together.
    """
    _, r_b = torch.linalg.qr(b.double().reshape(b.shape[0], -1))
    _, r_a = torch.linalg.qr(a.double().reshape(a.shape[0], -1).T)
    found: list[float] = (torch.linalg.svdvals(r_b @ r_a.T) * abs(scale)).tolist()
    return found
