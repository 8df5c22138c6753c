# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: only the pixels that can have a weight are ranked, by threads that work in pieces.

A background error below every foreground error of its class has the weight 0, as no foreground is left to pass. So has,
for the loss, a hinge error of 0. Of a class without foreground, the largest error alone counts. What remains are the
*candidates*: those that reach the *floor* of their row, the pixels of one class in one group.

The work goes through the pixels, to the errors; through the rows, to the weights; and through the pixels again, to the
loss and its gradient. Each time it is divided into pieces whose temporaries stay in the cache.
"""

from __future__ import annotations

from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor

from ._labels import binary_labels, class_labels
from ._lovasz import class_factors
from ._lovasz_options import Options
from ._lovasz_sort import descending_order, weights_of_rows, weights_of_segments
from ._threads import in_pieces

# How many errors are handled at a time.
_PIECE = 1 << 17

# Errors (or what ascends with them), foreground and weights, to what is kept of each pixel and their part in the loss.
Use = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def losses_and_gradient(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz_dense.losses_and_gradient` computes, exact."""
    form = _single_class if options.classes is None else _softmax
    if pred.numel() > 2 * _PIECE:
        return form(pred, target, weight, options)
    # Handing out several pieces would take longer than it spares.
    return in_pieces(lambda pred: form(pred, target, weight, options), [pred])[0]


# ---------------------------------------------------------------------------------------------------------------------
# One class
# ---------------------------------------------------------------------------------------------------------------------


