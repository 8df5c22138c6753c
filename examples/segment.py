"""Train a segmentation network with cross-entropy, then with a Lovász loss, and find the threshold of the best IoU.

The second stage is trained twice from the same weights, once with cross-entropy and once with the Lovász loss, so that
the table compares equal numbers of steps.

Run it with ``make two-stages`` or ``python examples/segment.py``. Without options, it trains two tasks on scenes of
handwritten digits: one separates the digits with a loop from everything else (LovaszSigmoidLoss), the other finds
which digit each pixel belongs to (LovaszSoftmaxLoss). With --images and --masks, it trains on your own data, and
predict.py applies the network to new images. If the program is interrupted, run the same command again to continue.
Under torchrun, the processes share each batch.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, must not print a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import copy
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from kornia.losses import LovaszHingeLoss, LovaszSigmoidLoss, LovaszSoftmaxLoss
from kornia.metrics import IoUThresholdSearch, confusion_matrix

try:
    import digit_scenes
    import report
    from data import Split, folder_splits, looped_digits, scene_splits
    from folder_data import IGNORE, DataError
    from monai.networks.nets import BasicUNet
    from options import learning_rates, parse_args
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing; the examples need more than Kornia: pip install --group examples")

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# The candidate thresholds cover almost the whole range, because a rare foreground may need a very low one.
PROBABILITIES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
INTERRUPTED = 130  # the usual exit status after Ctrl-C
MIN_TEST_IMAGES = 10  # with fewer, a difference of a few points of IoU means nothing


@dataclass(frozen=True)
class Task:
    """A segmentation task: binary, with one foreground class, or with several classes."""

    name: str
    class_names: tuple[str, ...]

    @property
    def is_binary(self) -> bool:
        """Whether the network has one output, the logit of the foreground, rather than one per class."""
        return self.name == "binary"

    def decide(self, logits: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
        """Turn logits (B, outputs, H, W) into classes (B, H, W), by a threshold or by argmax."""
        return (logits[:, 0] > threshold).long() if self.is_binary else logits.argmax(dim=1)


@dataclass(frozen=True)
class Evaluation:
    """The IoU of a network over a split.

    ``iou`` has the IoU at every threshold (binary task) or of every class. ``score`` selects the best weights: it is
    the IoU at the best threshold, or the mean over the classes. ``threshold`` is the best threshold, as a logit.
    """

    iou: torch.Tensor
    score: float
    threshold: float


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(task: Task) -> Loss:
    """The loss of the first stage. It trains well from random weights."""
    return binary_cross_entropy if task.is_binary else torch.nn.CrossEntropyLoss(ignore_index=IGNORE)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy without the ignored pixels. PyTorch's own function has no ``ignore_index``."""
    valid = labels != IGNORE
    return F.binary_cross_entropy_with_logits(logits[:, 0][valid], labels[valid].float())


def lovasz(
    task: Task,
    *,
    hinge: bool = False,
    per_image: bool = False,
    classes: str = "present",
    num_bins: int | None = None,
) -> Loss:
    """The Lovász loss of the second stage, on raw logits. A binary task uses the sigmoid or the hinge loss.

    By default the loss scores the whole batch and the classes that occur in it, which is closest to the IoU over a
    data set. Under torchrun it scores the batches of all processes together.
    """
    group = dist.group.WORLD if dist.is_initialized() and not per_image else None
    options = {"ignore_index": IGNORE, "per_image": per_image, "num_bins": num_bins, "process_group": group}
    if not task.is_binary:
        return LovaszSoftmaxLoss(classes=classes, **options)
    return LovaszHingeLoss(**options) if hinge else LovaszSigmoidLoss(**options)


def mixed(first: Loss, second: Loss, weight: float) -> Loss:
    """The weighted mean of two losses: ``weight * first + (1 - weight) * second``."""
    return lambda logits, labels: weight * first(logits, labels) + (1 - weight) * second(logits, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation
# ---------------------------------------------------------------------------------------------------------------------


def build_network(task: Task, channels: int) -> torch.nn.Module:
    """A U-Net with 0.8 million weights that returns raw logits."""
    network = BasicUNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=1 if task.is_binary else len(task.class_names),
        features=(16, 32, 64, 96, 96, 16),
        act="relu",
        norm="batch",
    )
    # On the CPU, PyTorch's convolutions are about a third faster in this memory format.
    return network.to(memory_format=torch.channels_last)


