# SPDX-License-Identifier: Apache-2.0
"""Ranking by counting: the weights of the Lovász extension without sorting the errors.

The errors of a row, one class in one group, are counted in bins. A bin that begins after ``k0`` foreground and ``m0``
background pixels and ends after ``k1`` and ``m1`` gives its pixels the mean of the weights that they would have with
all its foreground first and with all its background first::

    foreground   (1 / (G + m0) + 1 / (G + m1)) / 2
    background   ((G - k0) + (G - k1)) / (2 (G + m0) (G + m1))

They sum up to what the Jaccard loss grows by in the bin. Whatever the order within, the loss can differ from the exact
one by no more than that growth times the width of the bin. The growth of all bins together is at most 1, so the
difference is at most the width of the widest bin. As the exact loss is the maximum over all orders, and the weights
are a mean of two orders, the loss is never above the exact one.

The bins divide the errors between the smallest of the foreground and the largest of the background, where alone the
order matters: the foreground above has the weight ``1 / G`` and the background below has none, both exactly. The edges
are those of ``num_bins`` bins of equal width and, for errors close to the smallest, those of bins whose width is
proportional to the distance from it. An error finds its bin by arithmetic, so that one pass over the errors counts
them and another looks the weights up. The counts are integers, which do not depend on the run and can be summed over
processes.
"""

from __future__ import annotations

from functools import reduce
from typing import Callable, Optional, Sequence

import torch
import torch.distributed
from torch import Tensor

# From the smallest error to the largest, the width of the narrow bins doubles this many times.
_OCTAVES = 24
_MANTISSA_BITS = 23
# The range of the errors is at least that wide, and its ends at most that large, so that its inverse is finite.
_NARROWEST, _MOST = 2.0**-100, torch.finfo(torch.float32).max


