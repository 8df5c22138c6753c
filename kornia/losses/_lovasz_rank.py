# SPDX-License-Identifier: Apache-2.0
"""Ranking by sorting: from rows of errors, one for each class of each group, to the weights of the Lovász extension."""

from __future__ import annotations

from typing import Optional

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
    background pixel is 0, unless there is no valid pixel at all.
    """
    rows, length = errors.shape
    if is_eager(errors):
        if errors.device.type == "cpu" and errors.numel() > _MIN_DIGITS // 5:
            lengths = torch.full((rows,), length, device="cpu")
            return _rank_segments(errors.flatten(), foreground.flatten(), lengths, foreground.sum(1)).view_as(errors)
        if errors.numel() > max(_SLAB, length):
            step = max(1, _SLAB // length)
            return torch.cat([rank_all(*part) for part in zip(errors.split(step), foreground.split(step))])
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    order = errors.argsort(dim=1, descending=True, stable=True)
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
        foreground: bool ``(R, N)``, contiguous.
        candidates: bool ``(R, N)``, contiguous. The others must rank below those of their row.
        totals: foreground size of each row, candidates or not, int64 ``(R,)``.
    """
    rows, length = errors.shape
    errors, foreground, chosen = errors.view(-1), foreground.view(-1), candidates.view(-1)
    count = int(chosen.count_nonzero())
    if count == 0:
        return torch.zeros_like(candidates, dtype=errors.dtype)
    if count > len(errors) // 2:
        # To gather most of the errors would cost more than it spares: all are ranked.
        lengths = torch.full((rows,), length, device="cpu")
        return _rank_segments(errors, foreground, lengths, totals).mul_(chosen).view_as(candidates)
    places = chosen.nonzero().squeeze(1)
    ends = torch.arange(length, len(errors) + 1, length, device="cpu")
    lengths = torch.searchsorted(places, ends).diff(prepend=ends.new_zeros(1))
    errors_there, foreground_there = errors.index_select(0, places), foreground.index_select(0, places)
    weights = _rank_segments(errors_there, foreground_there, lengths, totals)
    return torch.zeros_like(errors).scatter_(0, places, weights).view_as(candidates)


def _rank_segments(errors: Tensor, foreground: Tensor, lengths: Tensor, totals: Tensor) -> Tensor:
    """Weights of the errors in segments of unequal length that lie one after the other.

    Args:
        errors: ``(M,)``.
        foreground: bool ``(M,)``.
        lengths: of the segments, int64 ``(S,)``.
        totals: the foreground size of each segment, int64 ``(S,)``.
    """
    counts = torch.int32 if int(totals.max()) + len(errors) < 2**31 else torch.int64
    segments = torch.repeat_interleave(lengths) if len(lengths) > 1 else None
    order = _descending_order(errors, segments, len(lengths))
    background = foreground.index_select(0, order).logical_not_().to(counts)
    union = background.cumsum(0, dtype=counts)
    position = torch.arange(len(errors), dtype=counts, device="cpu")
    if segments is None:
        union += int(totals)
    else:
        starts = lengths.cumsum(0) - lengths
        passed = torch.cat([union.new_zeros(1), union]).index_select(0, starts)
        union += (totals - passed).to(counts).index_select(0, segments)
        position -= starts.to(counts).index_select(0, segments)
    return torch.empty_like(errors).scatter_(0, order, closed_form(background, position, union, errors.dtype))


def _descending_order(errors: Tensor, segments: Optional[Tensor], count: int) -> Tensor:
    """Stable order of a vector, the first segment first and in it the largest error.

    On the CPU, PyTorch sorts a vector of integers by their digits, several times as fast as floating-point numbers.

    Args:
        errors: float32 or float64 ``(M,)``.
        segments: the segment of each error, int64 ``(M,)``, or None for one segment.
        count: how many segments there are.
    """
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    largest = torch.iinfo(bits.dtype).max
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(largest).bitwise_xor_(bits).bitwise_not_()
    if segments is None:
        return _order_of_integers(keys)
    low, high = (int(key) for key in torch.aminmax(keys))
    width = (high - low).bit_length()
    if count << width <= largest:
        return _order_of_integers(keys.sub_(low).add_(segments.to(keys.dtype) << width))
    # In a second pass, the number of the segment costs one digit or two, and four as a part of wider keys.
    order = _order_of_integers(keys)
    segments = segments.to(torch.uint8 if count <= 256 else torch.int32).index_select(0, order)
    return order.index_select(0, _order_of_integers(segments))


def _order_of_integers(keys: Tensor) -> Tensor:
    """Stable ascending order of a vector of integers."""
    count = len(keys)
    if _MIN_DIGITS // 5 < count < _MIN_DIGITS:
        keys = torch.cat([keys, keys.new_full((_MIN_DIGITS - count,), torch.iinfo(keys.dtype).max)])
    return keys.sort(stable=True).indices[:count]