class Stage:
    """One stage of training. The learning rate rises to ``lr`` for a fifth of the steps, then falls to 0."""

    def __init__(
        self,
        network: torch.nn.Module,
        data: Split,
        loss: Loss,
        *,
        steps: int,
        lr: float,
        batch_size: int,
        seed: int,
        amp: bool = False,
    ) -> None:
        self.network, self.data, self.loss, self.steps = network, data, loss, steps
        self.batch_size, self.amp = batch_size, amp
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=lr, fused=True)
        # With 5 steps, 0.2 would be a rise of exactly one step, for which OneCycleLR divides by zero.
        rise = 0.2 if steps != 5 else 0.4
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=lr, total_steps=steps, pct_start=rise
        )
        self.batches = torch.Generator().manual_seed(seed)
        self.done = 0

    def step(self) -> torch.Tensor:
        """Train on one batch and return its loss as a tensor, without waiting for the device."""
        device = next(self.network.parameters()).device
        chosen = torch.randint(len(self.data.images), (self.batch_size,), generator=self.batches)
        chosen = chosen[rank() :: processes()].to(self.data.images.device)
        self.network.train()
        with torch.autocast(device.type, torch.bfloat16, enabled=self.amp):
            logits = self.network(self.data.images[chosen].to(device))
        value = self.loss(logits.float(), self.data.labels[chosen].to(device))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.schedule.step()
        self.done += 1
        return value.detach()

    def state_dict(self) -> dict:
        """Everything that is needed to continue the stage, except for the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from ``state_dict``."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.set_state(state["batches"])
        self.done = state["done"]


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Compute the logits of all images, and return them on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).cpu() for part in images.split(64)])


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Split, task: Task) -> Evaluation:
    """Measure the IoU over a split: pixels are counted over all images and all processes."""
    logits, labels = predict(model, data.images[rank() :: processes()]), data.labels[rank() :: processes()]
    group = dist.group.WORLD if dist.is_initialized() else None
    if task.is_binary:
        search = IoUThresholdSearch(PROBABILITIES.logit(), ignore_index=IGNORE)
        search.update(logits, labels)
        threshold, best = search.compute(group)
        return Evaluation(search.iou_at_thresholds(group), best.item(), threshold.item())
    valid = labels != IGNORE
    counts = confusion_matrix(logits.argmax(dim=1)[valid][None], labels[valid][None], len(task.class_names))[0].double()
    if group:
        dist.all_reduce(counts)
    intersection = counts.diagonal()
    iou = intersection / (counts.sum(0) + counts.sum(1) - intersection)  # nan for a class that never occurs
    return Evaluation(iou, iou.nanmean().item(), 0.0)


class Run:
    """The training of all stages. Each stage after the first starts from the best weights of the first.

    The best weights of a stage are those with the highest validation score. A run that is restored from its state gives
    exactly the same results as a run without an interruption.
    """

    def __init__(self, model: torch.nn.Module, stages: list[Stage], data: dict[str, Split], task: Task) -> None:
        self.model, self.stages, self.data, self.task = model, stages, data, task
        self.best: list[dict] = [{"score": float("-inf"), "weights": {}} for _ in stages]
        self.history: list[dict] = []
        self.losses: list[float] = []

    def advance(self, validate_every: int) -> Iterator[tuple[int, float]]:
        """Train all stages. After every step, yield the index of the stage and the loss."""
        for number, stage in enumerate(self.stages):
            if number > 0 and stage.done == 0:
                self.model.load_state_dict(self.best[0]["weights"])
            while stage.done < stage.steps:
                self.losses.append(stage.step().item())
                if self.losses[-1] != self.losses[-1]:
                    raise FloatingPointError(f"stage {number + 1}, step {stage.done}: the loss is nan")
                if stage.done % validate_every == 0 or stage.done == stage.steps:
                    self.validate(number)
                yield number, self.losses[-1] if self.losses else self.history[-1]["loss"]

    def validate(self, number: int) -> None:
        """Store the weights if they are the best of the stage so far. At the end of a stage, load its best weights."""
        if dist.is_initialized():  # use the same batch-norm statistics in all processes
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        stage, best = self.stages[number], self.best[number]
        value = evaluate(self.model, self.data["validation"], self.task).score
        if not value < best["score"]:
            self.best[number] = best = {"score": value, "weights": copy.deepcopy(self.model.state_dict())}
        step = stage.done + (self.stages[0].steps if number > 0 else 0)
        loss = sum(self.losses) / len(self.losses)
        self.history.append({"stage": number + 1, "step": step, "loss": loss, "validation_iou": value})
        self.losses.clear()
        if stage.done == stage.steps:
            self.model.load_state_dict(best["weights"])

    def state_dict(self) -> dict:
        """Everything that is needed to continue the run."""
        return {
            "weights": self.model.state_dict(),
            "stages": [stage.state_dict() for stage in self.stages],
            "best": self.best,
            "history": self.history,
            "losses": self.losses,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the state from ``state_dict``."""
        self.model.load_state_dict(state["weights"])
        for stage, stage_state in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(stage_state)
        self.best, self.history, self.losses = state["best"], state["history"], state["losses"]
        torch.set_rng_state(state["rng"])


