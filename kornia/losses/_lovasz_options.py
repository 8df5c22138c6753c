# SPDX-License-Identifier: Apache-2.0
"""The settings of the Lovász losses, and the base class of their modules."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Sequence, Union

import torch
import torch.distributed
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# With more bins, the tables of counts would be larger than most images.
_MAX_BINS = 1 << 16


def as_integer(value: Any) -> Optional[int]:
    """Convert an integer of any library to int. Return None for everything else, including bool."""
    if isinstance(value, int):
        return None if isinstance(value, bool) else value
    if isinstance(value, Tensor) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several numbers
        return None


class Options(NamedTuple):
    """Settings of a loss. The public functions document them."""

    loss: str  # "hinge", "sigmoid" or "softmax"
    ignore_index: Optional[int] = -100
    per_image: bool = True
    reduction: str = "mean"
    num_bins: Optional[int] = None
    process_group: Optional[ProcessGroup] = None
    classes: Union[str, Sequence[int], None] = None  # None for a loss of one class

    def checked(self, num_classes: Optional[int] = None) -> Options:
        """Return the settings with plain integers. Raise if one is invalid, for ``num_classes`` classes if given."""
        ignore_index, bins = as_integer(self.ignore_index), as_integer(self.num_bins)
        check_ignore_index(self.ignore_index)
        if not isinstance(self.per_image, bool):
            raise ValueError(f"per_image must be True or False. Got: {self.per_image!r}")
        if self.reduction not in ("mean", "sum", "none"):
            # the type that the other losses of Kornia raise
            raise NotImplementedError(
                f"Invalid reduction mode: reduction must be 'mean', 'sum' or 'none'. Got: {self.reduction!r}"
            )
        if self.num_bins is not None and (bins is None or not 1 <= bins <= _MAX_BINS):
            raise ValueError(f"num_bins must be None or an integer in [1, {_MAX_BINS}]. Got: {self.num_bins!r}")
        if self.process_group is not None:
            self._check_process_group()
        classes = None if self.classes is None else _checked_classes(self.classes, num_classes)
        # Dynamo of PyTorch 2.5 cannot trace _replace.
        return Options(self.loss, ignore_index, self.per_image, self.reduction, bins, self.process_group, classes)

    def _check_process_group(self) -> None:
        if self.process_group == torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "process_group must include this process: pass a group made with its rank. Got: a group without it"
            )
        if not isinstance(self.process_group, torch.distributed.ProcessGroup):
            raise ValueError(
                f"process_group must be None or a torch.distributed process group. Got: {self.process_group!r}"
            )
        if self.per_image:
            raise ValueError(
                "process_group scores the batches of all processes as one: pass per_image=False. Got: per_image=True"
            )
        if self.num_bins is None:
            raise ValueError(
                "process_group needs errors counted in bins: pass num_bins, such as num_bins=1024. Got: None"
            )

    def for_operator(self) -> tuple[Any, ...]:
        """Return the settings as arguments of the custom operator, whose schema restricts their types."""
        named = self.classes is None or isinstance(self.classes, str)
        return *self[:5], *((self.classes, None) if named else (None, list(self.classes)))

    def dtype_of(self, pred: Tensor, weight: Optional[Tensor]) -> torch.dtype:
        """Return the dtype in which the loss is computed: float32 or wider."""
        dtype = torch.promote_types(pred.dtype, torch.float32)
        return dtype if weight is None else torch.promote_types(dtype, weight.dtype)

    def divisor(self, batch: int) -> int:
        """Return the divisor of the mean over the groups: their number, but 1 for an empty batch, whose loss is 0."""
        return max(1, batch) if self.per_image and self.reduction == "mean" else 1

    def reduce(self, losses: Tensor) -> Tensor:
        """Reduce the losses of the groups, which are already divided for the mean."""
        return losses if self.reduction == "none" else losses.sum()


def check_ignore_index(value: Any) -> None:
    """Raise unless ``ignore_index`` is None or a 64-bit integer."""
    label = as_integer(value)
    if value is not None and (label is None or not -(2**63) <= label < 2**63):
        raise ValueError(f"ignore_index must be None or a 64-bit integer. Got: {value!r}")


def _checked_classes(classes: Union[str, Sequence[int]], num_classes: Optional[int]) -> Union[str, tuple]:
    """Return the classes to average, indices as a tuple. Raise if one is invalid, for ``num_classes`` if given."""
    if isinstance(classes, str) and classes in ("all", "present"):
        return classes
    if isinstance(classes, str) or not hasattr(classes, "__iter__"):
        raise ValueError(f"classes must be 'all', 'present' or a sequence of class indices. Got: {classes!r}")
    given = tuple(classes)
    indices = tuple(as_integer(c) for c in given)
    if len(indices) == 0:
        raise ValueError("classes must name at least one class. Got an empty sequence")
    limit = float("inf") if num_classes is None else num_classes
    if not all(c is not None and 0 <= c < limit for c in indices):
        expected = "of at least 0" if num_classes is None else f"in [0, {num_classes}), the classes of pred"
        raise ValueError(f"classes must hold integers {expected}. Got: {list(given)}")
    if len(set(indices)) < len(indices):
        raise ValueError(f"classes must name each class once. Got: {list(given)}")
    return indices


class LovaszModule(nn.Module):
    """Base class of the losses, which keeps the options as attributes."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        for name, value in options.checked()._asdict().items():
            setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        left_out = ("loss", "classes") if self.classes is None else ("loss",)
        return {name: getattr(self, name) for name in Options._fields if name not in left_out}

    def extra_repr(self) -> str:
        """Show the settings."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> LovaszModule:
        # A process group cannot be copied, so the copies share it.
        memo[id(self.process_group)] = self.process_group
        result = memo[id(self)] = self.__new__(type(self))
        result.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return result

    def __getstate__(self) -> dict[str, Any]:
        if self.process_group is not None:
            raise TypeError(
                "a loss with a process group cannot be pickled: set process_group=None first, and set it again after "
                "loading"
            )
        return self.__dict__
