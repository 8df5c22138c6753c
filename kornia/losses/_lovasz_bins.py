# SPDX-License-Identifier: Apache-2.0
"""Computes the weights of the Lovász extension by counting errors in bins instead of sorting them.

The errors of a row, one class in one group, are counted in bins, from the largest errors to the smallest. Take a bin
that begins after ``k0`` foreground and ``m0`` background pixels and ends after ``k1`` and ``m1``. The weight of its
pixels is the mean over two orders, all its foreground first and all its background first::

    foreground   (1 / (G + m0) + 1 / (G + m1)) / 2
    background   ((G - k0) + (G - k1)) / (2 (G + m0) (G + m1))

The weights of a bin sum to the growth of the Jaccard loss in the bin. For any order within the bin, the loss differs
from the exact one by at most that growth times the width of the bin. The growth of all bins sums to at most 1, so the
loss differs by at most the width of the widest bin. The exact loss is the maximum over all orders, and the weights are
a mean over two orders, so the loss is never above the exact one.

Order matters only between the smallest foreground error and the largest background error, and the bins divide this
range. Foreground above it has weight ``1 / G`` and background below it has weight 0; both are exact. The range is
divided into ``num_bins`` bins of equal width. More edges divide it further near its lower end, into bins whose width is
proportional to the distance from that end. The bin of an error is computed, not searched for: one pass counts the
errors, and another looks up their weights. The counts are integers, which are the same in every run and can be summed
over processes.
"""

from __future__ import annotations

from functools import reduce
from typing import Optional, Sequence

import torch
import torch.distributed
from torch import Tensor

from ._eager import is_eager
from ._lovasz_group import check_agreement, range_of_all
from ._lovasz_options import Options
from ._tuning import tuning

# The width of the narrow bins doubles this many times from the lower end of the range to the upper end.
_OCTAVES = 24
_MANTISSA_BITS = 23
# Number of dummy slots at the end of the counts, see _add_counts.
_DUMMIES = 1 << 10
# The range of the errors is at least this wide and its ends are at most this large, so that its inverse is finite.
MIN_WIDTH, _MAX_ERROR = 2.0**-100, torch.finfo(torch.float32).max


def _at_once(errors: Tensor) -> int:
    return tuning.counted_at_once if errors.device.type == "cpu" else tuning.counted_at_once_cuda