# ---------------------------------------------------------------------------------------------------------------------
# Processes and interruptions
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The rank of this process, which is 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """The number of processes, which is 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the process group of torchrun, if the program runs under torchrun."""
    if "RANK" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class Interruption:
    """Catch the first Ctrl-C or SIGTERM, so that training can stop after a step. A second one ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:
        self.requested = False
        self.handlers_before = [signal.signal(number, self.handle) for number in self.SIGNALS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.SIGNALS, self.handlers_before, strict=True):
            signal.signal(number, handler)

    def handle(self, number: int, _frame: object) -> None:
        """Remember the signal, and restore its default action for the next one."""
        self.requested = True
        signal.signal(number, signal.SIG_DFL)

    def requested_in_any_process(self, device: torch.device) -> bool:
        """Whether any process has received a signal. All processes get the same answer and stop at the same step."""
        if not dist.is_initialized():
            return self.requested
        requests = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(requests)
        return bool(requests)


def save(path: Path, state: dict) -> None:
    """Write a file under a temporary name and rename it, so that it is never incomplete."""
    if rank() == 0:
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The program
# ---------------------------------------------------------------------------------------------------------------------


def train(
    task: Task,
    data: dict[str, Split],
    args: argparse.Namespace,
    folder: Path,
    progress: Progress,
    interruption: Interruption,
) -> Run:
    """Train all stages, from the start or from the checkpoint of an interrupted run."""
    torch.manual_seed(args.seed)
    model = build_network(task, data["train"].images.shape[1]).to(args.device)
    network = DistributedDataParallel(model) if dist.is_initialized() else model
    first = cross_entropy(task)
    second = lovasz(
        task, hinge=args.loss == "hinge", per_image=args.per_image, classes=args.classes, num_bins=args.num_bins
    )
    if args.mix:
        second = mixed(first, second, args.mix)
    lr, second_lr = learning_rates(args, task.name)

    def stage(loss: Loss, steps: int, lr: float, seed: int) -> Stage:
        return Stage(
            network, data["train"], loss, steps=steps, lr=lr, batch_size=args.batch_size, seed=seed, amp=args.amp
        )

    stages = [
        stage(first, args.steps, lr, args.seed),
        # The second and the third stage have the same seed and see the same batches.
        stage(first, args.lovasz_steps, second_lr, args.seed + 10**6),
        stage(second, args.lovasz_steps, second_lr, args.seed + 10**6),
    ]
    run = Run(model, stages, data, task)

    checkpoint, settings = folder / "checkpoint.pt", settings_of(args, task, data)
    if checkpoint.exists() and not args.restart:
        state = torch.load(checkpoint, map_location="cpu")
        if differing := [name for name in settings if settings[name] != state["settings"].get(name)]:
            raise DataError(
                f"{checkpoint} is from an interrupted run with another {' and '.join(differing)}: "
                "use the same options to continue that run, --restart to discard it, or another --out"
            )
        run.load_state_dict(state)
    bars = [
        progress.add_task(f"{task.name}: {name}", start=False, total=stage.steps, completed=stage.done, note="")
        for name, stage in zip(report.stage_names(args.mix), stages, strict=True)
    ]
    for number, loss in run.advance(args.validate_every):
        progress.start_task(bars[number])
        best = run.best[number]["score"]
        progress.update(bars[number], advance=1, note=f"loss {loss:.3f}, validation {report.percent(best)} %")
        stop = interruption.requested_in_any_process(args.device)
        if stop or not run.losses:  # after a validation
            save(checkpoint, run.state_dict() | {"settings": settings})
        if stop:
            raise KeyboardInterrupt
    return run


def settings_of(args: argparse.Namespace, task: Task, data: dict[str, Split]) -> dict[str, str]:
    """The settings that must be equal to continue an interrupted run."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "restart", "task")}
    settings["lr"], settings["lovasz_lr"] = map(str, learning_rates(args, task.name))
    sizes = {f"number of {name} images": str(len(split.images)) for name, split in data.items()}
    return settings | sizes | {"number of processes": str(processes())}


