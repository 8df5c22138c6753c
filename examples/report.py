"""What a run has to show: the IoU over a whole data set, a table of it, and a picture of predictions."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # the picture goes to a file, so no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import torch
from folder_data import IGNORE
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from rich.table import Table

from kornia.metrics import confusion_matrix

PAPER, IGNORED = "#ffffff", "#c8c8c8"
FOUND, MISSED, WRONG = "#2f2f2f", "#f28e2b", "#d6278a"
MAX_LEGEND = 24  # more classes than this are not told apart by colour anyway


@dataclass(frozen=True)
class Prediction:
    """What one trained network says about the test images: classes (N, H, W) and the IoU of every class."""

    classes: torch.Tensor
    iou: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """One task on its test images: the labels (N, H, W) and what was predicted ``"before"``, ``"after"`` and
    ``"without"`` the Lovász stage."""

    task: str
    class_names: tuple[str, ...]
    labels: torch.Tensor
    predictions: dict[str, Prediction]

    @property
    def is_binary(self) -> bool:
        """Whether there is one foreground class, whose IoU alone counts."""
        return self.task == "binary"


def iou_per_class(classes: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """IoU of every class, all pixels of the data set counted together; ``nan`` for a class in neither map."""
    valid = labels != IGNORE
    counts = confusion_matrix(classes[valid][None], labels[valid][None], num_classes)[0].double()
    both = counts.diagonal()
    return both / (counts.sum(0) + counts.sum(1) - both)


def score(iou: torch.Tensor, *, is_binary: bool) -> float:
    """The one number a task is judged by: the foreground's IoU, or the mean over the classes."""
    return (iou[1] if is_binary else iou.nanmean()).item()


def iou_table(outcome: Outcome, headings: dict[str, str]) -> Table:
    """IoU in percent: a column for every network, with its heading, and a row for every class."""
    table = Table()
    table.add_column("IoU, %")
    for name in outcome.predictions:
        table.add_column(headings[name], justify="right")
    for index, class_name in enumerate(outcome.class_names):
        if not (outcome.is_binary and index == 0):
            table.add_row(class_name, *(percent(p.iou[index].item()) for p in outcome.predictions.values()))
    if not outcome.is_binary:
        table.add_section()
        means = (percent(score(p.iou, is_binary=False)) for p in outcome.predictions.values())
        table.add_row("mean", *means, style="bold")
    return table


def percent(fraction: float) -> str:
    """A fraction as a percentage for people."""
    return "-" if np.isnan(fraction) else f"{100 * fraction:.1f}"


def draw(path: Path, images: torch.Tensor, outcomes: list[Outcome], columns: int = 6) -> None:
    """Write a picture of the first test images: each above its labels and every task's predictions before and after."""
    images = images[:columns]
    rows = [("image", images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy())]
    most_classes = max(outcomes, key=lambda outcome: len(outcome.class_names))
    rows.append(("label", colour_classes(most_classes.labels[: len(images)], most_classes)))
    for outcome in outcomes:
        labels = outcome.labels[: len(images)]
        for name in ("before", "after"):
            prediction = outcome.predictions[name]
            shown = prediction.classes[: len(images)]
            pixels = colour_errors(shown, labels) if outcome.is_binary else colour_classes(shown, outcome)
            iou = percent(score(prediction.iou, is_binary=outcome.is_binary))
            rows.append((f"{outcome.task}\n{name} Lovász\nIoU {iou} %", pixels))

    size = (1.5 * len(images) + 2.6, 1.5 * len(rows))
    figure, axes = plt.subplots(len(rows), len(images), figsize=size, squeeze=False, layout="constrained")
    for row_axes, (title, row) in zip(axes, rows, strict=True):
        for axis, pixels in zip(row_axes, row, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#d0d0d0")
        row_axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    for place, outcome in zip(("upper", "lower"), outcomes, strict=False):
        if patches := legend(outcome):
            figure.legend(
                handles=patches, title=outcome.task, alignment="left", loc=f"outside right {place}", frameon=False
            )
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def palette(num_classes: int) -> np.ndarray:
    """Colours (num_classes, 3): white for class 0, then ten distinct ones, then as many as needed around the wheel."""
    names = mpl.colormaps["tab10"].colors
    if num_classes - 1 > len(names):
        names = mpl.colormaps["turbo"](np.linspace(0, 1, num_classes - 1))[:, :3]
    return np.array([to_rgb(PAPER), *names[: num_classes - 1]])


def colour_classes(classes: torch.Tensor, outcome: Outcome) -> np.ndarray:
    """Class maps (N, H, W) as RGB (N, H, W, 3), ignored pixels grey."""
    colours = np.array([to_rgb(PAPER), to_rgb(FOUND)]) if outcome.is_binary else palette(len(outcome.class_names))
    ignored = (classes == IGNORE).numpy()
    return np.where(ignored[..., None], to_rgb(IGNORED), colours[np.where(ignored, 0, classes)])


def colour_errors(classes: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Binary predictions (N, H, W) as RGB, by what they got right and wrong; ignored pixels grey."""
    colours = np.array([to_rgb(colour) for colour in (PAPER, WRONG, MISSED, FOUND, IGNORED)])
    return colours[torch.where(labels == IGNORE, 4, 2 * labels + classes).numpy()]


def legend(outcome: Outcome) -> list[Patch]:
    """What the colours of a task's rows mean."""
    if outcome.is_binary:
        foreground = outcome.class_names[1]
        meaning = {FOUND: f"{foreground} found", MISSED: f"{foreground} missed", WRONG: f"taken for {foreground}"}
        return [Patch(color=colour, label=text) for colour, text in meaning.items()]
    if len(outcome.class_names) > MAX_LEGEND:
        return []
    colours = palette(len(outcome.class_names))[1:]
    return [Patch(color=colour, label=name) for colour, name in zip(colours, outcome.class_names[1:], strict=True)]
