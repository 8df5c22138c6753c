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

# Reference implementation: https://github.com/bermanmaxim/LovaszSoftmax


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
    r"""Compute the Lovász-Softmax loss, which trains several classes for a high mean intersection over union (IoU).

    Call ``lovasz_softmax_loss(logits, labels).backward()`` with logits :math:`(B, C, H, W)` and labels
    :math:`(B, H, W)`.

    The Jaccard loss of class :math:`c` for a set of wrong pixels :math:`M`, given the pixels :math:`Y_c` labelled
    :math:`c`, is

    .. math::

        \Delta_{J_c}(M) = 1 - \text{IoU}_c = \frac{|M|}{|Y_c \cup M|}

    The Lovász-Softmax loss is the mean over the classes of the Lovász extension of :math:`\Delta_{J_c}` [1], evaluated
    at the errors :math:`e_i = 1 - p_i(c)` on :math:`Y_c` and :math:`e_i = p_i(c)` elsewhere, where :math:`p` is the
    softmax of the logits:

    .. math::

        L = \frac{1}{C} \sum_c \int_0^1 \Delta_{J_c}(\{i : e_i > t\}) \, dt = \frac{1}{C} \sum_c \sum_i w_i e_i

    The weights :math:`w_i` depend only on the order of the errors. They are computed in closed form, so without
    ``num_bins`` the gradient is exact to rounding at any image size.

    Convention:
        - ``pred`` holds logits, not probabilities. ``target`` holds class indices. By default, pixels with the label
          -100 are ignored.
        - As the logits grow in magnitude, the loss tends to the mean of ``1 - IoU`` over the classes. A class that
          neither occurs nor is predicted has an IoU of 1.
        - By default, each image is scored on its own, and the loss is the mean over the batch.

    Args:
        pred: logits :math:`(B, C, H, W)`, :math:`C > 1`, not probabilities, of any real dtype. All dtypes but float64
            are computed in float32, or in the dtype of ``weight`` if that is wider. If ``pred`` has one image, it is
            scored against every image of ``target``.
        target: class labels :math:`(B, H, W)` in :math:`[0, C)`, of any integer, floating-point or bool dtype.
        weight: factor of each class :math:`(C,)`. The mean still divides by the number of averaged classes, so a
            weight of 2 for every class doubles the loss. It receives a gradient if it requires one.
        classes: the classes to average. "all" averages every class; the loss of an absent class is its largest
            probability. "present" averages the classes that occur among the valid pixels of the group. A sequence of
            int averages exactly those classes.
        ignore_index: pixels with this label are excluded from the loss and receive no gradient. None ignores no pixel.
        per_image: True makes each image a group with its own IoU. False makes the whole batch one group.
        reduction: reduction over the groups: "mean", "sum", or "none" for one loss per group.
        num_bins: None computes the exact loss by sorting the errors. An integer in [1, 65536] counts them in bins
            instead, at least this many where the order of errors matters. The loss is then never above the exact loss,
            and below it by at most ``1 / num_bins``. With 1024 bins, the loss usually agrees to 1e-5 and the gradient
            to 2e-3. Absent classes stay exact. Every run gives the same result.
        process_group: None scores the batch of this process alone. With a ``torch.distributed`` process group, the
            batches of its processes are scored as one batch, and each process returns the loss of the global batch. The
            gradient is scaled for averaging over the processes, as DistributedDataParallel does. This requires
            ``per_image=False`` and ``num_bins``. Each process of the group must call the loss; its batch may be empty.

    Returns:
        the loss, in the dtype of a floating-point ``pred`` and otherwise in float32, promoted with that of ``weight``.
        It is a scalar. With reduction "none" it has the shape :math:`(B,)`, or :math:`(1,)` if ``per_image`` is False.
        Without ``weight``, the loss of a group is in [0, 1]. A group without a valid pixel has loss 0, and so does an
        empty batch.

    Raises:
        ShapeError: if ``pred`` is not :math:`(B, C, H, W)` or ``target`` is not :math:`(B, H, W)`.
        ValueError: if ``pred`` has only one class, if ``pred`` and ``target`` differ in batch size, image size or
            device, or if an option is out of range, such as an index in ``classes`` that ``pred`` does not have.
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
    r"""Lovász-Softmax loss, which trains several classes for a high mean intersection over union (IoU).

    This is the module form of :func:`~kornia.losses.lovasz_softmax_loss`, which documents the loss, its options and the
    errors that it raises.

    Args:
        weight: factor of each class :math:`(C,)`, as a tensor, list or tuple, or None. A parameter is registered as a
            parameter of the module. Anything else becomes a buffer that moves with the module but is not saved with it.
        classes: the classes to average: "all", "present" or a sequence of class indices.
        ignore_index: label of the pixels to ignore, or None.
        per_image: whether each image is a group; otherwise the whole batch is one group.
        reduction: reduction over the groups: "mean", "sum" or "none".
        num_bins: number of bins in which errors are counted, or None for the exact loss.
        process_group: process group whose batches are scored as one batch, or None.

    Shape:
        - pred: logits :math:`(B, C, H, W)`, :math:`C > 1`.
        - target: class labels :math:`(B, H, W)` in :math:`[0, C)`.
        - output: a scalar. With reduction "none": :math:`(B,)`, or :math:`(1,)` if ``per_image`` is False.

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
        """Compute the reduced loss of logits ``pred`` and labels ``target``."""
        return lovasz_softmax_loss(pred, target, self.weight, **self.options)
