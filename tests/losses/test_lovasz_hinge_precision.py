# SPDX-License-Identifier: Apache-2.0
"""Gradients of large images. Only the public function is used, so the test runs on any version of Kornia."""

import pytest
import torch

from kornia.losses import lovasz_hinge_loss

from testing.base import BaseTester


class TestLovaszHingePrecision(BaseTester):
    @pytest.mark.parametrize("side", [64, 256, 1024])
    def test_gradient(self, device, side):
        """Every background pixel has a larger error than every foreground pixel, and all errors differ.

        If ``m`` background pixels are wrong and all ``G`` foreground pixels are right, the Jaccard loss is
        ``m / (G + m)``. The weight of the m-th largest error is the difference to the loss of ``m - 1``, which is
        ``G / ((G + m - 1) (G + m))``. With ``N`` background pixels, each foreground pixel has the weight
        ``1 / (G + N)``.
        """
        pixels = side * side
        size = pixels // 8
        order = torch.randperm(pixels, generator=torch.Generator().manual_seed(side))
        # Errors in descending order, from 2 to 1, exact in float32.
        errors = 2.0 - torch.arange(pixels) / pixels
        background = torch.arange(pixels) < pixels - size
        pred, target = torch.empty(pixels), torch.empty(pixels, dtype=torch.long)
        pred[order] = torch.where(background, errors - 1.0, 1.0 - errors)
        target[order] = (~background).long()
        pred = pred.reshape(1, 1, side, side).to(device).requires_grad_()

        lovasz_hinge_loss(pred, target.reshape(1, side, side).to(device)).backward()

        wrong = torch.arange(1, pixels + 1, dtype=torch.float64)
        weights = torch.where(background, size / ((size + wrong - 1) * (size + wrong)), -1.0 / pixels)
        actual = pred.grad.flatten().cpu()[order].double()
        self.assert_close(actual, weights, rtol=1e-5, atol=0.0)