def binned_weights(errors: Tensor, foreground: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Compute the weights of rows of errors ``(R, N)``.

    Ignored pixels must be background with an error of at most 0. The weights of such errors have no meaning.

    Args:
        errors: float32 or float64.
        foreground: bool ``(R, N)``.
        options: the number of bins of equal width, and the processes over which the rows are counted.

    Returns:
        the weights ``(R, N)``, and the foreground size of each row in all processes, int64 ``(R,)``.
    """
    rows, count = errors.shape
    num_bins, group = options.num_bins or 1, options.process_group
    if errors.numel() == 0:
        if group is None:
            return torch.zeros_like(errors), foreground.sum(1)
        pad = torch.nn.functional.pad  # a process with an empty batch must still take part in the communication
        weights, total = binned_weights(pad(errors, (0, 1)), pad(foreground, (0, 1)), options)
        return weights[:, :0], total
    num_slots = count_slots(num_bins)
    step = max(1, 16 * _at_once(errors) // num_slots)  # the tables of many small images are larger than the images
    if group is None and is_eager(errors) and rows > step:
        parts = [binned_weights(*part, options) for part in zip(errors.split(step), foreground.split(step))]
        return torch.cat([weights for weights, _ in parts]), torch.cat([total for _, total in parts])

    width = max(1, _at_once(errors) // rows) if is_eager(errors) else count
    parts = list(zip(errors.split(width, 1), foreground.split(width, 1)))
    smallest, scale, is_owner = _range_of_bins(parts, options)
    # Each row has the slots of its background first, then those of its foreground.
    starts = torch.arange(0, rows * 2 * num_slots, 2 * num_slots, device=errors.device).unsqueeze(1)

    def slots_of(errors: Tensor, foreground: Tensor) -> Tensor:
        return slots_at((errors - smallest) * scale, num_bins).add(foreground, alpha=num_slots) + starts

    counts = torch.zeros(rows * 2 * num_slots + _DUMMIES, dtype=torch.int64, device=errors.device)
    for part in parts:
        counts = _add_counts(counts, slots_of(*part), starts)
    counts = counts[:-_DUMMIES]
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    table, total = weights_of_slots(counts.view(rows, 2, num_slots), errors.dtype)
    table = table.flatten()
    weights = [table.index_select(0, slots_of(*part).flatten()).view(part[0].shape) for part in parts]
    # In an absent class, only the largest error has a weight.
    of_largest = total == 0 if is_owner is None else (total == 0) & is_owner
    of_largest = of_largest.unsqueeze(1).to(errors.dtype)
    return torch.cat(weights, 1).scatter_add(1, errors.argmax(1, keepdim=True), of_largest), total


def _range_of_bins(parts: Sequence[tuple[Tensor, Tensor]], options: Options) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Compute the bins of each row.

    Args:
        parts: errors ``(R, *)`` and foreground of the rows, divided along the pixels.
        options: the number of bins, and the processes over which the rows are counted.

    Returns:
        the lower end of the bins and the number of bins per unit of error, both ``(R, 1)``, and whether this process
        owns the largest error, see :func:`range_of_all` (None without a process group).
    """
    smallest, largest = _ranges(parts)
    is_owner = None
    if options.process_group is not None:
        check_agreement(parts[0][0], options)
        smallest, largest, is_owner = range_of_all(smallest, largest, options.process_group)
    # Both ends are moved outwards: the smallest foreground error must be above the first slot, and rounding to float32
    # may have lowered the largest error. Half a bin more leaves room for rounding.
    smallest, largest = smallest * (1 - 2.0**-20), (largest * (1 + 2.0**-20)).clamp(max=_MAX_ERROR)
    return smallest, ((options.num_bins or 1) + 0.5) / (largest - smallest).clamp(min=MIN_WIDTH), is_owner


def _add_counts(counts: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """Count slots ``(R, *)``, except for the first slot of each row, given by ``starts`` ``(R, 1)``.

    The background in that slot has weight 0, and no other weight depends on its count. Once a network is right, it
    holds most pixels. They are counted in dummy slots, so that atomics on a GPU don't contend for one address.
    """
    dummies = torch.arange(slots.shape[1], device=slots.device) % _DUMMIES + (counts.shape[0] - _DUMMIES)
    indices = torch.where(slots == starts, dummies, slots).flatten()
    return counts.scatter_add(0, indices, torch.ones((), dtype=torch.int64, device=slots.device).expand_as(indices))


def _ranges(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the smallest foreground error and the largest background error of each row, float32 ``(R, 1)``.

    Both are at most the largest finite number, which also stands for the smallest error of a row without foreground.

    Args:
        parts: errors ``(R, *)`` and foreground of the rows, divided along the pixels.
    """
    smallest, largest = [], []
    for errors, foreground in parts:
        # 0 on the foreground and the largest number on the background, which is faster than selecting by a mask.
        bound = (~foreground).to(errors.dtype) * _MAX_ERROR
        smallest.append(errors.maximum(bound).amin(1, keepdim=True))
        largest.append(errors.minimum(bound).amax(1, keepdim=True))
    lowest, highest = reduce(torch.minimum, smallest), reduce(torch.maximum, largest)
    return lowest.to(torch.float32).clamp(max=_MAX_ERROR), highest.to(torch.float32)


def _bits(number: int) -> int:
    """Return the bits of a positive integer as a float32. The bits of larger numbers are larger."""
    exponent = number.bit_length() - 1
    return (126 + exponent << _MANTISSA_BITS) + (number << _MANTISSA_BITS - exponent)


def layout(num_bins: int) -> tuple[int, int, int]:
    """Compute the layout of the bins.

    Returns:
        the bits of the position where the narrow bins start, the number of low bits that differ within a narrow bin,
        and the bits of the last position.
    """
    per_octave = max(0, num_bins.bit_length() - 6)
    return _bits(num_bins) - (_OCTAVES << _MANTISSA_BITS), _MANTISSA_BITS - per_octave, _bits(num_bins + 2)


def count_slots(num_bins: int) -> int:
    """Return the number of slots in a row."""
    first, within, last = layout(num_bins)
    return num_bins + 3 + (last - first >> within)


def slots_at(positions: Tensor, num_bins: int) -> Tensor:
    """Return the slots of errors, int32. Larger errors never have a smaller slot.

    Args:
        positions: positions of the errors in their range, in units of bins of equal width. Positions up to 0 have the
            first slot, positions above ``num_bins + 1`` the last.
        num_bins: number of bins of equal width.
    """
    first, within, last = layout(num_bins)
    # The slot is the index of the bin of equal width plus that of the narrow bin. It changes where either of them does,
    # so it has the edges of both. As it is computed from bits, nan has a slot, too.
    bits = positions.to(torch.float32).view(torch.int32).clamp(0, last)
    return bits.view(torch.float32).ceil().to(torch.int32) + ((bits - first).clamp(min=0) >> within)


def weights_of_slots(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the background and foreground weights of each slot ``(R, 2, slots)``, and the foreground sizes ``(R,)``.

    Args:
        counts: numbers of background and foreground pixels in each slot, int64 ``(R, 2, slots)``.
        dtype: dtype of the weights. Only integers are divided, so no wider dtype is needed.
    """
    background, foreground = counts.unbind(1)
    alarms, missed = counts.cumsum(-1).unbind(1)
    total = missed[:, -1]
    # Slots ascend, but ranking starts from the largest error: ``first`` and ``last`` are the unions before and after
    # the background of a slot is passed, and ``missed`` is the foreground that is not passed before the slot.
    first = (alarms[:, -1:] + total.unsqueeze(1) - alarms).clamp(min=1)
    last = first + background
    # Twice the mean of the foreground not passed before and after the slot, and twice the mean of the two unions.
    means = torch.stack([2 * missed - foreground, first + last], 1).to(dtype)
    return means / (2 * first).unsqueeze(1) / last.unsqueeze(1), total
