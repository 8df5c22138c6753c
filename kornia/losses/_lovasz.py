# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the Lovász losses: the weights of ranked pixels, and the factors of the classes.

One *group* of pixels (an image, or the whole batch) and one class have errors ``e >= 0`` and ``G`` foreground pixels.
Sorted by descending error, the pixel with ``k`` foreground and ``m`` background pixels up to and including itself has
the weight (the subgradient of the Lovász extension of the Jaccard loss, Berman et al. 2018, eq. 9, in closed form)::

    foreground   1 / (G + m)
    background   (G - k) / ((G + m - 1) (G + m))
    G = 0        1 for the largest error, 0 for the others

and the loss is the sum of ``weight * error``. The textbook form subtracts neighbouring values of the Jaccard loss,
which cancel once a group has many pixels; the counts here are integers, so nothing cancels at any size.

The weights depend on the order of the errors only. Given them, a loss is linear in the errors.
"""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor


def jaccard_weights(background: Tensor, position: Tensor, union: Tensor, dtype: torch.dtype) -> Tensor:
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


def class_factors(
    classes: Union[str, Sequence[int]], weight: Optional[Tensor], sizes: Tensor, divisor: int, dtype: torch.dtype
) -> Tensor:
    """Factor of each class in the loss of each group ``(groups, C)``: a mean over ``classes``.

    Args:
        classes: "all", "present" or the indices of the classes to average.
        weight: factor of each class ``(C,)`` or None.
        sizes: foreground pixels ``(groups, C)``.
        divisor: what the mean over the groups divides by.
        dtype: of the factors.
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
