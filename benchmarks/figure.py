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
from tables import BASELINE, BINNED, OURS, RELEASE, ratio

COLOURS = {OURS: "#2a6f97", BINNED: "#61a5c2", BASELINE: "#6c757d", RELEASE: "#b23a48"}


def draw(raw: Path, path: Path) -> None:
    results = json.loads(raw.read_text())
    style = {"font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        figure, (cost, error) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
        grid = results["grid"]["idle"]
        sizes = [prod(map(int, re.search(r"\d+(x\d+)+", label).group().split("x"))) for label in grid]
        for name in (RELEASE, OURS):
            times = [ratio(seconds, name, BASELINE) for seconds in grid.values()]
            cost.loglog(sizes, times, "o", ms=6, alpha=0.75, color=COLOURS[name], label=name)
        cost.axhline(1, color=COLOURS[BASELINE], ls="--")
        cost.annotate("cross-entropy", (min(sizes), 1), (0, -16), textcoords="offset points", color=COLOURS[BASELINE])
        cost.set_title(
            f"Time of {len(grid)} scenes drawn at random,\nin multiples of cross-entropy", loc="left", fontsize=13
        )
        cost.set(xlabel="logits in the batch")
        cost.set_ylim(bottom=0.3)
        cost.legend(frameon=False, loc="lower right", handletextpad=0.1)
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
