# SPDX-License-Identifier: Apache-2.0
"""What kind of tensor an operation is given: the one place of the losses that asks PyTorch's private functions."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Whether the values of a tensor may decide what is computed: it is real, and nothing records the operations."""
    return values_of(tensor) is tensor and not torch._C._are_functorch_transforms_active()


def values_of(tensor: Tensor) -> Optional[Tensor]:
    """The values that a tensor stands for, also under transforms of functorch; None where there are none to look at."""
    if torch.compiler.is_compiling():
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    # by torch.jit.trace or make_fx
    is_recorded = (
        torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)  # neither fake, as in torch.export, nor another subclass
    return tensor if is_plain and not is_recorded else None


def is_compiled() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` records what is done, and no transform of functorch is active."""
    return torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def is_dual(tensor: Tensor) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def is_batched(tensor: Tensor) -> bool:
    """Whether a gradient stands for many, as in ``autograd.grad(is_grads_batched=True)``, or a transform is active."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._are_functorch_transforms_active()


def is_autocast(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of a tensor. Some devices, such as "meta", have none."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
