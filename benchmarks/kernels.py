"""What the losses ask of a GPU, on paper: operations and bytes of a step, ``python benchmarks/kernels.py``.

A step, forward and backward, runs on tensors without values (device "meta"), which take the path of CUDA. An operation
that is no view is taken for one launch, and for one pass over its inputs and outputs; a sort makes several. With the
bandwidth of a device, the bytes give a time below which these operations cannot run, whatever else is done.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, NamedTuple

import tables
import torch
from implementations import implementations
from scenes import SHAPES, SMALL, Scene
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SCENES = [Scene(kind, shape, "early") for kind in SHAPES for shape in SHAPES[kind]] + SMALL
NAMES = (tables.OURS, tables.BINNED, tables.RELEASE, tables.BASELINE)
BANDWIDTH = 4.8e12  # bytes a second of an H200, by its data sheet


class Cost(NamedTuple):
    """Of a step."""

    operations: int
    bytes_moved: int


class Counter(TorchDispatchMode):
    """Counts what is called under it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes_moved = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name()
        # A detach is a view, but is not marked as one. What only allocates moves nothing.
        if not function.is_view and "empty" not in name and "detach" not in name:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.operations += 1
            self.bytes_moved += sum(tensor.nbytes for tensor in tensors)
        return result


def cost(kind: str, shape: tuple[int, ...], name: str) -> Cost:
    """What one implementation asks for."""
    pred = torch.zeros(shape, device="meta", requires_grad=True)
    target = torch.zeros(shape[0], *shape[2:], dtype=torch.long, device="meta")
    with Counter() as counter:
        implementations(kind)[name](pred, target).backward()
    return Cost(counter.operations, counter.bytes_moved)


def table() -> str:
    """The table of the documentation, reStructuredText."""
    times = tables.read("cuda")["times"]
    lines = [["", *(tables.SHORT[name] for name in NAMES)]]
    for scene in SCENES:
        cells = []
        logits = math.prod(scene.shape)
        for name in NAMES:
            of_step = cost(scene.kind, scene.shape, name)
            bound = 1e3 * of_step.bytes_moved / BANDWIDTH
            cells.append(
                f"{of_step.operations}; {of_step.bytes_moved / logits:.0f} B; "
                f"{bound:.2g} of {1e3 * statistics.median(times[str(scene)][name]):.2g} ms"
            )
        lines.append([str(scene), *cells])
    return tables.list_table(
        "A step: operations; bytes for each logit; least time for these bytes, of the time measured", lines
    )


if __name__ == "__main__":
    print(table())
