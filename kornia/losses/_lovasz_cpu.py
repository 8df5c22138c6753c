# SPDX-License-Identifier: Apache-2.0
"""The exact losses on the CPU: threads rank only the pixels that can have a weight.

Most pixels need no ranking. A background error below every foreground error of its class has weight 0. A hinge error of
0 adds nothing to the loss. In a class without foreground, only the largest error has a weight. The other pixels are the
*candidates*. A *row* holds the pixels of one class in one group, and its candidates are the pixels whose errors are not
below the *floor* of the row.

Each group is processed in three passes: from logits to errors, in pieces of pixels; from errors to weights, in rows;
and from weights to the loss and the gradient, which overwrites the errors.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Iterable, Optional

import torch
from torch import Tensor

from . import _lovasz_dense
from ._labels import binary_labels, class_labels
from ._lovasz import class_factors, jaccard_weights
from ._lovasz_options import Options
from ._lovasz_sort import descending_order, order_of_rows, weights_of_rows, weights_of_segments
from ._threads import in_pieces
from ._tuning import tuning


def size_of_pieces(errors: int) -> int:
    """Return the number of errors in a piece: few enough for small temporaries, and for every thread to get work."""
    return max(tuning.piece, -(-errors // (4 * torch.get_num_threads())))


# From errors (or margins), foreground and weights to the value that is kept of each pixel, and the sum of the losses.
ApplyWeights = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def losses_and_gradient(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """Compute the exact losses and their gradient, like :func:`._lovasz_dense.losses_and_gradient`."""
    gradient = torch.empty((len(target), pred[0].numel()), dtype=options.dtype_of(pred, weight), device="cpu")
    gradient = gradient.view(len(target), pred.shape[1], -1)
    if options.classes is None:
        form = _single_class
    else:
        group = gradient[0].numel() if options.per_image else gradient.numel()
        form = _softmax_of_all if group * pred.shape[1] < tuning.candidates_from else _softmax
    if gradient.numel() > tuning.one_piece:
        return form(pred, target, weight, gradient, options), gradient
    # Splitting a small input would cost more than it saves. As one piece, it runs single-threaded operations.
    return in_pieces(lambda pred: form(pred, target, weight, gradient, options), [pred])[0], gradient


def _items_per_piece(count: int, size: int) -> int:
    """Return how many of ``count`` items of ``size`` errors are a piece: few enough for every thread to get some."""
    return max(1, min(tuning.piece // size, -(-count // torch.get_num_threads())))


def _map_items(work: Callable[[Any], Any], items: Iterable[Any], size: int) -> list[Any]:
    """Apply ``work`` to items of ``size`` errors each.

    The threads share the items. Only a few large items are processed in turn, as each of them is split among the
    threads by ``work``.
    """
    items, threads = list(items), torch.get_num_threads()
    is_even = len(items) % threads == 0 or len(items) > 4 * threads
    return in_pieces(work, items) if is_even or size <= 2 * tuning.piece else [work(item) for item in items]


# ---------------------------------------------------------------------------------------------------------------------
# One class
# ---------------------------------------------------------------------------------------------------------------------


def _single_class(pred: Tensor, target: Tensor, _: Optional[Tensor], gradient: Tensor, options: Options) -> Tensor:
    """Return the losses of the groups of logits ``(B, 1, H, W)``, and write their gradient to ``gradient``."""
    shape = (len(target) if options.per_image else 1, -1)
    logits, labels, gradient = (tensor.reshape(shape) for tensor in (pred, target, gradient))
    apply_weights = partial(_hinge if options.loss == "hinge" else _sigmoid, divisor=options.divisor(len(logits)))
    is_long = logits.shape[1] > 2 * tuning.piece
    rows = partial(_long_row_of_margins if is_long else _rows_of_margins, apply_weights=apply_weights, options=options)
    step = _items_per_piece(len(logits), logits.shape[1])
    pieces = zip(*(tensor.split(step) for tensor in (logits, labels, gradient)))
    return torch.cat(_map_items(lambda piece: rows(*piece), pieces, step * logits.shape[1]))


def _rows_of_margins(
    logits: Tensor, labels: Tensor, gradient: Tensor, apply_weights: ApplyWeights, options: Options
) -> Tensor:
    """Return the losses of rows of pixels ``(R, N)``, one row per group, and write their gradient to ``gradient``."""
    margins = torch.empty_like(gradient)
    foreground, sizes, smallest, largest = _measure_margins(logits, labels, margins, options)
    weights = rank_rows(margins, foreground, sizes, _floors(sizes, smallest, largest, options))
    values, losses = apply_weights(margins, foreground, weights)
    gradient.copy_(values)
    return losses.masked_fill_(largest.isnan(), float("nan"))


def _long_row_of_margins(
    logits: Tensor, labels: Tensor, gradient: Tensor, apply_weights: ApplyWeights, options: Options
) -> Tensor:
    """Do the same for one row ``(1, N)``, in pieces."""
    # The gradient buffer holds the margins until the gradient overwrites them.
    step = size_of_pieces(logits.shape[1])
    pieces = zip(*(tensor.split(step, 1) for tensor in (logits, labels, gradient)))
    measured = in_pieces(lambda piece: _measure_margins(*piece, options)[1:], pieces)
    sizes, smallest, largest = (torch.cat(each) for each in zip(*measured))
    size, smallest, largest = sizes.sum(0, keepdim=True), smallest.amin(0, keepdim=True), largest.amax(0, keepdim=True)
    floor = _floors(size, smallest, largest, options)
    losses = rank_long_row(gradient[0], labels[0], 1, size, floor, gradient[0], apply_weights)
    return losses.masked_fill_(largest.isnan(), float("nan"))


def _measure_margins(
    logits: Tensor, labels: Tensor, margins: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the margins of pixels ``(R, N)``: minus the logit on the foreground, the logit on the background.

    They are written to ``margins``, with ``-inf`` for ignored pixels.

    Returns:
        the foreground, bytes ``(R, N)``; and for each row, the foreground size, the smallest foreground margin (for
        the hinge loss, the smallest margin whose error is positive) and the largest margin.
    """
    foreground, valid = binary_labels(labels, options.ignore_index)
    # Arithmetic with bytes is several times as fast as with bool.
    is_hinge, foreground = options.loss == "hinge", foreground.view(torch.uint8)
    torch.mul(_signs(foreground, margins), logits, out=margins)
    least = torch.nextafter(margins.new_tensor(-1.0), margins.new_tensor(0.0)).expand(len(margins))
    smallest = least if is_hinge else margins.masked_fill(foreground == 0, float("inf")).amin(1)
    if valid is not None:
        margins.masked_fill_(~valid, float("-inf"))
    return foreground, foreground.sum(1, dtype=torch.int32).to(torch.int64), smallest, margins.amax(1)


