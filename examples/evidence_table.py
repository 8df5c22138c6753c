"""Make the tables and figures of the comparison from the runs that evidence.py wrote to examples/results.

``python examples/evidence_table.py`` draws evidence.png and curves.png in examples/results, and updates the tables in
examples/README.md. Building the documentation makes the same tables.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import evidence
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent
RUNS, SEARCH, KEPT = (ROOT / "results" / f"{name}.jsonl" for name in ("runs", "search", "kept"))
MARKS = ("<!-- made by evidence_table.py -->", "<!-- end -->")

REFERENCE = "ce"
NAMES = {
    "ce": "cross-entropy",
    "dice": "Dice",
    "jaccard": "soft Jaccard",
    "lovasz": "Lovász-Softmax",
    "hinge": "Lovász hinge",
    "ce+jaccard": "cross-entropy + soft Jaccard",
    "ce+lovasz": "cross-entropy + Lovász-Softmax",
    "ce+binned": "cross-entropy + Lovász-Softmax, 1,024 bins",
    "ce>ce": "cross-entropy, then cross-entropy",
    "ce>lovasz": "cross-entropy, then Lovász-Softmax",
    "ce>ce+lovasz": "cross-entropy, then both",
    "ce>hinge": "cross-entropy, then Lovász hinge",
}
# One colour for each budget, from the smallest to the largest. The largest stands out because fewer arms have it.
COLOURS = ("#9ecae1", "#3182bd", "#08306b", "#d94801")
# The measures that are reported for each task: the title, and the key in the records.
MEASURES = {
    "digits": {"digits": "test at half"},
    "lakes": {"lakes, at the best threshold": "test at best", "lakes, at probability 0.5": "test at half"},
}


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, ``mean - half`` to ``mean + half``, by Student's t distribution."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Interval":
        """The interval of independent values, one per seed. It is nan for fewer than three, which are too few."""
        if len(values) < 3:
            return cls(values.mean(), np.nan)
        error = values.std(ddof=1) / np.sqrt(len(values))
        return cls(values.mean(), stats.t.ppf(0.975, len(values) - 1) * error)

    def __str__(self) -> str:
        half = "" if np.isnan(self.half) else f" ± {self.half:.1f}"
        return f"{self.mean:+.1f}{half}".replace("-", "\N{MINUS SIGN}")


class Runs:
    """The finished runs. Tables and figures compare only the seeds that all arms of a task and budget have finished."""

    def __init__(self, records: list[dict]) -> None:
        self.records = records
        self.found = {(r["task"], r["arm"], r["budget"], r["seed"]): r for r in records}
        self.seeds = {
            (task, budget): [
                seed
                for seed in evidence.SEEDS
                if all((task, arm, budget, seed) in self.found for arm in evidence.arms_at(task, budget))
            ]
            for task in evidence.TASKS
            for budget in evidence.BUDGETS
        }

    def budgets(self, task: str) -> list[int]:
        """The budgets for which at least one seed has been finished by all arms."""
        return [budget for budget in sorted(evidence.BUDGETS) if self.seeds[task, budget]]

    def iou(self, task: str, arm: str, budget: int, measure: str) -> np.ndarray:
        """The IoU of each seed, in percent."""
        return np.array([100 * self.found[task, arm, budget, seed][measure] for seed in self.seeds[task, budget]])

    def difference(self, task: str, arm: str, budget: int, measure: str) -> Interval:
        """The difference from cross-entropy on the same seeds, in percentage points."""
        return Interval.of(self.iou(task, arm, budget, measure) - self.iou(task, REFERENCE, budget, measure))


def table(runs: Runs, task: str, measure: str) -> list[list[str]]:
    """A table with a row for each arm: mean test IoU after each budget, and its difference from cross-entropy."""
    budgets = runs.budgets(task)
    seeds = {budget: len(runs.seeds[task, budget]) for budget in budgets}
    lines = [["training", *(f"{budget:,} steps, {n} seed{'s' * (n > 1)}" for budget, n in seeds.items())]]
    for arm in arms(task, budgets):
        line = [NAMES[arm]]
        for budget in budgets:
            if arm not in evidence.arms_at(task, budget):
                line.append("")
                continue
            mean = f"{runs.iou(task, arm, budget, measure).mean():.1f}"
            line.append(mean if arm == REFERENCE else f"{mean} ({runs.difference(task, arm, budget, measure)})")
        lines.append(line)
    return lines


def steps_of_reference(runs: Runs, task: str, arm: str, budget: int, measure: str) -> np.ndarray:
    """The number of steps that cross-entropy needs, on each seed, to reach the IoU that an arm has after a budget.

    Between two budgets, the IoU of cross-entropy is assumed to rise in proportion to the logarithm of the steps. If
    cross-entropy does not reach the IoU with any budget, the number is inf.
    """
    budgets = runs.budgets(task)
    curves = np.stack([runs.iou(task, REFERENCE, each, measure) for each in budgets])
    needed = []
    for curve, target in zip(curves.T, runs.iou(task, arm, budget, measure), strict=True):
        place = int(np.argmax(curve >= target))  # the first budget with which cross-entropy reaches the target
        if curve.max() < target:
            needed.append(np.inf)
        elif place == 0:  # no smaller budget was tried
            needed.append(budgets[0])
        else:
            between = slice(place - 1, place + 1)
            needed.append(np.exp(np.interp(target, curve[between], np.log(budgets[between]))))
    return np.array(needed)


def ratio_of_steps(runs: Runs, task: str, arm: str, budget: int, measure: str) -> str:
    """How many times as many steps cross-entropy needs: geometric mean and 95 % interval, paired by seed."""
    ratios = steps_of_reference(runs, task, arm, budget, measure) / budget
    if missed := int(np.isinf(ratios).sum()):
        return f"not reached on {missed} of {len(ratios)} seeds"
    interval = Interval.of(np.log(ratios))
    low, high = np.exp([interval.mean - interval.half, interval.mean + interval.half])
    return f"{np.exp(interval.mean):.1f} ({low:.1f} to {high:.1f})"


def ratio_table(runs: Runs) -> list[list[str]]:
    """A table of these ratios, with a row for each mixture on each task."""
    budgets = [300, 900, 2700]
    lines = [["", *(f"after {budget:,} steps" for budget in budgets)]]
    for task, measures in MEASURES.items():
        title, measure = next(iter(measures.items()))
        for arm in ("ce+lovasz", "ce+jaccard"):
            cells = [ratio_of_steps(runs, task, arm, budget, measure) for budget in budgets]
            lines.append([f"{NAMES[arm]}, {title}", *cells])
    return lines


def draw_curves(runs: Runs, path: Path) -> None:
    """Plot test IoU against the number of steps, for cross-entropy and the mixtures: each seed, and the mean."""
    figure, axes = plt.subplots(len(MEASURES), 1, figsize=(6, 5.6), sharex=True, layout="constrained")
    for axis, (task, measures) in zip(axes, reversed(MEASURES.items()), strict=True):
        title, measure = next(iter(measures.items()))
        budgets = runs.budgets(task)
        for arm, colour in (("ce", "#606060"), ("ce+jaccard", "#3182bd"), ("ce+lovasz", "#d94801")):
            curves = np.stack([runs.iou(task, arm, budget, measure) for budget in budgets])
            axis.plot(budgets, curves, color=colour, linewidth=0.7, alpha=0.35)
            axis.plot(budgets, curves.mean(1), color=colour, linewidth=2.4, marker="o", label=NAMES[arm])
        axis.set_xscale("log", base=3)
        axis.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
        axis.set_title(title, loc="left", fontsize=12)
        axis.set_ylabel("test IoU, %", fontsize=12)
        axis.grid(color="#e8e8e8")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("steps", fontsize=12)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=11, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def kept_table(records: list[dict]) -> list[list[str]]:
    """A table of test IoU with the last weights and with the weights that were best on validation images."""
    lines = [["", "last weights", "best weights on validation", "step of the best weights (median)"]]
    for (task, measures), budget in itertools.product(MEASURES.items(), evidence.BEST_WEIGHTS_BUDGETS):
        title, measure = next(iter(measures.items()))
        found = {(r["arm"], r["seed"]): r for r in records if (r["task"], r["budget"]) == (task, budget)}

        def iou(arm: str, which: str, found: dict = found, measure: str = measure) -> np.ndarray:
            return np.array([100 * found[arm, seed][which][measure] for seed in evidence.SEEDS])

        for arm in evidence.BEST_WEIGHTS_ARMS:
            cells = []
            for which in ("last", "kept"):
                gain = "" if arm == REFERENCE else f" ({Interval.of(iou(arm, which) - iou(REFERENCE, which))})"
                cells.append(f"{iou(arm, which).mean():.1f}{gain}")
            steps = np.median([found[arm, seed]["kept after"] for seed in evidence.SEEDS])
            lines.append([f"{NAMES[arm]}, {title}, {budget:,} steps", *cells, f"{steps:,.0f}"])
    return lines


def arms(task: str, budgets: Iterable[int]) -> list[str]:
    """The arms that are trained with any of these budgets, in the order of the tables."""
    return [arm for arm in NAMES if any(arm in evidence.arms_at(task, budget) for budget in budgets)]


def titled_tables(runs: Runs) -> dict[str, list[list[str]]]:
    """All tables of the comparison, by title."""
    return {
        title: table(runs, task, measure) for task, measures in MEASURES.items() for title, measure in measures.items()
    }


def rate_table(search: list[dict]) -> list[list[str]]:
    """A table with a row for each arm: the learning rates tried, their mean validation IoU, and the rate chosen."""
    scores = evidence.scores_by_rate(search)
    lines = [["task", "training", "learning rate of the last stage: validation IoU", "rate chosen"]]
    for task in evidence.TASKS:
        for arm in [arm for arm in NAMES if arm in evidence.ARMS[task]]:
            of_arm = scores[task, arm]
            shown = ", ".join(f"{rate:g}: {100 * iou:.1f}" for rate, iou in sorted(of_arm.items()))
            lines.append([task, NAMES[arm], shown, f"{evidence.best_rate(of_arm):g}"])
    return lines


def setting(runs: Runs) -> str:
    """Say how the numbers were obtained: runs, dates, machine and versions."""
    last = runs.records[-1]
    dates = sorted({record["date"] for record in runs.records})
    when = f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}"
    return (
        f"{len(runs.records)} runs in total. The tables show means over the seeds and, in parentheses, the difference "
        "from cross-entropy, paired by seed, with its 95 % interval. "
        f"Trained {when}, each run on one core of {last['machine']}, with "
        f"PyTorch {last['versions']['torch'].partition('+')[0]}, MONAI {last['versions']['monai']} and "
        f"Python {last['versions']['python']}"
    )


def draw(runs: Runs, path: Path) -> None:
    """Plot the difference in test IoU from cross-entropy, for each task, arm and budget."""
    shown = {task: [arm for arm in arms(task, runs.budgets(task)) if arm != REFERENCE] for task in MEASURES}
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(8, 8.5), height_ratios=[len(names) for names in shown.values()], layout="constrained"
    )
    for axis, (task, names) in zip(axes, shown.items(), strict=True):
        title, measure = next(iter(MEASURES[task].items()))
        budgets = runs.budgets(task)
        for colour, budget, shift in zip(COLOURS, budgets, np.linspace(-0.25, 0.25, len(budgets))):
            trained = [arm for arm in names if arm in evidence.arms_at(task, budget)]
            intervals = [runs.difference(task, arm, budget, measure) for arm in trained]
            axis.errorbar(
                [interval.mean for interval in intervals],
                [names.index(arm) + shift for arm in trained],
                xerr=[interval.half for interval in intervals],
                fmt="o",
                color=colour,
                markersize=6,
                capsize=3,
                label=f"{budget:,} steps",
            )
        axis.axvline(0, color="#303030", linewidth=1, zorder=0)
        axis.set(yticks=range(len(names)), yticklabels=[NAMES[arm] for arm in names], ylim=(len(names) - 0.5, -0.5))
        means = ", ".join(f"{runs.iou(task, REFERENCE, budget, measure).mean():.1f}" for budget in budgets)
        axis.set_title(f"{title}: cross-entropy alone has {means} %", loc="right", fontsize=11, pad=24)
        axis.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(budgets), frameon=False)
        axis.grid(axis="x", color="#e8e8e8")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("test IoU less that of cross-entropy alone, percentage points, with 95 % intervals", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def markdown(lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def rest(lines: list[list[str]], title: str) -> str:
    """A table in reStructuredText."""
    rows = [("   * - " if index == 0 else "     - ") + cell for line in lines for index, cell in enumerate(line)]
    return "\n".join([f".. list-table:: {title}", "   :header-rows: 1", "", *(row.rstrip() for row in rows), ""])


def readme_block(runs: Runs) -> str:
    """The text between MARKS in examples/README.md."""
    parts = [f"**{title}**\n\n{markdown(lines)}" for title, lines in titled_tables(runs).items()]
    return "\n\n".join([MARKS[0], *parts, f"{setting(runs)}.", MARKS[1]])


def read() -> Runs:
    """The finished runs in the repository."""
    return Runs(evidence.read(RUNS))


def write_docs(folder: Path) -> None:
    """Write the tables and figures of the documentation."""
    runs = read()
    folder.mkdir(parents=True, exist_ok=True)
    tables = [rest(lines, f"Test IoU in percent: {title}") for title, lines in titled_tables(runs).items()]
    rates = rest(rate_table(evidence.read(SEARCH)), "Search for the learning rates, with the validation IoU in percent")
    for name, text in (
        ("evidence", "\n".join(tables)),
        ("rates", rates),
        ("kept", rest(kept_table(evidence.read(KEPT)), "Test IoU in percent, and the difference from cross-entropy")),
        ("ratios", rest(ratio_table(runs), "Steps that cross-entropy needs, divided by the steps of the mixture")),
        ("setting", setting(runs) + ".\n"),
    ):
        (folder / f"{name}.rst").write_text(text, encoding="utf-8")
    draw(runs, folder / "evidence.png")
    draw_curves(runs, folder / "curves.png")


def main() -> None:
    """Update the README and the figures."""
    runs = read()
    readme = ROOT / "README.md"
    before, _, rest_of_it = readme.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest_of_it.partition(MARKS[1])
    readme.write_text(before + readme_block(runs) + after, encoding="utf-8")
    draw(runs, ROOT / "results" / "evidence.png")
    draw_curves(runs, ROOT / "results" / "curves.png")


if __name__ == "__main__":
    main()
