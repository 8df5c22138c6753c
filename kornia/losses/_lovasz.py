# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the Lovász losses: the closed form of the weights, and each loss with its gradient.

One *group* of pixels (an image, or the whole batch) and one class have errors ``e >= 0`` and ``G`` foreground pixels.
Sorted by descending error, the pixel with ``k`` foreground and ``m`` background pixels up to and including itself has
the weight (the subgradient of the Lovász extension of the Jaccard loss, Berman et al. 2018, eq. 9, in closed form)::

    foreground   1 / (G + m)
    background   (G - k) / ((G + m - 1) (G + m))
    G = 0        1 for the largest error, 0 for the others

and the loss is the sum of ``weight * error``. The textbook form subtracts neighbouring values of the Jaccard loss,
which cancel once a group has many pixels; the counts here are integers, so nothing cancels at any size.

The weights depend on the order of the errors only. Given them, a loss is linear in the errors, so every derivative
comes from the linear part and ranking needs no autograd graph. How the errors are ranked is none of this file's
business: both losses are handed a function ``rank``.
"""

from __future__ import annotations

from typing import Callable, Optional, Sequence, Union

import torch
from torch import Tensor

Classes = Union[str, Sequence[int]]
# Errors and foreground (B, C, N), and something that ascends with the errors or None, to weights (B, C, N) and the
# foreground sizes (groups, C).
Rank = Callable[[Tensor, Tensor, Optional[Tensor]], tuple[Tensor, Tensor]]
Factors = Callable[[Tensor, Optional[Tensor]], Tensor]


def closed_form(background: Tensor, position: Tensor, union: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights of ranked pixels.

    Args:
        background: 1 for a background pixel and 0 for a foreground pixel, int32 or int64 as the others.
        position: how many pixels rank before this one.
        union: the foreground size ``G`` plus the background up to and including this one.
        dtype: of the weights.
    """
    # Of the union before this pixel, a foreground pixel keeps all and a background pixel the foreground not yet
    # passed, G - k: one expression in exact integers. Where that union is empty, this pixel makes the whole loss.
    previous = union.clamp(min=2).sub_(1)
    return torch.addcmul(previous, background, position, value=-1).to(dtype).div_(previous).div_(union)


def counted(errors: Tensor, weights: Tensor) -> Tensor:
    """Errors, and 0 where the weight is 0: its product with an infinite error would be nan."""
    return torch.where(weights == 0, 0.0, errors)


def hinge(logits: Tensor, labels: Tensor, valid: Optional[Tensor], divisor: int, rank: Rank) -> tuple[Tensor, Tensor]:
    """Lovász hinge loss (Yu and Blaschko 2015; Berman et al. 2018, section 2.2).

    Args:
        logits: float32 or float64 ``(B, 1, N)``.
        labels: 1 for the foreground, ``(B, 1, N)``.
        valid: bool ``(B, 1, N)``, False for the pixels to ignore, or None.
        divisor: what the mean over the groups divides by.
        rank: see above.

    Returns:
        the part of each image in the loss of its group ``(B,)``, and the gradient of their sum ``(B, 1, N)``.
    """
    foreground = labels == 1
    signs = torch.where(foreground, -1.0, 1.0).to(logits.dtype)
    # The error is 1 + margin. Ranking the margins spares it the rounding of the sum.
    margins = signs * logits
    if valid is not None:
        margins = margins.masked_fill(~valid, float("-inf"))
    errors = (1.0 + margins).relu()
    weights = rank(errors.detach(), foreground, margins.detach())[0].div_(divisor)
    losses = (counted(errors, weights) * weights).sum((1, 2))
    return losses, torch.where(errors.detach() <= 0, 0.0, signs * weights)


def softmax(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], weight: Optional[Tensor], factors_of: Factors, rank: Rank
) -> tuple[Tensor, Tensor]:
    """Lovász-Softmax loss (Berman et al. 2018, section 3.2).

    The error of class ``c`` is its probability where the label differs and, where the label is ``c``, the sum of the
    other probabilities, which is exact where ``1 - p`` would round to 0. For the same reason, a foreground weight is
    applied to the other probabilities of its pixel: the loss becomes ``sum(p * h)`` over the classes that are not the
    label, with ``h`` the background weight there plus the foreground weight of the pixel. Nothing cancels in that.

    Args:
        logits: float32 or float64 ``(B, C, N)``.
        labels: int64 ``(B, 1, N)`` in ``[0, C)``; 0 where ``valid`` is False.
        valid: bool ``(B, 1, N)``, False for the pixels to ignore, or None.
        weight: factor of each class ``(C,)`` or None.
        factors_of: given the foreground sizes and the weight, the factor of each class in the loss ``(groups, C)``.
        rank: see above.

    Returns:
        the part of each image in the loss of its group ``(B,)``, and the gradient of their sum ``(B, C, N)``.
    """
    foreground = labels == torch.arange(logits.shape[1], device=labels.device).view(-1, 1)
    if valid is not None:
        foreground = foreground & valid
        logits = logits.masked_fill(~valid, 0.0)
    probabilities = logits.softmax(1)
    fixed = probabilities.detach()
    errors = fixed.masked_fill(foreground, 0.0)
    errors = torch.where(foreground, errors.sum(1, keepdim=True), errors)
    if valid is not None:
        errors = errors.masked_fill_(~valid, -1.0)
    weights, sizes = rank(errors, foreground, None)
    del errors
    weights = weights * factors_of(sizes, weight).unsqueeze(-1)
    weights = weights + weights.gather(1, labels)
    weights = weights.masked_fill_(foreground if valid is None else foreground | ~valid, 0.0)
    shares = (probabilities * weights).sum(1, keepdim=True)
    return shares.sum((1, 2)), (weights - shares).detach().mul_(fixed)


def class_factors(
    classes: Classes, divisor: int, dtype: torch.dtype, sizes: Tensor, weight: Optional[Tensor]
) -> Tensor:
    """Factor of each class in the loss of each group ``(groups, C)``: a mean over ``classes``.

    Args:
        classes: "all", "present" or the indices of the classes to average.
        divisor: what the mean over the groups divides by.
        dtype: of the factors.
        sizes: foreground pixels ``(groups, C)``.
        weight: factor of each class ``(C,)`` or None.
    """
    if isinstance(classes, str):
        averaged = sizes > 0 if classes == "present" else torch.ones_like(sizes, dtype=torch.bool)
    else:
        averaged = torch.zeros(sizes.shape[1], dtype=torch.bool, device=sizes.device)
        for c in classes:
            averaged[c] = True
        averaged = averaged.expand_as(sizes)
    count = averaged.sum(1, keepdim=True).clamp(min=1)
    factors = averaged.to(dtype) / (count * divisor)
    # Chosen rather than multiplied: the weight of a class that is not averaged may be inf or nan.
    return factors if weight is None else torch.where(averaged, factors * weight.to(dtype), 0.0)
