# SPDX-License-Identifier: Apache-2.0
"""The Lovász losses from every pixel, in plain PyTorch: on any device, compiled, under autograd and functorch.

Ranking needs no autograd graph, as the weights depend on the order of the errors only. Given the weights, the losses
here are expressions of the logits that autograd can differentiate as often as it likes; the first gradient is computed
beside them, for those who need no graph.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._labels import binary_labels, class_labels
from ._lovasz import class_factors
from ._lovasz_bins import binned_weights
from ._lovasz_options import Options
from ._lovasz_sort import sorted_weights


def losses_and_gradient(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Losses of the groups, which include the divisor of the mean, and the gradient of their sum ``(B, C, N)``.

    Args:
        pred: logits ``(B, C, H, W)`` of any real dtype.
        target: labels ``(B, H, W)``.
        weight: factor of each class ``(C,)`` or None.
        options: what is asked for.
    """
    logits = pred.flatten(2).to(options.dtype_of(pred, weight))
    labels = target.flatten(1).unsqueeze(1)
    if options.classes is None:
        losses, gradient = _single_class(logits, labels, options)
    else:
        losses, gradient = _softmax(logits.expand(labels.shape[0], -1, -1), labels, weight, options)
    return losses if options.per_image else losses.sum(0, keepdim=True), gradient


def _single_class(logits: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Lovász hinge (Yu and Blaschko 2015; Berman et al. 2018, section 2.2) or sigmoid loss: the part of each image.

    Args:
        logits: float32 or float64 ``(B, 1, N)``.
        labels: ``(B, 1, N)``.
        options: what is asked for.
    """
    foreground, valid = binary_labels(labels, options.ignore_index)
    signs = torch.where(foreground, -1.0, 1.0).to(logits.dtype)
    # Errors ascend with the margins. Ranking the margins spares the order the rounding of the errors.
    margins = signs * logits
    if valid is not None:
        margins = margins.masked_fill(~valid, float("-inf"))
    errors = (1.0 + margins).relu() if options.loss == "hinge" else margins.sigmoid()
    ranked = errors if options.num_bins is not None else margins
    weights = _rank(ranked.detach(), foreground, options)[0].div_(options.divisor(logits.shape[0]))
    # The product of no weight and an infinite error would be nan. An error that is nan must stay.
    counted = errors.masked_fill((weights == 0) & errors.isinf(), 0.0)
    gradient, fixed = signs * weights, errors.detach()
    gradient = gradient.masked_fill(fixed <= 0, 0.0) if options.loss == "hinge" else gradient * fixed * (1.0 - fixed)
    return (counted * weights).sum((1, 2)), gradient


def _softmax(logits: Tensor, labels: Tensor, weight: Optional[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    """Lovász-Softmax loss (Berman et al. 2018, section 3.2): the part of each image.

    The error of class ``c`` is its probability where the label differs and, where the label is ``c``, the sum of the
    other probabilities, which is exact where ``1 - p`` would round to 0. For the same reason, a foreground weight is
    applied to the other probabilities of its pixel: the loss becomes ``sum(p * h)`` over the classes that are not the
    label, with ``h`` the background weight there plus the foreground weight of the pixel. Nothing cancels in that.

    Args:
        logits: float32 or float64 ``(B, C, N)``.
        labels: ``(B, 1, N)``.
        weight: factor of each class ``(C,)`` or None.
        options: what is asked for.
    """
    batch, num_classes, _ = logits.shape
    labels, valid = class_labels(labels, num_classes, options.ignore_index)
    foreground = labels == torch.arange(num_classes, device=labels.device).view(-1, 1)
    if valid is not None:
        foreground = foreground & valid
        logits = logits.masked_fill(~valid, 0.0)
    probabilities = logits.softmax(1)
    fixed = probabilities.detach()
    errors = fixed.masked_fill(foreground, 0.0)
    errors = torch.where(foreground, errors.sum(1, keepdim=True), errors)
    if valid is not None:
        errors = errors.masked_fill_(~valid, -1.0)
    weights, sizes = _rank(errors, foreground, options)
    del errors
    factors = class_factors(options.classes or "all", weight, sizes, options.divisor(batch), logits.dtype)
    weights = weights * factors.unsqueeze(-1)
    weights = weights + weights.gather(1, labels)
    weights = weights.masked_fill_(foreground if valid is None else foreground | ~valid, 0.0)
    shares = (probabilities * weights).sum(1, keepdim=True)
    return shares.sum((1, 2)), (weights - shares).detach().mul_(fixed)


def _rank(errors: Tensor, foreground: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Weights ``(B, C, N)`` of errors, or of what ascends with them, and foreground sizes ``(groups, C)``."""
    num_classes = errors.shape[1]
    axis = 0 if options.per_image else 1  # the classes come before the images of their group

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if options.per_image else tensor.transpose(0, 1).flatten(1)

    if options.num_bins is not None:
        weights, sizes = binned_weights(rows(errors), rows(foreground), options)
    else:
        weights, sizes = sorted_weights(rows(errors), rows(foreground)), rows(foreground).sum(1)
    return weights.view(errors.transpose(0, axis).shape).transpose(0, axis), sizes.view(-1, num_classes)
