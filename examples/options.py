"""The command line of segment.py."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from folder_data import IGNORE, Palette

SIZE_STEP = 16  # the network halves the image four times
# The ranking of the batch of several processes goes by bins, which can be counted and added up.
BINS = 1024
# What evidence.py found best for cross-entropy. A second stage has something to lose, so it
# has a third of the rate.
RATES = {"binary": 3e-3, "multiclass": 1e-2}
SECOND_RATES = {"binary": 1e-3, "multiclass": 3e-3}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Read and check the command line."""
    summary, details = description.split("\n\n", 1)
    first, second = (", ".join(f"{task} {rate:g}" for task, rate in rates.items()) for rates in (RATES, SECOND_RATES))
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
    add(parser, "--size", image_size, None, "side of the square images (default: 64; your own data: 128)")
    add(parser, "--out", Path, Path("demo-output"), "folder for the results, one below it for each task", "DIR")
    parser.add_argument("--restart", action="store_true", help="drop the interrupted run in --out and begin again")

    scenes = parser.add_argument_group("scenes of digits")
    add(scenes, "--scenes", at_least(8), 2400, "training scenes to compose; an eighth as many validate, a quarter test")

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
    add(
        own,
        "--palette",
        palette,
        None,
        "masks are in colours, and the first of these is class 0: a JSON file [[0, 0, 0], [255, 0, 0]] or, quoted, the "
        "same as '0,0,0;255,0,0'",
        "COLOURS",
    )
    own.add_argument(
        "--tile",
        action="store_true",
        help="cut images into squares of --size pixels at their own resolution instead of scaling each to one square",
    )
    add(own, "--mask-suffix", str, "", "what the name of a mask has more than that of its image: _mask, say", "TEXT")
    add(own, "--num-classes", at_least(2), None, "classes of the masks (default: the largest label plus one)")

    training = parser.add_argument_group("training")
    add(training, "--steps", at_least(1), 500, "batches of the first stage, cross-entropy")
    add(training, "--lr", positive, None, f"its learning rate (default: {first})", "RATE")
    add(training, "--lovasz-steps", at_least(1), 200, "batches of the second stage, Lovász or more cross-entropy")
    add(training, "--lovasz-lr", positive, None, f"its learning rate (default: {second})", "RATE")
    add(training, "--mix", share, 0.0, "weight of cross-entropy in the second stage, the rest is Lovász", "W")
    training.add_argument(
        "--loss",
        choices=("sigmoid", "hinge"),
        default="sigmoid",
        help="Lovász loss of one class: with errors that are bounded, or the hinge loss (default: sigmoid)",
    )
    training.add_argument("--per-image", action="store_true", help="score each image by itself, not the batch")
    training.add_argument(
        "--classes",
        choices=("present", "all"),
        default="present",
        help="classes that the multiclass Lovász loss averages (default: present)",
    )
    add(training, "--batch-size", at_least(1), 4, "images in a batch, of all processes together")
    add(training, "--validate-every", at_least(1), 50, "steps between validations, which are also saved to go on from")
    add(training, "--seed", at_least(0), 0, "the same seed gives the same numbers on the same machine")
    add(training, "--device", device, "cuda" if torch.cuda.is_available() else "cpu", "where to train", "NAME")
    training.add_argument("--amp", action="store_true", help="run the network in bfloat16 where that is safe")
    add(
        training,
        "--num-bins",
        at_least(1),
        None,
        f"rank by this many bins instead of exactly (default: exactly; under torchrun {BINS}, since that is how the "
        "processes' batches become one)",
    )

    args = parser.parse_args(argv)
    if (args.images is None) != (args.masks is None):
        parser.error("--images and --masks go together")
    if args.images and args.task == "both":
        parser.error("your own data needs --task binary or --task multiclass")
    if args.num_classes and not (args.images and args.task == "multiclass"):
        parser.error("--num-classes is for --task multiclass on your own data")
    if (args.palette or args.tile) and not args.images:
        parser.error("--palette and --tile are for your own data")
    if args.palette and args.num_classes:
        parser.error("--palette already says how many classes there are, so leave out --num-classes")
    if args.palette and args.task == "binary" and len(args.palette) != 2:
        parser.error(f"--palette has {len(args.palette)} colours, but --task binary has two classes")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % processes:
        parser.error(f"--batch-size {args.batch_size} cannot be shared equally by {processes} processes")
    if processes > 1 and not args.per_image:
        args.num_bins = args.num_bins or BINS
    args.size = args.size or (128 if args.images else 64)
    return args


def learning_rates(args: argparse.Namespace, task: str) -> tuple[float, float]:
    """The rates of the first and the second stage."""
    return args.lr or RATES[task], args.lovasz_lr or SECOND_RATES[task]


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


def palette(text: str) -> Palette:
    """An argparse type for one colour per class."""
    try:
        if text.endswith(".json"):
            colours = json.loads(Path(text).read_text(encoding="utf-8"))
        else:
            colours = [colour.split(",") for colour in text.split(";")]
        colours = tuple(tuple(int(value) for value in colour) for colour in colours)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be read") from error
    except (TypeError, ValueError):
        colours = ()
    right = all(len(colour) == 3 and 0 <= min(colour) and max(colour) <= 255 for colour in colours)
    if not right or not 2 <= len(set(colours)) == len(colours) <= IGNORE:
        raise argparse.ArgumentTypeError(
            f"2 to {IGNORE} different colours of three numbers from 0 to 255 are needed, such as "
            f"'0,0,0;255,0,0', not {text!r}"
        )
    return colours


def device(text: str) -> torch.device:
    """An argparse type for devices that are there."""
    try:
        return torch.empty(0, device=text).device
    # PyTorch without CUDA says so with an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine") from error


def positive(text: str) -> float:
    """An argparse type for learning rates."""
    number = as_float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"a positive number is needed, not {text!r}")
    return number


def share(text: str) -> float:
    """An argparse type for weights of one of two parts."""
    number = as_float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is needed, not {text!r}")
    return number


def as_float(text: str) -> float:
    """The number, or nan."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
