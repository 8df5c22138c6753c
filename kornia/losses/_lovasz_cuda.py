# SPDX-License-Identifier: Apache-2.0
"""The losses on CUDA by fused kernels, exact or with bins: few passes over the logits, and no wait for the device.

==================  =====================================================================================
``num_bins=K``      find the range of the errors, count them in bins, compute the weights of the bins
exact               write the errors, sort them with PyTorch, compute the weights of the pixels
==================  =====================================================================================

Another kernel then computes the loss, and in the backward pass the gradient, in the dtype of the logits, from the
weights that the forward pass has kept. Storing the gradient in the forward pass and scaling it later would take longer.
Half-precision logits and strided logits are read without a copy.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ._lovasz_bins import MIN_WIDTH, count_slots, layout
from ._lovasz_group import check_agreement, range_of_all
from ._lovasz_options import Options
from ._tuning import tuning

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Number of logits in a tile: as many as a program with eight warps can hold in registers.
_TILE = 1 << 12
# Tiles are made smaller to reach this many programs: a GPU has up to 148 multiprocessors, and each runs several.
_MIN_PROGRAMS = 1 << 9
# More classes would not fit into a tile.
_MAX_CLASSES = 1 << 11
_FLIP = 0x7FFFFFFF  # as in _lovasz_kernels
_LABELS = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
)


class Ranking(NamedTuple):
    """Values that the forward pass keeps for the gradient."""

    weights: Tensor  # of slots (rows, 2, slots) or of pixels (rows, length), float32
    totals: Tensor  # the foreground size of each row, int64
    edges: Optional[Tensor] = None  # lower end of the bins of each row, and number of bins per unit of error
    places: Optional[Tensor] = None  # place of the largest background error of each row, int32


def can_compute(pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options) -> bool:
    """Whether the kernels run on the device of ``pred`` and support these inputs. Otherwise, use the dense form."""
    batch, num_classes, pixels = len(target), pred.shape[1], target[:1].numel()
    rows, length = (batch * num_classes, pixels) if options.per_image else (num_classes, batch * pixels)
    slots = 0 if options.num_bins is None else count_slots(options.num_bins)
    return (
        pred.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and target.dtype in _LABELS
        and options.dtype_of(pred, weight) == torch.float32
        and num_classes <= _MAX_CLASSES
        and 0 < length < 2**31 - 1
        and rows * length > 0
        # The tables of many small images would take too much memory. The dense form counts such images in parts.
        and rows * 2 * slots <= 4 * rows * length + (1 << 24)
        and are_kernels_available(pred.device)
        and (pred.dtype != torch.bfloat16 or pred.device.type == "cpu" or _capability(pred.device) >= (8, 0))
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def are_kernels_available(device: torch.device) -> bool:
    """Whether the kernels run on a device. Warn once if they should run there but cannot."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and device not in reasons:
        return False  # this check cannot be captured, so the warm-up before the capture has to run it
    if device.type != "cuda" and not (device.type == "cpu" and is_interpreted()):
        return False
    if device not in reasons:
        reasons[device] = _why_not(device)
        if reasons[device] is not None:
            message = f"the Lovász losses are computed without fused kernels on {device}: {reasons[device]}"
            warnings.warn(message, stacklevel=2)
    return reasons[device] is None


# For each device, the reason why the kernels do not run on it, or None if they do.
reasons: dict[torch.device, Optional[str]] = {}