def _single_class(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    shape = (pred.shape[0] if options.per_image else 1, -1)
    logits, labels = pred.reshape(shape), target.reshape(shape)
    gradient = torch.empty(logits.shape, dtype=options.dtype_of(pred, weight), device="cpu")
    use = partial(_hinge, divisor=options.divisor(len(logits)))
    rows = (logits, labels, gradient)
    if logits.shape[1] > 2 * _PIECE:
        losses = [_long_row_of_margins(*row, use, options.ignore_index) for row in zip(*rows)]
    else:
        step = max(1, _PIECE // logits.shape[1])
        pieces = zip(*(tensor.split(step) for tensor in rows))
        losses = in_pieces(lambda piece: _rows_of_margins(*piece, use, options.ignore_index), pieces)
    return torch.cat(losses), gradient.view(pred.shape[0], 1, -1)


def _rows_of_margins(logits: Tensor, labels: Tensor, gradient: Tensor, use: Use, ignore_index: Optional[int]) -> Tensor:
    """Losses of rows of pixels ``(R, N)``, one for each group; their gradient overwrites a tensor."""
    margins = torch.empty_like(gradient)
    foreground, sizes, smallest, largest = _measure_margins(logits, labels, margins, ignore_index)
    weights = _rank_rows(margins, foreground, sizes, _floors(smallest, largest))
    values, losses = use(margins, foreground, weights)
    gradient.copy_(values)
    return losses.masked_fill_(largest.isnan(), float("nan"))


def _long_row_of_margins(
    logits: Tensor, labels: Tensor, gradient: Tensor, use: Use, ignore_index: Optional[int]
) -> Tensor:
    """The same for one row ``(N,)``, in pieces."""
    # Where the gradient will be, the margins are kept before.
    pieces = zip(*(tensor.view(1, -1).split(_PIECE, 1) for tensor in (logits, labels, gradient)))
    measured = in_pieces(lambda piece: _measure_margins(*piece, ignore_index)[1:], pieces)
    sizes, smallest, largest = (torch.cat(each) for each in zip(*measured))
    largest = largest.amax(0, keepdim=True)
    floor = _floors(smallest.amin(0, keepdim=True), largest)
    losses = _rank_long_row(gradient, labels, 1, sizes.sum(0, keepdim=True), floor, gradient, use)
    return losses.masked_fill_(largest.isnan(), float("nan"))


def _measure_margins(
    logits: Tensor, labels: Tensor, margins: Tensor, ignore_index: Optional[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overwrite ``margins``, which ascend with the errors, of pixels ``(R, N)``.

    Returns:
        the foreground, bytes ``(R, N)``; and of each row its size, its smallest margin and the largest margin of all.
    """
    foreground, valid = binary_labels(labels, ignore_index)
    foreground = foreground.view(torch.uint8)  # which PyTorch turns into numbers several times as fast as bools
    signs = torch.empty_like(margins).copy_(foreground).mul_(-2.0).add_(1.0)
    torch.mul(signs, logits, out=margins)
    if valid is not None:
        margins.masked_fill_(~valid, float("-inf"))
    # The maximum is a margin on the foreground and a number above all elsewhere: faster than to choose by a mask.
    smallest = signs.mul_(torch.finfo(signs.dtype).max).maximum(margins).amin(1)
    return foreground, foreground.sum(1), smallest, margins.amax(1)


def _floors(smallest: Tensor, largest: Tensor) -> Tensor:
    """The smallest margin of a candidate: of a hinge error above 0, no smaller than that of all foreground."""
    above = torch.nextafter(smallest.new_tensor(-1.0), smallest.new_tensor(0.0))
    return smallest.minimum(largest).maximum(above)


def _hinge(margins: Tensor, foreground: Tensor, weights: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Gradient of the hinge loss, and the loss of each row."""
    weights = weights.div_(divisor)
    errors = (margins + 1.0).relu_()
    losses = errors.mul(weights).sum(-1)
    if losses.isnan().any():  # the product of no weight and an infinite error
        losses = errors.masked_fill((weights == 0) & errors.isinf(), 0.0).mul_(weights).sum(-1)
    return errors.copy_(foreground).mul_(-2.0).add_(1.0).mul_(weights), losses


# ---------------------------------------------------------------------------------------------------------------------
# Several classes
# ---------------------------------------------------------------------------------------------------------------------


def _softmax(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> tuple[Tensor, Tensor]:
    passes = _SoftmaxPasses(pred, target, options.dtype_of(pred, weight), options)
    measured = (torch.cat(each) for each in zip(*in_pieces(passes.measure, passes.pieces)))
    sizes, smallest, largest = (each.view(passes.groups, -1, pred.shape[1]) for each in measured)
    sizes, smallest = sizes.sum(1), smallest.amin(1)
    factors = class_factors(options.classes or "all", weight, sizes, options.divisor(len(target)), passes.errors.dtype)
    passes.rank(sizes, smallest, factors)
    alone = passes.find_alone(largest, (factors != 0) & (sizes == 0), factors)
    losses = torch.cat(in_pieces(passes.apply, passes.pieces)).view(passes.groups, -1).sum(1)
    passes.errors.index_put_(*alone, accumulate=True)
    return losses.masked_fill_(largest.amax((1, 2)).isnan(), float("nan")), passes.errors


class _SoftmaxPasses:
    """The passes over logits ``(B, C, N)`` and what they leave for each other.

    A *row* ``g * C + c`` is the pixels of the images of group ``g``, for class ``c``. A *piece* is of some images, or
    of some pixels of one, in all classes.
    """

    def __init__(self, pred: Tensor, target: Tensor, dtype: torch.dtype, options: Options) -> None:
        self.options, self.target = options, target.flatten(1)
        batch, count = self.target.shape
        self.logits = pred.flatten(2).expand(batch, -1, -1)
        num_classes = self.num_classes = pred.shape[1]
        self.groups = batch if options.per_image else 1
        # The errors, in whose place the gradient will be; the probability of the label; the label, C if ignored.
        self.errors = torch.empty(self.logits.shape, dtype=dtype, device="cpu")
        self.labelled = torch.empty((batch, count), dtype=dtype, device="cpu")
        codes = torch.uint8 if num_classes < 256 else torch.int16 if num_classes < 1 << 15 else torch.int32
        self.labels = torch.empty((batch, count), dtype=codes, device="cpu")
        self.images, self.width = max(1, _PIECE // (num_classes * count)), min(count, max(1, _PIECE // num_classes))
        starts = [(image, pixel) for image in range(0, batch, self.images) for pixel in range(0, count, self.width)]
        self.pieces = [(slice(i, i + self.images), slice(j, j + self.width)) for i, j in starts]

    def measure(self, piece: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor]:
        """From logits to errors. Return, of each class: its size, its smallest error and the largest of all errors."""
        image, pixel = piece
        labels, valid = class_labels(self.target[image, pixel], self.num_classes, self.options.ignore_index)
        errors = self.logits[image, :, pixel].to(self.errors.dtype).softmax(1)
        found = labels
        if valid is not None:
            found = labels.masked_fill(~valid, self.num_classes)
            for one, ignored in zip(errors, ~valid):
                one.index_fill_(1, ignored.nonzero().squeeze(1), 0.0)
        index = labels.unsqueeze(1)
        self.labelled[image, pixel] = errors.gather(1, index).squeeze(1)
        # The error of the foreground is the sum of the other probabilities.
        others = errors.scatter_(1, index, 0.0).sum(1)
        self.errors[image, :, pixel] = errors.scatter_(1, index, others.unsqueeze(1))
        self.labels[image, pixel] = found
        sizes = torch.zeros((len(found), self.num_classes + 1), dtype=torch.int64, device="cpu")
        sizes.scatter_add_(1, found, torch.ones_like(found))
        smallest = torch.full(sizes.shape, torch.inf, dtype=errors.dtype, device="cpu")
        smallest.scatter_reduce_(1, found, others, "amin")
        return sizes[:, :-1], smallest[:, :-1], errors.amax(2)

    def rank(self, sizes: Tensor, smallest: Tensor, factors: Tensor) -> None:
        """From errors to weights, which include the factors, of the rows that have foreground and a factor.

        Args:
            sizes: foreground pixels ``(groups, C)``.
            smallest: their smallest errors ``(groups, C)``.
            factors: of the classes ``(groups, C)``.
        """
        ranked = ((factors != 0) & (sizes > 0)).flatten().nonzero().squeeze(1)
        # A piece of several groups needs rows that they have in common.
        kept = torch.arange(factors.numel(), device="cpu") if self.options.per_image and self.images > 1 else ranked
        group, channel = kept // self.num_classes, kept % self.num_classes
        self.bounds = torch.searchsorted(group, torch.arange(self.groups + 1, device="cpu")).tolist()
        self.channels = channel
        # Of each label in each group: its place among the rows of the group, and whether it has one.
        self.places = torch.zeros((self.groups, self.num_classes + 1), dtype=torch.int64, device="cpu")
        self.has_place = torch.zeros_like(self.places, dtype=factors.dtype)
        self.places[group, channel] = (
            torch.arange(len(kept), device="cpu") - torch.tensor(self.bounds, device="cpu")[group]
        )
        self.has_place[group, channel] = 1.0
        length = self.labels.numel() // self.groups
        self.weights = torch.zeros((len(kept), length), dtype=factors.dtype, device="cpu")
        if len(ranked) == 0:
            return
        # A pixel whose error is 0 has no part in the loss or its gradient, whatever its weight.
        tiny = torch.finfo(factors.dtype).smallest_normal * torch.finfo(factors.dtype).eps
        # Of each ranked row: itself, where its weights are, its foreground size, the floor of its errors, its factor.
        each = [ranked, torch.searchsorted(kept, ranked)]
        each += [values.flatten().index_select(0, ranked) for values in (sizes, smallest.clamp(min=tiny), factors)]
        pieces = list(zip(*(values.split(max(1, _PIECE // length)) for values in each)))
        if length <= 2 * _PIECE or len(ranked) >= 2 * torch.get_num_threads():
            in_pieces(self._rank_rows, pieces)
        else:  # one row after the other, each in pieces
            for piece in pieces:
                self._rank_rows(piece)

    def _rank_rows(self, piece: tuple[Tensor, ...]) -> None:
        rows, places, sizes, floors, factors = piece
        labels = self.labels.view(self.groups, -1)
        group, channel = rows // self.num_classes, rows % self.num_classes
        if self.options.per_image:
            errors = self.errors.flatten(0, 1).index_select(0, rows)
        else:
            errors = self.errors.index_select(1, rows).transpose(0, 1).flatten(1)
        if errors.shape[1] > 2 * _PIECE:
            use = partial(_scaled, factor=factors)
            where = labels[group[0]], int(channel)
            _rank_long_row(errors[0], *where, sizes, floors, self.weights[places[0]], use)
        else:
            foreground = labels.index_select(0, group) == channel.unsqueeze(1)
            weights = _rank_rows(errors, foreground.view(torch.uint8), sizes, floors).mul_(factors.unsqueeze(1))
            self.weights.index_copy_(0, places, weights)

    def find_alone(self, largest: Tensor, absent: Tensor, factors: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where the largest errors of absent classes are in ``(B, C, N)``, and their parts in the loss.

        Args:
            largest: errors of each class in each piece of each group ``(groups, *, C)``.
            absent: which classes of a group have no foreground and a factor, bool ``(groups, C)``.
            factors: of the classes ``(groups, C)``.
        """
        count = self.errors.shape[2]
        group, channel = absent.nonzero().unbind(1)
        line = largest.argmax(1)[group, channel]  # among the pieces of its group
        per_image = -(-count // self.width)
        image = group * (len(self.errors) // self.groups) + line // per_image
        start = line % per_image * self.width

        def find(some: tuple[Tensor, ...]) -> Tensor:
            image, channel, start = (each.unsqueeze(1) for each in some)
            pixels = (start + torch.arange(self.width, device="cpu")).clamp_(max=count - 1)
            return pixels.gather(1, self.errors[image, channel, pixels].argmax(1, keepdim=True)).squeeze(1)

        step = max(1, _PIECE // max(1, self.width))
        found = in_pieces(find, zip(*(each.split(step) for each in (image, channel, start))))
        where = image, channel, torch.cat(found)
        parts = self.errors[where] * factors[group, channel]
        self.share = torch.zeros_like(self.labelled).index_put_((image, where[2]), parts, accumulate=True)
        return where, parts

    def apply(self, piece: tuple[slice, slice]) -> Tensor:
        """From weights to the gradient, in place of the errors. Return the part of each image in the loss.

        With h as in the dense form: lift is the part of h that the classes of a pixel share, the foreground weight, and
        share is sum(p * h), the part of the pixel in the loss. The gradient is p * (h - share).
        """
        image, pixel = piece
        errors, labels = self.errors[image, :, pixel], self.labels[image, pixel].to(torch.int64)
        group = image if self.options.per_image else slice(0, 1)
        first, last = self.bounds[group.start], self.bounds[min(group.stop, self.groups)]
        shape = (len(self.places[group]), -1, len(self.errors) // self.groups, self.errors.shape[2])
        weights = self.weights[first:last].view(shape)[:, :, :, pixel]
        weights = weights.squeeze(2) if self.options.per_image else weights[0, :, image].transpose(0, 1)
        channels = self.channels[first : first + weights.shape[1]]
        is_all = weights.shape[1] == self.num_classes
        parts = (errors if is_all else errors.index_select(1, channels)) * weights
        share = parts.sum(1).add_(self.share[image, pixel])
        lift = torch.zeros_like(share)
        if len(channels) > 0:
            places = self.places[group].expand(len(labels), -1).gather(1, labels)
            lift = weights.gather(1, places.unsqueeze(1)).squeeze(1)
            lift.mul_(self.has_place[group].expand(len(labels), -1).gather(1, labels))
        errors.mul_((lift - share).unsqueeze(1))
        _ = errors.add_(parts) if is_all else errors.index_add_(1, channels, parts)
        labels = labels.clamp_(max=self.num_classes - 1).unsqueeze(1)
        errors.scatter_(1, labels, self.labelled[image, pixel].mul(share).neg_().unsqueeze(1))
        return share.sum(1)


def _scaled(errors: Tensor, foreground: Tensor, weights: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The weights times the factor of their class; the loss comes later."""
    return weights.mul_(factor), errors.new_zeros(())


# ---------------------------------------------------------------------------------------------------------------------
# From errors to weights
# ---------------------------------------------------------------------------------------------------------------------


def _rank_rows(errors: Tensor, foreground: Tensor, sizes: Tensor, floors: Tensor) -> Tensor:
    """Weights of the candidates in rows, and 0 elsewhere.

    Args:
        errors: or what ascends with them, ``(R, N)``.
        foreground: bytes ``(R, N)``.
        sizes: how many pixels of the foreground a row has, int64 ``(R,)``.
        floors: of the rows ``(R,)``.
    """
    candidates = errors >= floors.unsqueeze(1)
    lengths = candidates.sum(1)
    count = int(lengths.sum())
    if count > errors.numel() // 2:
        # Gathering most of the errors would cost more than it spares.
        rows = torch.arange(len(errors), device="cpu").unsqueeze(1)
        order = descending_order(errors, rows, len(errors)).view(errors.shape).sub_(rows * errors.shape[1])
        return weights_of_rows(errors, foreground, order).mul_(candidates.view(torch.uint8))
    weights = torch.zeros_like(errors)
    if count > 0:
        places = candidates.flatten().nonzero().squeeze(1)
        there = (tensor.flatten().index_select(0, places) for tensor in (errors, foreground))
        ranked = weights_of_segments(*there, lengths, sizes, torch.zeros_like(sizes))
        weights.view(-1).index_copy_(0, places, ranked)
    return weights


def _rank_long_row(
    errors: Tensor, labels: Tensor, label: int, size: Tensor, floor: Tensor, out: Tensor, use: Use
) -> Tensor:
    """Have the weights of one row used, in pieces. The results are in ``out``, 0 where there is no candidate.

    This is parallel sorting by regular sampling: runs of pixels are sorted, samples of them divide the range of the
    errors into parts of nearly equal size, and each part is sorted across the runs.

    Args:
        errors: or what ascends with them, ``(N,)``.
        labels: ``(N,)``.
        label: of the foreground.
        size: of the foreground, int64 ``(1,)``.
        floor: of the errors ``(1,)``.
        out: ``(N,)``, may be the errors.
        use: what is made of the weights.

    Returns:
        the loss ``(1,)``.
    """
    length = len(errors)
    step = max(_PIECE, -(-length // 32))

    def sort_run(start: int) -> tuple[Tensor, Tensor]:
        part = errors[start : start + step]
        places = (part >= floor).nonzero().squeeze(1)
        values = part.index_select(0, places)
        if len(places) > 0:
            order = descending_order(values)
            places, values = places.index_select(0, order), values.index_select(0, order)
        foreground = labels[start : start + step].index_select(0, places) == label
        out[start : start + step] = 0.0
        tagged = places.add_(start).mul_(2).add_(foreground)
        return values, tagged.to(torch.int32 if length < 1 << 30 else torch.int64)

    runs = in_pieces(sort_run, range(0, length, step))
    spacing = _PIECE // 64
    samples = torch.cat([values[spacing - 1 :: spacing] for values, _ in runs]).sort(descending=True).values
    splitters = samples[63::64].neg()

    def divide(run: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the parts of a run begin and end, and how much foreground it has before."""
        values, tagged = run
        cuts = torch.searchsorted(values.neg(), splitters, right=True)
        cuts = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(values))])
        passed = torch.nn.functional.pad((tagged & 1).cumsum(0), (1, 0))
        return cuts, passed.index_select(0, cuts)

    cuts, passed = (torch.stack(each) for each in zip(*in_pieces(divide, runs)))
    begins, passed = cuts.sum(0), passed.sum(0)
    bounds = cuts.tolist()

    def rank_part(part: int) -> Tensor:
        slices = [slice(*bound[part : part + 2]) for bound in bounds]
        values, tagged = (torch.cat([each[i] for each, i in zip(column, slices)]) for column in zip(*runs))
        if len(values) == 0:
            return values.sum()
        foreground = (tagged & 1).to(torch.uint8)
        begin = begins[part].unsqueeze(0)
        unions = size + begin - passed[part]
        weights = weights_of_segments(values, foreground, begin.new_tensor([len(values)]), unions, begin)
        result, loss = use(values, foreground, weights)
        out.index_copy_(0, (tagged >> 1).to(torch.int64), result)
        return loss

    return torch.stack(in_pieces(rank_part, range(len(splitters) + 1))).sum(0, keepdim=True)
