"""The figure of the documentation and the README, from the raw numbers of a run: ``python figure.py RAW FIGURE``."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

COLOURS = {
    "this fork": "#2a6f97",
    "this fork, 1024 bins": "#61b5d9",
    "this fork, in a group": "#1b4332",
    "cross-entropy": "#6c757d",
    "Kornia 0.9.0": "#b23a48",
    "textbook": "#e07a1f",
}
OTHERS = ["#7b5ea7", "#4f9d69"]


def draw(raw: Path, path: Path) -> None:
    results = json.loads(raw.read_text())
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (cost, error) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        colours = dict(COLOURS)
        names = list(next(iter(results["sweep"].values())))
        colours.update(zip([name for name in names if name not in colours], OTHERS))
        sides = [int(side) for side in results["sweep"]]
        for name in names:
            medians = [1000 * statistics.median(row[name]) for row in results["sweep"].values()]
            style = "--" if name == "cross-entropy" else "-"
            cost.loglog(sides, medians, style, marker="o", ms=4, color=colours[name], label=name)
        cost.set_title("time of a softmax loss, 21 classes, forward + backward", loc="left", fontsize=11)
        cost.set(xlabel="image side", ylabel="milliseconds")
        sides = [int(side) for side in results["errors"]]
        for name in next(iter(results["errors"].values())):
            values = [row[name]["gradient"] for row in results["errors"].values()]
            error.loglog(sides, values, marker="o", ms=4, color=colours[name], label=name)
        error.set_title("relative gradient error of the hinge loss, float32", loc="left", fontsize=11)
        error.set(xlabel="image side")
        for axis, ticks in ((cost, results["sweep"]), (error, results["errors"])):
            axis.set_xticks([int(tick) for tick in ticks], list(ticks))
            axis.minorticks_off()
            axis.grid(axis="y", color="#e8e8e8")
        last = max(row[name]["gradient"] for row in results["errors"].values())
        error.annotate("the others coincide", (sides[-1], last), (-14, -2), textcoords="offset points", ha="right")
        figure.legend(
            *cost.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10
        )
        machine = results["machine"]
        note = f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}"
        figure.text(1, 1.01, note, ha="right", va="bottom", fontsize=8, color="#777777")
        figure.savefig(path, dpi=130, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
