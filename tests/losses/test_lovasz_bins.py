# SPDX-License-Identifier: Apache-2.0
"""The Lovász losses with errors counted in bins."""

from __future__ import annotations

import pytest
import torch

from kornia.losses._lovasz_bins import count_slots, slots_at

from testing import lovasz
from testing.lovasz import (
    HINGE,
    INF,
    RTOL,
    SIGMOID,
    SOFTMAX,
    LovaszTester,
    each_loss,
    force_form,
    jaccard_loss,
    value_and_grad,
    widest_dtype,
    with_forms,
)


def make_inputs(loss, device, dtype, shape=(2, 16, 24), scale=1.0, seed=0):
    return lovasz.make_inputs(loss, device, dtype, shape, scale=scale, seed=seed)


def largest_error(loss, pred, target):
    if loss is not HINGE:
        return 1.0
    return float((1 - pred[:, 0].cpu().double() * (2 * target.cpu() - 1)).max().clamp(min=0))


def mean_of_two_orders(total: int, alarms: int) -> tuple[float, float]:
    """Weight of a foreground and a background pixel with equal errors: the mean over the two orders of the classes."""
    both = jaccard_loss(total, alarms, total)
    foreground_first, background_first = jaccard_loss(total, 0, total), jaccard_loss(0, alarms, total)
    foreground = (foreground_first + both - background_first) / 2 / total
    background = (background_first + both - foreground_first) / 2 / alarms
    return foreground, background


CASES = ("random", "ties", "one class", "wrong", "right", "extreme", "outlier", "lone", "tiny")


@with_forms("derived", "dense")
class TestWeights(LovaszTester):
    @pytest.mark.parametrize("total,alarms", [(1, 1), (1, 7), (6, 2), (40, 60)])
    def test_feature_weights_of_ties(self, total, alarms, device):
        # Equal errors share a bin. Each weight is the mean of the weights in two orders.
        target = torch.tensor([1] * total + [0] * alarms, device=device).view(1, 1, -1)
        dtype = widest_dtype(device)
        pred = torch.zeros(1, 1, 1, total + alarms, device=device, dtype=dtype)
        value, grad = value_and_grad(HINGE, pred, target, num_bins=4)
        foreground, background = mean_of_two_orders(total, alarms)
        expected = [-float(foreground)] * total + [float(background)] * alarms
        self.assert_close(grad.flatten().tolist(), expected, rtol=10 * RTOL[dtype], atol=0.0)
        self.assert_close(value.item(), float(jaccard_loss(total, alarms, total)), rtol=10 * RTOL[dtype], atol=0.0)

    def test_feature_infinite_logits(self, device, dtype):
        pred, target = make_inputs(HINGE, device, dtype)
        sure = torch.where(target == 1, INF, -INF).to(dtype).unsqueeze(1)
        mixed = torch.where(torch.arange(24, device=device) < 12, sure, pred)
        value, grad = value_and_grad(HINGE, mixed, target, num_bins=1024)
        assert value.isfinite()
        assert not grad[..., :12].any()
        assert HINGE(-sure, target, num_bins=8) == INF


@with_forms("usual")
class TestSlots(LovaszTester):
    @pytest.mark.parametrize("num_bins", [1, 2, 3, 31, 32, 33, 1000, 1024, (1 << 16) - 1, 1 << 16])
    def test_feature_order(self, num_bins, device, dtype):
        # Slots ascend with the position. Positions below and above all bins have slots of their own.
        dtype = torch.promote_types(dtype, torch.float32)
        inner = torch.cat([torch.logspace(-30, 0, 500), torch.linspace(0, 1, 5000)]).sort().values * (num_bins + 0.5)
        below, above = torch.tensor([float("-inf"), -1.0, 0.0]), torch.tensor([num_bins + 1.01, float("inf")])
        slots = slots_at(torch.cat([below, inner[inner > 0], above]).to(device, dtype), num_bins)
        last = count_slots(num_bins) - 1
        assert slots[:3].tolist() == [0, 0, 0]
        assert slots[3] == 1
        assert slots[-3] < slots[-2] <= slots[-1] == last
        assert (slots.diff() >= 0).all()
        nan = slots_at(torch.tensor([float("nan"), -float("nan")], device=device, dtype=dtype), num_bins)
        assert ((nan >= 0) & (nan <= last)).all()


