"""Train a small segmentation network in two stages, cross-entropy and then a Lovász loss, and show what each brings.

Without arguments it runs on cluttered scenes of real handwritten digits, twice: ink against everything else
(LovaszHingeLoss), and which digit each pixel belongs to (LovaszSoftmaxLoss). With --images and --masks it runs on your
own data.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import digit_scenes
import torch
import torch.nn.functional as F
from folder_data import IGNORE, DataError, read_folder
from monai.networks.nets import BasicUNet
from report import Outcome, Prediction, draw, iou_per_class, iou_table, percent, score
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kornia.losses import LovaszHingeLoss, LovaszSoftmaxLoss

SIZE_STEP = 16  # the network halves the image four times

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Split:
    """Images (N, channels, H, W) in [0, 1] and labels (N, H, W) int64, 255 where ignored."""

    images: torch.Tensor
    labels: torch.Tensor


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


def cross_entropy(task: Task) -> Loss:
    """The loss to begin with: its gradient is useful from the first step on."""
    return binary_cross_entropy if task.is_binary else torch.nn.CrossEntropyLoss(ignore_index=IGNORE)


def binary_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the foreground's logit; PyTorch's own has no ignored label."""
    valid = labels != IGNORE
    return F.binary_cross_entropy_with_logits(logits[:, 0][valid], labels[valid].float())


def lovasz(task: Task, *, per_image: bool = False, classes: str = "present") -> Loss:
    """The loss to finish with.

    Batch-wide and on the classes that the batch shows, it comes closest to the IoU over a data set that is reported
    in the end.
    """
    if task.is_binary:
        return LovaszHingeLoss(ignore_index=IGNORE, per_image=per_image)
    return LovaszSoftmaxLoss(ignore_index=IGNORE, per_image=per_image, classes=classes)


def mixed(first: Loss, second: Loss, weight: float) -> Loss:
    """``weight`` times the first loss plus the rest of 1 times the second."""
    return lambda logits, labels: weight * first(logits, labels) + (1 - weight) * second(logits, labels)


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
        self, model: torch.nn.Module, data: Split, loss: Loss, *, steps: int, lr: float, batch_size: int, seed: int
    ) -> None:
        self.model, self.data, self.loss, self.steps, self.batch_size = model, data, loss, steps, batch_size
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, max_lr=lr, total_steps=steps, pct_start=0.2)
        self.batches = torch.Generator().manual_seed(seed)

    def step(self) -> float:
        """One batch; its loss."""
        device = next(self.model.parameters()).device
        chosen = torch.randint(len(self.data.images), (self.batch_size,), generator=self.batches)
        self.model.train()
        value = self.loss(self.model(self.data.images[chosen].to(device)), self.data.labels[chosen].to(device))
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        self.schedule.step()
        return value.item()

    def run(self) -> Iterator[float]:
        """All steps; the loss of each."""
        for _ in range(self.steps):
            yield self.step()


