"""Does a Lovász loss pay? The same network trained with one loss after another, seed by seed: ``make evidence``.

Every arm gets the same images, network, first weights, batches and number of steps. Learning rates are chosen first,
loss by loss, on the validation images of seeds that the comparison leaves out. The number of steps is itself varied, as
what a loss learns in few steps is not what it ends with. Each finished run is a line in examples/results, so the
command can be interrupted and goes on with what is missing.
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
# "a+b": the mean of two losses. "a>b": three quarters of the steps with a, the last quarter with b.
ONE_STAGE = ("ce", "dice", "jaccard", "lovasz", "ce+jaccard", "ce+lovasz")
ARMS = {
    "digits": (*ONE_STAGE, "ce>ce", "ce>lovasz", "ce>ce+lovasz"),
    "lakes": (*ONE_STAGE, "hinge", "ce>ce", "ce>lovasz", "ce>hinge"),
}
SEEDS, BUDGETS = (0, 1, 2, 3, 4), (300, 900, 2700, 8100)
# The longest training takes as long as all the others together, and is for what it can still tell something about:
# cross-entropy, and the arms that were ahead of it on a task after 2,700 steps.
ARMS_OF_LONGEST = {8100: ("ce", "ce+jaccard", "ce+lovasz")}
# Does counting train as well as sorting? After one length, at the learning rate of the exact loss.
ARMS_OF_BINS, RATE_OF = {900: ("ce+binned",)}, {"ce+binned": "ce+lovasz"}
# What comes of keeping the weights that are best on validation images, which are looked at every so many steps?
ARMS_OF_KEPT, BUDGETS_OF_KEPT, VALIDATE_EVERY = ("ce", "ce+jaccard", "ce+lovasz"), (900, 2700), 100
SEARCH_SEEDS, SEARCH_BUDGET = (1000, 1001, 1002), 600
SECOND_STAGE = 0.25
SETTINGS = {"size": 48, "scenes": [2400, 300, 600], "batch_size": 8}
# The search begins with these rates of a ladder and goes on until the best one has both its neighbours tried.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = {"one stage": (1e-3, 3e-3, 1e-2), "second stage": (3e-4, 1e-3, 3e-3)}
QUICK = {
    "BUDGETS": (10, 30),
    "SEEDS": (0, 1),
    "SEARCH_BUDGET": 10,
    "BUDGETS_OF_KEPT": (10,),
    "VALIDATE_EVERY": 5,
    "SETTINGS": {"size": 48, "scenes": [64, 16, 16], "batch_size": 8},
}


def arms_at(task: str, budget: int) -> tuple[str, ...]:
    """The arms that are trained for so many steps."""
    return *ARMS_OF_LONGEST.get(budget, ARMS[task]), *ARMS_OF_BINS.get(budget, ())


# ---------------------------------------------------------------------------------------------------------------------
# The network and the losses
# ---------------------------------------------------------------------------------------------------------------------


def build_network(task: Task, channels: int) -> nn.Module:
    """A U-Net of 0.9 million weights that works on pixels of two by two, which takes a third of the time."""
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
    """Of one output or several; the mean of the pixels that have a label."""
    if logits.shape[1] == 1:
        return binary_cross_entropy(logits, labels)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE)


def overlap(logits: torch.Tensor, labels: torch.Tensor, *, jaccard: bool) -> torch.Tensor:
    """1 less the soft Jaccard index or Dice score of the batch, a mean over the classes that occur.

    One output is the logit of the foreground, and the background is no class then.
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
    """Lovász-Softmax of the batch; of one output, the sigmoid loss, which is that of the foreground alone."""
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
    """The loss that an arm names: one, or the mean of several."""
    losses = [LOSSES[part] for part in name.split("+")]
    return lambda logits, labels: sum(loss(logits, labels) for loss in losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# One job: the runs of a task, a seed and a budget that share their first stage
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def task_data(task: str, seed: int) -> dict[str, Split]:
    """The images and labels of a task, no more of each than the settings say."""
    if task == "digits":
        return scene_splits(tuple(SETTINGS["scenes"]), SETTINGS["size"], seed)
    chosen = {}
    for (name, split), most in zip(blue_marble.tiles(seed, SETTINGS["size"]).items(), SETTINGS["scenes"], strict=True):
        part = torch.randperm(len(split[0]), generator=torch.Generator().manual_seed(seed))[:most]
        chosen[name] = Split(*(tensor[part] for tensor in split))
    return chosen


def run_job(job: dict) -> list[dict]:
    """Train the runs of a job; a record of each."""
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
    """One stage; its learning rate rises from near 0."""
    stage = Stage(model, data, make_loss(loss), steps=steps, lr=rate, batch_size=SETTINGS["batch_size"], seed=seed)
    while stage.done < stage.steps:
        stage.step()


def run_kept(job: dict) -> list[dict]:
    """Train the runs of a job again, and keep the weights that are best on validation images; a record of each."""
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
    """IoU on validation and test images: at probability 0.5 and, if binary, at the best threshold of validation."""
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
    """When, where and with what."""
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
# What is to be trained
# ---------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict]:
    """The finished runs in a file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for record in records:
        if record["settings"] != SETTINGS:
            raise SystemExit(
                f"{path} holds runs with other settings: {record['settings']}. Move it away and run again."
            )
    return records


def scores_by_rate(search: list[dict]) -> dict[tuple[str, str], dict[float, float]]:
    """For every task and arm, at each rate tried for its last stage, the mean validation IoU of the seeds."""
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
    """The rates to try next; none once the best one has both its neighbours on the ladder tried."""
    if missing := [rate for rate in first if rate not in tried]:
        return missing
    place = RATES.index(best_rate(tried))
    return [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in tried]


def search_jobs(search: list[dict]) -> list[dict]:
    """What the search for learning rates has to train next: first for one stage, then for the second stage."""
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
            jobs += in_jobs(task, seed, SEARCH_BUDGET, runs)
        if jobs:
            return jobs
    return []


def comparison_jobs(done: list[dict], search: list[dict]) -> list[dict]:
    """The runs that the comparison lacks, the shortest first."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["budget"], r["seed"]) for r in done}
    jobs = []
    for budget, seed, task in itertools.product(BUDGETS, SEEDS, TASKS):
        runs = []
        for arm in arms_at(task, budget):
            rates = [best_rate(scores[task, name]) for name in (["ce", arm] if ">" in arm else [RATE_OF.get(arm, arm)])]
            if (task, arm, budget, seed) not in finished:
                runs.append((arm, rates))
        jobs += in_jobs(task, seed, budget, runs)
    return jobs


def kept_jobs(done: list[dict], search: list[dict]) -> list[dict]:
    """The runs that keep their best weights and are still to be made."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["budget"], r["seed"]) for r in done}
    every = itertools.product(BUDGETS_OF_KEPT, SEEDS, TASKS, ARMS_OF_KEPT)
    return [
        {"task": task, "seed": seed, "budget": budget, "runs": [(arm, [best_rate(scores[task, arm])])]}
        for budget, seed, task, arm in every
        if (task, arm, budget, seed) not in finished
    ]


def in_jobs(task: str, seed: int, budget: int, runs: list) -> list[dict]:
    """A job for each run, but one for all runs that share a first stage, which take longest and come first."""
    together = [run for run in runs if ">" in run[0]]
    groups = ([together] if together else []) + [[run] for run in runs if ">" not in run[0]]
    return [{"task": task, "seed": seed, "budget": budget, "runs": group} for group in groups]


# ---------------------------------------------------------------------------------------------------------------------


def prepare_worker(quick: bool) -> None:
    """One thread in each process; the parent alone minds Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if quick:
        globals().update(QUICK)


def main() -> None:
    """Search the learning rates, then train what the comparison lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--quick", action="store_true", help="a few steps of each run, to see the shape of it")
    parser.add_argument("--out", type=Path, help="folder of the results (default: examples/results)")
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

        def work(jobs: list[dict], path: Path, title: str, run: Callable[[dict], list[dict]] = run_job) -> None:
            bar = progress.add_task(title, total=sum(len(job["runs"]) for job in jobs))
            with path.open("a", encoding="utf-8") as file:
                for records in pool.imap_unordered(run, jobs):
                    file.writelines(json.dumps(record) + "\n" for record in records)
                    file.flush()
                    progress.advance(bar, len(records))

        while jobs := search_jobs(read(search)):
            work(jobs, search, "learning rates")
        work(comparison_jobs(read(runs), read(search)), runs, "comparison")
        work(kept_jobs(read(kept), read(search)), kept, "best weights", run_kept)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here") from None
