"""Make the tables of the documentation, in reStructuredText, from the results of run.py."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COMPILED = ", compiled"
OURS, BINNED, GROUPED = "this fork", "this fork, 1024 bins", "this fork, in a group"
BASELINE, RELEASE = "cross-entropy", "Kornia 0.9.0"
DENSE, COPIES = "this fork, without kernels", "two copies"
SHORT = {
    OURS: "this fork",
    BINNED: "1024 bins",
    GROUPED: "in a group",
    DENSE: "without kernels",
    f"{DENSE}, 1024 bins": "without kernels, 1024 bins",
    BASELINE: "cross-entropy",
    COPIES: "two copies",
    RELEASE: "Kornia 0.9.0",
    "segmentation-models-pytorch": "smp",
    "pytorch-toolbelt": "toolbelt",
}
DEVICES = {"cpu": "On a CPU", "cuda": "On a GPU"}

Seconds = dict[str, list[float]]


def read(device: str, folder: Path = RESULTS) -> dict | None:
    """Read the results of a device, or return None if it was not measured."""
    path = folder / f"{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """The median over rounds of the time of ``above`` divided by the time of ``below``."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def digits(value: float) -> str:
    return f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def list_table(title: str, lines: list[list[str]]) -> str:
    """A table in reStructuredText. The first line is the heading, and the first column is the widest."""
    width = max(12, 60 // max(1, len(lines[0]) - 1))
    result = [
        f".. list-table:: {title}",
        "   :header-rows: 1",
        f"   :widths: 34 {f'{width} ' * (len(lines[0]) - 1)}".rstrip(),
        "",
    ]
    for line in lines:
        result += [f"   {'* -' if i == 0 else '  -'} {cell}".rstrip() for i, cell in enumerate(line)]
    return "\n".join([*result, ""])


def extremes(grid: dict[str, Seconds], above: str, below: str, best: Callable) -> dict[str, tuple[float, str]]:
    """The worst, median and best ratio over scenes, with the name of the worst and of the best scene."""
    ratios = {label: ratio(seconds, above, below) for label, seconds in grid.items()}
    ends = {"best": best(ratios, key=ratios.__getitem__)}
    ends["worst"] = (min if best is max else max)(ratios, key=ratios.__getitem__)
    rows = {name: (ratios[label], label) for name, label in ends.items()}
    return {"worst": rows["worst"], "median": (statistics.median(ratios.values()), ""), "best": rows["best"]}


def drawn_table(results: dict) -> str:
    """A table of the scenes drawn at random: time relative to the release and to cross-entropy."""
    grid = results["grid"]["idle"]
    lines = [["", "worst", "median", "best"]]
    notes = []
    for title, above, below, best, end in (
        ("times as fast as Kornia 0.9.0", RELEASE, OURS, max, "Worst speed-up:"),
        ("times the time of cross-entropy", OURS, BASELINE, min, "Slowest relative to cross-entropy:"),
    ):
        rows = extremes(grid, above, below, best)
        lines.append([title, *(digits(value) for value, _ in rows.values())])
        notes.append(f"{end} {rows['worst'][1]}.")
    title = f"{len(grid)} scenes of random shapes"
    return list_table(title, lines) + "\n" + "\n".join(notes) + "\n"


def has_compiled_release(results: dict) -> bool:
    """Whether the results have times of the compiled release. Those of the GPU have none."""
    return any(f"{RELEASE}{COMPILED}" in seconds for seconds in results.get("compiled", {}).values())


def conditions_table(results: dict) -> list[list[str]]:
    """A table of speed under each condition: relative to the release, and relative to this fork on an idle machine."""
    grids = results["grid"]
    lines = [["", "worst", "median", "best", "our time relative to idle: median, worst"]]
    names = {"idle": "idle, all threads", "one thread": "idle, one thread", "busy": "beside two busy processes"}
    for name, grid in grids.items():
        rows = extremes(grid, RELEASE, OURS, max)
        times = [
            statistics.median(s[OURS]) / statistics.median(grids["idle"][label][OURS]) for label, s in grid.items()
        ]
        own = f"{digits(statistics.median(times))}, {digits(max(times))}"
        lines.append([names[name], *(digits(value) for value, _ in rows.values()), own])
    if not has_compiled_release(results):
        return lines
    rows = extremes(results["compiled"], f"{RELEASE}{COMPILED}", f"{OURS}{COMPILED}", max)
    own = [ratio(seconds, f"{OURS}{COMPILED}", OURS) for seconds in results["compiled"].values()]
    own = f"{digits(statistics.median(own))}, {digits(max(own))} (relative to eager)"
    lines.append(["both compiled", *(digits(value) for value, _ in rows.values()), own])
    return lines


def by_stage(rows: dict[str, dict[str, str]]) -> list[list[str]]:
    """Arrange rows by shape, with the numbers of its early and late stage in one cell."""
    names = [name for name in SHORT if any(name in row for row in rows.values()) and name != BASELINE]
    lines: dict[str, list[list[str]]] = {}
    for label, row in rows.items():
        shape, _, stage = label.rpartition(" ")
        alone = stage == "random" or f"{shape} late" not in rows
        cells = [row.get(name, "") for name in names]
        lines.setdefault(label if alone else shape, []).append(cells)
    heading = ["early / late", *(SHORT[name] for name in names)]
    return [heading] + [
        [label, *(" / ".join(pair) for pair in zip(*cells, strict=True))] for label, cells in lines.items()
    ]


def time_table(results: dict) -> str:
    rows = {
        label: {name: digits(ratio(seconds, name, BASELINE)) for name in seconds}
        for label, seconds in results["times"].items()
    }
    return list_table("Time relative to cross-entropy", by_stage(rows))


def memory_table(results: dict) -> str:
    rows = {label: {name: digits(x) for name, x in row.items()} for label, row in results["memory"].items()}
    baseline = sorted({digits(row[BASELINE]) for row in results["memory"].values()})
    title = f"Extra peak memory relative to the size of the logits. Cross-entropy takes {' to '.join(baseline)}"
    return list_table(title, by_stage(rows))


def compiled_table(results: dict) -> str:
    names = list(next(iter(results["compiled"].values())))
    lines = [["milliseconds", *(name.removeprefix("this fork, ").capitalize() for name in names)]]
    for label, seconds in results["compiled"].items():
        lines.append([label, *(digits(1000 * statistics.median(seconds[name])) for name in names)])
    return list_table("Eager and compiled", lines)


def accuracy(results: dict) -> list[list[str]]:
    """The error of the gradient for each image size."""
    names = (OURS, BINNED, RELEASE)
    lines = [["image", *(SHORT[name] for name in names)]]
    for side, row in results["errors"].items():
        lines.append([f"{side}x{side}", *(f"{row[name]['gradient']:.0e}" for name in names)])
    return lines


def accuracy_table(results: dict) -> str:
    return list_table("Relative error of the gradient of the hinge loss in float32", accuracy(results))


def claim(device: str) -> str:
    """A sentence with the speed relative to the release and to cross-entropy, the worst case first."""
    results = read(device)
    grids, machine = results["grid"], results["machine"]

    def span(rows: dict[str, tuple[float, str]], names: tuple[str, ...] = ("worst", "best", "median")) -> str:
        return "{} to {} times{{}} (median {})".format(*(digits(rows[name][0]) for name in names))

    place = f"on an {machine['device']}" if device == "cuda" else f"with {machine['threads']} threads"
    sentence = f"Over {len(grids['idle'])} shapes drawn at random, {place}, they are "
    sentence += span(extremes(grids["idle"], RELEASE, OURS, max)).format(" as fast as Kornia 0.9.0")
    if "busy" in grids:
        sentence += ", beside two busy processes " + span(extremes(grids["busy"], RELEASE, OURS, max)).format("")
    if has_compiled_release(results):
        rows = extremes(results["compiled"], f"{RELEASE}{COMPILED}", f"{OURS}{COMPILED}", max)
        sentence += ", and compiled " + span(rows).format(" as fast as Kornia compiled")
    cost = span(extremes(grids["idle"], OURS, BASELINE, min), ("best", "worst", "median"))
    cost = cost.format(" the time of cross-entropy")
    return f"{sentence}. They take {cost}."


def front_rows() -> list[list[str]]:
    """The speed table of README.md and the first page of the documentation, relative to the release."""
    lines = [["", "worst", "median", "best"]]
    for device, results in [(device, read(device)) for device in DEVICES]:
        if results is None:
            continue
        grids = results["grid"]
        place = results["machine"]["device"] if device == "cuda" else f"CPU, {results['machine']['threads']} threads"
        named = [(place, grids["idle"], OURS, RELEASE)]
        if "busy" in grids:
            named[0] = (f"{place}, idle", *named[0][1:])
            named.append((f"{place}, beside two busy processes", grids["busy"], OURS, RELEASE))
        if has_compiled_release(results):
            named.append(("both compiled", results["compiled"], f"{OURS}{COMPILED}", f"{RELEASE}{COMPILED}"))
        for name, grid, ours, release in named:
            lines.append([name, *(digits(value) for value, _ in extremes(grid, release, ours, max).values())])
    return lines


def setting(results: dict, device: str) -> str:
    machine = results["machine"]
    rounds = len(next(iter(results["times"].values()))[OURS])
    threads = f", {machine['threads']} threads" if device == "cpu" else ""
    return (
        f"Measured on {machine['date']}: {machine['device']}{threads}, PyTorch {machine['torch']}, Python "
        f"{machine['python']}, medians of {rounds} rounds.\n"
    )


def write_docs(folder: Path) -> None:
    """Write the tables to files. The file of a device that was not measured is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    for device, title in DEVICES.items():
        results = read(device)
        parts = []
        if results:
            parts = [title, "-" * len(title), "", claim(device), "", drawn_table(results)]
            if "busy" in results["grid"]:
                parts.insert(
                    5, list_table("How many times as fast as Kornia 0.9.0, by condition", conditions_table(results))
                )
            parts += [time_table(results), memory_table(results), compiled_table(results), setting(results, device)]
        (folder / f"speed_{device}.rst").write_text("\n".join(parts), encoding="utf-8")
    front = list_table("How many times as fast as Kornia 0.9.0, on random shapes", front_rows())
    (folder / "front.rst").write_text(front, encoding="utf-8")
    (folder / "accuracy.rst").write_text(accuracy_table(read("cpu")), encoding="utf-8")
