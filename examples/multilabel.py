"""Compare cross-entropy with the binary Lovász losses on a task where a pixel may have several labels.

Run it with ``python examples/multilabel.py``. An image is two scenes of digit_scenes.py on top of each other, so that a
pixel may be the ink of two digits. The network has one output for each of the ten digits, and each output has its own
mask. The learning rate of each loss is chosen on the validation images of a seed that the comparison does not use.

Each finished run is written as a line of JSON to examples/results/multilabel.jsonl, and is not trained again.
"""

import itertools
import json
import statistics
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import digit_scenes
import torch
import torch.nn.functional as F
from data import Split
from evidence import build_network, circumstances, prepare_worker
from rich.progress import track
from segment import Stage, Task, predict
from torch import nn

from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

RESULTS = Path(__file__).resolve().parent / "results" / "multilabel.jsonl"
TASK = Task("several labels", digit_scenes.CLASS_NAMES[1:])
ARMS = {
    "ce": "cross-entropy",
    "ce+sigmoid": "cross-entropy + Lovász sigmoid",
    "ce+hinge": "cross-entropy + Lovász hinge",
    "sigmoid": "Lovász sigmoid",
    "hinge": "Lovász hinge",
}
BUDGETS, SEEDS, SEARCH_SEED, SEARCH_BUDGET = (300, 900), (0, 1, 2), 1000, 600
RATES = (1e-3, 3e-3, 1e-2)
SIZE, SCENES, BATCH_SIZE = 48, {"train": 2400, "validation": 300, "test": 600}, 8


def overlapping_scenes(seed: int, scenes: dict[str, int] = SCENES, size: int = SIZE) -> dict[str, Split]:
    """Compose images (N, 1, size, size) in [0, 1] and masks (N, 10, size, size) of 0 and 1. Splits share no scans."""
    splits = {}
    for index, (name, scans) in enumerate(digit_scenes.split_scans(seed).items()):
        layers = [digit_scenes.compose_scenes(scans, scenes[name], size, (seed, index, layer)) for layer in (0, 1)]
        images = torch.minimum(*(images for images, _ in layers))
        masks = [F.one_hot(labels, digit_scenes.NUM_CLASSES).movedim(-1, 1)[:, 1:] for _, labels in layers]
        splits[name] = Split(images, torch.maximum(*masks).float())
    return splits


def class_by_class(loss, logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Apply a binary loss to each class over the whole batch, and return the mean over the classes."""
    return loss(logits.transpose(0, 1).flatten(2)[:, None], masks.transpose(0, 1).flatten(2))


LOSSES = {
    "ce": F.binary_cross_entropy_with_logits,
    "sigmoid": lambda logits, masks: class_by_class(lovasz_sigmoid_loss, logits, masks),
    "hinge": lambda logits, masks: class_by_class(lovasz_hinge_loss, logits, masks),
}


def train_and_measure(run: dict) -> dict:
    """Train one run and return its record: mean IoU at logit 0 and at the thresholds that are best on validation."""
    data = scenes_of(run["seed"])
    torch.manual_seed(run["seed"])
    model = build_network(TASK, channels=1)
    losses = [LOSSES[part] for part in run["arm"].split("+")]

    def loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        return sum(each(logits, masks) for each in losses) / len(losses)

    settings = {"steps": run["budget"], "lr": run["rate"], "batch_size": BATCH_SIZE, "seed": run["seed"]}
    stage = Stage(model, data["train"], loss, **settings)
    while stage.done < stage.steps:
        stage.step()
    return run | measure(model, data) | circumstances()


@lru_cache(maxsize=1)
def scenes_of(seed: int) -> dict[str, Split]:
    return overlapping_scenes(seed)


def measure(model: nn.Module, data: dict[str, Split]) -> dict[str, float]:
    """Measure the IoU of each split, averaged over the classes."""
    logits = {name: predict(model, data[name].images) for name in ("validation", "test")}
    found: dict[str, list[float]] = {"validation": [], "test at half": [], "test at best": []}
    for c in range(len(TASK.class_names)):
        of_class = {name: (x[:, c, None], data[name].labels[:, c].long()) for name, x in logits.items()}
        threshold, best = best_iou_threshold(*of_class["validation"])
        at_half, at_best = iou_at_thresholds(*of_class["test"], torch.stack([torch.zeros_like(threshold), threshold]))
        for name, iou in zip(found, (best, at_half, at_best), strict=True):
            found[name].append(iou.item())
    return {name: statistics.mean(values) for name, values in found.items()}


def read() -> list[dict]:
    """Read the finished runs."""
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()] if RESULTS.exists() else []


def train_all(runs: list[dict], title: str) -> None:
    """Train the missing runs in two worker processes, and write each record as soon as its run has finished."""
    keys = ("arm", "seed", "budget", "rate")
    finished = {tuple(record[key] for key in keys) for record in read()}
    missing = [run for run in runs if tuple(run[key] for key in keys) not in finished]
    with get_context("spawn").Pool(2, prepare_worker, [False]) as pool, RESULTS.open("a", encoding="utf-8") as file:
        for record in track(pool.imap_unordered(train_and_measure, missing), title, total=len(missing)):
            file.write(json.dumps(record) + "\n")
            file.flush()


def best_rates() -> dict[str, float]:
    """The learning rate of each arm with the highest validation IoU on SEARCH_SEED."""
    search = [record for record in read() if record["seed"] == SEARCH_SEED]
    return {arm: max((r["validation"], r["rate"]) for r in search if r["arm"] == arm)[1] for arm in ARMS}


def table() -> str:
    """The table for the documentation in reStructuredText: mean test IoU over the seeds, and its standard deviation."""
    records = [record for record in read() if record["seed"] in SEEDS]
    lines = [
        ".. list-table:: Mean test IoU of ten overlapping classes, %: at logit 0 / at the best threshold of each class",
        "   :header-rows: 1",
        "",
        "   * - loss",
        *(f"     - {budget:,} steps" for budget in BUDGETS),
    ]
    for arm, title in ARMS.items():
        lines.append(f"   * - {title}")
        for budget in BUDGETS:
            runs = [record for record in records if record["arm"] == arm and record["budget"] == budget]
            means = (100 * statistics.mean(r[key] for r in runs) for key in ("test at half", "test at best"))
            spread = 100 * statistics.stdev(r["test at best"] for r in runs)
            lines.append("     - {:.1f} / {:.1f} ± {:.1f}".format(*means, spread))
    return "\n".join([*lines, ""])


def main() -> None:
    """Search for the learning rates, train the comparison and print the table."""
    train_all(
        [
            {"arm": arm, "seed": SEARCH_SEED, "budget": SEARCH_BUDGET, "rate": rate}
            for arm, rate in itertools.product(ARMS, RATES)
        ],
        "learning rates",
    )
    rates = best_rates()
    runs = [
        {"arm": arm, "seed": seed, "budget": budget, "rate": rates[arm]}
        for budget, seed, arm in itertools.product(BUDGETS, SEEDS, ARMS)
    ]
    train_all(runs, "comparison")
    print(table())


if __name__ == "__main__":
    main()
