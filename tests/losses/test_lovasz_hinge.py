# SPDX-License-Identifier: Apache-2.0
"""The Lovász hinge loss: what the tests shared by all losses do not cover."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kornia.core.exceptions import ShapeError
from kornia.losses import lovasz_hinge_loss

from testing.lovasz import (
    HINGE,
    INF,
    RTOL,
    LovaszTester,
    force_form,
    make_inputs,
    oracle,
    value_and_grad,
    widest_dtype,
)


class TestLovaszHingeLoss(LovaszTester):
    def test_convention_label_signs(self, device, dtype):
        pred = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 1, 0]]], device=device)  # the IoU is 1/3
        self.assert_close(lovasz_hinge_loss(pred, target).item(), 4 / 3, rtol=RTOL[dtype], atol=0.0)
        assert lovasz_hinge_loss(2.0 * (2.0 * target - 1.0).to(dtype).unsqueeze(1), target) == 0

    def test_convention_ignore_index_default(self, device, dtype):
        pred = torch.tensor([[[[1.0, 1.0, -1.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, -100]]], device=device)
        self.assert_close(lovasz_hinge_loss(pred, target).item(), 1.0, rtol=RTOL[dtype], atol=0.0)

    def test_convention_mean_over_images(self, device, dtype):
        pred = torch.ones(2, 1, 1, 2, device=device, dtype=dtype)
        target = torch.tensor([[[1, 1]], [[1, 0]]], device=device)  # losses 0 and 1
        self.assert_close(lovasz_hinge_loss(pred, target).item(), 0.5, rtol=RTOL[dtype], atol=0.0)

    def test_exception(self, device, dtype):
        pred, target = make_inputs(HINGE, device, dtype)
        with pytest.raises(ShapeError, match="Shape mismatch at dimension 1: expected 1, got 2"):
            lovasz_hinge_loss(pred.expand(-1, 2, -1, -1), target)

    @pytest.mark.parametrize("fraction", [0.0, 0.02, 0.5, 1.0])
    def test_feature_fraction_of_foreground(self, device, dtype, fraction):
        pred, target = make_inputs(HINGE, device, dtype)
        target = (torch.rand(target.shape, device=device) < fraction).long()
        value, grad = value_and_grad(lovasz_hinge_loss, pred, target)
        leaf = pred.cpu().double().requires_grad_()
        expected = oracle(HINGE, leaf, target)
        self.assert_close(value.cpu().double(), expected.detach(), rtol=2 * RTOL[dtype], atol=0.0)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        self.assert_close(grad.cpu().double(), expected_grad, rtol=2 * RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("piece", [64, 100, 1000])
    @pytest.mark.parametrize("case", ["distinct", "ties", "infinite", "absent", "right"])
    def test_feature_piece_size(self, device, dtype, case, piece, form, monkeypatch):
        pred, target = make_inputs(HINGE, device, dtype, (2, 40, 37))
        if case == "ties":
            pred = pred.sign() * 0.25
        elif case == "infinite":
            pred[:, 0, :, 2] = torch.where(target == 1, INF, -INF)[..., 2]
        elif case == "absent":
            target.zero_()
        elif case == "right":
            pred = torch.where(target == 1, 4.0, -4.0).to(dtype).unsqueeze(1)
        results = []
        for size in (1 << 20, piece):
            force_form(monkeypatch, form, size)
            results.append(value_and_grad(lovasz_hinge_loss, pred, target))
        self.assert_close(results[1][0], results[0][0], rtol=RTOL[dtype], atol=0.0)
        assert torch.equal(results[1][1], results[0][1])

    @pytest.mark.parametrize("height", [256, 1024])
    def test_feature_gradient_of_large_image(self, device, height):
        # All errors differ and are exact in float32, so their order is known. Expected weights are counted from sets.
        n = height * height
        generator = torch.Generator().manual_seed(height)
        errors = (torch.randperm(n, generator=generator) + 1).double() / n
        foreground = torch.rand(n, generator=generator) < 0.1
        pred = torch.where(foreground, 1 - errors, errors - 1).float().reshape(1, 1, height, height).to(device)
        target = foreground.long().reshape(1, height, height).to(device)
        lovasz_hinge_loss(pred.requires_grad_(), target).backward()
        gradient = pred.grad.flatten().cpu()
        total = int(foreground.sum())
        sample = torch.randperm(n, generator=generator)[:300].tolist()
        for i in [*sample, int(errors.argmin()), int(errors.argmax())]:
            above = errors > errors[i]
            k, m = int((above & foreground).sum()), int((above & ~foreground).sum())
            before = 1 - Fraction(total - k, total + m)
            after = 1 - (Fraction(total - k - 1, total + m) if foreground[i] else Fraction(total - k, total + m + 1))
            weight = float(before - after) if foreground[i] else float(after - before)
            assert gradient[i].item() == pytest.approx(weight, rel=1e-6)

    def test_feature_loss_of_large_image(self, device):
        # Half of the pixels are wrong with the same error, so the exact loss is known.
        target = torch.zeros(1, 1024, 1024, dtype=torch.long, device=device)
        target[:, :256] = 1
        pred = torch.where(target == 1, 1.0, -1.0)[:, None].clone()
        pred[..., 1::2] *= -1.0
        expected = 2 * (1 - Fraction(256 * 512, 256 * 1024 + 768 * 512))
        assert lovasz_hinge_loss(pred, target).item() == pytest.approx(float(expected), rel=1e-6)

    def test_feature_perfect_prediction(self, device, dtype):
        pred, target = make_inputs(HINGE, device, dtype)
        pred = torch.where(target == 1, 1.0, -1.0)[:, None] * (pred.abs() + 1)
        pred = pred.to(dtype).requires_grad_()
        loss = lovasz_hinge_loss(pred, target)
        assert loss == 0
        loss.backward()
        assert (pred.grad == 0).all()

    def test_feature_zero_error(self, device, dtype):
        """A pixel with an error of exactly 0 has gradient 0, even if its weight is not 0."""
        _, target = make_inputs(HINGE, device, dtype)
        pred = torch.where(target == 1, 1.0, -1.0)[:, None].to(dtype)
        pred[:, 0, 0, 0] *= -1  # one wrong pixel in each image
        lovasz_hinge_loss(pred.requires_grad_(), target).backward()
        assert (pred.grad[:, 0, 0, 0] != 0).all()
        assert (pred.grad != 0).sum() == len(pred)

    def test_feature_absent_foreground(self, device, dtype):
        pred, _ = make_inputs(HINGE, device, dtype, (1, 4, 4))
        pred[0, 0, 2, 1] = 3.0
        loss = lovasz_hinge_loss(pred.requires_grad_(), torch.zeros(1, 4, 4, device=device))
        assert loss == 4
        loss.backward()
        assert pred.grad[0, 0, 2, 1] == 1
        assert pred.grad.abs().sum() == 1

    @pytest.mark.parametrize("inf", [INF, -INF])
    def test_feature_infinite_logits(self, device, dtype, inf):
        pred, target = make_inputs(HINGE, device, dtype, (1, 3, 4))
        target[0, 0, 0] = 1 if inf > 0 else 0
        right, wrong = pred.clone(), pred.clone()
        right[0, 0, 0, 0] = inf
        wrong[0, 0, 0, 0] = -inf
        finite = pred.clone()
        finite[0, 0, 0, 0] = 100.0 if inf > 0 else -100.0
        loss = lovasz_hinge_loss(right.requires_grad_(), target)
        self.assert_close(loss, lovasz_hinge_loss(finite, target), rtol=0.0, atol=0.0)
        loss.backward()
        assert right.grad[0, 0, 0, 0] == 0
        assert torch.isfinite(right.grad).all()
        assert lovasz_hinge_loss(wrong, target) == INF

    def test_feature_infinite_ties(self, device, dtype):
        # In one order of the two infinite errors the background pixel has weight 0, and 0 * inf is nan.
        pred = torch.tensor([[[[-INF, INF, 0.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 0]]], device=device)
        assert lovasz_hinge_loss(pred, target) == INF
        assert lovasz_hinge_loss(pred.flip(-1), target.flip(-1)) == INF

    def test_feature_tiny_loss(self, device):
        # A single error of 2**-20: the rounding of the other 4095 pixels must not hide it.
        pred = torch.ones(1, 1, 64, 64, device=device)
        target = torch.ones(1, 64, 64, device=device)
        pred[0, 0, 3, 3] = 1 - 2.0**-20
        assert lovasz_hinge_loss(pred, target).item() == pytest.approx(2.0**-20 / 64**2, rel=1e-6)

    def test_feature_ignored_column(self, device):
        # Ignoring a column gives the same loss as removing it.
        generator = torch.Generator().manual_seed(0)
        pred = torch.randn(1, 1, 4096, 3, generator=generator).to(device)
        target = torch.randint(0, 2, (1, 4096, 3), generator=generator).to(device)
        target[:, :, 0] = -100
        value = lovasz_hinge_loss(pred, target)
        self.assert_close(value, lovasz_hinge_loss(pred[..., 1:], target[..., 1:]), rtol=1e-6, atol=0.0)

    @pytest.mark.grad
    def test_gradcheck_labels(self, device):
        # Labels that require a gradient are not checked, because gradcheck moves them by a small step.
        pred, target = make_inputs(HINGE, device, widest_dtype(device))
        labels = target.to(pred.dtype)
        self.gradcheck(lovasz_hinge_loss, (pred, torch.zeros_like(labels)))
        learnt = lovasz_hinge_loss(pred, labels.clone().requires_grad_())
        assert learnt == lovasz_hinge_loss(pred, target)
        with pytest.raises(ValueError, match="0 for the background and 1 for the foreground"):
            lovasz_hinge_loss(pred, labels / 2)

    def test_exception_under_functorch(self):
        # Labels that are not mapped over have values inside a transform, so they are checked.
        pred, target = make_inputs(HINGE, "cpu", torch.float64)
        for transformed in (
            lambda labels: torch.func.grad(lambda x: lovasz_hinge_loss(x, labels))(pred),
            lambda labels: torch.func.jvp(lambda x: lovasz_hinge_loss(x, labels.float()), (pred,), (pred,)),
            lambda labels: torch.func.vmap(lambda x: lovasz_hinge_loss(x[None], labels[:1]))(pred),
        ):
            transformed(target)
            with pytest.raises(ValueError, match=r"0 for the background and 1 for the foreground.*Got: \[2"):
                transformed(target + 1)

    def test_exception_8_bit_labels(self, dtype):
        # In 8 bits, -100 is 156 and 255 is -1. Labels of 156 and -1 are not those to ignore.
        pred = torch.zeros(1, 1, 1, 2, dtype=dtype)
        with pytest.raises(ValueError, match=r"Got: \[156\]"):
            lovasz_hinge_loss(pred, torch.tensor([[[156, 1]]], dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"Got: \[-1\]"):
            lovasz_hinge_loss(pred, torch.tensor([[[-1, 1]]], dtype=torch.int8), ignore_index=255)

    @pytest.mark.parametrize("ignore_index", [-100, None, 255])
    @pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
    def test_exception_not_binary(self, dtype, label_dtype, ignore_index):
        pred, target = make_inputs(HINGE, "cpu", dtype)
        target[0, 0, 0] = 2
        with pytest.raises(ValueError, match=r"0 for the background and 1 for the foreground.*Got: \[2"):
            lovasz_hinge_loss(pred, target.to(label_dtype), ignore_index=ignore_index)
