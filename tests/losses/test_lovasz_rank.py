# SPDX-License-Identifier: Apache-2.0
"""Ranking on its own: rows of errors as they come, against one row at a time, counted by hand."""

import math

import pytest
import torch

from kornia.losses._lovasz_cpu import _rank_rows
from kornia.losses._lovasz_sort import sorted_weights


def weights_of(errors, foreground):
    """Weights of one row by the closed form, a pixel at a time, the first of equal errors first."""
    total, missed, alarms = sum(foreground), 0, 0
    places = sorted(range(len(errors)), key=lambda place: -errors[place])
    weights = [0.0] * len(errors)
    for place in places:
        if foreground[place]:
            missed, weights[place] = missed + 1, 1 / (total + alarms)
        else:
            union, alarms = total + alarms, alarms + 1
            weights[place] = (total - missed) / (union * (union + 1)) if union > 0 else 1.0
    return weights


def expected_weights(errors, foreground):
    rows = zip(errors.tolist(), foreground.tolist())
    return torch.tensor([weights_of(*row) for row in rows], dtype=errors.dtype)


# Of numbers of every magnitude, the bits leave no room for the number of a row; of those close together, they do.
VALUES = {
    "every magnitude": lambda noise: noise.sign() * 10 ** (8 * noise),
    "below 0": lambda noise: 0.2 * noise.sigmoid() - 1,
    "neighbours": lambda noise: 2 + 2 * torch.finfo(noise.dtype).eps * noise.mul(100).round(),
    "few": lambda noise: noise.mul(2).round() + 0.0,  # no -0.0, whose bits differ
    "infinite": lambda noise: torch.where(noise.abs() > 1, noise / 0, noise),
}
# One row; as many as a byte can number, and one more; below and above the length from which PyTorch sorts by digits.
SHAPES = [(1, 1), (1, 40), (3, 7), (2, 5000), (1, 40_000), (256, 30), (257, 30), (300, 120)]


@pytest.fixture(params=VALUES)
def make_rows(request):
    """Rows of errors and their foreground; the first row has none, the last nothing else."""

    def make(shape, dtype, device):
        generator = torch.Generator().manual_seed(sum(shape))
        errors = VALUES[request.param](torch.randn(shape, dtype=dtype, generator=generator))
        foreground = torch.rand(shape, generator=generator) < 0.3
        foreground[0], foreground[-1] = False, True
        return errors.to(device), foreground.to(device)

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestRank:
    def test_all(self, make_rows, shape, dtype, device):
        errors, foreground = make_rows(shape, dtype, device)
        expected = expected_weights(errors, foreground).to(device)
        torch.testing.assert_close(
            sorted_weights(errors, foreground), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0
        )

    @pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
    def test_candidates(self, make_rows, shape, dtype, share):
        """The others have the weight 0, and the candidates what they have among all."""
        errors, foreground = make_rows(shape, dtype, "cpu")
        smallest = errors.sort(1, descending=True).values[:, [math.ceil(share * (shape[1] - 1))]]
        candidates = errors >= smallest
        expected = expected_weights(errors, foreground) * candidates
        weights = _rank_rows(errors, foreground.view(torch.uint8), foreground.sum(1), smallest.squeeze(1))
        torch.testing.assert_close(weights, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)
