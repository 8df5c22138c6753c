"""Does the Lovász loss pay? Train the same network with one loss after another, seed by seed: ``make evidence``.

Every arm gets the same scenes, network, first weights, batch size and number of steps. Learning rates are chosen first,
loss by loss, on the validation scenes of a seed that the comparison leaves out. Each finished run is one line in
examples/results, so the command can be interrupted and goes on with what is missing.
"""

import argparse
import datetime as dt
import importlib.metadata
import itertools
import json
import math
import platform
import signal
import time
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import digit_scenes
import torch
from data import Split, looped_digits, scene_splits
from monai.losses import DiceLoss
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from segment import Loss, Stage, Task, build_network, cross_entropy, evaluate, lovasz, mixed, predict

from kornia.metrics import best_iou_threshold, iou_at_thresholds

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
CHECKPOINTS = ROOT.parent / "build" / "evidence"

TASKS = {
    "looped digits": Task("binary", ("rest", "looped")),
    "all digits": Task("multiclass", digit_scenes.CLASS_NAMES),
}
# "a>b": stage 1 with the loss a, stage 2 with b. Otherwise one loss for the whole budget.
ARMS = {
    "looped digits": (
        *("ce", "dice", "lovasz-batch", "ce+lovasz"),
        *("ce>ce", "ce>lovasz-image", "ce>lovasz-batch", "ce>ce+lovasz"),
    ),
    "all digits": (
        *("ce", "dice", "lovasz-present-batch", "ce+lovasz"),
        *("ce>ce", "ce>lovasz-all-image", "ce>lovasz-all-batch", "ce>lovasz-present-image"),
        *("ce>lovasz-present-batch", "ce>ce+lovasz"),
    ),
}
# A second stage with a Lovász loss of any kind takes the rate that is best for this one.
SEARCHED = {"looped digits": "ce>lovasz-batch", "all digits": "ce>lovasz-present-batch"}
SEEDS = range(5)
SWEEP_SEED = 1000
SETTINGS = {"size": 64, "scenes": [2400, 300, 600], "batch_size": 4, "steps": [600, 300]}
# The search begins with two rates of this ladder and goes on until the best one has both its neighbours tried.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = {"one stage": (3e-3, 1e-2), "second stage": (1e-3, 3e-3)}


def make_loss(task: Task, name: str) -> Loss:
    """The loss that an arm names."""
    kind, *options = name.split("-")
    if kind == "ce":
        return cross_entropy(task)
    if kind == "dice":
        # Over the batch, as the Lovász loss beside it.
        dice = DiceLoss(batch=True, sigmoid=task.is_binary, softmax=not task.is_binary, to_onehot_y=not task.is_binary)
        return lambda logits, labels: dice(logits, labels[:, None])
    if kind == "ce+lovasz":
        return mixed(cross_entropy(task), lovasz(task), weight=0.5)
    named = {"classes": options[0]} if len(options) > 1 else {}
    return lovasz(task, per_image=options[-1] == "image", **named)


@lru_cache(maxsize=1)
def scenes(seed: int) -> dict[str, Split]:
    """The scenes of a seed, made once for all its runs."""
    return scene_splits(tuple(SETTINGS["scenes"]), SETTINGS["size"], seed)


def task_data(task_name: str, seed: int) -> dict[str, Split]:
    """The scenes with the labels of the task."""
    if not TASKS[task_name].is_binary:
        return scenes(seed)
    return {name: looped_digits(split) for name, split in scenes(seed).items()}


