# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence, Union

import torch
from torch import Tensor, nn

from kornia.core.check import KORNIA_CHECK, KORNIA_CHECK_IS_TENSOR

from ._eager import is_autocast
from ._labels import check_pair
from ._lovasz_dispatch import lovasz_loss
from ._lovasz_options import LovaszModule, Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The reference implementation: https://github.com/bermanmaxim/LovaszSoftmax


def _check_weight(weight: Tensor, pred: Tensor) -> None:
    KORNIA_CHECK_IS_TENSOR(weight, "weight must be Tensor or None.")
    KORNIA_CHECK(
        weight.layout == torch.strided and not weight.is_complex(),
        f"weight must be a dense tensor of real numbers: got {weight.layout} of {weight.dtype}",
    )
    KORNIA_CHECK(
        weight.shape == (pred.shape[1],),
        lambda: (
            f"weight must hold one value per class of pred: got weight of shape {weight.shape} for pred of "
            f"shape {pred.shape}"
        ),
    )
    KORNIA_CHECK(
        weight.device == pred.device,
        f"weight and pred must be in the same device. Got: {weight.device} and {pred.device}",
    )


def lovasz_softmax_loss(
    pred: Tensor,
    target: Tensor,
    weight: Optional[Tensor] = None,
    *,
    classes: Union[str, Sequence[int]] = "all",
    ignore_index: Optional[int] = -100,
    per_image: bool = True,
    reduction: str = "mean",
    num_bins: Optional[int] = None,
    process_group: Optional[ProcessGroup] = None,
) -> Tensor:
    r"""Lovász-Softmax loss: a surrogate of the mean intersection over union (IoU) of several classes.

    The Jaccard loss of class :math:`c`, for a set of wrong pixels :math:`M` and the pixels :math:`Y_c` labelled
    :math:`c`, is

    .. math::

        \Delta_{J_c}(M) = 1 - \text{IoU}_c = \frac{|M|}{|Y_c \cup M|}

    and this loss is the mean over the classes of its Lovász extension [1] at the errors
    :math:`e_i = 1 - p_i(c)` on :math:`Y_c` and :math:`e_i = p_i(c)` elsewhere, where :math:`p` is the softmax of the
    logits:

    .. math::

        L = \frac{1}{C} \sum_c \int_0^1 \Delta_{J_c}(\{i : e_i > t\}) \, dt = \frac{1}{C} \sum_c \sum_i w_i e_i

    The weights :math:`w_i` depend on the order of the errors only and are evaluated in closed form, so without
    ``num_bins`` the gradient is exact to rounding at any image size.

    Convention:
        - ``pred`` holds logits, not probabilities, and ``target`` class indices. Pixels with the label -100 do not
          count.
        - The loss tends to the mean of ``1 - IoU`` over the classes as the logits grow. A class that neither occurs nor
          is predicted has an IoU of 1.
        - Each image is scored by itself, and the loss is the mean over the batch.

    Args:
        pred: logits :math:`(B, C, H, W)`, :math:`C > 1`, not probabilities. float16 and bfloat16 are computed in
            float32. A ``pred`` of one image is scored against every image of ``target``.
        target: class labels :math:`(B, H, W)` in :math:`[0, C)`.
        weight: factor of the term of each class :math:`(C,)`. The mean still divides by the number of classes
            averaged, so a uniform weight of 2 doubles the loss. It receives a gradient if it requires one.
        classes: the classes averaged. "all": an absent class enters with its largest probability. "present": only
            the classes that occur among the valid pixels of the group. A sequence of int: exactly those.
        ignore_index: pixels with this label are excluded: they have no error, no gradient and are not counted.
            None: nothing is ignored.
        per_image: True: each image is one group, whose IoU is optimised on its own. False: the batch is one group.
        reduction: over the groups: "mean", "sum", or "none" for one loss per group.
        num_bins: None: the exact loss. An integer in [1, 65536]: errors are counted in bins, at least that many where
            the order matters, instead of sorted. The loss is never above the exact one, and below it by at most
            ``1 / num_bins``; at 1024, loss and gradient usually agree to 1e-5 and 2e-3. An absent class stays exact.
            Each run gives the same result.
        process_group: None: the groups of this process. A ``torch.distributed`` process group: the batches of its
            processes are scored as one batch, so each of them returns the loss of the global batch. The gradient is
            scaled for averaging over the processes, as DistributedDataParallel does. Needs ``per_image=False`` and
            ``num_bins``; each process of the group must call the loss, though its batch may be empty.

    Returns:
        the loss, in the dtype of ``pred`` promoted with that of ``weight``. It is 0-d, or with reduction "none"
        :math:`(B,)` when ``per_image`` and :math:`(1,)` when not. Without ``weight``, the loss of a group is in
        [0, 1]. A group without a valid pixel has loss 0, an empty batch too.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, C, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if ``pred`` has one class, the batch or image sizes or the devices differ, or an option is out of
            range, such as an index in ``classes`` that ``pred`` does not have.
        NotImplementedError: if ``reduction`` is unknown.
        BaseError: if ``weight`` does not hold one value per class or is on another device.
        TypeCheckError: if ``weight`` is not a tensor.
        RuntimeError: if a label on the CPU is neither in :math:`[0, C)` nor ``ignore_index``, or if another process of
            ``process_group`` is lost or does not answer in time.

    References:
        [1] M. Berman, A. Rannen Triki and M. B. Blaschko, The Lovász-Softmax loss, CVPR 2018, arXiv:1705.08790.

    Example:
        >>> pred = torch.tensor([[[[4.0, 0.0, 0.0]], [[0.0, 4.0, 1.0]], [[0.0, 0.0, 0.0]]]], requires_grad=True)
        >>> target = torch.tensor([[[0, 1, 0]]])
        >>> loss = lovasz_softmax_loss(pred, target)  # class 2 is absent
        >>> f"{loss:.4f}"
        '0.3098'
        >>> loss.backward()
        >>> lovasz_softmax_loss(pred.detach(), target, classes="present")
        tensor(0.3587)
        >>> target[0, 0, 2] = 255  # ignore the wrong pixel
        >>> lovasz_softmax_loss(pred.detach(), target, classes="present", ignore_index=255)
        tensor(0.0353)

    """
    check_pair(pred, target, "N")
    dtype = pred.dtype if pred.is_floating_point() else torch.float32
    if weight is not None:
        _check_weight(weight, pred)
        dtype = torch.promote_types(dtype, weight.dtype)
    options = Options("softmax", ignore_index, per_image, reduction, num_bins, process_group, classes)
    loss = lovasz_loss(pred, target, weight, options.checked(pred.shape[1]))
    return loss if is_autocast(pred) else loss.to(dtype)


