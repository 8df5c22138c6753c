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
needs no autograd graph: every derivative comes from the linear part. So each loss has two forms, and
:func:`_is_direct` says which one runs:

- *direct* computes the gradient along with the loss and hands it out in backward. It serves ordinary training.
- *traced* leaves the derivatives to autograd. It serves ``torch.compile``, ``torch.export``, functorch, forward-mode
  and second derivatives. When compiled, its shapes depend on the shapes of the input alone.

Both rank all pixels, but for the direct form on the CPU: there, large inputs go the *sparse* way, which ranks only the
pixels that can have a weight and costs about as much as cross-entropy. To rank is to sort, or to hand the errors to
``_lovasz_bins.py``, which counts them, if ``num_bins`` is given.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Optional, Sequence, Union

import torch
import torch.distributed
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._lovasz_bins import rank_by_bins
from ._utils import mask_ignore_pixels

Classes = Union[str, Sequence[int]]

# With fewer logits of several classes, all pixels are ranked: one large step is faster than one for each class.
_MIN_SPARSE = 1 << 18
# The hinge loss of small images takes as few steps as can be: several at once, all of their pixels ranked. Float32
# counts that many pixels exactly.
_SMALL_IMAGE, _SMALL_IMAGES = 1 << 15, 1 << 17
# PyTorch sorts shorter vectors of integers by comparison, which costs more than padding one of a fifth of this length.
_MIN_DIGITS = 1 << 15
# Errors ranked at a time, unless one row is longer: the temporaries take some 40 bytes for each.
_SLAB = 1 << 22
# Sorting takes some 40 bytes for each error, so the hinge loss sorts the errors of a group in parts.
_MAX_PARTS, _MIN_PART = 8, 1 << 17
# Pixels whose weights are computed at a time in the sparse form.
_PIECE = 1 << 16
# The tables of more bins would outgrow the images.
_MAX_BINS = 1 << 16


class Options(NamedTuple):
    """What both losses can be asked for."""

    per_image: bool = True
    reduction: str = "mean"
    num_bins: Optional[int] = None
    group: Optional[torch.distributed.ProcessGroup] = None

    def check(self) -> None:
        """Raise for what cannot be asked for."""
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none'. Got: {self.reduction!r}")
        bins = self.num_bins
        if bins is not None and (not isinstance(bins, int) or isinstance(bins, bool) or not 1 <= bins <= _MAX_BINS):
            raise ValueError(f"num_bins must be None or an integer in [1, {_MAX_BINS}]. Got: {bins!r}")
        if self.group is None:
            return
        if self.per_image:
            raise ValueError("group makes the batches of all processes one: pass per_image=False. Got: per_image=True")
        if bins is None:
            raise ValueError("group needs errors ranked by bins: pass num_bins, such as num_bins=1024. Got: None")
        if torch.distributed.get_rank(self.group) < 0:
            raise ValueError("group must include this process: pass a group made with its rank. Got: one without it")

    def divisor(self, batch: int) -> int:
        """What the mean over the groups divides by: their number, and 1 for an empty batch, whose loss is 0."""
        return max(1, batch) if self.per_image and self.reduction == "mean" else 1

    def reduce(self, losses: Tensor) -> Tensor:
        """The reduced losses of the groups, which include the divisor."""
        return losses if self.reduction == "none" else losses.sum()


