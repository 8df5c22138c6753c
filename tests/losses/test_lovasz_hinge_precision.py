# SPDX-License-Identifier: Apache-2.0
"""Gradients of large images, from the public function alone: runs with any implementation of the loss."""

import pytest
import torch

from kornia.losses import lovasz_hinge_loss

from testing.base import BaseTester


class TestLovaszHingePrecision(BaseTester):
    @pytest.mark.parametrize("side", [64, 256, 1024])
    def test_gradient(self, device, side):
        """Every background pixel has a larger error than every foreground pixel, and all errors differ.

        With ``G`` foreground pixels, wrong background pixels alone lose ``m / (G + m)`` of the intersection over union
        for ``m`` of them. So the m-th largest error has the difference ``G / ((G + m - 1) (G + m))`` as its weight,
        and each foreground pixel, once all ``N`` background pixels are wrong, ``1 / (G + N)``.
        """
        pixels = side * side
        size = pixels // 8
        order = torch.randperm(pixels, generator=torch.Generator().manual_seed(side))
        # In the order of descending errors, exact in float32: from 2 down to 1.
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
