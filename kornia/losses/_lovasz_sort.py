# SPDX-License-Identifier: Apache-2.0
"""Ranking by sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from ._eager import is_eager
from ._lovasz import jaccard_weights

# Errors sorted at a time in eager code, unless one row is longer: the temporaries take some 40 bytes each.
_SLAB = 1 << 22
# PyTorch sorts shorter vectors of integers by comparison, which costs more than padding one of a fifth of this length.
_MIN_DIGITS = 1 << 15


def sorted_weights(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)``, or of anything that ascends with them, on any device.

    Pixels to ignore must be background with an error below every valid one. They then rank last, where the weight of a
    background pixel is 0, unless there is no valid pixel at all.
    """
    length = errors.shape[1]
    if is_eager(errors) and errors.numel() > max(_SLAB, length):
        step = max(1, _SLAB // length)
        return torch.cat([sorted_weights(*part) for part in zip(errors.split(step), foreground.split(step))])
    order = errors.argsort(dim=1, descending=True, stable=True)
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    background = foreground.gather(1, order).logical_not().to(counts)
    # One sum over all rows, which CUDA adds up faster than few rows: what comes before a row cancels in the next line.
    union = background.flatten().cumsum(0, dtype=counts).view_as(background)
    union += length - union[:, -1:]
    position = torch.arange(length, dtype=counts, device=errors.device)
    return errors.scatter(1, order, jaccard_weights(background, position, union, errors.dtype))


def descending_order(errors: Tensor) -> Tensor:
    """Stable order of errors ``(N,)`` on the CPU, without nan, from the largest to the smallest.

    PyTorch sorts a vector of integers by their digits, ten times as fast as floating-point numbers.
    """
    count = len(errors)
    if count < 2:
        return torch.zeros(count, dtype=torch.int64, device="cpu")
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    limits = torch.iinfo(bits.dtype)
    keys = (bits >> limits.bits - 1).bitwise_and_(limits.max).bitwise_xor_(bits).bitwise_not_()
    low, high = (int(key) for key in torch.aminmax(keys))
    if high - low <= limits.max:
        keys -= low  # a smaller number has fewer digits
    if _MIN_DIGITS // 5 < count < _MIN_DIGITS:
        keys = torch.cat([keys, keys.new_full((_MIN_DIGITS - count,), limits.max)])
    return keys.sort(stable=True).indices[:count]
