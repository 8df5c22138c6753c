"""Measure time, memory and accuracy of the Lovász losses, compared with other implementations: ``make bench``.

The script prints tables, writes the results as JSON to ``benchmarks/results/``, and draws a figure of them for the
documentation.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime as dt
import functools
import gc
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from figure import draw
from implementations import (
    BASELINE,
    BINNED,
    GROUPED,
    OURS,
    RELEASE,
    Loss,
    cuda_implementations,
    implementations,
    textbook_hinge,
    textbook_terms,
)
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scenes import SHAPES, SMALL, Scene, draw_scenes
from tables import COMPILED, conditions_table, extremes, ratio
from torch.utils.benchmark import Timer

from kornia.losses import lovasz_softmax_loss

HERE = Path(__file__).resolve().parent
ROUNDS, DRAWS = 5, 60
ERROR_SIDES = [64, 128, 256, 512, 1024, 2048, 4096]
BATCH_SHAPE = (8, 21, 512, 512)  # for the error of the loss of a whole batch
# This program keeps a core busy until its parent process ends, even if the parent is killed.
BUSY = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def measure_times(scene: Scene, losses: dict[str, Loss], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of forward and backward in each round. Within a round, the losses are timed one by one."""
    pred, target = on_device(scene, device)

    def step(loss) -> None:
        pred.grad = None
        loss(pred, target).backward()

    timers = {
        name: Timer("step(loss)", globals={"step": step, "loss": loss}, num_threads=torch.get_num_threads())
        for name, loss in losses.items()
    }
    for timer in timers.values():
        timer.timeit(1)
    return time_rounds(timers, rounds, pred)


