"""The figure of the documentation and the README, from the raw numbers of a run: ``python figure.py RAW FIGURE``."""

from __future__ import annotations

import json
import re
import sys
from math import prod
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from tables import BINNED, COMPILED, OURS, RELEASE, ratio

CIRCUMSTANCES = {
    "idle": ("#2a6f97", "idle"),
    "busy": ("#e09f3e", "beside two busy processes"),
    "compiled": ("#7b2d8b", "both compiled"),
}
COLOURS = {OURS: "#2a6f97", BINNED: "#61a5c2", RELEASE: "#b23a48"}


def draw(raw: Path, path: Path) -> None:
    results = json.loads(raw.read_text())
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (cost, error) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        measured = {name: (grid, OURS, RELEASE) for name, grid in results["grid"].items() if name != "one thread"}
        if "busy" in results["grid"]:
            measured["compiled"] = results["compiled"], f"{OURS}{COMPILED}", f"{RELEASE}{COMPILED}"
        for name, (grid, ours, release) in measured.items():
            sizes = [prod(map(int, re.search(r"\d+(x\d+)+", label).group().split("x"))) for label in grid]
            speed = [ratio(seconds, release, ours) for seconds in grid.values()]
            colour, label = CIRCUMSTANCES[name]
            cost.loglog(sizes, speed, "o", ms=6, alpha=0.75, color=colour, label=label)
        cost.axhline(1, color="#333333", ls="--")
        cost.set_title("Times as fast as Kornia 0.9.0,\nscenes drawn at random", loc="left", fontsize=13)
        cost.set(xlabel="logits in the batch")
        cost.legend(frameon=False, loc="upper left", handletextpad=0.1)
        sides = [int(side) for side in results["errors"]]
        # The textbook form and other libraries have the curve of Kornia.
        labels = {RELEASE: "Kornia 0.9.0 and other libraries", BINNED: BINNED, OURS: OURS}
        for name, label in labels.items():
            values = [row[name]["gradient"] for row in results["errors"].values()]
            error.loglog(sides, values, marker="o", ms=5, color=COLOURS[name])
            error.annotate(
                label, (sides[-1], values[-1]), (0, 9), textcoords="offset points", ha="right", color=COLOURS[name]
            )
        error.set_title("Relative gradient error of the hinge loss,\nfloat32", loc="left", fontsize=13)
        error.set(xlabel="image side")
        error.set_xticks(sides, [str(side) for side in sides])
        error.minorticks_off()
        for axis in (cost, error):
            axis.grid(axis="y", color="#e8e8e8")
        machine = results["machine"]
        note = f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}"
        figure.text(1, -0.01, note, ha="right", va="top", fontsize=10, color="#777777")
        figure.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
