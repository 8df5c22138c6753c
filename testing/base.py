# SPDX-License-Identifier: Apache-2.0
"""The test helpers of Kornia that these tests use, under the same names."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Union

import pytest
import torch
from torch import Tensor

# Relative and absolute tolerance of a result in each dtype: a few rounding errors.
TOLERANCES = {
    torch.bfloat16: (8e-3, 8e-3),
    torch.float16: (1e-3, 1e-3),
    torch.float32: (1e-4, 1e-5),
    torch.float64: (1e-5, 1e-5),
}


def assert_close(actual: Any, expected: Any, *, rtol: Optional[float] = None, atol: Optional[float] = None) -> None:
    """Compare with the tolerances of the coarser dtype, unless both tolerances are given."""
    if rtol is None and atol is None:
        pairs = [TOLERANCES.get(torch.as_tensor(x).dtype, (0.0, 0.0)) for x in (actual, expected)]
        rtol, atol = (max(values) for values in zip(*pairs))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


class BaseTester:
    @staticmethod
    def assert_close(
        actual: Union[Tensor, float],
        expected: Union[Tensor, float],
        rtol: Optional[float] = None,
        atol: Optional[float] = None,
    ) -> None:
        assert_close(actual, expected, rtol=rtol, atol=atol)

    @staticmethod
    def gradcheck(
        func: Callable[..., Union[Tensor, Sequence[Tensor]]],
        inputs: Union[Tensor, Sequence[Any]],
        *,
        raise_exception: bool = True,
        fast_mode: bool = True,
        requires_grad: Sequence[bool] = (),
        dtypes: Sequence[torch.dtype] = (),
        **kwargs: Any,
    ) -> bool:
        """Run ``torch.autograd.gradcheck`` with the tensors of ``inputs`` in float64, or in the ``dtypes`` given."""
        inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if any(isinstance(x, Tensor) and x.device.type == "mps" for x in inputs):
            pytest.skip("gradcheck needs float64, which MPS does not have")
        dtypes = dtypes or [torch.float64] * len(inputs)
        requires_grad = requires_grad or [True] * len(inputs)
        prepared = [
            x.to(dtype).requires_grad_(needs and dtype.is_floating_point) if isinstance(x, Tensor) else x
            for x, dtype, needs in zip(inputs, dtypes, requires_grad)
        ]
        return torch.autograd.gradcheck(func, prepared, raise_exception=raise_exception, fast_mode=fast_mode, **kwargs)