def on_device(scene: Scene, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the logits, which require a gradient, and the labels of a scene on a device."""
    pred, target = scene.tensors()
    return pred.to(device).requires_grad_(), target.to(device)


def grid_losses(scene: Scene) -> dict[str, Loss]:
    """The losses for scenes drawn at random: this fork with the options of the scene, cross-entropy and the release."""
    losses = implementations(scene.kind)
    return {
        OURS: functools.partial(losses[OURS], **scene.options),
        BASELINE: losses[BASELINE],
        RELEASE: losses[RELEASE],
    }


def compiled_losses(scene: Scene) -> dict[str, Loss]:
    """This fork, with and without bins, and the release, both eager and compiled; and cross-entropy."""
    torch.compiler.reset()
    losses = implementations(scene.kind)
    chosen = {name: losses[name] for name in (OURS, BINNED, RELEASE)}
    compiled = {f"{name}{COMPILED}": torch.compile(loss, fullgraph=True) for name, loss in chosen.items()}
    return chosen | compiled | {BASELINE: losses[BASELINE]}


@contextlib.contextmanager
def condition(name: str) -> Iterator[None]:
    """Set up a condition: "idle", "one thread", or "busy", with two other processes that each use a core."""
    threads = torch.get_num_threads()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2 * (name == "busy"))]
    torch.set_num_threads(1 if name == "one thread" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for process in busy:
            process.kill()


def time_rounds(timers: dict[str, Timer], rounds: int, pred: torch.Tensor) -> dict[str, list[float]]:
    """Measure the seconds of every timer in each round. Within a round, the timers run one after the other."""
    # Repeat short steps, and steps on a GPU, which runs asynchronously, to measure their mean.
    repeat = 5 if pred.is_cuda else 1 if pred.numel() > 1 << 18 else 20
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            seconds[name].append(timer.timeit(repeat).mean)
    return seconds


def spread(ratios: list[float], digits: int) -> str:
    """Format the median and the quartiles of ratios."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{statistics.median(ratios):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def measure_memory(scene: Scene, device: torch.device, names: list[str]) -> dict[str, float]:
    """Measure the extra peak memory of forward and backward, relative to the size of the logits.

    On the CPU, each implementation runs in its own process. On CUDA, PyTorch counts the memory.
    """
    if device.type == "cuda":
        return peaks(scene, names, device)
    # Make the allocator return large blocks to the system as soon as they are freed. Otherwise its unused gaps, which
    # vary from run to run, would be counted as memory in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    described = [scene.kind, json.dumps(scene.shape), scene.stage]
    return {
        name: float(
            subprocess.run(
                [sys.executable, __file__, "--peak", *described, name, "--device", str(device)],
                check=True,
                capture_output=True,
                text=True,
                env=environment,
            ).stdout.split()[-1]
        )
        for name in names
    }


def peaks(scene: Scene, names: list[str], device: torch.device) -> dict[str, float]:
    """Measure the extra peak memory of implementations in this process."""
    small, labels = on_device(scene._replace(shape=(1, scene.shape[1], 256, 256)), device)
    pred, target = on_device(scene, device)
    result = {}
    for name in names:
        loss = implementations(scene.kind)[name]
        loss(small, labels).backward()  # load libraries and thread pools before measuring
        pred.grad = None
        before = reset_peak(device)
        loss(pred, target).backward()
        result[name] = (memory_peak(device) - before) / (pred.numel() * pred.element_size())
    return result


def reset_peak(device: torch.device) -> int:
    """Reset the peak memory, and return the bytes that are in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Return freed memory to the system. Otherwise the loss could reuse it and would seem to need no memory.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")
    return before


def memory_peak(device: torch.device) -> int:
    """The peak memory in bytes since reset_peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def hinge_errors(side: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Relative errors of the hinge loss and its gradient, compared with float64. The logits are random."""
    generator = torch.Generator().manual_seed(side)
    pred = torch.randn(1, 1, side, side, generator=generator).to(device)
    target = (torch.rand(1, side, side, generator=generator) < 0.1).long().to(device)
    reference = pred.double().requires_grad_()
    expected = textbook_hinge(reference, target)
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    errors = {}
    for name, loss in implementations("hinge").items():
        if name not in (BASELINE, GROUPED):  # in a group, the bins are the same as without
            leaf = pred.clone().requires_grad_()
            value = loss(leaf, target)
            (gradient,) = torch.autograd.grad(value, leaf)
            errors[name] = {
                "loss": abs(value.item() - expected.item()) / expected.item(),
                "gradient": relative_error(gradient, expected_gradient),
            }
    return errors


def softmax_batch_errors(shape: tuple[int, ...], device: torch.device) -> dict[str, float]:
    """The same for the softmax loss of a whole batch. The reference is computed class by class to save memory."""
    pred, target = on_device(Scene("softmax", shape, "early"), device)
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
        **({"triton": triton_version()} if device.type == "cuda" else {}),
        "commit": commit(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def triton_version() -> str | None:
    return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None


def commit() -> str | None:
    """The commit of this checkout, or None outside a git repository."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    return None


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


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
    """Format ratios to the baseline of the same round, as median and quartiles, and the median of the baseline."""
    row = {}
    for name, values in seconds.items():
        if name == BASELINE:
            row[name] = f"{1000 * statistics.median(values):.2f} ms"
        else:
            row[name] = spread([value / base for value, base in zip(values, seconds[BASELINE])], 2)
    row["speed-up over Kornia"] = f"{ratio(seconds, RELEASE, OURS):.1f}"
    return row


def grid_rows(grid: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, str]]:
    """Format the worst, median and best ratio over the scenes drawn at random, with the names of the scenes."""
    rows = {}
    for title, above, below, best in (
        ("speed-up over Kornia", RELEASE, OURS, max),
        ("time relative to cross-entropy", OURS, BASELINE, min),
    ):
        for name, (value, label) in extremes(grid, above, below, best).items():
            rows[f"{title}, {name}"] = {"": f"{value:.1f}", "scene": label}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of measurement (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=DRAWS, help="number of random scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of these scenes (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="only check that everything runs, on tiny inputs")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the results and the figure")
    parser.add_argument("--peak", nargs=4, metavar=("KIND", "SHAPE", "STAGE", "NAME"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        kind, shape, stage, name = args.peak
        print(peaks(Scene(kind, tuple(json.loads(shape)), stage), [name], args.device)[name])
        return

    scenes = [Scene(kind, shape, stage) for kind in SHAPES for shape in SHAPES[kind] for stage in ("early", "late")]
    rest = [Scene(kind, SHAPES[kind][0], "random") for kind in SHAPES] + SMALL
    drawn = list(itertools.islice(draw_scenes(args.seed), args.draws))
    rounds, sides, batch = args.rounds, ERROR_SIDES, BATCH_SHAPE
    in_memory = scenes
    if args.smoke:
        scenes, rest, rounds = [Scene("softmax", (1, 3, 32, 32), "late"), Scene("hinge", (1, 1, 32, 32), "late")], [], 1
        drawn, sides, batch = list(itertools.islice(draw_scenes(0, 1 << 14, 1 << 15), 3)), [16, 32], (2, 3, 16, 16)
        in_memory = scenes[-1:]
    has_gpu = args.device.type == "cuda"
    # The release has no sigmoid loss to compile.
    to_compile = [scene for scene in in_memory if scene.stage == "late" and scene.kind != "sigmoid"] + rest[-2:]
    if has_gpu and not args.smoke:
        rest += [Scene(kind, SHAPES[kind][0], "late", half=True) for kind in SHAPES]

    results: dict = {
        "machine": machine(args.device),
        "times": {},
        "grid": {},
        "compiled": {},
        "memory": {},
        "errors": {},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    raw = args.out / f"{args.device.type}.json"
    with Progress(console=Console(stderr=True)) as progress:

        def track(title: str, things: list) -> Iterator:
            """Show the progress of a loop, and save the results when it ends."""
            yield from progress.track(things, description=title)
            raw.write_text(json.dumps(results, indent=1) + "\n")

        for scene in track("scenes", scenes + rest):
            losses = implementations(scene.kind) | (cuda_implementations(scene.kind) if has_gpu or args.smoke else {})
            results["times"][str(scene)] = measure_times(scene, losses, args.device, rounds)
        for name in ("idle", "one thread", "busy")[: 1 if has_gpu else None]:
            times = results["grid"][name] = {str(scene): {loss: [] for loss in grid_losses(scene)} for scene in drawn}
            with condition(name):
                # One round of all scenes at a time, so that a slow minute of the machine affects one round of a scene.
                for scene in track(f"drawn, {name}", drawn * rounds):
                    for loss, seconds in measure_times(scene, grid_losses(scene), args.device, 1).items():
                        times[str(scene)][loss] += seconds
        for scene in track("compiled", to_compile):
            results["compiled"][str(scene)] = measure_times(scene, compiled_losses(scene), args.device, rounds)
        for scene in track("memory", in_memory):
            names = [OURS] if args.smoke else list(implementations(scene.kind))  # each takes its own process
            results["memory"][str(scene)] = measure_memory(scene, args.device, names)
        for side in track("errors", sides):
            results["errors"][side] = hinge_errors(side, args.device)
        for shape in track("errors of a batch", [batch]):
            results["batch errors"] = {str(Scene("softmax", shape, "early")): softmax_batch_errors(shape, args.device)}

    report(results)
    draw(args.out)
    print(f"Results: {raw}, with a figure in the same folder")


def report(results: dict) -> None:
    """Print the tables."""
    console = Console(width=200 if not sys.stdout.isatty() else None)
    console.print(" · ".join(str(value) for value in results["machine"].values()))
    times = {label: time_row(seconds) for label, seconds in results["times"].items()}
    console.print(table(f"Time of forward and backward relative to {BASELINE}: median (quartiles)", times))
    console.print(table("Scenes drawn at random", grid_rows(results["grid"]["idle"])))
    heading, *lines = conditions_table(results)
    rows = {line[0]: dict(zip(heading[1:], line[1:], strict=True)) for line in lines}
    console.print(table("How many times as fast as Kornia 0.9.0", rows))
    rows = {
        label: {name: f"{1000 * statistics.median(values):.1f} ms" for name, values in seconds.items()}
        for label, seconds in results["compiled"].items()
    }
    console.print(table("Eager and compiled", rows))
    memory = {label: {name: f"{x:.1f}" for name, x in row.items()} for label, row in results["memory"].items()}
    console.print(table("Extra peak memory relative to the size of the logits", memory))
    errors = {
        f"hinge {side}x{side}": {name: f"{row['gradient']:.0e} / {row['loss']:.0e}" for name, row in by_name.items()}
        for side, by_name in results["errors"].items()
    } | {
        f"{label}, batch-wide": {OURS: f"{row['gradient']:.0e} / {row['loss']:.0e}"}
        for label, row in results["batch errors"].items()
    }
    console.print(table("Relative error of gradient / loss, compared with float64", errors))


if __name__ == "__main__":
    main()
