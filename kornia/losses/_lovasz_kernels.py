# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913, PLR0917, RUF059 - kernels take everything as arguments, and not all use every part of a tile
"""Triton kernels of the Lovász losses. ``_lovasz_cuda`` imports this module when it launches the first kernel.

Each program handles a *tile*: all classes of some pixels of one image. Every kernel recomputes the errors of its tile
from the logits, because reading logits is cheaper than writing errors and reading them back. A *row* is one class in
one group, and the *place* of a pixel is its index in the group.

Programs exchange data only through integer atomics in global memory. A sum of integers is the same in any order, so
every run gives the same result. No program waits for another: each kernel reads what earlier kernels have written.
"""

import triton
import triton.language as tl

# The largest finite float32.
_MAX_ERROR = tl.constexpr(3.4028234663852886e38)
# XOR with this number flips all bits of a positive int32 except its sign. This reverses the order of such integers, and
# of positive floats, which have the order of their bits. An atomic maximum then finds a minimum.
_FLIP = tl.constexpr(0x7FFFFFFF)


# ---------------------------------------------------------------------------------------------------------------------
# Parts of kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _read_labels(labels, num_classes, ignore, LOSS: tl.constexpr, IGNORES: tl.constexpr):
    """Return the class of each label, whether it is not ignored, and whether it is wrong: not ignored and no class."""
    limit = num_classes if LOSS == "softmax" else 2
    if labels.dtype.is_floating():
        # Old GPUs cannot compare half-precision numbers.
        values = labels if labels.dtype == tl.float64 else labels.to(tl.float32)
        known = (values == tl.floor(values)) & (values >= 0) & (values < limit)
    else:
        # Use int64, because an ignore_index outside the range of a narrower dtype would wrap around to a class.
        values = labels.to(tl.int64)
        known = (values >= 0) & (values < limit)
    valid = values != ignore if IGNORES else known | ~known  # all True if nothing is ignored
    return values.to(tl.int32), valid, valid & ~known


