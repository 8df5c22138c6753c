"""Compare losses by training the same network with each of them, on several seeds and for several numbers of steps.

Run it with ``make evidence``. An arm is one way of training: a loss, a mean of two losses, or two losses one after the
other. All arms of a seed get the same images, initial weights, batches and number of steps. First, the learning rate of
each arm is chosen on the validation images of seeds that the comparison does not use. Each arm is then trained for
several numbers of steps, because the loss that learns fastest is not always the best in the end.

Each finished run is written as a line of JSON to examples/results. If the program is interrupted, the next call trains
only the runs that are missing.
"""

import argparse
import copy
import datetime as dt
import importlib.metadata
import itertools
import json
import math
import platform
import signal
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import blue_marble
import digit_scenes
import torch
import torch.nn.functional as F
from data import Split, scene_splits
from folder_data import IGNORE
from monai.networks.nets import BasicUNet
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from segment import Loss, Stage, Task, binary_cross_entropy, evaluate, predict
from torch import nn

from kornia.losses import LovaszHingeLoss, lovasz_sigmoid_loss, lovasz_softmax_loss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
CACHE = ROOT.parent / "build" / "evidence"

TASKS = {
    "digits": Task("multiclass", digit_scenes.CLASS_NAMES),
    "lakes": Task("binary", blue_marble.CLASS_NAMES),
}
# "a+b" is the mean of two losses. "a>b" trains three quarters of the steps with a and the last quarter with b.
ONE_STAGE = ("ce", "dice", "jaccard", "lovasz", "ce+jaccard", "ce+lovasz")
ARMS = {
    "digits": (*ONE_STAGE, "ce>ce", "ce>lovasz", "ce>ce+lovasz"),
    "lakes": (*ONE_STAGE, "hinge", "ce>ce", "ce>lovasz", "ce>hinge"),
}
SEEDS, BUDGETS = (0, 1, 2, 3, 4), (300, 900, 2700, 8100)
# A budget is a number of training steps. The largest one takes as long as all others together, so it is only for
# cross-entropy and the two mixtures that were ahead of it on a task after 2,700 steps.
LIMITED_ARMS = {8100: ("ce", "ce+jaccard", "ce+lovasz")}
# The binned loss is compared at one budget, with the learning rate that was found for the exact loss.
EXTRA_ARMS, SHARED_RATES = {900: ("ce+binned",)}, {"ce+binned": "ce+lovasz"}
# These arms are trained again, to compare the weights that are best on validation images with the last weights.
BEST_WEIGHTS_ARMS, BEST_WEIGHTS_BUDGETS, VALIDATE_EVERY = ("ce", "ce+jaccard", "ce+lovasz"), (900, 2700), 100
SEARCH_SEEDS, SEARCH_BUDGET = (1000, 1001, 1002), 600
SECOND_STAGE = 0.25  # share of the steps in the second stage
SETTINGS = {"size": 48, "scenes": [2400, 300, 600], "batch_size": 8}
# The search starts with FIRST_RATES and continues until both neighbours of the best rate in RATES have been tried.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = {"one stage": (1e-3, 3e-3, 1e-2), "second stage": (3e-4, 1e-3, 3e-3)}
QUICK = {
    "BUDGETS": (10, 30),
    "SEEDS": (0, 1),
    "SEARCH_BUDGET": 10,
    "BEST_WEIGHTS_BUDGETS": (10,),
    "VALIDATE_EVERY": 5,
    "SETTINGS": {"size": 48, "scenes": [64, 16, 16], "batch_size": 8},
}


def arms_at(task: str, budget: int) -> tuple[str, ...]:
    """The arms that are trained on a task for this number of steps."""
    return *LIMITED_ARMS.get(budget, ARMS[task]), *EXTRA_ARMS.get(budget, ())


# ---------------------------------------------------------------------------------------------------------------------
# The network and the losses
# ---------------------------------------------------------------------------------------------------------------------


