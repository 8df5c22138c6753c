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

Errors are divided by the largest of their row, which brings them into [0, 1]. Of ``2 num_bins`` bins, half are spread
evenly there: no bin is wider than ``largest / num_bins``. The other half go where they matter: a first count of the
errors by their leading bits, in *cells*, shows where the union and the passed foreground, which the weights depend
on, grow fastest. All of this is integer arithmetic. It does not depend on the run, and counts that are summed over
processes give each process the same bins.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch
import torch.distributed
from torch import Tensor

# The errors of a cell share an exponent and 4 bits of the mantissa. Those below 2^-25 of the largest have no cell.
_CELLS = 400
_CELL_BITS = 19
_ONE = 0x3F800000  # the bits of 1.0
# A key holds how far an error lies below the largest, in the order of float32 numbers, and a flag of the foreground.
# Its leading bits number the cell, of which a row then has this many.
_FLAG_BIT = 28
_COLUMNS = 1 << (_FLAG_BIT - _CELL_BITS + 1)
# The unit in which bins are assigned to cells is a part of 2^-10 of a bin.
_PART_BITS = 10


def rank_by_bins(
    errors: Tensor,
    foreground: Tensor,
    num_bins: int,
    per_image: bool,
    group: Optional[torch.distributed.ProcessGroup] = None,
    slab: Optional[int] = None,
    total: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor]:
    """Weights of the errors ``(B, M, N)``, ranked in M rows for each image or for the whole batch.

    Pixels to ignore must be background without a positive error. An error that is not positive has the weight 0, but
    for the largest of an absent class.

    Args:
        errors: float32 or float64.
        foreground: bool ``(B, M, N)``.
        num_bins: half the number of bins of a row.
        per_image: whether each image has rows of its own; otherwise the images share them.
        group: the processes whose batches are one batch, or None.
        slab: how many errors to count at a time, which takes some 40 bytes for each. None: all.
        total: the foreground size of each row, int64 ``(R,)``, if errors of 0 have been left out; otherwise counted.

    Returns:
        the weights ``(B, M, N)``, and the foreground size of each row in all processes, int64 ``(R,)``.
    """
    batch, per_batch, count = errors.shape
    if total is None:
        total = foreground.sum(-1).flatten() if per_image else foreground.sum((0, 2))
    if errors.numel() == 0 and group is None:
        return torch.zeros_like(errors), total
    if count == 0:  # without a pixel, this process still takes part
        pixel = torch.nn.functional.pad
        one = pixel(errors, (0, 1)), pixel(foreground, (0, 1))
        weights, total = rank_by_bins(*one, num_bins, per_image, group, total=total)
        return weights[..., :0], total
    num_rows = batch * per_batch if per_image else per_batch
    row_of = torch.arange(num_rows, device=errors.device)
    row_of = row_of.view(batch if per_image else 1, per_batch, 1).expand(batch, -1, -1)
    largest, is_owner = _largest(errors, per_image, group)
    scale, row_cells = largest[row_of], (row_of * _COLUMNS).to(torch.int32)
    # In each half of a row, the column behind the bins is of errors without a cell.
    columns = 2 * (2 * num_bins + 1)
    row_slots = (row_of * columns).to(torch.int32)
    length = count if slab is None else max(1, slab // max(1, batch * per_batch))
    parts = [slice(start, start + length) for start in range(0, count, length)]

    def over_parts(step: Callable[[slice], Tensor], dtype: torch.dtype, over: Optional[Tensor] = None) -> Tensor:
        """What ``step`` makes of all pixels, a part of them at a time, written over a tensor if that is as wide."""
        if len(parts) == 1:
            return step(slice(None))
        fits = over is not None and over.element_size() == dtype.itemsize
        result = over.view(dtype) if fits else torch.empty_like(errors, dtype=dtype)
        for part in parts:
            result[..., part] = step(part)
        return result

    def summed_counts(slots: Callable[[slice], Tensor], columns: int, extra: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels in each slot, int64 ``(R, columns)``, and ``extra``; both summed over the processes."""
        counts = extra.new_zeros(num_rows * columns)
        for part in parts:
            slot = slots(part).flatten()
            if slab is not None and errors.device.type == "cpu":
                counts += slot.bincount(minlength=len(counts))
            else:
                counts = counts.scatter_add(0, slot.long(), torch.ones_like(slot, dtype=torch.int64))
        counts = torch.cat([counts, extra])
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        return counts[: -len(extra)].view(-1, columns), counts[-len(extra) :]

    def keys_in(part: slice) -> Tensor:
        bits = (errors[..., part] / scale).to(torch.float32).view(torch.int32)
        depth = _ONE - bits.clamp(_ONE - (_CELLS << _CELL_BITS), _ONE)
        return depth + (foreground[..., part].to(torch.int32) << _FLAG_BIT)

    keys = over_parts(keys_in, torch.int32)
    cells, total = summed_counts(lambda part: (keys[..., part] >> _CELL_BITS) + row_cells, _COLUMNS, total)
    background, foreground_cells = cells.view(num_rows, 2, -1)[..., :_CELLS].unbind(1)
    starts, slopes = _assign(foreground_cells, background, total, num_bins)

    def slots_in(part: slice) -> Tensor:
        key = keys[..., part]
        cell = ((key >> _CELL_BITS) + row_cells).flatten()
        within = (key & ((1 << _CELL_BITS) - 1)).to(torch.float32).flatten()
        slot = (starts.index_select(0, cell) + within * slopes.index_select(0, cell)).to(torch.int32)
        return slot.view(key.shape) + row_slots

    slots = over_parts(slots_in, torch.int32, keys)
    bins, _ = summed_counts(lambda part: slots[..., part], columns, total)
    background, foreground_bins = bins.view(num_rows, 2, -1)[..., :-1].unbind(1)
    table = torch.nn.functional.pad(_weights(foreground_bins, background, total), (0, 1)).to(errors.dtype)
    table = table.flatten()

    def weights_in(part: slice) -> Tensor:
        slot = slots[..., part]
        return table.index_select(0, slot.flatten()).view(slot.shape)

    weights = over_parts(weights_in, errors.dtype, slots)
    # Of an absent class, the largest error alone counts.
    alone = (is_owner & (total == 0)[row_of]).to(errors.dtype)
    return weights.scatter_add_(-1, errors.argmax(-1, keepdim=True), alone), total


def _largest(errors: Tensor, per_image: bool, group: Optional[torch.distributed.ProcessGroup]) -> tuple[Tensor, Tensor]:
    """The largest error of each row ``(R,)``, and whether it is in this image of this process ``(B, M, 1)``.

    It is positive, finite and float32, whatever the errors are.
    """
    of_image = errors.amax(-1).to(torch.float32)
    limits = torch.finfo(torch.float32)
    if per_image:
        return of_image.flatten().clamp(limits.tiny, limits.max), torch.ones_like(of_image, dtype=torch.bool)[..., None]
    # Zeros in front stand for the images of a process that has none.
    largest, image = torch.cat([of_image.new_zeros(1, of_image.shape[1]), of_image]).max(0)
    largest = largest.clamp(limits.tiny, limits.max)
    is_owner = image.unsqueeze(0) == torch.arange(1, len(errors) + 1, device=errors.device).unsqueeze(-1)
    if group is not None:
        # The order of positive numbers is the order of their bits. Of equal ones, the process of the lowest rank wins.
        others = torch.distributed.get_world_size(group) - torch.distributed.get_rank(group)
        own = (largest.view(torch.int32).to(torch.int64) << 32) + others
        best = own.clone()
        torch.distributed.all_reduce(best, torch.distributed.ReduceOp.MAX, group=group)
        largest = (best >> 32).to(torch.int32).view(torch.float32)
        is_owner = is_owner & (own == best)
    return largest, is_owner.unsqueeze(-1)


def _assign(foreground: Tensor, background: Tensor, total: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Assign bins to cells.

    Args:
        foreground: the foreground pixels of each cell, int64 ``(R, _CELLS)``.
        background: the background pixels of each cell.
        total: the foreground size, int64 ``(R,)``.
        num_bins: half the number of bins.

    Returns:
        the slot in the row at which each cell starts, and how many slots it has for a step of depth, float32
        ``(R * _COLUMNS,)``.
    """
    total = total.unsqueeze(-1)
    passed = foreground.cumsum(-1)
    union = (total + background.cumsum(-1)).clamp(min=1)
    growth = torch.stack([(foreground << 20) // total.clamp(min=1), (background << 20) // union])
    # Once all foreground is passed, the weights are 0.
    growth = growth * (total > passed - foreground)
    # The last parts stay free, for rounding.
    budget = (num_bins << _PART_BITS) - _CELLS - (1 << _PART_BITS - 1)
    parts = (growth * budget // (2 * growth.sum(-1, keepdim=True)).clamp(min=1)).sum(0)
    # Each 16 cells share an exponent, and are half as wide as those before.
    cell = torch.arange(_CELLS, device=parts.device)
    width = torch.exp2(-(cell // 16 + 5).to(torch.float64))
    parts = parts + (width * (num_bins << _PART_BITS)).ceil().to(torch.int64)
    starts = (parts.cumsum(-1) - parts).to(torch.float64) * 2.0**-_PART_BITS
    slopes = parts.to(torch.float64) * 2.0 ** -(_PART_BITS + _CELL_BITS)

    # A row has one half for the background and one for the foreground.
    rest = _COLUMNS // 2 - _CELLS
    starts = torch.nn.functional.pad(starts, (0, rest), value=2 * num_bins).unsqueeze(1)
    slopes = torch.nn.functional.pad(slopes, (0, rest)).unsqueeze(1).expand(-1, 2, -1)
    half = torch.arange(2, device=parts.device).view(2, 1) * (2 * num_bins + 1)
    return (starts + half).to(torch.float32).flatten(), slopes.to(torch.float32).flatten()


def _weights(foreground: Tensor, background: Tensor, total: Tensor) -> Tensor:
    """Weights of the background and the foreground of each bin, float64 ``(R, 2, bins)``; see the top of this file.

    Args:
        foreground: the foreground pixels of each bin, int64 ``(R, bins)``.
        background: the background pixels of each bin.
        total: the foreground size, int64 ``(R,)``.
    """
    total = total.unsqueeze(-1)
    passed, alarms = foreground.cumsum(-1), background.cumsum(-1)
    # An absent class has no union before its first pixel; its weights are 0 here.
    first = (total + alarms - background).clamp(min=1).to(torch.float64)
    last = (total + alarms).clamp(min=1).to(torch.float64)
    rest = (2 * (total - passed) + foreground).to(torch.float64)
    return torch.stack([rest / first / last / 2, (1 / first + 1 / last) / 2], 1)