class LovaszSoftmaxLoss(LovaszModule):
    r"""Lovász-Softmax loss: a surrogate of the mean intersection over union (IoU) of several classes.

    The module form of :func:`~kornia.losses.lovasz_softmax_loss`, which says what is computed, what each option means
    and what is raised.

    Args:
        weight: factor of the term of each class :math:`(C,)`, also as a list or tuple, or None. A parameter is
            registered as one; anything else becomes a buffer that moves with the module and is not saved with it.
        classes: the classes averaged: "all", "present" or a sequence of class indices.
        ignore_index: label of the pixels to ignore, or None.
        per_image: whether each image is one group; otherwise the batch is.
        reduction: over the groups: "mean", "sum" or "none".
        num_bins: how many bins rank the errors, or None to sort them: the exact loss.
        process_group: process group whose batches are scored as one batch, or None.

    Shape:
        - pred: logits :math:`(B, C, H, W)`, :math:`C > 1`.
        - target: class labels :math:`(B, H, W)` in :math:`[0, C)`.
        - output: 0-d; with reduction "none" :math:`(B,)`, or :math:`(1,)` for a batch-wide group.

    Example:
        >>> criterion = LovaszSoftmaxLoss(classes="present", ignore_index=255)
        >>> pred = torch.zeros(2, 4, 3, 5, requires_grad=True)
        >>> target = torch.ones(2, 3, 5, dtype=torch.long)
        >>> f"{criterion(pred, target):.4f}"
        '0.7500'

    """

    def __init__(
        self,
        weight: Union[Tensor, list[float], tuple[float, ...], None] = None,
        *,
        classes: Union[str, Sequence[int]] = "all",
        ignore_index: Optional[int] = -100,
        per_image: bool = True,
        reduction: str = "mean",
        num_bins: Optional[int] = None,
        process_group: Optional[ProcessGroup] = None,
    ) -> None:
        super().__init__(Options("softmax", ignore_index, per_image, reduction, num_bins, process_group, classes))
        if isinstance(weight, (list, tuple)):
            weight = torch.tensor(weight, dtype=torch.float32)
        if isinstance(weight, nn.Parameter):
            self.weight = weight
        else:
            if weight is not None:
                KORNIA_CHECK_IS_TENSOR(weight, "weight must be Tensor or None.")
            self.register_buffer("weight", weight, persistent=False)

    def extra_repr(self) -> str:
        """Show the settings."""
        weight = "" if self.weight is None else f"weight of shape {tuple(self.weight.shape)}, "
        return f"{weight}{super().extra_repr()}"

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits ``pred`` and labels ``target``, reduced as chosen."""
        return lovasz_softmax_loss(pred, target, self.weight, **self.options)
