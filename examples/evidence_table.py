"""What the runs of evidence.py say: tables and a figure from examples/results/runs.jsonl.

``python examples/evidence_table.py`` draws examples/results/evidence.png and renews the tables in examples/README.md.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent
RUNS, SWEEP, SWITCH = (ROOT / "results" / name for name in ("runs.jsonl", "sweep.jsonl", "switch.csv"))
MARKS = ("<!-- made by evidence_table.py -->", "<!-- end -->")

REFERENCE = "ce"
NAMES = {
    "ce": "cross-entropy",
    "dice": "Dice",
    "lovasz-batch": "Lovász",
    "lovasz-present-batch": "Lovász",
    "ce+lovasz": "cross-entropy + Lovász",
    "ce>ce": "cross-entropy, then cross-entropy",
    "ce>lovasz-image": "cross-entropy, then Lovász per image",
    "ce>lovasz-batch": "cross-entropy, then Lovász",
    "ce>lovasz-all-image": "cross-entropy, then Lovász, all classes, per image",
    "ce>lovasz-all-batch": "cross-entropy, then Lovász, all classes",
    "ce>lovasz-present-image": "cross-entropy, then Lovász per image",
    "ce>lovasz-present-batch": "cross-entropy, then Lovász",
    "ce>ce+lovasz": "cross-entropy, then cross-entropy + Lovász",
}
SHORT = {"ce": "cross-entropy", "lovasz-batch": "Lovász"}
# What the runs were made to compare, beside everything with cross-entropy alone.
CONTRASTS = {
    "looped digits": (
        ("ce>lovasz-batch", "dice"),
        ("ce>lovasz-batch", "ce>ce"),
        ("ce>lovasz-batch", "lovasz-batch"),
        ("ce>lovasz-batch", "ce>lovasz-image"),
        ("ce>lovasz-batch", "ce>ce+lovasz"),
    ),
    "all digits": (
        ("ce>lovasz-present-batch", "dice"),
        ("ce>lovasz-present-batch", "ce>ce"),
        ("ce>lovasz-present-batch", "lovasz-present-batch"),
        ("lovasz-present-batch", "dice"),
        ("ce>lovasz-present-batch", "ce>lovasz-present-image"),
        ("ce>lovasz-present-batch", "ce>lovasz-all-batch"),
        ("ce>lovasz-present-image", "ce>lovasz-all-image"),
        ("ce>lovasz-present-batch", "ce>ce+lovasz"),
    ),
}
MEASURES = {"test at half": "threshold 0.5", "test at best": "best threshold"}


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, ``mean - half`` to ``mean + half``, by Student's t distribution."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        """The interval of independent values, one from each seed."""
        error = values.std(ddof=1) / np.sqrt(len(values))
        return cls(values.mean(), stats.t.ppf(0.975, len(values) - 1) * error)


def read(path: Path = RUNS) -> list[dict]:
    """The records of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def by_seed(records: list[dict], task: str, measure: str) -> dict[str, dict[int, float]]:
    """For every arm of a task, what was measured on each of its seeds, in percent."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if record["task"] == task and measure in record:
            found.setdefault(record["arm"], {})[record["seed"]] = 100 * record[measure]
    return {arm: found[arm] for arm in NAMES if arm in found}


def average(of_arm: dict[int, float]) -> str:
    """The mean over the seeds, for people."""
    return f"{np.mean(list(of_arm.values())):.1f}"


def paired(values: dict[str, dict[int, float]], arm: str, other: str) -> np.ndarray:
    """The difference between two arms on each of the seeds that both have."""
    seeds = sorted(set(values[arm]) & set(values[other]))
    return np.array([values[arm][seed] - values[other][seed] for seed in seeds])


def tasks(records: list[dict]) -> list[str]:
    """The tasks of the records, in their order."""
    return list(dict.fromkeys(record["task"] for record in records))


def table(records: list[dict], task: str) -> list[list[str]]:
    """A heading and a row for every arm: mean test IoU, and its difference from cross-entropy, paired by seed."""
    columns = {m: values for m in MEASURES if (values := by_seed(records, task, m))}
    heading = ["training", "seeds"]
    for measure in columns:
        at = f" at {MEASURES[measure]}" if len(columns) > 1 else ""
        heading += [f"test IoU{at}", "against cross-entropy"]
    lines = [heading]
    for arm, of_arm in next(iter(columns.values())).items():
        line = [NAMES[arm], str(len(of_arm))]
        for values in columns.values():
            line += [average(values[arm]), difference(values, arm, REFERENCE)]
        lines.append(line)
    return lines


def difference(values: dict[str, dict[int, float]], arm: str, other: str) -> str:
    """The paired difference for people; with an interval from three pairs on."""
    if arm == other or arm not in values or other not in values:
        return ""
    differences = paired(values, arm, other)
    if len(differences) < 3:
        shown = f"{differences.mean():+.1f}" if len(differences) else ""
    else:
        interval = Interval.of(differences)
        shown = f"{interval.mean:+.1f} ± {interval.half:.1f}"
    return shown.replace("-", "\N{MINUS SIGN}")


def summary_table(records: list[dict]) -> list[list[str]]:
    """A heading and a row for every way of training that all tasks share: mean test IoU and its paired difference."""
    measure = next(iter(MEASURES))
    of_task = {
        task: {NAMES[arm]: (values, arm) for arm in values}
        for task in tasks(records)
        if (values := by_seed(records, task, measure))
    }
    shared = [name for name in dict.fromkeys(NAMES.values()) if all(name in arms for arms in of_task.values())]
    lines = [["training", *of_task]]
    for name in shared:
        line = [name]
        for arms in of_task.values():
            values, arm = arms[name]
            against = difference(values, arm, REFERENCE)
            line.append(average(values[arm]) + (f" ({against})" if against else ""))
        lines.append(line)
    return lines


def contrast_table(records: list[dict]) -> list[list[str]]:
    """A heading and a row for every comparison that the runs were made for."""
    lines = [["task", "training", "against", *MEASURES.values()]]
    for task in tasks(records):
        columns = [by_seed(records, task, measure) for measure in MEASURES]
        for arm, other in CONTRASTS[task]:
            shown = [difference(values, arm, other) if values else "" for values in columns]
            lines.append([task, NAMES[arm], NAMES[other], *shown])
    return lines


def rate_table(sweep: list[dict], runs: list[dict]) -> list[list[str]]:
    """A heading and a row for every arm: the rates tried, with the validation IoU of each, and the one chosen."""
    lines = [["task", "training", "validation IoU at each learning rate of its last stage", "chosen"]]
    chosen = {(record["task"], record["arm"]): record["rates"][-1] for record in runs}
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for record in sweep:
        iou = record.get("validation at best", record["validation at half"])
        tried.setdefault((record["task"], record["arm"]), {})[record["rates"][-1]] = 100 * iou
    for task in tasks(runs):
        for arm, name in NAMES.items():
            if of_arm := tried.get((task, arm)):
                shown = ", ".join(f"{rate:g}: {iou:.1f}" for rate, iou in sorted(of_arm.items()))
                lines.append([task, name, shown, f"{chosen[task, arm]:g}"])
    return lines


def switch_table(records: list[dict]) -> list[list[str]]:
    """A heading and a row for every beginning of a second stage that switch.py tried."""
    steps = [name for name in records[0] if name.startswith("step ")]
    lines = [["second stage", "learning rate", "rises from near 0", *steps]]
    for record in records:
        shown = [f"{100 * float(record[step]):.1f}" for step in steps]
        lines.append([SHORT[record["loss"]], record["rate"], {"True": "yes", "False": "no"}[record["warm_up"]], *shown])
    return lines


def setting(records: list[dict]) -> str:
    """What the numbers come from, in one sentence."""
    versions, settings = records[-1]["versions"], records[-1]["settings"]
    dates = sorted({record["date"] for record in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{len(records)} runs, {sum(settings['steps'])} steps of {settings['batch_size']} images each, "
        f"{settings['scenes'][2]} test images; {when}, one core of {records[-1]['machine']}, PyTorch "
        f"{versions['torch'].partition('+')[0]}, MONAI {versions['monai']}, Python {versions['python']}"
    )


def draw(records: list[dict], path: Path) -> None:
    """Every arm's difference from cross-entropy alone, with its interval and the single seeds."""
    panels = [(task, measure) for task in tasks(records) for measure in MEASURES if by_seed(records, task, measure)]
    heights = [len(by_seed(records, *panel)) for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(8, 0.34 * sum(heights) + 0.8 * len(panels)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (task, measure) in zip(np.atleast_1d(axes), panels, strict=True):
        values = by_seed(records, task, measure)
        arms = [arm for arm in values if arm != REFERENCE and len(paired(values, arm, REFERENCE))]
        for place, arm in enumerate(arms):
            differences = paired(values, arm, REFERENCE)
            colour = "#1f77b4" if "lovasz" in arm else "#7f7f7f"
            axis.plot(differences, np.full(len(differences), place), ".", color=colour, alpha=0.35, markersize=6)
            if len(differences) > 2:  # the interval of two is wider than the axis
                interval = Interval.of(differences)
                axis.errorbar(interval.mean, place, xerr=interval.half, fmt="o", color=colour, capsize=3)
            else:
                axis.plot(differences.mean(), place, "o", color=colour)
        axis.axvline(0, color="#303030", linewidth=1, zorder=0)
        axis.set(yticks=range(len(arms)), yticklabels=[NAMES[arm] for arm in arms], ylim=(len(arms) - 0.5, -0.5))
        at = "" if task == "all digits" else f", {MEASURES[measure]}"
        axis.set_title(
            f"{task}{at}: cross-entropy alone has {average(values[REFERENCE])} %",
            fontsize=10,
            loc="left",
        )
        axis.grid(axis="x", color="#e8e8e8")
        axis.set_axisbelow(True)
    np.atleast_1d(axes)[-1].set_xlabel("test IoU minus that of cross-entropy alone, percentage points")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown(lines: list[list[str]]) -> str:
    """A table for a README."""
    first = [index for index, cell in enumerate(lines[0]) if cell in ("task", "training", "against")]
    rule = ["---" if index in first else "---:" for index in range(len(lines[0]))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def rest(lines: list[list[str]], title: str) -> str:
    """A table for the documentation."""
    rows = [("   * - " if index == 0 else "     - ") + cell for line in lines for index, cell in enumerate(line)]
    return "\n".join([f".. list-table:: {title}", "   :header-rows: 1", "", *(row.rstrip() for row in rows), ""])


def readme_block(records: list[dict]) -> str:
    """The part of the README between the marks."""
    parts = [f"**{task}**\n\n{markdown(table(records, task))}" for task in tasks(records)]
    return "\n\n".join([MARKS[0], *parts, markdown(contrast_table(records)), f"({setting(records)}.)", MARKS[1]])


def write_docs(folder: Path) -> None:
    """Tables and figure for the documentation."""
    records = read()
    folder.mkdir(parents=True, exist_ok=True)
    tables = [rest(table(records, task), f"{task}: test IoU in percent") for task in tasks(records)]
    (folder / "evidence.rst").write_text("\n".join(tables), encoding="utf-8")
    contrasts = rest(contrast_table(records), "Paired differences of test IoU, percentage points")
    (folder / "contrasts.rst").write_text(contrasts, encoding="utf-8")
    summary = rest(summary_table(records), "Test IoU in percent, and its difference from cross-entropy alone")
    (folder / "summary.rst").write_text(summary, encoding="utf-8")
    rates = rest(rate_table(read(SWEEP), records), "Search of the learning rates, on a seed that is not compared")
    (folder / "rates.rst").write_text(rates, encoding="utf-8")
    with SWITCH.open(newline="", encoding="utf-8") as file:
        switch = rest(
            switch_table(list(csv.DictReader(file))), "Validation IoU after the first steps of a second stage"
        )
    (folder / "switch.rst").write_text(switch, encoding="utf-8")
    (folder / "setting.rst").write_text(setting(records) + ".\n", encoding="utf-8")
    draw(records, folder / "evidence.png")


def main() -> None:
    """Renew the README and the figure."""
    records = read()
    readme = ROOT / "README.md"
    before, _, rest_of_it = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest_of_it.partition(MARKS[1])
    readme.write_text(before + readme_block(records) + after, encoding="utf-8")
    draw(records, ROOT / "results" / "evidence.png")


if __name__ == "__main__":
    main()
