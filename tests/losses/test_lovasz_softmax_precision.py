# SPDX-License-Identifier: Apache-2.0
"""Gradients of large images. Only the public function is used, so the test runs on any version of Kornia."""

import pytest
import torch

from kornia.losses import lovasz_softmax_loss

from testing.base import BaseTester


class TestLovaszSoftmaxPrecision(BaseTester):
    @pytest.mark.parametrize("side", [64, 256, 1024])
    def test_gradient(self, device, side):
        """Every pixel of class 0 has a larger error for class 1 than every pixel of class 1.

        If ``m`` pixels of class 0 are wrong and all ``G`` pixels of class 1 are right, the Jaccard loss of class 1 is
        ``m / (G + m)``. The weight of the m-th largest error is the difference to the loss of ``m - 1``, which is
        ``G / ((G + m - 1) (G + m))``. With ``N`` pixels of class 0, each pixel of class 1 has the weight
        ``1 / (G + N)``. The class weight of class 0 is 0.
        """
        pixels = side * side
        size = pixels // 8
        order = torch.randperm(pixels, generator=torch.Generator().manual_seed(side))
        # The errors are the sigmoid of these margins, in descending order.
        margins = 2.0 - 4.0 * torch.arange(pixels, dtype=torch.float64) / pixels
        background = torch.arange(pixels) < pixels - size
        logits, target = torch.zeros(2, pixels), torch.empty(pixels, dtype=torch.long)
        logits[1, order] = torch.where(background, margins, -margins).float()
        target[order] = (~background).long()
        pred = logits.reshape(1, 2, side, side).to(device).requires_grad_()
        weight = torch.tensor([0.0, 1.0], device=device)

        lovasz_softmax_loss(pred, target.reshape(1, side, side).to(device), weight).backward()

        wrong = torch.arange(1, pixels + 1, dtype=torch.float64)
        weights = torch.where(background, size / ((size + wrong - 1) * (size + wrong)), -1.0 / pixels)
        # The mean over two classes divides by 2, and the other factors are the derivative of the sigmoid.
        expected = weights / 2 * margins.sigmoid() * (-margins).sigmoid()
        actual = pred.grad[0, 1].flatten().cpu()[order].double()
        # Pixels whose errors are equal in float32 may swap ranks, which changes a weight by a few parts in G.
        self.assert_close(actual, expected, rtol=1e-5 + 10 / size, atol=0.0)
