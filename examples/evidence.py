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
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import blue_marble
import digit_scenes
import torch
import torch.nn.functional as F
from data import Split, looped_digits, scene_splits
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from segment import Loss, Stage, Task, build_network, evaluate, predict

from kornia.losses import LovaszHingeLoss, LovaszSoftmaxLoss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
CACHE = ROOT.parent / "build" / "evidence"

TASKS = {
    "all digits": Task("multiclass", digit_scenes.CLASS_NAMES),
    "lakes": Task("multiclass", blue_marble.CLASS_NAMES),
    "looped digits": Task("binary", ("rest", "looped")),
}
# "a+b": the mean of two losses. "a>b": three quarters of the steps with a, the last quarter with b.
SEVERAL = ("ce", "dice", "jaccard", "lovasz", "ce+jaccard", "ce+lovasz", "ce>ce", "ce>lovasz", "ce>ce+lovasz")
ARMS = {
    "all digits": SEVERAL,
    "lakes": SEVERAL,
    "looped digits": ("ce", "dice", "jaccard", "hinge", "softmax", "ce+softmax", "ce>ce", "ce>hinge", "ce>softmax"),
}
BUDGETS = (2700, 900, 300)  # the most important first
SECOND_STAGE = 0.25
SEEDS, SEARCH_SEEDS, SEARCH_BUDGET = (0, 1, 2, 3, 4), (1000, 1001, 1002), 900
SETTINGS = {"size": 64, "scenes": [2400, 300, 600], "batch_size": 8}
# The search begins with these rates of a ladder and goes on until the best one has both its neighbours tried.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES = {"one stage": (1e-3, 3e-3, 1e-2), "second stage": (3e-4, 1e-3, 3e-3)}
QUICK = {
    "budgets": (30, 10),
    "seeds": (0, 1),
    "search": 10,
    "settings": {"size": 64, "scenes": [64, 16, 16], "batch_size": 8},
}


def overlap(logits: torch.Tensor, labels: torch.Tensor, *, jaccard: bool) -> torch.Tensor:
    """1 less the soft Jaccard index or Dice score of the batch, a mean over the classes that occur.

    One output is the logit of the foreground, and the background is no class then.
    """
    if logits.shape[1] == 1:
        probabilities, truth = logits.sigmoid(), (labels == 1).unsqueeze(1)
    else:
        probabilities = logits.softmax(1)
        truth = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device).view(-1, 1, 1)
    truth = truth.to(logits.dtype)
    both, sizes = (probabilities * truth).sum((0, 2, 3)), (probabilities + truth).sum((0, 2, 3))
    present = (truth.sum((0, 2, 3)) > 0).to(logits.dtype)
    score = both / (sizes - both) if jaccard else 2 * both / sizes
    return ((1 - score) * present).sum() / present.sum().clamp(min=1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of one output or several."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def softmax_of_foreground(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Lovász-Softmax of the foreground alone: the errors of the hinge loss have no bound, these have."""
    loss = LovaszSoftmaxLoss(classes=[1], per_image=False, ignore_index=None)
    return loss(torch.cat([torch.zeros_like(logits), logits], 1), labels)


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "dice": partial(overlap, jaccard=False),
    "jaccard": partial(overlap, jaccard=True),
    "lovasz": LovaszSoftmaxLoss(classes="present", per_image=False, ignore_index=None),
    "hinge": LovaszHingeLoss(per_image=False, ignore_index=None),
    "softmax": softmax_of_foreground,
}


def make_loss(name: str) -> Loss:
    """The loss that an arm names: one, or the mean of several."""
    losses = [LOSSES[part] for part in name.split("+")]
    return lambda logits, labels: sum(loss(logits, labels) for loss in losses) / len(losses)


# ---------------------------------------------------------------------------------------------------------------------
# One job: the runs of a task, a seed and a budget that share their first stage
# ---------------------------------------------------------------------------------------------------------------------


def prepare_scenes(seed: int) -> None:
    """Compose the scenes of a seed and keep them: it takes longer than to train on them on a GPU."""
    path = CACHE / f"scenes-{seed}-{'-'.join(map(str, SETTINGS['scenes']))}.pt"
    if not path.exists():
        splits = scene_splits(tuple(SETTINGS["scenes"]), SETTINGS["size"], seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: (s.images, s.labels.byte()) for name, s in splits.items()}, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)


@lru_cache(maxsize=2)
def task_data(task: str, seed: int, device: torch.device) -> dict[str, Split]:
    """The images and labels of a task, on a device."""
    if task == "lakes":
        splits = blue_marble.tiles(seed, SETTINGS["size"])
    else:
        prepare_scenes(seed)
        splits = torch.load(CACHE / f"scenes-{seed}-{'-'.join(map(str, SETTINGS['scenes']))}.pt")
    data = {}
    for (name, (images, labels)), most in zip(splits.items(), SETTINGS["scenes"], strict=True):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:most]
        data[name] = Split(images[chosen].to(device), labels[chosen].to(device).long())
    return {name: looped_digits(split) for name, split in data.items()} if TASKS[task].is_binary else data


