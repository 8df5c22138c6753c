# SPDX-License-Identifier: Apache-2.0
"""Choose the form (the implementation) that computes a reduced loss, and how it is differentiated."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from . import _lovasz_cpu, _lovasz_cuda, _lovasz_dense
from ._eager import is_batched, is_compiled, is_dual, is_eager
from ._lovasz_group import SumOfAll
from ._lovasz_options import Options
from ._tuning import tuning


def lovasz_loss(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> Tensor:
    """Return the reduced loss of logits ``(B, C, H, W)``, in float32 or wider.

    - Eager code computes the loss and its gradient together.
    - Compiled code does the same through a custom operator where a form cannot be traced into a graph: the CPU form
      branches on values, and the fused kernels are not PyTorch operations.
    - Everything else differentiates the dense form by autograd: functorch, other compiled code, forward-mode tangents,
      a weight that requires a gradient, and labels that do (gradcheck perturbs them).
    """
    learns = target.requires_grad or (weight is not None and weight.requires_grad)
    tensors = [x for x in (pred, target, weight) if x is not None]
    if tuning.eager_forms and all(is_eager(x) and not is_dual(x) for x in tensors) and not learns:
        # Autograd cannot save tensors made in inference mode, such as labels predicted by a teacher network.
        target = target.clone() if target.is_inference() and not torch.is_inference_mode_enabled() else target
        form = _Fused if _has_kernels(pred, target, weight, options) else _Eager
        loss = form.apply(pred, target, weight, options)
    elif is_compiled() and _needs_operator(pred) and options.process_group is None and not learns:
        loss = _operator(pred, target, weight, *options.for_operator())[0]
    else:
        loss = options.reduce(_lovasz_dense.losses_and_gradient(pred, target, weight, options)[0])
    return loss if options.process_group is None else SumOfAll.apply(loss, options.process_group)


def _needs_operator(pred: Tensor) -> bool:
    """Whether the form for the device of ``pred`` cannot be traced into a graph."""
    return pred.device.type == "cpu" or tuning.kernels


def _has_kernels(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> bool:
    return tuning.kernels and _lovasz_cuda.can_compute(pred, target, weight, options)


def _compute(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    """Compute the reduced loss and the gradient ``(B, C, N)`` of the sum of the losses, in eager code."""
    if _has_kernels(pred, target, weight, options):
        loss, ranking = _lovasz_cuda.loss_and_ranking(pred, target, weight, options)
        one = torch.ones_like(loss)
        return loss, _lovasz_cuda.gradient(pred, target, weight, options, ranking, one, one.dtype)
    is_exact_on_cpu = pred.device.type == "cpu" and options.num_bins is None
    form = _lovasz_cpu if is_exact_on_cpu and pred.numel() >= tuning.cpu_from else _lovasz_dense
    losses, gradient = form.losses_and_gradient(pred.detach(), target, weight, options)
    return options.reduce(losses), gradient


class _Eager(torch.autograd.Function):
    """Reduced loss that computes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> Tensor:
        loss, gradient = _compute(pred, target, weight, options)
        if ctx.needs_input_grad[0]:
            ctx.options, ctx.gradient = options, gradient
            ctx.shape, ctx.dtype = pred.shape, pred.dtype
            ctx.save_for_backward(pred, target, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        return _Eager.gradient(ctx, *grad_outputs), None, None, None

    @staticmethod
    def gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
        if _is_derived(grad_loss):
            return _derived(*ctx.saved_tensors, ctx.options, grad_loss)
        gradient = ctx.gradient
        if ctx.options.process_group is not None:
            # Keep the gradient: recomputing it needs the other processes, which may not run a second backward.
            return _as_pred(gradient * grad_loss.view(-1, 1, 1), ctx.shape, ctx.dtype)
        # Return the gradient without a copy. A second backward computes it again.
        ctx.gradient = None
        if gradient is None:
            gradient = _compute(*ctx.saved_tensors, ctx.options)[1]
        # The factor is usually 1, because the gradient includes the divisor of the mean.
        if gradient.device.type != "cpu" or grad_loss.numel() != 1 or grad_loss.item() != 1:
            gradient.mul_(grad_loss.view(-1, 1, 1))
        return _as_pred(gradient, ctx.shape, ctx.dtype)


class _Fused(torch.autograd.Function):
    """Reduced loss from fused kernels, which compute the gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> Tensor:
        loss, ranking = _lovasz_cuda.loss_and_ranking(pred.detach(), target, weight, options)
        if ctx.needs_input_grad[0]:
            ctx.options = options
            ctx.save_for_backward(pred, target, weight, *ranking)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        pred, target, weight, *ranking = ctx.saved_tensors
        (grad_loss,) = grad_outputs
        if _is_derived(grad_loss):
            return _derived(pred, target, weight, ctx.options, grad_loss), None, None, None
        is_one_image = len(pred) != len(target)  # its gradient is a sum over the images of target, in float32
        dtype = torch.float32 if is_one_image else pred.dtype
        inputs = pred.detach(), target, weight, ctx.options
        gradient = _lovasz_cuda.gradient(*inputs, _lovasz_cuda.Ranking(*ranking), grad_loss, dtype)
        return _as_pred(gradient, pred.shape, pred.dtype), None, None, None


def _is_derived(grad_loss: Tensor) -> bool:
    """Whether the backward pass must itself be differentiable or handle a batch of gradients."""
    return torch.is_grad_enabled() or is_batched(grad_loss) or is_dual(grad_loss)


def _derived(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options, grad_loss: Tensor) -> Tensor:
    """Compute the gradient from the dense form by autograd, so that it can be differentiated again."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = options.reduce(_lovasz_dense.losses_and_gradient(pred, target, weight, options)[0])
    return torch.autograd.grad(loss, pred, grad_loss, create_graph=create_graph)[0]


def _as_pred(gradient: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Convert a gradient ``(B, C, N)`` to the shape and dtype of the logits, which may be one image for all labels."""
    if gradient.shape[0] != shape[0]:
        gradient = gradient.sum(0, keepdim=True)
    return gradient.view(shape).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Compiled code
# ---------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "kornia::lovasz_loss",
    mutates_args=(),
    schema=(
        "(Tensor pred, Tensor target, Tensor? weight, str loss, int? ignore_index, bool per_image, str reduction, "
        "int? num_bins, str? classes, int[]? indices) -> (Tensor, Tensor)"
    ),
)
def _operator(
    pred: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    loss: str,
    ignore_index: Optional[int],
    per_image: bool,
    reduction: str,
    num_bins: Optional[int],
    classes: Optional[str],
    indices: Optional[list[int]],
) -> tuple[Tensor, Tensor]:
    """Compute the reduced loss and its gradient in eager code, as one node of a compiled graph."""
    options = _options(loss, ignore_index, per_image, reduction, num_bins, classes, indices)
    value, gradient = _compute(pred, target, weight, options)
    return value, gradient.contiguous()


def _options(*settings: Any) -> Options:
    *shared, classes, indices = settings
    return Options(*shared, classes=classes if indices is None else tuple(indices))


@_operator.register_fake
def _(pred: Tensor, target: Tensor, weight: Optional[Tensor], *settings: Any) -> tuple[Tensor, Tensor]:
    options = _options(*settings)
    batch, (_, num_classes, height, width) = target.shape[0], pred.shape
    shape = () if options.reduction != "none" else (batch if options.per_image else 1,)
    dtype = options.dtype_of(pred, weight)
    return pred.new_empty(shape, dtype=dtype), pred.new_empty((batch, num_classes, height * width), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    pred, target, weight, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], pred, target, weight)


def _differentiate(ctx: Any, grad_loss: Tensor, _: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
    gradient, pred, target, weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # a second derivative is needed
        result = _derived(pred, target, weight, _options(*ctx.settings), grad_loss)
    else:
        result = _as_pred(gradient * grad_loss.view(-1, 1, 1), pred.shape, pred.dtype)
    return result, *[None] * (2 + len(ctx.settings))


_operator.register_autograd(_differentiate, setup_context=_save)
