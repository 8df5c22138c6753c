# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import inspect
import random
import warnings
from fractions import Fraction

import pytest
import torch

from kornia.core._compat import torch_version_ge
from kornia.core.exceptions import ShapeError, TypeCheckError
from kornia.losses import lovasz_hinge_loss
from kornia.losses._eager import device_with_float64
from kornia.losses._tuning import tuning
from kornia.metrics import IoUThresholdSearch, best_iou_threshold, iou_at_thresholds, mean_iou

from testing.base import BaseTester
from testing.lovasz import widest_dtype

INF, NAN = float("inf"), float("nan")
# Numbers for which an inexact comparison gives a wrong result: signed zeros, neighbours in each dtype, subnormals, and
# the largest numbers of each dtype.
ODD = [0.0, -0.0, 1.0, -1.0, 1 + 2**-7, 1 - 2**-8, 1 + 2**-23, 1 - 2**-24, 1 + 2**-52, 3e-45, -3e-45, 6e-8]
ODD += [
    88.0,
    -104.0,
    65504.0,
    -65504.0,
    3.3895e38,
    3.4028235e38,
    -3.4028235e38,
    1e300,
    -1e300,
    1.5e308,
    1.7e308,
    INF,
    -INF,
]


def pixels_of(pred: torch.Tensor, target: torch.Tensor, ignore_index: int | None) -> list[tuple[float, bool]]:
    """For each valid pixel, its logit as a Python float, which is exact, and whether it is foreground."""
    labels = target.flatten().tolist()
    return [(z, t == 1) for z, t in zip(pred.flatten().tolist(), labels) if ignore_index is None or t != ignore_index]


def quotient(intersection: int, union: int) -> Fraction:
    return Fraction(intersection, union) if union else Fraction(1)


def oracle(pixels: list[tuple[float, bool]], threshold: float) -> Fraction:
    """The IoU at one threshold by definition, pixel by pixel."""
    predicted = {i for i, (z, _) in enumerate(pixels) if z > threshold}
    foreground = {i for i, (_, is_foreground) in enumerate(pixels) if is_foreground}
    return quotient(len(predicted & foreground), len(predicted | foreground))


def oracle_intervals(pixels: list[tuple[float, bool]]) -> tuple[Fraction, list[tuple[float, float]]]:
    """The largest IoU, and all intervals ``[lower, upper)`` of thresholds that reach it. Adjacent ones are merged."""
    ends = [-INF, *sorted({z for z, _ in pixels} - {-INF, INF}), INF]
    values = [oracle(pixels, lower) for lower in ends[:-1]]
    if any(z == INF for z, _ in pixels):  # then only the threshold inf predicts no foreground
        ends.append(INF)
        values.append(oracle(pixels, INF))
    best, intervals = max(values), []
    for value, lower, upper in zip(values, ends, ends[1:]):
        if value == best:
            joined = intervals and intervals[-1][1] == lower
            intervals.append((intervals.pop()[0] if joined else lower, upper))
    return best, intervals


