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

# Reference implementation: https://github.com/bermanmaxim/LovaszSoftmax


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
    r"""Compute the Lovász sigmoid loss, which trains one foreground class for a high intersection over union (IoU).

    Call ``lovasz_sigmoid_loss(logits, labels).backward()`` with logits :math:`(B, 1, H, W)` and labels
    :math:`(B, H, W)`. Errors are at most 1, unlike those of :func:`~kornia.losses.lovasz_hinge_loss`, so the effect of
    a single wrong label is bounded.

    The Jaccard loss of a set of wrong pixels :math:`M`, given the foreground :math:`Y`, is

    .. math::

        \Delta_J(M) = 1 - \text{IoU} = \frac{|M|}{|Y \cup M|}

    The Lovász sigmoid loss is the Lovász extension of :math:`\Delta_J` [1], evaluated at the errors
    :math:`e_i = 1 - p_i` on the foreground and :math:`e_i = p_i` on the background, where :math:`p_i` is the sigmoid of
    the logit :math:`z_i`:

    .. math::

        L = \int_0^1 \Delta_J(\{i : e_i > t\}) \, dt = \sum_i w_i e_i

    It equals :func:`~kornia.losses.lovasz_softmax_loss` of the logits :math:`(0, z_i)` with ``classes=[1]``.

    Convention:
        - ``pred`` holds logits, not probabilities. ``target`` holds labels, 1 for the foreground and 0 for the
          background. By default, pixels with the label -100 are ignored.
        - As the logits grow in magnitude, the loss tends to ``1 - IoU`` of the prediction ``pred > 0``.
        - By default, each image is scored on its own, and the loss is the mean over the batch.

    Args:
        pred: logits :math:`(B, 1, H, W)`, not probabilities, of any real dtype. The decision threshold is 0. All dtypes
            but float64 are computed in float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        ignore_index: pixels with this label are excluded from the loss and receive no gradient. None ignores no pixel.
        per_image: True makes each image a group with its own IoU. False makes the whole batch one group.
        reduction: reduction over the groups: "mean", "sum", or "none" for one loss per group.
        num_bins: None computes the exact loss by sorting the errors. An integer in [1, 65536] counts them in bins
            instead. The loss is then never above the exact loss, and below it by at most ``1 / num_bins``.
        process_group: None scores the batch of this process alone. With a ``torch.distributed`` process group, the
            batches of its processes are scored as one batch. This requires ``per_image=False`` and ``num_bins``, see
            :func:`~kornia.losses.lovasz_hinge_loss`.

    Returns:
        the loss, in the dtype of a floating-point ``pred`` and otherwise in float32. It is a scalar. With reduction
        "none" it has the shape :math:`(B,)`, or :math:`(1,)` if ``per_image`` is False. The loss of a group is in
        [0, 1]. A group without a valid pixel has loss 0, and so does an empty batch.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if ``pred`` and ``target`` differ in batch size, image size or device, if an option is out of range,
            or if a label on the CPU is neither 0, 1 nor ``ignore_index``.
        NotImplementedError: if ``reduction`` is unknown.
        RuntimeError: if another process of ``process_group`` is lost or does not answer in time.

    References:
        [1] M. Berman, A. Rannen Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]], requires_grad=True)
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> loss = lovasz_sigmoid_loss(pred, target)  # errors 0.62, 0.56 and 0.12, weights 1/2, 1/6 and 1/3
        >>> f"{loss:.4f}"
        '0.4447'
        >>> loss.backward()

    """
    check_pair(pred, target, "1")
    options = Options("sigmoid", ignore_index, per_image, reduction, num_bins, process_group).checked()
    loss = lovasz_loss(pred, target, None, options)
    return loss if is_autocast(pred) or not pred.is_floating_point() else loss.to(pred.dtype)


class LovaszSigmoidLoss(LovaszModule):
    r"""Lovász sigmoid loss, which trains one foreground class for a high intersection over union (IoU).

    This is the module form of :func:`~kornia.losses.lovasz_sigmoid_loss`, which documents the loss, its options and the
    errors that it raises.

    Args:
        ignore_index: label of the pixels to ignore, or None.
        per_image: whether each image is a group; otherwise the whole batch is one group.
        reduction: reduction over the groups: "mean", "sum" or "none".
        num_bins: number of bins in which errors are counted, or None for the exact loss.
        process_group: process group whose batches are scored as one batch, or None.

    Shape:
        - pred: logits :math:`(B, 1, H, W)`.
        - target: labels :math:`(B, H, W)`, 0 and 1.
        - output: a scalar. With reduction "none": :math:`(B,)`, or :math:`(1,)` if ``per_image`` is False.

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
        """Compute the reduced loss of logits ``pred`` and labels ``target``."""
        return lovasz_sigmoid_loss(pred, target, **self.options)