def _why_not(device: torch.device) -> Optional[str]:
    if device.type == "cuda" and torch.version.hip is not None:
        return "the kernels are compiled for NVIDIA GPUs only"
    if device.type == "cuda" and _capability(device) < (7, 5):
        return f"{torch.cuda.get_device_name(device)} has a compute capability below 7.5"
    try:
        # If something is missing, such as Triton or a C compiler, the first launch of a kernel fails.
        _edges([torch.zeros(1, dtype=torch.int64, device=device)] * 3, 1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever fails, the dense form works
        return f"{type(error).__name__}: {error}"
    return None


def loss_and_ranking(
    pred: Tensor, target: Tensor, weight: Optional[Tensor], options: Options
) -> tuple[Tensor, Ranking]:
    """Compute the reduced loss of logits ``(B, C, H, W)``, float32, and the ranking that :func:`gradient` needs."""
    tiles = _Tiles(pred, target, options)
    rank = _ranked_by_sorting if options.num_bins is None else _ranked_by_bins
    ranking = rank(tiles, options)
    losses = torch.empty(tiles.programs, dtype=torch.float32, device=pred.device)
    _apply(tiles, weight, options, ranking, losses=losses)
    if options.reduction != "none":
        return losses.sum(), ranking
    return (losses.view(len(target), -1).sum(1) if options.per_image else losses.sum().view(1)), ranking


def gradient(
    pred: Tensor,
    target: Tensor,
    weight: Optional[Tensor],
    options: Options,
    ranking: Ranking,
    grad_loss: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Compute the gradient ``(B, C, N)`` from the ranking, times the gradient of the reduced loss."""
    tiles = _Tiles(pred, target, options)
    result = torch.empty_like(tiles.logits, dtype=dtype)
    _apply(tiles, weight, options, ranking, gradient=result, grad_loss=grad_loss)
    return result


class _Tiles:
    """Logits and labels, divided into one tile for each program."""

    def __init__(self, pred: Tensor, target: Tensor, options: Options) -> None:
        batch, pixels = len(target), target[0].numel()
        # A kernel reads memory only. It does not see the negative bit, which PyTorch sets on some views.
        self.logits = pred.resolve_neg().flatten(2).expand(batch, -1, -1)
        self.labels = (target.view(torch.uint8) if target.dtype == torch.bool else target).flatten(1)
        self.num_classes = self.logits.shape[1]
        self.rows, self.length = batch * self.num_classes, pixels
        if not options.per_image:
            self.rows, self.length = self.num_classes, batch * pixels
        block_c, block_n = _size_of_tile(batch, self.num_classes, pixels)
        tiles = -(-pixels // block_n)
        self.programs = batch * tiles
        self.of_labels = {
            "num_classes": self.num_classes,
            "pixels": pixels,
            "target_image": self.labels.stride(0),
            "target_pixel": self.labels.stride(1),
            "ignore": 0 if options.ignore_index is None else options.ignore_index,
            "LOSS": options.loss,
            "IGNORES": options.ignore_index is not None,
            "PER_IMAGE": options.per_image,
        }
        extents = [sum((n - 1) * s for n, s in zip(x.shape[1:], x.stride()[1:])) for x in (self.logits, self.labels)]
        image, of_class, pixel = self.logits.stride()
        self.arguments = {
            **self.of_labels,
            "pred": self.logits,
            "target": self.labels,
            "tiles": tiles,
            "pred_image": image,
            "pred_class": of_class,
            "pred_pixel": pixel,
            "WIDE": max(*extents, self.num_classes * pixels) + block_c * block_n >= 2**31,
            "BLOCK_C": block_c,
            "BLOCK_N": block_n,
            "num_warps": max(1, min(16, block_c * block_n // 512)),
        }


def _size_of_tile(batch: int, num_classes: int, pixels: int) -> tuple[int, int]:
    """Return the numbers of classes and pixels of a tile, both powers of 2. A tile has all classes.

    At least four neighbouring pixels are read together. Small batches get smaller tiles, so that more programs run.
    """
    block_c = 1 << (num_classes - 1).bit_length()
    block_n = max(_TILE // block_c, 4 if block_c > 1024 else 8)
    while block_c * block_n > _TILE // 4 and block_n > 64 and batch * -(-pixels // block_n) < _MIN_PROGRAMS:
        block_n //= 2
    return block_c, block_n


def launch(name: str, programs: int, device: torch.device, *args: Any, **kwargs: Any) -> None:
    """Launch a kernel by its name. Triton is imported here because it may be missing."""
    from . import _lovasz_kernels

    with torch.cuda.device(device if device.type == "cuda" else -1):
        getattr(_lovasz_kernels, name)[(programs,)](*args, **kwargs)


def layout_of(num_bins: int) -> dict[str, int]:
    """Return the layout of the bins as arguments of the kernels."""
    return dict(zip(("FIRST", "WITHIN", "LAST"), layout(num_bins)))


def _edges(ends: Sequence[Tensor], num_bins: int) -> tuple[Tensor, Tensor]:
    """Return for each row the lower end of the bins and the bins per unit of error, and the place of the largest error.

    ``ends`` are three int64 tensors ``(rows,)``: the range of the errors as ``range_kernel`` writes it, and once more
    the largest error, or 0 in a row whose largest error another process owns.
    """
    rows, block, device = len(ends[0]), 128, ends[0].device
    edges = torch.empty((2, rows), dtype=torch.float32, device=device)
    places = torch.empty(rows, dtype=torch.int32, device=device)
    shared = {"MIN_WIDTH": MIN_WIDTH, "BLOCK": block}
    launch("edges_kernel", -(-rows // block), device, *ends, edges, places, rows, num_bins, **shared)
    return edges, places


def _ends_of_all(ends: Tensor, options: Options, group: ProcessGroup) -> tuple[Tensor, ...]:
    """Return the smallest and largest errors over all processes, and the largest where this process owns it."""
    smallest = (ends[0] ^ _FLIP).to(torch.int32).view(torch.float32).unsqueeze(1)
    largest = (ends[1] >> 32).to(torch.int32).view(torch.float32).unsqueeze(1)
    check_agreement(smallest, options)
    smallest, largest, is_owner = range_of_all(smallest, largest, group)
    first, last = (end.squeeze(1).view(torch.int32).long() for end in (smallest, largest))
    return first ^ _FLIP, last << 32, ends[1].where(is_owner, 0)


def _ranked_by_bins(tiles: _Tiles, options: Options) -> Ranking:
    num_bins, group, device = options.num_bins or 1, options.process_group, tiles.logits.device
    rows, slots = tiles.rows, count_slots(num_bins)
    # A single allocation, so that one launch clears it. The counts of one process fit into 32 bits.
    scratch = torch.zeros(rows * (2 + slots * (1 if group is None else 2)), dtype=torch.int64, device=device)
    ends, counts = scratch[: 2 * rows].view(2, rows), scratch[2 * rows :]
    if group is None:
        counts = counts.view(torch.int32)
    launch("range_kernel", tiles.programs, device, *ends, **tiles.arguments)
    ends = (*ends, ends[1]) if group is None else _ends_of_all(ends, options, group)
    edges, places = _edges(ends, num_bins)
    launch("count_kernel", tiles.programs, device, edges, counts, rows, slots, **layout_of(num_bins), **tiles.arguments)
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
    weights = torch.empty((rows, 2, slots), dtype=torch.float32, device=device)
    totals = torch.empty(rows, dtype=torch.int64, device=device)
    launch("weights_kernel", rows, device, counts, weights, totals, SLOTS=slots, BLOCK=1024, num_warps=4)
    return Ranking(weights, totals, edges, places)


def _ranked_by_sorting(tiles: _Tiles, _: Options) -> Ranking:
    device, length = tiles.logits.device, tiles.length
    keys = torch.empty((tiles.rows, length), dtype=torch.float32, device=device)
    launch("keys_kernel", tiles.programs, device, keys, length, **tiles.arguments)
    weights, totals = torch.empty_like(keys), torch.empty(tiles.rows, dtype=torch.int64, device=device)
    block = tuning.ranked_by_program
    blocks, step = -(-length // block), max(1, tuning.sorted_at_once // length)
    for first_row in range(0, tiles.rows, step):
        order = keys[first_row : first_row + step].argsort(dim=1, descending=True, stable=True)
        programs = len(order) * blocks
        is_background = torch.empty(order.shape, dtype=torch.uint8, device=device)
        backgrounds = torch.empty(programs, dtype=torch.int32, device=device)
        shared = (first_row, length, blocks)
        launch(
            "backgrounds_kernel", programs, device, order, is_background, backgrounds, *shared, tiles.labels,
            **tiles.of_labels, BLOCK=block,
        )  # fmt: skip
        backgrounds = backgrounds.view(-1, blocks).cumsum(1, dtype=torch.int32)
        ranked = (order, is_background, backgrounds, weights, totals)
        launch("ranks_kernel", programs, device, *ranked, *shared, BLOCK=block)
    return Ranking(weights, totals)


def _apply(
    tiles: _Tiles,
    weight: Optional[Tensor],
    options: Options,
    ranking: Ranking,
    losses: Optional[Tensor] = None,
    gradient: Optional[Tensor] = None,
    grad_loss: Optional[Tensor] = None,
) -> None:
    """Write the loss of each tile to ``losses``, or the gradient to ``gradient``."""
    num_bins, weights = options.num_bins, ranking.weights
    classes, num_classes = options.classes or "all", tiles.num_classes
    is_list = not isinstance(classes, str)
    gradient_image, gradient_class, gradient_pixel = (0, 0, 0) if gradient is None else gradient.stride()
    is_one = grad_loss is None or grad_loss.ndim == 0 or not options.per_image
    arguments = {
        "rows": tiles.rows,
        "slots": 0 if num_bins is None else weights.shape[2],
        "length": tiles.length,
        "losses": losses,
        "gradient": gradient,
        "gradient_image": gradient_image,
        "gradient_class": gradient_class,
        "gradient_pixel": gradient_pixel,
        "grad_loss": None if grad_loss is None else grad_loss.resolve_neg(),
        "grad_loss_image": 0 if is_one else grad_loss.stride(0),
        "class_weights": None if weight is None else weight.resolve_neg().contiguous(),
        "divisor": options.divisor(len(tiles.labels)),
        "num_averaged": len(classes) if is_list else num_classes,
        "BINS": num_bins is not None,
        # A kernel cannot take a list, so the bits of an integer mark the classes to average.
        "AVERAGED": sum(1 << c for c in classes) if is_list else classes,
        "NUM_CLASSES": num_classes if is_list else 1,
        "WEIGHTED": weight is not None,
        "GRADIENT": gradient is not None,
        **layout_of(num_bins or 1),
        **tiles.arguments,
    }
    launch("apply_kernel", tiles.programs, weights.device, *ranking, **arguments)