def _floors(sizes: Tensor, smallest: Tensor, largest: Tensor, options: Options) -> Tensor:
    """Return the floor of each row. Without foreground, only the largest margin is a candidate."""
    floors = largest.where(sizes == 0, smallest)
    return floors.maximum(smallest) if options.loss == "hinge" else floors


def _hinge(margins: Tensor, foreground: Tensor, weights: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the hinge loss, and the loss of each row."""
    weights = weights.div_(divisor)
    errors = (margins + 1.0).relu_()
    losses = errors.mul(weights).sum(-1)
    if losses.isnan().any():  # from a weight of 0 times an infinite error
        losses = errors.masked_fill((weights == 0) & errors.isinf(), 0.0).mul_(weights).sum(-1)
    return _signs(foreground, errors).mul_(weights), losses


def _sigmoid(margins: Tensor, foreground: Tensor, weights: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """Compute the gradient of the sigmoid loss, and the loss of each row."""
    errors = margins.sigmoid()
    parts = weights.div_(divisor).mul_(errors)
    losses = parts.sum(-1)
    parts.addcmul_(parts, errors, value=-1)  # the derivative of an error e is e * (1 - e)
    return _signs(foreground, errors).mul_(parts), losses


def _signs(foreground: Tensor, out: Tensor) -> Tensor:
    """Fill a tensor with -1 on the foreground and 1 elsewhere."""
    return out.copy_(foreground).mul_(-2.0).add_(1.0)


# ---------------------------------------------------------------------------------------------------------------------
# Several classes
# ---------------------------------------------------------------------------------------------------------------------


def _softmax(pred: Tensor, target: Tensor, weight: Optional[Tensor], gradient: Tensor, options: Options) -> Tensor:
    """Return the losses of the groups of logits ``(B, C, H, W)``, and write their gradient to ``gradient``."""
    batch, divisor = len(target), options.divisor(len(target))
    logits, labels = pred.flatten(2).expand(batch, -1, -1), target.flatten(1)
    if not options.per_image and batch > 1 and logits[0].numel() < tuning.merged_below:
        # Merge small images into one, which can be split into larger pieces.
        merged = logits.transpose(0, 1).flatten(1)
        parts = torch.empty_like(merged, dtype=gradient.dtype)
        one = (merged.unsqueeze(-1).unsqueeze(0), labels.flatten().view(1, -1, 1), weight, parts.unsqueeze(0))
        losses = _softmax(*one, options)
        gradient.copy_(parts.unflatten(1, (batch, -1)).transpose(0, 1))
        return losses

    def loss_of(tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        group = _SoftmaxGroup(*tensors, options.ignore_index)
        sizes, smallest = (torch.stack(each) for each in zip(*in_pieces(group.measure, group.pieces)))
        sizes, smallest = sizes.sum(0), smallest.amin(0)
        factors = class_factors(options.classes or "all", weight, sizes.unsqueeze(0), divisor, gradient.dtype)[0]
        group.rank(((factors != 0) & (sizes > 0)).nonzero().squeeze(1), sizes, smallest, factors)
        of_absent = group.rank_absent(((factors != 0) & (sizes == 0)).nonzero().squeeze(1), factors)
        loss = torch.stack(in_pieces(group.finish, group.pieces)).sum()
        group.errors.index_put_(*of_absent, accumulate=True)
        return torch.where(group.largest.amax().isnan(), float("nan"), loss)

    step = 1 if options.per_image else batch
    groups = zip(*(tensor.split(step) for tensor in (logits, labels, gradient)))
    return torch.stack(_map_items(loss_of, groups, gradient[:step].numel()))


def _softmax_of_all(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], gradient: Tensor, options: Options
) -> Tensor:
    """Do the same for small groups, several at a time: rank all pixels, as selecting candidates would take longer."""
    divisor, undivided = options.divisor(len(target)), options._replace(reduction="sum")

    def losses_of(tensors: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        losses, parts = _lovasz_dense.losses_and_gradient(*tensors[:2], weight, undivided)
        torch.div(parts, divisor, out=tensors[2])
        return losses.div_(divisor)

    step = _items_per_piece(len(target), gradient[0].numel()) if options.per_image else len(target)
    images = pred.expand(len(target), -1, -1, -1)
    return torch.cat(in_pieces(losses_of, zip(*(tensor.split(step) for tensor in (images, target, gradient)))))


# Number of pixels in a line. The largest error of each line is kept, to find that of an absent class quickly.
_LINE = 256


class _SoftmaxGroup:
    """The three passes over a group of images, and the values they share. A piece is a range of pixels of one image."""

    def __init__(self, pred: Tensor, target: Tensor, gradient: Tensor, ignore_index: Optional[int]) -> None:
        self.logits, self.target, self.errors, self.ignore_index = pred, target, gradient, ignore_index
        batch, num_classes, count = pred.shape
        label_dtype = torch.uint8 if num_classes < 256 else torch.int32
        self.labels = torch.empty((batch, count), dtype=label_dtype, device="cpu")  # ignored: num_classes
        self.labelled = torch.empty((batch, count), dtype=gradient.dtype, device="cpu")  # probabilities of the labels
        self.share = torch.empty_like(self.labelled)  # part of each pixel in the loss
        # The largest error in each line. Pieces begin at the start of a line.
        self.largest = torch.empty((batch, num_classes, -(-count // _LINE)), dtype=gradient.dtype, device="cpu")
        width = -(-size_of_pieces(pred.numel()) // (num_classes * _LINE)) * _LINE
        self.pieces = [(i, slice(j, j + width)) for i in range(batch) for j in range(0, count, width)]

    def measure(self, piece: tuple[int, slice]) -> tuple[Tensor, Tensor]:
        """Turn logits into errors. Return the foreground size of each class, and its smallest foreground error."""
        num_classes = self.logits.shape[1]
        labels, valid = class_labels(self.target[piece], num_classes, self.ignore_index)
        logits, out = self.logits[piece[0], :, piece[1]], self.errors[piece[0], :, piece[1]]
        # A whole image's errors are computed in place.
        errors = torch.softmax(logits.to(out.dtype), 0, out=out if out.is_contiguous() else None)
        marked = labels
        if valid is not None:
            marked = labels.masked_fill(~valid, num_classes)
            errors.index_fill_(1, (~valid).nonzero().squeeze(1), 0.0)
        index = labels.unsqueeze(0)
        self.labelled[piece] = errors.gather(0, index)[0]
        # A foreground error is the sum of the other probabilities.
        others = errors.scatter_(0, index, 0.0).sum(0)
        errors.scatter_(0, index, others.unsqueeze(0))
        if errors is not out:
            out.copy_(errors)
        self.labels[piece] = marked
        self.share[piece].zero_()
        smallest = torch.full((num_classes + 1,), torch.inf, dtype=errors.dtype, device="cpu")
        smallest.scatter_reduce_(0, marked, others, "amin")
        if missing := -errors.shape[1] % _LINE:  # in the last line of the image
            errors = torch.nn.functional.pad(errors, (0, missing))
        lines = errors.view(num_classes, -1, _LINE).amax(2)
        first = piece[1].start // _LINE
        self.largest[piece[0], :, first : first + lines.shape[1]] = lines
        return marked.bincount(minlength=num_classes + 1)[:-1], smallest[:-1]

    def rank(self, classes: Tensor, sizes: Tensor, smallest: Tensor, factors: Tensor) -> None:
        """Turn the errors of some classes into weights, already multiplied by the factors of the classes."""
        self.classes = classes
        self.weights = torch.empty((len(self.classes), *self.labels.shape), dtype=factors.dtype, device="cpu")
        # An error of 0 adds nothing to the loss or the gradient, whatever its weight.
        tiny = torch.finfo(factors.dtype).smallest_normal * torch.finfo(factors.dtype).eps
        floors, labels = smallest.clamp(min=tiny), self.labels.view(-1)
        length = len(labels)
        weights = self.weights.view(-1, length)

        def rank_from(start: int) -> None:
            rows = self.classes[start : start + step]
            if length > 2 * tuning.piece:
                errors = self._long_row(int(rows))
                scale = partial(_scale, factor=factors[rows])
                rank_long_row(errors, labels, int(rows), sizes[rows], floors[rows], weights[start], scale)
            else:
                errors = self.errors.index_select(1, rows).transpose(0, 1).flatten(1)
                foreground = (labels == rows.unsqueeze(1)).view(torch.uint8)
                ranked = rank_rows(errors, foreground, sizes[rows], floors[rows])
                torch.mul(ranked, factors[rows].unsqueeze(1), out=weights[start : start + step])

        step = _items_per_piece(len(self.classes), length)
        _map_items(rank_from, range(0, len(self.classes), step), step * length)

    def _long_row(self, label: int) -> Tensor:
        """Return the errors of one class. The threads copy them if they do not already lie next to each other."""
        images = self.errors[:, label]
        if len(images) == 1:
            return images[0]
        row = torch.empty(images.shape, dtype=images.dtype, device="cpu")
        in_pieces(lambda pair: pair[0].copy_(pair[1]), zip(row, images))
        return row.flatten()

    def rank_absent(self, absent: Tensor, factors: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the indices ``(B, C, N)`` of the largest errors of absent classes, and their parts in the loss."""
        line = self.largest.index_select(1, absent).transpose(0, 1).flatten(1).argmax(1)
        image, line = line // self.largest.shape[2], line % self.largest.shape[2]
        pixels = (line.unsqueeze(1) * _LINE + torch.arange(_LINE, device="cpu")).clamp_(max=self.errors.shape[2] - 1)
        errors = self.errors[image.unsqueeze(1), absent.unsqueeze(1), pixels]
        pixel = pixels.gather(1, errors.argmax(1, keepdim=True)).squeeze(1)
        parts = errors.amax(1) * factors[absent]
        self.share.index_put_((image, pixel), parts, accumulate=True)
        return (image, absent, pixel), parts

    def finish(self, piece: tuple[int, slice]) -> Tensor:
        """Turn weights into the gradient, which overwrites the errors. Return the part of the piece in the loss.

        With ``h`` as in the dense form, ``lift`` is the foreground weight of a pixel, which all its other classes share
        in ``h``, and ``share`` is ``sum(p * h)``, the part of the pixel in the loss. The gradient is
        ``p * (h - share)``.
        """
        errors, labels = self.errors[piece[0], :, piece[1]], self.labels[piece].to(torch.int64)
        weights, share = self.weights[:, piece[0], piece[1]], self.share[piece]
        num_classes, is_all = len(errors), len(self.classes) == len(errors)
        parts = (errors if is_all else errors.index_select(0, self.classes)) * weights
        share += parts.sum(0)
        lift = torch.zeros_like(share)
        if len(self.classes) > 0:
            # The index of each label among the ranked classes, or -1 if it is not one of them.
            places = torch.full((num_classes + 1,), -1, device="cpu")
            places[self.classes] = torch.arange(len(self.classes), device="cpu")
            places = places.index_select(0, labels)
            lift = weights.gather(0, places.clamp(min=0).unsqueeze(0))[0].mul_(places >= 0)
        errors.mul_(lift - share)
        _ = errors.add_(parts) if is_all else errors.index_add_(0, self.classes, parts)
        labels = labels.clamp_(max=num_classes - 1).unsqueeze(0)
        errors.scatter_(0, labels, self.labelled[piece].mul_(share).neg_().unsqueeze(0))
        return share.sum()


def _scale(errors: Tensor, foreground: Tensor, weights: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply weights by the factor of their class. A later pass computes the loss."""
    return weights.mul_(factor), errors.new_zeros(())


# ---------------------------------------------------------------------------------------------------------------------
# From errors to weights
# ---------------------------------------------------------------------------------------------------------------------


def rank_rows(errors: Tensor, foreground: Tensor, sizes: Tensor, floors: Tensor) -> Tensor:
    """Compute the weights of the candidates in rows. All other weights are 0.

    Args:
        errors: errors or margins ``(R, N)``.
        foreground: bytes ``(R, N)``.
        sizes: foreground size of each row, int64 ``(R,)``.
        floors: floor of each row ``(R,)``.
    """
    candidates = errors >= floors.unsqueeze(1)
    lengths = candidates.sum(1)
    count = int(lengths.sum())
    if count > errors.numel() // 2:
        # Gathering most of the errors would cost more than it saves.
        return weights_of_rows(errors, foreground, order_of_rows(errors)).mul_(candidates.view(torch.uint8))
    weights = torch.zeros(errors.shape, dtype=errors.dtype, device="cpu")
    if count > 0:
        places = candidates.flatten().nonzero().squeeze(1)
        selected = (tensor.flatten().index_select(0, places) for tensor in (errors, foreground))
        ranked = weights_of_segments(*selected, lengths, sizes, torch.zeros_like(sizes))
        weights.view(-1).index_copy_(0, places, ranked)
    return weights


def rank_long_row(
    errors: Tensor, labels: Tensor, label: int, size: Tensor, floor: Tensor, out: Tensor, apply_weights: ApplyWeights
) -> Tensor:
    """Rank one long row in pieces, and return its loss ``(1,)``.

    This is parallel sorting by regular sampling: runs of pixels are sorted, samples of them divide the range of the
    errors into parts of about the same size, and the runs are merged part by part.

    Args:
        errors: errors or margins of the row ``(N,)``.
        labels: ``(N,)``.
        label: label of the foreground.
        size: foreground size, int64.
        floor: floor of the row.
        out: receives the values that ``apply_weights`` keeps, and 0 for other pixels, ``(N,)``. It may be ``errors``.
        apply_weights: turns the weights into the values to keep.
    """
    step = size_of_pieces(len(errors))
    pieces = zip(range(0, len(errors), step), *(tensor.split(step) for tensor in (errors, labels, out)))
    runs = in_pieces(lambda piece: _sorted_run(*piece, label, floor, len(errors)), pieces)
    spacing = max(1, step // 64)
    samples = torch.cat([values[spacing - 1 :: spacing] for values, _ in runs]).sort(descending=True).values
    edges = samples[63::64].neg()

    def divide(run: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return where each part of a run ends, and the number of foreground pixels of the run up to there."""
        ends = torch.nn.functional.pad(torch.searchsorted(run[0].neg(), edges, right=True), (0, 1), value=len(run[0]))
        return ends, torch.nn.functional.pad((run[1] & 1).cumsum(0), (1, 0)).index_select(0, ends)

    ends, passed = (torch.stack(each) for each in zip(*in_pieces(divide, runs)))
    lengths = ends.diff(dim=1, prepend=ends.new_zeros(len(ends), 1)).tolist()
    values, tagged = (zip(*(run.split(part) for run, part in zip(each, lengths))) for each in zip(*runs))
    before, passed = (torch.nn.functional.pad(each.sum(0)[:-1], (1, 0)) for each in (ends, passed))
    parts = zip(values, tagged, before, size + before - passed)
    return torch.stack(in_pieces(lambda part: _merge(*part, out, apply_weights), parts)).sum(0, keepdim=True)


def _sorted_run(
    start: int, errors: Tensor, labels: Tensor, out: Tensor, label: int, floor: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Return the candidates of a run, largest first, and their tags: twice the index in the row, + 1 on foreground."""
    candidates = errors >= floor
    count = int(candidates.count_nonzero())
    if count > len(errors) // 2:  # selecting them would take longer than sorting all pixels
        places = descending_order(errors)[:count]
    else:
        places = candidates.nonzero().squeeze(1)
        places = places.index_select(0, descending_order(errors.index_select(0, places)))
    values, foreground = errors.index_select(0, places), labels.index_select(0, places) == label
    out.zero_()  # only now, because it may be the errors
    tagged = places.add_(start).to(torch.int32 if length < 1 << 30 else torch.int64)
    return values, tagged.mul_(2).add_(foreground)


def _merge(
    values: tuple[Tensor, ...],
    tagged: tuple[Tensor, ...],
    position: Tensor,
    union: Tensor,
    out: Tensor,
    apply_weights: ApplyWeights,
) -> Tensor:
    """Merge one part of all runs, and return its loss.

    Args:
        values: the candidates of each run in this part.
        tagged: tags of these candidates, see :func:`_sorted_run`.
        position: number of candidates before this part.
        union: foreground size of the row plus the number of background candidates before this part.
        out: receives the values that ``apply_weights`` keeps, ``(N,)``.
        apply_weights: turns the weights into the values to keep.
    """
    errors, tags = torch.cat(values), torch.cat(tagged)
    order = descending_order(errors)
    errors, tags = errors.index_select(0, order), tags.index_select(0, order)
    foreground = tags & 1
    background = 1 - foreground
    unions = background.cumsum(0, dtype=tags.dtype).add_(union)
    positions = torch.arange(len(errors), dtype=tags.dtype, device="cpu").add_(position)
    kept, loss = apply_weights(errors, foreground, jaccard_weights(background, positions, unions, errors.dtype))
    out.index_copy_(0, (tags >> 1).to(torch.int64), kept)
    return loss
