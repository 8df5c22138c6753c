# SPDX-License-Identifier: Apache-2.0
"""Ranking by sorting: from rows of errors, one for each class of each group, to the weights of the Lovász extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ._eager import is_eager
from ._lovasz import closed_form

# Off the CPU, errors sorted at a time, unless one row is longer: the temporaries take some 40 bytes for each.
_SLAB = 1 << 22
# PyTorch sorts shorter vectors of integers by comparison, which costs more than padding one of a fifth of this length.
_MIN_DIGITS = 1 << 15


def rank_all(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)``, or of anything that ascends with them.

    Pixels to ignore must be background with an error below every valid one. They then rank last, where the weight of a
    background pixel is 0, unless there is no valid pixel at all. The foreground is bool or bytes.
    """
    rows, length = errors.shape
    if is_eager(errors) and errors.device.type == "cpu" and errors.numel() > _MIN_DIGITS // 5:
        row = torch.arange(rows, device="cpu").unsqueeze(1)
        order = _descending_order(errors, row, rows).view_as(errors).sub_(row * length)
    elif is_eager(errors) and errors.numel() > max(_SLAB, length):
        step = max(1, _SLAB // length)
        return torch.cat([rank_all(*part) for part in zip(errors.split(step), foreground.split(step))])
    else:
        order = errors.argsort(dim=1, descending=True, stable=True)
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    background = foreground.gather(1, order).logical_not().to(counts)
    # One sum over all rows, which CUDA adds up faster than few rows: what comes before a row cancels in the next line.
    union = background.flatten().cumsum(0, dtype=counts).view_as(background)
    union += length - union[:, -1:]
    position = torch.arange(length, dtype=counts, device=errors.device)
    return errors.scatter(1, order, closed_form(background, position, union, errors.dtype))


def rank_candidates(errors: Tensor, foreground: Tensor, candidates: Tensor, totals: Tensor) -> Tensor:
    """Weights of the candidates in rows of errors ``(R, N)``, and 0 elsewhere, in eager code on the CPU.

    The candidates of all rows are sorted as one vector of integers.

    Args:
        errors: contiguous, float32 or float64, or anything that ascends with them.
        foreground: bytes ``(R, N)``.
        candidates: bool ``(R, N)``. The others must rank below those of their row.
        totals: foreground size of each row, candidates or not, int64 ``(R,)``.
    """
    lengths = candidates.sum(1)
    count = int(lengths.sum())
    if count > errors.numel() // 2:
        # To gather most of the errors would cost more than it spares.
        return rank_all(errors, foreground).mul_(candidates.to(torch.uint8))
    weights = torch.zeros_like(errors)
    if count > 0:
        places = candidates.flatten().nonzero().squeeze(1)
        there = (tensor.flatten().index_select(0, places) for tensor in (errors, foreground))
        weights.view(-1).scatter_(0, places, _rank_segments(*there, lengths, totals))
    return weights


def _rank_segments(errors: Tensor, foreground: Tensor, lengths: Tensor, totals: Tensor) -> Tensor:
    """Weights of the errors in segments of unequal length that lie one after the other.

    Args:
        errors: ``(M,)``.
        foreground: bytes ``(M,)``.
        lengths: of the segments, int64 ``(S,)``.
        totals: the foreground size of each segment, int64 ``(S,)``.
    """
    counts = torch.int32 if int(totals.max()) + len(errors) < 2**31 else torch.int64
    segments = torch.repeat_interleave(lengths)

    def spread(values: Tensor) -> Tensor:
        """To the errors, what their segments have."""
        values = values.to(counts)
        return values if len(values) == 1 else values.index_select(0, segments)

    order = _descending_order(errors, segments, len(lengths))
    background = foreground.index_select(0, order).logical_not().to(counts)
    union = background.cumsum(0, dtype=counts)
    starts = lengths.cumsum(0) - lengths
    passed = torch.cat([union.new_zeros(1), union]).index_select(0, starts)
    union += spread(totals - passed)
    position = torch.arange(len(errors), dtype=counts, device="cpu") - spread(starts)
    return torch.empty_like(errors).scatter_(0, order, closed_form(background, position, union, errors.dtype))


def _descending_order(errors: Tensor, segments: Tensor, count: int) -> Tensor:
    """Stable order of errors in one vector, the first segment first and in it the largest error.

    On the CPU, PyTorch sorts a vector of integers by their digits, several times as fast as floating-point numbers.

    Args:
        errors: float32 or float64, of any shape.
        segments: the segment of each error, int64, of that shape or one that expands to it.
        count: how many segments there are.
    """
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    largest = torch.iinfo(bits.dtype).max
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(largest).bitwise_xor_(bits).bitwise_not_()
    if count == 1:
        return _order_of_integers(keys)
    low, high = (int(key) for key in torch.aminmax(keys))
    width = (high - low).bit_length()
    if count << width <= largest:
        return _order_of_integers(keys.sub_(low).add_(segments.to(keys.dtype) << width))
    # In a second pass, the number of the segment costs one digit or two, and four as a part of wider keys.
    order = _order_of_integers(keys)
    segments = segments.to(torch.uint8 if count <= 256 else torch.int32).expand(keys.shape).flatten()
    return order.index_select(0, _order_of_integers(segments.index_select(0, order)))


def _order_of_integers(keys: Tensor) -> Tensor:
    """Stable ascending order of integers in one vector."""
    keys, count = keys.flatten(), keys.numel()
    if _MIN_DIGITS // 5 < count < _MIN_DIGITS:
        keys = torch.cat([keys, keys.new_full((_MIN_DIGITS - count,), torch.iinfo(keys.dtype).max)])
    return keys.sort(stable=True).indices[:count]
