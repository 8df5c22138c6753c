# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: only the pixels that can have a weight are ranked, and buffers are used again.

A background error below every foreground error of its class has the weight 0, as no foreground is left to pass. So has,
for the loss, a hinge error of 0. Of a class without foreground, the largest error alone counts. What remains are the
candidates. They are ranked a *slab* at a time: the rows of several classes, or one row that is larger.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._lovasz import Factors, counted
from ._lovasz_rank import rank_candidates


def _slab_size(count: int) -> int:
    """How many of so many errors to rank at a time: temporaries that stay in the cache, and not too many steps."""
    return 1 << 18


def hinge(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], divisor: int, per_image: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz.hinge` computes, of float32 or float64 logits ``(B, 1, N)``."""
    shape = (len(logits), -1) if per_image else (1, -1)
    foreground = (labels == 1).view(shape)
    margins = torch.where(foreground, -1.0, 1.0).to(logits.dtype).mul_(logits.reshape(shape))
    if valid is not None:
        margins.masked_fill_(~valid.view(shape), float("-inf"))
    totals = torch.stack([row.count_nonzero() for row in foreground])
    floors = margins.new_full((len(margins),), -1.0).nextafter(margins.new_tensor(torch.inf))
    if not totals.all():
        floors = torch.where(totals == 0, floors.maximum(margins.amax(1)), floors)

    losses = margins.new_zeros(len(margins))
    slab = _slab_size(margins.numel())
    step = max(1, slab // margins.shape[1])
    for first in range(0, len(margins), step):
        rows = slice(first, first + step)
        weights = rank_candidates(margins[rows], foreground[rows], floors[rows], totals[rows], slab).div_(divisor)
        errors = margins[rows].add_(1.0).relu_()
        if errors.max() == torch.inf:
            errors = counted(errors, weights)
        losses[rows] = errors.mul_(weights).sum(1)
        margins[rows].copy_(foreground[rows]).mul_(-2.0).add_(1.0).mul_(weights)  # already the gradient there
    return losses, margins.view(logits.shape)


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
    errors = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    torch.softmax(logits, 1, out=errors)
    foreground = torch.zeros(logits.shape, dtype=torch.bool, device="cpu")
    found = labels
    if valid is None:
        foreground.scatter_(1, labels, True)
    else:
        errors.masked_fill_(~valid, 0.0)
        foreground.scatter_(1, labels, valid)
        found = labels.masked_fill(~valid, num_classes)  # the ignored as a class of their own, left out
    # A foreground error is the sum of the other probabilities. The probability of the label is kept for the gradient.
    labelled = errors.gather(1, labels)
    others = errors.scatter_(1, labels, 0.0).sum(1, keepdim=True)
    errors.scatter_(1, labels, others)

    # The foreground of each class of each group, and its smallest error.
    shape = (batch, num_classes + 1)
    cells = found.squeeze(1) + (num_classes + 1) * torch.arange(batch, device="cpu").unsqueeze(1)
    totals = cells.flatten().bincount(minlength=shape[0] * shape[1]).view(shape)[:, :num_classes]
    floors = logits.new_full(shape, torch.inf).scatter_reduce_(1, found.squeeze(1), others.squeeze(1), "amin")
    floors = floors[:, :num_classes]
    if not per_image:
        totals, floors = totals.sum(0, keepdim=True), floors.amin(0, keepdim=True)
    factors = factors_of(totals, weight).flatten()
    # A pixel whose error is 0 has no part in the loss or its gradient, whatever its weight.
    tiny = torch.finfo(logits.dtype).smallest_normal * torch.finfo(logits.dtype).eps
    totals, floors = totals.flatten(), floors.flatten().clamp(min=tiny)

    # Rows of pixels, one for each class of an image; those of a group lie one after the other.
    by_row, foreground_by_row = errors.view(-1, count), foreground.view(-1, count)
    images = torch.arange(1 if per_image else batch, device="cpu") * num_classes
    length = len(images) * count
    # With h as in the formula: lift is the part of h that the classes of a pixel share, the foreground weight, and
    # share is sum(p * h), the part of the pixel in the loss. The gradient is p * (h - share).
    share, lift = torch.zeros((2, batch, count), dtype=logits.dtype, device="cpu")
    parts_of_rows: list[tuple[Tensor, Tensor]] = []
    slab = _slab_size(errors.numel())
    for chosen in ((factors != 0) & (totals > 0)).nonzero().squeeze(1).split(max(1, slab // max(1, length))):
        rows = (chosen.unsqueeze(1) + images).flatten()
        some_errors = by_row.index_select(0, rows)
        some_foreground = foreground_by_row.index_select(0, rows)
        weights = rank_candidates(
            some_errors.view(-1, length), some_foreground.view(-1, length), floors[chosen], totals[chosen], slab
        )
        weights = weights.mul_(factors[chosen].unsqueeze(1)).view(-1, count)
        lift.index_add_(0, rows // num_classes, torch.where(some_foreground, weights, 0.0))
        parts = weights.mul_(some_errors)
        share.index_add_(0, rows // num_classes, parts)
        parts_of_rows.append((rows, parts))

    absent = ((factors != 0) & (totals == 0)).nonzero().squeeze(1)
    if len(absent) > 0:  # the largest error alone counts: its line of pixels, then its place in the line
        rows = absent.unsqueeze(1) + images
        lines = errors.view(batch * num_classes, -1, width)
        line = lines.amax(2).index_select(0, rows.flatten()).view(len(absent), -1).argmax(1)
        row, line = rows.gather(1, (line // lines.shape[1]).unsqueeze(1)).squeeze(1), line % lines.shape[1]
        largest, column = lines[row, line].max(1)
        column += line * width
        largest *= factors[absent]
        share.index_put_((row // num_classes, column), largest, accumulate=True)

    errors.mul_((lift - share).unsqueeze(1))
    for rows, parts in parts_of_rows:
        by_row.index_add_(0, rows, parts)
    if len(absent) > 0:
        by_row.index_put_((row, column), largest, accumulate=True)
    errors.scatter_(1, labels, labelled.mul_(share.unsqueeze(1)).neg_())
    return share.sum(1), errors
