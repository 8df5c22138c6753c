# SPDX-License-Identifier: Apache-2.0
"""The intersection over union (IoU) of ``pred > threshold``, at given thresholds or at the best one.

Both functions count the pixels once per *cell*, and compare or sort only a few of them. A cell is the range of logits
whose float32 values share the upper 16 bits. Cells are numbered in the order of their logits. The counts of all cells
give the number of pixels above a threshold, except for the pixels in the cell of the threshold, which are compared.
They also bound the IoU that a threshold inside a cell can reach, so only cells that can hold the optimum are sorted.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Callable, Optional

import torch
from torch import Tensor

from kornia.core.check import KORNIA_CHECK_IS_TENSOR, KORNIA_CHECK_SHAPE
from kornia.losses._eager import device_with_float64, is_eager
from kornia.losses._labels import binary_labels, check_pair
from kornia.losses._lovasz_options import check_ignore_index
from kornia.losses._threads import in_pieces
from kornia.losses._tuning import tuning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NUM_CELLS = 1 << 16


Pixels = tuple[Tensor, Tensor]  # logits, float32 or float64, and the foreground mask, both (N,)


def _in_pieces(work: Callable[[Any], Any], *tensors: Tensor) -> list[Any]:
    """Apply ``work`` to pieces of the tensors. On the CPU, threads share the pieces."""
    pieces = zip(*(tensor.split(tuning.metric_piece) for tensor in tensors))
    return in_pieces(work, pieces) if tensors[0].device.type == "cpu" else [work(piece) for piece in pieces]


def _prepare(piece: tuple[Tensor, Tensor], ignore_index: Optional[int]) -> Pixels:
    """Check the labels of a piece, and return its valid pixels."""
    logits, foreground, valid = _with_mask(*piece, ignore_index)
    return (logits, foreground) if valid is None else (logits[valid], foreground[valid])


def _with_mask(logits: Tensor, labels: Tensor, ignore_index: Optional[int]) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    foreground, valid = binary_labels(labels, ignore_index)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)), foreground, valid


def _quotient(intersection: Tensor, union: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide the intersection by the union. An empty prediction of an empty mask is right, so 0 / 0 is 1."""
    return torch.where(union == 0, 1.0, intersection.to(dtype) / union)


