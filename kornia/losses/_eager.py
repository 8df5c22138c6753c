# SPDX-License-Identifier: Apache-2.0
"""What kind of tensor an operation is given: the one place of the losses that asks PyTorch's private functions."""

from __future__ import annotations

import torch
from torch import Tensor


def is_eager(tensor: Tensor) -> bool:
    """Whether the values of a tensor may decide what is computed: it is real, and nothing records the operations."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)  # neither fake, as in torch.export, nor another subclass
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None  # make_fx
    )


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor has values to look at, though a transform of functorch may be active, but for vmap over it."""
    if is_eager(tensor):
        return True
    if type(tensor) is not Tensor or torch.compiler.is_compiling():
        return False
    while torch._C._functorch.is_gradtrackingtensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return torch._C._are_functorch_transforms_active() and not is_wrapped


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
