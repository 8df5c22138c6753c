"""Train a segmentation network for a high IoU: cross-entropy first, a Lovász loss second, the best threshold last.

The second stage is run twice from the same weights, with cross-entropy and with the Lovász loss, so that the table
compares equal numbers of steps.

Without arguments it runs on cluttered scenes of real handwritten digits, twice: the digits with a loop against
everything else (LovaszSigmoidLoss), and which digit each pixel belongs to (LovaszSoftmaxLoss). With --images and
--masks it runs on your own data, and predict.py applies the result to new images. It can be interrupted: the same
command goes on. Under torchrun, the processes share the work.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends it without a traceback
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

# The thresholds to choose from: more than the customary 0.3 to 0.7, as a rare foreground may need a lower one.
PROBABILITIES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
INTERRUPTED = 130  # the exit status that shells use for it
FEW = 10  # test images: with fewer, a difference of some points of IoU means nothing


@dataclass(frozen=True)
class Task:
    """What is asked of each pixel: one foreground class, or one of several classes."""

    name: str
    class_names: tuple[str, ...]

    @property
    def is_binary(self) -> bool:
        """Whether the network has one output, the logit of the foreground, rather than one per class."""
        return self.name == "binary"

    def decide(self, logits: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
        """Logits (B, outputs, H, W) to classes (B, H, W)."""
        return (logits[:, 0] > threshold).long() if self.is_binary else logits.argmax(dim=1)


@dataclass(frozen=True)
class Evaluation:
    """How good a network is: the IoU at every threshold of a binary task, or of every class.

    ``score`` is the number that training is to raise: the IoU at the best threshold, a logit, or the mean of the
    classes.
    """

    iou: torch.Tensor
    score: float
    threshold: float


# ---------------------------------------------------------------------------------------------------------------------
# The losses
# ---------------------------------------------------------------------------------------------------------------------


def cross_entropy(task: Task) -> Loss:
    """The loss to begin with: its gradient is useful from the first step on."""
    return binary_cross_entropy if task.is_binary else torch.nn.CrossEntropyLoss(ignore_index=IGNORE)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the foreground's logit; PyTorch's own has no ignored label."""
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
    """The loss to finish with, on raw logits; of one class, the sigmoid or the hinge loss.

    Batch-wide and on the classes that the batch shows, it comes closest to the IoU over a data set that is reported
    in the end. Under torchrun the batch is that of all processes.
    """
    group = dist.group.WORLD if dist.is_initialized() and not per_image else None
    options = {"ignore_index": IGNORE, "per_image": per_image, "num_bins": num_bins, "process_group": group}
    if not task.is_binary:
        return LovaszSoftmaxLoss(classes=classes, **options)
    return LovaszHingeLoss(**options) if hinge else LovaszSigmoidLoss(**options)


def mixed(first: Loss, second: Loss, weight: float) -> Loss:
    """``weight`` times the first loss plus the rest of 1 times the second."""
    return lambda logits, labels: weight * first(logits, labels) + (1 - weight) * second(logits, labels)


# ---------------------------------------------------------------------------------------------------------------------
# Training and validation
# ---------------------------------------------------------------------------------------------------------------------


def build_network(task: Task, channels: int) -> torch.nn.Module:
    """A U-Net of 0.8 million weights with raw logits as outputs."""
    network = BasicUNet(
        spatial_dims=2,
        in_channels=channels,
        out_channels=1 if task.is_binary else len(task.class_names),
        features=(16, 32, 64, 96, 96, 16),
        act="relu",
        norm="batch",
    )
    # PyTorch's convolutions on the CPU are about a third faster with the channels last in memory.
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
        rise = (
            0.2 if steps != 5 else 0.4
        )  # a rise of exactly one step has no slope, and OneCycleLR divides by its length
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=lr, total_steps=steps, pct_start=rise
        )
        self.batches = torch.Generator().manual_seed(seed)
        self.done = 0

    def step(self) -> torch.Tensor:
        """Train on one batch; its loss, which a device may still be computing."""
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
        """All that the next step depends on, but for the weights."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.get_state(),
            "done": self.done,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state_dict`` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.set_state(state["batches"])
        self.done = state["done"]


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of every image, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).cpu() for part in images.split(64)])


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: Split, task: Task) -> Evaluation:
    """IoU over a split, all pixels and all processes counted together."""
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
    both = counts.diagonal()
    iou = both / (counts.sum(0) + counts.sum(1) - both)  # nan for a class that occurs nowhere
    return Evaluation(iou, iou.nanmean().item(), 0.0)


class Run:
    """A first stage, and others that each continue from its best weights, judged by validation.

    Its state is all that is needed to go on after an interruption as if there had been none.
    """

    def __init__(self, model: torch.nn.Module, stages: list[Stage], data: dict[str, Split], task: Task) -> None:
        self.model, self.stages, self.data, self.task = model, stages, data, task
        self.best: list[dict] = [{"score": float("-inf"), "weights": {}} for _ in stages]
        self.history: list[dict] = []
        self.losses: list[float] = []

    def advance(self, validate_every: int) -> Iterator[tuple[int, float]]:
        """Train to the end; after every step the number of its stage and its loss."""
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
        """Keep the weights if they are the best of their stage; leave the best ones in place at its end."""
        if dist.is_initialized():  # batch statistics differ between processes
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
        """All that the rest of the run depends on."""
        return {
            "weights": self.model.state_dict(),
            "stages": [stage.state_dict() for stage in self.stages],
            "best": self.best,
            "history": self.history,
            "losses": self.losses,
            "rng": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue where ``state_dict`` was taken."""
        self.model.load_state_dict(state["weights"])
        for stage, of_stage in zip(self.stages, state["stages"], strict=True):
            stage.load_state_dict(of_stage)
        self.best, self.history, self.losses = state["best"], state["history"], state["losses"]
        torch.set_rng_state(state["rng"])


