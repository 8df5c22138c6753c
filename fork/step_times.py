"""Time the losses after each step of the series, and measure the errors that the first step fixes.

``make patch-times`` writes the results to ``fork/upstream/times.json``. The tables in the texts of the pull requests
are made from this file. Each round times all steps one after the other, each in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "fork" / "upstream" / "times.json"
RELEASE = "release"
SIDES = (256, 1024)
PROGRAM = """
import json, sys, time
import torch
from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss
sys.path.insert(0, sys.argv[1])
from scenes import Scene

def seconds(loss, pred, target):
    times = []
    for _ in range(7):
        pred.grad = None
        start = time.perf_counter()
        loss(pred, target).backward()
        times.append(time.perf_counter() - start)
    return sorted(times)[3]

found = {}
for kind, loss, shapes in (
    ("hinge", lovasz_hinge_loss, [(4, 1, 512, 512), (1, 1, 2048, 2048), (2, 1, 32, 32)]),
    ("softmax", lovasz_softmax_loss, [(2, 21, 512, 512), (2, 21, 32, 32)]),
):
    for shape in shapes:
        scene = Scene(kind, shape, "late")
        pred, target = scene.tensors()
        found[str(scene)] = seconds(loss, pred.requires_grad_(), target)
print(json.dumps(found))
"""
# Measures the relative error of the gradient in float32, on random logits with 10 % foreground.
ERRORS = """
import json, sys
import torch
from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss

found = {}
for name, loss, channels in (("hinge", lovasz_hinge_loss, 1), ("softmax", lovasz_softmax_loss, 2)):
    for side in map(int, sys.argv[2:]):
        torch.manual_seed(0)
        pred = torch.randn(1, channels, side, side)
        target = (torch.rand(1, side, side) < 0.1).long()
        grads = []
        for dtype in (torch.float32, torch.float64):
            leaf = pred.detach().to(dtype).requires_grad_()
            loss(leaf, target).backward()
            grads.append(leaf.grad.double())
        found[f"{name} {side}"] = ((grads[0] - grads[1]).norm() / grads[1].norm()).item()
print(json.dumps(found))
"""


def run(tree: Path, program: str, *arguments: str) -> dict[str, float]:
    """Run a program with the ``kornia`` of a tree, and return the numbers that it prints as JSON."""
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def measure(rounds: int) -> dict:
    """Return the seconds of every scene after each step of the losses, and the errors before and after the first."""
    from fork.patch import apply_step, read_steps, unpack_source

    steps = [step for step in read_steps(ROOT) if step.name.startswith("lovasz")]
    names = [RELEASE, *(step.name for step in steps)]
    with tempfile.TemporaryDirectory() as folder:
        trees = {RELEASE: Path(folder, RELEASE)}
        unpack_source(ROOT, trees[RELEASE])
        for before, step in zip(names, steps):
            trees[step.name] = shutil.copytree(trees[before], Path(folder, step.name))
            apply_step(step, trees[step.name])
        seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
        for _ in range(rounds):
            for name, tree in trees.items():
                for scene, value in run(tree, PROGRAM).items():
                    seconds[name].setdefault(scene, []).append(value)
        sides = [str(side) for side in SIDES]
        errors = {name: run(trees[name], ERRORS, *sides) for name in names[:2]}
    return {"seconds": seconds, "errors": errors}


def table_of_times(results: dict, name: str) -> str:
    """Return a table of the milliseconds before and after a step."""
    names = list(results["seconds"])
    if name not in names:
        return ""
    before, after = results["seconds"][names[names.index(name) - 1]], results["seconds"][name]
    rows = [["", "release", "before", "after"], ["---", "---:", "---:", "---:"]]
    for scene in after:
        columns = (results["seconds"][RELEASE][scene], before[scene], after[scene])
        rows.append([scene, *(milliseconds(column) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def milliseconds(seconds: list[float]) -> str:
    """Return the median, with at least two digits."""
    value = 1000 * statistics.median(seconds)
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def table_of_errors(results: dict) -> str:
    """Return table rows, one for each image size, with the errors of both losses before and after the first step."""
    before, after = results["errors"].values()
    rows = []
    for side in SIDES:
        cells = [f"{each[f'{loss} {side}']:.1g}" for loss in ("hinge", "softmax") for each in (before, after)]
        rows.append(f"| {side} x {side} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes per step (default: %(default)s)")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import torch
    from run import machine

    results = {"machine": machine(torch.device("cpu")), **measure(args.rounds)}
    FILE.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"raw numbers in {FILE}")


if __name__ == "__main__":
    main()
