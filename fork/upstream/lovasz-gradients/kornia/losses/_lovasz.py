# SPDX-License-Identifier: Apache-2.0
"""The weights of the errors in the Lovász losses."""

from __future__ import annotations

import torch
from torch import Tensor


def jaccard_weights(foreground: Tensor) -> Tensor:
    r"""Weights of sorted errors in the Lovász extension of the Jaccard loss (Berman et al. 2018, eq. 9).

    A weight is what a pixel adds to the Jaccard loss :math:`1 - I / U` of the pixels before it. With the pixel's
    indicator :math:`t`, that difference is

    .. math::

        \frac{t \, U_{before} + (1 - t) \, I_{before}}{U_{before} \, U}

    where nothing cancels. The difference of the two losses has the same value, but loses its digits as an image grows.

    Args:
        foreground: 1 for a pixel of the foreground and 0 for one of the background, in the order of descending errors,
            :math:`(*, N)`.

    Returns:
        the weights :math:`(*, N)`.
    """
    size = foreground.sum(-1, keepdim=True)
    intersection = size - foreground.cumsum(-1)
    union = size + (1.0 - foreground).cumsum(-1)
    first = (union - intersection)[..., :1] / union[..., :1]
    t, union_before, intersection_before = foreground[..., 1:], union[..., :-1], intersection[..., :-1]
    return torch.cat([first, (t * union_before + (1.0 - t) * intersection_before) / union_before / union[..., 1:]], -1)