def measure(model: torch.nn.Module, task: Task, data: dict[str, Split]) -> dict:
    """IoU on validation and test images: at probability 0.5 and, if binary, at the best threshold of validation."""
    if not task.is_binary:
        of_split = {name: evaluate(model, data[name], task) for name in ("validation", "test")}
        means = {f"{name} at half": evaluation.score for name, evaluation in of_split.items()}
        return means | {f"{name} per class": evaluation.iou.tolist() for name, evaluation in of_split.items()}
    validation, test = data["validation"], data["test"]
    logits = predict(model, validation.images)
    threshold, best = best_iou_threshold(logits, validation.labels)
    thresholds = torch.stack([torch.zeros_like(threshold), threshold])
    on_test = iou_at_thresholds(predict(model, test.images), test.labels, thresholds).tolist()
    return {
        "threshold": threshold.item(),
        "validation at half": iou_at_thresholds(logits, validation.labels, thresholds[:1]).item(),
        "validation at best": best.item(),
        "test at half": on_test[0],
        "test at best": on_test[1],
    }


def train(model: torch.nn.Module, data: Split, loss: Loss, *, steps: int, rate: float, seed: int) -> float:
    """One stage; the seconds it took."""
    start = time.perf_counter()
    stage = Stage(model, data, loss, steps=steps, lr=rate, batch_size=SETTINGS["batch_size"], seed=seed)
    while stage.done < stage.steps:
        stage.step()
    return time.perf_counter() - start


def run_job(job: dict, path: Path) -> int:
    """Train the runs of a job, which share a task and a seed, and write a line for each; their number."""
    task, seed = TASKS[job["task"]], job["seed"]
    data = task_data(job["task"], seed)
    for arm, rates in job["runs"]:
        first, _, second = arm.partition(">")
        model = initial_network(task, seed)
        if second:
            seconds = [first_stage(model, job["task"], seed, rates[0], data["train"])]
            loss = make_loss(task, second)
            steps = SETTINGS["steps"][1]
            seconds.append(train(model, data["train"], loss, steps=steps, rate=rates[1], seed=seed + 1_000_000))
        else:
            steps = sum(SETTINGS["steps"])
            seconds = [train(model, data["train"], make_loss(task, first), steps=steps, rate=rates[0], seed=seed)]
        record = {"task": job["task"], "arm": arm, "seed": seed, "rates": rates, **measure(model, task, data)}
        record |= {"seconds": [round(s, 1) for s in seconds], "settings": SETTINGS, **circumstances()}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return len(job["runs"])


def initial_network(task: Task, seed: int) -> torch.nn.Module:
    """The network with the first weights of a seed."""
    torch.manual_seed(seed)
    return build_network(task, channels=1)


def first_stage(model: torch.nn.Module, task_name: str, seed: int, rate: float, data: Split) -> float:
    """Stage 1, the same for every arm that begins with cross-entropy: trained once and kept."""
    kept = CHECKPOINTS / f"{task_name.replace(' ', '-')}-{seed}-{rate:g}.pt"
    if not kept.exists():
        loss = cross_entropy(TASKS[task_name])
        seconds = train(model, data, loss, steps=SETTINGS["steps"][0], rate=rate, seed=seed)
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": model.state_dict(), "seconds": seconds, "settings": SETTINGS}, kept.with_suffix(".part"))
        kept.with_suffix(".part").replace(kept)
    state = torch.load(kept)
    if state["settings"] != SETTINGS:
        raise SystemExit(f"{kept} was trained with other settings: {state['settings']}. Remove it and run again.")
    model.load_state_dict(state["model"])
    return state["seconds"]


@lru_cache(maxsize=1)
def circumstances() -> dict:
    """When, where and with what."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "monai", "kornia", "scikit-learn")}
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    machine = names[0].partition(":")[2].strip() if names else platform.machine()
    return {
        "date": f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
        "machine": machine,
        "versions": {"python": platform.python_version(), **versions},
    }


def read(path: Path) -> list[dict]:
    """The finished runs in a file."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    for record in records:
        if record["settings"] != SETTINGS:
            raise SystemExit(
                f"{path} holds runs with other settings: {record['settings']}. Move it away and run again."
            )
    return records


def tried_rates(sweep: list[dict]) -> dict[tuple[str, str], dict[float, float]]:
    """For every task and arm, the validation IoU at each rate tried for its only or second stage."""
    tried: dict[tuple[str, str], dict[float, float]] = {}
    for record in sweep:
        iou = record.get("validation at best", record["validation at half"])
        tried.setdefault((record["task"], record["arm"]), {})[record["rates"][-1]] = -1.0 if math.isnan(iou) else iou
    return tried


