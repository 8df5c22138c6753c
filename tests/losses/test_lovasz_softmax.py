# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from kornia.core._compat import torch_version_ge
from kornia.core.exceptions import BaseError, ShapeError, TypeCheckError
from kornia.losses import LovaszSoftmaxLoss, _lovasz_dispatch, lovasz_softmax_loss

from testing.base import BaseTester

# Rounding of a result whose inputs are exact: the computation itself is at least float32.
RTOL = {torch.bfloat16: 5e-3, torch.float16: 6e-4, torch.float32: 1e-6, torch.float64: 1e-13}
# Gradients of the softmax pass through differences of probabilities.
GRAD_ATOL = {torch.bfloat16: 1e-4, torch.float16: 1e-5, torch.float32: 1e-7, torch.float64: 1e-16}


def jaccard_loss(wrong: set[int], foreground: set[int]) -> float:
    """The set function by its definition: 1 - IoU of the prediction that is wrong exactly on ``wrong``."""
    predicted = foreground ^ wrong
    union = foreground | predicted
    return float(1 - Fraction(len(foreground & predicted), len(union))) if union else 0.0


def oracle_weights(errors: list[float], foreground: set[int]) -> list[float]:
    """Growing the wrong set by one pixel at a time, the largest error first."""
    weights, wrong = [0.0] * len(errors), set()
    for i in sorted(range(len(errors)), key=lambda i: -errors[i]):
        weights[i] = jaccard_loss(wrong | {i}, foreground) - jaccard_loss(wrong, foreground)
        wrong.add(i)
    return weights