def build_network(task: Task, channels: int) -> nn.Module:
    """A U-Net with 0.9 million weights. It works at half resolution, which takes a third of the time."""
    unet = BasicUNet(
        spatial_dims=2,
        in_channels=4 * channels,
        out_channels=1 if task.is_binary else len(task.class_names),
        features=(32, 48, 64, 96, 96, 32),
        act="relu",
        norm="batch",
    )
    network = nn.Sequential(nn.PixelUnshuffle(2), unet, nn.Upsample(scale_factor=2, mode="bilinear"))
    return network.to(memory_format=torch.channels_last)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for one output or several, averaged over the pixels that are not ignored."""
    if logits.shape[1] == 1:
        return binary_cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def overlap(logits: torch.Tensor, labels: torch.Tensor, *, jaccard: bool) -> torch.Tensor:
    """Soft Jaccard loss or Dice loss of the batch: 1 minus the score, averaged over the classes that occur.

    With one output, which is the logit of the foreground, only the foreground is scored.
    """
    valid = (labels != IGNORE).unsqueeze(1)
    if logits.shape[1] > 1:
        probabilities, classes = logits.softmax(1), torch.arange(logits.shape[1])
    else:
        probabilities, classes = logits.sigmoid(), torch.tensor([1])
    truth = (labels.unsqueeze(1) == classes.view(-1, 1, 1)).to(logits.dtype)
    both, sizes = (
        (probabilities * truth * valid).sum((0, 2, 3)),
        ((probabilities + truth) * valid).sum((0, 2, 3)),
    )
    present = (truth.sum((0, 2, 3)) > 0).to(logits.dtype)
    score = both / (sizes - both) if jaccard else 2 * both / sizes
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


def lovasz(logits: torch.Tensor, labels: torch.Tensor, num_bins: int | None = None) -> torch.Tensor:
    """Lovász-Softmax loss of the batch, or the Lovász sigmoid loss of the foreground if there is one output."""
    options = {"per_image": False, "ignore_index": IGNORE, "num_bins": num_bins}
    if logits.shape[1] > 1:
        return lovasz_softmax_loss(logits, labels, classes="present", **options)
    return lovasz_sigmoid_loss(logits, labels, **options)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dice": partial(overlap, jaccard=False),
    "jaccard": partial(overlap, jaccard=True),
    "lovasz": lovasz,
    "binned": partial(lovasz, num_bins=1024),
    "hinge": LovaszHingeLoss(per_image=False, ignore_index=IGNORE),
}


def make_loss(name: str) -> Loss:
    """The loss with a name such as "ce" or "ce+lovasz", which is the mean of the two."""
    losses = [LOSSES[part] for part in name.split("+")]
    return lambda logits, labels: sum(loss(logits, labels) for loss in losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# Running a job: one run, or several two-stage runs with the same task, seed and budget, which share their first stage
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def task_data(task: str, seed: int) -> dict[str, Split]:
    """The images and labels of a task, limited to the numbers of images in SETTINGS."""
    if task == "digits":
        return scene_splits(tuple(SETTINGS["scenes"]), SETTINGS["size"], seed)
    chosen = {}
    for (name, split), limit in zip(blue_marble.tiles(seed, SETTINGS["size"]).items(), SETTINGS["scenes"], strict=True):
        part = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(seed))[:limit]
        chosen[name] = Split(*(tensor[part] for tensor in split))
    return chosen


def run_job(job: dict) -> list[dict]:
    """Train the runs of a job and return a record of each."""
    task, data = TASKS[job["task"]], task_data(job["task"], job["seed"])
    torch.manual_seed(job["seed"])
    initial = build_network(task, channels=data["train"].images.shape[1])
    second_steps = round(SECOND_STAGE * job["budget"])
    after_first: dict[str, nn.Module] = {}
    records = []
    for arm, rates in job["runs"]:
        start = time.perf_counter()
        first, _, second = arm.partition(">")
        if second:
            if first not in after_first:
                after_first[first] = copy.deepcopy(initial)
                train(after_first[first], data["train"], first, job["budget"] - second_steps, rates[0], job["seed"])
            model = copy.deepcopy(after_first[first])
            train(model, data["train"], second, second_steps, rates[1], job["seed"] + 10**6)
        else:
            model = copy.deepcopy(initial)
            train(model, data["train"], first, job["budget"], rates[0], job["seed"])
        record = {key: job[key] for key in ("task", "seed", "budget")} | {"arm": arm, "rates": rates}
        record |= measure(model, task, data) | {"seconds": round(time.perf_counter() - start, 1)}
        records.append(record | {"settings": SETTINGS, **circumstances()})
    return records


def train(model: nn.Module, data: Split, loss: str, steps: int, rate: float, seed: int) -> None:
    """Train one stage."""
    stage = Stage(model, data, make_loss(loss), steps=steps, lr=rate, batch_size=SETTINGS["batch_size"], seed=seed)
    while stage.done < stage.steps:
        stage.step()


def run_best_weights_job(job: dict) -> list[dict]:
    """Train the runs of a job and measure both the last weights and those that were best on validation images."""
    task, data = TASKS[job["task"]], task_data(job["task"], job["seed"])
    torch.manual_seed(job["seed"])
    initial = build_network(task, channels=data["train"].images.shape[1])
    records = []
    for arm, rates in job["runs"]:
        model = copy.deepcopy(initial)
        options = {"steps": job["budget"], "lr": rates[0], "batch_size": SETTINGS["batch_size"], "seed": job["seed"]}
        stage = Stage(model, data["train"], make_loss(arm), **options)
        best = {"score": -1.0}
        while stage.done < stage.steps:
            stage.step()
            if stage.done % VALIDATE_EVERY == 0:
                score = evaluate(model, data["validation"], task).score
                if score > best["score"]:
                    best = {"score": score, "step": stage.done, "weights": copy.deepcopy(model.state_dict())}
        record = {key: job[key] for key in ("task", "seed", "budget")} | {"arm": arm, "rates": rates}
        record["last"] = measure(model, task, data)
        model.load_state_dict(best["weights"])
        record |= {"kept": measure(model, task, data), "kept after": best["step"]}
        records.append(record | {"settings": SETTINGS, **circumstances()})
    return records


def measure(model: nn.Module, task: Task, data: dict[str, Split]) -> dict:
    """Measure the IoU on validation and test images.

    A binary task is measured at probability 0.5 and at the threshold that is best on the validation images.
    """
    if not task.is_binary:
        of_split = {name: evaluate(model, data[name], task) for name in ("validation", "test")}
        means = {f"{name} at half": evaluation.score for name, evaluation in of_split.items()}
        return means | {f"{name} per class": evaluation.iou.tolist() for name, evaluation in of_split.items()}
    logits, labels = predict(model, data["validation"].images), data["validation"].labels
    threshold, best = best_iou_threshold(logits, labels, ignore_index=IGNORE)
    thresholds = torch.stack([torch.zeros_like(threshold), threshold])
    at_half = iou_at_thresholds(logits, labels, thresholds[:1], ignore_index=IGNORE)
    test = data["test"]
    on_test = iou_at_thresholds(predict(model, test.images), test.labels, thresholds, ignore_index=IGNORE)
    return {
        "threshold": threshold.item(),
        "validation at half": at_half.item(),
        "validation at best": best.item(),
        "test at half": on_test[0].item(),
        "test at best": on_test[1].item(),
    }


@lru_cache(maxsize=1)
def circumstances() -> dict:
    """The date, the machine and the package versions, for the records."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "monai", "kornia", "scikit-learn")}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "machine": names[0] if names else platform.machine(),
        "versions": {"python": platform.python_version(), **versions},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Which jobs are still to be done