def mask_labels(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> tuple[Tensor, Optional[Tensor]]:
    """Replace the labels to ignore by 0, and say where the others are: None if that is everywhere."""
    if labels.device.type == "cpu" and labels.dtype == torch.int64 and _is_eager(labels) and labels.numel() > 0:
        # The most frequent case costs one pass over the labels.
        low, high = (int(label) for label in torch.aminmax(labels))
        if low >= 0 and high < num_classes and (ignore_index is None or not low <= ignore_index <= high):
            return labels, None
    return mask_ignore_pixels(labels, ignore_index)


def hinge_loss(logits: Tensor, labels: Tensor, valid: Optional[Tensor], options: Options) -> Tensor:
    """Lovász hinge loss (Yu and Blaschko 2015; Berman et al. 2018, section 2.2), reduced over the groups.

    Args:
        logits: float32 or float64 ``(B, 1, H, W)``.
        labels: 0 and 1, of any dtype, ``(B, N)``; 0 where ``valid`` is False.
        valid: bool ``(B, N)``, False for the pixels to ignore, or None.
        options: how to group, reduce and rank.
    """
    if not options.per_image:
        labels, valid = labels.reshape(1, -1), None if valid is None else valid.reshape(1, -1)
    traced, direct = partial(_hinge_traced, options), partial(_hinge_direct, options)
    return _reduced_losses(traced, direct, options, logits, labels, valid)


def softmax_loss(
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    classes: Classes,
    options: Options,
) -> Tensor:
    """Lovász-Softmax loss (Berman et al. 2018, section 3.2), reduced over the groups.

    The error of class ``c`` is its probability where the label differs and, where the label is ``c``, the sum of the
    other probabilities, which is exact where ``1 - p`` would round to 0. For the same reason, a foreground weight is
    applied to the other probabilities of its pixel: the loss becomes ``sum(p * h)`` over the classes that are not the
    label, with ``h`` the background weight there plus the foreground weight of the pixel. Nothing cancels in that.

    Args:
        logits: float32 or float64 ``(B, C, H, W)``.
        labels: int64 ``(B, H, W)`` in ``[0, C)``; 0 where ``valid`` is False.
        valid: bool ``(B, H, W)``, False for the pixels to ignore, or None.
        weight: factor of each class ``(C,)`` or None.
        classes: "all", "present" or the indices of the classes to average.
        options: how to group, reduce and rank.
    """
    traced, direct = partial(_softmax_traced, classes, options), partial(_softmax_direct, classes, options)
    # The gradient of a weight needs the term of each class, which the direct form does not keep.
    suited = None if weight is not None and (weight.requires_grad or _is_dual(weight)) else direct
    return _reduced_losses(traced, suited, options, logits, labels, valid, weight)


def _reduced_losses(
    traced: Callable[..., Tensor],
    direct: Optional[Callable[..., Any]],
    options: Options,
    logits: Tensor,
    *others: Optional[Tensor],
) -> Tensor:
    """Losses of the groups by the form that suits the logits, reduced; ``others`` are what the forms need besides."""
    if direct is None or not _is_direct(logits):
        loss = options.reduce(traced(logits, *others))
    elif torch.is_grad_enabled() and logits.requires_grad:
        loss = _Direct.apply(logits, traced, direct, options, *others)
    else:
        loss = options.reduce(direct(logits, *others, with_gradient=False)[0])
    return loss if options.group is None else _GroupSum.apply(loss, options.group)


class _GroupSum(torch.autograd.Function):
    """The sum over the processes of a group, the same in each.

    Its gradient is that of the part of this process times the number of processes. Where the gradients of the
    processes are averaged, as DistributedDataParallel does, that makes it the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        ctx.processes = torch.distributed.get_world_size(group)
        total = part.to(torch.float64, copy=True)
        torch.distributed.all_reduce(total, group=group)
        return total.to(part.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.processes, None


# ---------------------------------------------------------------------------------------------------------------------
# Which form runs
# ---------------------------------------------------------------------------------------------------------------------


def _is_eager(tensor: Tensor) -> bool:
    """Whether the values of a tensor may decide what is computed."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)  # neither fake, as in torch.export, nor another subclass
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def _is_local(tensor: Tensor) -> bool:
    """Whether to consult a value costs nothing."""
    return tensor.device.type == "cpu" and _is_eager(tensor)


def _is_direct(logits: Tensor) -> bool:
    return _is_eager(logits) and logits.numel() > 0 and not _is_dual(logits)


def _is_dual(tensor: Tensor) -> bool:
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


class _Direct(torch.autograd.Function):
    """Reduced losses whose gradient is computed along with them."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        traced: Callable[..., Tensor],
        direct: Callable[..., Any],
        options: Options,
        *others: Optional[Tensor],
    ) -> Tensor:
        losses, gradient = direct(logits, *others, with_gradient=True)
        ctx.traced, ctx.direct, ctx.options = traced, direct, options
        # In a group it is kept: a second backward must not need the other processes, which may not run one.
        ctx.gradient, kept = (gradient, None) if options.group is None else (None, gradient)
        ctx.save_for_backward(kept, logits, *others)
        return options.reduce(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Optional[Tensor], ...]:
        return _Direct.gradient(ctx, *grad_outputs), *[None] * (len(ctx.needs_input_grad) - 1)

    @staticmethod
    def gradient(ctx: Any, grad_loss: Tensor) -> Tensor:
        batched = torch._C._functorch.is_legacy_batchedtensor(grad_loss) or torch._C._are_functorch_transforms_active()
        if torch.is_grad_enabled() or batched or _is_dual(grad_loss):
            # A derivative of the gradient, or many gradients at once.
            _, logits, *others = ctx.saved_tensors
            create_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                loss = ctx.options.reduce(ctx.traced(logits, *others))
            return torch.autograd.grad(loss, logits, grad_loss, create_graph=create_graph)[0]
        if ctx.options.group is not None:
            return ctx.saved_tensors[0] * grad_loss
        # The buffer is handed out, to be neither copied nor kept. It has to be filled again for a second backward.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = ctx.direct(*ctx.saved_tensors[1:], with_gradient=True)[1]
        # Most often the factors are 1, as the gradient includes the divisor of the mean.
        factors = grad_loss.view(-1)
        if not _is_local(gradient) or any(factor != 1.0 for factor in factors.tolist()):
            gradient.mul_(factors.view(-1, 1, 1, 1))
        return gradient


# ---------------------------------------------------------------------------------------------------------------------
# The closed form
# ---------------------------------------------------------------------------------------------------------------------


def _sorted_weights(
    background: Tensor, dtype: torch.dtype, union_before: Optional[int] = None, before: int = 0
) -> Tensor:
    """Weights of pixels in the order of descending errors, along the last dimension.

    Args:
        background: ``(*, N)``, 1 for a background pixel and 0 for a foreground pixel, in a dtype that counts pixels:
            int32, or that of the weights, which spares small inputs some conversions.
        dtype: of the weights.
        union_before: the foreground size ``G`` plus the background that ranks before these pixels. None: these are
            all there are.
        before: how many pixels rank before these.
    """
    count = background.shape[-1]
    union = background.cumsum(-1, dtype=background.dtype)
    union = union + (count - union[..., -1:] if union_before is None else union_before)
    # Of the union before this pixel, a foreground pixel keeps all and a background pixel the foreground not yet
    # passed, G - k: one expression in exact integers. Where that union is empty, this pixel makes the whole loss.
    previous = (union - 1).clamp(min=1)
    kept = previous - background * torch.arange(before, before + count, dtype=union.dtype, device=union.device)
    return kept.to(dtype) / previous / union


def _descending_order(errors: Tensor) -> Tensor:
    """Stable order of the errors ``(*, N)`` along the last dimension, the largest first."""
    if errors.device.type != "cpu" or not _is_eager(errors):
        return errors.argsort(dim=-1, descending=True, stable=True)
    rows = math.prod(errors.shape[:-1])
    if rows == 1:
        by_digits = errors.numel() > _MIN_DIGITS // 5
    else:
        by_digits = errors.numel() > _MIN_DIGITS // 2 and errors.dtype == torch.float32
    if not by_digits:
        return errors.argsort(dim=-1, descending=True, stable=True)
    # On the CPU, PyTorch sorts a vector of integers by their digits, several times as fast as floating-point numbers.
    # The bits of a number order it, once those of a negative number are inverted; inverting all makes it descend.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(torch.iinfo(bits.dtype).max)
    keys = keys.bitwise_xor_(bits).bitwise_not_().view(rows, -1)
    if rows == 1:
        return _order_by_digits(keys[0]).view_as(errors)
    # All rows as one vector, the number of the row before the digits of the error.
    row = torch.arange(rows).unsqueeze(-1)
    order = _order_by_digits(((row << 32) + keys).flatten())
    return (order.view_as(keys) - row * keys.shape[-1]).view_as(errors)


def _order_by_digits(keys: Tensor) -> Tensor:
    """Stable ascending order of a vector of integers."""
    count = len(keys)
    if count < _MIN_DIGITS:
        last = keys.new_full((_MIN_DIGITS - count,), torch.iinfo(keys.dtype).max)
        keys = torch.cat([keys, last])
    return keys.sort(stable=True).indices[:count]


# ---------------------------------------------------------------------------------------------------------------------
# All pixels
# ---------------------------------------------------------------------------------------------------------------------


def _rank(errors: Tensor, foreground: Tensor, options: Options, overwrite: bool = False) -> tuple[Tensor, Tensor]:
    """Weights of rows of errors ``(R, N)``, and which rows have foreground ``(R,)``.

    Pixels to ignore must be background with an error below every valid one, or without one if ranked by bins. They
    then rank last, where the weight of a background pixel is 0, unless there is no valid pixel at all. The errors may
    be overwritten if nobody else needs them, which spares memory.
    """
    eager = _is_eager(errors)
    if options.num_bins is not None:
        # Fewer at a time would need less memory, but CUDA takes some time for each step.
        slab = max(_SLAB // (32 if _is_local(errors) else 4), errors.numel() // 16) if eager else None
        weights, total = rank_by_bins(errors, foreground, options.num_bins, options.group, slab, overwrite=overwrite)
        return weights, total > 0
    if eager and errors.numel() > max(_SLAB, errors.shape[1]):
        # Sorting takes several times the memory of what is sorted: a few rows at a time.
        slabs = (tensor.split(max(1, _SLAB // errors.shape[1])) for tensor in (errors, foreground))
        weights = torch.cat([_rank_rows(*slab) for slab in zip(*slabs)])
    else:
        weights = _rank_rows(errors, foreground)
    return weights, foreground.any(1)


def _rank_present(errors: Tensor, foreground: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """The same on the CPU, only the rows with foreground ranked: of an absent class, the largest error counts."""
    present = foreground.any(1)
    if present.all():
        return _rank(errors, foreground, options, overwrite=True)
    weights = torch.zeros_like(errors).scatter_(1, errors.argmax(1, keepdim=True), 1.0)
    rows = _pixels(present)
    return weights.index_copy_(0, rows, _rank(errors[rows], foreground[rows], options, overwrite=True)[0]), present


def _rank_rows(errors: Tensor, foreground: Tensor) -> Tensor:
    """Weights of rows of errors ``(R, N)`` by sorting."""
    order = _descending_order(errors)
    counts = errors.dtype if errors.shape[1] <= _SMALL_IMAGE else torch.int32
    background = (~foreground).to(counts).gather(-1, order)
    return errors.scatter(-1, order, _sorted_weights(background, errors.dtype))


def _hinge_traced(options: Options, logits: Tensor, labels: Tensor, valid: Optional[Tensor]) -> Tensor:
    """Losses of the groups, which are the rows of labels ``(R, N)``."""
    rows = logits.reshape(labels.shape)
    foreground = labels == 1
    # The error is 1 + margin. Ranking the margins spares it the rounding of the sum.
    margins = torch.where(foreground, -rows, rows)
    errors = (1.0 + margins).relu()
    if valid is not None:
        errors = errors.masked_fill(~valid, 0.0)
        margins = margins.masked_fill(~valid, float("-inf"))
    keys = (margins if options.num_bins is None else errors).detach()
    weights, _ = _rank(keys, foreground, options)
    # A weight of 0 leaves its pixel out; multiplied with an infinite error it would be nan.
    losses = (errors.masked_fill((weights == 0) & errors.isinf(), 0.0) * weights).sum(-1)
    return losses / options.divisor(logits.shape[0])


def _hinge_direct(
    options: Options, logits: Tensor, labels: Tensor, valid: Optional[Tensor], with_gradient: bool
) -> tuple[Tensor, Optional[Tensor]]:
    """The same, and their gradient ``(B, 1, H, W)``."""
    rows = logits.reshape(labels.shape)
    divisor = options.divisor(logits.shape[0])
    if _is_local(logits) and options.group is None:
        if rows.shape[1] > _SMALL_IMAGE:
            losses, gradient = _hinge_sparse(rows, labels, valid, divisor, options.num_bins, with_gradient)
            return losses, None if gradient is None else gradient.view_as(logits)
        size = max(1, _SMALL_IMAGES // rows.shape[1])
    else:
        size = len(rows)
    if len(rows) <= size:
        losses, gradient = _hinge_whole(rows, labels, valid, divisor, options)
    else:
        split = partial(torch.split, split_size_or_sections=size)
        masks = itertools.repeat(None) if valid is None else split(valid)
        parts = [_hinge_whole(*part, divisor, options) for part in zip(split(rows), split(labels), masks)]
        losses, gradient = (torch.cat(of_parts) for of_parts in zip(*parts))
    return losses, gradient.view_as(logits) if with_gradient else None


def _hinge_whole(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], divisor: int, options: Options
) -> tuple[Tensor, Tensor]:
    """Losses ``(R,)`` of rows of pixels and their gradient ``(R, N)``, in as few steps as can be."""
    foreground = labels == 1
    margins = torch.where(foreground, -logits, logits)
    if valid is not None:
        margins.masked_fill_(~valid, float("-inf"))
    errors = (margins + 1.0).relu_()
    if options.num_bins is not None:
        margins = errors
    if options.num_bins is None and _is_local(margins):  # with no step for which rows have foreground
        weights = _rank_rows(margins, foreground)
    else:
        weights, _ = _rank(margins, foreground, options)
    weights.div_(divisor)
    losses = _weighted_sum(errors, weights)
    gradient = errors.sign_().mul_(weights)
    del weights
    return losses, gradient.mul_(torch.where(foreground, -1.0, 1.0))


def _weighted_sum(errors: Tensor, weights: Tensor) -> Tensor:
    """The sum of ``weight * error`` along the last dimension, where there is no graph to record."""
    local = _is_local(errors)
    piece = _PIECE if local else _SLAB // 4
    if errors.shape[-1] > piece:  # on the CPU, the products of a piece stay in the cache
        pieces = zip(errors.split(piece, -1), weights.split(piece, -1))
        return torch.stack([_weighted_sum(*piece) for piece in pieces]).sum(0)
    if local:
        losses = (errors * weights).sum(-1)
        if not math.isnan(sum(losses.view(-1).tolist())):
            return losses
    # Perhaps there is 0 times an infinite error: a weight of 0 leaves its pixel out.
    return errors.masked_fill((weights == 0) & errors.isinf(), 0.0).mul_(weights).sum(-1)


def _class_factors(
    classes: Classes, weight: Optional[Tensor], present: Tensor, divisor: int, dtype: torch.dtype
) -> Tensor:
    """Factor of each class in the loss of each group, from ``present`` ``(groups, C)``: a mean over ``classes``."""
    if isinstance(classes, str):
        averaged = (present if classes == "present" else torch.ones_like(present)).to(dtype)
    else:
        averaged = torch.zeros_like(present, dtype=dtype)
        for c in classes:
            averaged.select(-1, c).fill_(1.0)
    mean = averaged / averaged.sum(-1, keepdim=True).clamp(min=1.0) / divisor
    return mean if weight is None else mean * weight.to(dtype)


def _softmax_traced(
    classes: Classes,
    options: Options,
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
) -> Tensor:
    """Losses of the groups."""
    logits = logits.flatten(2)
    if valid is not None:
        logits = logits.masked_fill(~valid.flatten(1).unsqueeze(1), 0.0)
    probabilities = logits.softmax(1)
    weights, present = _rank_softmax(labels, valid, options, probabilities.detach())
    factors = _class_factors(classes, weight, present, options.divisor(logits.shape[0]), logits.dtype)
    weights = weights * factors.unsqueeze(-1)
    labels = labels.flatten(1).unsqueeze(1)
    weights = (weights + weights.gather(1, labels)).scatter(1, labels, 0.0)
    if valid is not None:
        weights = weights.masked_fill(~valid.flatten(1).unsqueeze(1), 0.0)
    losses = (probabilities * weights).sum((1, 2))
    return losses if options.per_image else losses.sum(0, keepdim=True)


def _softmax_direct(
    classes: Classes,
    options: Options,
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    with_gradient: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """Losses of the groups and their gradient ``(B, C, H, W)``."""
    if _is_local(logits) and options.group is None and logits.numel() >= _MIN_SPARSE:
        return _softmax_sparse(classes, options, logits, labels, valid, weight, with_gradient)
    probabilities = logits.flatten(2).softmax(1)
    if valid is not None:
        probabilities.masked_fill_(~valid.flatten(1).unsqueeze(1), 0.0)
    weights, present = _rank_softmax(labels, valid, options, probabilities)
    factors = _class_factors(classes, weight, present, options.divisor(logits.shape[0]), logits.dtype)
    labels = labels.flatten(1).unsqueeze(1)
    weights.mul_(factors.unsqueeze(-1))
    weights.add_(weights.gather(1, labels)).scatter_(1, labels, 0.0)
    # The gradient is p * (h - share), with h as in softmax_loss and share the sum of p * h.
    parts = weights.mul_(probabilities)
    share = parts.sum(1, keepdim=True)
    losses = share.sum((1, 2)) if options.per_image else share.sum().view(1)
    if not with_gradient:
        return losses, None
    return losses, torch.addcmul(parts, probabilities, share, value=-1, out=probabilities).view(logits.shape)


def _rank_softmax(
    labels: Tensor, valid: Optional[Tensor], options: Options, probabilities: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights ``(B, C, N)`` of probabilities of that shape, and which classes are present, bool ``(groups, C)``."""
    num_classes = probabilities.shape[1]
    # The classes come before the pixels of a group, as in the rows to rank: to reorder the errors would copy them.
    dim = 1 if options.per_image else 0
    labels = labels.flatten(1).unsqueeze(dim)
    foreground = labels == torch.arange(num_classes, device=labels.device).view(-1, 1, 1).movedim(0, dim)
    if valid is not None:
        valid = valid.flatten(1).unsqueeze(dim)
        foreground = foreground & valid
    errors = torch.where(foreground, 0.0, probabilities.movedim(1, dim))
    errors.scatter_(dim, labels, errors.sum(dim, keepdim=True))
    if valid is not None:
        errors.masked_fill_(~valid, -1.0)
    rows, foreground = (tensor.flatten(1 - dim, 2 - dim) for tensor in (errors, foreground))
    if _is_local(rows) and options.group is None and rows.numel() > 0:
        weights, present = _rank_present(rows, foreground, options)
    else:
        weights, present = _rank(rows, foreground, options, overwrite=True)
    return weights.view(errors.shape).movedim(dim, 1), present.view(-1, num_classes)


# ---------------------------------------------------------------------------------------------------------------------
# Sparse
# ---------------------------------------------------------------------------------------------------------------------


def _rank_sparse(
    errors: Tensor, is_background: Callable[[Tensor], Tensor], total: int, before: int = 0, alarms: int = 0
) -> Tensor:
    """Weights of a vector of errors, or of any increasing function of them.

    Args:
        errors: ``(N,)``.
        is_background: which of the indices given are background, bool.
        total: the size of the whole foreground, of which the vector may hold a part.
        before: how many larger errors were ranked before.
        alarms: how many of those are background.
    """
    order = _descending_order(errors)
    weights = torch.empty_like(errors)
    # A piece at a time, the intermediate results stay in the cache.
    for start in range(0, len(order), _PIECE):
        piece = order[start : start + _PIECE]
        background = is_background(piece).to(torch.int32)
        weights.scatter_(0, piece, _sorted_weights(background, errors.dtype, total + alarms, before + start))
        if start + _PIECE < len(order):
            alarms += int(background.sum())
    return weights


def _pixels(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _hinge_sparse(
    rows: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    divisor: int,
    num_bins: Optional[int],
    with_gradient: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """Losses ``(R,)`` of rows of pixels and their gradient ``(R, N)``: only positive errors are ranked."""
    # Without a gradient, the groups share one buffer.
    buffer = torch.empty(rows.shape if with_gradient else (1, rows.shape[1]), dtype=rows.dtype)
    losses = rows.new_empty(len(rows))
    loss_of = _hinge_group if num_bins is None else partial(_hinge_group_by_bins, num_bins=num_bins)
    for g, row in enumerate(rows):
        losses[g] = loss_of(
            row,
            labels[g],
            None if valid is None else valid[g],
            buffer[g if with_gradient else 0],
            divisor=divisor,
            with_gradient=with_gradient,
        )
    return losses, buffer if with_gradient else None


def _hinge_group_by_bins(
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    buffer: Tensor,
    divisor: int,
    num_bins: int,
    with_gradient: bool,
) -> float:
    """Loss of one group of pixels ``(N,)``; its gradient is left in ``buffer``, a tensor of that shape."""
    errors = buffer.copy_(labels).mul_(-2.0).add_(1.0).mul_(logits).add_(1.0).relu_()
    if valid is not None:
        errors.masked_fill_(~valid, 0.0)
    foreground = labels == 1
    wrong = (errors <= 0).logical_not_()  # a nan must not be dropped
    # Few are gathered; of many, that would cost more than ranking all.
    pixels = _pixels(wrong) if 4 * int(wrong.count_nonzero()) < len(errors) else None
    total = foreground.count_nonzero().view(1)
    if pixels is not None:
        errors, foreground = errors.index_select(0, pixels), foreground.index_select(0, pixels)
    weights = rank_by_bins(errors[None], foreground[None], num_bins, slab=_PIECE, total=total)[0][0]
    loss = _weighted_sum(errors, weights).item()
    if with_gradient:
        gradient = errors.copy_(foreground).mul_(-2.0 / divisor).add_(1.0 / divisor).mul_(weights)
        if pixels is None:  # it is in the buffer
            gradient.masked_fill_(~wrong, 0.0)
        else:
            buffer.zero_().index_copy_(0, pixels, gradient)
    return loss / divisor


def _hinge_group(
    logits: Tensor, labels: Tensor, valid: Optional[Tensor], buffer: Tensor, divisor: int, with_gradient: bool
) -> float:
    """The same, exact."""
    # Step by step in one place: fresh memory is faulted in at every call, which costs more than the arithmetic on it.
    margins = buffer.copy_(labels).mul_(-2.0).add_(1.0).mul_(logits)
    total = int((labels == 1).count_nonzero())  # sum would make an int64 copy
    # not at most -1, rather than above: a nan must not be dropped
    wrong = (margins <= -1.0).logical_not_()
    if valid is not None:
        wrong &= valid
    if total == 0:  # only the largest error counts
        largest = margins.masked_fill(~wrong, float("-inf")).argmax(keepdim=True)
        wrong = torch.zeros_like(wrong).index_copy_(0, largest, wrong[largest])
    margins.masked_fill_(~wrong, 0.0)  # already the gradient there

    loss, before, alarms = 0.0, 0, 0
    for floor in _floors(margins, wrong):
        within = wrong if floor is None else (margins > floor).logical_and_(wrong)
        pixels = _pixels(within)
        wrong ^= within
        background = labels.index_select(0, pixels) != 1
        loss += _hinge_part(margins, pixels, background, total, before, alarms, divisor, with_gradient)
        before, alarms = before + len(pixels), alarms + int(background.count_nonzero())
    return loss / divisor


def _floors(margins: Tensor, wrong: Tensor) -> list[Optional[float]]:
    """Where the parts of the wrong margins end that are sorted one after the other, the largest first."""
    cuts = min(_MAX_PARTS - 1, int(wrong.count_nonzero()) // _MIN_PART)
    if cuts == 0:
        return [None]
    step = len(margins) // 4096 | 1  # odd, for pixels of many columns
    sample = margins[::step][wrong[::step]].sort(descending=True).values
    if len(sample) == 0:  # as where the step is the width of the image, and a column is right
        return [None]
    return [*sample[torch.arange(1, cuts + 1) * len(sample) // (cuts + 1)].tolist(), None]


def _hinge_part(
    margins: Tensor,
    pixels: Tensor,
    background: Tensor,
    total: int,
    before: int,
    alarms: int,
    divisor: int,
    with_gradient: bool,
) -> float:
    """Rank some of the pixels, after those ``before``; their gradient replaces their margins."""
    errors = margins.index_select(0, pixels)
    weights = _rank_sparse(errors, partial(background.index_select, 0), total, before, alarms)
    loss = _weighted_sum(errors.add_(1.0), weights).item()
    if with_gradient:
        directions = background.to(weights.dtype).mul_(2.0 / divisor).sub_(1.0 / divisor)
        margins.index_copy_(0, pixels, directions.mul_(weights))
    return loss


def _softmax_sparse(
    classes: Classes,
    options: Options,
    logits: Tensor,
    labels: Tensor,
    valid: Optional[Tensor],
    weight: Optional[Tensor],
    with_gradient: bool,
) -> tuple[Tensor, Optional[Tensor]]:
    """Losses of the groups and their gradient ``(B, C, H, W)``, one group after the other."""
    batch, num_classes = logits.shape[:2]
    if valid is not None:
        labels = labels.masked_fill(~valid, num_classes)
    # Sorting the labels collects the pixels of each class, the ignored ones last; small integers sort fastest.
    narrow = torch.uint8 if num_classes < 256 else torch.int32
    keys = labels.flatten(1).to(narrow)
    counts = torch.stack([image.bincount(minlength=num_classes + 1) for image in keys])[:, :num_classes]
    pixels = [
        image.sort(stable=True).indices.split([*count, len(image) - sum(count)])
        for image, count in zip(keys, counts.tolist())
    ]
    group_counts = counts if options.per_image else counts.sum(0, keepdim=True)
    factors = _class_factors(classes, weight, group_counts > 0, options.divisor(batch), logits.dtype)

    losses = logits.new_zeros(len(factors))
    # Without a gradient, the groups share one buffer.
    kept = batch if with_gradient or not options.per_image else 1
    buffer = torch.empty((kept, *logits.shape[1:]), dtype=logits.dtype)
    for g in range(len(factors)):
        images = slice(g, g + 1) if options.per_image else slice(None)
        losses[g] = _softmax_group(
            logits[images],
            pixels[images],
            None if valid is None else valid[images],
            group_counts[g].tolist(),
            factors[g].tolist(),
            buffer[images] if kept == batch else buffer,
            options.num_bins,
            with_gradient,
        )
    return losses, buffer if with_gradient else None


class _Candidates(NamedTuple):
    """The pixels of a group that can have a weight in a class."""

    c: int
    count: int  # of its foreground
    missed: Sequence[Tensor]  # its foreground in each image
    wrong: Sequence[Tensor]  # background in each image
    errors: Tensor  # of the missed, then of the wrong


def _batches(classes: Iterable[_Candidates], shortest: int) -> Iterator[Sequence[_Candidates]]:
    """Classes to rank at once: as many as make up a piece, each padded to the longest and counted as ``shortest``."""
    batch: list[_Candidates] = []
    longest = shortest
    for candidates in classes:
        longest = max(longest, len(candidates.errors))
        if batch and (len(batch) + 1) * longest > _PIECE:
            yield batch
            batch, longest = [], max(shortest, len(candidates.errors))
        batch.append(candidates)
    if batch:
        yield batch


def _rank_candidates(batch: Sequence[_Candidates], num_bins: Optional[int]) -> Sequence[Tensor]:
    """Weights of the candidates of each class."""
    if num_bins is None and len(batch) == 1:
        ((_, count, _, _, errors),) = batch
        return [_rank_sparse(errors, lambda indices: indices >= count, count)]
    rows = pad_sequence([candidates.errors for candidates in batch], batch_first=True, padding_value=-1.0)
    foreground = torch.arange(rows.shape[1]) < torch.tensor([candidates.count for candidates in batch]).unsqueeze(1)
    if num_bins is None:
        weights = _rank_rows(rows, foreground)
    else:
        weights, _ = rank_by_bins(rows, foreground, num_bins, slab=_PIECE)
    return [row[: len(candidates.errors)] for row, candidates in zip(weights, batch)]


def _softmax_group(
    logits: Tensor,
    pixels: Sequence[Sequence[Tensor]],
    valid: Optional[Tensor],
    counts: Sequence[int],
    factors: Sequence[float],
    buffer: Tensor,
    num_bins: Optional[int],
    with_gradient: bool,
) -> Tensor:
    """Loss of one group of images ``(K, C, H, W)``; its gradient is left in ``buffer``, a tensor of that shape.

    Args:
        logits: of the group.
        pixels: the pixels of each class in each image.
        valid: bool ``(K, H, W)`` or None.
        counts: the pixels of each class in the group.
        factors: the factor of each class in the loss.
        buffer: contiguous, overwritten.
        num_bins: how many bins rank the errors, or None to sort them.
        with_gradient: whether the gradient is wanted.
    """
    for image, probabilities in zip(logits, buffer):
        torch.softmax(image, 0, out=probabilities)
    if valid is not None:
        buffer.masked_fill_(~valid.unsqueeze(1), 0.0)
    rows = buffer.flatten(2)
    # A foreground error is the sum of the other probabilities. So the probability of the label is kept aside, for the
    # gradient, and 0 stands in its place: it is then no false alarm of its class either.
    labelled = [
        (row, of_class, row.index_select(0, of_class))
        for image, of_image in zip(rows, pixels)
        for row, of_class in zip(image, of_image)
        if len(of_class) > 0
    ]
    for row, of_class, _ in labelled:
        row.index_fill_(0, of_class, 0.0)
    others = rows.sum(1)

    # With h as in softmax_loss: lift is the part of h that the classes of a pixel share, the foreground weight, and
    # share is sum(p * h), the part of the pixel in the loss. The gradient is p * (h - share). 0 * others is 0, or nan.
    share, lift = others * 0.0, torch.zeros_like(others)
    alarms: list[tuple[Tensor, Tensor, Tensor]] = []

    def candidates_of(c: int) -> _Candidates:
        missed = [of_image[c] for of_image in pixels]
        missed_errors = [errors.index_select(0, found) for errors, found in zip(others, missed)]
        # Where no foreground is left to pass, the weight of the background is 0.
        smallest = torch.cat(missed_errors).min()
        if num_bins is not None:  # the bins begin just below, and what shares one counts too
            smallest = 0.999 * smallest
        wrong = [_pixels(row > smallest) for row in rows[:, c]]
        wrong_errors = [row.index_select(0, found) for row, found in zip(rows[:, c], wrong)]
        return _Candidates(c, counts[c], missed, wrong, torch.cat([*missed_errors, *wrong_errors]))

    present = [c for c, (count, factor) in enumerate(zip(counts, factors)) if count != 0 and factor != 0]
    # A class by bins takes a table too.
    shortest = 0 if num_bins is None else num_bins
    for batch in _batches(map(candidates_of, present), shortest):
        for (c, _, missed, wrong, errors), weights in zip(batch, _rank_candidates(batch, num_bins)):
            weights.mul_(factors[c])
            sizes = [len(found) for found in (*missed, *wrong)]
            weights_of, parts_of = weights.split(sizes), errors.mul_(weights).split(sizes)
            for k, found in enumerate(missed):
                lift[k].index_copy_(0, found, weights_of[k])
            for k, (found, parts) in enumerate(zip((*missed, *wrong), parts_of)):
                share[k % len(rows)].scatter_add_(0, found, parts)
            if with_gradient:
                alarms += zip(rows[:, c], [found.to(torch.int32) for found in wrong], parts_of[len(rows) :])

    absent = [c for c, (count, factor) in enumerate(zip(counts, factors)) if count == 0 and factor != 0]
    if absent:  # their largest probability alone counts: its line, then its place in the line
        chosen = torch.tensor(absent)
        lines = buffer.amax(-1)[:, chosen].movedim(0, 1).flatten(1).argmax(-1)
        image, line = lines // buffer.shape[2], lines % buffer.shape[2]
        candidates = buffer[image, chosen, line]
        parts, column = candidates.max(-1)
        parts = parts * torch.tensor([factors[c] for c in absent], dtype=parts.dtype)
        found = line * buffer.shape[3] + column
        share.view(-1).index_add_(0, image * rows.shape[2] + found, parts)
        alarms.append((buffer.view(-1), (image * rows.shape[1] + chosen) * rows.shape[2] + found, parts))

    if with_gradient:
        rows.mul_((lift - share).unsqueeze(1))
        for row, found, parts in alarms:
            row.index_add_(0, found, parts)
        shares = [image for image, of_image in zip(share, pixels) for of_class in of_image[:-1] if len(of_class) > 0]
        for (row, of_class, probability), image in zip(labelled, shares):
            row.index_copy_(0, of_class, probability.mul_(image.index_select(0, of_class)).neg_())
    return share.sum()