@torch.no_grad()
def predict(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The logits of every image, on the CPU."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(part.to(device)).cpu() for part in images.split(64)])


def judge(model: torch.nn.Module, data: Split, task: Task) -> Prediction:
    """The network's decision on every image of a split, and its IoU."""
    classes = task.decide(predict(model, data.images))
    return Prediction(classes, iou_per_class(classes, data.labels, len(task.class_names)))


def run_task(task: Task, data: dict[str, Split], args: argparse.Namespace, progress: Progress) -> Outcome:
    """Both stages of one task and, for a fair comparison, the second stage with cross-entropy instead."""

    def train(model: torch.nn.Module, name: str, loss: Loss, steps: int, lr: float) -> Prediction:
        """Run one stage and judge its result; the IoU beside its bar is that of the validation images."""
        bar = progress.add_task(f"{task.name}: {name}", total=steps, note="")
        stage = Stage(model, data["train"], loss, steps=steps, lr=lr, batch_size=args.batch_size, seed=args.seed)
        for value in stage.run():
            progress.update(bar, advance=1, note=f"loss {value:.3f}")
        validation = score(judge(model, data["validation"], task).iou, is_binary=task.is_binary)
        progress.update(bar, note=f"validation {percent(validation)} %")
        return judge(model, data["test"], task)

    torch.manual_seed(args.seed)
    model = build_network(task, data["train"].images.shape[1]).to(args.device)
    before = train(model, "cross-entropy", cross_entropy(task), args.steps, args.lr)
    rival = copy.deepcopy(model)
    after = train(model, "Lovász", lovasz(task), args.lovasz_steps, args.lovasz_lr)
    without = train(rival, "instead, cross-entropy", cross_entropy(task), args.lovasz_steps, args.lovasz_lr)
    predictions = {"before": before, "after": after, "without": without}
    return Outcome(task.name, task.class_names, data["test"].labels, predictions)


def scene_splits(args: argparse.Namespace) -> dict[str, Split]:
    """Training, validation and test scenes, each from scans of its own."""
    counts = {"train": args.scenes, "validation": max(1, args.scenes // 8), "test": max(1, args.scenes // 4)}
    scans = digit_scenes.split_scans(args.seed)
    return {
        name: Split(*digit_scenes.compose_scenes(scans[name], count, args.size, (args.seed, index)))
        for index, (name, count) in enumerate(counts.items())
    }


def folder_splits(args: argparse.Namespace) -> tuple[dict[str, Split], int]:
    """The user's pairs, shuffled and divided 70 : 10 : 20 with at least one in each part, and the number of classes."""
    data = read_folder(
        args.images, args.masks, size=args.size, binary=args.task == "binary", num_classes=args.num_classes
    )
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(args.seed))
    validation, test = max(1, len(order) // 10), max(1, len(order) // 5)
    parts = order.split([len(order) - validation - test, validation, test])
    names = ("train", "validation", "test")
    return {
        name: Split(data.images[part], data.labels[part]) for name, part in zip(names, parts, strict=True)
    }, data.num_classes


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details)

    def add(group, name: str, kind, default, text: str, metavar: str | None = "N") -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=kind, default=default, metavar=metavar, help=text + shown)

    tasks = ("both", "binary", "multiclass")
    parser.add_argument(
        "--task",
        choices=tasks,
        default="both",
        help="what to train (default: both, one after the other); your own data needs one",
    )
    add(parser, "--size", image_size, None, "side of the square images (default: 64; your own data is scaled to 128)")
    add(parser, "--out", Path, Path("demo-output"), "folder for the picture", "DIR")

    scenes = parser.add_argument_group("scenes of digits")
    add(scenes, "--scenes", at_least(8), 2400, "training scenes to compose; a quarter as many test the network")

    own = parser.add_argument_group("your own data")
    add(own, "--images", Path, None, "images in any format Pillow reads", "DIR")
    add(
        own,
        "--masks",
        Path,
        None,
        "masks, each named as its image up to the ending, with one channel of labels: 0 and 1, or 0 and 255, for "
        "binary; class indices for multiclass; a 255 beside other labels marks pixels to ignore",
        "DIR",
    )
    add(own, "--num-classes", at_least(2), None, "classes of the masks (default: the largest label plus one)")

    training = parser.add_argument_group("training")
    add(training, "--steps", at_least(1), 700, "batches of the first stage, cross-entropy")
    add(training, "--lr", positive, 1e-2, "its learning rate", "RATE")
    add(training, "--lovasz-steps", at_least(1), 150, "batches of the second stage, Lovász")
    add(training, "--lovasz-lr", positive, 3e-3, "its learning rate", "RATE")
    add(training, "--batch-size", at_least(1), 4, "images in a batch")
    add(training, "--seed", at_least(0), 0, "the same seed gives the same numbers on the same machine")
    add(training, "--device", device, "cuda" if torch.cuda.is_available() else "cpu", "where to train", "NAME")

    args = parser.parse_args(argv)
    if (args.images is None) != (args.masks is None):
        parser.error("--images and --masks go together")
    if args.images and args.task == "both":
        parser.error("your own data needs --task binary or --task multiclass")
    if args.num_classes and not (args.images and args.task == "multiclass"):
        parser.error("--num-classes is for --task multiclass on your own data")
    args.size = args.size or (128 if args.images else 64)
    return args


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type for whole numbers."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"a whole number of at least {least} is needed, not {text!r}")
        return number

    return parse


def image_size(text: str) -> int:
    """An argparse type for sides the network can halve."""
    size = at_least(2 * SIZE_STEP)(text)
    if size % SIZE_STEP:
        raise argparse.ArgumentTypeError(f"a multiple of {SIZE_STEP} is needed, not {text!r}")
    return size


def device(text: str) -> torch.device:
    """An argparse type for devices that are there."""
    try:
        return torch.empty(0, device=text).device
    # PyTorch without CUDA says so with an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine") from error


def positive(text: str) -> float:
    """An argparse type for learning rates."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a positive number is needed, not {text!r}")
    return number


def main(argv: list[str] | None = None) -> None:
    """Run the tasks, print their tables, write the picture."""
    args = parse_args(argv)
    console = Console()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.images:
            splits, num_classes = folder_splits(args)
            names = tuple(f"class {index}" for index in range(num_classes))
            jobs = [
                (
                    Task("binary", ("background", "foreground"))
                    if args.task == "binary"
                    else Task("multiclass", names),
                    splits,
                )
            ]
            subject = "held-out images"
        else:
            splits = scene_splits(args)
            ink = {name: Split(split.images, (split.labels > 0).long()) for name, split in splits.items()}
            jobs = [(Task("binary", ("paper", "ink")), ink), (Task("multiclass", digit_scenes.CLASS_NAMES), splits)]
            jobs = [(task, data) for task, data in jobs if args.task in ("both", task.name)]
            subject = "scenes of held-out digits"
    except (DataError, OSError) as error:
        sys.exit(f"segment.py: {error}")

    columns = (TextColumn("{task.description}"), BarColumn(12), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        outcomes = [run_task(task, data, args, progress) for task, data in jobs]

    headings = {
        "before": f"before Lovász\n{args.steps} steps",
        "after": f"after Lovász\n+ {args.lovasz_steps} steps",
        "without": f"cross-entropy instead\n+ {args.lovasz_steps} steps",
    }
    for outcome in outcomes:
        console.print(f"\n{outcome.task}, {len(outcome.labels)} {subject}")
        console.print(iou_table(outcome, headings))
    picture = args.out / "segmentation.png"
    draw(picture, splits["test"].images, outcomes)
    console.print(f"\nPicture: {picture}")


if __name__ == "__main__":
    main()