# ---------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    """Read the finished runs from a file, and check that they have the current settings."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for record in records:
        if record["settings"] != SETTINGS:
            raise SystemExit(
                f"{path} has runs with other settings: {record['settings']}. Move the file away and run again."
            )
    return records


def scores_by_rate(search: list[dict]) -> dict[tuple[str, str], dict[float, float]]:
    """Mean validation IoU over the seeds, by task and arm, for each rate of the last stage that all seeds tried."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for record in search:
        iou = record.get("validation at best", record["validation at half"])
        of_arm = found.setdefault((record["task"], record["arm"]), {})
        of_arm.setdefault(record["rates"][-1], []).append(0.0 if math.isnan(iou) else iou)
    return {
        key: {rate: statistics.mean(of_rate) for rate, of_rate in of_arm.items() if len(of_rate) == len(SEARCH_SEEDS)}
        for key, of_arm in found.items()
    }


def best_rate(scores: dict[float, float]) -> float:
    """The rate with the largest validation IoU."""
    return max(scores, key=scores.__getitem__)


def next_rates(tried: dict[float, float], first: tuple[float, ...]) -> list[float]:
    """The rates to try next. The list is empty once both neighbours of the best rate have been tried."""
    if missing := [rate for rate in first if rate not in tried]:
        return missing
    place = RATES.index(best_rate(tried))
    return [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in tried]


def search_jobs(search: list[dict]) -> list[dict]:
    """The next jobs of the search for learning rates: first the single-stage arms, then the second stages."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["rates"][-1], r["seed"]) for r in search}
    for kind, first in FIRST_RATES.items():
        jobs = []
        for seed, (task, arms) in itertools.product(SEARCH_SEEDS, ARMS.items()):
            runs = [
                (arm, [*([best_rate(scores[task, "ce"])] if ">" in arm else []), rate])
                for arm in arms
                if (">" in arm) == (kind == "second stage")
                for rate in next_rates(scores.get((task, arm), {}), first)
                if (task, arm, rate, seed) not in finished
            ]
            jobs += group_runs(task, seed, SEARCH_BUDGET, runs)
        if jobs:
            return jobs
    return []


