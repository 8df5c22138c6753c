# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch

from kornia.core._compat import torch_version_ge
from kornia.core.exceptions import ShapeError
from kornia.losses import LovaszHingeLoss, _lovasz_dispatch, lovasz_hinge_loss

from testing.base import BaseTester

# Rounding of a result whose inputs are exact: the computation itself is at least float32.
RTOL = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-6, torch.float64: 1e-13}


def jaccard_loss(wrong: set[int], foreground: set[int]) -> Fraction:
    """The set function by its definition: 1 - IoU of the prediction that is wrong exactly on ``wrong``."""
    predicted = foreground ^ wrong
    union = foreground | predicted
    return 1 - Fraction(len(foreground & predicted), len(union)) if union else Fraction(0)


def hinge_errors(pred: torch.Tensor, target: torch.Tensor) -> list[Fraction]:
    """Hinge errors of one image, in exact arithmetic."""
    signs = [1 if t == 1 else -1 for t in target.flatten().tolist()]
    return [max(Fraction(0), 1 - Fraction(z) * s) for z, s in zip(pred.flatten().tolist(), signs)]


def foreground_of(target: torch.Tensor) -> set[int]:
    return {i for i, t in enumerate(target.flatten().tolist()) if t == 1}


def oracle(pred: torch.Tensor, target: torch.Tensor) -> Fraction:
    """The loss of one image: the integral over t of the Jaccard loss of {errors > t}, one subset after the other."""
    errors, foreground = hinge_errors(pred, target), foreground_of(target)
    levels = sorted({Fraction(0), *errors})
    return sum(
        (
            (high - low) * jaccard_loss({i for i, e in enumerate(errors) if e > low}, foreground)
            for low, high in zip(levels, levels[1:])
        ),
        Fraction(0),
    )


def oracle_gradient(pred: torch.Tensor, target: torch.Tensor) -> list[float]:
    """The gradient of one image whose positive errors differ: growing the wrong set by one pixel at a time."""
    errors, foreground = hinge_errors(pred, target), foreground_of(target)
    gradient, wrong = [0.0] * len(errors), set()
    for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
        if errors[i] > 0:
            step = jaccard_loss(wrong | {i}, foreground) - jaccard_loss(wrong, foreground)
            gradient[i] = float(-step if i in foreground else step)
        wrong.add(i)
    return gradient


def make_inputs(device, dtype, shape=(3, 7, 9), fraction=0.4, seed=0):
    """Logits that are exact in every dtype (few bits), and labels with about ``fraction`` foreground."""
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(-20, 21, (shape[0], 1, *shape[1:]), generator=generator) / 8
    target = (torch.rand(shape, generator=generator) < fraction).long()
    return pred.to(device, dtype), target.to(device)


def make_distinct(device, dtype, height=3, width=5, seed=0):
    """One image whose errors differ pairwise, exact in every dtype."""
    n = height * width
    generator = torch.Generator().manual_seed(seed)
    pred = (torch.randperm(n, generator=generator) * 2 - n) / 8 + 1 / 16
    target = (torch.rand(n, generator=generator) < 0.5).long()
    errors = hinge_errors(pred, target)
    assert len(set(errors) - {0}) == sum(e > 0 for e in errors)
    return pred.reshape(1, 1, height, width).to(device, dtype), target.reshape(1, height, width).to(device)


def force_form(monkeypatch, form):
    """Have a form compute every loss that it can: what must be traced is, and nothing is ranked where nothing is."""
    usual = _lovasz_dispatch.form_of

    def form_of(logits, *others):
        return form if logits.numel() > 0 and usual(logits, *others) != "traced" else usual(logits, *others)

    monkeypatch.setattr("kornia.losses._lovasz_dispatch.form_of", form_of)


@pytest.fixture(autouse=True, params=["traced", "fast", "dense"])
def form(request, monkeypatch):
    """Every test runs with each form that computes the loss, whatever the size of its inputs, and in small slabs."""
    torch.manual_seed(0)
    force_form(monkeypatch, request.param)
    monkeypatch.setattr("kornia.losses._lovasz_fast._SLAB", 500)
    monkeypatch.setattr("kornia.losses._lovasz_bins._slab_size", lambda errors: 100)
    monkeypatch.setattr("kornia.losses._lovasz_rank._MIN_DIGITS", 4)


