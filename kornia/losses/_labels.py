# SPDX-License-Identifier: Apache-2.0
"""Checks of logits and labels, shared by the Lovász losses and the IoU at thresholds."""

from __future__ import annotations

from typing import Callable, Optional

import torch
from torch import Tensor

from kornia.core.check import KORNIA_CHECK_IS_TENSOR, KORNIA_CHECK_SHAPE
from kornia.core.exceptions import ShapeError

from ._eager import is_eager, values_of, without_functorch
from ._utils import mask_ignore_pixels
from .one_hot import _check_class_labels

# Hints for layouts that are not supported, by the number of dimensions of pred.
_LAYOUTS = {
    2: "Points (N, C) with labels (N,) are one image: pass pred.T[None, :, :, None] and target[None, :, None].",
    3: "Points (B, C, N) or signals with labels (B, N): pass pred[..., None] and target[..., None].",
    5: "Volumes (B, C, D, H, W) with labels (B, D, H, W): pass pred.flatten(3) and target.flatten(2).",
}
# Many data sets mark ignored pixels by one of these labels.
_USUALLY_IGNORED = (255, -1)


def check_pair(pred: Tensor, target: Tensor, channels: str) -> None:
    """Raise unless ``pred`` holds logits ``(B, channels, H, W)`` and ``target`` labels ``(B, H, W)`` of these images.

    With several classes, ``pred`` may be one image that is scored against every image of ``target``.
    """
    KORNIA_CHECK_IS_TENSOR(pred, "pred must be Tensor.")
    KORNIA_CHECK_IS_TENSOR(target, "target must be Tensor.")
    if pred.is_complex() or target.is_complex():
        raise NotImplementedError(f"pred and target must hold real numbers. Got: {pred.dtype} and {target.dtype}")
    try:
        KORNIA_CHECK_SHAPE(pred, ["B", channels, "H", "W"])
        KORNIA_CHECK_SHAPE(target, ["B", "H", "W"])
    except ShapeError as error:
        hint = _LAYOUTS.get(pred.ndim)
        if pred.ndim == target.ndim == 4 and target.shape[1] == 1:
            hint = "Masks (B, 1, H, W): pass target.squeeze(1)."
        elif pred.ndim == target.ndim == 4 and channels == "1":
            hint = "Masks (B, C, H, W) of C classes: pass pred.flatten(0, 1)[:, None] and target.flatten(0, 1)."
        elif pred.ndim == target.ndim == 4:
            hint = "One-hot labels (B, C, H, W): pass target.argmax(1). Overlapping masks need a loss for one class."
        if hint is not None:
            error.args = (f"{error.args[0]}\n{hint}", *error.args[1:])
        raise
    if channels != "1" and not pred.shape[1] > 1:
        raise ValueError(f"Invalid pred shape, we expect BxNxHxW, with N > 1. Got: {pred.shape}")
    same_batch = pred.shape[0] == target.shape[0] or (channels != "1" and pred.shape[0] == 1)
    if not (same_batch and pred.shape[-2:] == target.shape[-2:]):
        raise ValueError(f"pred and target shapes must be the same. Got: {pred.shape} and {target.shape}")
    if not pred.device == target.device:
        raise ValueError(f"pred and target must be in the same device. Got: {pred.device} and {target.device}")


def _require(is_right: Callable[[Tensor], Tensor], labels: Tensor, message: str) -> None:
    """Raise unless all labels are right. Labels on CUDA are not checked, because that would wait for the device."""
    if labels.device.type != "cpu":
        return
    values = values_of(labels)
    if values is not None:
        with without_functorch():
            if not is_right(values).all():
                raise ValueError(f"{message}. {_wrong_labels(values[~is_right(values)])}")
    elif not torch._C._are_functorch_transforms_active():  # vmap has no batching rule for the assertion
        torch._assert_async(is_right(labels).all(), message)


def _wrong_labels(wrong: Tensor) -> str:
    """Name up to five wrong labels, and suggest ignore_index if one of them usually marks ignored pixels."""
    labels = wrong.unique()[:5].tolist()
    hints = [f"To ignore those pixels, pass ignore_index={int(x)}" for x in labels if x in _USUALLY_IGNORED]
    return ". ".join([f"Got: {labels}", *hints[:1]])


def _as_integers(target: Tensor) -> Tensor:
    # Use int64, because an ignore_index outside the range of a narrower dtype would wrap around to a valid label.
    labels = target.to(torch.int64)
    if target.dtype == torch.uint64:  # labels from 2^63 on have become negative
        labels = labels.where(labels >= 0, torch.iinfo(torch.int64).max)
    return labels


def _mask(labels: Tensor, num_classes: int, ignore_index: Optional[int]) -> tuple[Tensor, Optional[Tensor], bool]:
    """Replace ignored labels by 0.

    Returns:
        the labels; the valid pixels, None if all are valid; and whether all labels are known to be in range.
    """
    if labels.device.type == "cpu" and labels.dtype == torch.int64 and is_eager(labels) and labels.numel() > 0:
        # In the most frequent case, one pass shows that all labels are in range and none is ignored.
        low, high = (int(label) for label in torch.aminmax(labels))
        if low >= 0 and high < num_classes and (ignore_index is None or not low <= ignore_index <= high):
            return labels, None, True
    return *mask_ignore_pixels(labels, ignore_index), False


def binary_labels(target: Tensor, ignore_index: Optional[int]) -> tuple[Tensor, Optional[Tensor]]:
    """Return the foreground as bool, and the valid pixels, None if all are valid.

    Raises:
        ValueError: if a label on the CPU is neither 0, 1 nor ``ignore_index``.
    """
    labels, valid, checked = _mask(target if target.is_floating_point() else _as_integers(target), 2, ignore_index)
    if checked:
        return labels.to(torch.uint8).view(torch.bool), valid  # three times as fast as a comparison
    if not labels.requires_grad:  # gradcheck perturbs labels: do not check them
        expected = "target must hold 0 for the background and 1 for the foreground"
        if ignore_index is not None:
            expected += f", or ignore_index={int(ignore_index)} for pixels to ignore"
        _require(lambda labels: (labels == 0) | (labels == 1), labels, expected)
    return labels == 1, valid


def class_labels(target: Tensor, num_classes: int, ignore_index: Optional[int]) -> tuple[Tensor, Optional[Tensor]]:
    """Return class labels as int64, 0 at ignored pixels, and the valid pixels, None if all are valid.

    Raises:
        ValueError: if a label on the CPU is not a whole number.
        RuntimeError: if a label on the CPU is neither in ``[0, num_classes)`` nor ``ignore_index``.
    """
    if target.is_floating_point():
        expected = "target must hold class labels, whole numbers; soft labels are not supported"
        _require(lambda labels: labels == labels.trunc(), target, expected)
    labels, valid, checked = _mask(_as_integers(target), num_classes, ignore_index)
    if checked:
        return labels, valid
    if not is_eager(labels):
        return _check_class_labels(labels, num_classes), valid
    try:
        return _check_class_labels(labels, num_classes), valid
    except RuntimeError as error:
        wrong = labels[(labels < 0) | (labels >= num_classes)]
        error.args = (f"{error.args[0]}\n{_wrong_labels(wrong)}", *error.args[1:])
        raise