@each_loss
@with_forms("derived", "dense")
class TestLovaszBins(LovaszTester):
    @pytest.mark.parametrize("num_bins", [1, 2, 5, 64, 1024])
    @pytest.mark.parametrize("case", CASES)
    def test_feature_bound(self, loss, case, num_bins, device):
        # The value is at most the exact loss, and at least the exact loss - largest error / num_bins.
        pred, target = make_inputs(loss, device, widest_dtype(device), scale=2.0, seed=num_bins)
        channels = pred.shape[1]
        signs = 2.0 * (target == 1).unsqueeze(1) - 1 if channels == 1 else None
        right = signs if channels == 1 else 2.0 * torch.nn.functional.one_hot(target, channels).movedim(-1, 1) - 1
        if case == "ties":
            pred = pred.round()
        elif case == "one class":
            target = torch.ones_like(target)
        elif case == "wrong":
            pred = -pred.abs() * right
        elif case == "right":
            pred = pred.abs() * right
        elif case == "extreme":
            pred = pred * 1e4
        elif case == "outlier":
            pred[0, 0, 0, 0] = 3e4
        elif case == "lone":  # a pixel with a large error, one with no error, and a background of equal errors between
            target = torch.zeros_like(target)
            target[:, 0, :2] = 1
            pred = torch.zeros_like(pred)
            pred[:, min(1, channels - 1), 0, :2] = torch.tensor([-30.0, 30.0], device=device, dtype=pred.dtype)
        elif case == "tiny":
            pred = pred * 1e-3
        for per_image in (True, False):
            options = {"per_image": per_image, "reduction": "none"}
            exact = loss(pred, target, **options)
            value = loss(pred, target, num_bins=num_bins, **options)
            assert (value <= exact * (1 + 1e-6)).all()
            assert (value >= exact - largest_error(loss, pred, target) / num_bins - 1e-6 * exact).all()
            assert value.isfinite().all()

    def test_feature_bound_where_errors_nearly_tie(self, loss, device):
        # A foreground and a background error that differ in float64 but not in float32, and a far larger error.
        dtype = widest_dtype(device)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-6
        wrong = [0.3, -0.3, 20.0] if loss is HINGE else [0.3, -0.3 + 1e-13, 9.0]
        pred = -torch.tensor(wrong, device=device, dtype=dtype).view(1, 1, 1, 3)
        target, options = torch.tensor([[[1, 0, 1]]], device=device), {}
        if loss is SOFTMAX:
            pred, options = torch.cat([-pred, torch.zeros_like(pred)], 1), {"classes": [1]}
        exact = loss(pred, target, **options)
        for num_bins in (64, 1024, 1 << 16):
            value = loss(pred, target, num_bins=num_bins, **options)
            assert value <= exact * (1 + tolerance)
            assert value >= exact - largest_error(loss, pred, target) / num_bins - tolerance

    @pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
    def test_feature_accuracy(self, loss, scale, device):
        pred, target = make_inputs(loss, device, torch.float32, (2, 128, 128), scale)
        for per_image in (True, False):
            exact, expected = value_and_grad(loss, pred, target, per_image=per_image)
            value, grad = value_and_grad(loss, pred, target, per_image=per_image, num_bins=1024)
            self.assert_close(value, exact, rtol=1e-5, atol=0.0)
            assert (grad - expected).norm() < 2e-3 * expected.norm()

    def test_feature_accuracy_of_rare_foreground(self, loss, device):
        pred, _ = make_inputs(loss, device, torch.float32, (1, 128, 128))
        target = torch.zeros(1, 128, 128, dtype=torch.long, device=device)
        target[:, 3:7, 5:9] = 1
        for scale in (0.05, 1.0, 30.0):
            exact, expected = value_and_grad(loss, pred * scale, target)
            value, grad = value_and_grad(loss, pred * scale, target, num_bins=1024)
            self.assert_close(value, exact, rtol=1e-3, atol=0.0)
            # Many errors of the sigmoid loss are close to 1, where bins are no narrower than elsewhere.
            assert (grad - expected).norm() < (0.2 if loss is SIGMOID else 2e-2) * expected.norm()

    @pytest.mark.parametrize("scale", [0.05, 1.0])
    @pytest.mark.parametrize("outlier", [30.0, 1e3, 1e6])
    def test_feature_accuracy_with_outlier(self, loss, outlier, scale, device):
        # A huge error of one background pixel must not make the bins too wide for the others.
        pred, target = make_inputs(loss, device, torch.float32, (1, 128, 128), scale)
        target[0, 0, 0] = 0
        pred[0, -1, 0, 0] = outlier
        exact, expected = value_and_grad(loss, pred, target)
        value, grad = value_and_grad(loss, pred, target, num_bins=1024)
        self.assert_close(value, exact, rtol=1e-4, atol=0.0)
        assert (grad - expected).norm() < 3e-2 * expected.norm()

    @pytest.mark.parametrize("certainty", [4.0, 8.0, 16.0])
    def test_feature_accuracy_of_a_small_loss(self, loss, certainty, device):
        # Most errors here are much smaller than 1 / num_bins, so bins of equal width would not tell them apart.
        pred, target = make_inputs(loss, device, torch.float32, (1, 128, 128))
        if loss.channels == 1:
            pred += certainty / (4 if loss is HINGE else 1) * (2.0 * target.unsqueeze(1) - 1)
        else:
            pred.scatter_add_(1, target.unsqueeze(1), torch.full_like(pred, certainty))
        pred[..., :2, 0] *= -1  # two pixels per image are wrong by as much
        exact, expected = value_and_grad(loss, pred, target)
        value, grad = value_and_grad(loss, pred, target, num_bins=1024)
        self.assert_close(value, exact, rtol=1e-4, atol=0.0)
        assert (grad - expected).norm() < 3e-3 * expected.norm()

    def test_feature_separated_errors_are_exact(self, loss, device, dtype):
        # If all foreground errors are larger than all background errors, each foreground pixel has the weight 1 / G.
        generator = torch.Generator().manual_seed(0)
        target = torch.zeros(1, 8, 9, dtype=torch.long, device=device)
        target[:, :3] = 1
        wrong = (torch.rand(1, 1, 8, 9, generator=generator) + 1).to(device, dtype)
        pred = -wrong if loss is not SOFTMAX else torch.cat([wrong, torch.zeros_like(wrong)], 1)
        options = {} if loss is not SOFTMAX else {"classes": [1]}
        exact, expected = value_and_grad(loss, pred, target, **options)
        for num_bins in (1, 1024):
            value, grad = value_and_grad(loss, pred, target, num_bins=num_bins, **options)
            self.assert_close(value, exact, rtol=2 * RTOL[dtype], atol=0.0)
            self.assert_close(grad, expected)

    def test_feature_absent_class_is_exact(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype)
        target.zero_()
        options = {} if loss is not SOFTMAX else {"classes": [1, 3]}
        for per_image in (True, False):
            exact, expected = value_and_grad(loss, pred, target, per_image=per_image, **options)
            value, grad = value_and_grad(loss, pred, target, per_image=per_image, num_bins=1, **options)
            self.assert_close(value, exact, rtol=2 * RTOL[dtype], atol=0.0)
            self.assert_close(grad, expected)

    @pytest.mark.grad
    def test_gradcheck(self, loss, device):
        pred, target = make_inputs(loss, device, widest_dtype(device), (2, 3, 4))
        self.gradcheck(lambda logits: loss(logits, target, num_bins=4096), (pred,))
        assert torch.autograd.gradgradcheck(
            lambda logits: loss(logits, target, num_bins=4096), (pred.requires_grad_(),)
        )


