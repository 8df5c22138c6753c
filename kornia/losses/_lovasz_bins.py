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
from typing import Optional, Sequence

import torch
import torch.distributed
from torch import Tensor

from ._eager import is_eager
from ._lovasz_group import check_agreement, range_of_all
from ._lovasz_options import Options
from ._tuning import tuning

# From the smallest error to the largest, the width of the narrow bins doubles this many times.
_OCTAVES = 24
_MANTISSA_BITS = 23
# Dummy slots at the end of the counts, see _add_counts.
_SPARE = 1 << 10
# The range of the errors is at least that wide, and its ends at most that large, so that its inverse is finite.
NARROWEST, _MOST = 2.0**-100, torch.finfo(torch.float32).max


def _at_once(errors: Tensor) -> int:
    return tuning.counted_at_once if errors.device.type == "cpu" else tuning.counted_at_once_cuda


def binned_weights(errors: Tensor, foreground: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Weights of rows of errors ``(R, N)``.

    Pixels to ignore must be background without a positive error; the weight of such an error means nothing.

    Args:
        errors: float32 or float64.
        foreground: bool ``(R, N)``.
        options: the number of bins of equal width in a row, and the processes whose rows are parts of one row.

    Returns:
        the weights ``(R, N)``, and the foreground size of each row in all processes, int64 ``(R,)``.
    """
    rows, count = errors.shape
    num_bins, group = options.num_bins or 1, options.process_group
    if errors.numel() == 0:
        if group is None:
            return torch.zeros_like(errors), foreground.sum(1)
        pixel = torch.nn.functional.pad  # without a pixel, this process still takes part
        weights, total = binned_weights(pixel(errors, (0, 1)), pixel(foreground, (0, 1)), options)
        return weights[:, :0], total
    num_slots = count_slots(num_bins)
    step = max(1, 16 * _at_once(errors) // num_slots)  # many small images have larger tables than pixels
    if group is None and is_eager(errors) and rows > step:
        parts = [binned_weights(*part, options) for part in zip(errors.split(step), foreground.split(step))]
        return torch.cat([weights for weights, _ in parts]), torch.cat([total for _, total in parts])

    width = max(1, _at_once(errors) // rows) if is_eager(errors) else count
    parts = list(zip(errors.split(width, 1), foreground.split(width, 1)))
    smallest, scale, is_owner = _range_of_bins(parts, options)
    # The slots of a row are those of its background, then those of its foreground.
    starts = torch.arange(0, rows * 2 * num_slots, 2 * num_slots, device=errors.device).unsqueeze(1)

    def slots_of(errors: Tensor, foreground: Tensor) -> Tensor:
        return slots_at((errors - smallest) * scale, num_bins).add(foreground, alpha=num_slots) + starts

    counts = torch.zeros(rows * 2 * num_slots + _SPARE, dtype=torch.int64, device=errors.device)
    for part in parts:
        counts = _add_counts(counts, slots_of(*part), starts)
    counts = counts[:-_SPARE]
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    table, total = weights_of_slots(counts.view(rows, 2, num_slots), errors.dtype)
    table = table.flatten()
    weights = [table.index_select(0, slots_of(*part).flatten()).view(part[0].shape) for part in parts]
    # Of an absent class, the largest error alone counts.
    alone = total == 0 if is_owner is None else (total == 0) & is_owner
    alone = alone.unsqueeze(1).to(errors.dtype)
    return torch.cat(weights, 1).scatter_add(1, errors.argmax(1, keepdim=True), alone), total


def _range_of_bins(parts: Sequence[tuple[Tensor, Tensor]], options: Options) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Where the bins of each row begin, how many there are in an error of 1, both ``(R, 1)``, and :func:`range_of_all`.

    Args:
        parts: of the rows, the errors ``(R, *)`` and where the foreground is.
        options: how many bins, and over which processes.
    """
    smallest, largest = _ranges(parts)
    is_owner = None
    if options.process_group is not None:
        check_agreement(parts[0][0], options)
        smallest, largest, is_owner = range_of_all(smallest, largest, options.process_group)
    # Both ends are moved outwards, where the smallest itself must be above the first slot and rounding to float32 may
    # have lowered the largest. There is one bin more, for rounding.
    smallest, largest = smallest * (1 - 2.0**-20), (largest * (1 + 2.0**-20)).clamp(max=_MOST)
    return smallest, ((options.num_bins or 1) + 0.5) / (largest - smallest).clamp(min=NARROWEST), is_owner


def _add_counts(counts: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """Add the counts of slots ``(R, *)``, except for the first slot of each row, given by ``starts`` ``(R, 1)``.

    The background there has weight 0, and no other weight depends on how much there is. Once a network is right, most
    pixels are there. Their atomic additions on a GPU would queue at one address, so they go to the dummy slots.
    """
    spare = torch.arange(slots.shape[1], device=slots.device) % _SPARE + (counts.shape[0] - _SPARE)
    places = torch.where(slots == starts, spare, slots).flatten()
    return counts.scatter_add(0, places, torch.ones((), dtype=torch.int64, device=slots.device).expand_as(places))


def _ranges(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The smallest error of the foreground and the largest of the background of each row, float32 ``(R, 1)``.

    The largest finite number stands for what is larger, and for the smallest error of no foreground.

    Args:
        parts: of the rows, the errors ``(R, *)`` and where the foreground is.
    """
    smallest, largest = [], []
    for errors, foreground in parts:
        # 0 on the foreground and the largest number on the background: cheaper than to select by a mask.
        bound = (~foreground).to(errors.dtype) * _MOST
        smallest.append(errors.maximum(bound).amin(1, keepdim=True))
        largest.append(errors.minimum(bound).amax(1, keepdim=True))
    lowest, highest = reduce(torch.minimum, smallest), reduce(torch.maximum, largest)
    return lowest.to(torch.float32).clamp(max=_MOST), highest.to(torch.float32)


def _bits(number: int) -> int:
    """The bits of a positive integer as a float32 number, whose order is the order of the numbers."""
    exponent = number.bit_length() - 1
    return (126 + exponent << _MANTISSA_BITS) + (number << _MANTISSA_BITS - exponent)


def layout(num_bins: int) -> tuple[int, int, int]:
    """The bits where the narrow bins start, how many low bits differ within one, and the bits of the last position."""
    per_octave = max(0, num_bins.bit_length() - 6)
    return _bits(num_bins) - (_OCTAVES << _MANTISSA_BITS), _MANTISSA_BITS - per_octave, _bits(num_bins + 2)


def count_slots(num_bins: int) -> int:
    """How many slots a row has."""
    first, within, last = layout(num_bins)
    return num_bins + 3 + (last - first >> within)


def slots_at(positions: Tensor, num_bins: int) -> Tensor:
    """Slots, int32, of errors in ascending order.

    Args:
        positions: of the errors in their range, in bins of equal width. Those up to 0 have the first slot, those
            above ``num_bins + 1`` the last.
        num_bins: the number of bins.
    """
    first, within, last = layout(num_bins)
    # The sum of two numbers that ascend with the error changes wherever one of them does: it has the edges of both.
    # By their bits, nan has a slot too.
    bits = positions.to(torch.float32).view(torch.int32).clamp(0, last)
    return bits.view(torch.float32).ceil().to(torch.int32) + ((bits - first).clamp(min=0) >> within)


def weights_of_slots(counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights of the background and the foreground of each slot ``(R, 2, slots)``, and the foreground size ``(R,)``.

    Args:
        counts: the background and foreground pixels in each slot, int64 ``(R, 2, slots)``.
        dtype: of the weights. What is divided are integers, so that no number needs more precision than that.
    """
    background, foreground = counts.unbind(1)
    alarms, missed = counts.cumsum(-1).unbind(1)
    total = missed[:, -1]
    # In descending order, the union before and after the background of a slot; missed is the foreground not passed
    # before it, as the slots are in ascending order.
    first = (alarms[:, -1:] + total.unsqueeze(1) - alarms).clamp(min=1)
    last = first + background
    # Twice the mean of the foreground not passed before and after the slot, and of the two unions.
    means = torch.stack([2 * missed - foreground, first + last], 1).to(dtype)
    return means / (2 * first).unsqueeze(1) / last.unsqueeze(1), total