def oracle_terms(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The term of each class ``(C,)`` of one image ``(C, N)`` with labels ``(N,)``, differentiable, in float64."""
    probabilities = pred.double().cpu().softmax(0)
    terms = []
    for c, probability in enumerate(probabilities):
        foreground = (target == c).cpu()
        errors = torch.where(foreground, 1 - probability, probability)
        weights = oracle_weights(errors.tolist(), set(foreground.nonzero().flatten().tolist()))
        terms.append((errors * torch.tensor(weights, dtype=torch.float64)).sum())
    return torch.stack(terms)


def make_inputs(device, dtype, shape=(3, 4, 5, 6), seed=0, labels=None):
    """Logits, and labels below ``labels``: by default the last class is absent."""
    generator = torch.Generator().manual_seed(seed)
    batch, num_classes, height, width = shape
    pred = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, labels or num_classes - 1, (batch, height, width), generator=generator)
    return pred.to(device, dtype), target.to(device)


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


class TestLovaszSoftmaxLoss(BaseTester):
    def test_smoke(self, device, dtype):
        pred = torch.randn(2, 3, 4, 5, device=device, dtype=dtype, requires_grad=True)
        target = torch.randint(0, 3, (2, 4, 5), device=device)
        loss = lovasz_softmax_loss(pred, target)
        assert loss.shape == ()
        assert loss.dtype == dtype
        assert loss.device == pred.device
        loss.backward()
        assert pred.grad.shape == pred.shape
        assert pred.grad.dtype == dtype

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("classes", ["all", "present", [1]])
    @pytest.mark.parametrize("shape", [(1, 2, 1, 1), (2, 3, 4, 5), (0, 3, 2, 2), (2, 3, 0, 3)])
    def test_cardinality(self, device, dtype, shape, classes, per_image, reduction):
        pred, target = make_inputs(device, dtype, shape)
        loss = lovasz_softmax_loss(
            pred.requires_grad_(), target, classes=classes, per_image=per_image, reduction=reduction
        )
        groups = shape[0] if per_image else 1
        assert loss.shape == ((groups,) if reduction == "none" else ())
        (grad,) = torch.autograd.grad(loss.sum(), pred)
        assert grad.shape == pred.shape
        assert torch.isfinite(grad).all()
        if target.numel() == 0:
            self.assert_close(loss, torch.zeros_like(loss), rtol=0.0, atol=0.0)

    def test_exception(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 3, 4, 5))
        with pytest.raises(ShapeError, match="expected 4 dimensions, got 3"):
            lovasz_softmax_loss(pred[0], target)
        with pytest.raises(ShapeError, match="expected 3 dimensions, got 4"):
            lovasz_softmax_loss(pred, target[:, None])
        with pytest.raises(ValueError, match="Invalid pred shape, we expect BxNxHxW, with N > 1"):
            lovasz_softmax_loss(pred[:, :1], target)
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            lovasz_softmax_loss(pred, target[..., :-1])
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            lovasz_softmax_loss(pred, target[:1])
        with pytest.raises(ValueError, match="pred and target must be in the same device"):
            lovasz_softmax_loss(pred, target.to("meta"))
        with pytest.raises(ValueError, match=r"reduction must be 'mean', 'sum' or 'none'\. Got: None"):
            lovasz_softmax_loss(pred, target, reduction=None)
        with pytest.raises((AttributeError, TypeError)):
            lovasz_softmax_loss(pred.tolist(), target)
        with pytest.raises(TypeError):
            lovasz_softmax_loss(pred, target, None, "present")  # the options are keyword-only

    def test_exception_weight(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        with pytest.raises(TypeCheckError, match="weight must be Tensor or None"):
            lovasz_softmax_loss(pred, target, [1.0, 1.0, 1.0, 1.0])
        for shape in [(3,), (5,), (4, 1), (1, 4), ()]:
            with pytest.raises(BaseError, match="weight must hold one value per class of pred: got weight of shape"):
                lovasz_softmax_loss(pred, target, torch.ones(shape, device=device))
        with pytest.raises(BaseError, match="weight and pred must be in the same device"):
            lovasz_softmax_loss(pred, target, torch.ones(4, device="meta"))

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            ("absent", "'all', 'present' or a sequence of class indices. Got: 'absent'"),
            ([], "at least one class"),
            ((0, 4), r"integers in \[0, 4\), the classes of pred. Got: \[0, 4\]"),
            ([-1], r"Got: \[-1\]"),
            ([0.0, 1.0], r"Got: \[0.0, 1.0\]"),
            ([True], r"Got: \[True\]"),
            ([2, 1, 2], r"each class once. Got: \[2, 1, 2\]"),
        ],
    )
    def test_exception_classes(self, device, classes, message):
        pred, target = make_inputs(device, torch.float32)
        with pytest.raises(ValueError, match=message):
            lovasz_softmax_loss(pred, target, classes=classes)
        with pytest.raises(ValueError, match=message):
            LovaszSoftmaxLoss(classes=classes)(pred, target)

    @pytest.mark.parametrize("ignore_index", [-100, None, 255])
    @pytest.mark.parametrize("label_dtype", [torch.int64, torch.uint8, torch.int32])
    def test_exception_label(self, dtype, label_dtype, ignore_index):
        pred, target = make_inputs("cpu", dtype)
        target[0, 0, 0] = 4
        with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
            lovasz_softmax_loss(pred, target.to(label_dtype), ignore_index=ignore_index)
        target[0, 0, 0] = -1
        if label_dtype != torch.uint8:
            with pytest.raises(RuntimeError, match="Class values must be non-negative"):
                lovasz_softmax_loss(pred, target.to(label_dtype), ignore_index=ignore_index)
        target[0, 0, 0] = 156  # -100 modulo 256
        with pytest.raises(RuntimeError, match="Class values must be"):
            lovasz_softmax_loss(pred, target.to(label_dtype), ignore_index=ignore_index)

    @pytest.mark.parametrize("labels", [1, 2, 4])
    @pytest.mark.parametrize("seed", range(3))
    def test_feature_oracle(self, device, dtype, seed, labels):
        pred, target = make_inputs(device, dtype, seed=seed, labels=labels)
        weight = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
        leaf = pred.clone().requires_grad_()
        reference = pred.double().requires_grad_()
        terms = torch.stack([oracle_terms(p.flatten(1), t.flatten()) for p, t in zip(reference, target)]).to(device)
        present = torch.stack([(target == c).any(2).any(1) for c in range(4)], 1).double()
        cases = {
            (): terms.mean(1),
            ("classes", "present"): (terms * present).sum(1) / present.sum(1),
            ("classes", (1, 3)): terms[:, [1, 3]].mean(1),
            ("weight", weight.to(device, dtype)): (terms * weight.to(device)).mean(1),
        }
        for option, expected in cases.items():
            actual = lovasz_softmax_loss(leaf, target, reduction="none", **dict([option] if option else []))
            self.assert_close(actual.double(), expected, rtol=2 * RTOL[dtype], atol=1e-16)
            (grad,) = torch.autograd.grad(actual.sum(), leaf)
            (expected_grad,) = torch.autograd.grad(expected.sum(), reference, retain_graph=True)
            self.assert_close(grad.double(), expected_grad, rtol=4 * RTOL[dtype], atol=GRAD_ATOL[dtype])

    def test_feature_reduction(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        losses = lovasz_softmax_loss(pred, target, reduction="none")
        self.assert_close(lovasz_softmax_loss(pred, target), losses.mean(), rtol=2 * RTOL[dtype], atol=0.0)
        total = lovasz_softmax_loss(pred, target, reduction="sum")
        self.assert_close(total, losses.sum(), rtol=2 * RTOL[dtype], atol=0.0)

    def test_feature_iou_of_hard_prediction(self, device, dtype):
        # certain predictions have errors 0 and 1: the loss is the mean Jaccard loss of the prediction
        pred, target = make_inputs(device, dtype, (2, 4, 6, 6))
        predicted = pred.argmax(1)
        one_hot = torch.stack([predicted == c for c in range(4)], 1).to(dtype)
        expected = []
        for p, t in zip(predicted, target):
            terms = []
            for c in range(4):
                union = ((p == c) | (t == c)).sum().item()
                terms.append(1 - ((p == c) & (t == c)).sum().item() / union if union else 0.0)
            expected.append(sum(terms) / 4)
        actual = lovasz_softmax_loss(200 * one_hot, target, reduction="none")
        self.assert_close(actual.double().tolist(), expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("height", [256, 1024])
    def test_feature_gradient_of_large_image(self, device, height):
        # Two classes, probabilities that differ pairwise: d loss / d p is a weight, counted from sets by definition.
        n = height * height
        generator = torch.Generator().manual_seed(height)
        # the shift by a quarter of a step keeps the errors of foreground and background apart
        logit = 8 * (torch.randperm(n, generator=generator).double() + 0.25) / n - 4
        label = (torch.rand(n, generator=generator) < 0.1).long()
        pred = torch.stack([-logit / 2, logit / 2]).reshape(1, 2, height, height).to(device).requires_grad_()
        target = label.reshape(1, height, height).to(device)
        lovasz_softmax_loss(pred, target, classes=[1]).backward()
        slope = (logit.sigmoid() * (-logit).sigmoid()).numpy()
        gradient = pred.grad[0, 1].flatten().cpu()
        single = pred.detach().float().requires_grad_()
        lovasz_softmax_loss(single, target, classes=[1]).backward()
        foreground = label == 1
        errors = torch.where(foreground, (-logit).sigmoid(), logit.sigmoid())
        total = int(foreground.sum())
        for i in torch.randperm(n, generator=generator)[:300].tolist():
            above = errors > errors[i]
            k, m = int((above & foreground).sum()), int((above & ~foreground).sum())
            before = 1 - Fraction(total - k, total + m)
            after = 1 - (Fraction(total - k - 1, total + m) if foreground[i] else Fraction(total - k, total + m + 1))
            expected = float(after - before) * slope[i] * (-1 if foreground[i] else 1)
            assert gradient[i].item() == pytest.approx(expected, rel=1e-9)
        # in float32 the order of nearly equal errors may differ, by a few places among many
        difference = (single.grad.double() - pred.grad).norm() / pred.grad.norm()
        assert difference < 1e-5

    def test_feature_ties(self, device, dtype):
        pred = torch.zeros(1, 3, 4, 5, device=device, dtype=dtype)
        _, target = make_inputs(device, dtype, (1, 3, 4, 5))
        expected = oracle_terms(pred[0].flatten(1), target.flatten()).mean().item()
        order = torch.randperm(20, device=device)
        for labels in (target, target.flatten()[order].reshape(target.shape)):
            self.assert_close(lovasz_softmax_loss(pred, labels).item(), expected, rtol=RTOL[dtype], atol=0.0)

    def test_feature_absent_class(self, device):
        # class 2 occurs nowhere: its term is its largest probability, and so is its gradient
        pred, target = make_inputs(device, torch.float64, (1, 3, 4, 5), labels=2)
        loss = lovasz_softmax_loss(pred.requires_grad_(), target, classes=[2])
        (grad,) = torch.autograd.grad(loss, pred)
        reference = pred.detach().clone().requires_grad_()
        largest = reference.softmax(1)[:, 2].max()
        self.assert_close(loss, largest, rtol=1e-14, atol=0.0)
        self.assert_close(grad, torch.autograd.grad(largest, reference)[0], rtol=1e-12, atol=1e-17)

    def test_feature_present_of_batch(self, device, dtype):
        # present in the batch, not in each image
        pred, target = make_inputs(device, dtype, (2, 4, 3, 3))
        target[0], target[1] = 0, 1
        per_image = lovasz_softmax_loss(pred, target, classes="present", reduction="none")
        expected = torch.stack(
            [lovasz_softmax_loss(p[None], t[None], classes=[c]) for c, (p, t) in enumerate(zip(pred, target))]
        )
        self.assert_close(per_image, expected, rtol=RTOL[dtype], atol=0.0)
        batch = lovasz_softmax_loss(pred, target, classes="present", per_image=False)
        pair = lovasz_softmax_loss(pred, target, classes=[0, 1], per_image=False)
        self.assert_close(batch, pair, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("classes", ["all", "present", [0, 2]])
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("ignore_index", [-100, 255, 1])
    def test_feature_ignored_pixels_do_not_exist(self, device, dtype, ignore_index, per_image, classes):
        pred, target = make_inputs(device, dtype, (2, 4, 3, 8))
        target[:, :, 5:] = ignore_index
        target[:, :, :5][target[:, :, :5] == ignore_index] = 0
        pred[..., 5] = float("nan")
        pred[..., 6] = float("inf")
        pred.requires_grad_()
        kept = pred.detach()[..., :5].clone().requires_grad_()
        options = {"per_image": per_image, "classes": classes}
        loss = lovasz_softmax_loss(pred, target, ignore_index=ignore_index, **options)
        expected = lovasz_softmax_loss(kept, target[..., :5], ignore_index=None, **options)
        self.assert_close(loss, expected, rtol=RTOL[dtype], atol=0.0)
        loss.backward()
        expected.backward()
        self.assert_close(pred.grad[..., :5], kept.grad, rtol=RTOL[dtype], atol=GRAD_ATOL[dtype])
        assert (pred.grad[..., 5:] == 0).all()

    def test_feature_scattered_ignored_pixels(self, device, dtype):
        pred, target = make_inputs(device, dtype, (1, 4, 9, 9))
        ignored = torch.rand(target.shape, device=device) < 0.4
        kept = ~ignored[0]
        expected = lovasz_softmax_loss(pred[:, :, kept][..., None], target[:, kept][..., None])
        actual = lovasz_softmax_loss(pred, target.masked_fill(ignored, 77), ignore_index=77)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("classes", ["all", "present", [0, 2]])
    @pytest.mark.parametrize("per_image", [True, False])
    def test_feature_group_without_valid_pixel(self, device, dtype, per_image, classes):
        pred, target = make_inputs(device, dtype, (2, 4, 3, 4))
        target[0] = -100
        if not per_image:
            target[1] = -100
        options = {"per_image": per_image, "classes": classes, "reduction": "none"}
        loss = lovasz_softmax_loss(pred.requires_grad_(), target, **options)
        assert loss[0] == 0
        loss.sum().backward()
        assert (pred.grad[0] == 0).all()
        assert per_image == bool((pred.grad[1] != 0).any())

    @pytest.mark.parametrize("classes", ["all", "present"])
    def test_feature_per_image(self, device, dtype, classes):
        pred, target = make_inputs(device, dtype)
        images = torch.stack([lovasz_softmax_loss(p[None], t[None], classes=classes) for p, t in zip(pred, target)])
        actual = lovasz_softmax_loss(pred, target, classes=classes, reduction="none")
        self.assert_close(actual, images, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("classes", ["all", "present", [3, 1]])
    def test_feature_batch_is_one_image(self, device, dtype, classes):
        pred, target = make_inputs(device, dtype)
        batch, image = (pred.clone().requires_grad_() for _ in range(2))
        actual = lovasz_softmax_loss(batch, target, classes=classes, per_image=False)
        tall = image.movedim(0, 1).reshape(1, 4, 15, 6)
        expected = lovasz_softmax_loss(tall, target.reshape(1, 15, 6), classes=classes)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)
        actual.backward()
        expected.backward()
        self.assert_close(batch.grad, image.grad, rtol=RTOL[dtype], atol=GRAD_ATOL[dtype])

    def test_feature_one_image_against_a_batch(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        one, many = pred[:1].clone().requires_grad_(), pred[:1].expand(3, -1, -1, -1).clone().requires_grad_()
        actual, expected = lovasz_softmax_loss(one, target), lovasz_softmax_loss(many, target)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)
        actual.backward()
        expected.backward()
        summed = many.grad.double().sum(0, keepdim=True)
        self.assert_close(one.grad.double(), summed, rtol=4 * RTOL[dtype], atol=4 * GRAD_ATOL[dtype])

    @pytest.mark.parametrize("classes", ["all", "present", [1, 3]])
    def test_feature_weight(self, device, dtype, classes):
        pred, target = make_inputs(device, dtype)
        terms = [lovasz_softmax_loss(pred, target, classes=[c], reduction="none").double() for c in range(4)]
        weight = torch.tensor([0.5, 2.0, 0.0, 3.0], device=device, dtype=dtype, requires_grad=True)
        loss = lovasz_softmax_loss(pred, target, weight, classes=classes, reduction="none")
        present = torch.stack([(target == c).any(2).any(1) for c in range(4)], 1).double()
        averaged = present if classes == "present" else torch.zeros_like(present)
        if classes != "present":
            averaged[:, slice(None) if classes == "all" else classes] = 1
        factors = averaged / averaged.sum(1, keepdim=True)
        expected = (torch.stack(terms, 1) * factors * weight).sum(1)
        self.assert_close(loss.double(), expected, rtol=4 * RTOL[dtype], atol=0.0)
        # the mean does not divide by the weights, and the weights are differentiable
        loss.sum().backward()
        expected_grad = (torch.stack(terms, 1) * factors).sum(0)
        self.assert_close(weight.grad.double(), expected_grad, rtol=4 * RTOL[dtype], atol=1e-16)

    def test_feature_weight_dtype(self, device):
        pred, target = make_inputs(device, torch.float16)
        assert lovasz_softmax_loss(pred, target, torch.ones(4, device=device)).dtype == torch.float32
        assert lovasz_softmax_loss(pred.float(), target, torch.ones(4, device=device).double()).dtype == torch.float64
        integers = torch.tensor([1, 2, 3, 4], device=device)
        actual = lovasz_softmax_loss(pred, target, integers)
        self.assert_close(actual, lovasz_softmax_loss(pred, target, integers.half()), rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
    def test_feature_label_dtypes(self, device, dtype, label_dtype):
        pred, target = make_inputs(device, dtype)
        expected = lovasz_softmax_loss(pred, target)
        self.assert_close(lovasz_softmax_loss(pred, target.to(label_dtype)), expected, rtol=0.0, atol=0.0)

    def test_feature_nan(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        pred[0, 1, 1, 1] = float("nan")
        for classes in ("all", "present", [0]):
            loss = lovasz_softmax_loss(pred, target, reduction="none", classes=classes)
            assert torch.isnan(loss[0])
            assert torch.isfinite(loss[1:]).all()
        assert torch.isnan(lovasz_softmax_loss(pred, target, per_image=False))

    def test_feature_minus_infinite_logits(self, device, dtype):
        # a class masked out by -inf has probability 0
        pred, target = make_inputs(device, dtype)
        pred[:, 3] = float("-inf")
        loss = lovasz_softmax_loss(pred.requires_grad_(), target)
        without = lovasz_softmax_loss(pred.detach()[:, :3], target)
        self.assert_close(loss.double(), 0.75 * without.double(), rtol=4 * RTOL[dtype], atol=0.0)
        loss.backward()
        assert torch.isfinite(pred.grad).all()
        assert (pred.grad[:, 3] == 0).all()

    @pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
    def test_feature_tiny_loss(self, device, margin):
        # All right by a margin: 1 - p rounds to 0 in float32, the loss and its gradient must not.
        pred, target = make_inputs(device, torch.float32, labels=4)
        pred = pred / 4 + margin * torch.stack([target == c for c in range(4)], 1)
        exact = pred.double().requires_grad_()
        terms = []
        for c, p in enumerate(exact.softmax(1).unbind(1)):
            others = exact.softmax(1)[:, [i for i in range(4) if i != c]].sum(1)
            for image in range(3):
                foreground = (target[image] == c).cpu()
                errors = torch.where(foreground, others[image].cpu(), p[image].cpu()).flatten()
                weights = oracle_weights(errors.tolist(), set(foreground.flatten().nonzero().flatten().tolist()))
                terms.append((errors * torch.tensor(weights, dtype=torch.float64)).sum() / 12)
        expected = torch.stack(terms).sum()
        (expected_grad,) = torch.autograd.grad(expected, exact)
        loss = lovasz_softmax_loss(pred.requires_grad_(), target)
        loss.backward()
        assert 0 < loss.item() == pytest.approx(expected.item(), rel=1e-5)
        scale = expected_grad.abs().max().item()
        self.assert_close(pred.grad.double() / scale, expected_grad / scale, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_feature_half_precision_counts(self, device, half):
        # 2**17 pixels a class: more than either half precision can count, or even hold in float16
        pred = torch.zeros(1, 2, 512, 512, device=device, dtype=half, requires_grad=True)
        target = torch.zeros(1, 512, 512, dtype=torch.long, device=device)
        target[:, :256] = 1
        loss = lovasz_softmax_loss(pred, target)
        self.assert_close(loss.item(), 0.5, rtol=RTOL[half], atol=0.0)

    @pytest.mark.parametrize(
        "options",
        [{}, {"per_image": False, "classes": "present", "ignore_index": 1}, {"classes": [2, 4], "reduction": "sum"}],
    )
    def test_feature_rankings_agree(self, device, dtype, options, monkeypatch):
        # the same gradient from each form, the direct one away from the CPU, and the sparse way in pieces of any length
        pred, target = make_inputs(device, dtype, (2, 5, 40, 50))
        pred = pred + torch.rand(pred.shape, device=device, dtype=dtype)
        results = []
        slabs = [("fast", slab, digits) for slab, digits in ((7, 4), (1000, 1 << 12), (1 << 20, 1))]
        for form, slab, digits in (("traced", 1, 1 << 30), ("dense", 1, 1 << 30), ("dense", 1, 4), *slabs):
            with monkeypatch.context() as patch:
                force_form(patch, form)
                patch.setattr("kornia.losses._lovasz_fast._SLAB", slab)
                patch.setattr("kornia.losses._lovasz_rank._MIN_DIGITS", digits)
                leaf = pred.clone().requires_grad_()
                loss = lovasz_softmax_loss(leaf, target, **options)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        for loss, grad in results[1:]:
            self.assert_close(loss, results[0][0], rtol=RTOL[dtype], atol=0.0)
            self.assert_close(grad.double().sum(), results[0][1].double().sum(), rtol=1e-2, atol=1e-5)
            if dtype in (torch.float32, torch.float64):  # few logits are equal there
                difference = (grad - results[0][1]).norm() / results[0][1].norm()
                assert difference < (1e-5 if dtype == torch.float32 else 1e-12)

    def test_feature_batched_gradients(self, device):
        # torch.func.vmap over torch.autograd.grad, as its documentation has it
        pred, target = make_inputs(device, torch.float64, (3, 4, 5, 6))
        pred.requires_grad_()
        losses = lovasz_softmax_loss(pred, target, reduction="none")
        (expected,) = torch.autograd.grad(losses.sum(), pred, retain_graph=True)
        units = torch.eye(len(losses), device=device, dtype=losses.dtype)
        grads = torch.func.vmap(lambda unit: torch.autograd.grad(losses, pred, unit, retain_graph=True)[0])(units)
        self.assert_close(grads.sum(0), expected)

    def test_feature_changes_before_backward(self, device):
        # the logits may change once the loss is there; labels that a second backward would need may not, unnoticed
        pred, target = make_inputs(device, torch.float64, (3, 4, 5, 6))
        leaf = pred.clone().requires_grad_()
        (expected,) = torch.autograd.grad(lovasz_softmax_loss(leaf, target), leaf)
        logits = leaf.clone()
        loss = lovasz_softmax_loss(logits, target)
        with torch.no_grad():
            logits.sigmoid_()
        is_direct = "Eager" in str(loss.grad_fn)
        if is_direct:
            loss.backward()
            self.assert_close(leaf.grad, expected)
        loss = lovasz_softmax_loss(leaf, target)
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
        losses = lovasz_softmax_loss(pred, target, reduction="none")
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
        (lovasz_softmax_loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        once = scale.grad.clone()
        (lovasz_softmax_loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        self.assert_close(scale.grad, 2 * once)
        leaf = (pred * 1.5).requires_grad_()
        lovasz_softmax_loss(leaf, target).backward()
        expected = (0.25 * leaf.grad * pred).sum() + 2 * 1.5 * pred.square().mean()
        self.assert_close(once, expected, rtol=4 * RTOL[dtype] + 1e-5, atol=1e-4)

    def test_feature_without_gradient(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = -100
        pred.requires_grad_()
        for options in ({}, {"per_image": False}, {"reduction": "none"}):
            expected = lovasz_softmax_loss(pred, target, **options)
            assert expected.requires_grad
            assert torch.equal(lovasz_softmax_loss(pred.detach(), target, **options), expected)
            with torch.no_grad():
                assert torch.equal(lovasz_softmax_loss(pred, target, **options), expected)
            with torch.inference_mode():
                assert torch.equal(lovasz_softmax_loss(pred, target, **options), expected)

    def test_noncontiguous(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        expected = lovasz_softmax_loss(pred, target)
        labels = target.transpose(1, 2).contiguous().transpose(1, 2)
        for other in (
            pred.transpose(2, 3).contiguous().transpose(2, 3),
            pred.to(memory_format=torch.channels_last),
            pred.movedim(0, 3).contiguous().movedim(3, 0),
        ):
            assert not other.is_contiguous()
            leaf, plain = other.detach().requires_grad_(), pred.clone().requires_grad_()
            loss = lovasz_softmax_loss(leaf, labels)
            self.assert_close(loss, expected, rtol=RTOL[dtype], atol=0.0)
            loss.backward()
            lovasz_softmax_loss(plain, target).backward()
            self.assert_close(leaf.grad, plain.grad, rtol=RTOL[dtype], atol=GRAD_ATOL[dtype])

    def test_inputs_unchanged(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = -100
        copies = pred.clone(), target.clone()
        lovasz_softmax_loss(pred.requires_grad_(), target).backward()
        assert torch.equal(pred, copies[0])
        assert torch.equal(target, copies[1])

    @pytest.mark.parametrize("options", [{}, {"per_image": False, "classes": "present", "ignore_index": 255}])
    def test_deterministic(self, device, dtype, options):
        pred, target = make_inputs(device, dtype, (2, 4, 30, 30))
        target[0, :3] = options.get("ignore_index", -100)
        results = []
        torch.use_deterministic_algorithms(True)
        try:
            for _ in range(3):
                leaf = pred.clone().requires_grad_()
                loss = lovasz_softmax_loss(leaf, target, **options)
                loss.backward()
                results.append((loss.detach(), leaf.grad))
        finally:
            torch.use_deterministic_algorithms(False)
        for loss, grad in results[1:]:
            assert torch.equal(loss, results[0][0])
            assert torch.equal(grad, results[0][1])

    def test_autocast(self, device):
        pred, target = make_inputs(device, torch.float32)
        expected = lovasz_softmax_loss(pred, target)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = lovasz_softmax_loss(pred, target)
        assert actual.dtype == torch.float32
        self.assert_close(actual, expected, rtol=1e-6, atol=0.0)

    OPTIONS = (
        {},
        {"classes": "present", "per_image": False},
        {"classes": (2, 0), "reduction": "none"},
        {"ignore_index": 255, "classes": "present", "reduction": "sum"},
        {"ignore_index": None, "weighted": True},
    )

    def make_options_inputs(self, device, options, height=3, width=4, seed=0):
        options = dict(options)
        generator = torch.Generator().manual_seed(seed)
        pred = 2 * torch.randn(2, 4, height, width, dtype=torch.float64, generator=generator)
        target = torch.randint(0, 3, (2, height, width), generator=generator)
        if options.get("ignore_index", -100) is not None:
            target[0, 1] = options.get("ignore_index", -100)
        if options.pop("weighted", False):
            options["weight"] = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64, device=device)
        return pred.to(device), target.to(device), options

    @pytest.mark.grad
    @pytest.mark.parametrize("options", OPTIONS)
    def test_gradcheck(self, device, options):
        pred, target, options = self.make_options_inputs(device, options)
        pred.requires_grad_()

        def loss(x):
            return lovasz_softmax_loss(x, target, **options)

        self.gradcheck(loss, pred, fast_mode=False, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, pred, check_fwd_over_rev=True)

    @pytest.mark.grad
    def test_gradcheck_weight(self, device):
        pred, target = make_inputs(device, torch.float64)
        weight = torch.rand(4, dtype=torch.float64, device=device)
        self.gradcheck(
            lambda x, w: lovasz_softmax_loss(x, target, w), [pred, weight], fast_mode=False, check_forward_ad=True
        )

    @pytest.mark.parametrize("options", OPTIONS)
    def test_functorch(self, device, options):
        pred, target, options = self.make_options_inputs(device, options)
        leaf = pred.clone().requires_grad_()
        value = lovasz_softmax_loss(leaf, target, **options).sum()
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in gradient.flatten()]
        expected_hessian = torch.stack(rows).reshape(*pred.shape, *pred.shape)
        gradient = gradient.detach()

        def loss(x):
            return lovasz_softmax_loss(x, target, **options).sum()

        self.assert_close(torch.func.grad(loss)(pred), gradient, rtol=1e-12, atol=1e-16)
        tangent = torch.randn_like(pred)
        primal, derivative = torch.func.jvp(loss, (pred,), (tangent,))
        self.assert_close(primal, value.detach(), rtol=1e-12, atol=0.0)
        self.assert_close(derivative, (gradient * tangent).sum(), rtol=1e-12, atol=1e-15)
        self.assert_close(torch.func.hessian(loss)(pred), expected_hessian, rtol=1e-10, atol=1e-16)
        assert (expected_hessian != 0).any()
        if options.get("per_image", True):
            single = torch.func.vmap(lambda x, t: lovasz_softmax_loss(x[None], t[None], **options).sum())(pred, target)
            expected = lovasz_softmax_loss(pred, target, **{**options, "reduction": "none"})
            self.assert_close(single, expected, rtol=1e-12, atol=0.0)

    @sparse_only
    @pytest.mark.parametrize(("options", "dynamic"), [({}, False), *((options, True) for options in OPTIONS)])
    def test_dynamo(self, device, torch_optimizer, options, dynamic):
        compiled = torch_optimizer(lovasz_softmax_loss, fullgraph=True, dynamic=dynamic)
        for step, (height, width) in enumerate([(6, 9), (5, 11), (8, 3)] if dynamic else [(6, 9)] * 2):
            pred, target, arguments = self.make_options_inputs(device, options, height, width, seed=step)
            pred = pred.float().requires_grad_()
            expected = lovasz_softmax_loss(pred, target, **arguments)
            (expected_grad,) = torch.autograd.grad(expected.sum(), pred)
            # the first step may compile, no later one
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                actual = compiled(pred, target, **arguments)
                (grad,) = torch.autograd.grad(actual.sum(), pred)
            self.assert_close(actual, expected, rtol=1e-6, atol=0.0)
            self.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)

    @sparse_only
    @pytest.mark.skipif(not torch_version_ge(2, 9), reason="Inductor drops asserts before PyTorch 2.9")
    def test_dynamo_exception(self, torch_optimizer, optimizer_backend):
        compiled = torch_optimizer(lovasz_softmax_loss, fullgraph=True)
        pred, target = make_inputs("cpu", torch.float32)
        with pytest.raises(RuntimeError, match="Class values must be smaller than num_classes"):
            compiled(pred, target + 4)

    @sparse_only
    def test_export(self, device):
        pred, target = make_inputs(device, torch.float32)
        target[0, 0] = -100
        dims = {i: torch.export.Dim(f"size_{i}", min=2, max=1 << 12) for i in (0, 2, 3)}
        exported = torch.export.export(
            LovaszSoftmaxLoss(classes="present"),
            (pred, target),
            dynamic_shapes={"pred": dims, "target": {0: dims[0], 1: dims[2], 2: dims[3]}},
        ).module()
        for shape in [(3, 4, 5, 6), (2, 4, 7, 3)]:
            pred, target = make_inputs(device, torch.float32, shape)
            expected = lovasz_softmax_loss(pred, target, classes="present")
            self.assert_close(exported(pred, target), expected, rtol=1e-6, atol=0.0)

    def test_module(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[0, 0] = 255
        options = {"ignore_index": 255, "per_image": False, "reduction": "none", "classes": [0, 2]}
        weight = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device, dtype=dtype)
        module = LovaszSoftmaxLoss(weight, **options)
        expected = lovasz_softmax_loss(pred, target, weight, **options)
        self.assert_close(module(pred, target), expected, rtol=0.0, atol=0.0)
        target[target == 255] = 0
        self.assert_close(LovaszSoftmaxLoss()(pred, target), lovasz_softmax_loss(pred, target), rtol=0.0, atol=0.0)

    def test_module_weight(self, device):
        module = LovaszSoftmaxLoss(torch.ones(4)).to(device)
        assert module.weight.device.type == device.type
        assert module.state_dict() == {}
        assert not list(module.parameters())
        parameter = torch.nn.Parameter(torch.ones(4, device=device))
        module = LovaszSoftmaxLoss(parameter)
        assert [p is parameter for p in module.parameters()] == [True]
        pred, target = make_inputs(device, torch.float32)
        module(pred, target).backward()
        assert (parameter.grad > 0).all()

    def test_random_small_cases(self, device):
        # every way in which few pixels can be wrong, tied, ignored or absent
        rng = random.Random(0)
        for _ in range(200):
            n = rng.randint(1, 5)
            pred = torch.tensor([[[[rng.randint(-3, 3) / 2 for _ in range(n)]] for _ in range(3)]]).double()
            labels = [rng.choice([0, 1, 2, 255]) for _ in range(n)]
            target = torch.tensor([[labels]])
            kept = [i for i in range(n) if labels[i] != 255]
            terms = oracle_terms(pred[0, :, 0, kept], target[0, 0, kept]) if kept else torch.zeros(3)
            present = [c for c in range(3) if c in labels]
            actual = lovasz_softmax_loss(pred.to(device), target.to(device), ignore_index=255)
            assert actual.item() == pytest.approx(terms.mean().item(), rel=1e-12, abs=1e-300)
            actual = lovasz_softmax_loss(pred.to(device), target.to(device), ignore_index=255, classes="present")
            expected = terms[present].mean().item() if present else 0.0
            assert actual.item() == pytest.approx(expected, rel=1e-12, abs=1e-300)
            assert math.isfinite(actual.item())