def _iou(counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the IoU at each threshold from the counts of :func:`_count_above`."""
    pixels, nans, above = counts.split([1, 1, counts.shape[1] - 2], dim=1)
    iou = _quotient(above[1], pixels[1] + above[0], dtype)
    return iou.masked_fill(nans.any(), float("nan"))


def _has_nan(logits: Tensor) -> bool:
    # The maximum is nan if any logit is, and takes a tenth of the time of isnan.
    return len(logits) > 0 and bool(logits.max().isnan())


def _widest_optimum(iou: Tensor, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and last index of the widest run of adjacent optima, which spans ``lower`` to ``upper``."""
    best = torch.nn.functional.pad(iou == iou.max(), (1, 1))
    first = (best[1:-1] & ~best[:-2]).nonzero().squeeze(1)
    last = (best[1:-1] & ~best[2:]).nonzero().squeeze(1)
    widest = (upper[first] - lower[last]).nan_to_num(0.0).argmax()  # inf - inf has no width
    return first[widest], last[widest]


# ---------------------------------------------------------------------------------------------------------------------
# Cells
# ---------------------------------------------------------------------------------------------------------------------


def _cells(logits: Tensor) -> Tensor:
    """Return the cell of each logit, int32 in [0, 65536). Cells are in the order of their logits."""
    bits = logits.to(torch.float32).view(torch.int32)
    sign = bits >> 31
    # The bits of positive floats have the order of the floats. For negative ones, take minus the bits of the magnitude,
    # which also makes -0 equal to 0.
    key = (sign & torch.iinfo(torch.int32).max).bitwise_xor_(bits).sub_(sign)
    return key.bitwise_right_shift_(16).add_(_NUM_CELLS // 2)


def _count(numbers: Tensor, foreground: Tensor, size: int) -> Tensor:
    """Count each number below ``size`` on the background and on the foreground, int64 ``(2, size)``."""
    return torch.add(numbers, foreground.to(numbers.dtype), alpha=size).bincount(minlength=2 * size).view(2, size)


def _suffix_sum(counts: Tensor) -> Tensor:
    return counts.flip(-1).cumsum(-1).flip(-1)


def _count_above(pred: Tensor, target: Tensor, ignore_index: Optional[int], thresholds: Tensor) -> Tensor:
    """Count background and foreground pixels: all, those with a nan logit, and those above each threshold.

    Returns:
        int64 ``(2, 2 + T)``. The last ``T`` columns are meaningless if a logit is nan.
    """
    pred, target = pred.detach().flatten(), target.detach().flatten()
    # A threshold that the dtype of the logits cannot hold is rounded down. It then separates the same logits.
    thresholds = thresholds.detach()
    if not thresholds.is_floating_point():
        thresholds = thresholds.to(device_with_float64(pred.device), torch.float64)
    held = thresholds.to(torch.promote_types(pred.dtype, torch.float32))
    held = torch.where(held > thresholds, held.nextafter(torch.full_like(held, float("-inf"))), held).to(pred.device)
    held = held.masked_fill(held.isnan(), float("inf"))  # inf can be sorted, and no logit is above it
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
        # A cell without a threshold lies between two thresholds as a whole.
        cells = torch.arange(_NUM_CELLS, dtype=torch.int32, device=pred.device)
        by_cell.index_fill_(1, _cells(ascending).long(), 0)
        between.index_add_(1, torch.bucketize(cells, _cells(ascending)), by_cell)
    return torch.cat([pixels, _suffix_sum(between)[:, 1:][:, order.argsort()]], dim=1)


def _count_between(logits: Tensor, foreground: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Count background and foreground pixels by the number of thresholds below their logit: int64 ``(2, 1 + T)``."""
    between = torch.bucketize(logits, ascending, out_int32=True)
    return _count(between, foreground, 1 + len(ascending)), between.new_zeros(2, 0)


def _count_by_cells(logits: Tensor, foreground: Tensor, ascending: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for the pixels in cells that hold a threshold, and count the pixels of every cell."""
    cells = _cells(logits)
    has_threshold = torch.zeros(_NUM_CELLS, dtype=torch.bool, device=logits.device)
    has_threshold[_cells(ascending).long()] = True
    close = has_threshold.index_select(0, cells).nonzero().squeeze(1)
    between, _ = _count_between(logits[close], foreground[close], ascending)
    return between, _count(cells, foreground, _NUM_CELLS)


def _optimal_interval(pieces: list[Pixels]) -> tuple[float, float, Tensor]:
    """Return the best thresholds, from ``lower`` (included) to ``upper`` (excluded), and their IoU, 0-d float64."""
    total = torch.stack([foreground.count_nonzero() for _, foreground in pieces]).sum()
    skipped = None
    if sum(len(logits) for logits, _ in pieces) >= tuning.cells_from:
        pieces, skipped = _candidates(pieces)
    # Few pixels are left, so run single-threaded operations: sharing each among threads would cost more than it saves.
    search = partial(_optimal_of, total=total, skipped=skipped)
    return in_pieces(search, [pieces])[0] if pieces[0][0].device.type == "cpu" else search(pieces)


def _optimal_of(pieces: list[Pixels], total: Tensor, skipped: Optional[Tensor]) -> tuple[float, float, Tensor]:
    """Do the same, given the foreground size of all pixels and the counts of the skipped cells."""
    logits, foreground = (torch.cat(each) for each in zip(*pieces))
    # No threshold is below -inf.
    logits, foreground = logits[logits > float("-inf")], foreground[logits > float("-inf")]
    descending, order = logits.sort(descending=True)
    foreground = foreground[order]
    # A threshold cannot separate equal logits, so only the last of them counts.
    last = torch.cat([descending[1:] != descending[:-1], torch.ones_like(foreground[:1])])
    levels = descending[last]
    above = torch.stack([~foreground, foreground]).cumsum(1)[:, last]
    if skipped is not None:
        above = above + _suffix_sum(skipped)[:, _cells(levels).long()]
    above = torch.cat([above.new_zeros(2, 1), above], dim=1)  # nothing is above the largest logit
    above, total, levels = (tensor.to(device_with_float64(tensor.device)) for tensor in (above, total, levels))
    iou = _quotient(above[1], total + above[0], torch.float64)

    ends = torch.cat([levels.new_full((1,), float("inf")), levels, levels.new_full((1,), float("-inf"))]).double()
    first, last = _widest_optimum(iou, ends[:-1], ends[1:])
    lower, upper = torch.stack([ends[last + 1], ends[first]]).tolist()
    return lower, upper, iou[first]


def _candidates(pieces: list[Pixels]) -> tuple[list[Pixels], Tensor]:
    """Return the pixels of cells that can hold an end of an optimal interval, and the counts of all other cells."""
    device = pieces[0][0].device
    each = in_pieces if device.type == "cpu" else map
    by_cell = torch.zeros(2, _NUM_CELLS, dtype=torch.int64, device=device)
    for counts in each(lambda piece: _count(_cells(piece[0]), piece[1], _NUM_CELLS), pieces):
        by_cell += counts
    # A prediction of all pixels down to the bottom of a cell has the IoU ``reached``. A prediction that ends at the top
    # of the cell or inside it has at most the IoU ``possible``, for all foreground of the cell and none of its
    # background. Both ends of an optimal interval, the lowest predicted logit and the highest other one, are therefore
    # in candidate cells.
    counts = by_cell.to(device_with_float64(device))
    through = _suffix_sum(counts)
    total = through[1, 0]
    reached = _quotient(through[1], total + through[0], torch.float64)
    possible = _quotient(through[1], total + through[0] - counts[0], torch.float64)
    lowest = int(_cells(pieces[0][0].new_full((1,), float("-inf"))))  # no threshold is below this cell
    candidate = (possible >= reached[lowest + 1 :].max()).to(device)

    def choose(piece: Pixels) -> Pixels:
        close = candidate.index_select(0, _cells(piece[0])).nonzero().squeeze(1)
        return piece[0][close], piece[1][close]

    return list(each(choose, pieces)), by_cell.masked_fill_(candidate, 0)


def _middle(lower: float, upper: float, dtype: torch.dtype) -> Tensor:
    """Choose a threshold with ``lower <= threshold < upper``. Both ends are numbers of the dtype or infinite."""
    if lower == float("-inf"):
        middle = 0.0 if upper > 0 else upper - 1.0
    elif upper == float("inf"):
        middle = 0.0 if lower <= 0 else lower + 1.0
    else:
        middle = lower / 2 + upper / 2
    threshold = torch.tensor(middle, dtype=dtype, device="cpu")
    # Two neighbouring numbers of the dtype have no number between them.
    return threshold if threshold.item() < upper else torch.tensor(lower, dtype=dtype, device="cpu")


# ---------------------------------------------------------------------------------------------------------------------
# Public
# ---------------------------------------------------------------------------------------------------------------------


def iou_at_thresholds(
    pred: Tensor, target: Tensor, thresholds: Tensor, *, ignore_index: Optional[int] = -100
) -> Tensor:
    r"""Compute the intersection over union (IoU) of the prediction ``pred > t`` for every threshold ``t``.

    Use it to see how the IoU of one foreground class depends on the threshold:
    ``iou_at_thresholds(logits, labels, torch.linspace(-2, 2, 41))``.

    All pixels of the batch are scored together. With their foreground :math:`Y` and logits :math:`z_i`,

    .. math::

        \text{IoU}(t) = \frac{|\{i : z_i > t\} \cap Y|}{|\{i : z_i > t\} \cup Y|}

    One pass over the pixels serves all thresholds, and its cost hardly depends on their number. Counts are integers and
    comparisons are exact, so the result equals that of a loop over the thresholds for any number of pixels.

    Convention:
        - ``pred`` holds logits, not probabilities, and so does ``thresholds``. ``target`` holds labels, 1 for the
          foreground and 0 for the background. By default, pixels with the label -100 are ignored.
        - A pixel is predicted as foreground if its logit is greater than the threshold, not if it is equal.
        - The whole batch has one IoU per threshold. Images are not averaged.

    Args:
        pred: logits :math:`(B, 1, H, W)`, of any real dtype. All dtypes but float64 are compared in float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        thresholds: thresholds :math:`(T,)` in logits, in any order, of any real dtype. They may repeat and be infinite.
            The logit of a probability :math:`p` is :math:`\log(p / (1 - p))`, or ``torch.logit(p)``.
        ignore_index: pixels with this label are excluded. None ignores no pixel.

    Returns:
        the IoU at each threshold :math:`(T,)`, in [0, 1] and without a gradient. It is float64 if ``pred`` is float64,
        and otherwise float32. If the union is empty, as for an empty prediction of an empty mask, the IoU is 1. If the
        logit of a valid pixel is nan, every IoU is nan. The IoU at a nan threshold is nan.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)`, ``target`` not :math:`(B, H, W)` or ``thresholds`` not
            :math:`(T,)`.
        ValueError: if ``pred`` and ``target`` differ in batch size, image size or device, or if a label on the CPU is
            neither 0, 1 nor ``ignore_index``.
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

    Use it to replace the threshold 0 of a trained network: ``threshold, iou = best_iou_threshold(logits, labels)``.

    The optimum is exact: the search is over all thresholds, not over a grid. All pixels of the batch are scored
    together.

    The best thresholds form an interval between two logits, and its middle is returned. If several intervals are
    equally good, the widest is used. An interval that is unbounded on one side has no middle, for example if every
    pixel is foreground. The threshold is then 0 if the interval contains 0, and otherwise lies 1 beyond the bounded end
    (-inf if that end is so large that its dtype has no such number).

    Convention:
        - ``pred`` holds logits, not probabilities. ``target`` holds labels, 1 for the foreground and 0 for the
          background. By default, pixels with the label -100 are ignored.
        - The threshold is in logits. Pixels with ``pred > threshold`` are predicted as foreground.
        - The whole batch has one IoU. Images are not averaged.

    Args:
        pred: logits :math:`(B, 1, H, W)`, of any real dtype. Integers and bool are converted to float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        ignore_index: pixels with this label are excluded. None ignores no pixel.

    Returns:
        the threshold and its IoU, both scalars. The threshold has the dtype of a floating-point ``pred``, and otherwise
        float32, so ``pred > threshold`` has exactly this IoU. The IoU is in [0, 1]. It is float64 if ``pred`` is
        float64, and otherwise float32. Without foreground, the best prediction is empty and its IoU is 1. Without a
        valid pixel, the threshold is 0 and the IoU is 1. If the logit of a valid pixel is nan, both are nan.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if ``pred`` and ``target`` differ in batch size, image size or device, or if a label on the CPU is
            neither 0, 1 nor ``ignore_index``.

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
    return _middle(lower, upper, dtype).to(pred.device), iou.to(computed).to(pred.device)


class IoUThresholdSearch:
    r"""Search a grid of thresholds for the largest intersection over union (IoU) of a data set.

    Call ``search.update(logits, labels)`` for each batch of a validation set, then
    ``threshold, iou = search.compute()``.

    The result is that of :func:`~kornia.metrics.iou_at_thresholds` for all pixels of all batches together. Only counts
    are kept, so the data set may be larger than the memory, and several processes may share it.

    Convention:
        - ``update`` takes logits, not probabilities, and labels, 1 for the foreground and 0 for the background. By
          default, pixels with the label -100 are ignored.
        - Thresholds are in logits. Pixels with ``pred > threshold`` are predicted as foreground.
        - The whole data set has one IoU per threshold. Batches and images are not averaged.

    Args:
        thresholds: thresholds :math:`(T,)` in logits, in any order, of a floating-point dtype. None uses the 31
            probabilities 0.3, 0.313, ..., 0.7, as logits in float32.
        ignore_index: label of the pixels to exclude, or None.

    Attributes:
        thresholds: the thresholds :math:`(T,)`.
        counts: numbers of background and foreground pixels so far, int64 :math:`(2, 2 + T)`: all pixels, those with a
            nan logit, and those above each threshold. The counts of searches over the same thresholds can be added.
            They are on the device of the latest batch, or on that of ``thresholds`` before the first batch.

    Raises:
        ShapeError: if ``thresholds`` is not :math:`(T,)`.
        ValueError: if ``thresholds`` is empty, holds nan or has no floating-point dtype, or if ``ignore_index`` is
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
            ShapeError, ValueError: for the same reasons as :func:`~kornia.metrics.iou_at_thresholds`. The batch is then
                not counted.
        """
        check_pair(pred, target, "1")
        counts = _count_above(pred, target, self.ignore_index, self.thresholds.to(pred.device))
        self.counts = self.counts.to(pred.device) + counts

    def iou_at_thresholds(self, process_group: Optional[ProcessGroup] = None) -> Tensor:
        """Compute the IoU at each threshold.

        Args:
            process_group: processes whose counts are added. Each of them must call this method with the same
                thresholds. ``torch.distributed.group.WORLD`` is all processes. None uses the counts of this process.

        Returns:
            the IoU of ``pred > threshold`` at each of ``thresholds`` :math:`(T,)`, in their dtype, but at least
            float32. It is 1 where the union is empty. If a counted logit was nan, every IoU is nan.

        Raises:
            RuntimeError: if no valid pixel has been counted.
        """
        iou = self._iou(process_group)
        return iou.to(torch.promote_types(self.thresholds.dtype, torch.float32)).to(self.counts.device)

    def compute(self, process_group: Optional[ProcessGroup] = None) -> tuple[Tensor, Tensor]:
        """Find the best of the thresholds.

        If several are equally good, take the widest range of neighbours among them, and return the middle one (the
        larger of two). If this range reaches the smallest or the largest threshold, a better one may lie beyond it, and
        a warning says so.

        Args:
            process_group: processes whose counts are added, as for ``iou_at_thresholds``. None uses the counts of this
                process.

        Returns:
            the threshold, in logits, and its IoU, both scalars. If a counted logit was nan, both are nan. Apply the
            threshold as ``pred > threshold.view(1)``, because PyTorch would round a scalar to the dtype of ``pred``.

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
                    f"the best IoU is at the {end} of the thresholds, and a threshold beyond it may be better: search "
                    "a wider grid, such as IoUThresholdSearch(torch.linspace(0.01, 0.99, 99).logit())",
                    stacklevel=2,
                )
        best = best.to(torch.promote_types(threshold.dtype, torch.float32))
        return threshold.to(self.counts.device), best.to(self.counts.device)

    def _iou(self, process_group: Optional[ProcessGroup]) -> Tensor:
        counts = self.counts
        if process_group is not None:
            counts = counts.clone()
            torch.distributed.all_reduce(counts, group=process_group)
        if not counts[:, 0].any():
            raise RuntimeError("no valid pixel has been counted: call update first, with labels that are not ignored")
        return _iou(counts.to(device_with_float64(counts.device)), torch.float64)