def next_rates(tried: dict[float, float], first: tuple[float, ...]) -> list[float]:
    """The rates to try next; none once the best one has both its neighbours on the ladder tried."""
    if missing := [rate for rate in first if rate not in tried]:
        return missing
    place = RATES.index(max(tried, key=tried.__getitem__))
    return [rate for rate in RATES[max(0, place - 1) : place + 2] if rate not in tried]


def sweep_jobs(sweep: list[dict]) -> list[dict]:
    """What the search for learning rates has to train next: first for one stage, then for the second stage."""
    tried = tried_rates(sweep)
    for two_stages in (False, True):
        jobs = []
        for task, arms in ARMS.items():
            runs = []
            for arm in (arm for arm in arms if (">" in arm) == two_stages and rate_from(task, arm) == arm):
                first = FIRST_RATES["second stage" if two_stages else "one stage"]
                before = [best_rate(tried[task, "ce"])] if two_stages else []
                runs += [(arm, [*before, rate]) for rate in next_rates(tried.get((task, arm), {}), first)]
            jobs += in_jobs(task, SWEEP_SEED, runs)
        if jobs:
            return jobs
    return []


def rate_from(task: str, arm: str) -> str:
    """The arm whose search gives the rate of the last stage of an arm."""
    return SEARCHED[task] if ">" in arm and "lovasz" in arm else arm


def best_rate(tried: dict[float, float]) -> float:
    """The rate with the largest validation IoU."""
    return max(tried, key=tried.__getitem__)


def comparison_jobs(done: list[dict], sweep: list[dict]) -> list[dict]:
    """The runs that the comparison lacks: seed by seed, but what most depends on comes first."""
    tried = tried_rates(sweep)
    finished = {(record["task"], record["arm"], record["seed"]) for record in done}
    jobs = []
    for turn, seed, task in itertools.product(range(3), SEEDS, TASKS):
        runs = []
        for arm in ARMS[task]:
            stages = [tried[task, "ce"]] if ">" in arm else []
            rates = [best_rate(of_stage) for of_stage in (*stages, tried[task, rate_from(task, arm)])]
            if turn_of(task, arm) == turn and (task, arm, seed) not in finished:
                runs.append((arm, rates))
        jobs += in_jobs(task, seed, runs)
    return jobs


def turn_of(task: str, arm: str) -> int:
    """First the losses alone and the recipe, then one stage with Lovász, last the variants of the second stage."""
    if rate_from(task, arm) != arm:
        return 2
    return int("lovasz" in arm and ">" not in arm)


def in_jobs(task: str, seed: int, runs: list) -> list[dict]:
    """A job for each run, but one for all runs that share a first stage."""
    together = [run for run in runs if ">" in run[0]]
    groups = [[run] for run in runs if ">" not in run[0]] + ([together] if together else [])
    return [{"task": task, "seed": seed, "runs": group} for group in groups]


def prepare_worker() -> None:
    """One thread in each process; the parent alone minds Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Search the learning rates, then train what the comparison lacks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--sweep-only", action="store_true", help="stop when the learning rates are chosen")
    args = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    sweep, runs = RESULTS / "sweep.jsonl", RESULTS / "runs.jsonl"
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        get_context("spawn").Pool(args.processes, prepare_worker) as pool,
        Progress(*columns, console=Console()) as progress,
    ):

        def work(jobs: list[dict], path: Path, title: str) -> None:
            bar = progress.add_task(title, total=sum(len(job["runs"]) for job in jobs))
            for count in pool.imap_unordered(partial(run_job, path=path), jobs):
                progress.advance(bar, count)

        while jobs := sweep_jobs(read(sweep)):
            work(jobs, sweep, "learning rates")
        if not args.sweep_only:
            work(comparison_jobs(read(runs), read(sweep)), runs, "comparison")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on from here") from None
