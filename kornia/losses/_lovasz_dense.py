# SPDX-License-Identifier: Apache-2.0
"""The Lovász losses in plain PyTorch, ranking every pixel: on any device, compiled, under autograd and functorch.

Ranking needs no autograd graph, because the weights depend only on the order of the errors. With the weights fixed, the
losses are expressions of the logits that autograd can differentiate any number of times. The first gradient is computed
along with them, for callers that need no graph.
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
    """Compute the losses of the groups, already divided for the mean, and the gradient ``(B, C, N)`` of their sum.

    Args:
        pred: logits ``(B, C, H, W)`` of any real dtype.
        target: labels ``(B, H, W)``.
        weight: factor of each class ``(C,)`` or None.
        options: settings of the loss.
    """
    logits = pred.flatten(2).to(options.dtype_of(pred, weight))
    labels = target.flatten(1).unsqueeze(1)
    if options.classes is None:
        losses, gradient = _single_class(logits, labels, options)
    else:
        losses, gradient = _softmax(logits.expand(labels.shape[0], -1, -1), labels, weight, options)
    return losses if options.per_image else losses.sum(0, keepdim=True), gradient


def _single_class(logits: Tensor, labels: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Lovász hinge loss (Yu and Blaschko 2015; Berman et al. 2018, section 2.2) or sigmoid loss.

    Args:
        logits: float32 or float64 ``(B, 1, N)``.
        labels: ``(B, 1, N)``.
        options: settings of the loss.

    Returns:
        the part of each image in the loss ``(B,)``, and the gradient of their sum ``(B, 1, N)``.
    """
    foreground, valid = binary_labels(labels, options.ignore_index)
    signs = torch.where(foreground, -1.0, 1.0).to(logits.dtype)
    # Margins have the same order as errors. Ranking them keeps the rounding of the errors out of the order.
    margins = signs * logits
    if valid is not None:
        margins = margins.masked_fill(~valid, float("-inf"))
    errors = (1.0 + margins).relu() if options.loss == "hinge" else margins.sigmoid()
    ranked = errors if options.num_bins is not None else margins
    weights = _rank(ranked.detach(), foreground, options)[0].div_(options.divisor(logits.shape[0]))
    # A weight of 0 times an infinite error would be nan. Errors that are nan must stay nan.
    counted = errors.masked_fill((weights == 0) & errors.isinf(), 0.0)
    gradient, fixed = signs * weights, errors.detach()
    gradient = gradient.masked_fill(fixed <= 0, 0.0) if options.loss == "hinge" else gradient * fixed * (1.0 - fixed)
    return (counted * weights).sum((1, 2)), gradient


def _softmax(logits: Tensor, labels: Tensor, weight: Optional[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    """Lovász-Softmax loss (Berman et al. 2018, section 3.2).

    The error of class ``c`` is its probability on pixels with another label. On pixels labelled ``c``, it is the sum of
    the other probabilities, which stays accurate where ``1 - p`` would round to 0. For the same reason, the foreground
    weight of a pixel is applied to its other probabilities: the loss becomes ``sum(p * h)`` over the classes that are
    not the label, where ``h`` is the background weight of the class plus the foreground weight of the pixel. Nothing
    cancels in this form.

    Args:
        logits: float32 or float64 ``(B, C, N)``.
        labels: ``(B, 1, N)``.
        weight: factor of each class ``(C,)`` or None.
        options: settings of the loss.

    Returns:
        the part of each image in the loss ``(B,)``, and the gradient of their sum ``(B, C, N)``.
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
    """Compute the weights ``(B, C, N)`` of errors or margins, and the foreground sizes ``(groups, C)``."""
    num_classes = errors.shape[1]
    axis = 0 if options.per_image else 1  # in a row, the images of a batch-wide group follow each other

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if options.per_image else tensor.transpose(0, 1).flatten(1)

    if options.num_bins is not None:
        weights, sizes = binned_weights(rows(errors), rows(foreground), options)
    else:
        weights, sizes = sorted_weights(rows(errors), rows(foreground)), rows(foreground).sum(1)
    return weights.view(errors.transpose(0, axis).shape).transpose(0, axis), sizes.view(-1, num_classes)
