# SPDX-License-Identifier: Apache-2.0
"""The Lovász sigmoid loss: what the tests shared by all losses do not cover."""

from __future__ import annotations

import pytest
import torch

from kornia.losses import lovasz_sigmoid_loss, lovasz_softmax_loss

from testing.lovasz import INF, RTOL, SIGMOID, LovaszTester, make_inputs, value_and_grad


def softmax_loss_of_two_logits(pred, target, **options):
    """The softmax loss that equals the sigmoid loss."""
    return lovasz_softmax_loss(torch.cat([torch.zeros_like(pred), pred], 1), target, classes=[1], **options)


class TestLovaszSigmoidLoss(LovaszTester):
    def test_convention_limit_is_jaccard_loss(self, device, dtype):
        pred = torch.tensor([[[[1.0, 1.0, -1.0, -1.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, 1, 0]]], device=device)
        self.assert_close(lovasz_sigmoid_loss(50 * pred, target).item(), 2 / 3, rtol=RTOL[dtype], atol=0.0)

    def test_convention_ignore_index_default(self, device, dtype):
        pred = torch.tensor([[[[50.0, 50.0, -50.0]]]], device=device, dtype=dtype)
        target = torch.tensor([[[1, 0, -100]]], device=device)
        self.assert_close(lovasz_sigmoid_loss(pred, target).item(), 0.5, rtol=RTOL[dtype], atol=0.0)

    @pytest.mark.parametrize(
        "options",
        [{}, {"per_image": False}, {"ignore_index": 255, "reduction": "sum"}, {"num_bins": 64, "reduction": "none"}],
        ids=str,
    )
    def test_feature_equals_softmax_loss(self, options, device, dtype):
        pred, target = make_inputs(SIGMOID, device, dtype, ignored=options.get("ignore_index"))
        target[1] = 0  # no foreground
        value, grad = value_and_grad(SIGMOID, pred, target, **options)
        expected, expected_grad = value_and_grad(softmax_loss_of_two_logits, pred, target, **options)
        self.assert_close(value, expected, rtol=2 * RTOL[dtype], atol=0.0)
        self.assert_close(grad, expected_grad, rtol=4 * RTOL[dtype], atol=SIGMOID.grad_atol(dtype))

    @pytest.mark.parametrize("margin", [5.0, 40.0, 80.0])
    def test_feature_tiny_loss(self, margin, device):
        """Errors much smaller than the machine epsilon keep their relative precision."""
        target = torch.zeros(1, 4, 6, dtype=torch.long, device=device)
        target[:, :2] = 1
        pred = margin * (2.0 * target.unsqueeze(1) - 1)
        value, grad = value_and_grad(SIGMOID, pred, target)
        expected, expected_grad = value_and_grad(SIGMOID, pred.cpu().double(), target.cpu())
        assert value > 0
        self.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=0.0)
        self.assert_close(grad.cpu().double(), expected_grad, rtol=1e-5, atol=0.0)

    def test_feature_infinite_logits(self, device, dtype):
        """An infinite logit has the error 0 if it is right and 1 if it is wrong, and gradient 0 in both cases."""
        pred = torch.tensor([INF, -INF, -INF, INF, 1.0], device=device, dtype=dtype).view(1, 1, 1, 5)
        target = torch.tensor([[[1, 0, 1, 0, 1]]], device=device)
        value, grad = value_and_grad(SIGMOID, pred, target)
        # Errors other than 0: 1 (foreground), 1 (background) and sigmoid(-1) (foreground), of 3 foreground pixels.
        # The weights of the errors 1 add up to 1 - 2 / 4, and the weight of sigmoid(-1) is 1 / 4.
        error = torch.tensor(-1.0, dtype=torch.float64).sigmoid().item()
        self.assert_close(value.item(), 0.5 + error / 4, rtol=2 * RTOL[dtype], atol=0.0)
        assert torch.equal(grad != 0, pred == 1)

    def test_feature_bounded(self, device):
        """One wrong pixel increases the loss by at most its share of the union, however large its logit is."""
        target = torch.zeros(1, 10, 10, dtype=torch.long, device=device)
        target[:, :5] = 1
        pred = 200.0 * (2.0 * target.unsqueeze(1) - 1)
        pred[0, 0, 9, 9] = 1e30
        self.assert_close(lovasz_sigmoid_loss(pred, target).item(), 1 / 51, rtol=1e-6, atol=0.0)
