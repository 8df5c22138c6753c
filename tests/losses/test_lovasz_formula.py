# SPDX-License-Identifier: Apache-2.0
"""The closed form of the weights, and the table of the forms, each on its own."""

from fractions import Fraction
from itertools import product

import pytest
import torch
from lovasz import jaccard_loss

from kornia.losses._lovasz import closed_form
from kornia.losses._lovasz_dispatch import _MIN_FAST, form_of
from kornia.losses._lovasz_options import Options


def differences(foreground):
    """Weights of ranked pixels by their definition: what each adds to the Jaccard loss of the pixels before it."""
    total, missed, alarms, before, weights = sum(foreground), 0, 0, Fraction(0), []
    for is_foreground in foreground:
        missed, alarms = missed + is_foreground, alarms + (not is_foreground)
        after = jaccard_loss(missed, alarms, total)
        weights.append(after - before)
        before = after
    return weights


class TestClosedForm:
    @pytest.mark.parametrize("counts", [torch.int32, torch.int64])
    @pytest.mark.parametrize("length", range(1, 9))
    def test_every_arrangement(self, length, counts, device):
        for foreground in product((0, 1), repeat=length):
            background = 1 - torch.tensor(foreground, dtype=counts, device=device)
            union = sum(foreground) + background.cumsum(0, dtype=counts)
            position = torch.arange(length, dtype=counts, device=device)
            weights = closed_form(background, position, union, torch.float64)
            expected = [float(weight) for weight in differences(foreground)]
            torch.testing.assert_close(weights.tolist(), expected, rtol=1e-15, atol=0.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("counts", "size"), [(torch.int32, 2**31 - 1), (torch.int64, 2**44)])
    def test_counts_at_their_limit(self, counts, size, dtype, device):
        """Of so many pixels, near either end of the ranking and in its middle; most differences are tiny."""
        total = size // 3
        cases = []
        for is_background, k, m in product((0, 1), (1, total // 2, total), (1, size // 3, size - total)):
            # the k-th foreground and m-th background pixel are the last so far
            union, before = total + m, total + m - is_background
            kept = total - k if is_background else before
            cases.append((is_background, k + m - 1, union, Fraction(kept, before * union)))
        background, position, union, expected = zip(*cases)
        tensors = (torch.tensor(each, dtype=counts, device=device) for each in (background, position, union))
        expected = torch.tensor([float(each) for each in expected], dtype=dtype, device=device)
        torch.testing.assert_close(
            closed_form(*tensors, dtype), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
        )


class TestFormOf:
    """The table of ``form_of``, line by line."""

    few, many = (torch.zeros(1, 1, 1, count, device="cpu") for count in (_MIN_FAST - 1, _MIN_FAST))

    @pytest.mark.parametrize(
        ("logits", "options", "expected"),
        [
            (few, Options(), "dense"),
            (many, Options(), "fast"),
            (many.clone().requires_grad_(), Options(), "fast"),
            (many, Options(num_bins=8), "dense"),
            (many.to("meta"), Options(), "dense"),
            (few.to("meta"), Options(), "dense"),
        ],
    )
    def test_eager(self, logits, options, expected):
        assert form_of(logits, None, options) == expected
        assert form_of(logits, torch.ones(1, device=logits.device), options) == expected

    def test_weight_that_learns(self):
        assert form_of(self.many, torch.ones(1, requires_grad=True), Options()) == "traced"

    @pytest.mark.parametrize("which", ["logits", "weight"])
    @pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual", "compile"])
    def test_transforms(self, transform, which):
        found = []

        def observe(x):
            logits, weight = (x, None) if which == "logits" else (self.many, x)
            found.append(form_of(logits, weight, Options()))
            return x.sum()

        x = self.many if which == "logits" else torch.ones(1, device="cpu")
        if transform == "vmap":
            torch.func.vmap(observe)(x[None])
        elif transform == "grad":
            torch.func.grad(observe)(x)
        elif transform == "jvp":
            torch.func.jvp(observe, (x,), (x,))
        elif transform == "dual":
            with torch.autograd.forward_ad.dual_level():
                observe(torch.autograd.forward_ad.make_dual(x, x))
        else:
            torch.compile(observe, backend="eager", fullgraph=True)(x)
        assert found == ["traced"]
