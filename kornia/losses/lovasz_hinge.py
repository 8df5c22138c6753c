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
    r"""Lovász hinge loss: a convex surrogate of the intersection over union (IoU) of one foreground class.

    The Jaccard loss of a set of wrong pixels :math:`M`, with the foreground :math:`Y`, is

    .. math::

        \Delta_J(M) = 1 - \text{IoU} = \frac{|M|}{|Y \cup M|}

    and this loss is its Lovász extension [1, 2] at the hinge errors :math:`e_i = \max(0, 1 - z_i s_i)` of the logits
    :math:`z_i`, where :math:`s_i` is 1 on the foreground and -1 on the background:

    .. math::

        L = \int_0^\infty \Delta_J(\{i : e_i > t\}) \, dt = \sum_i w_i e_i

    The weights :math:`w_i` depend on the order of the errors only and are evaluated in closed form, so without
    ``num_bins`` the gradient is exact to rounding at any image size.

    Convention:
        - ``pred`` holds logits and ``target`` labels, 1 for the foreground and 0 for the background. Pixels with the
          label -100 do not count.
        - The loss is the Lovász extension at the hinge errors, not ``1 - IoU``: logits of -1 and 1 give
          ``2 * (1 - IoU)`` of their prediction, and right logits of at least 1 in size give 0.
        - Each image is scored by itself, and the loss is the mean over the batch.

    Args:
        pred: logits :math:`(B, 1, H, W)`, not probabilities: the decision threshold is 0. float16 and bfloat16 are
            computed in float32, integers and bool as float32.
        target: labels :math:`(B, H, W)`, 1 for the foreground and 0 for the background, of any integer,
            floating-point or bool dtype.
        ignore_index: pixels with this label are excluded: they have no error, no gradient and are not counted.
            None: nothing is ignored.
        per_image: True: each image is one group, whose IoU is optimised on its own. False: the batch is one group.
        reduction: over the groups: "mean", "sum", or "none" for one loss per group.
        num_bins: None: the exact loss. An integer in [1, 65536]: errors are counted in bins, at least that many where
            the order matters, instead of sorted. The loss is never above the exact one, and below it by at most the
            largest error divided by ``num_bins``; at 1024, loss and gradient usually agree to 1e-5 and 2e-3. An
            absent class stays exact. Each run gives the same result.
        process_group: None: the groups of this process. A ``torch.distributed`` process group: the batches of its
            processes are scored as one batch, so each of them returns the loss of the global batch. The gradient is
            scaled for averaging over the processes, as DistributedDataParallel does. Needs ``per_image=False`` and
            ``num_bins``; each process of the group must call the loss, though its batch may be empty.

    Returns:
        the loss, in the dtype of a floating-point ``pred`` and otherwise in float32. It is 0-d, or with reduction
        "none" :math:`(B,)` when ``per_image`` and :math:`(1,)` when not; at least 0, and not bounded above. A group
        without a valid pixel has loss 0, an empty batch too.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, 1, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if the batch or image sizes or the devices differ, an option is out of range, or a label on the CPU
            is neither 0, 1 nor ``ignore_index``.
        NotImplementedError: if ``reduction`` is unknown.
        RuntimeError: if another process of ``process_group`` is lost or does not answer in time.

    References:
        [1] J. Yu and M. Blaschko, Learning Submodular Losses with the Lovász Hinge, ICML 2015.

        [2] M. Berman, A. Rannen Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.

    Example:
        >>> import torch
        >>> pred = torch.tensor([[[[2.0, -0.5], [0.25, -3.0]]]], requires_grad=True)
        >>> target = torch.tensor([[[1, 1], [0, 0]]])
        >>> loss = lovasz_hinge_loss(pred, target)  # errors 1.5, 1.25; weights 1/2, 1/6
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
    r"""Lovász hinge loss: a convex surrogate of the intersection over union (IoU) of one foreground class.

    The module form of :func:`~kornia.losses.lovasz_hinge_loss`, which says what is computed, what each option means
    and what is raised.

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
        """Return the loss of logits ``pred`` and labels ``target``, reduced as chosen."""
        return lovasz_hinge_loss(pred, target, **self.options)