def make_inputs(device, dtype, shape=(2, 5, 7), fraction=0.4, seed=0):
    """Logits that correlate with the labels. Many are equal, and all are exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(shape, generator=generator) < fraction).long()
    pred = torch.randint(-20, 21, (shape[0], 1, *shape[1:]), generator=generator) / 8 + target[:, None]
    return pred.to(device, dtype), target.to(device)


def make_odd_inputs(device, dtype, seed):
    """A few pixels, with logits of ``ODD`` or from a short list, and some ignored labels."""
    generator = random.Random(seed)
    size = generator.randint(1, 12)
    values = generator.choices(ODD if seed % 2 else [-2.0, -1.0, 0.5, 0.75, 3.0], k=size)
    labels = generator.choices([0, 1, 255], weights=[3, 3, 1] if seed % 3 else [1, 0, 1], k=size)
    pred = torch.tensor(values, dtype=torch.float64).reshape(1, 1, 1, size).to(device, dtype)
    return pred, torch.tensor(labels).reshape(1, 1, size).to(device)


@pytest.fixture(autouse=True, params=["cells", "every pixel"])
def counting(request, monkeypatch):
    """Count small inputs in both ways, and in several pieces."""
    monkeypatch.setattr(tuning, "cells_from", 0 if request.param == "cells" else INF)
    monkeypatch.setattr(tuning, "metric_piece", 9)
    if request.param == "dense":  # the form that is compiled
        monkeypatch.setattr(tuning, "eager_forms", False)


@pytest.fixture
def large_pieces(monkeypatch, counting):
    """Use larger pieces for larger inputs, which would take long in tiny pieces."""
    monkeypatch.setattr(tuning, "metric_piece", 25_000)


in_every_form = pytest.mark.parametrize("counting", ["cells", "every pixel", "dense"], indirect=True)
in_one_form = pytest.mark.parametrize("counting", ["cells"], indirect=True)


def search_iou(pred, target, thresholds, *, ignore_index=-100):
    """``IoUThresholdSearch`` as a function."""
    search = IoUThresholdSearch(thresholds, ignore_index=ignore_index)
    search.update(pred, target)
    return search.iou_at_thresholds()


def check_exceptions(function):
    """Check the exceptions for wrong predictions and labels, which all functions have in common."""
    pred, target = make_inputs("cpu", torch.float32)
    with pytest.raises(ShapeError, match="expected 4 dimensions, got 3"):
        function(pred[:, 0], target)
    with pytest.raises(ShapeError, match="Shape mismatch at dimension 1: expected 1, got 2"):
        function(pred.expand(-1, 2, -1, -1), target)
    with pytest.raises(ShapeError, match="expected 3 dimensions, got 4"):
        function(pred, target[:, None])
    with pytest.raises(ValueError, match="pred and target shapes must be the same"):
        function(pred, target[..., :-1])
    with pytest.raises(ValueError, match="pred and target shapes must be the same"):
        function(pred[:1], target)
    with pytest.raises(ValueError, match="pred and target must be in the same device"):
        function(pred, target.to("meta"))
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.float16):
        wrong = target.clone()
        wrong[0, 0, 0] = 2
        with pytest.raises(ValueError, match=r"0 for the background and 1 for the foreground.*Got: \[2"):
            function(pred, wrong.to(dtype))
        with pytest.raises(ValueError, match=r"0 for the background and 1 for the foreground\. Got: \[2"):
            function(pred, wrong.to(dtype), ignore_index=None)
    with pytest.raises(ValueError, match=r"Got: \[156\]"):  # -100 modulo 256
        function(pred, torch.full_like(target, 156, dtype=torch.uint8))
    with pytest.raises((AttributeError, TypeError)):
        function(pred.tolist(), target)


@pytest.mark.parametrize("function", [iou_at_thresholds, best_iou_threshold, IoUThresholdSearch])
def test_convention_ignore_index_default(function):
    assert inspect.signature(function).parameters["ignore_index"].default == -100


@in_every_form
class TestIoUAtThresholds(BaseTester):
    def test_smoke(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        iou = iou_at_thresholds(pred.requires_grad_(), target, torch.tensor([-1.0, 0.0], device=device))
        assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert iou.device == pred.device
        assert not iou.requires_grad

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (4, 2, 1), (0, 3, 2), (2, 0, 3)])
    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_cardinality(self, device, dtype, shape, count):
        pred, target = make_inputs(device, dtype, shape)
        iou = iou_at_thresholds(pred, target, torch.linspace(-1, 1, count, device=device))
        assert iou.shape == (count,)
        assert ((iou >= 0) & (iou <= 1)).all()
        if target.numel() == 0:
            assert (iou == 1).all()

    def test_exception(self):
        check_exceptions(lambda pred, target, **options: iou_at_thresholds(pred, target, torch.zeros(3), **options))
        pred, target = make_inputs("cpu", torch.float32)
        with pytest.raises(ShapeError, match="expected 1 dimensions, got 0"):
            iou_at_thresholds(pred, target, torch.tensor(0.0))
        with pytest.raises(ValueError, match=r"thresholds and pred must be in the same device\. Got: meta and cpu"):
            iou_at_thresholds(pred, target, torch.zeros(3, device="meta"))
        with pytest.raises(TypeCheckError, match=r"thresholds must be Tensor\."):
            iou_at_thresholds(pred, target, [0.0, 1.0])
        with pytest.raises(TypeError):
            iou_at_thresholds(pred, target, torch.zeros(3), 255)  # ignore_index is keyword-only

    @pytest.mark.parametrize("fraction", [0.0, 0.05, 0.4, 1.0])
    @pytest.mark.parametrize("function", [iou_at_thresholds, search_iou])
    def test_feature_oracle(self, device, dtype, fraction, function):
        pred, target = make_inputs(device, dtype, fraction=fraction)
        thresholds = torch.arange(-30, 31, device=device) / 8
        thresholds = thresholds[torch.randperm(61, device=device)].repeat(2)  # neither sorted nor unique
        actual = function(pred, target, thresholds)
        pixels = pixels_of(pred, target, None)
        expected = [float(oracle(pixels, t)) for t in thresholds.tolist()]
        self.assert_close(actual, torch.tensor(expected, device=device, dtype=actual.dtype), rtol=2e-7, atol=0.0)

    @pytest.mark.parametrize("threshold_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
    def test_feature_odd_numbers(self, device, dtype, threshold_dtype):
        if threshold_dtype == torch.float64:
            threshold_dtype = widest_dtype(device)
        thresholds = torch.tensor(ODD, dtype=torch.float64).to(device, threshold_dtype)
        for seed in range(12):
            pred, target = make_odd_inputs(device, dtype, seed)
            actual = iou_at_thresholds(pred, target, thresholds, ignore_index=255)
            pixels = pixels_of(pred, target, 255)
            expected = [float(oracle(pixels, t)) for t in thresholds.tolist()]
            self.assert_close(actual, torch.tensor(expected, device=device, dtype=actual.dtype), rtol=2e-7, atol=0.0)

    @pytest.mark.usefixtures("large_pieces")
    def test_feature_large_input(self, device, dtype):
        # Thresholds equal to logits, just below logits, and between logits.
        generator = torch.Generator().manual_seed(0)
        pred = (2 * torch.randn(1, 1, 120, 200, generator=generator, dtype=torch.float64)).to(device, dtype)
        target = (torch.rand(1, 120, 200, generator=generator) < pred[:, 0].cpu().double().sigmoid()).to(device)
        logits = pred.flatten().to(torch.promote_types(dtype, torch.float32))
        on = logits[torch.randperm(len(logits), generator=generator)[:200].to(device)]
        thresholds = torch.cat([on, on.nextafter(torch.full_like(on, -INF)), torch.linspace(-4, 4, 50).to(on)])
        predicted, foreground = logits > thresholds[:, None], target.flatten()
        expected = (predicted & foreground).sum(1).cpu().double() / (predicted | foreground).sum(1).cpu()
        actual = iou_at_thresholds(pred, target, thresholds).cpu().double()
        self.assert_close(actual, expected, rtol=2e-7, atol=0.0)

    def test_feature_empty_mask(self, device, dtype):
        pred, target = make_inputs(device, dtype, fraction=0.0)
        thresholds = torch.stack([pred.float().max(), pred.float().max() - 0.01, pred.new_tensor(-INF).float()])
        assert iou_at_thresholds(pred, target, thresholds).tolist() == [1, 0, 0]
        # The losses and mean_iou also count an empty union as a right prediction.
        assert lovasz_hinge_loss(torch.full_like(pred, -1.0), target) == 0
        assert mean_iou(target, target, 2)[0, 1] == 1

    def test_feature_nan(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        pred[0, 0, 0, 0] = NAN
        thresholds = torch.tensor([-1.0, 0.0, INF], device=device)
        assert iou_at_thresholds(pred, target, thresholds).isnan().all()
        assert iou_at_thresholds(-pred, target, thresholds).isnan().all()  # nan with the other sign bit
        target[0, 0, 0] = -100
        assert not iou_at_thresholds(pred, target, thresholds).isnan().any()

    def test_feature_nan_threshold(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        thresholds = torch.tensor([0.0, NAN, NAN, -1.0, NAN, NAN, NAN, NAN, NAN, INF], device=device)
        actual = iou_at_thresholds(pred, target, thresholds)
        expected = iou_at_thresholds(pred, target, thresholds.nan_to_num(5.0, posinf=INF))
        assert actual.isnan().tolist() == thresholds.isnan().tolist()
        self.assert_close(actual[~actual.isnan()], expected[~actual.isnan()], rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("ignore_index", [-100, 255, 0, 1])
    def test_feature_ignore_index(self, device, dtype, ignore_index):
        pred, target = make_inputs(device, dtype, (2, 3, 8))
        target[:, :, 5:] = ignore_index
        if ignore_index in (0, 1):  # no pixel of the other columns may have the ignored label
            target[:, :, :5] = 1 - ignore_index
        pred[..., 5], pred[..., 6] = NAN, INF
        thresholds = torch.tensor([-1.0, 0.0, 1.0, INF], device=device)
        actual = iou_at_thresholds(pred, target, thresholds, ignore_index=ignore_index)
        expected = iou_at_thresholds(pred[..., :5], target[..., :5], thresholds, ignore_index=None)
        self.assert_close(actual, expected, rtol=0.0, atol=0.0)

    def test_feature_no_valid_pixel(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        target[:] = -100
        assert iou_at_thresholds(pred, target, torch.tensor([-INF, 0.0], device=device)).tolist() == [1, 1]

    @pytest.mark.parametrize("label_dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64])
    def test_feature_label_dtypes(self, device, dtype, label_dtype):
        if label_dtype == torch.float64:
            label_dtype = widest_dtype(device)
        pred, target = make_inputs(device, dtype)
        thresholds = torch.tensor([-1.0, 0.0, 1.0], device=device)
        actual = iou_at_thresholds(pred, target.to(label_dtype), thresholds)
        self.assert_close(actual, iou_at_thresholds(pred, target, thresholds), rtol=0.0, atol=0.0)

    @pytest.mark.parametrize("number_dtype", [torch.bool, torch.uint8, torch.int64])
    def test_feature_integers(self, device, number_dtype):
        pred, target = make_inputs(device, torch.float32)
        pred = pred.abs().to(number_dtype)
        thresholds = torch.tensor([0, 1, 2], device=device)
        actual = iou_at_thresholds(pred, target, thresholds)
        assert actual.dtype == torch.float32
        expected = iou_at_thresholds(pred.float(), target, thresholds.float())
        self.assert_close(actual, expected, rtol=0.0, atol=0.0)

    def test_feature_views(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 6, 8))
        thresholds = torch.tensor([0.0, -1.0, 1.0, 2.0], device=device)
        expected = iou_at_thresholds(pred, target, thresholds[::2].clone())
        pred = pred.transpose(2, 3).contiguous().transpose(2, 3)
        target = target.repeat_interleave(2, 2)[..., ::2]
        kept = pred.clone(), target.clone(), thresholds.clone()
        self.assert_close(iou_at_thresholds(pred, target, thresholds[::2]), expected, rtol=0.0, atol=0.0)
        for before, after in zip(kept, (pred, target, thresholds)):
            assert torch.equal(before, after)

    def test_feature_parameter(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        thresholds = torch.tensor([-1.0, 0.0], device=device)
        actual = iou_at_thresholds(torch.nn.Parameter(pred), target, torch.nn.Parameter(thresholds))
        assert not actual.requires_grad
        self.assert_close(actual, iou_at_thresholds(pred, target, thresholds), rtol=0.0, atol=0.0)


@in_one_form
class TestCompiled(BaseTester):
    @pytest.mark.parametrize("dynamic", [False, True])
    def test_dynamo(self, device, torch_optimizer, dynamic):
        def function(pred, target, thresholds):
            return iou_at_thresholds(pred, target, thresholds)

        compiled = torch_optimizer(function, fullgraph=True, dynamic=dynamic)
        thresholds = torch.tensor([0.5, -1.0, NAN, INF, 0.5, -INF], device=device)
        for seed, (height, width) in enumerate([(6, 9), (5, 11)] if dynamic else [(6, 9)] * 2):
            pred, target = make_inputs(device, torch.float32, (2, height, width), seed=seed)
            target[0, 0] = -100
            pred[0, 0, 0] = NAN
            expected = iou_at_thresholds(pred, target, thresholds)
            assert expected.isnan().tolist() == [False, False, True, False, False, False]
            actual = compiled(pred, target, thresholds)
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0.0, equal_nan=True)
        pred[1, 0, 0, 0] = NAN
        target[1, 0, 0] = 1
        assert compiled(pred, target, thresholds).isnan().all()

    @pytest.mark.skipif(not torch_version_ge(2, 9), reason="Inductor drops asserts before PyTorch 2.9")
    def test_dynamo_exception(self, torch_optimizer):
        compiled = torch_optimizer(iou_at_thresholds, fullgraph=True)
        pred, target = make_inputs("cpu", torch.float32)
        with pytest.raises(RuntimeError, match="0 for the background and 1 for the foreground"):
            compiled(pred, target + 1, torch.zeros(2))

    def test_vmap(self, device):
        pred, target = make_inputs(device, torch.float32, (3, 4, 5))
        thresholds = torch.tensor([0.5, -1.0], device=device)
        actual = torch.func.vmap(iou_at_thresholds, in_dims=(0, 0, None))(pred[:, None], target[:, None], thresholds)
        for index in range(3):
            expected = iou_at_thresholds(pred[index, None], target[index, None], thresholds)
            self.assert_close(actual[index], expected, rtol=1e-6, atol=0.0)


class TestBestIoUThreshold(BaseTester):
    def check(self, pred, target, ignore_index=None):
        """Compare with the best of all thresholds, and check which of the best thresholds is returned."""
        threshold, iou = best_iou_threshold(pred, target, ignore_index=ignore_index)
        assert threshold.shape == iou.shape == ()
        assert threshold.dtype == (pred.dtype if pred.is_floating_point() else torch.float32)
        assert iou.dtype == (torch.float64 if pred.dtype == torch.float64 else torch.float32)
        assert threshold.device == iou.device == pred.device
        pixels = pixels_of(pred, target, ignore_index)
        best, intervals = oracle_intervals(pixels)
        assert iou.item() == pytest.approx(float(best), rel=1e-15 if iou.dtype == torch.float64 else 2e-7)
        # A comparison in the dtype of pred gives this IoU.
        predicted, foreground = (pred > threshold)[:, 0], target == 1
        valid = torch.ones_like(foreground) if ignore_index is None else target != ignore_index
        intersection, union = (predicted & foreground & valid).sum(), ((predicted | foreground) & valid).sum()
        assert quotient(int(intersection), int(union)) == best

        t = threshold.item()
        lower, upper = next(pair for pair in intervals if pair[0] <= t and (t < pair[1] or t == pair[0]))
        widths = [high - low if low < high else 0.0 for low, high in intervals]
        assert max(widths) == widths[intervals.index((lower, upper))]
        if -INF < lower and upper < INF:
            middle = torch.tensor(float((Fraction(lower) + Fraction(upper)) / 2), dtype=threshold.dtype)
            assert t == (middle if middle < upper else lower)
        elif lower <= 0 < upper:
            assert t == 0
        elif upper < INF:
            assert t == torch.tensor(upper - 1, dtype=threshold.dtype) or (t == -INF and t < upper)
        else:
            assert t == torch.tensor(lower + 1, dtype=threshold.dtype)
        return threshold

    def test_smoke(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        self.check(pred.requires_grad_(), target)
        assert not any(each.requires_grad for each in best_iou_threshold(pred, target))

    @pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 5), (4, 2, 1), (0, 3, 2), (2, 0, 3)])
    def test_cardinality(self, device, dtype, shape):
        self.check(*make_inputs(device, dtype, shape))

    def test_exception(self):
        check_exceptions(best_iou_threshold)
        with pytest.raises(TypeError):
            best_iou_threshold(*make_inputs("cpu", torch.float32), 255)  # ignore_index is keyword-only

    @pytest.mark.parametrize("fraction", [0.0, 0.05, 0.4, 1.0])
    def test_feature_oracle(self, device, dtype, fraction):
        for seed in range(10):
            self.check(*make_inputs(device, dtype, (1, 4, 6), fraction=fraction, seed=seed))

    def test_feature_odd_numbers(self, device, dtype):
        for seed in range(50):
            self.check(*make_odd_inputs(device, dtype, seed), ignore_index=255)

    @pytest.mark.parametrize("number_dtype", [torch.bool, torch.uint8, torch.int64])
    def test_feature_integers(self, device, number_dtype):
        pred, target = make_inputs(device, torch.float32)
        self.check(pred.abs().to(number_dtype), target)

    @pytest.mark.usefixtures("large_pieces")
    @pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
    def test_feature_large_input(self, device, dtype, scale):
        # Depending on the scale, few or many logits share their upper bits. The expected optimum comes from sorting.
        generator = torch.Generator().manual_seed(0)
        target = torch.rand(1, 200, 300, generator=generator) < 0.2
        target[..., 0] = False
        noise = torch.randn(1, 1, 200, 300, generator=generator, dtype=torch.float64)
        pred = (3 + scale * (noise + 2 * target[:, None])).to(device, dtype)
        pred[..., 0] = -1e4  # so that the optimum does not predict all pixels
        values, order = pred.cpu().flatten().sort(descending=True)
        hits = target.flatten()[order].double().cumsum(0)
        iou = hits / (target.sum() + torch.arange(1, len(hits) + 1) - hits)
        iou[:-1][values[1:] == values[:-1]] = 0.0
        target = target.to(device)
        threshold, best = best_iou_threshold(pred, target)
        self.assert_close(best.cpu().double(), iou.max(), rtol=1e-7, atol=0.0)
        self.assert_close(iou_at_thresholds(pred, target, threshold[None])[0], best, rtol=0.0, atol=0.0)
        assert values[iou.argmax() + 1] <= threshold.cpu() < values[iou.argmax()]

    def test_feature_middle(self, device, dtype):
        pred = torch.tensor([[[[-3.0, -1.0, 0.5, 4.0]]]], device=device, dtype=dtype)
        assert best_iou_threshold(pred, torch.tensor([[[0, 0, 1, 1]]], device=device))[0] == -0.25
        pred = torch.tensor([[[[-1.0, 0.5, 0.5, 4.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[0, 0, 1, 1]]], device=device)
        threshold, iou = best_iou_threshold(pred, target)
        assert (threshold.item(), iou.item()) == (-0.25, pytest.approx(2 / 3))
        # The IoU is 1/2 for thresholds in [0.5, 4) and 2/4 in [-1, 0.5), so the interval of the best is [-1, 4).
        pred = torch.tensor([[[[-1.0, 0.5, 0.5, 0.5, 4.0]]]], device=device, dtype=dtype)
        assert best_iou_threshold(pred, torch.tensor([[[0, 1, 0, 0, 1]]], device=device))[0] == 1.5

    def test_feature_widest(self, device, dtype):
        # The IoU is 1/2 for thresholds in [6, 7) and 2/4 in [1, 5), which is the wider interval.
        pred = torch.tensor([[[[7.0, 6.0, 5.0, 5.0, 1.0, 1.0, 1.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 1, 0, 0, 0, 0]]], device=device)
        pixels = pixels_of(pred, target, None)
        assert oracle_intervals(pixels) == (Fraction(1, 2), [(1.0, 5.0), (6.0, 7.0)])
        assert self.check(pred, target) == 3

    @pytest.mark.parametrize(
        ("values", "labels", "expected"),
        [
            ([-2.0, -1.0], [0, 0], 0.0),  # no foreground, and the threshold 0 predicts none
            ([-2.0, 3.0], [0, 0], 4.0),
            ([2.0, 3.0], [1, 1], 0.0),  # all foreground, and the threshold 0 predicts all of it
            ([-2.0, 3.0], [1, 1], -3.0),
            ([0.0, 3.0], [1, 1], -1.0),  # the threshold 0 does not predict a logit of 0
            ([-2.0, 3.0], [-100, -100], 0.0),
            ([-INF, -INF], [1, 0], 0.0),  # no threshold predicts any foreground
            ([INF, INF], [1, 0], 0.0),
            ([INF, INF], [0, 0], INF),
        ],
    )
    def test_feature_unbounded_interval(self, device, dtype, values, labels, expected):
        pred = torch.tensor(values, device=device, dtype=dtype).reshape(1, 1, 1, 2)
        target = torch.tensor(labels, device=device).reshape(1, 1, 2)
        assert self.check(pred, target, ignore_index=-100) == expected

    def test_feature_huge_negative_logits(self, device, dtype):
        # The logit is so large that subtracting 1 does not change it.
        value = -1 / torch.finfo(dtype).eps * 4
        pred = torch.full((1, 1, 1, 2), value, device=device, dtype=dtype)
        threshold, iou = best_iou_threshold(pred, torch.ones(1, 1, 2, device=device))
        assert (threshold, iou) == (-INF, 1)

    def test_feature_nan(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        pred[1, 0, 2, 3] = NAN
        for each in (pred, -pred):
            threshold, iou = best_iou_threshold(each, target)
            assert threshold.isnan()
            assert iou.isnan()
            assert threshold.dtype == dtype
            assert iou.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        target[1, 2, 3] = 255
        self.check(pred, target, ignore_index=255)

    @pytest.mark.parametrize("ignore_index", [-100, 255, 0, 1])
    def test_feature_ignore_index(self, device, dtype, ignore_index):
        pred, target = make_inputs(device, dtype, (2, 3, 8))
        target[:, :, 5:] = ignore_index
        if ignore_index in (0, 1):
            target[:, :, :5] = 1 - ignore_index
        pred[..., 5], pred[..., 6] = NAN, INF
        actual = best_iou_threshold(pred, target, ignore_index=ignore_index)
        assert actual == best_iou_threshold(pred[..., :5], target[..., :5], ignore_index=None)

    def test_feature_views(self, device, dtype):
        pred, target = make_inputs(device, dtype, (2, 6, 8))
        expected = best_iou_threshold(pred, target)
        pred = pred.transpose(2, 3).contiguous().transpose(2, 3)
        kept = pred.clone(), target.clone()
        assert best_iou_threshold(pred, target.repeat_interleave(2, 2)[..., ::2].bool()) == expected
        assert torch.equal(pred, kept[0])
        assert torch.equal(target, kept[1])


def search_on_rank(rank: int, folder: str) -> None:
    """Run one of two processes. The first counts two of three images, the second counts one and resets in the end."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        group = torch.distributed.group.WORLD
        pred, target = make_inputs("cpu", torch.float32, (3, 5, 7))
        own = slice(0, 2) if rank == 0 else slice(2, 3)
        search = IoUThresholdSearch()
        search.update(pred[own], target[own])
        alone = search.iou_at_thresholds()
        first = search.iou_at_thresholds(group), *search.compute(group)
        again = search.iou_at_thresholds(group), *search.compute(group)
        if rank == 1:
            search.reset()
        torch.save((alone, first, again, search.compute(group)), f"{folder}/{rank}")
    finally:
        torch.distributed.destroy_process_group()