def rank_by_bins(
    errors: Tensor,
    foreground: Tensor,
    num_bins: int,
    group: Optional[torch.distributed.ProcessGroup] = None,
    slab: Optional[int] = None,
    total: Optional[Tensor] = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weights of rows of errors ``(R, N)``.

    Pixels to ignore must be background without a positive error; the weight of such an error means nothing.

    Args:
        errors: float32 or float64.
        foreground: bool ``(R, N)``.
        num_bins: the number of bins of equal width in a row.
        group: the processes whose rows are parts of one row, or None.
        slab: how many errors to rank at a time, which takes some 40 bytes for each, where the values of a tensor may
            decide what is computed. None: all, as they may not.
        total: the foreground size of each row, int64 ``(R,)``, if foreground with an error of 0 has been left out, as
            it can be without a group.
        overwrite: whether the errors may be overwritten, which spares memory.

    Returns:
        the weights ``(R, N)``, and the foreground size of each row in all processes, int64 ``(R,)``.
    """
    rows, count = errors.shape
    if errors.numel() == 0 and group is None:
        return torch.zeros_like(errors), foreground.sum(1) if total is None else total
    if count == 0:  # without a pixel, this process still takes part
        pixel = torch.nn.functional.pad
        weights, total = rank_by_bins(pixel(errors, (0, 1)), pixel(foreground, (0, 1)), num_bins, group)
        return weights[:, :0], total
    is_local = slab is not None and errors.device.type == "cpu"  # where to consult a value costs nothing
    width = count if slab is None or errors.numel() <= slab else max(1, slab // rows)

    def split(tensor: Tensor) -> Sequence[Tensor]:
        return (tensor,) if width == count else tensor.split(width, 1)

    counted = reduce(torch.add, [part.sum(1) for part in split(foreground)])  # each makes an int64 copy on the CPU
    smallest, largest = _ranges(split(errors), split(foreground))
    if total is None:
        total = counted
    else:
        smallest = smallest.masked_fill((counted < total).unsqueeze(1), 0.0)
    is_owner = None
    if group is not None:
        smallest, largest, is_owner = _ranges_of_group(smallest, largest, group)
    # Both ends are moved outwards, where the smallest itself must be above the first slot and rounding to float32 may
    # have lowered the largest. There is one bin more, for rounding.
    smallest, largest = smallest * (1 - 2.0**-20), (largest * (1 + 2.0**-20)).clamp(max=_MOST)
    scale = (num_bins + 0.5) / (largest - smallest).clamp(min=_NARROWEST)

    may_be_absent = not is_local or group is not None or not total.all()
    largest_at = errors.argmax(1, keepdim=True) if may_be_absent else None

    # The slots of a row are those of its background, then those of its foreground.
    num_slots = _num_slots(num_bins)
    num_counts = rows * 2 * num_slots
    if num_counts > torch.iinfo(torch.int32).max:
        raise ValueError(f"num_bins must leave room for {rows} classes of images in 32-bit tables. Got: {num_bins}")
    starts = None
    if rows > 1:
        starts = torch.arange(0, num_counts, 2 * num_slots, dtype=torch.int32, device=errors.device).unsqueeze(1)

    def slots_of(errors: Tensor, foreground: Tensor) -> Tensor:
        slots = _slots((errors - smallest) * scale, num_bins).add(foreground, alpha=num_slots)
        return slots if starts is None else slots + starts

    def counts_of(slots: Tensor) -> Tensor:
        slots = slots.flatten()
        if is_local:
            return slots.bincount(minlength=num_counts)
        return total.new_zeros(num_counts).scatter_add(0, slots.long(), total.new_ones(()).expand_as(slots))

    def in_parts(step: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype, over: Optional[Tensor]) -> Tensor:
        """What ``step`` makes of tensors, by parts of the pixels; written over a tensor if that is as wide."""
        if width == count:
            return step(*tensors)
        fits = over is not None and over.element_size() == dtype.itemsize
        results = over.view(dtype) if fits else torch.empty_like(errors, dtype=dtype)
        for *part, result in zip(*map(split, (*tensors, results))):
            result.copy_(step(*part))
        return results

    slots = in_parts(slots_of, errors, foreground, dtype=torch.int32, over=errors if overwrite else None)
    counts = reduce(torch.add, map(counts_of, split(slots)))
    if group is not None:
        counts = torch.cat([counts, total])
        torch.distributed.all_reduce(counts, group=group)
        counts, total = counts[:-rows], counts[-rows:]
    table = _weights(counts.view(rows, 2, num_slots), total).to(errors.dtype).flatten()

    def weights_of(slots: Tensor) -> Tensor:
        return table.index_select(0, slots.flatten()).view(slots.shape)

    weights = in_parts(weights_of, slots, dtype=errors.dtype, over=slots)
    if largest_at is not None:  # of an absent class, the largest error alone counts
        alone = total == 0 if is_owner is None else (total == 0) & is_owner
        weights.scatter_add_(1, largest_at, alone.unsqueeze(1).to(weights.dtype))
    return weights, total


def _ranges(errors: Sequence[Tensor], foreground: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest error of the foreground and the largest of the background of each row, float32 ``(R, 1)``.

    The largest finite number stands for what is larger, and for the smallest error of no foreground.

    Args:
        errors: parts of the rows ``(R, *)``.
        foreground: bool, the same parts.
    """
    smallest, largest = [], []
    for part, in_foreground in zip(errors, foreground):
        # 0 on the foreground and the largest number on the background: cheaper than to select by a mask.
        bound = (~in_foreground).to(part.dtype) * _MOST
        smallest.append(part.maximum(bound).amin(1, keepdim=True))
        largest.append(part.minimum(bound).amax(1, keepdim=True))
    lowest, highest = reduce(torch.minimum, smallest), reduce(torch.maximum, largest)
    return lowest.to(torch.float32).clamp(max=_MOST), highest.to(torch.float32)


def _ranges_of_group(
    smallest: Tensor, largest: Tensor, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """The same over the processes of a group, and whether the largest is in this process, bool ``(R,)``."""
    # The order of positive numbers is the order of their bits. Of equal ones, the process of the lowest rank wins.
    others = torch.distributed.get_world_size(group) - torch.distributed.get_rank(group)
    own = (largest.view(torch.int32).to(torch.int64) << 32) + others
    ends = torch.stack([own, -smallest.view(torch.int32).to(torch.int64)])
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=group)
    smallest, largest = (end.to(torch.int32).view(torch.float32) for end in (-ends[1], ends[0] >> 32))
    return smallest, largest, (own == ends[0]).squeeze(1)


def _bits(number: int) -> int:
    """The bits of a positive integer as a float32 number, whose order is the order of the numbers."""
    exponent = number.bit_length() - 1
    return (126 + exponent << _MANTISSA_BITS) + (number << _MANTISSA_BITS - exponent)


def _narrow_bins(num_bins: int) -> tuple[int, int]:
    """The bits at which the narrow bins start, and the bits that those of a bin differ in."""
    per_octave = max(0, num_bins.bit_length() - 6)
    return _bits(num_bins) - (_OCTAVES << _MANTISSA_BITS), _MANTISSA_BITS - per_octave


def _num_slots(num_bins: int) -> int:
    first, within = _narrow_bins(num_bins)
    return num_bins + 3 + (_bits(num_bins + 2) - first >> within)


def _slots(positions: Tensor, num_bins: int) -> Tensor:
    """Slots, int32, of errors in ascending order.

    Args:
        positions: of the errors in their range, in bins of equal width. Those up to 0 have the first slot, those
            above ``num_bins + 1`` the last.
        num_bins: the number of bins.
    """
    first, within = _narrow_bins(num_bins)
    # The sum of two numbers that ascend with the error changes wherever one of them does: it has the edges of both.
    # By their bits, nan has a slot too.
    bits = positions.to(torch.float32).view(torch.int32).clamp(0, _bits(num_bins + 2))
    return bits.view(torch.float32).ceil().to(torch.int32) + ((bits - first).clamp(min=0) >> within)


def _weights(counts: Tensor, total: Tensor) -> Tensor:
    """Weights of the background and the foreground of each slot, float64; see the top of this file.

    Args:
        counts: the background and foreground pixels in each slot, int64 ``(R, 2, slots)``.
        total: the foreground size, int64 ``(R,)``.
    """
    background, foreground = counts.unbind(1)
    alarms, missed = counts.cumsum(-1, dtype=torch.float64).unbind(1)
    # In descending order, the foreground not passed before a slot, and the union before and after its background.
    rest = missed + (total.unsqueeze(1) - missed[:, -1:])
    first = (alarms[:, -1:] + total.unsqueeze(1) - alarms).clamp(min=1)
    last = first + background
    means = torch.stack([rest.sub(foreground, alpha=0.5), first.add(background, alpha=0.5)], 1)
    return means / (first * last).unsqueeze(1)
