"""Time, memory and accuracy of the Lovász losses beside others, in one run: ``make bench``.

Prints tables of ratios, writes the raw numbers as JSON into ``benchmarks/results/`` and draws the figure of the
documentation from them.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from figure import draw
from implementations import BASELINE, GROUPED, OURS, RELEASE, implementations, textbook_hinge, textbook_terms
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scenes import hinge_scene, softmax_scene
from torch.utils.benchmark import Timer

from kornia.losses import lovasz_softmax_loss

HERE = Path(__file__).resolve().parent
ROUNDS, SMOKE_ROUNDS = 5, 1
SHAPES = {
    "softmax": [(2, 21, 512, 512), (1, 19, 512, 1024), (2, 150, 256, 256)],
    "hinge": [(4, 1, 512, 512), (1, 1, 2048, 2048)],
}
SMALL = {"softmax": [(2, 21, 32, 32)], "hinge": [(2, 1, 32, 32)]}
SWEEP = [(1, 21, side, side) for side in (32, 64, 128, 256, 512, 1024)]
ERROR_SIDES = [64, 128, 256, 512, 1024, 2048, 4096]
BATCH_WIDE = (8, 21, 512, 512)


def scene(kind: str, shape: tuple[int, ...], stage: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    pred, target = (softmax_scene if kind == "softmax" else hinge_scene)(tuple(shape), stage)
    return pred.to(device).requires_grad_(), target.to(device)


def measure_times(kind: str, shape: tuple[int, ...], stage: str, device: torch.device, rounds: int) -> dict:
    """Seconds of forward and backward in every round, the implementations in turn within a round."""
    pred, target = scene(kind, shape, stage, device)

    def step(loss) -> None:
        pred.grad = None
        loss(pred, target).backward()

    timers = {
        name: Timer("step(loss)", globals={"step": step, "loss": loss}, num_threads=torch.get_num_threads())
        for name, loss in implementations(kind).items()
    }
    for timer in timers.values():
        timer.timeit(1)
    return in_turn(timers, rounds, pred.numel())


def in_turn(timers: dict[str, Timer], rounds: int, pixels: int) -> dict[str, list[float]]:
    """Seconds of every timer in every round, one after the other within a round."""
    repeat = 1 if pixels > 1 << 18 else 20  # short steps are timed in groups
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeat).mean)
    return seconds


def spread(ratios: list[float], digits: int) -> str:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def measure_memory(kind: str, shape: tuple[int, ...], stage: str, device: torch.device) -> dict[str, float]:
    """Extra memory at the peak of forward and backward, in multiples of the logits; each in a process of its own."""
    # Large blocks then go back to the system as soon as they are freed: what counts is the memory in use, not the
    # gaps that the allocator leaves, which change from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return {
        name: float(
            subprocess.run(
                [sys.executable, __file__, "--peak", kind, json.dumps(shape), stage, name, "--device", str(device)],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            ).stdout.split()[-1]
        )
        for name in implementations(kind)
    }


def peak(kind: str, shape: tuple[int, ...], stage: str, name: str, device: torch.device) -> float:
    """The extra memory of one implementation, in this process."""
    loss = implementations(kind)[name]
    small, labels = scene(kind, (1, shape[1], 256, 256), stage, device)
    loss(small, labels).backward()  # libraries and thread pools are not the loss's
    pred, target = scene(kind, shape, stage, device)
    size = pred.numel() * pred.element_size()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(pred, target).backward()
        return (torch.cuda.max_memory_allocated() - before) / size
    return_free_memory()
    before = resident_now()
    reset_resident_peak()
    loss(pred, target).backward()
    return (resident_peak() - before) / size


def return_free_memory() -> None:
    """Give what was freed back to the system: else the loss would take it up again, and seem to need none."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_resident_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def hinge_errors(side: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Relative error of loss and gradient against float64, on random logits with 10 % foreground."""
    generator = torch.Generator().manual_seed(side)
    pred = torch.randn(1, 1, side, side, generator=generator).to(device)
    target = (torch.rand(1, side, side, generator=generator) < 0.1).long().to(device)
    reference = pred.double().requires_grad_()
    expected = textbook_hinge(reference, target)
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    errors = {}
    for name, loss in implementations("hinge").items():
        if name not in (BASELINE, GROUPED):  # the bins in a group are those without
            leaf = pred.clone().requires_grad_()
            value = loss(leaf, target)
            (gradient,) = torch.autograd.grad(value, leaf)
            errors[name] = {
                "loss": abs(value.item() - expected.item()) / expected.item(),
                "gradient": relative_error(gradient, expected_gradient),
            }
    return errors


