"""Measure the time of ``iou_at_thresholds`` and ``best_iou_threshold``, compared with simple loops: ``make bench``.

``iou_at_thresholds`` and the loops use the same 31 thresholds. ``best_iou_threshold`` searches all thresholds. The
script prints a table and writes the results as JSON to ``benchmarks/results/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from run import HERE, condition, machine, on_device, spread, table, time_rounds
from scenes import Scene
from torch.utils.benchmark import Timer

from kornia.metrics import IoUThresholdSearch, best_iou_threshold, iou_at_thresholds

THRESHOLDS = IoUThresholdSearch().thresholds
ROUNDS = 5
JOBS = [((1, 1, 2048, 2048), stage) for stage in ("early", "late", "random")]
JOBS += [((4, 1, 512, 512), "early"), ((1, 1, 128, 128), "early")]
LOOP = "loop"


def loop(pred: torch.Tensor, target: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The obvious implementation: a prediction for each threshold."""
    foreground = target == 1
    ious = []
    for threshold in thresholds:
        predicted = pred[:, 0] > threshold
        ious.append((predicted & foreground).sum() / (predicted | foreground).sum())
    return torch.stack(ious)


def lean_loop(pred: torch.Tensor, target: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """A faster loop, without the union, and with ``count_nonzero``, which is faster than ``sum`` on the CPU."""
    foreground = target == 1
    total = foreground.count_nonzero()
    ious = []
    for threshold in thresholds.tolist():
        predicted = pred[:, 0] > threshold
        intersection = (predicted & foreground).count_nonzero()
        ious.append(intersection / (total + predicted.count_nonzero() - intersection))
    return torch.stack(ious)


IMPLEMENTATIONS = {
    LOOP: loop,
    "lean loop": lean_loop,
    "iou_at_thresholds": iou_at_thresholds,
    "best_iou_threshold": lambda pred, target, thresholds: best_iou_threshold(pred, target),
}


def measure(shape: tuple[int, ...], stage: str, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Check that the results agree, then measure the seconds of every implementation in each round."""
    pred, target = on_device(Scene("hinge", shape, stage), device)
    pred, thresholds = pred.detach(), THRESHOLDS.to(device)
    expected = loop(pred, target, thresholds)
    for function in (lean_loop, iou_at_thresholds):
        torch.testing.assert_close(function(pred, target, thresholds), expected, rtol=1e-6, atol=0.0)
    if best_iou_threshold(pred, target)[1] < expected.max() - 1e-6:
        raise RuntimeError("best_iou_threshold found a lower IoU than one of the 31 thresholds has")
    timers = {
        name: Timer(
            "f(*args)", globals={"f": f, "args": (pred, target, thresholds)}, num_threads=torch.get_num_threads()
        )
        for name, f in IMPLEMENTATIONS.items()
    }
    return time_rounds(timers, rounds, pred)


def row(seconds: dict[str, list[float]]) -> dict[str, str]:
    """Format the median time, and the speed-up over the loop in the same round: median and quartiles."""
    cells = {}
    for name, values in seconds.items():
        cells[name] = f"{1000 * statistics.median(values):.1f} ms"
        if name != LOOP:
            cells[name] += f", {spread([base / value for value, base in zip(values, seconds[LOOP])], 1)}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of measurement (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="only check that everything runs, on tiny inputs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results")
    args = parser.parse_args()
    jobs, rounds = ([((1, 1, 32, 32), "late")], 1) if args.smoke else (JOBS, args.rounds)

    results: dict = {"machine": machine(args.device), "times": {}}
    for name in ("idle", "busy")[: 2 if args.device.type == "cpu" else 1]:
        with condition(name):
            for shape, stage in jobs:
                label = f"{Scene('hinge', shape, stage)}{'' if name == 'idle' else ', ' + name}"
                results["times"][label] = measure(shape, stage, args.device, rounds)

    console = Console(width=200 if not sys.stdout.isatty() else None)
    console.print(" · ".join(str(value) for value in results["machine"].values()))
    rows = {label: row(seconds) for label, seconds in results["times"].items()}
    console.print(table(f"Time at {len(THRESHOLDS)} thresholds, and speed-up over the loop: median (quartiles)", rows))
    args.out.mkdir(parents=True, exist_ok=True)
    raw = args.out / ("threshold.json" if args.device.type == "cpu" else f"threshold-{args.device.type}.json")
    raw.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"Results: {raw}")


if __name__ == "__main__":
    main()
