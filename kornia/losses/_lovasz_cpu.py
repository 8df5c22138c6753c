# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: only the pixels that can have a weight are ranked, by threads that work in pieces.

A background error below every foreground error of its class has the weight 0, as no foreground is left to pass. So has,
for the loss, a hinge error of 0. Of a class without foreground, the largest error alone counts. What remains are the
*candidates*: the errors of a row, one class in one group, from its *floor* up.

A group is passed through three times: from logits to errors, by pieces of its pixels; from errors to weights, by rows;
and from weights to the loss and the gradient, which takes the place of the errors.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterable, Optional

import torch
from torch import Tensor

from ._labels import binary_labels, class_labels
from ._lovasz import class_factors, jaccard_weights
from ._lovasz_options import Options
from ._lovasz_sort import descending_order
from ._threads import in_pieces

# How many errors are handled at a time, so that temporaries stay in the cache.
_PIECE = 1 << 17

# Sorted candidates (errors, or what ascends with them), 1 where they are background, and their weights, to what is kept
# of each and to their part in the loss.
Use = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def losses_and_gradient(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """What :func:`._lovasz_dense.losses_and_gradient` computes, exact."""
    batch, form = target.shape[0], _single_class if options.classes is None else _softmax
    pred = pred.flatten(2).expand(batch, -1, -1)
    gradient = torch.empty(pred.shape, dtype=options.dtype_of(pred, weight), device="cpu")
    divisor, step = options.divisor(batch), 1 if options.per_image else batch
    groups = zip(*(tensor.split(step) for tensor in (pred, target.flatten(1), gradient)))
    losses = _each(lambda group: form(*group, weight, divisor, options), groups, pred[:step].numel())
    return torch.stack(losses), gradient


def _each(work: Callable[[Any], Any], items: Iterable[Any], size: int) -> list[Any]:
    """Work on items of so many errors: as pieces, or one after the other where they are divided into pieces again."""
    items, threads = list(items), torch.get_num_threads()
    is_even = len(items) % threads == 0 or len(items) > 4 * threads
    return in_pieces(work, items) if is_even or size <= 2 * _PIECE else [work(item) for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# One class
# ---------------------------------------------------------------------------------------------------------------------


def _single_class(
    pred: Tensor, target: Tensor, gradient: Tensor, _: Optional[Tensor], divisor: int, options: Options
) -> Tensor:
    """Loss of one group of logits ``(B, 1, N)``; its gradient overwrites a tensor."""
    row, labels = gradient.view(-1), target.flatten()

    def measure(piece: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """From logits to margins, which ascend with the errors. Return the foreground size and two margins."""
        logits, labels, margins = piece
        foreground, valid = binary_labels(labels, options.ignore_index)
        signs = torch.empty_like(margins).copy_(foreground.view(torch.uint8)).mul_(-2.0).add_(1.0)
        torch.mul(signs, logits, out=margins)
        if valid is not None:
            margins.masked_fill_(~valid, float("-inf"))
        # The maximum is a margin on the foreground and above all elsewhere: faster than to choose by a mask.
        smallest = signs.mul_(torch.finfo(signs.dtype).max).maximum(margins).amin()
        return foreground.count_nonzero(), smallest, margins.amax()

    pieces = zip(*(tensor.split(2 * _PIECE) for tensor in (pred.flatten(), labels, row)))
    sizes, smallest, largest = (torch.stack(each) for each in zip(*in_pieces(measure, pieces)))
    largest = largest.amax()
    # A hinge error is above 0, where the margin is above -1.
    above = torch.nextafter(largest.new_tensor(-1.0), largest.new_tensor(0.0))
    floor = torch.stack([smallest.amin(), largest]).amin().maximum(above)
    loss = _rank(row, labels, 1, sizes.sum(), floor, row, partial(_hinge, divisor=divisor))
    return torch.where(largest.isnan(), largest, loss)


def _hinge(margins: Tensor, background: Tensor, weights: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Gradient and loss."""
    weights = weights.div_(divisor)
    errors = margins.add(1.0)
    loss = errors.mul(weights).sum()
    if loss.isnan():  # the product of no weight and an infinite error
        loss = errors.masked_fill((weights == 0) & errors.isinf(), 0.0).mul_(weights).sum()
    return errors.copy_(background).mul_(2.0).sub_(1.0).mul_(weights), loss


# ---------------------------------------------------------------------------------------------------------------------
# Several classes
# ---------------------------------------------------------------------------------------------------------------------


def _softmax(
    pred: Tensor, target: Tensor, gradient: Tensor, weight: Optional[Tensor], divisor: int, options: Options
) -> Tensor:
    """Loss of one group of logits ``(B, C, N)``; its gradient overwrites a tensor."""
    group = _SoftmaxGroup(pred, target, gradient, options.ignore_index)
    sizes, smallest, largest = (torch.stack(each) for each in zip(*in_pieces(group.measure, group.pieces)))
    sizes, smallest = sizes.sum(0), smallest.amin(0)
    factors = class_factors(options.classes or "all", weight, sizes.unsqueeze(0), divisor, gradient.dtype)[0]
    group.rank(sizes, smallest, factors)
    alone = group.find_alone(largest, ((factors != 0) & (sizes == 0)).nonzero().squeeze(1), factors)
    loss = torch.stack(in_pieces(group.finish, group.pieces)).sum()
    gradient.index_put_(*alone, accumulate=True)
    return torch.where(largest.amax().isnan(), float("nan"), loss)


class _SoftmaxGroup:
    """The passes through a group of images, and what they leave for each other. A piece is of pixels of one image."""

    def __init__(self, pred: Tensor, target: Tensor, gradient: Tensor, ignore_index: Optional[int]) -> None:
        self.logits, self.target, self.errors, self.ignore_index = pred, target, gradient, ignore_index
        batch, num_classes, count = pred.shape
        codes = torch.uint8 if num_classes < 256 else torch.int32
        self.labels = torch.empty((batch, count), dtype=codes, device="cpu")  # the number of classes if ignored
        self.labelled = torch.empty((batch, count), dtype=gradient.dtype, device="cpu")  # probability of the label
        self.share = torch.zeros_like(self.labelled)  # of the pixel in the loss
        self.width = min(count, max(1, _PIECE // num_classes))
        self.pieces = [(i, slice(j, j + self.width)) for i in range(batch) for j in range(0, count, self.width)]

    def measure(self, piece: tuple[int, slice]) -> tuple[Tensor, Tensor, Tensor]:
        """From logits to errors. Return, of each class: its size, its smallest error and the largest of all errors."""
        num_classes = self.logits.shape[1]
        labels, valid = class_labels(self.target[piece], num_classes, self.ignore_index)
        errors = self.logits[piece[0], :, piece[1]].to(self.errors.dtype).softmax(0)
        found = labels
        if valid is not None:
            found = labels.masked_fill(~valid, num_classes)
            errors.index_fill_(1, (~valid).nonzero().squeeze(1), 0.0)
        index = labels.unsqueeze(0)
        self.labelled[piece] = errors.gather(0, index)[0]
        # The error of the foreground is the sum of the other probabilities.
        others = errors.scatter_(0, index, 0.0).sum(0)
        self.errors[piece[0], :, piece[1]] = errors.scatter_(0, index, others.unsqueeze(0))
        self.labels[piece] = found
        smallest = torch.full((num_classes + 1,), torch.inf, dtype=errors.dtype, device="cpu")
        smallest.scatter_reduce_(0, found, others, "amin")
        return found.bincount(minlength=num_classes + 1)[:-1], smallest[:-1], errors.amax(1)

    def rank(self, sizes: Tensor, smallest: Tensor, factors: Tensor) -> None:
        """From errors to weights, times the factors, of the classes that have foreground and a factor."""
        self.classes = ((factors != 0) & (sizes > 0)).nonzero().squeeze(1)
        self.weights = torch.empty((len(self.classes), *self.labels.shape), dtype=factors.dtype, device="cpu")
        # A pixel whose error is 0 has no part in the loss or its gradient, whatever its weight.
        tiny = torch.finfo(factors.dtype).smallest_normal * torch.finfo(factors.dtype).eps
        floors, labels = smallest.clamp(min=tiny), self.labels.view(-1)

        def rank(row: tuple[int, int]) -> None:
            place, c = row
            errors, out = self.errors[:, c].flatten(), self.weights[place].view(-1)
            _rank(
                errors, labels, c, sizes[c], floors[c], out, lambda _, __, weights: (weights * factors[c], weights[:0])
            )

        _each(rank, enumerate(self.classes.tolist()), len(labels))

    def find_alone(self, largest: Tensor, absent: Tensor, factors: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where the largest errors of absent classes are in ``(B, C, N)``, and their parts in the loss."""
        piece = largest.argmax(0)[absent]
        starts = torch.tensor([(image, pixels.start) for image, pixels in self.pieces], device="cpu")
        image, start = starts[piece].unbind(1)
        step = max(1, _PIECE // self.width)

        def find(rows: tuple[Tensor, ...]) -> Tensor:
            image, c, start = (each.unsqueeze(1) for each in rows)
            pixels = (start + torch.arange(self.width, device="cpu")).clamp_(max=self.errors.shape[2] - 1)
            return pixels.gather(1, self.errors[image, c, pixels].argmax(1, keepdim=True)).squeeze(1)

        pixels = torch.cat(in_pieces(find, zip(image.split(step), absent.split(step), start.split(step))))
        parts = self.errors[image, absent, pixels] * factors[absent]
        self.share.index_put_((image, pixels), parts, accumulate=True)
        return (image, absent, pixels), parts

    def finish(self, piece: tuple[int, slice]) -> Tensor:
        """From weights to the gradient, in place of the errors. Return the part in the loss.

        With h as in the dense form: lift is the part of h that the classes of a pixel share, the foreground weight, and
        share is sum(p * h), the part of the pixel in the loss. The gradient is p * (h - share).
        """
        errors, labels = self.errors[piece[0], :, piece[1]], self.labels[piece].to(torch.int64)
        weights, share = self.weights[:, piece[0], piece[1]], self.share[piece]
        num_classes, is_all = len(errors), len(self.classes) == len(errors)
        parts = (errors if is_all else errors.index_select(0, self.classes)) * weights
        share += parts.sum(0)
        # Of each label, its place among the ranked classes; of one that is not, the place of a foreground weight of 0.
        places = torch.full((num_classes + 1,), len(self.classes), device="cpu")
        places[self.classes] = torch.arange(len(self.classes), device="cpu")
        places = places.index_select(0, labels)
        lift = torch.cat([weights, torch.zeros_like(share).unsqueeze(0)]).gather(0, places.unsqueeze(0))[0]
        errors.mul_(lift - share)
        _ = errors.add_(parts) if is_all else errors.index_add_(0, self.classes, parts)
        labels = labels.clamp_(max=num_classes - 1).unsqueeze(0)
        errors.scatter_(0, labels, self.labelled[piece].mul_(share).neg_().unsqueeze(0))
        return share.sum()


# ---------------------------------------------------------------------------------------------------------------------
# From errors to weights
# ---------------------------------------------------------------------------------------------------------------------


def _rank(errors: Tensor, labels: Tensor, label: int, size: Tensor, floor: Tensor, out: Tensor, use: Use) -> Tensor:
    """Have the weights of a row used, and return the loss.

    A long row is ranked by parallel sorting by regular sampling: runs of its pixels are sorted, samples of the runs
    divide the range of the errors into parts of about the same size, and the runs are merged part by part.

    Args:
        errors: of a row, or what ascends with them, ``(N,)``.
        labels: ``(N,)``.
        label: of the foreground.
        size: of the foreground, 0-d.
        floor: of the candidates, 0-d.
        out: takes what is kept, 0 where there is no candidate, ``(N,)``; may be the errors.
        use: makes of sorted candidates what is kept.
    """
    length = len(errors)
    step = length if length <= 2 * _PIECE else max(_PIECE, -(-length // 32))
    numbers = torch.int32 if length < 1 << 30 else torch.int64

    def sort_run(start: int) -> tuple[Tensor, Tensor]:
        """Candidates in descending order, and twice their place, plus 1 if they are background."""
        part = errors[start : start + step]
        places = (part >= floor).nonzero().squeeze(1)
        values = part.index_select(0, places)
        order = descending_order(values)
        places = places.index_select(0, order)
        background = labels[start : start + step].index_select(0, places) != label
        out[start : start + step] = 0.0
        return values.index_select(0, order), places.add_(start).mul_(2).add_(background).to(numbers)

    def rank_part(tensors: tuple[Any, ...]) -> Tensor:
        """Merge a part, before which there are so many candidates and so many of the background."""
        values, tagged = torch.cat(tensors[0]), torch.cat(tensors[1])
        if len(tensors[0]) > 1:
            order = descending_order(values)
            values, tagged = values.index_select(0, order), tagged.index_select(0, order)
        background = (tagged & 1).to(numbers)
        union = background.cumsum(0, dtype=numbers).add_(size + tensors[3])
        position = torch.arange(len(values), dtype=numbers, device="cpu").add_(tensors[2])
        kept, loss = use(values, background, jaccard_weights(background, position, union, errors.dtype))
        out.index_copy_(0, (tagged >> 1).to(torch.int64), kept)
        return loss.sum()

    values, tagged = zip(*in_pieces(sort_run, range(0, length, step)))
    if len(values) == 1:
        return rank_part((values, tagged, size.new_zeros(()), size.new_zeros(())))
    spacing = _PIECE // 64
    samples = torch.cat([run[spacing - 1 :: spacing] for run in values]).sort(descending=True).values
    edges = samples[63::64].neg()

    def divide(run: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Where the parts of a run end, and how much background it has up to there."""
        ends = torch.nn.functional.pad(torch.searchsorted(run[0].neg(), edges, right=True), (0, 1), value=len(run[0]))
        return ends, torch.nn.functional.pad((run[1] & 1).cumsum(0), (1, 0)).index_select(0, ends)

    ends, passed = (torch.stack(each) for each in zip(*in_pieces(divide, zip(values, tagged))))
    lengths = ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1)).tolist()
    values, tagged = (zip(*(run.split(part) for run, part in zip(runs, lengths))) for runs in (values, tagged))
    before = (torch.nn.functional.pad(each.sum(0)[:-1], (1, 0)) for each in (ends, passed))
    return torch.stack(in_pieces(rank_part, zip(values, tagged, *before))).sum()
