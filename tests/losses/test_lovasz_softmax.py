# SPDX-License-Identifier: Apache-2.0
"""The Lovász-Softmax loss: what the tests shared by all losses do not cover."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from kornia.core.exceptions import BaseError, TypeCheckError
from kornia.losses import LovaszSoftmaxLoss, lovasz_softmax_loss

from testing.lovasz import (
    GRAD_ATOL,
    INF,
    NAN,
    RTOL,
    SOFTMAX,
    LovaszTester,
    make_inputs,
    oracle,
    widest_dtype,
    with_forms,
)


class TestLovaszSoftmaxLoss(LovaszTester):
    def test_convention_limit_is_jaccard_loss(self, device, dtype):
        target = torch.tensor([[[0, 0, 1, 1]]], device=device)
        predicted = torch.tensor([[[0, 1, 1, 1]]], device=device)  # the IoUs are 1/2, 2/3, and 1 for the absent class
        pred = 50 * torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).to(dtype)
        self.assert_close(lovasz_softmax_loss(pred, target).item(), (1 / 2 + 1 / 3) / 3, rtol=RTOL[dtype], atol=0.0)

    def test_convention_ignore_index_default(self, device, dtype):
        target = torch.tensor([[[0, -100, 1, 1]]], device=device)
        predicted = torch.tensor([[[0, 1, 1, 1]]], device=device)
        pred = 50 * torch.nn.functional.one_hot(predicted, 3).movedim(-1, 1).to(dtype)
        assert lovasz_softmax_loss(pred, target) < 1e-3

    def test_exception(self, device, dtype):
        pred, target = make_inputs(SOFTMAX, device, dtype)
        with pytest.raises(ValueError, match="Invalid pred shape, we expect BxNxHxW, with N > 1"):
            lovasz_softmax_loss(pred[:, :1], target)

    def test_exception_weight(self, device, dtype):
        pred, target = make_inputs(SOFTMAX, device, dtype)
        with pytest.raises(TypeCheckError, match="weight must be Tensor or None"):
            lovasz_softmax_loss(pred, target, [1.0, 1.0, 1.0, 1.0])
        for shape in [(3,), (5,), (4, 1), (1, 4), ()]:
            with pytest.raises(BaseError, match="weight must hold one value per class of pred: got weight of shape"):
                lovasz_softmax_loss(pred, target, torch.ones(shape, device=device))
        with pytest.raises(BaseError, match="weight and pred must be in the same device"):
            lovasz_softmax_loss(pred, target, torch.ones(4, device="meta"))
        for weight in (torch.ones(4, device=device).to_sparse(), torch.ones(4, device=device, dtype=torch.complex64)):
            with pytest.raises(BaseError, match="weight must be a dense tensor of real numbers: got"):
                lovasz_softmax_loss(pred, target, weight)

    def test_exception_soft_labels(self):
        pred, target = make_inputs(SOFTMAX, "cpu", torch.float32)
        target = target.float()
        assert lovasz_softmax_loss(pred, target) == lovasz_softmax_loss(pred, target.long())
        target[0, 0, 0] = 0.5
        with pytest.raises(ValueError, match=r"target must hold class labels, whole numbers.*Got: \[0.5\]"):
            lovasz_softmax_loss(pred, target)

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
        pred, target = make_inputs(SOFTMAX, device, torch.float32)
        with pytest.raises(ValueError, match=message):
            lovasz_softmax_loss(pred, target, classes=classes)
        with pytest.raises(ValueError, match=message):
            LovaszSoftmaxLoss(classes=classes)(pred, target)

    def test_feature_large_class_count(self, device):
        generator = torch.Generator().manual_seed(0)
        pred = torch.randn(2, 1000, 3, 5, generator=generator).to(device)
        target = torch.randint(0, 1000, (2, 3, 5), generator=generator).to(device)
        for options in ({}, {"classes": "present", "per_image": False}):
            value = lovasz_softmax_loss(pred, target, **options)
            self.assert_close(value.cpu().double(), oracle(SOFTMAX, pred, target, **options), rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("height", [256, 1024])
    def test_feature_gradient_of_large_image(self, device, height):
        # Two classes whose probabilities all differ: d loss / d p is the weight, counted from sets.
        dtype = widest_dtype(device)
        n = height * height
        generator = torch.Generator().manual_seed(height)
        # The shift by a quarter of a step keeps foreground errors different from background errors.
        logit = 8 * (torch.randperm(n, generator=generator).double() + 0.25) / n - 4
        label = (torch.rand(n, generator=generator) < 0.1).long()
        pred = torch.stack([-logit / 2, logit / 2]).reshape(1, 2, height, height)
        pred = pred.to(device, dtype).requires_grad_()
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
            assert gradient[i].item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-3)
        # In float32, nearly equal errors may be ranked in another order.
        difference = (single.grad - pred.grad).norm() / pred.grad.norm()
        assert difference < 1e-5

    @pytest.mark.parametrize("place", [0, 255, 256, 511, 767, 768, 999])
    @pytest.mark.parametrize("per_image", [True, False])
    def test_feature_absent_class(self, per_image, place, device):
        # No pixel has the label 2, so the loss of class 2 is its largest probability, wherever it is.
        dtype = widest_dtype(device)
        pred, target = make_inputs(SOFTMAX, device, dtype, (2, 8, 125), labels=2)
        pred[:, 2] = -3 + 0.1 * pred[:, 2]
        pred[1, 2].view(-1)[place] += 8
        loss = lovasz_softmax_loss(pred.requires_grad_(), target, classes=[2], per_image=per_image, reduction="sum")
        (grad,) = torch.autograd.grad(loss, pred)
        reference = pred.detach().clone().requires_grad_()
        largest = reference.softmax(1)[:, 2].flatten(1).amax(1)
        largest = largest.sum() if per_image else largest.amax()
        self.assert_close(loss, largest, rtol=32 * torch.finfo(dtype).eps, atol=0.0)
        expected = torch.autograd.grad(largest, reference)[0]
        self.assert_close(grad, expected, rtol=10 * RTOL[dtype], atol=0.1 * GRAD_ATOL[dtype])

    def test_feature_present_of_batch(self, device, dtype):
        # Classes 0 and 1 are both present in the batch, but only one of them in each image.
        pred, target = make_inputs(SOFTMAX, device, dtype, (2, 3, 3))
        target[0], target[1] = 0, 1
        per_image = lovasz_softmax_loss(pred, target, classes="present", reduction="none")
        expected = torch.stack(
            [lovasz_softmax_loss(p[None], t[None], classes=[c]) for c, (p, t) in enumerate(zip(pred, target))]
        )
        self.assert_close(per_image, expected, rtol=RTOL[dtype], atol=0.0)
        batch = lovasz_softmax_loss(pred, target, classes="present", per_image=False)
        pair = lovasz_softmax_loss(pred, target, classes=[0, 1], per_image=False)
        self.assert_close(batch, pair, rtol=RTOL[dtype], atol=0.0)

    def test_feature_broadcast_pred(self, device, dtype):
        pred, target = make_inputs(SOFTMAX, device, dtype)
        one, many = pred[:1].clone().requires_grad_(), pred[:1].expand(3, -1, -1, -1).clone().requires_grad_()
        actual, expected = lovasz_softmax_loss(one, target), lovasz_softmax_loss(many, target)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)
        actual.backward()
        expected.backward()
        summed = many.grad.cpu().double().sum(0, keepdim=True)
        self.assert_close(one.grad.cpu().double(), summed, rtol=4 * RTOL[dtype], atol=4 * GRAD_ATOL[dtype])

    @pytest.mark.parametrize("classes", ["all", "present", [1, 3]])
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("labels", [1, 3, 4])
    def test_feature_classes_and_weight(self, device, dtype, labels, per_image, classes):
        # The mean over classes does not divide by the sum of the weights. The weights are differentiable.
        pred, target = make_inputs(SOFTMAX, device, dtype, labels=labels)
        target[0, 1] = 255
        target[2] = 255
        weight = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
        options = {"classes": classes, "per_image": per_image, "ignore_index": 255, "reduction": "none"}
        reference, expected_weight = pred.cpu().double().requires_grad_(), weight.clone().requires_grad_()
        expected = oracle(SOFTMAX, reference, target, expected_weight, **options)
        expected_grads = torch.autograd.grad(expected.sum(), (reference, expected_weight))
        for learns in (False, True):
            leaf, factors = pred.detach().clone().requires_grad_(), weight.to(device, dtype).requires_grad_(learns)
            value = lovasz_softmax_loss(leaf, target, factors, **options)
            self.assert_close(value.cpu().double(), expected.detach(), rtol=4 * RTOL[dtype], atol=1e-16)
            value.sum().backward()
            grad = leaf.grad.cpu().double()
            self.assert_close(grad, expected_grads[0], rtol=4 * RTOL[dtype], atol=2 * GRAD_ATOL[dtype])
        self.assert_close(factors.grad.cpu().double(), expected_grads[1], rtol=4 * RTOL[dtype], atol=1e-16)

    def test_feature_weight_dtype(self, device):
        pred, target = make_inputs(SOFTMAX, device, torch.float16)
        assert lovasz_softmax_loss(pred, target, torch.ones(4, device=device)).dtype == torch.float32
        wide = widest_dtype(device)
        assert lovasz_softmax_loss(pred.float(), target, torch.ones(4, device=device, dtype=wide)).dtype == wide
        integers = torch.tensor([1, 2, 3, 4], device=device)
        actual = lovasz_softmax_loss(pred, target, integers)
        self.assert_close(actual, lovasz_softmax_loss(pred, target, integers.half()), rtol=0.0, atol=0.0)

    def test_feature_infinite_weight(self, device, dtype):
        """The loss is nan, because 0 * inf is nan, unless ``classes`` leaves out the class with the infinite weight."""
        pred, target = make_inputs(SOFTMAX, device, dtype)
        weight = torch.tensor([1.0, INF, 1.0, 1.0], device=device)
        assert lovasz_softmax_loss(pred, target, weight).isnan()
        actual = lovasz_softmax_loss(pred, target, weight, classes=[0, 2])
        assert actual == lovasz_softmax_loss(pred, target, torch.ones_like(weight), classes=[0, 2])

    @with_forms("derived", "usual")
    @pytest.mark.parametrize("size", [(2, 90, 90), (2, 120, 120), (2, 400, 400)], ids=str)
    def test_feature_nan_in_a_class_without_a_factor(self, size, device):
        pred, target = make_inputs(SOFTMAX, device, torch.float32, size)
        target[0] = 0
        pred[0, 1, 2, 3] = NAN
        weight = torch.tensor([0.0, 1.0, 1.0, 1.0], device=device)
        for options in ({"weight": weight, "classes": "present"}, {"weight": weight, "classes": [0]}):
            values = lovasz_softmax_loss(pred, target, reduction="none", **options)
            assert values.isnan().tolist() == [True, False]
            assert lovasz_softmax_loss(pred, target, per_image=False, **options).isnan()

    def test_feature_minus_infinite_logits(self, device, dtype):
        # Logits of -inf give class 3 the probability 0.
        pred, target = make_inputs(SOFTMAX, device, dtype)
        pred[:, 3] = -INF
        loss = lovasz_softmax_loss(pred.requires_grad_(), target)
        without = lovasz_softmax_loss(pred.detach()[:, :3], target)
        self.assert_close(loss.cpu().double(), 0.75 * without.cpu().double(), rtol=4 * RTOL[dtype], atol=0.0)
        loss.backward()
        assert torch.isfinite(pred.grad).all()
        assert (pred.grad[:, 3] == 0).all()

    @pytest.mark.parametrize("margin", [5.0, 20.0, 60.0, 80.0])
    def test_feature_tiny_loss(self, device, margin):
        # All pixels are right by a margin. In float32, 1 - p rounds to 0, but the loss and its gradient must not.
        pred, target = make_inputs(SOFTMAX, device, torch.float32, labels=4)
        pred = pred / 4 + margin * torch.stack([target == c for c in range(4)], 1)
        exact = pred.cpu().double().requires_grad_()
        expected = oracle(SOFTMAX, exact, target)
        (expected_grad,) = torch.autograd.grad(expected, exact)
        loss = lovasz_softmax_loss(pred.requires_grad_(), target)
        loss.backward()
        assert 0 < loss.item() == pytest.approx(expected.item(), rel=1e-5)
        scale = expected_grad.abs().max().item()
        self.assert_close(pred.grad.cpu().double() / scale, expected_grad / scale, rtol=1e-4, atol=1e-5)

    @pytest.mark.grad
    def test_gradcheck_weight(self, device):
        pred, target = make_inputs(SOFTMAX, device, widest_dtype(device))
        weight = torch.rand(4, dtype=pred.dtype, device=device)
        self.gradcheck(
            lambda x, w: lovasz_softmax_loss(x, target, w), [pred, weight], fast_mode=False, check_forward_ad=True
        )

    @pytest.mark.parametrize("kind", [list, tuple])
    def test_module_weight_of_numbers(self, kind, device):
        module = LovaszSoftmaxLoss(kind([1, 2.5, 0, 1])).to(device)
        pred, target = make_inputs(SOFTMAX, device, torch.float32)
        expected = lovasz_softmax_loss(pred, target, torch.tensor([1, 2.5, 0, 1], device=device))
        assert torch.equal(module(pred, target), expected)

    def test_module_weight(self, device):
        module = LovaszSoftmaxLoss(torch.ones(4)).to(device)
        assert module.weight.device.type == device.type
        assert module.state_dict() == {}
        assert not list(module.parameters())
        parameter = torch.nn.Parameter(torch.ones(4, device=device))
        module = LovaszSoftmaxLoss(parameter)
        assert [p is parameter for p in module.parameters()] == [True]
        pred, target = make_inputs(SOFTMAX, device, torch.float32)
        module(pred, target).backward()
        assert (parameter.grad > 0).all()
