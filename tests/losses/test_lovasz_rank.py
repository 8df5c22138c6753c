# SPDX-License-Identifier: Apache-2.0
"""From errors to weights by sorting, compared with a loop over the pixels of one row."""

import functools
import math

import pytest
import torch

from kornia.losses import _lovasz_cpu
from kornia.losses._lovasz_sort import sorted_weights

from testing.lovasz import widest_dtype


def weights_of(errors, foreground):
    """Weights of one row by the closed form, pixel by pixel. Equal errors keep their order."""
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
    "few": lambda noise: noise.mul(2).round() + 0.0,  # turns -0.0 into 0.0, as the two differ in their bits
    "infinite": lambda noise: torch.where(noise.abs() > 1, noise / 0, noise),
}
# Lengths below and above those from which PyTorch uses its radix sort, vectors are padded for it, and rows are divided.
SHAPES = [(1, 1), (1, 40), (300, 12), (2, 6553), (1, 6554), (1, 32_767), (2, 40_000), (1, 270_000)]


@functools.cache
def make_rows(kind, shape, dtype):
    """Rows of errors with foreground and weights. The first row is all background, the last one all foreground."""
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
        if dtype == torch.float64:
            dtype = widest_dtype(device)
        errors, foreground, expected = (rows.to(device) for rows in make_rows(kind, shape, dtype))
        actual = sorted_weights(errors, foreground)
        torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    @pytest.mark.parametrize("share", [0.1, 1.0])
    def test_candidates_of_rows(self, kind, shape, dtype, share):
        """Candidates have the same weights as when all pixels are ranked, and the other pixels have weight 0."""
        errors, foreground, expected = make_rows(kind, shape, dtype)
        floors = errors.sort(1, descending=True).values[:, math.ceil(share * (shape[1] - 1))]
        expected = expected * (errors >= floors[:, None])
        for rows in (errors, errors.t().contiguous().t()):  # in memory, rows or columns follow each other
            weights = _lovasz_cpu.rank_rows(rows, foreground.view(torch.uint8), foreground.sum(1), floors)
            torch.testing.assert_close(weights, expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    @pytest.mark.parametrize("share", [0.1, 1.0])
    @pytest.mark.parametrize("piece", [1 << 10, 1 << 17])
    def test_candidates_of_a_long_row(self, kind, shape, dtype, piece, share, monkeypatch):
        """The same for any piece size. The weights may be written over the errors."""
        monkeypatch.setattr(_lovasz_cpu, "size_of_pieces", lambda errors: piece)
        for errors, foreground, expected in list(zip(*make_rows(kind, shape, dtype)))[:3]:
            floor = errors.sort(descending=True).values[math.ceil(share * (shape[1] - 1))]
            out = errors.clone()
            loss = _lovasz_cpu.rank_long_row(out, foreground, True, foreground.sum(), floor, out, use)
            torch.testing.assert_close(out, expected * (errors >= floor), rtol=4 * torch.finfo(dtype).eps, atol=0.0)
            assert loss == foreground[errors >= floor].sum()


def use(errors, foreground, weights):
    """Return the weights unchanged, and the number of foreground pixels in place of a loss."""
    assert (errors[1:] <= errors[:-1]).all()
    return weights, foreground.sum()