def softmax_batch_errors(shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """The same for the softmax loss of a whole batch, whose float64 reference is made class by class."""
    pred, target = scene("softmax", shape, "early", device)
    loss = lovasz_softmax_loss(pred, target, per_image=False)
    loss.backward()
    reference = pred.detach().double().requires_grad_()
    probabilities = reference.softmax(1)
    expected, parts = 0.0, torch.zeros_like(reference)
    for c in range(shape[1]):
        leaf = probabilities[:, c].detach().requires_grad_()
        foreground = (target == c).double()
        term = textbook_terms((leaf - foreground).abs().view(1, -1), foreground.view(1, -1)).sum() / shape[1]
        (parts[:, c],) = torch.autograd.grad(term, leaf)
        expected += term.item()
    (expected_gradient,) = torch.autograd.grad(probabilities, reference, parts)
    return {
        "loss": abs(loss.item() - expected) / expected,
        "gradient": relative_error(pred.grad, expected_gradient),
    }


def machine(device: torch.device) -> dict[str, object]:
    cpu = next((line for line in _cpu_info() if line.startswith("model name")), platform.processor())
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu.split(":")[-1].strip(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def describe(kind: str, shape: tuple[int, ...], stage: str) -> str:
    return f"{kind} {'x'.join(map(str, shape))} {stage}"


def table(title: str, rows: dict[str, dict[str, str]]) -> Table:
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    result = Table(title=title, title_justify="left")
    result.add_column("")
    for name in names:
        result.add_column(name, justify="right")
    for label, row in rows.items():
        result.add_row(label, *(row.get(name, "") for name in names))
    return result


def time_row(seconds: dict[str, list[float]]) -> dict[str, str]:
    """Ratios to the baseline of the same round, median and interquartile range, beside the baseline's median."""
    row = {}
    for name, values in seconds.items():
        if name == BASELINE:
            row[name] = f"{1000 * statistics.median(values):.2f} ms"
        else:
            row[name] = spread([value / base for value, base in zip(values, seconds[BASELINE])], 2)
    over = [old / new for old, new in zip(seconds[RELEASE], seconds[OURS])]
    row["speed-up over Kornia"] = f"{statistics.median(over):.1f}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="timings of each implementation (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny inputs and one round: does everything run?")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the raw numbers and the figure")
    parser.add_argument("--peak", nargs=4, metavar=("KIND", "SHAPE", "STAGE", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        kind, shape, stage, name = args.peak
        print(peak(kind, tuple(json.loads(shape)), stage, name, args.device))
        return

    rounds, shapes, small, sweep, sides, batch = args.rounds, SHAPES, SMALL, SWEEP, ERROR_SIDES, BATCH_WIDE
    if args.smoke:
        rounds, shapes, small = SMOKE_ROUNDS, {"softmax": [(1, 3, 32, 32)], "hinge": [(1, 1, 32, 32)]}, {}
        sweep, sides, batch = [(1, 3, 16, 16), (1, 3, 32, 32)], [16, 32], (2, 3, 16, 16)
    stages = ("late",) if args.smoke else ("early", "late")
    jobs = [(kind, shape, stage) for kind in shapes for shape in shapes[kind] for stage in stages]
    jobs += [(kind, shapes[kind][0], "random") for kind in shapes]
    jobs += [(kind, shape, "early") for kind in small for shape in small[kind]]

    results: dict = {"machine": machine(args.device), "times": {}, "memory": {}, "sweep": {}, "errors": {}}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("measuring", total=len(jobs) + len(sweep) + len(sides) + 1)
        for kind, shape, stage in jobs:
            label = describe(kind, shape, stage)
            results["times"][label] = measure_times(kind, shape, stage, args.device, rounds)
            progress.advance(task)
            if stage != "random" and shape not in small.get(kind, []):
                results["memory"][label] = measure_memory(kind, shape, stage, args.device)
        for shape in sweep:
            results["sweep"][shape[-1]] = measure_times("softmax", shape, "late", args.device, rounds)
            progress.advance(task)
        for side in sides:
            results["errors"][side] = hinge_errors(side, args.device)
            progress.advance(task)
        results["batch errors"] = {describe("softmax", batch, "early"): softmax_batch_errors(batch, args.device)}
        progress.advance(task)

    console = Console(width=200 if not sys.stdout.isatty() else None)
    console.print(" · ".join(str(value) for value in results["machine"].values()))
    times = {label: time_row(seconds) for label, seconds in results["times"].items()}
    console.print(table(f"Time, forward + backward, in multiples of {BASELINE} (quartiles)", times))
    memory = {label: {name: f"{x:.1f}" for name, x in row.items()} for label, row in results["memory"].items()}
    console.print(table("Extra memory at the peak, in multiples of the logits", memory))
    errors = {
        f"hinge {side}x{side}": {name: f"{row['gradient']:.0e} / {row['loss']:.0e}" for name, row in by_name.items()}
        for side, by_name in results["errors"].items()
    } | {
        f"{label}, batch-wide": {OURS: f"{row['gradient']:.0e} / {row['loss']:.0e}"}
        for label, row in results["batch errors"].items()
    }
    console.print(table("Relative error of gradient / loss against float64", errors))

    args.out.mkdir(parents=True, exist_ok=True)
    raw = args.out / f"{args.device.type}.json"
    raw.write_text(json.dumps(results, indent=1) + "\n")
    draw(raw, args.out / f"{args.device.type}.png")
    console.print(f"raw numbers in {raw}, figure beside it")


if __name__ == "__main__":
    main()