@each_loss
@with_forms("dense")
class TestLovaszBinsForms(LovaszTester):
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("num_bins", [3, 200])
    @pytest.mark.parametrize("learnt", [0.0, 3.0])  # with 3, few pixels have a hinge error
    def test_feature_forms_agree(self, loss, per_image, num_bins, learnt, device, monkeypatch):
        pred, target = make_inputs(loss, device, torch.float32, (3, 40, 50))
        true = 2.0 * target.unsqueeze(1) - 1.0
        pred += learnt * (true if pred.shape[1] == 1 else torch.zeros_like(pred).scatter_(1, target.unsqueeze(1), 1.0))
        target[1, :20] = -100
        value, grad = value_and_grad(loss, pred, target, num_bins=num_bins, per_image=per_image)
        for other_form, slab in (("dense", 777), ("derived", 777), ("derived", 1 << 22)):
            force_form(monkeypatch, other_form, slab)
            other, expected = value_and_grad(loss, pred, target, num_bins=num_bins, per_image=per_image)
            # The forms round the softmax differently, which can move a pixel at the edge of a bin to the next bin.
            self.assert_close(value, other, rtol=1e-6 if loss is HINGE else 1e-4, atol=0.0)
            assert (grad - expected).norm() < (2e-6 if loss is HINGE else 1e-2) * expected.norm()

    @pytest.mark.parametrize("per_image", [True, False])
    def test_functorch(self, loss, per_image, device):
        pred, target = make_inputs(loss, device, widest_dtype(device), (2, 3, 4))
        target[0, 0] = -100

        def function(logits, labels):
            return loss(logits, labels, num_bins=4096, per_image=per_image)

        preds, targets = torch.stack([pred, 2 * pred]), torch.stack([target, target.flip(1)])
        expected = torch.stack([function(*pair) for pair in zip(preds, targets)])
        self.assert_close(torch.func.vmap(function)(preds, targets), expected)
        _, grad = value_and_grad(function, pred, target)
        self.assert_close(torch.func.grad(function)(pred, target), grad)
        tangent = torch.linspace(-1, 1, pred.numel(), device=device, dtype=pred.dtype).view_as(pred)
        _, along = torch.func.jvp(lambda logits: function(logits, target), (pred,), (tangent,))
        self.assert_close(along, (grad * tangent).sum())
