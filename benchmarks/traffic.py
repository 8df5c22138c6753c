"""What the loss of the global batch moves in a step, and about how long that takes: ``python benchmarks/traffic.py``.

The bytes are counted from the collectives that the loss really calls. The time is a simulation, not a measurement: of a
collective, the faster of a ring, 2 (p - 1) messages of a p-th of the data one after the other, and a tree, 2 log2(p)
messages, pipelined, that carry the data twice.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from unittest import mock

import torch
from implementations import group_of_one

from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss

RANKS = (8, 64, 1024)
# Name, latency of a message in seconds, bytes a second.
LINKS = (("NVLink and InfiniBand", 5e-6, 50e9), ("Ethernet, 25 Gbit/s", 30e-6, 3e9))
TASKS = (
    ("hinge", 1, 1024),
    ("softmax, 21 classes", 21, 256),
    ("softmax, 21 classes", 21, 1024),
    ("softmax, 150 classes", 150, 1024),
)


def collectives(num_classes: int, num_bins: int, side: int) -> list[int]:
    """Bytes of each collective that one step calls."""
    sizes = []
    pred = torch.randn(1, num_classes, side, side)
    target = torch.randint(0, max(2, num_classes), (1, side, side))
    loss = lovasz_hinge_loss if num_classes == 1 else lovasz_softmax_loss
    # A group of one process, so that nothing is sent.
    with mock.patch("torch.distributed.all_reduce", lambda data, *_, **__: sizes.append(data.nbytes)):
        loss(pred, target, per_image=False, num_bins=num_bins, process_group=group_of_one())
    return sizes


def seconds(sizes: list[int], ranks: int, latency: float, bandwidth: float) -> float:
    ring = [2 * (ranks - 1) * (latency + size / ranks / bandwidth) for size in sizes]
    tree = [2 * (math.ceil(math.log2(ranks)) * latency + size / bandwidth) for size in sizes]
    return sum(min(times) for times in zip(ring, tree))


def table() -> str:
    """The table of the documentation, reStructuredText."""
    lines = [
        ".. list-table:: What a step moves, and about how long its collectives take (simulated)",
        "   :header-rows: 1",
        "",
        "   * - loss",
        "     - bins",
        "     - bytes",
    ]
    lines += [f"     - {ranks} processes" for ranks in RANKS]
    for name, num_classes, num_bins in TASKS:
        sizes = collectives(num_classes, num_bins, 16)
        if sizes != collectives(num_classes, num_bins, 48):
            raise AssertionError("the traffic must not depend on the size of the image")
        lines += [f"   * - {name}", f"     - {num_bins}", f"     - {sum(sizes):,}"]
        for ranks in RANKS:
            times = (1000 * seconds(sizes, ranks, latency, bandwidth) for _, latency, bandwidth in LINKS)
            lines.append(f"     - {' / '.join(f'{time:.1f}' for time in times)} ms")
    assumed = ", and ".join(f"{1e6 * latency:g} µs and {rate / 1e9:g} GB/s ({name})" for name, latency, rate in LINKS)
    note = f"{len(sizes)} collectives a step, by the faster of a ring and a tree. Assumed for a message: {assumed}."
    return "\n".join([*lines, "", note, ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the table there rather than print it")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(table(), encoding="utf-8")
    else:
        print(table())
