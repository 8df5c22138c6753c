# SPDX-License-Identifier: Apache-2.0
"""Which inputs the fused kernels can compute, and what happens if they cannot run. These tests need no Triton."""

import warnings

import pytest
import torch

from kornia.losses import _lovasz_cuda
from kornia.losses._lovasz_options import Options
from kornia.losses._tuning import tuning

from testing.base import BaseTester
from testing.lovasz import SOFTMAX, make_inputs, value_and_grad


class TestWithoutKernels(BaseTester):
    """If the kernels cannot run, the loss warns once, and gives the same result without them."""

    @pytest.fixture(autouse=True)
    def enabled(self, monkeypatch):
        monkeypatch.setattr(tuning, "kernels", True)
        monkeypatch.setattr(_lovasz_cuda, "is_interpreted", lambda: True)
        monkeypatch.setattr(_lovasz_cuda, "reasons", {})

    def test_feature_fallback_warning(self, monkeypatch):
        def launch(*args, **kwargs):
            raise ModuleNotFoundError("No module named 'triton'")

        monkeypatch.setattr(_lovasz_cuda, "launch", launch)
        pred, target = make_inputs(SOFTMAX, "cpu", torch.float32)
        with pytest.warns(UserWarning, match="without fused kernels on cpu: ModuleNotFoundError: No module named"):
            first = value_and_grad(SOFTMAX, pred, target, num_bins=64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = value_and_grad(SOFTMAX, pred, target, num_bins=64)
        monkeypatch.setattr(tuning, "kernels", False)
        self.assert_close(
            (first, second), (value_and_grad(SOFTMAX, pred, target, num_bins=64),) * 2, rtol=0.0, atol=0.0
        )

    @pytest.mark.parametrize(
        "wrong", ["float64 logits", "float64 weight", "unsigned labels", "classes", "tables", "no pixel"]
    )
    def test_feature_unsupported_inputs(self, wrong, monkeypatch):
        monkeypatch.setattr(_lovasz_cuda, "are_kernels_available", lambda device: True)
        pred, target, weight, bins = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long), None, 64
        assert _lovasz_cuda.can_compute(pred, target, weight, Options("softmax", num_bins=bins, classes="all"))
        if wrong == "float64 logits":
            pred = pred.double()
        elif wrong == "float64 weight":
            weight = torch.ones(3, dtype=torch.float64)
        elif wrong == "unsigned labels":
            target = target.to(torch.uint64)
        elif wrong == "classes":
            pred = torch.zeros(2, 2049, 4, 5)
        elif wrong == "tables":  # far larger than the images
            pred, target, bins = torch.zeros(200, 3, 4, 5), torch.zeros(200, 4, 5, dtype=torch.long), 1 << 16
        else:
            pred, target = pred[:0], target[:0]
        assert not _lovasz_cuda.can_compute(pred, target, weight, Options("softmax", num_bins=bins, classes="all"))
