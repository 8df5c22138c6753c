"""Parse and check the command line of segment.py."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from folder_data import IGNORE, Palette

SIZE_STEP = 16  # the network halves the image four times
# With several processes, the loss sorts pixels into bins, because the counts of bins can be summed over processes.
BINS = 1024
# The best rates for cross-entropy in evidence.py. The second stage has a third of them, to preserve what was learnt.
RATES = {"binary": 3e-3, "multiclass": 1e-2}
SECOND_RATES = {"binary": 1e-3, "multiclass": 3e-3}


def parse_args(description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line and check that the options fit together."""
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
        help="what to train (default: both, one after the other); with your own data, choose one",
    )
    add(parser, "--size", image_size, None, "side of the square images in pixels (default: 64; your own data: 128)")
    add(parser, "--out", Path, Path("demo-output"), "folder for the results, with a subfolder for each task", "DIR")
    parser.add_argument("--restart", action="store_true", help="discard the interrupted run in --out and start again")

    scenes = parser.add_argument_group("scenes of digits")
    add(scenes, "--scenes", at_least(8), 2400, "training scenes; validation has an eighth as many, test a quarter")

    own = parser.add_argument_group("your own data")
    add(own, "--images", Path, None, "folder of images, in any format that Pillow reads", "DIR")
    add(
        own,
        "--masks",
        Path,
        None,
        "folder of masks, each with the name of its image, except for the extension, and one channel of labels: "
        "0 and 1, or 0 and 255, for binary; class indices for multiclass; otherwise 255 marks pixels to ignore",
        "DIR",
    )
    add(
        own,
        "--palette",
        palette,
        None,
        "the colour of each class, if masks are in colour, starting with class 0: a JSON file with "
        "[[0, 0, 0], [255, 0, 0]], or the same in quotes as '0,0,0;255,0,0'",
        "COLOURS",
    )
    own.add_argument(
        "--tile",
        action="store_true",
        help="cut images into squares of --size pixels instead of scaling each image to one square",
    )
    add(own, "--mask-suffix", str, "", "suffix of the mask names: _mask, if photo.jpg has photo_mask.png", "TEXT")
    add(own, "--num-classes", at_least(2), None, "number of classes (default: the largest label plus one)")

    training = parser.add_argument_group("training")
    add(training, "--steps", at_least(1), 500, "steps of the first stage, with cross-entropy")
    add(training, "--lr", positive, None, f"learning rate of the first stage (default: {first})", "RATE")
    add(training, "--lovasz-steps", at_least(1), 200, "steps of the second stage, with Lovász or more cross-entropy")
    add(training, "--lovasz-lr", positive, None, f"learning rate of the second stage (default: {second})", "RATE")
    add(training, "--mix", share, 0.0, "weight of cross-entropy in the second stage; Lovász has the weight 1 - W", "W")
    training.add_argument(
        "--loss",
        choices=("sigmoid", "hinge"),
        default="sigmoid",
        help="binary Lovász loss: the sigmoid loss, whose errors are bounded, or the hinge loss (default: sigmoid)",
    )
    training.add_argument("--per-image", action="store_true", help="score each image instead of the whole batch")
    training.add_argument(
        "--classes",
        choices=("present", "all"),
        default="present",
        help="classes over which the multiclass Lovász loss is averaged (default: present)",
    )
    add(training, "--batch-size", at_least(1), 4, "images in a batch, over all processes")
    add(training, "--validate-every", at_least(1), 50, "steps between validations, which also save a checkpoint")
    add(training, "--seed", at_least(0), 0, "random seed; the same seed gives the same results on the same machine")
    add(training, "--device", device, "cuda" if torch.cuda.is_available() else "cpu", "where to train", "NAME")
    training.add_argument("--amp", action="store_true", help="train with automatic mixed precision in bfloat16")
    add(
        training,
        "--num-bins",
        at_least(1),
        None,
        "approximate the Lovász loss with this many bins (default: compute it exactly, or "
        f"with {BINS} bins under torchrun, where only the binned loss can score the batches of all processes together)",
    )

    args = parser.parse_args(argv)
    if (args.images is None) != (args.masks is None):
        parser.error("--images and --masks must be given together")
    if args.images and args.task == "both":
        parser.error("your own data needs --task binary or --task multiclass")
    if args.num_classes and not (args.images and args.task == "multiclass"):
        parser.error("--num-classes needs --task multiclass and your own data (--images and --masks)")
    if (args.palette or args.tile) and not args.images:
        parser.error("--palette and --tile need your own data (--images and --masks)")
    if args.palette and args.num_classes:
        parser.error("--palette already gives the number of classes, so leave out --num-classes")
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
    """The learning rates of the first and the second stage."""
    return args.lr or RATES[task], args.lovasz_lr or SECOND_RATES[task]


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type for integers from a minimum on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}. Got: {text!r}")
        return number

    return parse


def image_size(text: str) -> int:
    """An argparse type for image sizes that the network accepts."""
    size = at_least(2 * SIZE_STEP)(text)
    if size % SIZE_STEP:
        raise argparse.ArgumentTypeError(f"expected a multiple of {SIZE_STEP}. Got: {text!r}")
    return size


def palette(text: str) -> Palette:
    """An argparse type for a list of colours, one per class."""
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
    valid = all(len(colour) == 3 and 0 <= min(colour) and max(colour) <= 255 for colour in colours)
    if not valid or not 2 <= len(set(colours)) == len(colours) <= IGNORE:
        raise argparse.ArgumentTypeError(
            f"expected 2 to {IGNORE} different colours of three numbers from 0 to 255, such as '0,0,0;255,0,0'. "
            f"Got: {text!r}"
        )
    return colours


def device(text: str) -> torch.device:
    """An argparse type for devices of this machine."""
    try:
        return torch.empty(0, device=text).device
    # PyTorch without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} on this machine") from error


def positive(text: str) -> float:
    """An argparse type for learning rates."""
    number = as_float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number. Got: {text!r}")
    return number


def share(text: str) -> float:
    """An argparse type for weights from 0 to 1."""
    number = as_float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1. Got: {text!r}")
    return number


def as_float(text: str) -> float:
    """Convert a text to a number, or to nan if it is not one."""
    try:
        return float(text)
    except ValueError:
        return float("nan")