@triton.jit
def _read_tile(
    pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel, ignore,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the errors ``(BLOCK_C, BLOCK_N)`` of a tile.

    Returns:
        the image, the classes and the pixels of the tile; the row of each class and the place of each pixel; masks of
        the scored errors and of the foreground; masks of the valid pixels and of those with a wrong label; the errors;
        the keys by which they are sorted (errors, or margins); and their slopes (probabilities, or signs).
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    row = (c + (b * num_classes if PER_IMAGE else 0)).to(tl.int64)
    place = (n + (0 if PER_IMAGE else b * pixels)).to(tl.int32)
    if WIDE:  # an image may have more than 2^31 elements
        n, c = n.to(tl.int64), c.to(tl.int64)
    inside = n < pixels
    labels = tl.load(target + b * target_image + n * target_pixel, mask=inside, other=0)
    label, valid, wrong = _read_labels(labels, num_classes, ignore, LOSS, IGNORES)
    valid, wrong = valid & inside, wrong & inside
    is_class = (c < num_classes)[:, None]
    scored = is_class & valid[None, :]
    offsets = (c * pred_class)[:, None] + (n * pred_pixel)[None, :]
    # Logits of ignored pixels may be anything, even nan. They are loaded anyway, so that no load waits for the labels.
    logits = tl.load(pred + b * pred_image + offsets, mask=is_class & inside[None, :], other=0.0).to(tl.float32)
    logits = tl.where(scored, logits, 0.0)
    if LOSS == "softmax":
        logits = tl.where(is_class, logits, float("-inf"))
        exponentials = tl.exp(logits - tl.max(logits, 0)[None, :])
        slopes = exponentials / tl.sum(exponentials, 0)[None, :]
        foreground = scored & (c[:, None] == label[None, :])
        # The sum of the other probabilities, because 1 - p would round to 0.
        others = tl.sum(tl.where(foreground, 0.0, slopes), 0)
        errors = tl.where(foreground, others[None, :], slopes)
        ranked = errors
    else:
        foreground = scored & (label == 1)[None, :]
        slopes = tl.where(foreground, -1.0, 1.0)
        ranked = slopes * logits
        if LOSS == "hinge":
            errors = 1.0 + ranked
            errors = tl.where(errors < 0.0, 0.0, errors)  # tl.maximum would lose nan
        else:
            errors = 1.0 / (1.0 + tl.exp(-ranked))
    return b, c, n, row, place, scored, foreground, valid, wrong, errors, ranked, slopes


@triton.jit
def _slots_of(errors, smallest, scale, FIRST: tl.constexpr, WITHIN: tl.constexpr, LAST: tl.constexpr):
    """Compute the slots of errors like :func:`._lovasz_bins.slots_at`. A GPU may flush subnormal positions to 0."""
    bits = ((errors - smallest) * scale).to(tl.int32, bitcast=True)
    bits = tl.minimum(tl.maximum(bits, 0), LAST)
    return tl.ceil(bits.to(tl.float32, bitcast=True)).to(tl.int32) + (tl.maximum(bits - FIRST, 0) >> WITHIN)


# ---------------------------------------------------------------------------------------------------------------------
# Ranking by bins: the range of the errors, the counts, the weights
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def range_kernel(
    smallest, largest,
    pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel, ignore,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Find the range of the errors of each row. The outputs must hold zeros.

    ``smallest``, int64, receives the flipped bits of the smallest foreground error, and stays 0 without foreground.
    ``largest``, int64, receives the bits of the largest background error in its upper half and its flipped place in its
    lower half, so that the first of equal errors wins.
    """
    b, c, n, row, place, scored, foreground, valid, wrong, errors, ranked, slopes = _read_tile(
        pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel,
        ignore, LOSS, IGNORES, PER_IMAGE, WIDE, BLOCK_C, BLOCK_N,
    )  # fmt: skip
    bits = tl.minimum(errors, _MAX_ERROR).to(tl.int32, bitcast=True)
    below = tl.max(tl.where(foreground, bits ^ _FLIP, 0), 1)
    # One atomic operation per class and tile. A maximum is the same in any order, so relaxed semantics suffice.
    tl.atomic_max(smallest + row, below.to(tl.int64), mask=(c < num_classes) & (below > 0), sem="relaxed")
    background = scored & ~foreground
    most = tl.max(tl.where(background, bits, -1), 1)
    first = tl.min(tl.where(background & (bits == most[:, None]), place[None, :], _FLIP), 1)
    key = (most.to(tl.int64) << 32) + (first ^ _FLIP)
    tl.atomic_max(largest + row, key, mask=(c < num_classes) & (most >= 0), sem="relaxed")


@triton.jit
def edges_kernel(
    smallest, largest, own_largest, edges, places, rows, num_bins, MIN_WIDTH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the lower end of the bins of each row, and the bins per unit of error: ``edges``, float32 ``(2, rows)``.

    ``places``, int32 ``(rows,)``, receives the place of the largest background error, or -1 if another process owns it.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    low = (tl.load(smallest + row, mask=inside, other=0) ^ _FLIP).to(tl.int32).to(tl.float32, bitcast=True)
    high = (tl.load(largest + row, mask=inside, other=0) >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    # Without foreground, the flipped bits are nan, which the minimum replaces by the largest number.
    low, high = tl.minimum(low, _MAX_ERROR) * (1 - 2.0**-20), tl.minimum(high * (1 + 2.0**-20), _MAX_ERROR)
    width = tl.maximum(high - low, MIN_WIDTH)
    tl.store(edges + row, low, mask=inside)
    tl.store(edges + rows + row, tl.div_rn(num_bins + 0.5, width), mask=inside)
    own = tl.load(own_largest + row, mask=inside, other=0)
    tl.store(places + row, tl.where(own > 0, (own & _FLIP) ^ _FLIP, -1).to(tl.int32), mask=inside)


@triton.jit
def count_kernel(
    edges, counts, rows, slots,
    pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel, ignore,
    FIRST: tl.constexpr, WITHIN: tl.constexpr, LAST: tl.constexpr,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Count the errors in ``counts`` ``(rows, 2, slots)``: background pixels in each slot, then foreground pixels."""
    b, c, n, row, place, scored, foreground, valid, wrong, errors, ranked, slopes = _read_tile(
        pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel,
        ignore, LOSS, IGNORES, PER_IMAGE, WIDE, BLOCK_C, BLOCK_N,
    )  # fmt: skip
    low = tl.load(edges + row, mask=c < num_classes, other=0.0)[:, None]
    scale = tl.load(edges + rows + row, mask=c < num_classes, other=0.0)[:, None]
    slot = _slots_of(errors, low, scale, FIRST, WITHIN, LAST)
    at = (row * 2 * slots)[:, None] + tl.where(foreground, slot + slots, slot)
    # The background in the first slot has weight 0, and no other weight depends on its count. Once a network is right,
    # this slot holds most pixels. It is not counted, so that atomics don't contend for one address.
    counted = foreground | (scored & (slot > 0))
    tl.atomic_add(counts + at, tl.full(at.shape, 1, counts.dtype.element_ty), mask=counted, sem="relaxed")


@triton.jit
def weights_kernel(counts, weights, totals, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the weights of the slots of a row like :func:`._lovasz_bins.weights_of_slots`, one program per row.

    The program keeps running sums, from the slot of the largest errors down.
    """
    row = tl.program_id(0).to(tl.int64)
    backgrounds, foregrounds = row * 2 * SLOTS, row * 2 * SLOTS + SLOTS
    total = tl.zeros([], tl.int64)
    for start in range(0, SLOTS, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(counts + foregrounds + slot, mask=slot < SLOTS, other=0).to(tl.int64), 0)
    tl.store(totals + row, total)
    above, passed = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for start in range(0, SLOTS, BLOCK):
        slot = SLOTS - 1 - start - tl.arange(0, BLOCK)
        background = tl.load(counts + backgrounds + slot, mask=slot >= 0, other=0).to(tl.int64)
        foreground = tl.load(counts + foregrounds + slot, mask=slot >= 0, other=0).to(tl.int64)
        # The unions before and after the background of the slot is passed, and twice the mean of the foreground that is
        # not passed before and after the slot.
        first = tl.maximum(total + above + tl.cumsum(background, 0) - background, 1)
        last = first + background
        missed = 2 * (total - passed - tl.cumsum(foreground, 0)) + foreground
        divisor, last_union = (2 * first).to(tl.float32), last.to(tl.float32)
        of_background = tl.div_rn(tl.div_rn(missed.to(tl.float32), divisor), last_union)
        of_foreground = tl.div_rn(tl.div_rn((first + last).to(tl.float32), divisor), last_union)
        tl.store(weights + backgrounds + slot, of_background, mask=slot >= 0)
        tl.store(weights + foregrounds + slot, of_foreground, mask=slot >= 0)
        above += tl.sum(background, 0)
        passed += tl.sum(foreground, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Ranking by sorting: the sort keys, the background counts, the weights
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def keys_kernel(
    keys, length,
    pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel, ignore,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the sort keys of each row ``(rows, length)``: errors or margins, and -inf for ignored pixels."""
    b, c, n, row, place, scored, foreground, valid, wrong, errors, ranked, slopes = _read_tile(
        pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel,
        ignore, LOSS, IGNORES, PER_IMAGE, WIDE, BLOCK_C, BLOCK_N,
    )  # fmt: skip
    at = (row * length)[:, None] + place[None, :]
    inside = (c < num_classes)[:, None] & (n < pixels)[None, :]
    tl.store(keys + at, tl.where(scored, ranked, float("-inf")), mask=inside)


@triton.jit
def backgrounds_kernel(
    order, is_background, backgrounds, first_row, length, blocks,
    target, num_classes, pixels, target_image, target_pixel, ignore,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mark the background in the sorted order of some rows, bytes ``(R, length)``, and count it in each block.

    ``order`` holds the sorted places of the rows from ``first_row`` on, int64 ``(R, length)``.
    """
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = position < length
    place = tl.load(order + row * length + position, mask=inside, other=0)
    c = ((first_row + row) % num_classes).to(tl.int32)
    if PER_IMAGE:
        at = (first_row + row) // num_classes * target_image + place * target_pixel
    else:
        at = place // pixels * target_image + place % pixels * target_pixel
    labels = tl.load(target + at, mask=inside, other=0)
    label, valid, wrong = _read_labels(labels, num_classes, ignore, LOSS, IGNORES)
    background = inside & ~(valid & (label == (c if LOSS == "softmax" else 1)))
    tl.store(is_background + row * length + position, background.to(tl.uint8), mask=inside)
    tl.store(backgrounds + program, tl.sum(background.to(tl.int32), 0))


@triton.jit
def ranks_kernel(
    order, is_background, backgrounds, weights, totals, first_row, length, blocks, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute the weights like :func:`._lovasz.jaccard_weights`, and write them to the places of the pixels.

    ``backgrounds`` holds the number of background pixels in each block and the blocks before it in the row.
    """
    program = tl.program_id(0).to(tl.int64)
    row, block = program // blocks, program % blocks
    passed = tl.load(backgrounds + program - 1, mask=block > 0, other=0)
    every = tl.load(backgrounds + (row + 1) * blocks - 1)
    total = length - every
    tl.store(totals + first_row + row, total.to(tl.int64), mask=block == 0)
    position = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = position < length
    place = tl.load(order + row * length + position, mask=inside, other=0)
    background = tl.load(is_background + row * length + position, mask=inside, other=0).to(tl.int32)
    union = total + passed + tl.cumsum(background, 0)
    previous = tl.maximum(union, 2) - 1
    weight = (previous - background * position).to(tl.float32) / previous.to(tl.float32) / union.to(tl.float32)
    tl.store(weights + (first_row + row) * length + place, weight, mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Applying the weights
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _class_factors(
    c, row, num_classes, totals, class_weights, divisor, num_averaged,
    AVERAGED: tl.constexpr, NUM_CLASSES: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Compute the factors of the classes of a tile, like :func:`._lovasz.class_factors`.

    ``AVERAGED`` is "all", "present", or a number whose bits say which of ``NUM_CLASSES`` classes are averaged.
    """
    averaged = c < num_classes
    count = num_averaged
    if AVERAGED == "present":
        averaged = averaged & (tl.load(totals + row, mask=averaged, other=0) > 0)
        count = tl.maximum(tl.sum(averaged.to(tl.int32), 0), 1)
    elif AVERAGED != "all":
        chosen = c < 0
        for i in tl.static_range(NUM_CLASSES):
            if (AVERAGED >> i) & 1:
                chosen = chosen | (c == i)
        averaged = averaged & chosen
    factors = tl.where(averaged, 1.0 / (count * divisor), 0.0)
    if WEIGHTED:
        factors = tl.where(averaged, factors * tl.load(class_weights + c, mask=averaged, other=0.0).to(tl.float32), 0.0)
    return factors


@triton.jit
def apply_kernel(
    weights, totals, edges, places, rows, slots, length, losses,
    gradient, gradient_image, gradient_class, gradient_pixel, grad_loss, grad_loss_image,
    class_weights, divisor, num_averaged,
    pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel, ignore,
    BINS: tl.constexpr, FIRST: tl.constexpr, WITHIN: tl.constexpr, LAST: tl.constexpr,
    AVERAGED: tl.constexpr, NUM_CLASSES: tl.constexpr, WEIGHTED: tl.constexpr, GRADIENT: tl.constexpr,
    LOSS: tl.constexpr, IGNORES: tl.constexpr, PER_IMAGE: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the loss of each tile or, with ``GRADIENT``, its gradient times the gradient of the loss of its group.

    The weights are those of slots ``(rows, 2, slots)`` with ``BINS``, and otherwise those of places ``(rows, length)``.
    """
    b, c, n, row, place, scored, foreground, valid, wrong, errors, ranked, slopes = _read_tile(
        pred, target, num_classes, pixels, tiles, pred_image, pred_class, pred_pixel, target_image, target_pixel,
        ignore, LOSS, IGNORES, PER_IMAGE, WIDE, BLOCK_C, BLOCK_N,
    )  # fmt: skip
    is_class = c < num_classes
    if BINS:
        low = tl.load(edges + row, mask=is_class, other=0.0)[:, None]
        scale = tl.load(edges + rows + row, mask=is_class, other=0.0)[:, None]
        slot = _slots_of(errors, low, scale, FIRST, WITHIN, LAST)
        at = (row * 2 * slots)[:, None] + tl.where(foreground, slot + slots, slot)
        weight = tl.load(weights + at, mask=scored, other=0.0)
        # In an absent class, only the largest error has a weight.
        total = tl.load(totals + row, mask=is_class, other=1)
        largest = tl.where(total == 0, tl.load(places + row, mask=is_class, other=-1), -1)
        weight = tl.where(scored & (largest[:, None] == place[None, :]), 1.0, weight)
    else:
        at = (row * length)[:, None] + place[None, :]
        weight = tl.load(weights + at, mask=scored, other=0.0)
    if LOSS == "softmax":
        factors = _class_factors(
            c, row, num_classes, totals, class_weights, divisor, num_averaged, AVERAGED, NUM_CLASSES, WEIGHTED
        )
        weight = weight * factors[:, None]
        # The foreground weight of a pixel is applied to its other probabilities, see _lovasz_dense._softmax.
        lift = tl.sum(tl.where(foreground, weight, 0.0), 0)
        weight = tl.where(foreground | ~scored, 0.0, weight + lift[None, :])
        loss = tl.where(valid, tl.sum(slopes * weight, 0), 0.0)
        slope = slopes * (weight - loss[None, :])
    else:
        weight = weight * (1.0 / divisor)
        # A weight of 0 times an infinite error would be nan.
        share = tl.where((weight == 0.0) & (errors == float("inf")), 0.0, weight * errors)
        loss = tl.sum(tl.where(scored, share, 0.0), 0)
        if LOSS == "hinge":
            slope = tl.where(errors <= 0.0, 0.0, slopes * weight)
        else:
            slope = slopes * weight * errors * (1.0 - errors)
    # Raising an error would wait for the device, so a wrong label makes the result nan instead.
    nan = float("nan")
    if GRADIENT:
        factor = tl.load(grad_loss + b * grad_loss_image).to(tl.float32)
        slope = tl.where(scored, slope * factor, 0.0)
        slope = tl.where(wrong[None, :], nan, slope)
        at = b * gradient_image + (c * gradient_class)[:, None] + (n * gradient_pixel)[None, :]
        inside = is_class[:, None] & (n < pixels)[None, :]
        tl.store(gradient + at, slope.to(gradient.dtype.element_ty), mask=inside)
    else:
        tl.store(losses + tl.program_id(0), tl.sum(tl.where(wrong, nan, loss), 0))