def run_job(job: dict, device: torch.device) -> list[dict]:
    """Train the runs of a job; a record of each."""
    task, data = TASKS[job["task"]], task_data(job["task"], job["seed"], device)
    torch.manual_seed(job["seed"])
    initial = build_network(task, channels=data["train"].images.shape[1]).to(device)
    second_steps = round(SECOND_STAGE * job["budget"])
    first_stage: torch.nn.Module | None = None
    records = []
    for arm, rates in job["runs"]:
        start = time.perf_counter()
        first, _, second = arm.partition(">")
        if second:
            if first_stage is None:
                first_stage = copy.deepcopy(initial)
                train(first_stage, data["train"], first, job["budget"] - second_steps, rates[0], job["seed"])
            model = copy.deepcopy(first_stage)
            train(model, data["train"], second, second_steps, rates[1], job["seed"] + 10**6)
        else:
            model = copy.deepcopy(initial)
            train(model, data["train"], first, job["budget"], rates[0], job["seed"])
        record = {key: job[key] for key in ("task", "seed", "budget")} | {"arm": arm, "rates": rates}
        record |= measure(model, task, data) | {"seconds": round(time.perf_counter() - start, 1)}
        records.append(record | {"settings": SETTINGS, **circumstances(device)})
    return records


def train(model: torch.nn.Module, data: Split, loss: str, steps: int, rate: float, seed: int) -> None:
    """One stage. Nothing in it waits for the device."""
    stage = Stage(model, data, make_loss(loss), steps=steps, lr=rate, batch_size=SETTINGS["batch_size"], seed=seed)
    while stage.done < stage.steps:
        stage.step()


def measure(model: torch.nn.Module, task: Task, data: dict[str, Split]) -> dict:
    """IoU on validation and test images: at probability 0.5 and, if binary, at the best threshold of validation."""
    if not task.is_binary:
        of_split = {name: evaluate(model, data[name], task) for name in ("validation", "test")}
        means = {f"{name} at half": evaluation.score for name, evaluation in of_split.items()}
        return means | {f"{name} per class": evaluation.iou.tolist() for name, evaluation in of_split.items()}
    validation, test = data["validation"], data["test"]
    logits = predict(model, validation.images)
    threshold, best = best_iou_threshold(logits, validation.labels.cpu())
    thresholds = torch.stack([torch.zeros_like(threshold), threshold])
    on_test = iou_at_thresholds(predict(model, test.images), test.labels.cpu(), thresholds).tolist()
    return {
        "threshold": threshold.item(),
        "validation at half": iou_at_thresholds(logits, validation.labels.cpu(), thresholds[:1]).item(),
        "validation at best": best.item(),
        "test at half": on_test[0],
        "test at best": on_test[1],
    }


@lru_cache(maxsize=1)
def circumstances(device: torch.device) -> dict:
    """When, where and with what."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "monai", "kornia", "scikit-learn")}
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        machine = names[0] if names else platform.machine()
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "machine": machine,
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
        for task, arms in ARMS.items():
            runs = [
                (arm, [*([best_rate(scores[task, "ce"])] if ">" in arm else []), rate])
                for arm in arms
                if (">" in arm) == (kind == "second stage")
                for rate in next_rates(scores.get((task, arm), {}), first)
            ]
            for seed in SEARCH_SEEDS:
                missing = [run for run in runs if (task, run[0], run[1][-1], seed) not in finished]
                jobs += in_jobs(task, seed, SEARCH_BUDGET, missing)
        if jobs:
            return jobs
    return []


def comparison_jobs(done: list[dict], search: list[dict]) -> list[dict]:
    """The runs that the comparison lacks."""
    scores = scores_by_rate(search)
    finished = {(r["task"], r["arm"], r["budget"], r["seed"]) for r in done}
    jobs = []
    for budget, seed, task in itertools.product(BUDGETS, SEEDS, TASKS):
        runs = []
        for arm in ARMS[task]:
            rates = [best_rate(scores[task, name]) for name in (["ce", arm] if ">" in arm else [arm])]
            if (task, arm, budget, seed) not in finished:
                runs.append((arm, rates))
        jobs += in_jobs(task, seed, budget, runs)
    return jobs


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
        shorten()


def shorten() -> None:
    """The shape of it in some minutes; what comes out means nothing."""
    global BUDGETS, SEEDS, SEARCH_BUDGET, SETTINGS
    BUDGETS, SEEDS, SEARCH_BUDGET, SETTINGS = QUICK["budgets"], QUICK["seeds"], QUICK["search"], QUICK["settings"]


def main() -> None:
    """Search the learning rates, then train what the comparison lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cpu"), help="where to train (default: cpu)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each run, to see the shape of it")
    parser.add_argument("--out", type=Path, help="folder of the results (default: examples/results)")
    args = parser.parse_args()
    if args.quick:
        shorten()
    out = args.out or (CACHE / "quick" if args.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    search, runs = out / "search.jsonl", out / "runs.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        get_context("spawn").Pool(args.processes, prepare_worker, (args.quick,)) as pool,
        Progress(*columns, console=Console()) as progress,
    ):
        for _ in progress.track(
            pool.imap_unordered(prepare_scenes, (*SEARCH_SEEDS, *SEEDS)),
            len(SEARCH_SEEDS) + len(SEEDS),
            description="scenes",
        ):
            pass

        def work(jobs: list[dict], path: Path, title: str) -> None:
            bar = progress.add_task(title, total=sum(len(job["runs"]) for job in jobs))
            with path.open("a", encoding="utf-8") as file:
                for records in pool.imap_unordered(partial(run_job, device=args.device), jobs):
                    file.writelines(json.dumps(record) + "\n" for record in records)
                    file.flush()
                    progress.advance(bar, len(records))

        while jobs := search_jobs(read(search)):
            work(jobs, search, "learning rates")
        work(comparison_jobs(read(runs), read(search)), runs, "comparison")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here") from None
