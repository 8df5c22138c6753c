# SPDX-License-Identifier: Apache-2.0
"""Helpers for the tests of the Lovász losses: inputs, an oracle, and fixtures that select the form of computation."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from kornia.losses import (
    LovaszHingeLoss,
    LovaszSigmoidLoss,
    LovaszSoftmaxLoss,
    lovasz_hinge_loss,
    lovasz_sigmoid_loss,
    lovasz_softmax_loss,
)
from kornia.losses._tuning import tuning

from testing.base import BaseTester

INF, NAN = float("inf"), float("nan")
# Where Triton's interpreter runs the fused kernels on the CPU, all tests use only them.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMS = ("fused",) if INTERPRETED else ("derived", "dense", "cpu", *["fused"] * torch.cuda.is_available())
# Relative tolerance of a result with exact inputs: its rounding, as the computation itself is at least float32.
RTOL = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-6, torch.float64: 1e-13}
# Absolute tolerance of gradients with errors of at most 1, which contain differences of probabilities.
GRAD_ATOL = {torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 1e-7, torch.float64: 1e-16}


@dataclass(frozen=True)
class Loss:
    """One of the losses, called with ``pred`` and ``target``, and the properties in which the losses differ."""

    name: str
    function: Callable[..., Tensor]
    module: type[torch.nn.Module]
    channels: int
    wrong_label: str  # part of the error message for a label out of range

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        return self.function(*args, **options)

    def __str__(self) -> str:
        return self.name

    def grad_atol(self, dtype: torch.dtype) -> float:
        return 0.0 if self is HINGE else GRAD_ATOL[dtype]


ZERO_OR_ONE = "0 for the background and 1 for the foreground"
HINGE = Loss("hinge", lovasz_hinge_loss, LovaszHingeLoss, 1, ZERO_OR_ONE)
SIGMOID = Loss("sigmoid", lovasz_sigmoid_loss, LovaszSigmoidLoss, 1, ZERO_OR_ONE)
SOFTMAX = Loss("softmax", lovasz_softmax_loss, LovaszSoftmaxLoss, 4, "Class values must be")
each_loss = pytest.mark.parametrize("loss", [HINGE, SIGMOID, SOFTMAX], ids=str)

_OF_ONE_CLASS = [
    {},
    {"per_image": False},
    {"reduction": "none"},
    {"ignore_index": 255, "reduction": "sum"},
    {"ignore_index": None},
]
OPTIONS = {
    HINGE: _OF_ONE_CLASS,
    SIGMOID: _OF_ONE_CLASS,
    SOFTMAX: [
        {},
        {"classes": "present", "per_image": False},
        {"classes": (2, 0), "reduction": "none"},
        {"ignore_index": 255, "classes": "present", "reduction": "sum"},
        {"ignore_index": None, "weight": torch.tensor([0.5, 2.0, 0.0, 3.0])},
    ],
}
each_loss_with_options = pytest.mark.parametrize(
    ("loss", "options"),
    [pytest.param(loss, options, id=f"{loss}-{i}") for loss in OPTIONS for i, options in enumerate(OPTIONS[loss])],
)


def make_inputs(loss, device, dtype, shape=(3, 5, 6), *, labels=None, ignored=None, scale=None, seed=0):
    """Return random logits and labels.

    Up to 128 pixels, the logits are exact in every dtype, and no two errors of a class are equal.

    Args:
        loss: the loss to be tested.
        device: device of both tensors.
        dtype: dtype of the logits.
        shape: shape of the labels.
        labels: number of labels that occur. By default, the last class of the softmax loss does not occur.
        ignored: a label for the second line of the first image.
        scale: scale of the logits.
        seed: seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    count = batch * height * width
    target = torch.randint(0, labels or max(2, loss.channels - 1), shape, generator=generator)
    if loss.channels == 1 and count <= 128 and scale is None:
        pred = (4 * torch.randperm(count, generator=generator) - 2 * count + 1).double()
        pred /= 16 if loss is HINGE else 64
    else:
        pred = torch.randn(count * loss.channels, generator=generator, dtype=torch.float64) * (scale or 2)
        if count <= 128:
            pred = pred.bfloat16()
    pred = pred.view(batch, loss.channels, height, width)
    if ignored is not None:
        target[0, 1] = ignored
    return pred.to(device, dtype), target.to(device)


def widest_dtype(device) -> torch.dtype:
    """Return float64, or float32 on a device without float64, such as MPS."""
    try:
        return torch.empty(0, dtype=torch.float64, device=device).dtype
    except TypeError:
        return torch.float32


def right_logits(loss, target, margin=1.0):
    """Return logits that predict each label correctly by a margin, float32."""
    if loss.channels == 1:
        return margin * (2.0 * target.unsqueeze(1).float() - 1.0)
    return margin * torch.nn.functional.one_hot(target, loss.channels).movedim(-1, 1).float()


def value_and_grad(function, pred, target, *args, **options):
    leaf = pred.detach().clone().requires_grad_()
    value = function(leaf, target, *args, **options)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), grad


