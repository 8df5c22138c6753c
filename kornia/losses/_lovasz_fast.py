# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: only the pixels that can have a weight are ranked, and buffers are used again.

A background error below every foreground error of its class has the weight 0, as no foreground is left to pass. So has,
for the loss, a hinge error of 0. Of a class without foreground, the largest error alone counts. What remains are the
candidates. They are ranked a *slab* at a time: the rows of several classes, or one row that is larger.
"""

from __future__ import annotations

from functools import partial
from typing import Optional

import torch
from torch import Tensor

from ._lovasz import Factors, counted
from ._lovasz_rank import rank_candidates

# Errors to handle at a time: their temporaries, some 50 bytes for each, stay in the cache, and the steps are not many.
_SLAB = 1 << 18


def _steps(length: int, size: int) -> int:
    """How many of so many rows of a size to handle at a time, all parts alike and about a slab."""
    parts = max(1, min(length, round(length * size / _SLAB)))
    return -(-length // parts)


def hinge(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], divisor: int, per_image: bool
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz.hinge` computes, of float32 or float64 logits ``(B, 1, N)``."""
    shape = (logits.shape[0], -1) if per_image else (1, -1)
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    step = _steps(*gradient.view(shape).shape)
    tensors = (logits, labels, gradient) if valid is None else (logits, labels, gradient, valid)
    parts = zip(*(tensor.reshape(shape).split(step) for tensor in tensors))
    return torch.cat([_hinge_rows(*part, divisor=divisor) for part in parts]), gradient


def _hinge_rows(
    logits: Tensor, labels: Tensor, gradient: Tensor, valid: Optional[Tensor] = None, *, divisor: int
) -> Tensor:
    """Losses of rows of pixels ``(R, N)``, one for each group; their gradient overwrites a tensor."""
    foreground = labels == 1
    margins = gradient.copy_(foreground).mul_(-2.0).add_(1.0).mul_(logits)
    if valid is not None:
        margins.masked_fill_(~valid, float("-inf"))
    totals = torch.stack([row.count_nonzero() for row in foreground])
    floors = margins.new_full((len(margins),), -1.0).nextafter(margins.new_tensor(torch.inf))
    if not totals.all():
        floors = torch.where(totals == 0, floors.maximum(margins.amax(1)), floors)

    weights = rank_candidates(margins, foreground, floors, totals, _SLAB).div_(divisor)
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
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device="cpu")
    step = _steps(logits.shape[0], logits[0].numel()) if per_image else logits.shape[0]
    tensors = (logits, labels, gradient) if valid is None else (logits, labels, gradient, valid)
    parts = zip(*(tensor.split(step) for tensor in tensors))
    images = partial(_softmax_images, weight=weight, factors_of=factors_of, per_image=per_image, width=width)
    return torch.cat([images(*part) for part in parts]), gradient


def _softmax_images(
    logits: Tensor,
    labels: Tensor,
    errors: Tensor,
    valid: Optional[Tensor] = None,
    *,
    weight: Optional[Tensor],
    factors_of: Factors,
    per_image: bool,
    width: int,
) -> Tensor:
    """Parts of images in the losses of their groups ``(B,)``; their gradient overwrites the errors ``(B, C, N)``."""
    batch, num_classes, count = logits.shape
    foreground, labelled, totals, floors = _softmax_errors(logits, labels, valid, errors)
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
    for chosen in present.split(_steps(max(1, present.shape[0]), length)):
        rows = (chosen.unsqueeze(1) + images).flatten()
        some = by_row.index_select(0, rows), foreground_by_row.index_select(0, rows)
        weights = rank_candidates(*(x.view(-1, length) for x in some), floors[chosen], totals[chosen], _SLAB)
        weights = weights.mul_(factors[chosen].unsqueeze(1)).view(-1, count)
        lift.index_add_(0, rows // num_classes, torch.where(some[1], weights, 0.0))
        parts_of_rows.append((rows, weights.mul_(some[0])))
        share.index_add_(0, rows // num_classes, weights)

    absent = ((factors != 0) & (totals == 0)).nonzero().squeeze(1)
    if absent.shape[0] > 0:
        row, column, largest = _largest_errors(
            by_row.view(batch * num_classes, -1, width), absent.unsqueeze(1) + images
        )
        largest *= factors[absent]
        share.index_put_((row // num_classes, column), largest, accumulate=True)

    errors.mul_((lift - share).unsqueeze(1))
    for rows, parts in parts_of_rows:
        by_row.index_add_(0, rows, parts)
    if absent.shape[0] > 0:
        by_row.index_put_((row, column), largest, accumulate=True)
    errors.scatter_(1, labels, labelled.mul_(share.unsqueeze(1)).neg_())
    return share.sum(1)


def _softmax_errors(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], errors: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the errors ``(B, C, N)``, 0 where they are to be ignored, and describe the foreground.

    Returns:
        where it is, bool ``(B, C, N)``; its probabilities ``(B, 1, N)``; and for each class in each image its size and
        its smallest error above 0, both ``(B, C)``. A pixel whose error is 0 has no part in the loss or its gradient,
        whatever its weight.
    """
    num_classes = logits.shape[1]
    torch.softmax(logits, 1, out=errors)
    foreground = torch.zeros(logits.shape, dtype=torch.bool, device="cpu")
    if valid is None:
        found = labels
        foreground.scatter_(1, labels, True)
    else:
        found = labels.masked_fill(~valid, num_classes)  # the ignored as a class of their own, left out
        foreground.scatter_(1, labels, valid)
        errors.masked_fill_(~valid, 0.0)
    labelled = errors.gather(1, labels)
    # The error of the foreground is the sum of the other probabilities.
    others = errors.scatter_(1, labels, 0.0).sum(1, keepdim=True)
    errors.scatter_(1, labels, others)

    sizes = torch.stack([image.bincount(minlength=num_classes + 1) for image in found.squeeze(1)])
    tiny = torch.finfo(errors.dtype).smallest_normal * torch.finfo(errors.dtype).eps
    smallest = errors.new_full(sizes.shape, torch.inf)
    smallest.scatter_reduce_(1, found.squeeze(1), others.squeeze(1), "amin").clamp_(min=tiny)
    return foreground, labelled, sizes[:, :num_classes], smallest[:, :num_classes]


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