def finish(run: Run, args: argparse.Namespace, folder: Path) -> report.Outcome:
    """Test the best weights of each stage at the threshold that is best on validation, and save those of the last."""
    task, outcomes = run.task, []
    for best in run.best:
        run.model.load_state_dict(best["weights"])
        evaluations = {name: evaluate(run.model, run.data[name], task) for name in ("validation", "test")}
        threshold = evaluations["validation"].threshold
        classes = task.decide(predict(run.model, run.data["test"].images[: report.SHOWN]), threshold)
        chosen = int((PROBABILITIES.logit() - threshold).abs().argmin()) if task.is_binary else None
        outcomes.append(report.StageOutcome({name: e.iou for name, e in evaluations.items()}, chosen, classes))
    channels, size = run.data["test"].images.shape[1:3]
    settings = {"task": task.name, "class_names": task.class_names, "channels": channels, "size": size}
    settings |= {"tile": args.tile, "palette": args.palette}
    save(folder / "model.pt", {"weights": run.best[-1]["weights"], "threshold": threshold} | settings)
    names = report.stage_names(args.mix)
    return report.Outcome(task.name, task.class_names, PROBABILITIES, run.history, outcomes, names)


def jobs(args: argparse.Namespace) -> list[tuple[Task, dict[str, Split]]]:
    """The tasks that the options select, each with its data."""
    if args.images:
        splits, num_classes = folder_splits(
            args.images,
            args.masks,
            size=args.size,
            binary=args.task == "binary",
            num_classes=args.num_classes,
            mask_suffix=args.mask_suffix,
            seed=args.seed,
            palette=args.palette or (),
            tile=args.tile,
        )
        names = (
            ("background", "foreground") if args.task == "binary" else tuple(f"class {i}" for i in range(num_classes))
        )
        return [(Task(args.task, names), splits)]
    splits = scene_splits((args.scenes, max(1, args.scenes // 8), max(1, args.scenes // 4)), args.size, args.seed)
    looped = {name: looped_digits(split) for name, split in splits.items()}
    both = [(Task("binary", ("rest", "looped digits")), looped), (Task("multiclass", digit_scenes.CLASS_NAMES), splits)]
    return [(task, data) for task, data in both if args.task in ("both", task.name)]


def main(argv: list[str] | None = None) -> None:
    """Train the tasks, print a table for each, and write all other results to a folder."""
    args = parse_args(__doc__, argv)
    # Early in training, the best threshold is often at the end of the grid, so the warning about it is of no use.
    warnings.filterwarnings("ignore", "the best IoU is at the")
    with process_group(args.device):
        console = Console(quiet=rank() > 0)
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            selected = jobs(args)
            with Interruption() as interruption:
                for task, data in selected:
                    folder = args.out / task.name
                    folder.mkdir(parents=True, exist_ok=True)
                    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
                        run = train(task, data, args, folder, progress, interruption)
                    outcome = finish(run, args, folder)
                    if rank() == 0:
                        report.write(folder, outcome, data["test"])
                        (folder / "settings.json").write_text(
                            json.dumps(settings_of(args, task, data), indent=2) + "\n"
                        )
                    images = data["test"].files or len(data["test"].images)
                    console.print(report.table(outcome, images))
                    if images < MIN_TEST_IMAGES:
                        console.print(f"Only {images} test images: differences between these numbers mean little.")
                    console.print(f"Results: {folder}\n")
            if rank() == 0:  # all tasks are finished, so the next call must start from the beginning
                for task, _ in selected:
                    (args.out / task.name / "checkpoint.pt").unlink()
        except (DataError, OSError) as error:
            sys.exit("\n".join(f"segment.py: {line}" for line in str(error).splitlines()))
        except FloatingPointError as error:
            sys.exit(f"segment.py: {error}; a smaller learning rate usually helps")
        except KeyboardInterrupt:
            console.print("stopped; run the same command again to continue")
            sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
