# SPDX-License-Identifier: Apache-2.0
"""Ranking by sorting: from rows of errors, one for each class of each group, to the weights of the Lovász extension."""

from __future__ import annotations

from typing import Iterator, Optional

import torch
from torch import Tensor

from ._eager import is_eager
from ._lovasz import closed_form

# PyTorch sorts shorter vectors of integers by comparison, which costs more than padding one of a fifth of this length.
_MIN_DIGITS = 1 << 15
# A row too large for a slab is sorted in as many ranges: each looks at all of its errors.
_MAX_RANGES = 8


def rank_all(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)``, or of anything that ascends with them.

    Pixels to ignore must be background with an error below every valid one. They then rank last, where the weight of a
    background pixel is 0, unless there is no valid pixel at all.
    """
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    order = _descending_order(errors)
    background = foreground.gather(1, order).logical_not().to(counts)
    # One sum over all rows, which CUDA adds up faster than few rows: what comes before a row cancels in the next line.
    union = background.flatten().cumsum(0, dtype=counts).view_as(background)
    union += errors.shape[1] - union[:, -1:]
    position = torch.arange(errors.shape[1], dtype=counts, device=errors.device)
    return errors.scatter(1, order, closed_form(background, position, union, errors.dtype))


def rank_candidates(errors: Tensor, foreground: Tensor, floors: Tensor, totals: Tensor, slab: int) -> Tensor:
    """Weights of the *candidates* in rows of errors ``(R, N)``, and 0 elsewhere, in eager code on the CPU.

    The candidates of all rows are sorted as one vector.

    Args:
        errors: contiguous, float32 or float64, or anything that ascends with them.
        foreground: bool ``(R, N)``, contiguous.
        floors: the least error of a candidate in each row ``(R,)``.
        totals: foreground size of each row, candidates or not, int64 ``(R,)``.
        slab: how many candidates of one row are sorted at a time, which takes some 60 bytes for each.
    """
    floors = floors.unsqueeze(1)
    within = (errors < floors).logical_not_()  # a nan must not be dropped
    count = int(within.count_nonzero())
    if count > errors.numel() // 2 and errors.numel() <= 2 * slab:
        # Nearly all are candidates: gathering them would cost more than it spares. The others rank below, as one.
        below = floors.nextafter(floors.new_tensor(-torch.inf))
        return rank_all(errors.maximum(below), foreground).masked_fill_(within.logical_not_(), 0.0)
    weights = torch.zeros_like(errors)
    if count == 0:
        return weights
    ends = torch.arange(1, len(errors) + 1, device="cpu") * errors.shape[1]
    before, alarms = 0, 0
    for low in _cuts(errors, within, min(_MAX_RANGES - 1, count // slab)):
        chosen = within if low is None else (errors > low).logical_and_(within)
        places = chosen.view(-1).nonzero().squeeze(1)
        lengths = torch.searchsorted(places, ends).diff(prepend=ends.new_zeros(1))
        some = foreground.view(-1).index_select(0, places)
        some_weights = _rank_segments(errors.view(-1).index_select(0, places), some, lengths, totals + alarms, before)
        weights.view(-1).index_copy_(0, places, some_weights)
        if low is not None:
            before, alarms = before + len(places), alarms + len(places) - int(some.count_nonzero())
            within.logical_xor_(chosen)
    return weights


def _cuts(errors: Tensor, within: Tensor, count: int) -> Iterator[Optional[float]]:
    """Where to cut a row too large for a slab into ranges, descending, and None for what remains."""
    if len(errors) == 1 and count > 0:
        step = errors.numel() // 4096 | 1  # odd, for pixels of many columns
        sample = errors[0, ::step][within[0, ::step]].sort(descending=True).values
        if len(sample) > 0:
            yield from sample[torch.arange(1, count + 1, device="cpu") * len(sample) // (count + 1)].tolist()
    yield None


def _rank_segments(errors: Tensor, foreground: Tensor, lengths: Tensor, totals: Tensor, before: int) -> Tensor:
    """Weights of the errors in segments of unequal length that lie one after the other.

    Args:
        errors: ``(M,)``.
        foreground: bool ``(M,)``.
        lengths: of the segments, int64 ``(S,)``.
        totals: the foreground size of each segment, and the background that ranks before its errors here, int64.
        before: how many pixels rank before the errors of the segment, if there is one only.
    """
    counts = torch.int32 if len(errors) + before < 2**31 and int(totals.max()) + len(errors) < 2**31 else torch.int64
    order, segments = _order_of_integers(_descending_keys(errors)), None
    if len(lengths) > 1:
        segments = torch.repeat_interleave(lengths)
        order = _regroup(order, segments.to(torch.uint8 if len(lengths) <= 256 else torch.int32))
    background = foreground.index_select(0, order).logical_not_().to(counts)
    union = background.cumsum(0, dtype=counts)
    position = torch.arange(before, before + len(errors), dtype=counts, device="cpu")
    if segments is None:
        union += int(totals)
    else:
        starts = lengths.cumsum(0) - lengths
        passed = torch.cat([union.new_zeros(1), union]).index_select(0, starts)
        union += (totals - passed).to(counts).index_select(0, segments)
        position -= starts.to(counts).index_select(0, segments)
    return torch.empty_like(errors).index_copy_(0, order, closed_form(background, position, union, errors.dtype))


def _descending_order(errors: Tensor) -> Tensor:
    """Order of rows of errors ``(R, N)``, the largest first, stable on each device."""
    rows, count = errors.shape
    if not is_eager(errors) or errors.device.type != "cpu":
        return errors.argsort(dim=1, descending=True, stable=True)
    keys = _descending_keys(errors)
    if errors.numel() <= _MIN_DIGITS // 3:
        return keys.sort(dim=1, stable=True).indices
    keys = keys.flatten()
    if rows == 1:
        return _order_of_integers(keys).view_as(errors)
    row = torch.arange(rows, device="cpu").unsqueeze(1)
    low, high = (int(key) for key in torch.aminmax(keys))
    width = (high - low).bit_length()
    if rows << width <= torch.iinfo(keys.dtype).max:
        keys = keys.view_as(errors).sub_(low).add_(row.to(keys.dtype) << width)
        order = _order_of_integers(keys.flatten()).view_as(errors)
    else:
        numbers = row.to(torch.uint8 if rows <= 256 else torch.int32)
        order = _regroup(_order_of_integers(keys), numbers.expand_as(errors).flatten()).view_as(errors)
    return order - row * count


def _regroup(order: Tensor, numbers: Tensor) -> Tensor:
    """Bring an order by the numbers of segments, one digit or two, where they cost four as a part of the keys."""
    return order.index_select(0, _order_of_integers(numbers.index_select(0, order)))


def _descending_keys(errors: Tensor) -> Tensor:
    """Integers that descend where floating-point numbers ascend.

    On the CPU, PyTorch sorts a vector of integers by their digits, several times as fast as floating-point numbers.
    """
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(torch.iinfo(bits.dtype).max)
    return keys.bitwise_xor_(bits).bitwise_not_()


def _order_of_integers(keys: Tensor) -> Tensor:
    """Stable ascending order of a vector of integers."""
    count = len(keys)
    if _MIN_DIGITS // 5 < count < _MIN_DIGITS:
        keys = torch.cat([keys, keys.new_full((_MIN_DIGITS - count,), torch.iinfo(keys.dtype).max)])
    return keys.sort(stable=True).indices[:count]
