"""The losses that the benchmarks compare, as functions of logits and labels.

All of them average over images, except for the loss in a process group, which scores the whole batch.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tables import BASELINE, BINNED, COPIES, DENSE, GROUPED, OURS, RELEASE

from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss
from kornia.losses._tuning import tuning

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fork.compose import fetch_release, load_release_module  # noqa: E402 - needs the path from the line above

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FUNCTIONS = {"hinge": lovasz_hinge_loss, "sigmoid": lovasz_sigmoid_loss, "softmax": lovasz_softmax_loss}


def textbook_terms(errors: torch.Tensor, foreground: torch.Tensor) -> torch.Tensor:
    """Lovász extension of each row ``(R, N)`` in the textbook form: sorted errors times steps of the Jaccard loss."""
    errors, order = errors.sort(dim=1, descending=True)
    foreground = foreground.gather(1, order)
    total = foreground.sum(1, keepdim=True)
    curve = 1 - (total - foreground.cumsum(1)) / (total + (1 - foreground).cumsum(1))
    return (errors * torch.diff(curve, dim=1, prepend=torch.zeros_like(total))).sum(1)


def textbook_hinge(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    labels = target.flatten(1).to(pred.dtype)
    return textbook_terms((1 - pred.flatten(1) * (2 * labels - 1)).relu(), labels).mean()


def textbook_sigmoid(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    labels = target.flatten(1).to(pred.dtype)
    return textbook_terms((pred.flatten(1).sigmoid() - labels).abs(), labels).mean()


def textbook_softmax(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    one_hot = F.one_hot(target, pred.shape[1]).movedim(-1, 1).to(pred.dtype).flatten(2).flatten(0, 1)
    probabilities = pred.softmax(1).flatten(2).flatten(0, 1)
    return textbook_terms((probabilities - one_hot).abs(), one_hot).mean()


def binary_cross_entropy(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(pred[:, 0], target.to(pred.dtype))


def peer(package: str) -> ModuleType | None:
    """Import the file with the Lovász losses of a package, without the rest of the package and its dependencies."""
    spec = PathFinder.find_spec(package, [*sys.path, str(Path(sys.prefix) / "peers")])  # make installs them there
    if spec is None:
        print(f"{package} is left out because it is not installed", file=sys.stderr)
        return None
    losses = ModuleType(f"{package}_losses")
    losses.__path__ = [str(Path(folder) / "losses") for folder in spec.submodule_search_locations]
    sys.modules[losses.__name__] = losses
    return importlib.import_module(f"{losses.__name__}.lovasz")


@functools.cache
def peers() -> dict[str, dict[str, Loss]]:
    """The implementations of other packages that are installed."""
    found: dict[str, dict[str, Loss]] = {}
    if smp := peer("segmentation_models_pytorch"):
        found["segmentation-models-pytorch"] = {
            "softmax": smp.LovaszLoss("multiclass", per_image=True),
            "hinge": smp.LovaszLoss("binary", per_image=True),
        }
    if toolbelt := peer("pytorch_toolbelt"):
        softmax, hinge = toolbelt.LovaszLoss(per_image=True), toolbelt.BinaryLovaszLoss(per_image=True)
        found["pytorch-toolbelt"] = {
            "softmax": lambda pred, target: softmax(pred.softmax(1), target),
            "hinge": lambda pred, target: hinge(pred, target[:, None]),
        }
    return found


@functools.cache
def group_of_one() -> dist.ProcessGroup:
    """A process group of one process, to measure the cost of the loss in a group without communication."""
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


class _CopyLogits(torch.autograd.Function):
    """Copy the logits in the forward and in the backward pass, to measure the time of moving the memory."""

    @staticmethod
    def forward(ctx, pred, target):
        ctx.copy = pred.clone()
        return pred.new_zeros(())

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.copy.clone(), None


def without_kernels(loss: Loss) -> Loss:
    """The same loss with PyTorch operations only, without the kernels of this fork."""

    def dense(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with mock.patch.object(tuning, "kernels", False):
            return loss(pred, target)

    return dense


def cuda_implementations(kind: str) -> dict[str, Loss]:
    """Implementations that are compared only on a GPU."""
    ours = FUNCTIONS[kind]
    return {
        DENSE: without_kernels(ours),
        f"{DENSE}, 1024 bins": without_kernels(functools.partial(ours, num_bins=1024)),
        COPIES: _CopyLogits.apply,
    }


def implementations(kind: str) -> dict[str, Loss]:
    """Implementations of the "softmax", "hinge" or "sigmoid" loss, by the names in the tables."""
    module = "lovasz_hinge" if kind == "hinge" else "lovasz_softmax"
    release = getattr(load_release_module(fetch_release(ROOT), f"kornia.losses.{module}"), f"{module}_loss")
    ours = FUNCTIONS[kind]
    return {
        OURS: ours,
        BINNED: functools.partial(ours, num_bins=1024),
        GROUPED: functools.partial(ours, num_bins=1024, per_image=False, process_group=group_of_one()),
        BASELINE: F.cross_entropy if kind == "softmax" else binary_cross_entropy,
        # The release has no sigmoid loss. Its softmax loss of two classes is the closest.
        RELEASE: release if kind != "sigmoid" else lambda z, target: release(torch.cat([0 * z, z], 1), target),
        "textbook": {"hinge": textbook_hinge, "sigmoid": textbook_sigmoid, "softmax": textbook_softmax}[kind],
        **{name: losses[kind] for name, losses in peers().items() if kind in losses},
    }
