# SPDX-License-Identifier: Apache-2.0
"""The closed form of the weights."""

from fractions import Fraction
from itertools import product

import pytest
import torch

from kornia.losses._lovasz import jaccard_weights

from testing.lovasz import jaccard_loss, widest_dtype


def differences(foreground):
    """Weights of ranked pixels by definition: by how much each pixel increases the Jaccard loss."""
    total, missed, alarms, before, weights = sum(foreground), 0, 0, Fraction(0), []
    for is_foreground in foreground:
        missed, alarms = missed + is_foreground, alarms + (not is_foreground)
        after = jaccard_loss(missed, alarms, total)
        weights.append(after - before)
        before = after
    return weights


class TestJaccardWeights:
    @pytest.mark.parametrize("counts", [torch.int32, torch.int64])
    @pytest.mark.parametrize("length", range(1, 9))
    def test_feature_every_arrangement(self, length, counts, device):
        dtype = widest_dtype(device)
        for foreground in product((0, 1), repeat=length):
            background = 1 - torch.tensor(foreground, dtype=counts, device=device)
            union = sum(foreground) + background.cumsum(0, dtype=counts)
            position = torch.arange(length, dtype=counts, device=device)
            weights = jaccard_weights(background, position, union, dtype)
            expected = [float(weight) for weight in differences(foreground)]
            torch.testing.assert_close(weights.tolist(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("counts", "size"), [(torch.int32, 2**31 - 1), (torch.int64, 2**44)])
    def test_feature_large_counts(self, counts, size, dtype, device):
        """Weights of an image of ``size`` pixels: near both ends of the ranking and in its middle."""
        if dtype == torch.float64:
            dtype = widest_dtype(device)
        total = size // 3
        cases = []
        for is_background, k, m in product((0, 1), (1, total // 2, total), (1, size // 3, size - total)):
            # The first k foreground and m background pixels are ranked, and one of them last.
            union, before = total + m, total + m - is_background
            kept = total - k if is_background else before
            cases.append((is_background, k + m - 1, union, Fraction(kept, before * union)))
        background, position, union, expected = zip(*cases)
        tensors = (torch.tensor(each, dtype=counts, device=device) for each in (background, position, union))
        expected = torch.tensor([float(each) for each in expected], dtype=dtype, device=device)
        torch.testing.assert_close(
            jaccard_weights(*tensors, dtype), expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny
        )