def jaccard_loss(missed: int, alarms: int, total: int) -> Fraction:
    """Return 1 - IoU of a prediction with missed pixels and false alarms, for ``total`` foreground pixels."""
    return Fraction(missed + alarms, total + alarms) if total + alarms else Fraction(0)


def extension(errors: Tensor, foreground: Tensor) -> Tensor:
    """Compute the Lovász extension by its definition: pixels join the wrong set one by one, largest error first."""
    counts, before, weights = [0, 0], Fraction(0), [0.0] * len(errors)
    is_foreground, total = foreground.tolist(), int(foreground.sum())
    for i in errors.argsort(descending=True, stable=True).tolist():
        counts[0 if is_foreground[i] else 1] += 1
        after = jaccard_loss(*counts, total)
        weights[i], before = float(after - before), after
    weights = torch.tensor(weights, dtype=torch.float64)
    return (errors.masked_fill((weights == 0) & errors.isinf(), 0.0) * weights).sum()


def oracle(
    loss, pred, target, weight=None, *, classes="all", ignore_index=-100, per_image=True, reduction="mean"
) -> Tensor:
    """Compute the loss with all its options from the definition, in float64 on the CPU, differentiable by autograd."""
    pred, target = pred.cpu().double(), target.cpu()
    groups = list(zip(pred.flatten(2), target.flatten(1)))
    if not per_image:
        groups = [(pred.movedim(1, 0).flatten(1), target.flatten())]
    losses = []
    for logits, labels in groups:
        if ignore_index is not None:
            logits, labels = logits[:, labels != ignore_index], labels[labels != ignore_index]
        losses.append(_oracle_of_group(loss, logits, labels, weight, classes))
    stacked = torch.stack(losses) if losses else pred.new_zeros(0)
    return {"none": stacked, "sum": stacked.sum(), "mean": stacked.sum() / max(1, len(losses))}[reduction]


def _oracle_of_group(loss, logits, labels, weight, classes):
    if len(labels) == 0:
        return logits.sum()
    if loss.channels == 1:
        margins = -logits[0] * (2 * labels - 1)
        return extension((1 + margins).relu() if loss is HINGE else margins.sigmoid(), labels == 1)
    probabilities, terms = logits.softmax(0), {}
    for c in range(len(logits)):
        others = torch.cat([probabilities[:c], probabilities[c + 1 :]]).sum(0)
        terms[c] = extension(torch.where(labels == c, others, probabilities[c]), labels == c)
    averaged = {"all": range(len(logits)), "present": labels.unique().tolist()}.get(str(classes), classes)
    factors = torch.ones(len(logits)) if weight is None else weight.cpu().double()
    return sum(factors[c] * terms[c] for c in averaged) / len(averaged)


def quick_oracle(loss, pred, target, **options) -> Tensor:
    """Do the same fast, by differences of the Jaccard loss in float64. The order of equal errors may differ."""

    def differences(errors, foreground):
        errors, order = errors.sort(descending=True, stable=True)
        foreground = foreground[order].double()
        total = foreground.sum()
        losses = 1 - (total - foreground.cumsum(0)) / (total + (1 - foreground).cumsum(0))
        weights = losses.diff(prepend=losses.new_zeros(1))
        return (errors.masked_fill((weights.abs() < 1e-15) & errors.isinf(), 0.0) * weights).sum()

    with mock.patch(f"{__name__}.extension", differences):
        return oracle(loss, pred, target, **options)


def force_form(monkeypatch, form: str, piece: int = 100) -> None:
    """Let one form compute every loss that it supports, in small pieces.

    Args:
        monkeypatch: fixture that restores the settings.
        form: "derived" by autograd from the dense form, "dense", "cpu" (never with bins), or "fused" by kernels, if
            available. "usual" changes nothing.
        piece: number of errors that are processed at a time.
    """
    if form == "usual":
        return
    settings = {
        "sorted_at_once": piece,
        "eager_forms": form != "derived",
        "cpu_from": 1 if form == "cpu" else 1 << 60,
        "candidates_from": 0,
        "merged_below": 0,
        "one_piece": piece,
        "piece": max(64, piece),
        "counted_at_once": piece,
        "counted_at_once_cuda": piece,
        "kernels": form == "fused",
    }
    for name, value in settings.items():
        monkeypatch.setattr(tuning, name, value)


class LovaszTester(BaseTester):
    @pytest.fixture(autouse=True, params=FORMS)
    def form(self, request, monkeypatch):
        """Run every test with each form, for inputs of any size, and in small pieces."""
        torch.manual_seed(0)
        force_form(monkeypatch, request.param)
        return request.param


def with_forms(*forms):
    """Run a test with these forms only. The fused form must pass every test of the dense form."""
    if "dense" in forms:
        forms = tuple(form for form in FORMS if form in (*forms, "fused"))
    return pytest.mark.parametrize("form", forms, indirect=True)
