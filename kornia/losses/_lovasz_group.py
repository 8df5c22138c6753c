# SPDX-License-Identifier: Apache-2.0
"""What crosses processes: the batches of a ``torch.distributed`` process group are scored as one batch.

Errors stay where they are. Between the passes of counting them in bins, the processes exchange the range of each row,
then the counts, and at the end the parts of the loss. All but the last are integers, so each process has the same.
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
    """Raise in all processes unless they compute the same loss; only on the CPU, as CUDA would wait for the device.

    Args:
        errors: of the rows of this process ``(R, N)``.
        options: what is asked for.
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
    """The range of the errors of each row over all processes, and whether the largest is here, bool ``(R,)``.

    Args:
        smallest: of the foreground in this process, float32 ``(R, 1)``.
        largest: of the background, float32 ``(R, 1)``.
        group: the processes.
    """
    # The order of positive numbers is the order of their bits. Of equal ones, the process of the highest rank wins.
    own = (largest.view(torch.int32).to(torch.int64) << 32) + torch.distributed.get_rank(group)
    ends = torch.stack([own, -smallest.view(torch.int32).to(torch.int64)])
    torch.distributed.all_reduce(ends, ReduceOp.MAX, group=group)
    smallest, largest = (end.to(torch.int32).view(torch.float32) for end in (-ends[1], ends[0] >> 32))
    return smallest, largest, (own == ends[0]).squeeze(1)


class SumOfAll(torch.autograd.Function):
    """The sum over the processes of a group, the same in each.

    Its gradient is that of the part of this process times the number of processes. Where the gradients of the
    processes are averaged, as DistributedDataParallel does, that makes it the gradient of the sum.
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
