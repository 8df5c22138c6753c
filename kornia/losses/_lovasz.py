# SPDX-License-Identifier: Apache-2.0
"""The Lovász extension of the Jaccard loss: the mathematics of the Lovász hinge and Lovász-Softmax losses.

One *group* of pixels (an image, or a whole batch) and one class have errors ``e >= 0`` and ``G`` foreground pixels.
Sorted by descending error, the pixel with ``k`` foreground and ``m`` background pixels up to and including itself has
the weight (the subgradient of the Lovász extension, Berman et al. 2018, eq. 9, in closed form)::

    foreground   1 / (G + m)
    background   (G - k) / ((G + m - 1) (G + m))
    G = 0        1 for the largest error, 0 for the others

and the loss is the sum of ``weight * error``. The textbook form subtracts neighbouring values of the Jaccard loss,
which cancel once an image has many pixels; the counts here are integers, so nothing cancels at any size.

The weights depend on the order of the errors only. Once ranked, the loss is linear in the errors, and the ranking
needs no autograd graph: every derivative comes from the linear part.
"""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor


def check_options(reduction: str, num_bins: Optional[int], group: Optional[object]) -> None:
    """Check the options that both losses share."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'. Got: {reduction!r}")
    if num_bins is not None or group is not None:
        raise NotImplementedError("num_bins and group are not available yet: leave both at None for the exact loss")


def reduce_losses(losses: Tensor, reduction: str) -> Tensor:
    """Reduce the losses of the groups; the mean over no group is 0."""
    if reduction == "none":
        return losses
    return losses.sum() / max(1, losses.shape[0]) if reduction == "mean" else losses.sum()


def _closed_form(foreground: Tensor, k: Tensor, m: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight of each pixel from its integer counts ``k`` and ``m`` and the foreground size ``G = total``."""
    union = total + m
    # The background ratio is 0 / 0 for the largest error of an absent class and nowhere else: its weight is 1.
    ratio = torch.where(union > 1, (total - k).to(dtype) / (union - 1).to(dtype), 1.0)
    return torch.where(foreground, 1.0, ratio) / union.to(dtype)


def _rank(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of the errors ``(*, N)``, ranked along the last dimension, without a data-dependent shape.

    Pixels to ignore must be background with an error below every valid one. They then rank last, where the weight of
    a background pixel is 0, unless there is no valid pixel at all.
    """
    order = errors.argsort(dim=-1, descending=True, stable=True)
    is_foreground = foreground.gather(-1, order)
    k = is_foreground.cumsum(-1, dtype=torch.int32)
    m = torch.arange(1, errors.shape[-1] + 1, dtype=torch.int32, device=errors.device) - k
    total = foreground.sum(-1, keepdim=True, dtype=torch.int32)
    weights = _closed_form(is_foreground, k, m, total, errors.dtype)
    return torch.zeros_like(errors).scatter(-1, order, weights)


def _rank_groups(errors: Tensor, foreground: Tensor, per_image: bool) -> Tensor:
    """Weights of the errors ``(B, *, N)``, ranked within each image or within the whole batch."""
    if per_image:
        return _rank(errors, foreground)
    by_pixel = errors.movedim(0, -2)
    weights = _rank(by_pixel.flatten(-2), foreground.movedim(0, -2).flatten(-2))
    return weights.reshape(by_pixel.shape).movedim(-2, 0)


def hinge_losses(logits: Tensor, foreground: Tensor, valid: Optional[Tensor], per_image: bool) -> Tensor:
    """Lovász hinge loss of each group (Yu and Blaschko 2015; Berman et al. 2018, section 2.2).

    Args:
        logits: float32 or float64 ``(B, N)``.
        foreground: bool ``(B, N)``.
        valid: bool ``(B, N)``, False for the pixels to ignore, or None.
        per_image: whether each image is a group; otherwise the batch is one.

    Returns:
        the losses ``(B,)``, or ``(1,)`` for a batch-wide group.
    """
    margins = torch.where(foreground, -logits, logits)
    errors = (1.0 + margins).relu()
    # The margins order the errors without the rounding of the sum.
    keys = margins.detach()
    if valid is not None:
        foreground = foreground & valid
        errors = errors.masked_fill(~valid, 0.0)
        keys = keys.masked_fill(~valid, float("-inf"))
    weights = _rank_groups(keys, foreground, per_image)
    # A weight of 0 leaves its pixel out; multiplied with an infinite error it would be nan.
    losses = (errors.masked_fill(weights == 0, 0.0) * weights).sum(-1)
    return losses if per_image else losses.sum(0, keepdim=True)


def class_coefficients(
    classes: Union[str, Sequence[int]], weight: Optional[Tensor], present: Tensor, dtype: torch.dtype
) -> Tensor:
    """Factor of each class in the loss of each group, from ``present`` ``(groups, C)``: a mean over ``classes``."""
    if classes == "present":
        averaged = present.to(dtype)
    elif classes == "all":
        averaged = torch.ones_like(present, dtype=dtype)
    else:
        chosen = torch.tensor(list(classes), device=present.device)
        averaged = torch.zeros_like(present, dtype=dtype).index_fill(-1, chosen, 1.0)
    mean = averaged / averaged.sum(-1, keepdim=True).clamp(min=1.0)
    return mean if weight is None else mean * weight.to(dtype)


def softmax_losses(
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    classes: Union[str, Sequence[int]],
    per_image: bool,
) -> Tensor:
    """Lovász-Softmax loss of each group (Berman et al. 2018, section 3.2).

    The error of class ``c`` is its probability where the label differs and, where the label is ``c``, the sum of the
    other probabilities, which is exact where ``1 - p`` would round to 0.

    Args:
        logits: float32 or float64 ``(B, C, N)``.
        labels: int64 ``(B, N)`` in ``[0, C)``, any of them where ``valid`` is False.
        valid: bool ``(B, N)``, False for the pixels to ignore, or None.
        weight: factor of each class ``(C,)`` or None.
        classes: "all", "present" or the indices of the classes to average.
        per_image: whether each image is a group; otherwise the batch is one.

    Returns:
        the losses ``(B,)``, or ``(1,)`` for a batch-wide group.
    """
    labels = labels.unsqueeze(1)
    foreground = labels == torch.arange(logits.shape[1], device=logits.device).unsqueeze(-1)
    if valid is not None:
        valid = valid.unsqueeze(1)
        logits = logits.masked_fill(~valid, 0.0)
        foreground = foreground & valid
    probabilities = logits.softmax(1)

    others = probabilities.detach().masked_fill(foreground, 0.0)
    errors = torch.where(foreground, others.sum(1, keepdim=True), others)
    if valid is not None:
        errors = errors.masked_fill(~valid, -1.0)
    weights = _rank_groups(errors, foreground, per_image)

    present = foreground.any(-1) if per_image else foreground.any(-1).any(0, keepdim=True)
    weights = weights * class_coefficients(classes, weight, present, logits.dtype).unsqueeze(-1)
    # As the probabilities of a pixel sum to 1, its foreground error is the sum of the others: moving the foreground
    # weight onto them leaves a form without a constant, that neither cancels nor loses a small gradient.
    weights = (weights + weights.gather(1, labels)).masked_fill(foreground, 0.0)
    if valid is not None:
        weights = weights.masked_fill(~valid, 0.0)
    losses = (probabilities * weights).sum((1, 2))
    return losses if per_image else losses.sum(0, keepdim=True)
