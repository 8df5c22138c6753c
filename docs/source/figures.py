"""The figures of the documentation, drawn anew at every build: ``python docs/source/figures.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

FOREGROUND, BACKGROUND = "#2a6f97", "#e07a1f"
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
}


def jaccard_steps(foreground: list[bool]) -> list[float]:
    """Jaccard loss of the wrong sets that grow pixel by pixel in the given order, from none to all."""
    total, k, m = sum(foreground), 0, 0
    steps = [0.0]
    for is_foreground in foreground:
        k, m = k + is_foreground, m + (not is_foreground)
        steps.append(1 - (total - k) / (total + m))
    return steps


def draw_extension(path: Path) -> None:
    """The loss of nine pixels as an area, and the weights that the same order gives them."""
    errors = [1.7, 1.45, 1.3, 1.05, 0.9, 0.7, 0.5, 0.35, 0.15]
    foreground = [False, True, False, True, True, False, False, True, False]
    steps = jaccard_steps(foreground)
    colours = [FOREGROUND if f else BACKGROUND for f in foreground]

    figure, (area, bars) = plt.subplots(2, 1, figsize=(6, 6.2), layout="constrained")
    bounds = [*errors, 0.0]
    for i in range(len(errors)):
        area.fill_between([bounds[i + 1], bounds[i]], steps[i + 1], color="#dfe7ee", lw=0)
        area.plot([bounds[i + 1], bounds[i]], [steps[i + 1]] * 2, color="#33475b", lw=1.5)
        area.plot([errors[i]] * 2, [steps[i], steps[i + 1]], color=colours[i], lw=3, solid_capstyle="butt")
    area.set(xlim=(0, 1.8), ylim=(0, 1.05), xlabel="threshold $t$", ylabel=r"$\Delta_J(\{e_i > t\})$")
    area.set_title("the loss is the area", loc="left", fontsize=12)

    weights = [after - before for before, after in zip(steps, steps[1:])]
    bars.bar(range(1, len(weights) + 1), weights, color=colours, width=0.7)
    bars.set(xlabel="rank of the error, largest first", ylabel="weight $w_i$", xticks=range(1, len(weights) + 1))
    bars.set_title("each pixel's weight is its step", loc="left", fontsize=12)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (FOREGROUND, BACKGROUND)]
    bars.legend(handles, ["foreground pixel", "background pixel"], frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_passes(path: Path) -> None:
    """What the fused kernels read and write, in multiples of float32 logits."""
    by_bins = [("range", 1, 0), ("counts", 1, 0), ("loss", 1, 0), ("gradient", 1, 1)]
    # Places are 8 bytes, the marks of background 1.
    exact = [("keys", 1, 1), ("background", 2, 0.25), ("ranks", 2.25, 1), ("loss", 2, 0), ("gradient", 2, 1)]
    figure, axes = plt.subplots(2, 1, figsize=(6, 5.4), layout="constrained", sharex=True)
    for axis, title, passes in zip(axes, ("by bins", "exact, beside the sort"), (by_bins, exact)):
        names = [name for name, _, _ in passes]
        reads, writes = [r for _, r, _ in passes], [w for _, _, w in passes]
        axis.barh(names, reads, color=FOREGROUND, label="read", height=0.6)
        axis.barh(names, writes, left=reads, color=BACKGROUND, label="written", height=0.6)
        axis.invert_yaxis()
        axis.set_title(f"{title}: {sum(reads) + sum(writes):g} in all", loc="left", fontsize=12)
    axes[0].legend(frameon=False, loc="lower right")
    axes[1].set_xlabel("multiples of the logits")
    figure.savefig(path)
    plt.close(figure)


def draw_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        draw_extension(folder / "extension.png")
        draw_passes(folder / "passes.png")


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
