# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: only the pixels that can have a weight are ranked, and buffers are used again.

A background error below every foreground error of its class has the weight 0, as no foreground is left to pass. So has,
for the loss, a hinge error of 0. Of a class without foreground, the largest error alone counts. What remains are the
candidates. They are ranked a *slab* at a time, some of the rows, one for each class of each group.

The foreground is kept as bytes, which PyTorch turns into numbers several times as fast as bools.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._lovasz import Factors, counted
from ._lovasz_rank import rank_candidates

# How many errors of several rows to handle at a time: their temporaries, some 40 bytes for each, stay in the cache, and
# the steps are not many.
_SLAB = 1 << 18


def _slabs(size: int) -> int:
    """How many slabs of equal size to make of so many errors, if there are as many rows."""
    return max(1, round(size / _SLAB))


def hinge(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], divisor: int, per_image: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz.hinge` computes, of float32 or float64 logits ``(B, 1, N)``; the losses are of groups."""
    rows = (logits.shape[0], -1) if per_image else (1, -1)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    tensors = (logits, labels, gradient) if valid is None else (logits, labels, gradient, valid)
    slabs = zip(*(tensor.reshape(rows).chunk(_slabs(logits.numel())) for tensor in tensors))
    return torch.cat([_hinge_rows(*slab, divisor=divisor) for slab in slabs]), gradient


def _hinge_rows(
    logits: Tensor, labels: Tensor, gradient: Tensor, valid: Optional[Tensor] = None, *, divisor: int
) -> Tensor:
    """Losses of rows of pixels ``(R, N)``, one for each group; their gradient overwrites a tensor."""
    foreground = labels.to(torch.uint8)
    margins = gradient.copy_(foreground).mul_(-2.0).add_(1.0).mul_(logits)
    if valid is not None:
        margins.masked_fill_(~valid, float("-inf"))
    candidates = margins.add(1.0).relu_().to(torch.bool)
    weights = rank_candidates(margins, foreground, candidates, foreground.sum(1)).div_(divisor)
    errors = margins.add_(1.0).relu_()
    if errors.max() == torch.inf:
        errors = counted(errors, weights)
    losses = errors.mul_(weights).sum(1)
    gradient.copy_(foreground).mul_(-2.0).add_(1.0).mul_(weights)
    return losses


def softmax(
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    factors_of: Factors,
    per_image: bool,
    width: int,
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz.softmax` computes, of float32 or float64 logits ``(B, C, N)``; a width divides ``N``."""
    batch, num_classes, count = logits.shape
    errors, foreground, labelled, totals, floors = _softmax_errors(logits, labels, valid)
    if not per_image:
        totals, floors = totals.sum(0, keepdim=True), floors.amin(0, keepdim=True)
    factors = factors_of(totals, weight).flatten()
    totals, floors = totals.flatten(), floors.flatten()
    # Rows of pixels, one for each class of an image; those of a group lie one after the other.
    by_row, foreground_by_row = errors.view(-1, count), foreground.view(-1, count)
    images = torch.arange(1 if per_image else batch, device="cpu") * num_classes
    length = images.shape[0] * count
    # With h as in the formula: lift is the part of h that the classes of a pixel share, the foreground weight, and
    # share is sum(p * h), the part of the pixel in the loss. The gradient is p * (h - share).
    share, lift = torch.zeros((2, batch, count), dtype=logits.dtype, device="cpu")
    parts_of_rows: list[tuple[Tensor, Tensor]] = []
    present = ((factors != 0) & (totals > 0)).nonzero().squeeze(1)
    for chosen in present.chunk(_slabs(len(present) * length)):
        rows = (chosen.unsqueeze(1) + images).flatten()
        some, some_foreground = by_row.index_select(0, rows), foreground_by_row.index_select(0, rows)
        some, foreground_of_groups = some.view(-1, length), some_foreground.view(-1, length)
        candidates = (some < floors[chosen].unsqueeze(1)).logical_not_()  # a nan must not be dropped
        weights = rank_candidates(some, foreground_of_groups, candidates, totals[chosen])
        weights.mul_(factors[chosen].unsqueeze(1))
        lift.index_add_(0, rows // num_classes, (weights * foreground_of_groups).view(-1, count))
        weights = weights.mul_(some).view(-1, count)
        parts_of_rows.append((rows, weights))
        share.index_add_(0, rows // num_classes, weights)

    absent = ((factors != 0) & (totals == 0)).nonzero().squeeze(1)
    if absent.shape[0] > 0:
        lines = by_row.view(batch * num_classes, -1, width)
        row, column, largest = _largest_errors(lines, absent.unsqueeze(1) + images)
        largest *= factors[absent]
        share.index_put_((row // num_classes, column), largest, accumulate=True)

    errors.mul_((lift - share).unsqueeze(1))
    for rows, parts in parts_of_rows:
        by_row.index_add_(0, rows, parts)
    if absent.shape[0] > 0:
        by_row.index_put_((row, column), largest, accumulate=True)
    errors.scatter_(1, labels, labelled.mul_(share.unsqueeze(1)).neg_())
    return share.sum(1), errors


def _softmax_errors(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The errors, 0 where they are to be ignored, and the foreground.

    Returns:
        the errors ``(B, C, N)``; where the foreground is, bytes ``(B, C, N)``; its probabilities ``(B, 1, N)``; and for
        each class in each image its size and its smallest error above 0, both ``(B, C)``. A pixel whose error is 0 has
        no part in the loss or its gradient, whatever its weight.
    """
    num_classes = logits.shape[1]
    errors = logits.contiguous().softmax(1)
    foreground = torch.zeros(logits.shape, dtype=torch.uint8, device="cpu")
    if valid is None:
        found = labels
        foreground.scatter_(1, labels, 1)
    else:
        found = labels.masked_fill(~valid, num_classes)  # the ignored as a class of their own, left out
        foreground.scatter_(1, labels, valid.to(torch.uint8))
        errors.masked_fill_(~valid, 0.0)
    labelled = errors.gather(1, labels)
    # The error of the foreground is the sum of the other probabilities.
    others = errors.scatter_(1, labels, 0.0).sum(1, keepdim=True)
    errors.scatter_(1, labels, others)

    sizes = torch.stack([image.bincount(minlength=num_classes + 1) for image in found.squeeze(1)])
    tiny = torch.finfo(errors.dtype).smallest_normal * torch.finfo(errors.dtype).eps
    smallest = errors.new_full(sizes.shape, torch.inf)
    smallest.scatter_reduce_(1, found.squeeze(1), others.squeeze(1), "amin").clamp_(min=tiny)
    return errors, foreground, labelled, sizes[:, :num_classes], smallest[:, :num_classes]


def _largest_errors(lines: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of the largest error of groups: its line of pixels, then its place in the line.

    Args:
        lines: the errors ``(rows, H, W)``.
        rows: of each group ``(K, *)``.
    """
    line = lines.amax(2).index_select(0, rows.flatten()).view(rows.shape[0], -1).argmax(1)
    row, line = rows.gather(1, (line // lines.shape[1]).unsqueeze(1)).squeeze(1), line % lines.shape[1]
    largest, column = lines[row, line].max(1)
    return row, column + line * lines.shape[2], largest