# ---------------------------------------------------------------------------------------------------------------------
# Processes and interruptions
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    """The number of this process among those of torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many processes torchrun has started."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Meet the other processes of torchrun, if any."""
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
    """Whether Ctrl-C or a request to end has come. A second one ends the program on the spot."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> Self:
        self.here = False
        self.before = [signal.signal(number, self.note) for number in self.NUMBERS]
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self.NUMBERS, self.before, strict=True):
            signal.signal(number, handler)

    def note(self, number: int, _frame: object) -> None:
        """Remember it until the step is finished."""
        self.here = True
        signal.signal(number, signal.SIG_DFL)

    def anywhere(self, device: torch.device) -> bool:
        """Whether it has come to any of the processes: they stop together."""
        if not dist.is_initialized():
            return self.here
        here = torch.tensor(int(self.here), device=device)
        dist.all_reduce(here)
        return bool(here)


def save(path: Path, state: dict) -> None:
    """Write a file that is either complete or not there."""
    if rank() == 0:
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe
# ---------------------------------------------------------------------------------------------------------------------


def train(
    task: Task,
    data: dict[str, Split],
    args: argparse.Namespace,
    folder: Path,
    progress: Progress,
    interruption: Interruption,
) -> Run:
    """All stages, from the beginning or from where an earlier run was interrupted."""
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
        # The same batches for both losses.
        stage(first, args.lovasz_steps, second_lr, args.seed + 10**6),
        stage(second, args.lovasz_steps, second_lr, args.seed + 10**6),
    ]
    run = Run(model, stages, data, task)

    checkpoint, settings = folder / "checkpoint.pt", settings_of(args, task, data)
    if checkpoint.exists() and not args.restart:
        state = torch.load(checkpoint, map_location="cpu")
        if differing := [name for name in settings if settings[name] != state["settings"].get(name)]:
            raise DataError(
                f"{checkpoint} is an interrupted run with another {' and '.join(differing)}: "
                "give the same options to go on with it, --restart to drop it, or another --out"
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
        stop = interruption.anywhere(args.device)
        if stop or not run.losses:  # just validated
            save(checkpoint, run.state_dict() | {"settings": settings})
        if stop:
            raise KeyboardInterrupt
    return run


def settings_of(args: argparse.Namespace, task: Task, data: dict[str, Split]) -> dict[str, str]:
    """What a run must share with the interrupted one that it continues."""
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("out", "restart", "task")}
    settings["lr"], settings["lovasz_lr"] = map(str, learning_rates(args, task.name))
    sizes = {f"number of {name} images": str(len(split.images)) for name, split in data.items()}
    return settings | sizes | {"number of processes": str(processes())}


def finish(run: Run, args: argparse.Namespace, folder: Path) -> report.Outcome:
    """Choose the threshold on validation data, test the best weights of each stage, and keep the last ones."""
    task, outcomes = run.task, []
    for best in run.best:
        run.model.load_state_dict(best["weights"])
        evaluations = {name: evaluate(run.model, run.data[name], task) for name in ("validation", "test")}
        threshold = evaluations["validation"].threshold
        classes = task.decide(predict(run.model, run.data["test"].images[: report.SHOWN]), threshold)
        chosen = int((PROBABILITIES.logit() - threshold).abs().argmin()) if task.is_binary else None
        outcomes.append(report.StageOutcome({name: e.iou for name, e in evaluations.items()}, chosen, classes))
    channels, size = run.data["test"].images.shape[1:3]
    about = {"task": task.name, "class_names": task.class_names, "channels": channels, "size": size}
    about |= {"tile": args.tile, "palette": args.palette}
    save(folder / "model.pt", {"weights": run.best[-1]["weights"], "threshold": threshold} | about)
    names = report.stage_names(args.mix)
    return report.Outcome(task.name, task.class_names, PROBABILITIES, run.history, outcomes, names)


def jobs(args: argparse.Namespace) -> list[tuple[Task, dict[str, Split]]]:
    """The tasks that were asked for, each with its images."""
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
    """Run the tasks, print their tables, write everything else into a folder."""
    args = parse_args(__doc__, argv)
    # The grid of thresholds is fixed, and a network that has hardly begun to learn is often best at an end of it.
    warnings.filterwarnings("ignore", "the best IoU is at the")
    with process_group(args.device):
        console = Console(quiet=rank() > 0)
        columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            asked = jobs(args)
            with Interruption() as interruption:
                for task, data in asked:
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
                    if images < FEW:
                        console.print(f"Only {images} test images: differences between these numbers mean little.")
                    console.print(f"Results: {folder}\n")
            if rank() == 0:  # all is done, so the same command begins anew
                for task, _ in asked:
                    (args.out / task.name / "checkpoint.pt").unlink()
        except (DataError, OSError) as error:
            sys.exit("\n".join(f"segment.py: {line}" for line in str(error).splitlines()))
        except FloatingPointError as error:
            sys.exit(f"segment.py: {error}; a smaller learning rate usually helps")
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
            sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
