"""Report the results of segment.py: the table of IoU, the curves, and pictures of predictions."""

import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # draw to files, without a display

import matplotlib.pyplot as plt
import numpy as np
import torch
from data import Split
from folder_data import IGNORE
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch
from rich.table import Table

PAPER, IGNORED = "#ffffff", "#c8c8c8"
FOUND, MISSED, WRONG = "#2f2f2f", "#f28e2b", "#d6278a"
STAGES = ("cross-entropy", "more cross-entropy", "Lovász")
STAGE_COLOURS = ("#b0b0b0", "#606060", "#1f77b4")
SHOWN = 6  # test images in the picture
MAX_LEGEND = 24  # with more classes there is no legend, because their colours are too similar


def stage_names(mix: float) -> tuple[str, str, str]:
    """Names of the three stages, where ``mix`` is the weight of cross-entropy in the last one.

    The second and the third stage both continue from the first, for the same number of steps.
    """
    first, second, last = STAGES
    if mix == 1:
        last = second
    elif mix > 0:
        last = f"{first} + {last}"
    return first, second, last


@dataclass(frozen=True)
class StageOutcome:
    """Results of the best weights of a stage.

    ``iou`` has, for each split, the IoU at every threshold (binary task) or of every class. ``chosen`` is the index of
    the threshold that is best on validation, and None for several classes. ``classes`` are the predictions for the
    first test images.
    """

    iou: dict[str, torch.Tensor]
    chosen: int | None
    classes: torch.Tensor


@dataclass(frozen=True)
class Outcome:
    """Results of a run: its candidate thresholds as probabilities, its history, and the outcome of each stage."""

    task: str
    class_names: tuple[str, ...]
    probabilities: torch.Tensor
    history: list[dict]
    stages: list[StageOutcome]
    stage_names: tuple[str, ...] = STAGES

    @property
    def is_binary(self) -> bool:
        """Whether the task has one foreground class, so that only the IoU of the foreground is reported."""
        return self.task == "binary"


def rows(outcome: Outcome) -> list[dict]:
    """The rows of results.csv: for each stage, the IoU at 0.5 and at the best threshold, or of each class and mean."""
    records = []
    for name, stage in zip(outcome.stage_names, outcome.stages, strict=True):
        if outcome.is_binary:
            half = int((outcome.probabilities - 0.5).abs().argmin())
            places = [(outcome.class_names[1], place) for place in (half, stage.chosen)]
        else:
            places = list(zip(outcome.class_names, range(len(outcome.class_names))))
        for class_name, place in places:
            threshold = f"{outcome.probabilities[place]:.2f}" if outcome.is_binary else ""
            values = {f"{split}_iou": iou[place].item() for split, iou in stage.iou.items()}
            records.append({"after": name, "class": class_name, "threshold": threshold, **values})
        if not outcome.is_binary:
            means = {f"{split}_iou": iou.nanmean().item() for split, iou in stage.iou.items()}
            records.append({"after": name, "class": "mean", "threshold": "", **means})
    return records


def table(outcome: Outcome, images: int) -> Table:
    """Make the table that is printed: IoU on the test images in percent."""
    records = rows(outcome)
    shown = Table(title=f"{outcome.task}: IoU on {images} test images, %", title_justify="left")
    if outcome.is_binary:
        for heading in ("after", "threshold", "validation", "test"):
            shown.add_column(heading, justify="left" if heading == "after" else "right")
        for place, record in enumerate(records):
            numbers = percent(record["validation_iou"]), percent(record["test_iou"])
            best = " best" if place % 2 else ""
            shown.add_row(record["after"], record["threshold"] + best, *numbers)
        return shown
    shown.add_column("class")
    for name in outcome.stage_names:
        shown.add_column(f"after {name}", justify="right")
    classes = len(records) // len(outcome.stage_names)
    for of_class in zip(*(records[i : i + classes] for i in range(0, len(records), classes)), strict=True):
        if of_class[0]["class"] == "mean":
            shown.add_section()
        shown.add_row(of_class[0]["class"], *(percent(record["test_iou"]) for record in of_class))
    return shown


def percent(fraction: float) -> str:
    """Format a fraction as a percentage, and nan as a dash."""
    return f"{100 * fraction:.1f}" if np.isfinite(fraction) else "-"


def write(folder: Path, outcome: Outcome, test: Split) -> None:
    """Write two CSV files and the pictures to a folder."""
    for name, records in (("results", rows(outcome)), ("history", outcome.history)):
        with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)
    draw_curves(folder / "curves.png", outcome)
    if outcome.is_binary:
        draw_thresholds(folder / "thresholds.png", outcome)
    draw_predictions(folder / "predictions.png", outcome, test)