def test_integer_thresholds_that_float32_cannot_hold(device):
    pred = torch.tensor([2.0**24, 2.0**24 + 2], device=device).view(1, 1, 1, 2)
    target = torch.ones(1, 1, 2, dtype=torch.long, device=device)
    thresholds = 2**24 + torch.arange(-1, 3, device=device)
    assert iou_at_thresholds(pred, target, thresholds).tolist() == [1.0, 0.5, 0.5, 0.0]


class TestIoUThresholdSearch(BaseTester):
    def test_smoke(self, device, dtype):
        search = IoUThresholdSearch()
        search.update(*make_inputs(device, dtype))
        threshold, iou = search.compute()
        assert threshold.shape == iou.shape == ()
        assert threshold.device == iou.device == search.counts.device
        assert search.counts.device.type == device.type

    @pytest.mark.parametrize("wrong", [True, 255.0, 1.5, float("nan"), 2**70, "255"], ids=str)
    def test_exception_ignore_index(self, wrong):
        with pytest.raises(ValueError, match="ignore_index must be None or a 64-bit integer"):
            IoUThresholdSearch(ignore_index=wrong)

    @pytest.mark.parametrize(("logit", "end"), [(-3.0, "smallest"), (0.0, None), (3.0, "largest")])
    def test_feature_warning_at_the_edge(self, logit, end, device, dtype):
        # Pixels above the given logit are foreground. The logit is below the grid, inside it, or above it.
        pred = torch.linspace(-4, 4, 81, device=device, dtype=dtype)
        target = (pred > logit + 0.05).long()
        search = IoUThresholdSearch(torch.linspace(-1, 1, 9, device=device))
        search.update(pred.view(1, 1, 1, -1), target.view(1, 1, -1))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            search.compute()
        assert [end in str(warning.message) for warning in caught] == [True] * (end is not None)
        assert all(warning.filename == __file__ for warning in caught)

    def test_feature_no_warning_for_perfect_iou(self, device, dtype):
        search = IoUThresholdSearch()
        search.update(torch.ones(1, 1, 2, 2, device=device, dtype=dtype), torch.ones(1, 2, 2, device=device))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert search.compute()[1] == 1

    def test_feature_threshold_dtype(self, device, dtype):
        """``pred > threshold`` has the IoU that is returned, whether or not both have the same dtype."""
        pred = torch.full((1, 1, 2, 2), 0.1, device=device, dtype=dtype)
        target = torch.ones(1, 2, 2, dtype=torch.long, device=device)
        for threshold_dtype in (torch.float32, widest_dtype(device)):
            for value in (0.1, float(pred[0, 0, 0, 0])):
                search = IoUThresholdSearch(torch.tensor([value], dtype=threshold_dtype, device=device))
                search.update(pred, target)
                threshold, iou = search.compute()
                predicted = pred > threshold.view(1)
                assert iou == predicted.float().mean()

    @pytest.mark.parametrize("count", [1, 2, 7])
    def test_cardinality(self, device, dtype, count):
        thresholds = torch.linspace(-1, 1, count, dtype=dtype, device=device)
        search = IoUThresholdSearch(thresholds)
        assert search.counts.shape == (2, 2 + count)
        assert search.counts.dtype == torch.int64
        search.update(*make_inputs(device, dtype))
        assert search.counts.shape == (2, 2 + count)
        assert search.counts.dtype == torch.int64
        assert search.iou_at_thresholds().shape == (count,)
        assert search.iou_at_thresholds().dtype == torch.promote_types(dtype, torch.float32)
        threshold, iou = search.compute()
        assert threshold.dtype == dtype
        assert iou.dtype == torch.promote_types(dtype, torch.float32)

    def test_default_thresholds(self):
        thresholds = IoUThresholdSearch().thresholds
        assert thresholds.shape == (31,)
        assert thresholds.dtype == torch.float32
        expected = [torch.tensor(0.3 + 0.4 * i / 30, dtype=torch.float64) for i in range(31)]
        expected = torch.stack([(p / (1 - p)).log() for p in expected]).float()
        self.assert_close(thresholds, expected, rtol=1e-5, atol=1e-6)
        assert thresholds[15] == 0

    def test_repr(self, device):
        search = IoUThresholdSearch(torch.tensor([-1.0, 0.5]), ignore_index=255)
        search.update(torch.zeros(2, 1, 3, 4, device=device), torch.zeros(2, 3, 4, dtype=torch.long, device=device))
        expected = "IoUThresholdSearch(2 thresholds from -1 to 0.5, ignore_index=255, 24 pixels counted)"
        assert repr(search) == expected

    def test_exception(self):
        check_exceptions(lambda pred, target, **options: IoUThresholdSearch(**options).update(pred, target))
        with pytest.raises(ShapeError, match="expected 1 dimensions, got 2"):
            IoUThresholdSearch(torch.zeros(2, 3))
        with pytest.raises(TypeCheckError, match=r"thresholds must be Tensor or None\."):
            IoUThresholdSearch([0.0, 1.0])
        for thresholds in (torch.zeros(0), torch.tensor([0.0, NAN]), torch.tensor([0, 1])):
            with pytest.raises(
                ValueError, match="thresholds must hold floating-point numbers, at least one and none nan"
            ):
                IoUThresholdSearch(thresholds)
        with pytest.raises(TypeError):
            IoUThresholdSearch(None, 255)  # ignore_index is keyword-only

    def test_exception_keeps_the_counts(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        search = IoUThresholdSearch()
        search.update(pred, target)
        before = search.counts.clone()
        with pytest.raises(ValueError, match="pred and target shapes must be the same"):
            search.update(pred, target[..., 1:])
        assert torch.equal(search.counts, before)

    def test_exception_nothing_counted(self, device, dtype):
        search = IoUThresholdSearch()
        pred, target = make_inputs(device, dtype)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no valid pixel has been counted: call update first"):
                search.compute()
            with pytest.raises(RuntimeError, match="no valid pixel has been counted: call update first"):
                search.iou_at_thresholds()
            search.update(pred, torch.full_like(target, -100))
        search.update(pred, target)
        search.reset()
        with pytest.raises(RuntimeError, match="no valid pixel has been counted"):
            search.compute()

    def test_feature_several_batches(self, device, dtype):
        pred, target = make_inputs(device, dtype, (5, 4, 6))
        target[1, 2] = 7
        thresholds = torch.tensor([1.0, -1.0, 0.25], device=device)
        search, other = (IoUThresholdSearch(thresholds, ignore_index=7) for _ in range(2))
        for index in range(5):
            search.update(pred[index, None], target[index, None])
        expected = iou_at_thresholds(pred, target, thresholds, ignore_index=7)
        self.assert_close(search.iou_at_thresholds(), expected.float(), rtol=1e-7, atol=0.0)
        other.update(pred, target)
        assert torch.equal(search.counts, other.counts)
        search.reset()
        search.update(pred[:2], target[:2])
        search.update(pred[:0], target[:0])
        expected = iou_at_thresholds(pred[:2], target[:2], thresholds, ignore_index=7)
        self.assert_close(search.iou_at_thresholds(), expected.float(), rtol=1e-7, atol=0.0)

    def test_feature_counts(self, device, dtype):
        pred = torch.tensor([[[[2.0, 0.5, NAN, NAN, -1.0, 9.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 0, 1, 1, -100]]], device=device)
        search = IoUThresholdSearch(torch.tensor([1.0, 0.0]))
        search.update(pred[..., [0, 1, 4, 5]], target[..., [0, 1, 4, 5]])
        assert search.counts.tolist() == [[1, 0, 0, 1], [2, 0, 1, 1]]
        search.update(pred, target)
        assert search.counts[:, :2].tolist() == [[3, 1], [5, 1]]

    @pytest.mark.usefixtures("large_pieces")
    def test_feature_more_pixels_than_float32_counts(self, device):
        pred = torch.full((1, 1, 1024, 1024), -1.0, device=device)
        pred[..., 0] = 1.0
        target = (pred[:, 0] > 0).long()
        target[:, 0, 0] = 0
        search = IoUThresholdSearch(torch.tensor([0.0, -2.0]))
        for _ in range(17):
            search.update(pred, target)
        negatives, positives = 17 * (1024 * 1023 + 1), 17 * 1023
        assert search.counts.tolist() == [[negatives, 0, 17, negatives], [positives, 0, positives, positives]]
        expected = torch.tensor([1023 / 1024, 1023 / 1024**2], device=device)
        self.assert_close(search.iou_at_thresholds(), expected, rtol=1e-7, atol=0.0)

    def test_feature_best_of_grid(self, device, dtype):
        for seed in range(20):
            pred, target = make_inputs(device, dtype, (1, 4, 6), seed=seed)
            thresholds = torch.tensor([0.5, -1.0, 1.5, -0.25, 2.25], device=device)
            search = IoUThresholdSearch(thresholds)
            search.update(pred, target)
            threshold, iou = search.compute()
            pixels = pixels_of(pred, target, None)
            assert oracle(pixels, threshold.item()) == max(oracle(pixels, t) for t in thresholds.tolist())
            assert iou.item() == pytest.approx(float(oracle(pixels, threshold.item())), rel=1e-7)

    @pytest.mark.parametrize(
        ("thresholds", "expected"),
        [
            ([3.0, 0.0, 1.0, 2.0, -1.0], 1.0),  # the middle of 0, 1 and 2
            ([0.0, 3.0, 2.0, -1.0, 1.0, -0.5], 1.0),
            ([-0.5, 2.0, 0.0, 1.0], 1.0),
            ([-1.0, 3.0, 2.0], 2.0),
        ],
    )
    def test_feature_middle_of_grid(self, device, dtype, thresholds, expected):
        pred = torch.tensor([[[[-0.25, 2.5, 7.0]]]], device=device, dtype=dtype)
        search = IoUThresholdSearch(torch.tensor(thresholds, device=device))
        search.update(pred, torch.tensor([[[0, 1, 1]]], device=device))
        threshold, iou = search.compute()
        assert (threshold.item(), iou.item()) == (expected, 1.0)

    def test_feature_widest_of_grid(self, device, dtype):
        # The IoU is 1/2 at the thresholds 5 and 4, 1/3 at 0, and 2/4 at -inf.
        pred = torch.tensor([[[[6.0, 2.0, -3.0, -3.0]]]], device=device, dtype=dtype)
        search = IoUThresholdSearch(torch.tensor([-INF, 5.0, 0.0, -INF, 4.0], device=device))
        search.update(pred, torch.tensor([[[1, 0, 1, 0]]], device=device))
        assert search.compute()[0] == 5

    def test_feature_near_tie(self, device):
        # The two IoUs differ, but are equal in float32.
        search = IoUThresholdSearch(torch.tensor([0.0, 1.0], device=device))
        search.counts = torch.tensor([[9, 0, 2, 1], [2**26, 0, 2**26 - 1, 2**26 - 1]], device=device)
        assert search.compute()[0] == 1
        search.counts = torch.tensor([[9, 0, 1, 2], [2**26, 0, 2**26 - 1, 2**26 - 1]], device=device)
        assert search.compute()[0] == 0

    def test_feature_nan(self, device, dtype):
        pred, target = make_inputs(device, dtype)
        search = IoUThresholdSearch()
        search.update(pred, target)
        assert not search.iou_at_thresholds().isnan().any()
        pred[0, 0, 0, 0] = NAN
        search.update(pred, target)
        search.update(-pred.nan_to_num(), target)
        assert search.iou_at_thresholds().isnan().all()
        assert all(each.isnan() for each in search.compute())
        search.reset()
        search.update(pred.nan_to_num(), target)
        assert not any(each.isnan() for each in search.compute())

    def test_feature_thresholds_are_copied(self):
        thresholds = torch.tensor([0.0, 1.0], requires_grad=True)
        search = IoUThresholdSearch(thresholds)
        with torch.no_grad():
            thresholds += 1
        assert search.thresholds.tolist() == [0, 1]
        assert not search.thresholds.requires_grad

    @in_one_form
    @pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
    def test_feature_process_group(self, tmp_path):
        torch.multiprocessing.spawn(search_on_rank, (str(tmp_path),), nprocs=2)
        pred, target = make_inputs("cpu", torch.float32, (3, 5, 7))
        together, first_only = IoUThresholdSearch(), IoUThresholdSearch()
        together.update(pred, target)
        first_only.update(pred[:2], target[:2])
        for rank in range(2):
            alone, first, again, after_reset = torch.load(tmp_path / str(rank), weights_only=True)
            own = slice(0, 2) if rank == 0 else slice(2, 3)
            expected = iou_at_thresholds(pred[own], target[own], together.thresholds)
            self.assert_close(alone, expected, rtol=1e-7, atol=0.0)
            for curve, *best in (first, again):
                self.assert_close(curve, together.iou_at_thresholds(), rtol=0.0, atol=0.0)
                assert tuple(best) == together.compute()
            assert after_reset == first_only.compute()


def test_device_without_float64():
    # The quotients of counts need float64, so MPS leaves them to the CPU.
    assert device_with_float64(torch.device("mps")).type == "cpu"
    assert device_with_float64(torch.device("cuda:1")) == torch.device("cuda:1")
