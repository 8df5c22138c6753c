# SPDX-License-Identifier: Apache-2.0
"""The intersection over union (IoU) of ``pred > threshold``, at given thresholds or at the best one.

Both functions count the pixels once and look closely at a few of them. A *cell* is a range of logits: all that share
the upper 16 bits of their float32 value, and cells are numbered in the order of their logits. The counts of all cells
say how many pixels lie above a threshold, but for the pixels in the threshold's own cell: only those are compared.
They also bound the IoU that a threshold inside a cell can reach, so only cells that can hold the optimum are sorted.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from kornia.core.check import KORNIA_CHECK_IS_TENSOR, KORNIA_CHECK_SHAPE
from kornia.losses._eager import is_eager
from kornia.losses._labels import binary_labels, check_pair
from kornia.losses._lovasz_options import check_ignore_index
from kornia.losses._threads import in_pieces
from kornia.losses._tuning import tuning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NUM_CELLS = 1 << 16


Pixels = tuple[Tensor, Tensor]  # logits, at least float32, and where the foreground is, both (N,)


def _in_pieces(work: Callable[[Any], Any], *tensors: Tensor) -> list[Any]:
    """Work on so many pixels at a time: on the CPU by threads, each piece by one."""
    pieces = zip(*(tensor.split(tuning.metric_piece) for tensor in tensors))
    return in_pieces(work, pieces) if tensors[0].device.type == "cpu" else [work(piece) for piece in pieces]


def _prepare(piece: tuple[Tensor, Tensor], ignore_index: Optional[int]) -> Pixels:
    """Check labels, and return the valid of some pixels."""
    logits, foreground, valid = _with_mask(*piece, ignore_index)
    return (logits, foreground) if valid is None else (logits[valid], foreground[valid])


def _with_mask(logits: Tensor, labels: Tensor, ignore_index: Optional[int]) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    foreground, valid = binary_labels(labels, ignore_index)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), foreground, valid


def _quotient(intersection: Tensor, union: Tensor, dtype: torch.dtype) -> Tensor:
    """IoU of these counts. Nothing predicted where there is nothing is right: 0 / 0 is 1."""
    return torch.where(union == 0, 1.0, intersection.to(dtype) / union)


def _iou(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """IoU at each threshold, from the counts of :func:`_count_above`."""
    pixels, nans, above = counts.split([1, 1, counts.shape[1] - 2], dim=1)
    iou = _quotient(above[1], pixels[1] + above[0], dtype)
    return iou.masked_fill(nans.any(), float("nan"))


def _has_nan(logits: Tensor) -> bool:
    # The maximum is nan if one logit is. Finding it takes a tenth of the time of isnan.
    return len(logits) > 0 and bool(logits.max().isnan())


def _widest_optimum(iou: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first and the last of the adjacent optima that reach the furthest, from ``upper`` to ``lower``."""
    best = torch.nn.functional.pad(iou == iou.max(), (1, 1))
    first = (best[1:-1] & ~best[:-2]).nonzero().squeeze(1)
    last = (best[1:-1] & ~best[2:]).nonzero().squeeze(1)
    widest = (upper[first] - lower[last]).nan_to_num(0.0).argmax()  # from inf to inf there is no way
    return first[widest], last[widest]


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def _cells(logits: Tensor) -> Tensor:
    """Number of the cell of each logit, int32 in [0, 65536). A logit in a higher cell is greater."""
    bits = logits.to(torch.float32).view(torch.int32)
    sign = bits >> 31
    # A negative number has the bits of its magnitude below the sign: negated, they order it, and -0 becomes 0.
    key = (sign & torch.iinfo(torch.int32).max).bitwise_xor_(bits).sub_(sign)
    return key.bitwise_right_shift_(16).add_(_NUM_CELLS // 2)


def _count(numbers: Tensor, foreground: Tensor, size: int) -> Tensor:
    """Count how often each number below ``size`` is on the background and on the foreground: int64 ``(2, size)``."""
    return torch.add(numbers, foreground.to(numbers.dtype), alpha=size).bincount(minlength=2 * size).view(2, size)


def _suffix_sum(counts: Tensor) -> Tensor:
    return counts.flip(-1).cumsum(-1).flip(-1)


def _count_above(pred: Tensor, target: Tensor, ignore_index: Optional[int], thresholds: Tensor) -> Tensor:
    """Count background and foreground pixels: all, those whose logit is nan, and those above each threshold.

    Returns:
        int64 ``(2, 2 + T)``. The last ``T`` columns mean nothing if a logit is nan.
    """
    pred, target = pred.detach().flatten(), target.detach().flatten()
    # A threshold that the dtype of the logits cannot hold separates them where the next number below does.
    thresholds = thresholds.detach()
    thresholds = thresholds if thresholds.is_floating_point() else thresholds.to(torch.float64)
    held = thresholds.to(torch.promote_types(pred.dtype, torch.float32))
    held = torch.where(held > thresholds, held.nextafter(torch.full_like(held, float("-inf"))), held)
    held = held.masked_fill(held.isnan(), float("inf"))  # which sorts, and which nothing is above
    if not (tuning.eager_forms and is_eager(pred) and is_eager(target)):
        logits, foreground, valid = _with_mask(pred, target, ignore_index)
        columns = torch.cat([torch.ones_like(foreground)[None], logits.isnan()[None], logits > held[:, None]])
        rows = torch.stack([~foreground, foreground])
        return ((rows if valid is None else rows & valid)[:, None] & columns).sum(-1)

    ascending, order = held.sort()
    count = partial(_count_between if len(pred) < tuning.cells_from else _count_by_cells, ascending=ascending)

    def count_piece(piece: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, foreground = _prepare(piece, ignore_index)
        positives = foreground.count_nonzero()
        nans = foreground[logits.isnan()] if _has_nan(logits) else foreground[:0]
        pixels = torch.stack([len(foreground) - positives, positives, (~nans).sum(), nans.sum()])
        return pixels.view(2, 2).T, *count(logits, foreground)

    pixels, between, by_cell = (sum(each) for each in zip(*_in_pieces(count_piece, pred, target)))
    if by_cell.shape[1] > 0:
        # Of the cells without a threshold, each lies between two thresholds as a whole.
        cells = torch.arange(_NUM_CELLS, dtype=torch.int32, device=pred.device)
        by_cell.index_fill_(1, _cells(ascending).long(), 0)
        between.index_add_(1, torch.bucketize(cells, _cells(ascending)), by_cell)
    return torch.cat([pixels, _suffix_sum(between)[:, 1:][:, order.argsort()]], dim=1)


def _count_between(logits: Tensor, foreground: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Count background and foreground pixels by the number of thresholds below their logit: int64 ``(2, 1 + T)``."""
    between = torch.bucketize(logits, ascending, out_int32=True)
    return _count(between, foreground, 1 + len(ascending)), between.new_zeros(2, 0)


def _count_by_cells(logits: Tensor, foreground: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same, of the pixels in the cells of the thresholds alone, and count the pixels of each cell."""
    cells = _cells(logits)
    own = torch.zeros(_NUM_CELLS, dtype=torch.bool, device=logits.device)
    own[_cells(ascending).long()] = True
    close = own.index_select(0, cells).nonzero().squeeze(1)
    between, _ = _count_between(logits[close], foreground[close], ascending)
    return between, _count(cells, foreground, _NUM_CELLS)


def _optimal_interval(pieces: list[Pixels]) -> tuple[float, float, Tensor]:
    """Find the best thresholds: from ``lower``, included, to ``upper``, excluded; and their IoU, 0-d float64."""
    total = torch.stack([foreground.count_nonzero() for _, foreground in pieces]).sum()
    skipped = None
    if sum(len(logits) for logits, _ in pieces) >= tuning.cells_from:
        pieces, skipped = _candidates(pieces)
    # Few pixels are left, and threads that share each operation would wait for each other.
    search = partial(_optimal_of, total=total, skipped=skipped)
    return in_pieces(search, [pieces])[0] if pieces[0][0].device.type == "cpu" else search(pieces)


def _optimal_of(pieces: list[Pixels], total: Tensor, skipped: Optional[Tensor]) -> tuple[float, float, Tensor]:
    """Do the same with the foreground size of all pixels, and the counts of the cells that were skipped."""
    logits, foreground = (torch.cat(each) for each in zip(*pieces))
    # No threshold is below -inf.
    logits, foreground = logits[logits > float("-inf")], foreground[logits > float("-inf")]
    descending, order = logits.sort(descending=True)
    foreground = foreground[order]
    # Equal logits are predicted together: after the last of them.
    last = torch.cat([descending[1:] != descending[:-1], torch.ones_like(foreground[:1])])
    levels = descending[last]
    above = torch.stack([~foreground, foreground]).cumsum(1)[:, last]
    if skipped is not None:
        above = above + _suffix_sum(skipped)[:, _cells(levels).long()]
    above = torch.cat([above.new_zeros(2, 1), above], dim=1)  # nothing is above the largest logit
    iou = _quotient(above[1], total + above[0], torch.float64)

    ends = torch.cat([levels.new_full((1,), float("inf")), levels, levels.new_full((1,), float("-inf"))]).double()
    first, last = _widest_optimum(iou, ends[:-1], ends[1:])
    lower, upper = torch.stack([ends[last + 1], ends[first]]).tolist()
    return lower, upper, iou[first]


def _candidates(pieces: list[Pixels]) -> tuple[list[Pixels], Tensor]:
    """Find the pixels of the cells that can hold an end of an optimal interval, and count those of the other cells."""
    device = pieces[0][0].device
    each = in_pieces if device.type == "cpu" else map
    by_cell = torch.zeros(2, _NUM_CELLS, dtype=torch.int64, device=device)
    for counts in each(lambda piece: _count(_cells(piece[0]), piece[1], _NUM_CELLS), pieces):
        by_cell += counts
    # A prediction of all pixels down to the bottom of a cell has the IoU ``reached``. One that ends inside it or at
    # its top has at most ``possible``, that of all its foreground and nothing else of it. Both ends of an optimal
    # interval are thus in candidates: the lowest logit that is predicted, and the highest that is not.
    through = _suffix_sum(by_cell)
    total = through[1, 0]
    reached = _quotient(through[1], total + through[0], torch.float64)
    possible = _quotient(through[1], total + through[0] - by_cell[0], torch.float64)
    lowest = int(_cells(pieces[0][0].new_full((1,), float("-inf"))))  # below which there is no threshold
    candidate = possible >= reached[lowest + 1 :].max()

    def choose(piece: Pixels) -> Pixels:
        close = candidate.index_select(0, _cells(piece[0])).nonzero().squeeze(1)
        return piece[0][close], piece[1][close]

    return list(each(choose, pieces)), by_cell.masked_fill_(candidate, 0)


def _middle(lower: float, upper: float, dtype: torch.dtype) -> Tensor:
    """Choose the threshold in ``lower <= threshold < upper``, two numbers of the dtype or infinite."""
    if lower == float("-inf"):
        middle = 0.0 if upper > 0 else upper - 1.0
    elif upper == float("inf"):
        middle = 0.0 if lower <= 0 else lower + 1.0
    else:
        middle = lower / 2 + upper / 2
    threshold = torch.tensor(middle, dtype=dtype, device="cpu")
    # Between two numbers of the dtype that are next to each other there is none.
    return threshold if threshold.item() < upper else torch.tensor(lower, dtype=dtype, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Public
# ---------------------------------------------------------------------------------------------------------------------


def iou_at_thresholds(
    pred: Tensor, target: Tensor, thresholds: Tensor, *, ignore_index: Optional[int] = -100
) -> Tensor:
    r"""Compute the intersection over union (IoU) of the prediction ``pred > t`` for every threshold ``t``.

    With the foreground :math:`Y` and the pixels of the batch taken together,

    .. math::

        \text{IoU}(t) = \frac{|\{i : z_i > t\} \cap Y|}{|\{i : z_i > t\} \cup Y|}

    All thresholds are served by one pass over the pixels, whose cost hardly depends on their number. Counts are
    integers and comparisons exact, so the result is that of a loop over the thresholds, at any number of pixels.

    Args:
        pred: logits :math:`(B, 1, H, W)`. Half precisions are compared in float32, integers and bool as float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        thresholds: thresholds :math:`(T,)` in logits, in any order, of any real dtype; they may repeat and be infinite.
            A probability :math:`p` is the logit :math:`\log(p / (1 - p))`, ``torch.logit(p)``.
        ignore_index: pixels with this label are excluded. None: nothing is ignored.

    Returns:
        the IoU at each threshold :math:`(T,)` in [0, 1], float64 if ``pred`` is, otherwise float32; without a gradient.
        Where the union is empty, as for an empty mask of which nothing is predicted, the IoU is 1. A nan logit of a
        valid pixel makes every IoU nan, a nan threshold its own.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)`, ``target`` not :math:`(B, H, W)` or ``thresholds`` not
            :math:`(T,)`.
        ValueError: if the batch or image sizes or the devices differ, or a label on the CPU is neither 0, 1 nor
            ``ignore_index``.
        TypeCheckError: if ``thresholds`` is not a tensor.

    Example:
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]])
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> iou_at_thresholds(pred, target, torch.tensor([0.0, 1.0, -1.0]))
        tensor([0.3333, 0.5000, 0.6667])

    """
    KORNIA_CHECK_IS_TENSOR(thresholds, "thresholds must be Tensor.")
    KORNIA_CHECK_SHAPE(thresholds, ["T"])
    check_pair(pred, target, "1")
    if not thresholds.device == pred.device:
        raise ValueError(f"thresholds and pred must be in the same device. Got: {thresholds.device} and {pred.device}")
    counts = _count_above(pred, target, ignore_index, thresholds)
    iou = _iou(counts, torch.promote_types(pred.dtype, torch.float32))
    return iou.masked_fill(thresholds.isnan(), float("nan"))


def best_iou_threshold(pred: Tensor, target: Tensor, *, ignore_index: Optional[int] = -100) -> tuple[Tensor, Tensor]:
    r"""Find the threshold whose prediction ``pred > threshold`` has the largest intersection over union (IoU).

    The optimum is exact and over all numbers, not over a grid. The pixels of the batch are taken together.

    The best thresholds are an interval from one logit to another, and its middle is returned. If several intervals
    are equally good, it is the widest. One that has no end, as when everything is foreground, has no middle: the
    threshold is then 0 if that is in it, otherwise the point 1 beyond the end that it has (-inf if that end is so large
    that its dtype has no such point).

    Args:
        pred: logits :math:`(B, 1, H, W)`. Integers and bool are taken as float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        ignore_index: pixels with this label are excluded. None: nothing is ignored.

    Returns:
        the threshold and its IoU, both 0-d. The threshold is in logits, in the dtype of a floating-point ``pred`` and
        otherwise in float32, so that ``pred > threshold`` has this very IoU. The IoU is in [0, 1], float64 if ``pred``
        is, otherwise float32. If there is no foreground, the best prediction is empty and its IoU is 1; without any
        valid pixel the threshold is 0 and the IoU 1. If a logit of a valid pixel is nan, both are nan.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if the batch or image sizes or the devices differ, or a label on the CPU is neither 0, 1 nor
            ``ignore_index``.

    Example:
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]])
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> best_iou_threshold(pred, target)  # anything from -3 to -0.5
        (tensor(-1.7500), tensor(0.6667))

    """
    check_pair(pred, target, "1")
    computed = torch.promote_types(pred.dtype, torch.float32)
    dtype = pred.dtype if pred.is_floating_point() else computed
    prepare = partial(_prepare, ignore_index=ignore_index)
    pieces = _in_pieces(prepare, pred.detach().flatten(), target.detach().flatten())
    if any(_has_nan(logits) for logits, _ in pieces):
        return pred.new_tensor(float("nan"), dtype=dtype), pred.new_tensor(float("nan"), dtype=computed)
    lower, upper, iou = _optimal_interval(pieces)
    return _middle(lower, upper, dtype).to(pred.device), iou.to(computed)


class IoUThresholdSearch:
    r"""Search a grid of thresholds for the largest intersection over union (IoU) of a data set.

    What :func:`~kornia.metrics.iou_at_thresholds` computes, of all pixels that ``update`` was called with, batch
    after batch: of a validation set that is larger than the memory, by any number of processes. Only counts are kept.

    Args:
        thresholds: thresholds :math:`(T,)` in logits, in any order, of a floating-point dtype. None: the 31
            probabilities 0.3, 0.313, ..., 0.7, as logits in float32.
        ignore_index: label of the pixels to exclude, or None.

    Attributes:
        thresholds: the thresholds :math:`(T,)`.
        counts: what has been counted, int64 :math:`(2, 2 + T)`: pixels of the background and of the foreground, first
            all, then those whose logit is nan, then those above each threshold. The counts of two searches over the
            same thresholds add up. They are on the device of the latest batch, and before the first on that of
            ``thresholds``.

    Raises:
        ShapeError: if ``thresholds`` is not :math:`(T,)`.
        ValueError: if there is no threshold, one is nan, they are not floating-point numbers, or ``ignore_index`` is
            neither None nor a 64-bit integer.
        TypeCheckError: if ``thresholds`` is neither a tensor nor None.

    Example:
        >>> search = IoUThresholdSearch(torch.tensor([-1.0, 0.0, 1.0]))
        >>> search.update(torch.tensor([[[[2.0, -0.5]]]]), torch.tensor([[[1, 1]]]))
        >>> search.update(torch.tensor([[[[0.25, -3.0]]]]), torch.tensor([[[0, 0]]]))
        >>> search.iou_at_thresholds()
        tensor([0.6667, 0.3333, 0.5000])
        >>> search.compute()
        (tensor(-1.), tensor(0.6667))

    """

    thresholds: Tensor
    counts: Tensor

    def __init__(self, thresholds: Optional[Tensor] = None, *, ignore_index: Optional[int] = -100) -> None:
        if thresholds is None:
            thresholds = torch.linspace(0.3, 0.7, 31, dtype=torch.float32, device="cpu").logit()
        KORNIA_CHECK_IS_TENSOR(thresholds, "thresholds must be Tensor or None.")
        KORNIA_CHECK_SHAPE(thresholds, ["T"])
        if not (thresholds.is_floating_point() and len(thresholds) > 0 and not thresholds.isnan().any()):
            raise ValueError(
                f"thresholds must hold floating-point numbers, at least one and none nan. Got: {thresholds}"
            )
        check_ignore_index(ignore_index)
        self.thresholds = thresholds.detach().clone()
        self.ignore_index = ignore_index
        self.reset()

    def __repr__(self) -> str:
        low, high = self.thresholds.aminmax()
        return (
            f"{type(self).__name__}({len(self.thresholds)} thresholds from {low:.4g} to {high:.4g}, "
            f"ignore_index={self.ignore_index}, {int(self.counts[:, 0].sum())} pixels counted)"
        )

    def reset(self) -> None:
        """Forget all pixels."""
        self.counts = self.thresholds.new_zeros(2, 2 + len(self.thresholds), dtype=torch.int64)

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Count the pixels of a batch.

        Args:
            pred: logits :math:`(B, 1, H, W)`.
            target: labels :math:`(B, H, W)`, 0 and 1.

        Raises:
            ShapeError, ValueError: as :func:`~kornia.metrics.iou_at_thresholds` does. The batch is then not counted.
        """
        check_pair(pred, target, "1")
        counts = _count_above(pred, target, self.ignore_index, self.thresholds.to(pred.device))
        self.counts = self.counts.to(pred.device) + counts

    def iou_at_thresholds(self, process_group: Optional[ProcessGroup] = None) -> Tensor:
        """Compute the IoU at each threshold.

        Args:
            process_group: processes whose counts are added up; all of them must call this, with the same thresholds.
                ``torch.distributed.group.WORLD`` is all processes. None: the counts of this process.

        Returns:
            the IoU of ``pred > threshold`` at each of ``thresholds`` :math:`(T,)`, in their dtype, at least float32. It
            is 1 where the union is empty. All are nan if a logit was.

        Raises:
            RuntimeError: if no valid pixel has been counted.
        """
        return self._iou(process_group).to(torch.promote_types(self.thresholds.dtype, torch.float32))

    def compute(self, process_group: Optional[ProcessGroup] = None) -> tuple[Tensor, Tensor]:
        """Find the best of the thresholds.

        Of several that are equally good it is the middle one: of the widest range of neighbours, and of two in the
        middle the larger. If they reach the smallest or the largest of the thresholds, a warning says so, as a better
        one may lie beyond.

        Args:
            process_group: processes whose counts are added up, as for ``iou_at_thresholds``. None: the counts of this
                process.

        Returns:
            the threshold, in logits, and its IoU, both 0-d. Both are nan if a logit was. Apply it as
            ``pred > threshold.view(1)``: PyTorch would round a 0-d threshold to the dtype of ``pred``.

        Raises:
            RuntimeError: if no valid pixel has been counted.
        """
        iou = self._iou(process_group)
        descending, order = self.thresholds.to(iou.device).sort(descending=True)
        iou = iou[order]
        if iou.isnan().any():
            best, threshold = iou[0], torch.full_like(descending[0], float("nan"))
        else:
            first, last = _widest_optimum(iou, descending, descending)
            middle = (first + last) // 2
            best, threshold = iou[middle], descending[middle]
            if 1 < len(iou) and best < 1 and (first == 0 or last == len(iou) - 1):
                end = "largest" if first == 0 else "smallest"
                warnings.warn(
                    f"the best IoU is at the {end} of the thresholds, and there may be a better one beyond it: search "
                    "a wider grid, such as IoUThresholdSearch(torch.linspace(0.01, 0.99, 99).logit())",
                    stacklevel=2,
                )
        return threshold, best.to(torch.promote_types(threshold.dtype, torch.float32))

    def _iou(self, process_group: Optional[ProcessGroup]) -> Tensor:
        counts = self.counts
        if process_group is not None:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=process_group)
        if not counts[:, 0].any():
            raise RuntimeError("no valid pixel has been counted: call update first, with labels that are not ignored")
        return _iou(counts, torch.float64)
