# SPDX-License-Identifier: Apache-2.0
"""From the logits to the reduced loss: which form computes it, and how it is differentiated."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
import torch.distributed
from torch import Tensor

from . import _lovasz, _lovasz_fast
from ._eager import is_batched, is_dual, is_eager
from ._lovasz_bins import rank_by_bins
from ._lovasz_rank import rank_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._lovasz_options import Options

# With fewer logits, ranking all of them takes fewer and no slower steps.
_MIN_FAST = 1 << 16


def form_of(logits: Tensor, weight: Optional[Tensor], options: Options) -> str:
    """Which form computes the loss.

    - "traced": the dense form under autograd. For ``torch.compile``, ``torch.export`` and functorch, whose graphs must
      not depend on values; for forward-mode tangents; and for a weight that learns, which needs the term of each class.
    - "fast": only the pixels that can have a weight are ranked. On the CPU, where to look at a value costs nothing;
      exact only, since bins need no candidates; and not for few logits.
    - "dense": all pixels are ranked, and the gradient is computed along with the loss. For everything else.
    """
    if not is_eager(logits) or is_dual(logits):
        return "traced"
    if weight is not None and (weight.requires_grad or not is_eager(weight) or is_dual(weight)):
        return "traced"
    if logits.device.type == "cpu" and options.num_bins is None and logits.numel() >= _MIN_FAST:
        return "fast"
    return "dense"


def hinge_loss(logits: Tensor, labels: Tensor, valid: Optional[Tensor], options: Options) -> Tensor:
    """Lovász hinge loss of float32 or float64 logits ``(B, 1, H, W)``; labels and valid are ``(B, 1, N)``."""
    divisor = options.divisor(logits.shape[0])
    dense = partial(_lovasz.hinge, divisor=divisor, rank=partial(_rank, options, ("hinge",)))
    fast = partial(_lovasz_fast.hinge, divisor=divisor, per_image=options.per_image)
    return _evaluate(dense, fast, form_of(logits, None, options), options, logits, labels, valid)


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    classes: _lovasz.Classes,
    options: Options,
) -> Tensor:
    """Lovász-Softmax loss of float32 or float64 logits ``(B, C, H, W)``; labels and valid are ``(B, 1, N)``."""
    factors = partial(_lovasz.class_factors, classes, options.divisor(logits.shape[0]), logits.dtype)
    dense = partial(_lovasz.softmax, factors_of=factors, rank=partial(_rank, options, ("softmax", classes)))
    fast = partial(_lovasz_fast.softmax, factors_of=factors, per_image=options.per_image, width=logits.shape[3])
    return _evaluate(dense, fast, form_of(logits, weight, options), options, logits, labels, valid, weight)


def _rank(
    options: Options, kind: tuple, errors: Tensor, foreground: Tensor, keys: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    """Rank by counting or by sorting: weights ``(B, C, N)``, and foreground sizes ``(groups, C)``.

    Args:
        options: how to group and rank.
        kind: what all processes of a group must have in common besides.
        errors: ``(B, C, N)``.
        foreground: bool ``(B, C, N)``.
        keys: what ascends with the errors and tells more of them apart, or None.
    """
    num_classes = errors.shape[1]
    axis = 0 if options.per_image else 1  # the classes come before the images of their group

    def rows(tensor: Tensor) -> Tensor:
        return tensor.flatten(0, 1) if options.per_image else tensor.transpose(0, 1).flatten(1)

    if options.num_bins is not None:
        weights, sizes = rank_by_bins(rows(errors), rows(foreground), options.num_bins, options.group, kind)
    else:
        foreground = rows(foreground)
        weights, sizes = rank_all(rows(errors if keys is None else keys), foreground), foreground.sum(1)
    return weights.view(errors.transpose(0, axis).shape).transpose(0, axis), sizes.view(-1, num_classes)


def _evaluate(
    dense: Callable[..., tuple[Tensor, Tensor]],
    fast: Callable[..., tuple[Tensor, Tensor]],
    form: str,
    options: Options,
    logits: Tensor,
    *others: Optional[Tensor],
) -> Tensor:
    """Reduced loss by a form. Forms map logits ``(B, C, N)`` and the others to losses of the images and gradient."""

    def traced(logits: Tensor, *others: Optional[Tensor]) -> Tensor:
        return options.reduce(dense(logits.flatten(2), *others)[0])

    if form == "traced":
        loss = traced(logits, *others)
    else:
        loss = _Eager.apply(logits, fast if form == "fast" else dense, traced, options, *others)
    return loss if options.group is None else _GroupSum.apply(loss, options.group)


class _Eager(torch.autograd.Function):
    """Reduced loss whose gradient is computed along with it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        compute: Callable[..., tuple[Tensor, Tensor]],
        traced: Callable[..., Tensor],
        options: Options,
        *others: Optional[Tensor],
    ) -> Tensor:
        losses, gradient = compute(logits.flatten(2), *others)
        if ctx.needs_input_grad[0]:
            ctx.compute, ctx.traced, ctx.options = compute, traced, options
            ctx.gradient, ctx.shape = gradient, logits.shape
            ctx.save_for_backward(logits, *others)
        return options.reduce(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        return _Eager.gradient(ctx, *grad_outputs), *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
        create_graph = torch.is_grad_enabled()
        if create_graph or is_batched(grad_loss) or is_dual(grad_loss):
            # A derivative of the gradient, or many gradients at once.
            logits, *others = ctx.saved_tensors
            with torch.enable_grad():
                loss = ctx.traced(logits, *others)
            return torch.autograd.grad(loss, logits, grad_loss, create_graph=create_graph)[0]
        gradient = ctx.gradient
        if ctx.options.group is not None:
            # It is kept: a second backward must not need the other processes, which may not run one.
            gradient = gradient * grad_loss.view(-1, 1, 1)
        else:
            # The buffer is handed out, to be neither copied nor kept. A second backward has to fill it again.
            ctx.gradient = None
            if gradient is None:
                logits, *others = ctx.saved_tensors
                gradient = ctx.compute(logits.flatten(2), *others)[1]
            # Most often the factor is 1, as the gradient includes the divisor of the mean.
            if gradient.device.type != "cpu" or grad_loss.numel() != 1 or grad_loss.item() != 1:
                gradient.mul_(grad_loss.view(-1, 1, 1))
        return gradient.view(ctx.shape)


class _GroupSum(torch.autograd.Function):
    """The sum over the processes of a group, the same in each.

    Its gradient is that of the part of this process times the number of processes. Where the gradients of the
    processes are averaged, as DistributedDataParallel does, that makes it the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.processes = torch.distributed.get_world_size(group)
        total = part.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.processes, None
