# SPDX-License-Identifier: Apache-2.0
"""Ranking by sorting: from the errors of a row, one class in one group, to the weights of the Lovász extension."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._eager import is_eager
from ._lovasz import jaccard_weights
from ._tuning import tuning

# PyTorch sorts integers by digits from this length on, and shorter vectors by comparison. Padding a vector to this
# length is faster from a fifth of it.
_MIN_DIGITS = 1 << 15


def sorted_weights(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)``, or of margins, which rank alike.

    Pixels to ignore must be background with an error below every valid one. They then rank last, where the weight of a
    background pixel is 0, unless there is no valid pixel at all. The foreground is bool or bytes.
    """
    length = errors.shape[1]
    if is_eager(errors) and errors.numel() > max(tuning.sorted_at_once, length):
        step = max(1, tuning.sorted_at_once // length)
        return torch.cat([sorted_weights(*part) for part in zip(errors.split(step), foreground.split(step))])
    if is_eager(errors) and errors.device.type == "cpu" and errors.numel() > _MIN_DIGITS // 2:
        return weights_of_rows(errors, foreground, order_of_rows(errors))
    return weights_of_rows(errors, foreground, errors.argsort(dim=1, descending=True, stable=True))


def order_of_rows(errors: Tensor) -> Tensor:
    """Stable order of each row ``(R, N)`` on the CPU, from the largest error to the smallest."""
    rows = torch.arange(len(errors), device="cpu").unsqueeze(1)
    return descending_order(errors, rows, len(errors)).view(errors.shape).sub_(rows * errors.shape[1])


def weights_of_rows(errors: Tensor, foreground: Tensor, order: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)``, given the order of each from the largest error to the smallest."""
    length = errors.shape[1]
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    background = foreground.gather(1, order).logical_not().to(counts)
    # One sum over all rows, which CUDA adds up faster than few rows: what comes before a row cancels in the next line.
    union = background.flatten().cumsum(0, dtype=counts).view_as(background)
    union += length - union[:, -1:]
    position = torch.arange(length, dtype=counts, device=errors.device)
    return errors.scatter(1, order, jaccard_weights(background, position, union, errors.dtype))


def weights_of_segments(
    errors: Tensor, foreground: Tensor, lengths: Tensor, unions: Tensor, positions: Tensor
) -> Tensor:
    """Weights of errors on the CPU, in segments of any length that lie one after the other in a vector.

    Args:
        errors: ``(M,)``, float32 or float64, without nan.
        foreground: bytes ``(M,)``.
        lengths: of the segments, int64 ``(S,)``.
        unions: for each segment, the foreground size of its row and the background with larger errors than it holds.
        positions: how many pixels of the row have larger errors.
    """
    most = int(unions.max()) + int(positions.max()) + len(errors)
    counts = torch.int32 if most < 2**31 else torch.int64
    segments = torch.repeat_interleave(lengths) if len(lengths) > 1 else None

    def of_errors(values: Tensor) -> Tensor:
        """The value of its segment for each error."""
        values = values.to(counts)
        return values if segments is None else values.index_select(0, segments)

    order = descending_order(errors, segments, len(lengths))
    background = foreground.index_select(0, order).logical_not().to(counts)
    union = background.cumsum(0, dtype=counts)
    starts = lengths.cumsum(0) - lengths
    passed = torch.cat([union.new_zeros(1), union]).index_select(0, starts)
    union += of_errors(unions - passed)
    position = torch.arange(len(errors), dtype=counts, device="cpu") + of_errors(positions - starts)
    return torch.empty_like(errors).scatter_(0, order, jaccard_weights(background, position, union, errors.dtype))


def descending_order(errors: Tensor, segments: Optional[Tensor] = None, count: int = 1) -> Tensor:
    """Stable order of errors in one vector on the CPU, the first segment first and in it the largest error.

    PyTorch sorts a vector of integers by their digits, ten times as fast as floating-point numbers.

    Args:
        errors: float32 or float64, of any shape, without nan.
        segments: the segment of each error, int64, of that shape or one that expands to it; None: there is one.
        count: how many segments there are.
    """
    if errors.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    largest = torch.iinfo(bits.dtype).max
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(largest).bitwise_xor_(bits).bitwise_not_()
    low, high = (int(key) for key in torch.aminmax(keys))
    width = (high - low).bit_length()
    if count << width <= largest:
        # A smaller number has fewer digits.
        keys.sub_(low)
        return _order_of_integers(keys if segments is None else keys.add_(segments.to(keys.dtype) << width))
    order = _order_of_integers(keys)
    if segments is None:
        return order
    # In a second pass, the number of the segment costs one digit or two, and four as a part of wider keys.
    segments = segments.to(torch.uint8 if count <= 256 else torch.int32).expand(keys.shape).flatten()
    return order.index_select(0, _order_of_integers(segments.index_select(0, order)))


def _order_of_integers(keys: Tensor) -> Tensor:
    """Stable ascending order of integers in one vector."""
    keys, count = keys.flatten(), keys.numel()
    if _MIN_DIGITS // 5 < count < _MIN_DIGITS:
        keys = torch.cat([keys, keys.new_full((_MIN_DIGITS - count,), torch.iinfo(keys.dtype).max)])
    return keys.sort(stable=True).indices[:count]
