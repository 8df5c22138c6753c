# SPDX-License-Identifier: Apache-2.0
"""The behaviour that the Lovász losses share."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from kornia.core.exceptions import ShapeError

from testing.lovasz import (
    GRAD_ATOL,
    HINGE,
    INF,
    NAN,
    RTOL,
    SIGMOID,
    LovaszTester,
    each_loss,
    each_loss_with_options,
    force_form,
    make_inputs,
    oracle,
    quick_oracle,
    right_logits,
    value_and_grad,
    widest_dtype,
    with_forms,
)


def ignored_label(options):
    return options.get("ignore_index", -100)


@each_loss
class TestLovaszChecks(LovaszTester):
    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (4, 2, 1), (0, 3, 2), (2, 0, 3)])
    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    @pytest.mark.parametrize("num_bins", [None, 8])
    def test_cardinality(self, loss, num_bins, reduction, per_image, shape, device, dtype):
        pred, target = make_inputs(loss, device, dtype, shape)
        value = loss(pred.requires_grad_(), target, per_image=per_image, reduction=reduction, num_bins=num_bins)
        groups = shape[0] if per_image else 1
        assert value.shape == ((groups,) if reduction == "none" else ())
        assert value.dtype == dtype
        assert value.device == pred.device
        (grad,) = torch.autograd.grad(value.sum(), pred)
        assert grad.shape == pred.shape
        assert grad.dtype == dtype
        assert torch.isfinite(grad).all()
        if target.numel() == 0:
            assert (value == 0).all()

    def test_exception(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype, (2, 3, 4))
        with pytest.raises(ShapeError, match="expected 4 dimensions, got 3"):
            loss(pred[:, 0], target)
        with pytest.raises(ShapeError, match="expected 3 dimensions, got 4"):
            loss(pred, target[:, None])
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            loss(pred, target[..., :-1])
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            loss(pred, target[:1])
        with pytest.raises(ValueError, match="pred and target must be in the same device"):
            loss(pred, target.to("meta"))
        with pytest.raises((AttributeError, TypeError)):
            loss(pred.tolist(), target)
        with pytest.raises(TypeError):
            loss(pred, target, None, 255)  # options are keyword-only

    @pytest.mark.parametrize("label_dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
    @pytest.mark.parametrize("ignore_index", [-100, None, 255])
    def test_exception_label(self, loss, ignore_index, label_dtype, dtype):
        pred, target = make_inputs(loss, "cpu", dtype)
        for wrong in (loss.channels + 1, 156, -1):  # in 8 bits, -100 is 156 and 255 is -1
            target[0, 0, 0] = wrong
            if wrong > 0 or label_dtype != torch.uint8:
                with pytest.raises((ValueError, RuntimeError), match=loss.wrong_label):
                    loss(pred, target.to(label_dtype), ignore_index=ignore_index)

    @pytest.mark.parametrize("label", [255, -1, 7])
    def test_exception_label_message(self, loss, label):
        """For 255 and -1, which data sets use for unlabelled pixels, the message suggests ``ignore_index``."""
        pred, target = make_inputs(loss, "cpu", torch.float32)
        target[0, 0, 0] = label
        with pytest.raises((ValueError, RuntimeError), match=rf"(?s){loss.wrong_label}.*Got: \[{label}\]") as caught:
            loss(pred, target)
        assert (f". To ignore those pixels, pass ignore_index={label}" in str(caught.value)) == (label != 7)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reduction": "average"}, r"reduction must be 'mean', 'sum' or 'none'\. Got: 'average'"),
            ({"reduction": None}, r"reduction must be 'mean', 'sum' or 'none'\. Got: None"),
            *(
                ({"num_bins": bins}, r"num_bins must be None or an integer in \[1, 65536\]")
                for bins in (0, -3, 1.5, "64", True, 65537, 1 << 17)
            ),
            *(({"per_image": value}, "per_image must be True or False") for value in (None, "False", 1)),
            *(
                ({"ignore_index": value}, "ignore_index must be None or a 64-bit integer")
                for value in ("255", 0.5, NAN, 2**63, -(2**63) - 1, 2**70, True)
            ),
            ({"process_group": "world"}, "process_group must be None or a torch.distributed process group"),
        ],
        ids=str,
    )
    def test_exception_options(self, loss, options, message):
        error = NotImplementedError if "reduction" in options else ValueError
        # The module raises when it is constructed.
        with pytest.raises(error, match=message):
            loss(*make_inputs(loss, "cpu", torch.float32), **options)
        with pytest.raises(error, match=message):
            loss.module(**options)

    @pytest.mark.parametrize("options", [{"num_bins": 1}, {"num_bins": 65536}, {"ignore_index": -(2**63)}], ids=str)
    def test_smoke_extreme_options(self, loss, options):
        assert loss(*make_inputs(loss, "cpu", torch.float32), **options).isfinite()

    def test_signature(self, loss):
        """The function and the module have the same keyword-only options and defaults."""
        expected = {
            "ignore_index": -100,
            "per_image": True,
            "reduction": "mean",
            "num_bins": None,
            "process_group": None,
        }
        if loss.channels > 1:
            expected["classes"] = "all"
        for function in (loss.function, loss.module):
            parameters = inspect.signature(function).parameters.values()
            assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == expected

    @pytest.mark.parametrize("which", ["pred", "target"])
    def test_exception_complex(self, loss, which, device):
        inputs = dict(zip(("pred", "target"), make_inputs(loss, device, torch.float32)))
        inputs[which] = inputs[which] * (1 + 5j)
        with pytest.raises(RuntimeError, match=r"must hold real numbers\. Got: .*complex64"):
            loss(**inputs)

    def test_exception_label_under_vmap(self, loss, dtype):
        pred, target = make_inputs(loss, "cpu", dtype)
        target[1, 2, 3] = 7
        with pytest.raises((ValueError, RuntimeError, IndexError), match=f"{loss.wrong_label}|out of bounds"):
            torch.func.vmap(lambda p, t: loss(p[None], t[None]))(pred, target)

    def test_exception_layout(self, loss, device):
        """For points, signals, masks, and volumes, the message says how to pass them."""
        points = torch.zeros(7, loss.channels, device=device), torch.zeros(7, device=device)
        with pytest.raises(ShapeError, match=r"(?s)Points \(N, C\) .*: pass pred\.T\[None, :, :, None\]"):
            loss(*points)
        signals = torch.zeros(2, loss.channels, 7, device=device), torch.zeros(2, 7, device=device)
        with pytest.raises(ShapeError, match=r"(?s)signals .*: pass pred\[\.\.\., None\]"):
            loss(*signals)
        masks = torch.zeros(2, loss.channels, 3, 4, device=device), torch.zeros(2, 1, 3, 4, device=device)
        with pytest.raises(ShapeError, match=r"(?s)got 4.*\nMasks \(B, 1, H, W\): pass target\.squeeze\(1\)"):
            loss(*masks)
        pass_instead = r"pred\.flatten\(0, 1\)" if loss.channels == 1 else r"target\.argmax\(1\)"
        with pytest.raises(ShapeError, match=rf"(?s)\(B, C, H, W\).*: pass {pass_instead}"):
            loss(torch.zeros(2, 3, 4, 5, device=device), torch.zeros(2, 3, 4, 5, device=device))
        volumes = torch.zeros(1, loss.channels, 2, 3, 4, device=device), torch.zeros(1, 2, 3, 4, device=device)
        with pytest.raises(ShapeError, match=r"(?s)Volumes .*: pass pred\.flatten\(3\)"):
            loss(*volumes)

    def test_exception_label_uint64(self, loss):
        """2**64 - 100 must not be taken for -100, which has the same 64 bits."""
        pred, target = make_inputs(loss, "cpu", torch.float32)
        target = target.to(torch.uint64)
        assert torch.equal(loss(pred, target), loss(pred, target.long()))
        wrong = torch.full_like(target, 1, dtype=torch.int64)
        wrong[0, 0, 0] = -100
        with pytest.raises((ValueError, RuntimeError), match=loss.wrong_label):
            loss(pred, wrong.view(torch.uint64))

    def test_feature_numpy_integers(self, loss, device):
        pred, target = make_inputs(loss, device, torch.float32, ignored=255)
        options = {"ignore_index": 255, "num_bins": 8}
        others = {name: np.int64(value) for name, value in options.items()}
        assert torch.equal(loss(pred, target, **others), loss(pred, target, **options))
        for name in options:
            for wrong in (np.array([8, 8]), torch.tensor(8)):
                with pytest.raises(ValueError, match=f"{name} must be None or a"):
                    loss(pred, target, **{name: wrong})

    def test_module_process_group(self, loss, device):
        """A deep copy shares the process group. Pickling raises, because a group cannot be pickled."""
        module = loss.module(num_bins=8, ignore_index=255)
        module.process_group = threading.Lock()  # stands for a group: it cannot be copied or pickled either
        twin = copy.deepcopy(module)
        assert twin is not module
        assert twin.process_group is module.process_group
        assert twin.options == module.options
        with pytest.raises(TypeError, match="cannot be pickled: set process_group=None first, and set it again after"):
            pickle.dumps(module)
        module.process_group = None
        assert pickle.loads(pickle.dumps(module)).options == module.options  # noqa: S301 - pickled by this test

    def test_module(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype, ignored=255)
        options = {"ignore_index": 255, "per_image": False, "reduction": "none", "num_bins": 32}
        module = loss.module(**options)
        assert torch.equal(module(pred, target), loss(pred, target, **options))
        for name, value in options.items():
            assert f"{name}={value!r}" in repr(module)
        assert torch.equal(loss.module(ignore_index=255)(pred, target), loss(pred, target, ignore_index=255))


@each_loss
class TestLovaszValues(LovaszTester):
    @pytest.mark.parametrize("labels", [1, 2, 4])
    @pytest.mark.parametrize("seed", range(3))
    def test_feature_oracle(self, loss, seed, labels, device, dtype):
        pred, target = make_inputs(loss, device, dtype, labels=min(labels, max(2, loss.channels)), ignored=9, seed=seed)
        for options in ({}, {"per_image": False}, {"reduction": "sum"}, {"reduction": "none"}):
            value, grad = value_and_grad(loss, pred, target, ignore_index=9, **options)
            expected, expected_grad = value_and_grad(
                lambda *pair, **options: oracle(loss, *pair, **options),
                pred.cpu().double(),
                target,
                ignore_index=9,
                **options,
            )
            self.assert_close(value.cpu().double(), expected, rtol=2 * RTOL[dtype], atol=1e-16)
            self.assert_close(grad.cpu().double(), expected_grad, rtol=4 * RTOL[dtype], atol=loss.grad_atol(dtype))

    def test_feature_certain_predictions(self, loss, device, dtype):
        # All errors are 0 or 2 for the hinge loss, and 0 or 1 for the others.
        _, target = make_inputs(loss, device, dtype, (2, 6, 6))
        _, predicted = make_inputs(loss, device, dtype, (2, 6, 6), labels=max(2, loss.channels), seed=1)
        pred = right_logits(loss, predicted, 1.0 if loss is HINGE else 200.0).to(dtype)
        expected = []
        for p, t in zip(predicted, target):
            terms = []
            for c in [1] if loss.channels == 1 else range(4):
                union = ((p == c) | (t == c)).sum().item()
                terms.append(1 - ((p == c) & (t == c)).sum().item() / union if union else 0.0)
            expected.append(sum(terms) / len(terms) * (2 if loss is HINGE else 1))
        actual = loss(pred, target, reduction="none")
        self.assert_close(actual.tolist(), expected, rtol=RTOL[dtype], atol=0.0)

    def test_feature_pixel_order_and_ties(self, loss, device, dtype):
        # The order of equal errors can change the gradient, but not the value.
        pred, target = make_inputs(loss, device, dtype, (1, 8, 8))
        for logits in (pred, torch.zeros_like(pred), pred.sign()):
            order = torch.randperm(64, device=device)
            shuffled = (x.flatten(-2)[..., order].reshape(x.shape) for x in (logits, target))
            expected = oracle(loss, logits, target).item()
            self.assert_close(loss(logits, target).item(), expected, rtol=RTOL[dtype], atol=0.0)
            self.assert_close(loss(*shuffled).item(), expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("ignore_index", [-100, 255, 0, 1])
    @pytest.mark.parametrize("num_bins", [None, 16])
    def test_feature_ignore_index(self, loss, num_bins, ignore_index, per_image, device, dtype):
        pred, target = make_inputs(loss, device, dtype, (2, 3, 8))
        target[:, :, :5][target[:, :, :5] == ignore_index] = 1 if ignore_index == 0 else 0
        target[:, :, 5:] = ignore_index
        pred[..., 5] = NAN
        pred[..., 6] = INF
        options = {"per_image": per_image, "num_bins": num_bins}
        value, grad = value_and_grad(loss, pred, target, ignore_index=ignore_index, **options)
        expected, kept = value_and_grad(loss, pred[..., :5], target[..., :5], ignore_index=None, **options)
        self.assert_close(value, expected, rtol=RTOL[dtype], atol=0.0)
        self.assert_close(grad[..., :5], kept, rtol=RTOL[dtype], atol=loss.grad_atol(dtype))
        assert (grad[..., 5:] == 0).all()

    def test_feature_scattered_ignored_pixels(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype, (1, 9, 9))
        ignored = torch.rand(target.shape, device=device) < 0.4
        kept = ~ignored[0]
        expected = loss(pred[:, :, kept][..., None], target[:, kept][..., None])
        actual = loss(pred, target.masked_fill(ignored, 77), ignore_index=77)
        self.assert_close(actual, expected, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize("per_image", [True, False])
    @pytest.mark.parametrize("num_bins", [None, 16])
    def test_feature_no_valid_pixel(self, loss, num_bins, per_image, device, dtype):
        pred, target = make_inputs(loss, device, dtype, (2, 3, 4))
        target[0] = -100
        if not per_image:
            target[1] = -100
        value, grad = value_and_grad(loss, pred, target, reduction="none", per_image=per_image, num_bins=num_bins)
        assert value[0] == 0
        assert (grad[0] == 0).all()
        assert per_image == bool((grad[1] != 0).any())

    @pytest.mark.parametrize("num_bins", [None, 16])
    def test_feature_per_image(self, loss, num_bins, device, dtype):
        pred, target = make_inputs(loss, device, dtype)
        one_by_one = [value_and_grad(loss, p[None], t[None], num_bins=num_bins) for p, t in zip(pred, target)]
        values, grads = value_and_grad(loss, pred, target, reduction="none", num_bins=num_bins)
        self.assert_close(values, torch.stack([value for value, _ in one_by_one]), rtol=RTOL[dtype], atol=0.0)
        expected = torch.cat([grad for _, grad in one_by_one])
        self.assert_close(grads, expected, rtol=4 * RTOL[dtype], atol=loss.grad_atol(dtype))

    @pytest.mark.parametrize("num_bins", [None, 16])
    def test_feature_per_image_false(self, loss, num_bins, device, dtype):
        pred, target = make_inputs(loss, device, dtype)
        value, grad = value_and_grad(loss, pred, target, per_image=False, num_bins=num_bins)
        tall = pred.movedim(0, 1).reshape(1, -1, 15, 6)
        expected, tall_grad = value_and_grad(loss, tall, target.reshape(1, 15, 6), num_bins=num_bins)
        self.assert_close(value, expected, rtol=RTOL[dtype], atol=0.0)
        expected_grad = tall_grad.view(-1, 3, 5, 6).movedim(0, 1)
        self.assert_close(grad, expected_grad, rtol=4 * RTOL[dtype], atol=loss.grad_atol(dtype))

    def test_feature_integer_pred(self, loss, device):
        pred, target = make_inputs(loss, device, widest_dtype(device), (1, 4, 5))
        for each in (pred.round().long(), pred > 0):
            for options in ({}, {"num_bins": 1024}):
                value = loss(each, target, **options)
                assert value.dtype == torch.float32
                self.assert_close(
                    value.item(), oracle(loss, each, target).item(), rtol=1e-2 if options else 1e-6, atol=0.0
                )

    @pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int32, torch.float16, torch.float64])
    def test_feature_label_dtypes(self, loss, label_dtype, device, dtype):
        if label_dtype == torch.float64:
            label_dtype = widest_dtype(device)
        pred, target = make_inputs(loss, device, dtype)
        assert torch.equal(loss(pred, target.to(label_dtype)), loss(pred, target))

    @pytest.mark.parametrize("num_bins", [None, 16])
    def test_feature_default_dtype(self, loss, num_bins, device, dtype):
        """The default dtype of PyTorch does not change the result."""
        pred, target = make_inputs(loss, device, dtype)
        expected = value_and_grad(loss, pred, target, num_bins=num_bins)
        torch.set_default_dtype(widest_dtype(device))
        try:
            actual = value_and_grad(loss, pred, target, num_bins=num_bins)
        finally:
            torch.set_default_dtype(torch.float32)
        self.assert_close(actual, expected, rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("num_bins", [None, 8])
    def test_feature_nan(self, loss, num_bins, sign, device, dtype):
        # A nan must give nan even if its sign bit ranks it last, where its weight is 0.
        for label in (0, 1):
            pred, target = make_inputs(loss, device, dtype, (2, 3, 4))
            pred[0, 0, 1, 1] = torch.copysign(torch.tensor(NAN), torch.tensor(sign))
            target[0, 1, 1] = label
            values = loss(pred, target, reduction="none", num_bins=num_bins)
            assert torch.isnan(values[0])
            assert torch.isfinite(values[1])
            assert torch.isnan(loss(pred, target, per_image=False, num_bins=num_bins))
            assert torch.isnan(loss(pred.requires_grad_(), target))

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
    def test_feature_large_counts_in_half_precision(self, loss, half, form, device, monkeypatch):
        # 2**17 pixels per class: neither half precision can count them, and float16 cannot hold the number.
        force_form(monkeypatch, form, piece=1 << 16)
        pred = torch.full((1, loss.channels, 512, 512), -1.0, device=device, dtype=half)
        target = torch.zeros(1, 512, 512, dtype=torch.long, device=device)
        target[:, :256] = 1
        value, grad = value_and_grad(loss, pred, target)
        if loss is HINGE:
            self.assert_close(value.item(), 2.0, rtol=RTOL[half], atol=0.0)
            self.assert_close(grad.cpu().double().sum().item(), -1.0, rtol=0.05, atol=0.0)
        elif loss is SIGMOID:
            error = 1 / (1 + math.exp(-1))
            self.assert_close(value.item(), error, rtol=RTOL[half], atol=0.0)
            self.assert_close(grad.cpu().double().sum().item(), -error * (1 - error), rtol=0.05, atol=0.0)
        else:
            self.assert_close(value.item(), (2 * 0.75 + 2 * 0.25) / 4, rtol=RTOL[half], atol=0.0)

    @pytest.mark.parametrize("options", [{}, {"per_image": False, "ignore_index": 1}])
    @with_forms("usual")
    def test_feature_forms_agree(self, loss, options, device, dtype, monkeypatch):
        # Each form gives the same gradient, for any piece size.
        pred, target = make_inputs(loss, device, dtype, (2, 40, 50))
        pred = pred + torch.rand(pred.shape, device=device, dtype=dtype)
        results = []
        for form, piece in [
            ("derived", 1 << 24),
            ("dense", 1 << 24),
            ("dense", 1),
            ("cpu", 128),
            ("cpu", 1000),
            ("cpu", 1 << 20),
        ]:
            with monkeypatch.context() as patch:
                force_form(patch, form, piece)
                results.append(value_and_grad(loss, pred, target, **options))
        for value, grad in results[1:]:
            self.assert_close(value, results[0][0], rtol=RTOL[dtype], atol=0.0)
            total, expected = (each.cpu().double().sum() for each in (grad, results[0][1]))
            self.assert_close(total, expected, rtol=1e-2, atol=1e-5)
            if dtype in (torch.float32, torch.float64):  # in half precision, many logits are equal
                difference = (grad - results[0][1]).norm() / results[0][1].norm()
                assert difference < (1e-5 if dtype == torch.float32 else 1e-12)


# Sizes on both sides of each threshold: for another form, for several pieces, for threads, and for rows in parts.
SIZES = [(2, 100, 81), (1, 182, 181), (5, 64, 64), (3, 150, 190), (2, 362, 363), (1, 520, 510), (3, 400, 500)]
SIZES += [(2, 45, 45), (2, 46, 45)]
# Many small images, which share a piece.
SIZES += [(20, 100, 81), (90, 40, 40)]


@each_loss
@with_forms("usual")
class TestLovaszLargeSizes(LovaszTester):
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("options", [{}, {"per_image": False, "ignore_index": 255}], ids=["images", "batch"])
    def test_feature_oracle(self, loss, options, size, device, dtype):
        pred, target = make_inputs(loss, device, dtype, size, ignored=ignored_label(options))
        # signed zeros, subnormals, and logits at the margins
        special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e-7, 1.0, -1.0], device=device, dtype=dtype)
        pred[0, :, -1, : len(special)] = special
        value, grad = value_and_grad(loss, pred, target, **options)
        grad, reference = grad.cpu(), pred.cpu().double().requires_grad_()
        expected = quick_oracle(loss, reference, target, **options)
        (expected_grad,) = torch.autograd.grad(expected, reference)
        self.assert_close(value.item(), expected.item(), rtol=2 * RTOL[dtype], atol=0.0)
        if dtype in (torch.float32, torch.float64):
            # The order of equal errors decides which of them gets which weight, so the special pixels are left out.
            # float32 also makes some probabilities equal or swaps them; the bound allows for that.
            difference = grad - expected_grad
            difference[0, :, -1, : len(special)] = 0.0
            bound = 1e-7 if dtype == torch.float64 else 1e-5 if loss is HINGE else 2e-4
            assert difference.norm() < bound * grad.norm()

    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_feature_nan(self, loss, sign, size, device):
        """A nan of either sign makes the loss of its image nan, and of no other. On x86, 0 / 0 is a negative nan."""
        pred, target = make_inputs(loss, device, torch.float32, size)
        pred[0, 0, 3, 5] = torch.copysign(torch.tensor(NAN), torch.tensor(sign))
        wrong = INF if loss is HINGE else 50.0
        pred[-1, 0, 7, 7:9], target[-1, 7, 7:9] = wrong, 0 if loss.channels == 1 else 1
        if len(pred) > 1:  # the last image has a large or infinite error
            alone = loss(pred[1:], target[1:], reduction="none")
            assert not alone.isnan().any()
            assert loss is not HINGE or alone[-1] == INF
        for label in range(2):
            target[0, 3, 5] = label
            values = loss(pred, target, reduction="none")
            assert values[0].isnan()
            if len(pred) > 1:
                self.assert_close(values[1:], alone, rtol=1e-6, atol=0.0)
            assert loss(pred, target, per_image=False).isnan()


@each_loss
class TestLovaszGradients(LovaszTester):
    def test_feature_batched_gradients(self, loss, device):
        # vmap over torch.autograd.grad computes a Jacobian, as in the documentation of torch.func.
        pred, target = make_inputs(loss, device, widest_dtype(device))
        pred.requires_grad_()
        losses = loss(pred, target, reduction="none")
        (expected,) = torch.autograd.grad(losses.sum(), pred, retain_graph=True)
        units = torch.eye(len(losses), device=device, dtype=losses.dtype)
        grads = torch.func.vmap(lambda unit: torch.autograd.grad(losses, pred, unit, retain_graph=True)[0])(units)
        self.assert_close(grads.sum(0), expected)

    def test_feature_inplace_changes_before_backward(self, loss, form, device):
        # Logits may change in place before backward. Labels are needed by a second backward, so changing them raises.
        pred, target = make_inputs(loss, device, widest_dtype(device))
        leaf = pred.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, target), leaf)
        logits = leaf.clone()
        value = loss(logits, target)
        with torch.no_grad():
            logits.sigmoid_()
        if form != "derived":
            value.backward()
            self.assert_close(leaf.grad, expected)
        value = loss(leaf, target)
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        target.zero_()
        if form != "derived":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(value, leaf)
        else:
            self.assert_close(torch.autograd.grad(value, leaf)[0], first)

    @pytest.mark.parametrize("num_bins", [None, 64])
    def test_feature_repeated_backward(self, loss, num_bins, device, dtype):
        pred, target = make_inputs(loss, device, dtype)
        losses = loss(pred.requires_grad_(), target, reduction="none", num_bins=num_bins)
        upstream = torch.tensor([1.0, -2.0, 0.5], device=device, dtype=dtype)
        (first,) = torch.autograd.grad(losses, pred, torch.ones_like(losses), retain_graph=True)
        kept = first.clone()
        (second,) = torch.autograd.grad(losses, pred, torch.ones_like(losses), retain_graph=True)
        (scaled,) = torch.autograd.grad(losses, pred, upstream)
        assert torch.equal(first, second)
        assert torch.equal(first, kept)
        assert first.data_ptr() != second.data_ptr()
        self.assert_close(scaled, first * upstream.view(-1, 1, 1, 1), rtol=2 * RTOL[dtype], atol=1e-7)

    def test_feature_combined_loss(self, loss, device, dtype):
        # The loss is added to another one behind a parameter, and gradients accumulate over two steps.
        pred, target = make_inputs(loss, device, dtype)
        scale = torch.full((), 1.5, device=device, dtype=dtype, requires_grad=True)
        (loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        once = scale.grad.clone()
        (loss(pred * scale, target) * 0.25 + (pred * scale).square().mean()).backward()
        self.assert_close(scale.grad, 2 * once)
        _, grad = value_and_grad(loss, pred * 1.5, target)
        expected = (0.25 * grad * pred).sum() + 2 * 1.5 * pred.square().mean()
        self.assert_close(once, expected, rtol=4 * RTOL[dtype] + 1e-5, atol=1e-4)

    def test_feature_without_gradient(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype, ignored=-100)
        pred.requires_grad_()
        for options in ({}, {"per_image": False}, {"reduction": "none"}, {"num_bins": 16}):
            expected = loss(pred, target, **options)
            assert expected.requires_grad
            assert torch.equal(loss(pred.detach(), target, **options), expected)
            with torch.no_grad():
                assert torch.equal(loss(pred, target, **options), expected)
            with torch.inference_mode():
                assert torch.equal(loss(pred, target, **options), expected)

    @pytest.mark.parametrize("size", [(2, 5, 6), (2, 200, 200)], ids=str)
    def test_feature_teacher_labels(self, loss, size, device, dtype):
        """Labels made in inference mode cannot be saved for backward, so the loss saves a copy."""
        pred, target = make_inputs(loss, device, dtype, size)
        expected = value_and_grad(loss, pred, target)
        with torch.inference_mode():
            labels = target.clone()
        self.assert_close(value_and_grad(loss, pred, labels), expected, rtol=0.0, atol=0.0)
        (grad,) = torch.autograd.grad(loss(pred.requires_grad_(), labels), pred, create_graph=True)
        self.assert_close(grad.detach(), expected[1], rtol=10 * RTOL[dtype], atol=loss.grad_atol(dtype))

    def test_noncontiguous(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype)
        expected, expected_grad = value_and_grad(loss, pred, target)
        labels = target.transpose(1, 2).contiguous().transpose(1, 2)
        for other in (
            pred.transpose(2, 3).contiguous().transpose(2, 3),
            pred.to(memory_format=torch.channels_last),
            pred.movedim(0, 3).contiguous().movedim(3, 0),
        ):
            leaf = other.detach().requires_grad_()
            value = 2 * loss(leaf, labels)  # so that backward has to scale the gradient
            self.assert_close(value, 2 * expected, rtol=RTOL[dtype], atol=0.0)
            value.backward()
            self.assert_close(leaf.grad, 2 * expected_grad, rtol=2 * RTOL[dtype], atol=2 * loss.grad_atol(dtype))

    def test_inputs_unchanged(self, loss, device, dtype):
        pred, target = make_inputs(loss, device, dtype, ignored=-100)
        copies = pred.clone(), target.clone()
        for options in ({}, {"num_bins": 8}):
            value_and_grad(loss, pred, target, **options)
            loss(pred, target, **options)
        assert torch.equal(pred, copies[0])
        assert torch.equal(target, copies[1])

    @pytest.mark.parametrize("options", [{}, {"per_image": False, "ignore_index": 255}, {"num_bins": 64}])
    def test_deterministic(self, loss, options, device, dtype):
        # Repeated and concurrent calls give the same bits.
        pred, target = make_inputs(loss, device, dtype, (2, 40, 40), ignored=ignored_label(options))
        torch.use_deterministic_algorithms(True)
        try:
            results = [value_and_grad(loss, pred, target, **options) for _ in range(2)]
            with ThreadPoolExecutor(4) as pool:
                results += pool.map(lambda _: value_and_grad(loss, pred, target, **options), range(4))
        finally:
            torch.use_deterministic_algorithms(False)
        for value, grad in results[1:]:
            assert torch.equal(value, results[0][0])
            assert torch.equal(grad, results[0][1])

    @pytest.mark.parametrize("dtype_outside", [torch.float32, torch.bfloat16, torch.float16])
    def test_autocast(self, loss, dtype_outside, device):
        pred, target = make_inputs(loss, device, dtype_outside)
        expected = loss(pred.float(), target)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = loss(pred, target)
        assert actual.dtype == torch.float32
        self.assert_close(actual, expected, rtol=1e-6, atol=0.0)


@each_loss
class TestLovaszLarge(LovaszTester):
    @with_forms("usual")
    def test_feature_more_pixels_than_float32_can_count(self, loss, device):
        """2**24 + 1 background pixels have the larger error, and 2**24 + 1 foreground pixels the smaller one."""
        count = 2**24 + 1
        target = torch.zeros(1, 2, count, dtype=torch.uint8, device=device)
        target[:, 1] = 1
        pred = torch.zeros(1, min(2, loss.channels), 2, count, device=device)
        pred[0, -1, 0] = 1.0 if loss is HINGE else math.log(3)
        options = {"classes": [1]} if loss.channels > 1 else {}
        # The errors are 2 and 1 for the hinge loss, and 3/4 and 1/2 for the others.
        expected = 2 * 0.5 + 1 * 0.5 if loss is HINGE else 0.75 * 0.5 + 0.5 * 0.5
        value, grad = value_and_grad(loss, pred, target, **options)
        self.assert_close(value.item(), expected, rtol=1e-6, atol=0.0)
        # d error / d logit: 1 for the hinge loss, p (1 - p) for the others
        slopes = (1.0, 1.0) if loss is HINGE else (3 / 16, 1 / 4)
        background, foreground = grad[0, -1].cpu().double()
        # The m-th background pixel has the weight G / ((G + m - 1) (G + m)), each foreground pixel 1 / (G + N).
        self.assert_close(background.max().item(), slopes[0] / (count + 1), rtol=1e-6, atol=0.0)
        self.assert_close(background.min().item(), slopes[0] / (4 * count - 2), rtol=1e-6, atol=0.0)
        self.assert_close(background.sum().item(), slopes[0] / 2, rtol=1e-6, atol=0.0)
        self.assert_close(foreground, torch.full_like(foreground, -slopes[1] / (2 * count)), rtol=1e-6, atol=0.0)

    @with_forms("usual")
    def test_feature_no_memory_leak(self, loss, device):
        pred, target = make_inputs(loss, device, torch.float32)
        pred.requires_grad_()

        def objects_after(steps):
            for _ in range(steps):
                pred.grad = None
                loss(pred, target).backward()
            gc.collect()
            return len(gc.get_objects())

        before = objects_after(100)
        assert objects_after(10_000) - before < 100

    @with_forms("usual", "dense")
    def test_feature_concurrent_calls(self, loss, device):
        """Concurrent calls give the results of single calls."""
        cases = [make_inputs(loss, device, torch.float32, (2, 160, 240), seed=seed) for seed in range(16)]
        expected = [value_and_grad(loss, *case) for case in cases]
        with ThreadPoolExecutor(8) as pool:
            actual = list(pool.map(lambda case: value_and_grad(loss, *case), cases))
        self.assert_close(actual, expected, rtol=RTOL[torch.float32], atol=1e-8)


@each_loss_with_options
class TestLovaszTransforms(LovaszTester):
    def make(self, loss, options, device, shape=(2, 3, 4), seed=0, dtype=None):
        dtype = dtype or widest_dtype(device)
        ignored = options.get("ignore_index", -100)
        options = {name: x.to(device, dtype) if torch.is_tensor(x) else x for name, x in options.items()}
        return *make_inputs(loss, device, dtype, shape, ignored=ignored, scale=2.0, seed=seed), options

    @pytest.mark.grad
    def test_gradcheck(self, loss, options, device):
        pred, target, options = self.make(loss, options, device)
        # Finite differences need errors that differ, from each other and from 0, by more than their step.
        pred += torch.linspace(0.0, 1e-2, pred.numel(), device=device, dtype=pred.dtype).view_as(pred)
        pred.requires_grad_()

        def function(x):
            return loss(x, target, **options)

        self.gradcheck(function, pred, fast_mode=False, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, pred, check_fwd_over_rev=True)

    @with_forms("dense", "cpu")
    def test_functorch(self, loss, options, device):
        pred, target, options = self.make(loss, options, device)
        rtol, grad_atol = 10 * RTOL[pred.dtype], GRAD_ATOL[pred.dtype]
        leaf = pred.clone().requires_grad_()
        value = loss(leaf, target, **options).sum()
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        gradient = gradient.detach()

        def function(x):
            return loss(x, target, **options).sum()

        self.assert_close(torch.func.grad(function)(pred), gradient, rtol=rtol, atol=grad_atol)
        tangent = torch.randn_like(pred)
        primal, derivative = torch.func.jvp(function, (pred,), (tangent,))
        self.assert_close(primal, value.detach(), rtol=rtol, atol=0.0)
        self.assert_close(derivative, (gradient * tangent).sum(), rtol=rtol, atol=rtol)
        hessian = torch.func.hessian(function)(pred)
        if loss is HINGE:  # piecewise linear
            assert (hessian == 0).all()
        else:
            (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
            rows = [torch.autograd.grad(g, leaf, retain_graph=True)[0] for g in first.flatten()]
            self.assert_close(hessian, torch.stack(rows).view_as(hessian), rtol=100 * rtol, atol=grad_atol)
            assert (hessian != 0).any()
        if options.get("per_image", True):
            single = torch.func.vmap(lambda x, t: loss(x[None], t[None], **options).sum())(pred, target)
            expected = loss(pred, target, **{**options, "reduction": "none"})
            self.assert_close(single, expected, rtol=rtol, atol=0.0)

    # Compiled code takes the same path whatever form eager code is set to, so one form is enough here.
    @pytest.mark.jit
    @with_forms("dense")
    @pytest.mark.parametrize("num_bins", [None, 64])
    def test_dynamo(self, loss, options, num_bins, device, torch_optimizer):
        options = {**options, "num_bins": num_bins}
        compiled = torch_optimizer(loss.function, fullgraph=True, dynamic=True)
        # The last size is one at which eager code takes another form.
        for step, shape in enumerate([(2, 6, 9), (3, 5, 11), (2, 8, 3), (2, 130, 190)]):
            pred, target, arguments = self.make(loss, options, device, shape, step, torch.float32)
            value, grad = value_and_grad(loss, pred, target, **arguments)
            # Only the first step may compile.
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                actual, actual_grad = value_and_grad(compiled, pred, target, **arguments)
            self.assert_close(actual, value, rtol=1e-5 if num_bins else 1e-6, atol=0.0)
            if num_bins is None:
                self.assert_close(actual_grad, grad, rtol=1e-5, atol=1e-8)
            else:
                # Rounding can move a pixel at the edge of a bin to the next bin.
                assert (actual_grad - grad).norm() < 1e-4 * grad.norm()


@each_loss_with_options
@with_forms("usual")
class TestLovaszCuda(LovaszTester):
    @pytest.mark.parametrize("num_bins", [None, 64])
    def test_feature_no_device_sync(self, loss, options, num_bins, device):
        # Tensors on "meta" take the same path as on CUDA, but have no values: an operation that reads a value, or whose
        # shape depends on one, raises. On a GPU, PyTorch itself raises at any synchronization.
        place = device if device.type == "cuda" else torch.device("meta")
        pred, target = (x.to(place) for x in make_inputs(loss, device, torch.float32))
        options = {name: x.to(place) if torch.is_tensor(x) else x for name, x in options.items()}
        if place.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            loss(pred.requires_grad_(), target, num_bins=num_bins, **options).sum().backward()
        finally:
            if place.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        assert pred.grad.shape == pred.shape


@each_loss
@with_forms("dense")
@pytest.mark.jit
class TestLovaszCompiled(LovaszTester):
    def test_dynamo_exception(self, loss, torch_optimizer):
        compiled = torch_optimizer(loss.function, fullgraph=True)
        pred, target = make_inputs(loss, "cpu", torch.float32)
        with pytest.raises((ValueError, RuntimeError), match=loss.wrong_label):
            compiled(pred, target + 4)

    def test_dynamo_static(self, loss, device, torch_optimizer):
        compiled = torch_optimizer(loss.module(per_image=False), fullgraph=True, dynamic=False)
        pred, target = make_inputs(loss, device, torch.float32)
        value, grad = value_and_grad(compiled, pred, target)
        expected, expected_grad = value_and_grad(loss, pred, target, per_image=False)
        self.assert_close(value, expected, rtol=1e-6, atol=0.0)
        self.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-8)

    @pytest.mark.parametrize("num_bins", [None, 64])
    def test_export(self, loss, num_bins, device):
        pred, target = make_inputs(loss, device, torch.float32, ignored=-100)
        dims = {i: torch.export.Dim(f"size_{i}", min=2, max=1 << 6) for i in (0, 2, 3)}
        exported = torch.export.export(
            loss.module(num_bins=num_bins),
            (pred, target),
            dynamic_shapes={"pred": dims, "target": {0: dims[0], 1: dims[2], 2: dims[3]}},
        ).module()
        for shape in [(3, 5, 6), (2, 7, 3)]:
            pred, target = make_inputs(loss, device, torch.float32, shape)
            self.assert_close(exported(pred, target), loss(pred, target, num_bins=num_bins), rtol=1e-5, atol=0.0)
        if loss is HINGE:  # piecewise linear
            return
        pred, direction, seconds = pred.requires_grad_(), torch.randn_like(pred), []
        for function in (exported, partial(loss, num_bins=num_bins)):
            (first,) = torch.autograd.grad(function(pred, target), pred, create_graph=True)
            seconds += torch.autograd.grad((first * direction).sum(), pred)
        self.assert_close(seconds[0], seconds[1], rtol=1e-4, atol=1e-7)