# Compiled code takes the traced form: comparing it with eager code is enough, once.
sparse_only = pytest.mark.parametrize("form", ["dense"], indirect=True)


class TestLovaszHingeLoss(BaseTester):
    def test_smoke(self, device, dtype):
        pred = torch.randn(2, 1, 3, 4, device=device, dtype=dtype, requires_grad=True)
        target = torch.randint(0, 2, (2, 3, 4), device=device)
        loss = lovasz_hinge_loss(pred, target)
        assert loss.shape == ()
        assert loss.dtype == dtype
        assert loss.device == pred.device
        loss.backward()
        assert pred.grad.shape == pred.shape
        assert pred.grad.dtype == dtype

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (4, 2, 1), (0, 3, 2), (2, 0, 3)])
    def test_cardinality(self, device, dtype, shape, per_image, reduction):
        pred, target = make_inputs(device, dtype, shape)
        loss = lovasz_hinge_loss(pred.requires_grad_(), target, per_image=per_image, reduction=reduction)
        groups = shape[0] if per_image else 1
        assert loss.shape == ((groups,) if reduction == "none" else ())
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert grad.shape == pred.shape
        assert torch.isfinite(grad).all()
        if target.numel() == 0:
            self.assert_close(loss, torch.zeros_like(loss), rtol=0.0, atol=0.0)

    def test_exception(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 3, 4))
        with pytest.raises(ShapeError, match="expected 4 dimensions, got 3"):
            lovasz_hinge_loss(pred[:, 0], target)
        with pytest.raises(ShapeError, match="Shape mismatch at dimension 1: expected 1, got 2"):
            lovasz_hinge_loss(pred.expand(-1, 2, -1, -1), target)
        with pytest.raises(ShapeError, match="expected 3 dimensions, got 4"):
            lovasz_hinge_loss(pred, target[:, None])
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            lovasz_hinge_loss(pred, target[..., :-1])
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            lovasz_hinge_loss(pred[:1], target)
        with pytest.raises(ValueError, match="pred and target must be in the same device"):
            lovasz_hinge_loss(pred, target.to("meta"))
        with pytest.raises(ValueError, match=r"reduction must be 'mean', 'sum' or 'none'\. Got: 'average'"):
            lovasz_hinge_loss(pred, target, reduction="average")
        with pytest.raises((AttributeError, TypeError)):
            lovasz_hinge_loss(pred.tolist(), target)
        with pytest.raises(TypeError):
            lovasz_hinge_loss(pred, target, 255)  # the options are keyword-only

    @pytest.mark.parametrize("ignore_index", [-100, None, 255])
    @pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.float32, torch.float16])
    def test_exception_not_binary(self, dtype, label_dtype, ignore_index):
        pred, target = make_inputs("cpu", dtype)
        target[0, 0, 0] = 2
        with pytest.raises(ValueError, match=r"0 for the background and 1 for the foreground.*Got: \[2"):
            lovasz_hinge_loss(pred, target.to(label_dtype), ignore_index=ignore_index)

    def test_exception_narrow_labels(self, dtype):
        # -100 is 156 modulo 256, and 255 is -1: neither is in these tensors
        pred = torch.zeros(1, 1, 1, 2, dtype=dtype)
        with pytest.raises(ValueError, match=r"Got: \[156\]"):
            lovasz_hinge_loss(pred, torch.tensor([[[156, 1]]], dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"Got: \[-1\]"):
            lovasz_hinge_loss(pred, torch.tensor([[[-1, 1]]], dtype=torch.int8), ignore_index=255)

    @pytest.mark.parametrize("fraction", [0.0, 0.02, 0.4, 1.0])
    def test_feature_oracle(self, device, dtype, fraction):
        pred, target = make_inputs(device, dtype, fraction=fraction)
        expected = torch.tensor([float(oracle(p, t)) for p, t in zip(pred, target)], device=device, dtype=dtype)
        actual = lovasz_hinge_loss(pred, target, reduction="none")
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)
        self.assert_close(lovasz_hinge_loss(pred, target), actual.mean(), rtol=2 * RTOL[dtype], atol=0.0)
        total = lovasz_hinge_loss(pred, target, reduction="sum")
        self.assert_close(total, actual.sum(), rtol=2 * RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("seed", range(5))
    def test_feature_oracle_gradient(self, device, dtype, seed):
        pred, target = make_distinct(device, dtype, seed=seed)
        lovasz_hinge_loss(pred.requires_grad_(), target).backward()
        expected = torch.tensor(oracle_gradient(pred, target), device=device, dtype=dtype).reshape(pred.shape)
        self.assert_close(pred.grad, expected, rtol=RTOL[dtype], atol=0.0)

    def test_feature_iou_of_hard_logits(self, device, dtype):
        # logits of +-1 have errors 0 and 2: the loss is twice the Jaccard loss of the prediction
        pred, target = make_inputs(device, dtype, (2, 6, 6))
        pred = torch.where(pred > 0, 1.0, -1.0).to(dtype)
        inside = ((pred[:, 0] > 0) & (target == 1)).sum((1, 2)).double()
        union = ((pred[:, 0] > 0) | (target == 1)).sum((1, 2)).double()
        actual = lovasz_hinge_loss(pred, target, reduction="none")
        self.assert_close(actual.double(), 2 * (1 - inside / union), rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("height", [256, 1024])
    def test_feature_gradient_of_large_image(self, device, height):
        # Errors that differ pairwise and are exact in float32, so that the order is known; weights from set sizes.
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
        # half of the pixels are wrong at one error: a sum of 2**20 weights, whose value is known exactly
        target = torch.zeros(1, 1024, 1024, dtype=torch.long, device=device)
        target[:, :256] = 1
        pred = torch.where(target == 1, 1.0, -1.0)[:, None].clone()
        pred[..., 1::2] *= -1.0
        expected = 2 * (1 - Fraction(256 * 512, 256 * 1024 + 768 * 512))
        assert lovasz_hinge_loss(pred, target).item() == pytest.approx(float(expected), rel=1e-6)

    def test_feature_ties(self, device, dtype):
        # any order of equal errors is a valid subgradient; the loss and the sum of the weights know no order
        pred, target = make_inputs(device, dtype, (1, 8, 8))
        pred = torch.full_like(pred, 0.5)
        order = torch.randperm(64, device=device)
        shuffled = target.flatten()[order].reshape(target.shape)
        self.assert_close(
            lovasz_hinge_loss(pred, target), lovasz_hinge_loss(pred, shuffled), rtol=RTOL[dtype], atol=0.0
        )
        expected = torch.tensor(float(oracle(pred, target)), device=device, dtype=dtype)
        self.assert_close(lovasz_hinge_loss(pred, target), expected, rtol=RTOL[dtype], atol=0.0)

    def test_feature_all_right(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        pred = torch.where(target == 1, 1.0, -1.0)[:, None] * (pred.abs() + 1)
        pred = pred.to(dtype).requires_grad_()
        loss = lovasz_hinge_loss(pred, target)
        assert loss == 0
        loss.backward()
        assert (pred.grad == 0).all()

    def test_feature_absent_foreground(self, device, dtype):
        pred, _ = make_inputs(device, dtype, (1, 4, 4))
        pred[0, 0, 2, 1] = 3.0
        loss = lovasz_hinge_loss(pred.requires_grad_(), torch.zeros(1, 4, 4, device=device))
        assert loss == 4
        loss.backward()
        assert pred.grad[0, 0, 2, 1] == 1
        assert pred.grad.abs().sum() == 1

    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("ignore_index", [-100, 255, 0, 1])
    def test_feature_ignored_pixels_do_not_exist(self, device, dtype, ignore_index, per_image):
        pred, target = make_inputs(device, dtype, (2, 3, 8))
        target[:, :, 5:] = ignore_index
        if ignore_index in (0, 1):  # leave no other pixel with the ignored label
            target[:, :, :5] = 1 - ignore_index
        pred[..., 5] = float("nan")
        pred[..., 6] = float("inf")
        pred.requires_grad_()
        kept = pred.detach()[..., :5].clone().requires_grad_()
        loss = lovasz_hinge_loss(pred, target, ignore_index=ignore_index, per_image=per_image)
        expected = lovasz_hinge_loss(kept, target[..., :5], ignore_index=None, per_image=per_image)
        self.assert_close(loss, expected, rtol=RTOL[dtype], atol=0.0)
        loss.backward()
        expected.backward()
        self.assert_close(pred.grad[..., :5], kept.grad, rtol=RTOL[dtype], atol=0.0)
        assert (pred.grad[..., 5:] == 0).all()

    def test_feature_scattered_ignored_pixels(self, device, dtype):
        pred, target = make_inputs(device, dtype, (1, 9, 9))
        ignored = torch.rand(target.shape, device=device) < 0.4
        kept = ~ignored[0]
        expected = lovasz_hinge_loss(pred[:, :, kept][..., None], target[:, kept][..., None])
        actual = lovasz_hinge_loss(pred, target.masked_fill(ignored, 7), ignore_index=7)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("per_image", [True, False])
    def test_feature_group_without_valid_pixel(self, device, dtype, per_image):
        pred, target = make_inputs(device, dtype, (2, 3, 4))
        target[0] = -100
        if not per_image:
            target[1] = -100
        loss = lovasz_hinge_loss(pred.requires_grad_(), target, reduction="none", per_image=per_image)
        assert loss[0] == 0
        loss.sum().backward()
        assert (pred.grad[0] == 0).all()
        assert per_image == bool((pred.grad[1] != 0).any())

    def test_feature_per_image(self, device, dtype):
        pred, target = make_inputs(device, dtype, (3, 4, 5))
        images = torch.stack([lovasz_hinge_loss(p[None], t[None]) for p, t in zip(pred, target)])
        self.assert_close(lovasz_hinge_loss(pred, target, reduction="none"), images, rtol=RTOL[dtype], atol=0.0)
        one_image = lovasz_hinge_loss(pred.reshape(1, 1, 12, 5), target.reshape(1, 12, 5))
        batch = lovasz_hinge_loss(pred, target, per_image=False)
        self.assert_close(batch, one_image, rtol=RTOL[dtype], atol=0.0)

    def test_feature_per_image_gradient(self, device, dtype):
        pred, target = make_distinct(device, dtype, 4, 5)
        batch = pred.reshape(2, 1, 2, 5).requires_grad_()
        lovasz_hinge_loss(batch, target.reshape(2, 2, 5), per_image=False).backward()
        expected = torch.tensor(oracle_gradient(pred, target), device=device, dtype=dtype)
        self.assert_close(batch.grad.flatten(), expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize(
        "label_dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float64]
    )
    def test_feature_label_dtypes(self, device, dtype, label_dtype):
        pred, target = make_inputs(device, dtype)
        self.assert_close(
            lovasz_hinge_loss(pred, target.to(label_dtype)), lovasz_hinge_loss(pred, target), rtol=0.0, atol=0.0
        )

    @pytest.mark.parametrize("pred_dtype", [torch.int64, torch.uint8, torch.bool])
    def test_feature_integer_pred(self, device, pred_dtype):
        pred = torch.tensor([[[[0, 1, 1, 0]]]], device=device)
        target = torch.tensor([[[1, 1, 0, 0]]], device=device)
        loss = lovasz_hinge_loss(pred.to(pred_dtype), target)
        assert loss.dtype == torch.float32
        self.assert_close(loss.item(), float(oracle(pred, target)), rtol=1e-6, atol=0.0)

    def test_feature_nan(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 3, 4))
        pred[0, 0, 1, 1] = float("nan")
        loss = lovasz_hinge_loss(pred, target, reduction="none")
        assert torch.isnan(loss[0])
        assert torch.isfinite(loss[1])
        assert torch.isnan(lovasz_hinge_loss(pred, target, per_image=False))

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("label", [0, 1])
    def test_feature_nan_of_either_sign(self, device, dtype, label, sign):
        # whatever its sign bit, a nan must not rank where the weight is 0 and then count as nothing
        pred = torch.tensor([[[[-4.0, 3.0, 2.0, 0.0]]]], device=device, dtype=dtype)
        pred[..., 3] = torch.copysign(torch.tensor(float("nan")), torch.tensor(sign))
        target = torch.tensor([[[1, 0, 0, label]]], device=device)
        assert torch.isnan(lovasz_hinge_loss(pred, target))

    @pytest.mark.parametrize("inf", [float("inf"), float("-inf")])
    def test_feature_infinite_logits(self, device, dtype, inf):
        pred, target = make_inputs(device, dtype, (1, 3, 4))
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
        assert lovasz_hinge_loss(wrong, target) == float("inf")

    def test_feature_infinite_ties(self, device, dtype):
        # the background pixel has weight 0 in one order of the two infinite errors, and 0 * inf is not a number
        pred = torch.tensor([[[[float("-inf"), float("inf"), 0.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 0]]], device=device)
        assert lovasz_hinge_loss(pred, target) == float("inf")
        assert lovasz_hinge_loss(pred.flip(-1), target.flip(-1)) == float("inf")

    def test_feature_tiny_loss(self, device):
        # one error of 2**-20 on a large image: the loss must not drown in the rounding of the others
        pred = torch.ones(1, 1, 64, 64, device=device)
        target = torch.ones(1, 64, 64, device=device)
        pred[0, 0, 3, 3] = 1 - 2.0**-20
        assert lovasz_hinge_loss(pred, target).item() == pytest.approx(2.0**-20 / 64**2, rel=1e-6)

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_feature_half_precision_counts(self, device, half):
        # 2**17 foreground pixels: more than either half precision can count, or even hold in float16
        pred = torch.full((1, 1, 512, 512), -1.0, device=device, dtype=half, requires_grad=True)
        target = torch.zeros(1, 512, 512, device=device)
        target[:, :256] = 1
        loss = lovasz_hinge_loss(pred, target)
        self.assert_close(loss.item(), 2.0, rtol=RTOL[half], atol=0.0)
        loss.backward()
        self.assert_close(pred.grad.double().sum().item(), -1.0, rtol=0.05, atol=0.0)

    @pytest.mark.parametrize("options", [{}, {"per_image": False, "ignore_index": 0}])
    def test_feature_rankings_agree(self, device, dtype, options, monkeypatch):
        # the same gradient from each form, the direct one away from the CPU, and the sparse way in pieces of any length
        pred, target = make_inputs(device, dtype, (2, 40, 50))
        pred = pred + torch.rand(pred.shape, device=device, dtype=dtype)
        results = []
        slabs = [("fast", slab, digits) for slab, digits in ((7, 4), (1000, 1 << 12), (1 << 20, 1))]
        for form, slab, digits in (("traced", 1, 1 << 30), ("dense", 1, 1 << 30), ("dense", 1, 4), *slabs):
            with monkeypatch.context() as patch:
                force_form(patch, form)
                patch.setattr("kornia.losses._lovasz_fast._SLAB", slab)
                patch.setattr("kornia.losses._lovasz_rank._MIN_DIGITS", digits)
                leaf = pred.clone().requires_grad_()
                loss = lovasz_hinge_loss(leaf, target, **options)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        for loss, grad in results[1:]:
            self.assert_close(loss, results[0][0], rtol=RTOL[dtype], atol=0.0)
            self.assert_close(grad.double().sum(), results[0][1].double().sum(), rtol=1e-2, atol=1e-5)
            if dtype in (torch.float32, torch.float64):  # few logits are equal there
                difference = (grad - results[0][1]).norm() / results[0][1].norm()
                assert difference < (1e-5 if dtype == torch.float32 else 1e-12)

    @sparse_only
    @pytest.mark.parametrize("length", [1, 3, 10])
    @pytest.mark.parametrize("case", ["distinct", "ties", "infinite", "absent", "right"])
    def test_feature_sorted_in_parts(self, device, dtype, case, length, monkeypatch):
        # dividing the errors by their size before sorting changes nothing
        pred, target = make_distinct(device, dtype, 9, 7)
        if case == "ties":
            pred = pred.sign() * 0.25
        elif case == "infinite":
            pred[..., 2] = torch.where(target == 1, float("inf"), float("-inf"))[..., 2]
        elif case == "absent":
            target.zero_()
        elif case == "right":
            pred = torch.where(target == 1, 4.0, -4.0).to(dtype).unsqueeze(1)
        results = []
        for least in (1 << 20, length):
            monkeypatch.setattr("kornia.losses._lovasz_fast._SLAB", least)
            leaf = pred.clone().requires_grad_()
            loss = lovasz_hinge_loss(leaf, target)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        self.assert_close(results[1][0], results[0][0], rtol=RTOL[dtype], atol=0.0)
        self.assert_close(results[1][1], results[0][1], rtol=0.0, atol=0.0)

    def test_feature_permuted_target(self, device, dtype):
        # of any layout, and with a gradient that has to be scaled
        pred, target = make_inputs(device, dtype, (3, 5, 6))
        permuted = target.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        grads = []
        for labels in (target, permuted):
            leaf = pred.clone().requires_grad_()
            (2 * lovasz_hinge_loss(leaf, labels)).backward()
            grads.append(leaf.grad)
        self.assert_close(*grads)

    def test_feature_right_column(self, device, monkeypatch):
        # parts are divided by a sample of the pixels, which can miss all that are wrong
        monkeypatch.setattr("kornia.losses._lovasz_fast._SLAB", 100)
        generator = torch.Generator().manual_seed(0)
        pred = torch.randn(1, 1, 4096, 3, generator=generator).to(device)
        target = torch.randint(0, 2, (1, 4096, 3), generator=generator).to(device)
        target[:, :, 0] = -100
        value = lovasz_hinge_loss(pred, target)
        self.assert_close(value, lovasz_hinge_loss(pred[..., 1:], target[..., 1:]), rtol=1e-6, atol=0.0)

    def test_feature_batched_gradients(self, device):
        # torch.func.vmap over torch.autograd.grad, as its documentation has it
        pred, target = make_inputs(device, torch.float64, (3, 5, 6))
        pred.requires_grad_()
        losses = lovasz_hinge_loss(pred, target, reduction="none")
        (expected,) = torch.autograd.grad(losses.sum(), pred, retain_graph=True)
        units = torch.eye(len(losses), device=device, dtype=losses.dtype)
        grads = torch.func.vmap(lambda unit: torch.autograd.grad(losses, pred, unit, retain_graph=True)[0])(units)
        self.assert_close(grads.sum(0), expected)

    def test_feature_changes_before_backward(self, device):
        # the logits may change once the loss is there; labels that a second backward would need may not, unnoticed
        pred, target = make_inputs(device, torch.float64, (3, 5, 6))
        leaf = pred.clone().requires_grad_()
        (expected,) = torch.autograd.grad(lovasz_hinge_loss(leaf, target), leaf)
        logits = leaf.clone()
        loss = lovasz_hinge_loss(logits, target)
        with torch.no_grad():
            logits.sigmoid_()
        is_direct = "Eager" in str(loss.grad_fn)
        if is_direct:
            loss.backward()
            self.assert_close(leaf.grad, expected)
        loss = lovasz_hinge_loss(leaf, target)
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        target.zero_()
        if is_direct:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, leaf)
        else:
            self.assert_close(torch.autograd.grad(loss, leaf)[0], first)

    def test_feature_repeated_backward(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        pred.requires_grad_()
        losses = lovasz_hinge_loss(pred, target, reduction="none")
        upstream = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=dtype)
        (first,) = torch.autograd.grad(losses, pred, torch.ones_like(losses), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(losses, pred, torch.ones_like(losses), retain_graph=True)
        (scaled,) = torch.autograd.grad(losses, pred, upstream)
        assert torch.equal(first, second)
        assert torch.equal(first, kept)
        assert first.data_ptr() != second.data_ptr()
        self.assert_close(scaled, first * upstream.view(-1, 1, 1, 1), rtol=2 * RTOL[dtype], atol=1e-7)

    def test_feature_part_of_a_sum(self, device, dtype):
        # mixed with another loss, through a network, and accumulated over steps
        pred, target = make_inputs(device, dtype)
        scale = torch.full((), 1.5, device=device, dtype=dtype, requires_grad=True)
        (lovasz_hinge_loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        once = scale.grad.clone()
        (lovasz_hinge_loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        self.assert_close(scale.grad, 2 * once)
        leaf = (pred * 1.5).requires_grad_()
        lovasz_hinge_loss(leaf, target).backward()
        expected = (0.25 * leaf.grad * pred).sum() + 2 * 1.5 * pred.square().mean()
        self.assert_close(once, expected, rtol=4 * RTOL[dtype] + 1e-5, atol=1e-4)

    def test_feature_without_gradient(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = -100
        pred.requires_grad_()
        for options in ({}, {"per_image": False}, {"reduction": "none"}):
            expected = lovasz_hinge_loss(pred, target, **options)
            assert expected.requires_grad
            assert torch.equal(lovasz_hinge_loss(pred.detach(), target, **options), expected)
            with torch.no_grad():
                assert torch.equal(lovasz_hinge_loss(pred, target, **options), expected)
            with torch.inference_mode():
                assert torch.equal(lovasz_hinge_loss(pred, target, **options), expected)

    def test_noncontiguous(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 6, 8))
        expected = lovasz_hinge_loss(pred, target)
        strided = pred.transpose(2, 3).contiguous().transpose(2, 3)
        labels = target.transpose(1, 2).contiguous().transpose(1, 2)
        assert not strided.is_contiguous()
        self.assert_close(lovasz_hinge_loss(strided, labels), expected, rtol=RTOL[dtype], atol=0.0)
        channels_last = pred.to(memory_format=torch.channels_last)
        self.assert_close(lovasz_hinge_loss(channels_last, target), expected, rtol=RTOL[dtype], atol=0.0)

    def test_inputs_unchanged(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = -100
        copies = pred.clone(), target.clone()
        lovasz_hinge_loss(pred.requires_grad_(), target).backward()
        assert torch.equal(pred, copies[0])
        assert torch.equal(target, copies[1])

    @pytest.mark.parametrize("options", [{}, {"per_image": False, "ignore_index": 255}])
    def test_deterministic(self, device, dtype, options):
        pred, target = make_inputs(device, dtype, (2, 40, 40))
        target[0, :3] = options.get("ignore_index", -100)
        results = []
        torch.use_deterministic_algorithms(True)
        try:
            for _ in range(3):
                leaf = pred.clone().requires_grad_()
                loss = lovasz_hinge_loss(leaf, target, **options)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        finally:
            torch.use_deterministic_algorithms(False)
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(grad, results[0][1])

    def test_autocast(self, device):
        pred, target = make_inputs(device, torch.float32)
        expected = lovasz_hinge_loss(pred, target)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = lovasz_hinge_loss(pred, target)
        assert actual.dtype == torch.float32
        self.assert_close(actual, expected, rtol=1e-6, atol=0.0)

    OPTIONS = (
        {},
        {"per_image": False},
        {"reduction": "none"},
        {"ignore_index": 255, "reduction": "sum"},
        {"ignore_index": None},
    )

    def make_options_inputs(self, device, options, height=3, width=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        pred = 2 * torch.randn(2, 1, height, width, dtype=torch.float64, generator=generator)
        target = torch.randint(0, 2, (2, height, width), generator=generator)
        if options.get("ignore_index", -100) is not None:
            target[0, 1] = options.get("ignore_index", -100)
        return pred.to(device), target.to(device)

    @pytest.mark.grad
    @pytest.mark.parametrize("options", OPTIONS)
    def test_gradcheck(self, device, options):
        pred, target = self.make_options_inputs(device, options)
        pred.requires_grad_()

        def loss(x):
            return lovasz_hinge_loss(x, target, **options)

        self.gradcheck(loss, pred, fast_mode=False, check_forward_ad=True, check_batched_grad=True)
        # piecewise linear: the second derivative exists, and is 0
        assert torch.autograd.gradgradcheck(loss, pred, check_fwd_over_rev=True)

    @pytest.mark.grad
    def test_gradcheck_labels(self, device):
        # labels that require a gradient may move away from 0 a little, as in a check of the gradient of all inputs
        pred, target = self.make_options_inputs(device, {"ignore_index": None})
        self.gradcheck(lovasz_hinge_loss, (pred, target.new_zeros(target.shape).double()))
        with pytest.raises(ValueError, match="0 for the background and 1 for the foreground"):
            lovasz_hinge_loss(pred, target.double() / 2)

    @pytest.mark.parametrize("options", OPTIONS)
    def test_functorch(self, device, options):
        pred, target = self.make_options_inputs(device, options)
        leaf = pred.clone().requires_grad_()
        value = lovasz_hinge_loss(leaf, target, **options).sum()
        (gradient,) = torch.autograd.grad(value, leaf)

        def loss(x):
            return lovasz_hinge_loss(x, target, **options).sum()

        self.assert_close(torch.func.grad(loss)(pred), gradient, rtol=1e-12, atol=0.0)
        tangent = torch.randn_like(pred)
        primal, derivative = torch.func.jvp(loss, (pred,), (tangent,))
        self.assert_close(primal, value.detach(), rtol=1e-12, atol=0.0)
        self.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-12, atol=1e-12)
        assert (torch.func.hessian(loss)(pred) == 0).all()
        if options.get("per_image", True):
            single = torch.func.vmap(lambda x, t: lovasz_hinge_loss(x[None], t[None], **options).sum())(pred, target)
            expected = lovasz_hinge_loss(pred, target, **{**options, "reduction": "none"})
            self.assert_close(single, expected, rtol=1e-12, atol=0.0)

    @sparse_only
    @pytest.mark.parametrize(("options", "dynamic"), [({}, False), *((options, True) for options in OPTIONS)])
    def test_dynamo(self, device, torch_optimizer, options, dynamic):
        compiled = torch_optimizer(LovaszHingeLoss(**options), fullgraph=True, dynamic=dynamic)
        for step, (height, width) in enumerate([(6, 9), (5, 11), (8, 3)] if dynamic else [(6, 9)] * 2):
            pred, target = self.make_options_inputs(device, options, height, width, seed=step)
            pred = pred.float().requires_grad_()
            expected = lovasz_hinge_loss(pred, target, **options)
            (expected_grad,) = torch.autograd.grad(expected.sum(), pred)
            # the first step may compile, no later one
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                actual = compiled(pred, target)
                (grad,) = torch.autograd.grad(actual.sum(), pred)
            self.assert_close(actual, expected, rtol=1e-6, atol=0.0)
            self.assert_close(grad, expected_grad, rtol=1e-6, atol=1e-9)

    @sparse_only
    @pytest.mark.skipif(not torch_version_ge(2, 9), reason="Inductor drops asserts before PyTorch 2.9")
    def test_dynamo_exception(self, torch_optimizer, optimizer_backend):
        compiled = torch_optimizer(lovasz_hinge_loss, fullgraph=True)
        pred, target = make_inputs("cpu", torch.float32)
        with pytest.raises(RuntimeError, match="0 for the background and 1 for the foreground"):
            compiled(pred, target + 1)

    @pytest.mark.jit
    @sparse_only
    def test_dynamo_dynamic_function(self, device, torch_optimizer):
        # the function itself, whose options are then inputs of the compiled code
        compiled = torch_optimizer(lovasz_hinge_loss, fullgraph=True, dynamic=True)
        for shape in ((2, 5, 6), (3, 7, 9)):
            pred, target = make_inputs(device, torch.float32, shape)
            target[0, 0] = 255
            expected = lovasz_hinge_loss(pred, target, ignore_index=255)
            self.assert_close(compiled(pred, target, ignore_index=255), expected, rtol=1e-6, atol=0.0)

    @sparse_only
    def test_export(self, device):
        pred, target = make_inputs(device, torch.float32)
        target[0, 0] = -100
        dims = {i: torch.export.Dim(f"size_{i}", min=2, max=1 << 12) for i in (0, 2, 3)}
        exported = torch.export.export(
            LovaszHingeLoss(),
            (pred, target),
            dynamic_shapes={"pred": dims, "target": {0: dims[0], 1: dims[2], 2: dims[3]}},
        ).module()
        for shape in [(3, 7, 9), (2, 5, 6)]:
            pred, target = make_inputs(device, torch.float32, shape)
            self.assert_close(exported(pred, target), lovasz_hinge_loss(pred, target), rtol=1e-6, atol=0.0)

    def test_module(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = 255
        options = {"ignore_index": 255, "per_image": False, "reduction": "none"}
        module = LovaszHingeLoss(**options)
        self.assert_close(module(pred, target), lovasz_hinge_loss(pred, target, **options), rtol=0.0, atol=0.0)
        target[target == 255] = 0
        self.assert_close(LovaszHingeLoss()(pred, target), lovasz_hinge_loss(pred, target), rtol=0.0, atol=0.0)

    def test_random_small_cases(self, device):
        # every way in which few pixels can be wrong, tied, ignored or absent
        rng = random.Random(0)
        for _ in range(300):
            n = rng.randint(1, 6)
            pred = torch.tensor([[[[rng.randint(-8, 8) / 4 for _ in range(n)]]]], dtype=torch.float64)
            labels = [rng.choice([0, 1, 255]) for _ in range(n)]
            target = torch.tensor([[labels]])
            kept = [i for i in range(n) if labels[i] != 255]
            expected = float(oracle(pred[..., kept], target[..., kept])) if kept else 0.0
            actual = lovasz_hinge_loss(pred.to(device), target.to(device), ignore_index=255)
            assert actual.item() == pytest.approx(expected, rel=1e-13, abs=0.0)
