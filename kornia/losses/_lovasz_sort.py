# SPDX-License-Identifier: Apache-2.0
"""Computes the weights of the Lovász extension by sorting the errors of each row: one class in one group."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ._eager import is_eager
from ._lovasz import jaccard_weights
from ._tuning import tuning

# PyTorch uses radix sort for vectors of integers of at least this length, and sorts shorter ones by comparison. Padding
# a vector to this length is faster if it has at least a fifth of it.
_MIN_RADIX_LENGTH = 1 << 15


def sorted_weights(errors: Tensor, foreground: Tensor) -> Tensor:
    """Compute the weights of rows of errors ``(R, N)``, or of margins, which have the same order.

    Ignored pixels must be background with an error below every valid one. They then rank last, where the weight of a
    background pixel is 0, unless there is no valid pixel at all. The foreground is bool or bytes.
    """
    length = errors.shape[1]
    if is_eager(errors) and errors.numel() > max(tuning.sorted_at_once, length):
        step = max(1, tuning.sorted_at_once // length)
        return torch.cat([sorted_weights(*part) for part in zip(errors.split(step), foreground.split(step))])
    if is_eager(errors) and errors.device.type == "cpu" and errors.numel() > _MIN_RADIX_LENGTH // 2:
        return weights_of_rows(errors, foreground, order_of_rows(errors))
    return weights_of_rows(errors, foreground, errors.argsort(dim=1, descending=True, stable=True))


def order_of_rows(errors: Tensor) -> Tensor:
    """Return the stable order of each row ``(R, N)`` on the CPU, from the largest error to the smallest."""
    if len(errors) == 1:
        return descending_order(errors).view(errors.shape)
    rows = torch.arange(len(errors), device="cpu").unsqueeze(1)
    return descending_order(errors, rows, len(errors)).view(errors.shape).sub_(rows * errors.shape[1])


def weights_of_rows(errors: Tensor, foreground: Tensor, order: Tensor) -> Tensor:
    """Compute the weights of rows of errors ``(R, N)``, given the order of each row, largest error first."""
    length = errors.shape[1]
    counts = torch.int32 if errors.numel() < 2**31 else torch.int64
    background = foreground.gather(1, order).logical_not().to(counts)
    # On CUDA, one cumulative sum over all rows is faster than one per row. The next line subtracts the earlier rows.
    union = background.flatten().cumsum(0, dtype=counts).view_as(background)
    union += length - union[:, -1:]
    position = torch.arange(length, dtype=counts, device=errors.device)
    return errors.scatter(1, order, jaccard_weights(background, position, union, errors.dtype))


def weights_of_segments(
    errors: Tensor, foreground: Tensor, lengths: Tensor, unions: Tensor, positions: Tensor
) -> Tensor:
    """Compute the weights of errors on the CPU, in segments of any length that follow each other in a vector.

    Args:
        errors: ``(M,)``, float32 or float64, without nan.
        foreground: bytes ``(M,)``.
        lengths: lengths of the segments, int64 ``(S,)``.
        unions: for each segment, the foreground size of its row plus the number of background pixels of that row
            whose errors are larger than those of the segment.
        positions: for each segment, the number of pixels of its row whose errors are larger.
    """
    limit = int(unions.max()) + int(positions.max()) + len(errors)
    counts = torch.int32 if limit < 2**31 else torch.int64
    segments = torch.repeat_interleave(lengths) if len(lengths) > 1 else None

    def per_error(values: Tensor) -> Tensor:
        """Expand one value per segment to one per error."""
        values = values.to(counts)
        return values if segments is None else values.index_select(0, segments)

    order = descending_order(errors, segments, len(lengths))
    background = foreground.index_select(0, order).logical_not().to(counts)
    union = background.cumsum(0, dtype=counts)
    starts = lengths.cumsum(0) - lengths
    passed = torch.cat([union.new_zeros(1), union]).index_select(0, starts)
    union += per_error(unions - passed)
    position = torch.arange(len(errors), dtype=counts, device="cpu") + per_error(positions - starts)
    return torch.empty_like(errors).scatter_(0, order, jaccard_weights(background, position, union, errors.dtype))


def descending_order(errors: Tensor, segments: Optional[Tensor] = None, count: int = 1) -> Tensor:
    """Return the stable order of errors on the CPU: by segment, and from the largest error to the smallest in each.

    PyTorch uses radix sort for a vector of integers, which is ten times as fast as sorting floating-point numbers.

    Args:
        errors: float32 or float64, of any shape, without nan.
        segments: index of the segment of each error, int64, in a shape that expands to that of the errors. None if
            there is only one segment.
        count: number of segments.
    """
    if errors.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device="cpu")
    # Read as integers, floats keep their order once the bits below the sign of negative ones are inverted. Inverting
    # all bits afterwards reverses the order.
    bits = errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)
    largest = torch.iinfo(bits.dtype).max
    keys = (bits >> (8 * bits.element_size() - 1)).bitwise_and_(largest).bitwise_xor_(bits).bitwise_not_()
    low, high = (int(key) for key in torch.aminmax(keys))
    width = (high - low).bit_length()
    if count << width <= largest:
        # The segment fits above the bits of the error. Smaller keys have fewer digits to sort by.
        keys.sub_(low)
        return _order_of_integers(keys if segments is None else keys.add_(segments.to(keys.dtype) << width))
    order = _order_of_integers(keys)
    if segments is None:
        return order
    # Sort by segment in a second, stable pass, which takes one or two digits. In wider keys, the segment would take
    # four.
    segments = segments.to(torch.uint8 if count <= 256 else torch.int32).expand(keys.shape).flatten()
    return order.index_select(0, _order_of_integers(segments.index_select(0, order)))


def _order_of_integers(keys: Tensor) -> Tensor:
    """Return the stable ascending order of integers, flattened to one vector."""
    keys, count = keys.flatten(), keys.numel()
    if _MIN_RADIX_LENGTH // 5 < count < _MIN_RADIX_LENGTH:
        keys = torch.cat([keys, keys.new_full((_MIN_RADIX_LENGTH - count,), torch.iinfo(keys.dtype).max)])
    return keys.sort(stable=True).indices[:count]
