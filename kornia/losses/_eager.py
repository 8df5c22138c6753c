# SPDX-License-Identifier: Apache-2.0
"""Queries about tensors and PyTorch modes, which need private functions of PyTorch."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Whether code may branch on the values of a tensor: it holds data, and no tracer or transform is active."""
    return values_of(tensor) is tensor and not torch._C._are_functorch_transforms_active()


def values_of(tensor: Tensor) -> Optional[Tensor]:
    """Return the data of a tensor, unwrapped from functorch transforms, or None while tracing: there is no data."""
    if torch.compiler.is_compiling():
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    # torch.jit.trace and make_fx record operations on real tensors.
    is_recorded = (
        torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
    # Subclasses, such as the fake tensors of torch.export, may hold no data.
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return tensor if is_plain and not is_recorded else None


def device_with_float64(device: torch.device) -> torch.device:
    """Return the device itself, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def is_compiled() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is tracing, and no functorch transform is active."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def is_dual(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent for forward-mode differentiation."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a gradient is a batch of gradients (``is_grads_batched=True``) or a functorch transform is active."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._are_functorch_transforms_active()


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor. The meta device does not support autocast."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def without_functorch() -> Any:
    """Return a context in which operations on unwrapped tensors return plain tensors, even in PyTorch 2.5."""
    return torch._C._DisableFuncTorch()
