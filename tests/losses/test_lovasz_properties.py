# SPDX-License-Identifier: Apache-2.0
"""Laws of the Lovász losses, checked on inputs of any shape, scale and layout that hypothesis draws.

By default the examples are the same in each run. ``HYPOTHESIS_PROFILE=long`` draws many more, and new ones in each run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from testing.lovasz import HINGE, INF, NAN, RTOL, SOFTMAX, LovaszTester, each_loss, oracle, value_and_grad

# The fixture sets the form once, before the first example, which is what all examples of a test need.
_CHECKS = [hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.differing_executors]
hypothesis.settings.register_profile(
    "fixed", derandomize=True, max_examples=40, deadline=None, database=None, suppress_health_check=_CHECKS
)
hypothesis.settings.register_profile(
    "long", max_examples=1000, deadline=None, database=None, suppress_health_check=_CHECKS
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

IGNORED = 255


@dataclass
class Case:
    """A loss with logits, labels and options."""

    loss: Any
    pred: torch.Tensor
    target: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, pred=None, target=None, **options):
        pred, target = self.pred if pred is None else pred, self.target if target is None else target
        return self.loss(pred, target, ignore_index=IGNORED, **{**self.options, **options})

    @property
    def errors_differ(self) -> bool:
        """Whether different logits give clearly different errors."""
        return bool(((self.pred.abs() < 1e3) & (self.pred.abs() > 1e-9)).all())

    @property
    def signs(self) -> torch.Tensor:
        """For the hinge loss: 1 on the foreground and -1 elsewhere."""
        return 2.0 * (self.target == 1).unsqueeze(1).to(self.pred.dtype) - 1

    @property
    def largest(self) -> torch.Tensor:
        """An upper bound of the errors."""
        return self.pred.abs().max() + 1 if self.loss is HINGE and self.pred.numel() else torch.ones(())


@st.composite
def cases(draw, loss, ties=None, empty=False):
    least = 0 if empty else 1
    batch, height, width = (draw(st.integers(least, most), label) for label, most in zip("BHW", (4, 6, 9)))
    channels = draw(st.integers(2, 9), "C") if loss.channels > 1 else 1
    scale = draw(st.sampled_from([1e-30, 1e-3, 1.0, 1.0, 1.0, 30.0, 1e4, 1e30]), "scale")
    ties = draw(st.booleans(), "ties") if ties is None else ties
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16), "seed"))
    pred = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    pred = (pred.round() if ties else pred) * scale
    occurring = draw(st.integers(1, max(2, channels)), "labels that occur")
    target = torch.randint(0, occurring, (batch, height, width), generator=generator)
    ignored = torch.rand(target.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]), "ignored")
    options = {
        "per_image": draw(st.booleans(), "per_image"),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"]), "reduction"),
    }
    if loss.channels > 1:
        subsets = st.lists(st.integers(0, channels - 1), min_size=1, unique=True)
        options["classes"] = draw(st.one_of(st.sampled_from(["all", "present"]), subsets), "classes")
    layout = draw(st.sampled_from(["contiguous", "channels last", "transposed", "strided"]), "layout")
    if layout == "channels last":
        pred = pred.contiguous(memory_format=torch.channels_last)
    elif layout == "transposed":
        pred = pred.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "strided":
        pred = torch.stack([pred, torch.full_like(pred, NAN)], -1)[..., 0]
    return Case(loss, pred, target.masked_fill(ignored, IGNORED), options)


def laws(**choices):
    """Make a test run on drawn cases of its loss."""

    def decorate(test):
        @hypothesis.given(data=st.data())
        def run(self, loss, data):
            test(self, data.draw(cases(loss, **choices)), data)

        run.__name__ = test.__name__
        return run

    return decorate


@each_loss
class TestLovaszLaws(LovaszTester):
    @laws(empty=True)
    def test_equals_the_definition(self, case, data):
        expected = oracle(case.loss, case.pred, case.target, ignore_index=IGNORED, **case.options)
        for dtype in (torch.float64, torch.float32):
            atol = 1e-30 if dtype == torch.float64 else 2e-7 * float(case.largest)
            self.assert_close(case(case.pred.to(dtype)).double(), expected, rtol=10 * RTOL[dtype], atol=atol)

    @laws(ties=False)
    def test_gradient_equals_the_definition(self, case, data):
        hypothesis.assume(case.errors_differ)
        _, grad = value_and_grad(case, case.pred, case.target)
        reference = case.pred.clone().requires_grad_()
        value = oracle(case.loss, reference, case.target, ignore_index=IGNORED, **case.options).sum()
        (expected,) = torch.autograd.grad(value, reference)
        self.assert_close(grad, expected, rtol=1e-9, atol=1e-14)

    @laws(ties=False)
    def test_pixel_order(self, case, data):
        """Permuting the pixels of all images keeps the value and permutes the gradient."""
        hypothesis.assume(case.errors_differ)
        case.options["reduction"] = "mean"
        order = torch.randperm(case.target[0].numel(), generator=torch.Generator().manual_seed(0))
        pred, target = (x.flatten(-2)[..., order].view(x.shape) for x in (case.pred, case.target))
        value, grad = value_and_grad(case, case.pred, case.target)
        shuffled, shuffled_grad = value_and_grad(case, pred, target)
        self.assert_close(shuffled, value, rtol=1e-12, atol=0.0)
        expected = grad.flatten(-2)[..., order].view(pred.shape)
        self.assert_close(shuffled_grad, expected, rtol=1e-9, atol=1e-13 / case.largest.item())

    @laws()
    def test_ignored_equals_removed(self, case, data):
        """Ignored logits may be nan or inf."""
        case.options["per_image"] = False
        kept = case.target != IGNORED
        filled = case.pred.clone()
        filled.movedim(1, -1)[~kept] = data.draw(st.sampled_from([NAN, INF, -INF, 0.0]))
        value, grad = value_and_grad(case, filled, case.target)
        pred, target = case.pred.movedim(1, -1)[kept].T[None, :, None], case.target[kept][None, None]
        expected, kept_grad = value_and_grad(case, pred, target)
        self.assert_close(value, expected, rtol=1e-12, atol=0.0)
        assert (grad.movedim(1, -1)[~kept] == 0).all()
        self.assert_close(grad.movedim(1, -1)[kept].sum(0), kept_grad[0, :, 0].sum(-1), rtol=1e-6, atol=1e-12)

    @laws()
    def test_per_image_equals_single_images(self, case, data):
        options = {"per_image": True, "reduction": "none"}
        single = [case(p[None], t[None], **options) for p, t in zip(case.pred, case.target)]
        self.assert_close(case(**options), torch.cat(single), rtol=1e-12, atol=0.0)
        vmapped = torch.func.vmap(lambda p, t: case(p[None], t[None], **options)[0])(case.pred, case.target)
        self.assert_close(vmapped, torch.cat(single), rtol=1e-12, atol=0.0)

    @laws()
    def test_num_bins_bound(self, case, data):
        num_bins = data.draw(st.sampled_from([1, 2, 7, 64, 1024]))
        exact = case(reduction="none")
        value = case(reduction="none", num_bins=num_bins)
        assert (value <= exact * (1 + 1e-6)).all()
        assert (value >= exact - case.largest / num_bins - 1e-6 * exact).all()

    @laws()
    def test_nan_propagates(self, case, data):
        case.options |= {"per_image": True, "reduction": "none"}
        if case.loss.channels > 1:
            case.options["classes"] = "all"
        place = data.draw(st.integers(0, case.target.numel() - 1))
        valid = case.target.flatten()[place] != IGNORED
        pred = case.pred.clone()
        b, h, w = (int(i) for i in torch.unravel_index(torch.tensor(place), case.target.shape))
        pred[b, data.draw(st.integers(0, pred.shape[1] - 1)), h, w] = data.draw(st.sampled_from([NAN, -NAN]))
        assert case(pred)[b].isnan() == valid
        assert not case(pred).isnan()[torch.arange(len(pred)) != b].any()

    @laws(empty=True)
    def test_value_without_gradient(self, case, data):
        expected = case(case.pred.clone().requires_grad_())
        assert torch.equal(case(), expected)
        with torch.no_grad():
            assert torch.equal(case(case.pred.clone().requires_grad_()), expected)

    @laws()
    def test_half_precision_is_float32_rounded(self, case, data):
        half = data.draw(st.sampled_from([torch.float16, torch.bfloat16]))
        pred = case.pred.to(half)
        value = case(pred)
        assert value.dtype == half
        torch.testing.assert_close(value, case(pred.float()).to(half), rtol=0.0, atol=0.0, equal_nan=True)


class TestHingeLaws(LovaszTester):
    """The hinge loss is convex, non-decreasing and positively homogeneous in its errors."""

    @hypothesis.given(case=cases(HINGE))
    def test_is_convex_in_the_logits(self, case):
        other = case.pred.flip(0).roll(1, -1) - 0.5
        for share in (0.25, 0.5):
            between = case((1 - share) * case.pred + share * other)
            bound = (1 - share) * case() + share * case(other)
            assert (between <= bound * (1 + 1e-9)).all()

    @hypothesis.given(case=cases(HINGE), step=st.sampled_from([1e-3, 1.0, 1e6]))
    def test_non_decreasing_in_errors(self, case, step):
        more = torch.rand(case.pred.shape, generator=torch.Generator().manual_seed(1), dtype=case.pred.dtype) * step
        assert (case(case.pred - case.signs * more) >= case() * (1 - 1e-9)).all()

    @hypothesis.given(case=cases(HINGE), factor=st.sampled_from([0.0, 1e-3, 3.0, 1e6]))
    def test_positively_homogeneous(self, case, factor):
        errors = 1 - case.signs * case.pred
        scaled = case.signs * (1 - factor * errors)
        self.assert_close(case(scaled), factor * case(), rtol=1e-6, atol=1e-9 * max(1.0, factor))


class TestSoftmaxLaws(LovaszTester):
    @hypothesis.given(case=cases(SOFTMAX))
    def test_class_order(self, case):
        order = torch.randperm(case.pred.shape[1], generator=torch.Generator().manual_seed(0))
        places = torch.cat([order.argsort(), torch.tensor([IGNORED] * (IGNORED + 1 - len(order)))])
        options = dict(case.options)
        if not isinstance(options["classes"], str):
            options["classes"] = [int(places[c]) for c in options["classes"]]
        permuted = case.loss(case.pred[:, order], places[case.target], ignore_index=IGNORED, **options)
        self.assert_close(permuted, case(), rtol=1e-9, atol=1e-30)

    @hypothesis.given(case=cases(SOFTMAX), shift=st.sampled_from([-3.0, 0.5, 100.0]))
    def test_shift_of_all_logits(self, case, shift):
        hypothesis.assume(case.pred.abs().max() < 1e5)
        self.assert_close(case(case.pred + shift), case(), rtol=1e-9, atol=1e-12)

    @hypothesis.given(case=cases(SOFTMAX))
    def test_stays_between_0_and_1(self, case):
        values = case(reduction="none")
        assert ((values >= 0) & (values <= 1 + 1e-12)).all()
