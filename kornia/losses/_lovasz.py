# SPDX-License-Identifier: Apache-2.0
"""The mathematics of the Lovász losses: the weights of ranked pixels, and the factors of the classes.

A *group* of pixels is one image or the whole batch. For one class, a group has errors ``e >= 0`` and ``G`` foreground
pixels. Sort the errors, largest first. A pixel that has ``k`` foreground and ``m`` background pixels up to and
including itself then has the weight::

    foreground   1 / (G + m)
    background   (G - k) / ((G + m - 1) (G + m))
    G = 0        1 for the largest error, 0 for the others

The loss is the sum of ``weight * error``. The weights are the subgradient of the Lovász extension of the Jaccard loss
(Berman et al. 2018, eq. 9) in closed form. The textbook form subtracts neighbouring values of the Jaccard loss, which
cancel once a group has many pixels. Here all counts are integers, so nothing cancels at any size.

The weights depend only on the order of the errors. With the weights fixed, a loss is linear in the errors.
"""

from __future__ import annotations

from typing import Optional, Sequence, Union

import torch
from torch import Tensor


def jaccard_weights(background: Tensor, position: Tensor, union: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the weights of ranked pixels.

    Args:
        background: 1 for a background pixel and 0 for a foreground pixel, int32 or int64 like the other counts.
        position: number of pixels that rank before this one.
        union: foreground size ``G`` plus the number of background pixels up to and including this one.
        dtype: dtype of the weights.
    """
    # The numerator is an exact integer: G - k on the background, and ``previous`` on the foreground, where it cancels.
    # The clamp gives the first pixel the weight 1 if there is no foreground.
    previous = union.clamp(min=2).sub_(1)
    return torch.addcmul(previous, background, position, value=-1).to(dtype).div_(previous).div_(union)


def class_factors(
    classes: Union[str, Sequence[int]], weight: Optional[Tensor], sizes: Tensor, divisor: int, dtype: torch.dtype
) -> Tensor:
    """Compute the factor of each class in the loss of each group ``(groups, C)``, for the mean over ``classes``.

    Args:
        classes: "all", "present" or the indices of the classes to average.
        weight: factor of each class ``(C,)`` or None.
        sizes: numbers of foreground pixels ``(groups, C)``.
        divisor: divisor of the mean over the groups.
        dtype: dtype of the factors.
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
    # Select instead of multiplying by 0, because the weight of a class that is not averaged may be inf or nan.
    return factors if weight is None else torch.where(averaged, factors * weight.to(dtype), 0.0)
