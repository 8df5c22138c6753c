# SPDX-License-Identifier: Apache-2.0
"""Communication between processes: the batches of a ``torch.distributed`` process group are scored as one batch.

Errors stay in their process. To count them in bins, the processes exchange first the range of each row, then the
counts, and finally their parts of the loss. Ranges and counts are exchanged as integers, so they are the same in every
process.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._lovasz_options import Options


def check_agreement(errors: Tensor, options: Options) -> None:
    """Raise in all processes unless they compute the same loss. On CUDA, do nothing: it would wait for the device.

    Args:
        errors: errors of the rows of this process ``(R, N)``.
        options: settings of the loss.
    """
    if errors.device.type != "cpu":
        return
    rows, dtype = errors.shape[0], str(errors.dtype).removeprefix("torch.")
    settings = (options.loss, rows, options.classes, options.num_bins, dtype)
    code = zlib.crc32(repr(settings).encode())
    codes = torch.tensor([code, -code], device="cpu")
    torch.distributed.all_reduce(codes, ReduceOp.MAX, group=options.process_group)
    if codes[0] != -codes[1]:
        raise ValueError(
            "all processes of process_group must call the same loss, with the same number of classes, classes, "
            f"per_image, num_bins and dtype. Here: {options.loss}, {rows} classes, classes={options.classes!r}, "
            f"num_bins={options.num_bins}, computed in {dtype}"
        )


def range_of_all(smallest: Tensor, largest: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the range of the errors of each row over all processes.

    Args:
        smallest: smallest error of the foreground in this process, float32 ``(R, 1)``.
        largest: largest error of the background in this process, float32 ``(R, 1)``.
        group: the processes.

    Returns:
        the smallest and the largest error, and whether this process owns the largest, bool ``(R,)``.
    """
    # Positive floats have the order of their bits. The lower bits hold the rank, so that one process wins a tie.
    own = (largest.view(torch.int32).to(torch.int64) << 32) + torch.distributed.get_rank(group)
    ends = torch.stack([own, -smallest.view(torch.int32).to(torch.int64)])
    torch.distributed.all_reduce(ends, ReduceOp.MAX, group=group)
    smallest, largest = (end.to(torch.int32).view(torch.float32) for end in (-ends[1], ends[0] >> 32))
    return smallest, largest, (own == ends[0]).squeeze(1)


class SumOfAll(torch.autograd.Function):
    """Sum over the processes of a group, the same in each process.

    The backward pass multiplies the gradient by the number of processes. When the gradients of the processes are
    averaged, as by DistributedDataParallel, the result is then the gradient of the sum.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        ctx.processes = torch.distributed.get_world_size(group)
        total = part.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.processes, None