def comparison_jobs(done: list[dict], search: list[dict]) -> list[dict]:
    """The jobs that are missing from the comparison, the shortest first."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["budget"], r["seed"]) for r in done}
    jobs = []
    for budget, seed, task in itertools.product(BUDGETS, SEEDS, TASKS):
        runs = []
        for arm in arms_at(task, budget):
            rate_arms = ["ce", arm] if ">" in arm else [SHARED_RATES.get(arm, arm)]
            rates = [best_rate(scores[task, name]) for name in rate_arms]
            if (task, arm, budget, seed) not in finished:
                runs.append((arm, rates))
        jobs += group_runs(task, seed, budget, runs)
    return jobs


def best_weights_jobs(done: list[dict], search: list[dict]) -> list[dict]:
    """The jobs that are missing from the comparison of best weights with last weights."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["budget"], r["seed"]) for r in done}
    every = itertools.product(BEST_WEIGHTS_BUDGETS, SEEDS, TASKS, BEST_WEIGHTS_ARMS)
    return [
        {"task": task, "seed": seed, "budget": budget, "runs": [(arm, [best_rate(scores[task, arm])])]}
        for budget, seed, task, arm in every
        if (task, arm, budget, seed) not in finished
    ]


def group_runs(task: str, seed: int, budget: int, runs: list) -> list[dict]:
    """Group runs into jobs: the two-stage runs share a job, which comes first as the longest. Others get one each."""
    together = [run for run in runs if ">" in run[0]]
    groups = ([together] if together else []) + [[run] for run in runs if ">" not in run[0]]
    return [{"task": task, "seed": seed, "budget": budget, "runs": group} for group in groups]


# ---------------------------------------------------------------------------------------------------------------------


def prepare_worker(quick: bool) -> None:
    """Set up a worker process: it uses one thread, and leaves Ctrl-C to the parent process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if quick:
        globals().update(QUICK)


def main() -> None:
    """Search for the learning rates, then train the runs that are missing from the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--processes", type=int, default=2, help="worker processes, each with one thread (default: 2)")
    parser.add_argument("--quick", action="store_true", help="train only a few steps per run, to try out the program")
    parser.add_argument("--out", type=Path, help="folder for the results (default: examples/results)")
    args = parser.parse_args()
    if args.quick:
        globals().update(QUICK)
    out = args.out or (CACHE / "quick" if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    search, runs, kept = out / "search.jsonl", out / "runs.jsonl", out / "kept.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        get_context("spawn").Pool(args.processes, prepare_worker, (args.quick,)) as pool,
        Progress(*columns, console=Console()) as progress,
    ):

        def run_all(jobs: list[dict], path: Path, title: str, run: Callable[[dict], list[dict]] = run_job) -> None:
            bar = progress.add_task(title, total=sum(len(job["runs"]) for job in jobs))
            with path.open("a", encoding="utf-8") as file:
                for records in pool.imap_unordered(run, jobs):
                    file.writelines(json.dumps(record) + "\n" for record in records)
                    file.flush()
                    progress.advance(bar, len(records))

        while jobs := search_jobs(read(search)):
            run_all(jobs, search, "learning rates")
        run_all(comparison_jobs(read(runs), read(search)), runs, "comparison")
        run_all(best_weights_jobs(read(kept), read(search)), kept, "best weights", run_best_weights_job)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; run the same command again to continue") from None
