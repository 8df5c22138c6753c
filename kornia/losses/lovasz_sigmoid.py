# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from torch import Tensor

from ._eager import is_autocast
from ._labels import check_pair
from ._lovasz_dispatch import lovasz_loss
from ._lovasz_options import LovaszModule, Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The reference implementation: https://github.com/bermanmaxim/LovaszSoftmax


def lovasz_sigmoid_loss(
    pred: Tensor,
    target: Tensor,
    *,
    ignore_index: Optional[int] = -100,
    per_image: bool = True,
    reduction: str = "mean",
    num_bins: Optional[int] = None,
    process_group: Optional[ProcessGroup] = None,
) -> Tensor:
    r"""Lovász sigmoid loss: trains the intersection over union (IoU) of one foreground class, by bounded errors.

    It is the Lovász extension of the Jaccard loss [1] at the errors :math:`e_i = 1 - p_i` on the foreground and
    :math:`e_i = p_i` elsewhere, where :math:`p_i` is the sigmoid of the logit. That is
    :func:`~kornia.losses.lovasz_softmax_loss` of the logits :math:`(0, z_i)` with ``classes=[1]``. Unlike an error of
    :func:`~kornia.losses.lovasz_hinge_loss`, one here is at most 1, so the weight of a single wrong label is bounded.

    Convention:
        - ``pred`` holds logits, not probabilities, and ``target`` labels, 1 for the foreground and 0 for the
          background. Pixels with the label -100 do not count.
        - The loss tends to ``1 - IoU`` of the prediction ``pred > 0`` as the logits grow.
        - Each image is scored by itself, and the loss is the mean over the batch.

    Args:
        pred: logits :math:`(B, 1, H, W)`, not probabilities. float16 and bfloat16 are computed in float32, integers and
            bool as float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        ignore_index: pixels with this label are excluded: they have no error, no gradient and are not counted.
            None: nothing is ignored.
        per_image: True: each image is one group, whose IoU is optimised on its own. False: the batch is one group.
        reduction: over the groups: "mean", "sum", or "none" for one loss per group.
        num_bins: None: the exact loss. An integer in [1, 65536]: errors are counted in bins instead of sorted. The loss
            is never above the exact one, and below it by at most ``1 / num_bins``.
        process_group: None: the groups of this process. A ``torch.distributed`` process group: the batches of its
            processes are scored as one. Needs ``per_image=False`` and ``num_bins``; more at
            :func:`~kornia.losses.lovasz_hinge_loss`.

    Returns:
        the loss, in the dtype of a floating-point ``pred`` and otherwise in float32. It is 0-d, or with reduction
        "none" :math:`(B,)` when ``per_image`` and :math:`(1,)` when not. The loss of a group is in [0, 1]. It is 0
        without a valid pixel; that of an empty batch is 0.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if the batch or image sizes or the devices differ, an option is out of range, or a label on the CPU
            is neither 0, 1 nor ``ignore_index``.
        NotImplementedError: if ``reduction`` is unknown.
        RuntimeError: if another process of ``process_group`` is lost or does not answer in time.

    References:
        [1] M. Berman, A. Rannen Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]], requires_grad=True)
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> loss = lovasz_sigmoid_loss(pred, target)  # errors 0.62, 0.56, 0.12; weights 1/2, 1/6, 1/3
        >>> f"{loss:.4f}"
        '0.4447'
        >>> loss.backward()

    """
    check_pair(pred, target, "1")
    options = Options("sigmoid", ignore_index, per_image, reduction, num_bins, process_group).checked()
    loss = lovasz_loss(pred, target, None, options)
    return loss if is_autocast(pred) or not pred.is_floating_point() else loss.to(pred.dtype)


class LovaszSigmoidLoss(LovaszModule):
    r"""Lovász sigmoid loss: trains the intersection over union (IoU) of one foreground class, by bounded errors.

    The module form of :func:`~kornia.losses.lovasz_sigmoid_loss`, which says what is computed and what each option
    means.

    Args:
        ignore_index: label of the pixels to ignore, or None.
        per_image: whether each image is one group; otherwise the batch is.
        reduction: over the groups: "mean", "sum" or "none".
        num_bins: how many bins rank the errors, or None to sort them: the exact loss.
        process_group: process group whose batches are scored as one batch, or None.

    Shape:
        - pred: logits :math:`(B, 1, H, W)`.
        - target: labels :math:`(B, H, W)`, 0 and 1.
        - output: 0-d; with reduction "none" :math:`(B,)`, or :math:`(1,)` for a batch-wide group.

    Example:
        >>> import torch
        >>> criterion = LovaszSigmoidLoss(per_image=False)
        >>> pred = torch.zeros(2, 1, 3, 5, requires_grad=True)
        >>> target = torch.ones(2, 3, 5, dtype=torch.long)
        >>> f"{criterion(pred, target):.4f}"
        '0.5000'

    """

    def __init__(
        self,
        *,
        ignore_index: Optional[int] = -100,
        per_image: bool = True,
        reduction: str = "mean",
        num_bins: Optional[int] = None,
        process_group: Optional[ProcessGroup] = None,
    ) -> None:
        super().__init__(Options("sigmoid", ignore_index, per_image, reduction, num_bins, process_group))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``pred`` and labels ``target``, reduced as chosen."""
        return lovasz_sigmoid_loss(pred, target, **self.options)