def draw_curves(path: Path, outcome: Outcome) -> None:
    """Plot the loss and the validation IoU of each stage against the steps."""
    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(7, 5), layout="constrained")
    for number, (name, colour) in enumerate(zip(outcome.stage_names, STAGE_COLOURS, strict=True), 1):
        points = [record for record in outcome.history if record["stage"] == number]
        steps = [record["step"] for record in points]
        upper.plot(steps, [record["loss"] for record in points], color=colour, marker=".", label=name)
        lower.plot(steps, [100 * record["validation_iou"] for record in points], color=colour, marker=".")
    upper.set(ylabel="loss of the stage", ylim=(0, None))
    upper.legend(frameon=False)
    what = "at the best threshold" if outcome.is_binary else "mean of the classes"
    lower.set(ylabel=f"validation IoU, %\n{what}", xlabel="step")
    finish(figure, path)


def draw_thresholds(path: Path, outcome: Outcome) -> None:
    """Plot the IoU against the threshold, and mark the threshold that is best on validation."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, colour, stage in list(zip(outcome.stage_names, STAGE_COLOURS, outcome.stages, strict=True))[1:]:
        for split, style in (("validation", "--"), ("test", "-")):
            axis.plot(outcome.probabilities, 100 * stage.iou[split], style, color=colour, label=f"{name}, {split}")
        chosen = outcome.probabilities[stage.chosen], 100 * stage.iou["test"][stage.chosen]
        axis.plot(*chosen, "o", color=colour, label=f"{name}, chosen on validation")
    axis.axvline(0.5, color="#d0d0d0", linewidth=1, zorder=0)
    axis.set(xlabel="threshold, as a probability", ylabel="IoU, %", xlim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    finish(figure, path)


def draw_predictions(path: Path, outcome: Outcome, test: Split) -> None:
    """Draw the first test images, their labels, and the predictions of the last two stages, which have equal steps."""
    labels = test.labels[:SHOWN]
    images = test.images[:SHOWN].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    pictures = [("image", images), ("label", colour_classes(labels, outcome))]
    first, steps = (max(record["step"] for record in outcome.history if record["stage"] == i) for i in (1, 2))
    begun, _, last = outcome.stage_names
    names = (f"{steps} steps of\n{begun}", f"{first} of {begun},\n{steps - first} of {last}")
    for name, stage in zip(names, outcome.stages[1:], strict=True):
        pixels = colour_errors(stage.classes, labels) if outcome.is_binary else colour_classes(stage.classes, outcome)
        iou = stage.iou["test"][stage.chosen] if outcome.is_binary else stage.iou["test"].nanmean()
        pictures.append((f"{name}\ntest IoU {percent(iou.item())} %", pixels))

    size = (1.5 * len(images) + 2.8, 1.5 * len(pictures))
    figure, axes = plt.subplots(len(pictures), len(images), figsize=size, squeeze=False, layout="constrained")
    for row_axes, (title, row) in zip(axes, pictures, strict=True):
        for axis, pixels in zip(row_axes, row, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_color("#d0d0d0")
        row_axes[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=11, labelpad=8)
    if patches := legend(outcome):
        figure.legend(handles=patches, loc="outside right upper", frameon=False)
    finish(figure, path)


def finish(figure: plt.Figure, path: Path) -> None:
    """Save a figure and close it."""
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def palette(num_classes: int) -> np.ndarray:
    """Colours (num_classes, 3): white for class 0, then the ten of tab10 or, for more classes, a range of turbo."""
    names = mpl.colormaps["tab10"].colors
    if num_classes - 1 > len(names):
        names = mpl.colormaps["turbo"](np.linspace(0, 1, num_classes - 1))[:, :3]
    return np.array([to_rgb(PAPER), *names[: num_classes - 1]])


def colour_classes(classes: torch.Tensor, outcome: Outcome) -> np.ndarray:
    """Draw class maps (N, H, W) as RGB (N, H, W, 3), with ignored pixels in grey."""
    colours = np.array([to_rgb(PAPER), to_rgb(FOUND)]) if outcome.is_binary else palette(len(outcome.class_names))
    ignored = (classes == IGNORE).numpy()
    return np.where(ignored[..., None], to_rgb(IGNORED), colours[np.where(ignored, 0, classes)])


def colour_errors(classes: torch.Tensor, labels: torch.Tensor) -> np.ndarray:
    """Draw binary predictions (N, H, W) as RGB: found, missed and false foreground, with ignored pixels in grey."""
    colours = np.array([to_rgb(colour) for colour in (PAPER, WRONG, MISSED, FOUND, IGNORED)])
    return colours[torch.where(labels == IGNORE, 4, 2 * labels + classes).numpy()]


def legend(outcome: Outcome) -> list[Patch]:
    """The legend of the colours, which is empty for more than MAX_LEGEND classes."""
    if outcome.is_binary:
        meaning = {FOUND: "found", MISSED: "missed", WRONG: "false alarm"}
        return [Patch(color=colour, label=text) for colour, text in meaning.items()]
    if len(outcome.class_names) > MAX_LEGEND:
        return []
    colours = palette(len(outcome.class_names))[1:]
    return [Patch(color=colour, label=name) for colour, name in zip(colours, outcome.class_names[1:], strict=True)]
