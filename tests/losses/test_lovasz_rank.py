# SPDX-License-Identifier: Apache-2.0
"""Ranking on its own: rows of errors as they come, against one row at a time, counted by hand."""

import functools
import math

import pytest
import torch

from kornia.losses import _lovasz_cpu
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


VALUES = {
    "every magnitude": lambda noise: noise.sign() * 10 ** (8 * noise),
    "below 0": lambda noise: 0.2 * noise.sigmoid() - 1,
    "neighbours": lambda noise: 2 + 2 * torch.finfo(noise.dtype).eps * noise.mul(100).round(),
    "few": lambda noise: noise.mul(2).round() + 0.0,  # no -0.0, whose bits differ
    "infinite": lambda noise: torch.where(noise.abs() > 1, noise / 0, noise),
}
# Below and above the lengths from which PyTorch sorts by digits, vectors are padded for that, and rows are divided.
SHAPES = [(1, 1), (1, 40), (300, 12), (2, 6553), (1, 6554), (1, 32_767), (2, 40_000), (1, 270_000)]


@functools.cache
def make_rows(kind, shape, dtype):
    """Rows of errors, their foreground and their weights; the first row has no foreground, the last nothing else."""
    generator = torch.Generator().manual_seed(sum(shape))
    errors = VALUES[kind](torch.randn(shape, dtype=dtype, generator=generator))
    foreground = torch.rand(shape, generator=generator) < 0.3
    foreground[0], foreground[-1] = False, shape[0] > 1
    return errors, foreground, expected_weights(errors, foreground)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", VALUES)
class TestRank:
    def test_rows(self, kind, shape, dtype, device):
        errors, foreground, expected = (rows.to(device) for rows in make_rows(kind, shape, dtype))
        actual = sorted_weights(errors, foreground)
        torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    @pytest.mark.parametrize("share", [0.1, 1.0])
    def test_candidates_of_rows(self, kind, shape, dtype, share):
        """They have the weights that they have among all, and the others have 0."""
        errors, foreground, expected = make_rows(kind, shape, dtype)
        floors = errors.sort(1, descending=True).values[:, math.ceil(share * (shape[1] - 1))]
        weights = _lovasz_cpu.rank_rows(errors, foreground.view(torch.uint8), foreground.sum(1), floors)
        expected = expected * (errors >= floors[:, None])
        torch.testing.assert_close(weights, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    @pytest.mark.parametrize("share", [0.1, 1.0])
    @pytest.mark.parametrize("piece", [1 << 10, 1 << 17])
    def test_candidates_of_a_long_row(self, kind, shape, dtype, piece, share, monkeypatch):
        """So they have however the row is divided; the weights may overwrite the errors."""
        monkeypatch.setattr(_lovasz_cpu, "size_of_pieces", lambda errors: piece)
        for errors, foreground, expected in list(zip(*make_rows(kind, shape, dtype)))[:3]:
            floor = errors.sort(descending=True).values[math.ceil(share * (shape[1] - 1))]
            out = errors.clone()
            loss = _lovasz_cpu.rank_long_row(out, foreground, True, foreground.sum(), floor, out, use)
            torch.testing.assert_close(out, expected * (errors >= floor), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
            assert loss == foreground[errors >= floor].sum()


def use(errors, foreground, weights):
    """Keep the weights, and count the foreground."""
    assert (errors[1:] <= errors[:-1]).all()
    return weights, foreground.sum()
