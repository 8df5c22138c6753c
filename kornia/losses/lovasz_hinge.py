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


def lovasz_hinge_loss(
    pred: Tensor,
    target: Tensor,
    *,
    ignore_index: Optional[int] = -100,
    per_image: bool = True,
    reduction: str = "mean",
    num_bins: Optional[int] = None,
    process_group: Optional[ProcessGroup] = None,
) -> Tensor:
    r"""Compute the Lovász hinge loss, which trains one foreground class for a high intersection over union (IoU).

    Call ``lovasz_hinge_loss(logits, labels).backward()`` with logits :math:`(B, 1, H, W)` and labels :math:`(B, H, W)`.

    The Jaccard loss of a set of wrong pixels :math:`M`, given the foreground :math:`Y`, is

    .. math::

        \Delta_J(M) = 1 - \text{IoU} = \frac{|M|}{|Y \cup M|}

    The Lovász hinge loss is the Lovász extension of :math:`\Delta_J` [1, 2], evaluated at the hinge errors
    :math:`e_i = \max(0, 1 - z_i s_i)`, where :math:`z_i` is the logit of pixel :math:`i`, and :math:`s_i` is 1 on the
    foreground and -1 on the background:

    .. math::

        L = \int_0^\infty \Delta_J(\{i : e_i > t\}) \, dt = \sum_i w_i e_i

    It is convex in the logits. The weights :math:`w_i` depend only on the order of the errors. They are computed in
    closed form, so without ``num_bins`` the gradient is exact to rounding at any image size.

    Convention:
        - ``pred`` holds logits. ``target`` holds labels, 1 for the foreground and 0 for the background. By default,
          pixels with the label -100 are ignored.
        - The loss is not ``1 - IoU``. If all logits are -1 or 1, it is ``2 * (1 - IoU)``. If all logits have the right
          sign and a magnitude of at least 1, it is 0.
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
            instead, at least this many where the order of errors matters. The loss is then never above the exact loss,
            and below it by at most the largest error divided by ``num_bins``. With 1024 bins, the loss usually agrees
            to 1e-5 and the gradient to 2e-3. Groups without foreground stay exact. Every run gives the same result.
        process_group: None scores the batch of this process alone. With a ``torch.distributed`` process group, the
            batches of its processes are scored as one batch, and each process returns the loss of the global batch. The
            gradient is scaled for averaging over the processes, as DistributedDataParallel does. This requires
            ``per_image=False`` and ``num_bins``. Each process of the group must call the loss; its batch may be empty.

    Returns:
        the loss, in the dtype of a floating-point ``pred`` and otherwise in float32. It is a scalar. With reduction
        "none" it has the shape :math:`(B,)`, or :math:`(1,)` if ``per_image`` is False. It is at least 0 and has no
        upper bound. A group without a valid pixel has loss 0, and so does an empty batch.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if ``pred`` and ``target`` differ in batch size, image size or device, if an option is out of range,
            or if a label on the CPU is neither 0, 1 nor ``ignore_index``.
        NotImplementedError: if ``reduction`` is unknown.
        RuntimeError: if another process of ``process_group`` is lost or does not answer in time.

    References:
        [1] J. Yu and M. Blaschko, Learning Submodular Losses with the Lovász Hinge, ICML 2015.

        [2] M. Berman, A. Rannen Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]], requires_grad=True)
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> loss = lovasz_hinge_loss(pred, target)  # errors 1.5 and 1.25, weights 1/2 and 1/6
        >>> f"{loss:.4f}"
        '0.9583'
        >>> loss.backward()
        >>> pred.grad[pred.grad != 0]
        tensor([-0.5000,  0.1667])
        >>> target[0, 0, 1] = 255  # ignore the missed pixel
        >>> lovasz_hinge_loss(pred.detach(), target, ignore_index=255)
        tensor(0.6250)

    """
    check_pair(pred, target, "1")
    options = Options("hinge", ignore_index, per_image, reduction, num_bins, process_group).checked()
    loss = lovasz_loss(pred, target, None, options)
    return loss if is_autocast(pred) or not pred.is_floating_point() else loss.to(pred.dtype)


class LovaszHingeLoss(LovaszModule):
    r"""Lovász hinge loss, which trains one foreground class for a high intersection over union (IoU).

    This is the module form of :func:`~kornia.losses.lovasz_hinge_loss`, which documents the loss, its options and the
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
        >>> criterion = LovaszHingeLoss(per_image=False)
        >>> pred = torch.zeros(2, 1, 3, 5, requires_grad=True)
        >>> target = torch.ones(2, 3, 5, dtype=torch.long)
        >>> f"{criterion(pred, target):.4f}"
        '1.0000'

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
        super().__init__(Options("hinge", ignore_index, per_image, reduction, num_bins, process_group))

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Compute the reduced loss of logits ``pred`` and labels ``target``."""
        return lovasz_hinge_loss(pred, target, **self.options)
