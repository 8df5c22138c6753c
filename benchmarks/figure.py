"""Draw speed.png from the results of run.py, which lie in the same folder: ``python figure.py results``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from tables import BASELINE, BINNED, COMPILED, DEVICES, OURS, RELEASE, has_compiled_release, ratio, read

CONDITIONS = {
    "idle": "CPU, idle",
    "one thread": "CPU, one thread",
    "busy": "CPU, beside two\nbusy processes",
    "compiled": "CPU, compiled",
    "cuda": "GPU",
}
COLOURS = {OURS: "#2a6f97", BINNED: "#61a5c2", RELEASE: "#b23a48"}


def draw(folder: Path) -> None:
    """Draw two charts, one above the other so that they can be read on a phone."""
    results = {device: found for device in DEVICES if (found := read(device, folder))}
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (cost, error) = plt.subplots(2, 1, figsize=(6.4, 8.4), layout="constrained")
        draw_cost(cost, results)
        draw_error(error, next(iter(results.values())))
        notes = [
            f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}"
            for machine in (each["machine"] for each in results.values())
        ]
        figure.text(1, -0.01, "\n".join(notes), ha="right", va="top", fontsize=10, color="#777777")
        figure.savefig(folder / "speed.png", dpi=110, bbox_inches="tight")
        plt.close(figure)


def draw_cost(axis: plt.Axes, results: dict[str, dict]) -> None:
    """Plot the time relative to cross-entropy under each condition: the median, and the range from best to worst."""
    measured = {}
    if "cpu" in results:
        measured |= {name: (grid, "") for name, grid in results["cpu"]["grid"].items()}
        if has_compiled_release(results["cpu"]):
            measured["compiled"] = results["cpu"]["compiled"], COMPILED
    if "cuda" in results:
        measured["cuda"] = results["cuda"]["grid"]["idle"], ""
    for place, (grid, suffix) in enumerate(measured.values()):
        for name, shift in ((OURS, -0.15), (RELEASE, 0.15)):
            ratios = [ratio(seconds, f"{name}{suffix}", BASELINE) for seconds in grid.values()]
            axis.plot([min(ratios), max(ratios)], [place + shift] * 2, color=COLOURS[name], lw=3, alpha=0.4)
            label = name if place == 0 else None
            axis.plot(np.median(ratios), place + shift, "o", ms=9, color=COLOURS[name], label=label)
    axis.axvline(1, color="#333333", ls="--")
    axis.set_xscale("log")
    axis.set_yticks(range(len(measured)), [CONDITIONS[name] for name in measured])
    axis.set_ylim(len(measured) - 0.5, -0.5)
    low, high = axis.get_xlim()
    ticks = [each for each in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if low < each < high]
    axis.set_xticks(ticks, [f"{each:g}" for each in ticks])
    axis.minorticks_off()
    axis.set_title("Time, in multiples of cross-entropy:\nmedian, and from best to worst", loc="left", fontsize=13)
    axis.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2)
    axis.grid(axis="x", color="#e8e8e8")


def draw_error(axis: plt.Axes, results: dict) -> None:
    """Plot the error of the gradient. Kornia's curve also stands for the other libraries, whose errors are the same."""
    sides = [int(side) for side in results["errors"]]
    # Each label has a place where no curve runs: index of its point, and height above it.
    labels = {RELEASE: ("Kornia 0.9.0 and other libraries", -1, 9), BINNED: (BINNED, 0, 9), OURS: (OURS, -1, -22)}
    for name, (label, place, height) in labels.items():
        values = [row[name]["gradient"] for row in results["errors"].values()]
        axis.loglog(sides, values, marker="o", ms=5, color=COLOURS[name])
        style = {"color": COLOURS[name], "ha": "left" if place == 0 else "right"}
        axis.annotate(label, (sides[place], values[place]), (0, height), textcoords="offset points", **style)
    axis.set_title("Relative gradient error of the hinge loss,\nfloat32", loc="left", fontsize=13)
    axis.set(xlabel="image side")
    axis.set_xticks(sides, [str(side) for side in sides])
    axis.minorticks_off()
    axis.grid(axis="y", color="#e8e8e8")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
