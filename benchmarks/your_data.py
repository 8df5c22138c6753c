"""Measure the cost of the tensor views on the page "Your data": ``python benchmarks/your_data.py``.

Each view is timed against the same loss on a contiguous copy with the layout of an image, and against cross-entropy.
Forward and backward are timed together. The ratios of the medians go to results/your_data.json, from which the
documentation makes its table.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss

RESULTS = Path(__file__).parent / "results" / "your_data.json"
Case = tuple[str, str, Tensor, Tensor, Callable, Callable]


def points(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.T[None, :, :, None], labels[None, :, None]


def volumes(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.flatten(3), labels.flatten(2)


def classes_last(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return logits.movedim(-1, 1), labels


def several_labels(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    return logits.transpose(0, 1).flatten(2)[:, None], masks.transpose(0, 1).flatten(2)


def cases(shrink: int) -> list[Case]:
    """List the cases: name, shape, logits, labels, the function that makes the views, and the loss."""

    def multiclass(name: str, view: Callable, shape: tuple[int, ...], class_axis: int) -> Case:
        num_classes = shape[class_axis]
        labels = torch.randint(0, num_classes, (*shape[:class_axis], *shape[class_axis:][1:]))
        one_hot = F.one_hot(labels, num_classes).movedim(-1, class_axis)
        logits = 2 * torch.randn(shape) + 4 * one_hot
        return name, "x".join(map(str, shape)), logits, labels, view, softmax

    def softmax(x: Tensor, y: Tensor) -> Tensor:
        return lovasz_softmax_loss(x, y, classes="present", per_image=False)

    side = 128 // shrink
    shape = (8, 4, side, side)
    masks = (torch.rand(shape) < 0.1).float()
    logits = 2 * torch.randn(shape) + 4 * masks - 2
    return [
        multiclass("points", points, (120_000 // shrink**2, 20), 1),
        multiclass("volumes", volumes, (2, 4, side // 2, side // 2, side // 2), 1),
        multiclass("classes last", classes_last, (4, side, side, 8), 3),
        ("several labels", "x".join(map(str, shape)), logits, masks, several_labels, lovasz_hinge_loss),
    ]


def seconds(loss: Callable, logits: Tensor, labels: Tensor) -> float:
    logits = logits.detach().requires_grad_()
    begin = time.perf_counter()
    loss(logits, labels).backward()
    return time.perf_counter() - begin


def cross_entropy(x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(x[:, 0], y) if y.is_floating_point() else F.cross_entropy(x, y)


def measure(case: Case, rounds: int) -> dict[str, object]:
    name, shape, logits, labels, view, loss = case
    x, y = (part.contiguous() for part in view(logits, labels))
    times: dict[str, list[float]] = {"view": [], "image": [], "cross_entropy": []}
    for _ in range(rounds + 1):  # the first round is a warm-up
        times["view"].append(seconds(lambda a, b: loss(*view(a, b)), logits, labels))
        times["image"].append(seconds(loss, x, y))
        times["cross_entropy"].append(seconds(cross_entropy, x, y))
    view_time, image_time, other = (statistics.median(values[1:]) for values in times.values())
    return {"data": name, "logits": shape, "of_image": view_time / image_time, "of_cross_entropy": view_time / other}


def table() -> str:
    """The table of the documentation, in reStructuredText."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    lines = [".. list-table::", "   :header-rows: 1", ""]
    rows = [("data", "logits", "time relative to images", "time relative to cross-entropy")]
    rows += [
        (row["data"], f"``{row['logits']}``", f"{row['of_image']:.1f}", f"{row['of_cross_entropy']:.1f}")
        for row in results["rows"]
    ]
    for row in rows:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}" for i, cell in enumerate(row)]
    lines += [
        "",
        f"Forward and backward, on easy and hard pixels. Measured on {results['date']}: {results['machine']}.",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of measurement (default: %(default)s)")
    parser.add_argument(
        "--smoke", action="store_true", help="only check that everything runs, on small inputs, without writing results"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [measure(case, 1 if args.smoke else args.rounds) for case in cases(8 if args.smoke else 1)]
    machine = f"{torch.get_num_threads()} threads of {processor()}, PyTorch {torch.__version__.split('+')[0]}"
    results = {"machine": machine, "date": dt.datetime.now(dt.UTC).date().isoformat(), "rows": rows}
    if not args.smoke:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    json.dump(results, sys.stdout, indent=1)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return " ".join(names[0].split()[:2]) if names else platform.processor()


if __name__ == "__main__":
    main()
