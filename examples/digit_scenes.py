"""Compose segmentation scenes from the 1,797 scanned handwritten digits that ship with scikit-learn.

A scene is an image with values in [0, 1] and a label map of the same size. Label ``1 + d`` is the ink of the digit
``d``, and label 0 is everything else: the paper, and scribbles that are not digits. Scans are divided into training,
validation and test before any scene is made, so a test scene never shows a scan from training.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASS_NAMES = ("paper", *"0123456789")
NUM_CLASSES = len(CLASS_NAMES)
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Scans:
    """Scanned digits: ``ink`` (N, 8, 8) in [0, 1], ``digit`` (N,), and ``row`` (N,) in scikit-learn's data set."""

    ink: np.ndarray
    digit: np.ndarray
    row: np.ndarray


def split_scans(seed: int) -> dict[str, Scans]:
    """Divide the scans into the splits, with the same proportions for every digit."""
    digits = load_digits()
    rows = np.arange(len(digits.target))
    train, rest = train_test_split(rows, train_size=SHARES["train"], stratify=digits.target, random_state=seed)
    test_share = SHARES["test"] / (SHARES["validation"] + SHARES["test"])
    validation, test = train_test_split(rest, test_size=test_share, stratify=digits.target[rest], random_state=seed)
    return {
        name: Scans(digits.images[rows] / digits.images.max(), digits.target[rows], rows)
        for name, rows in (("train", train), ("validation", validation), ("test", test))
    }


def compose_scenes(
    scans: Scans, count: int, size: int, seed: int | tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose ``count`` scenes: images (count, 1, size, size) float32 and labels (count, size, size) int64.

    Each scene has its own random generator, so scene ``i`` does not depend on ``count``.
    """
    images = np.empty((count, 1, size, size), np.float32)
    labels = np.empty((count, size, size), np.int64)
    for i in range(count):
        rng = np.random.default_rng([*np.atleast_1d(seed), i])
        images[i, 0], labels[i] = compose_scene(rng, scans, size)
    return torch.from_numpy(images), torch.from_numpy(labels)


def compose_scene(rng: np.random.Generator, scans: Scans, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Compose one scene: an image (size, size) in [0, 1] and a label map (size, size)."""
    darkness, label = write_digits(rng, scans, size)
    # Scribbles are drawn under the digits, so that labelled ink is always visible.
    darkness = np.maximum(darkness, np.where(label > 0, 0, scribble(rng, size)))
    image = paper(rng, size) - darkness + rng.normal(0, rng.uniform(0.02, 0.06), (size, size))
    return image.clip(0, 1), label


def write_digits(rng: np.random.Generator, scans: Scans, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Write a few digits at random places, and return the darkness and the label of each pixel.

    A digit is left out if more than a tenth of it would cover the ink of others. Where two digits overlap, a pixel
    belongs to the later one, which is drawn on top. The largest digit takes 22 pixels, so ``size`` must be at least 22.
    """
    darkness, label = np.zeros((size, size)), np.zeros((size, size), np.int64)
    for _ in range(max(1, round(rng.uniform(7, 11) * (size / 64) ** 2))):
        chosen = rng.integers(len(scans.digit))
        ink = enlarge(scans.ink[chosen], rng.uniform(12, 18), rng.uniform(-12, 12))
        contrast = rng.uniform(0.3, 0.7)
        height, width = ink.shape
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        place = np.s_[top : top + height, left : left + width]
        covers = ink >= 0.5
        if (label[place][covers] > 0).mean() > 0.1:
            continue
        darkness[place] = np.where(covers, contrast * ink, np.maximum(darkness[place], contrast * ink))
        label[place][covers] = 1 + scans.digit[chosen]
    return darkness, label


def enlarge(scan: np.ndarray, side: float, degrees: float) -> np.ndarray:
    """Scale a scan to about ``side`` pixels with bicubic interpolation and rotate it. Values stay in [0, 1]."""
    image = Image.fromarray(scan.astype(np.float32)).resize((round(side), round(side)), Image.Resampling.BICUBIC)
    return np.asarray(image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)).clip(0, 1)


def scribble(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw pen strokes as dark and as thick as digits, so that a network cannot find digits by their darkness alone."""
    darkness = np.zeros((size, size))
    t = np.linspace(0, 1, 20)[:, None]
    for _ in range(rng.integers(2, 6)):
        start = rng.uniform(0, size, 2)
        bend, end = start + rng.normal(0, rng.uniform(0.1, 0.5) * size, (2, 2))
        curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        stroke = Image.new("L", (size, size))
        ImageDraw.Draw(stroke).line([tuple(point) for point in curve], fill=255, width=int(rng.integers(1, 4)))
        stroke = np.asarray(stroke.filter(ImageFilter.GaussianBlur(0.7))) / 255
        darkness = np.maximum(darkness, rng.uniform(0.2, 0.7) * stroke)
    return darkness


def paper(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw unevenly lit, stained paper: a slope of brightness plus a coarse random grid, scaled up smoothly."""
    stains = rng.normal(0, 0.08, (5, 5)).astype(np.float32)
    light = np.asarray(Image.fromarray(stains).resize((size, size), Image.Resampling.BICUBIC))
    slope = rng.normal(0, 0.12, 2) @ (np.mgrid[0:size, 0:size].reshape(2, -1) / size - 0.5)
    return rng.uniform(0.7, 0.95) + light + slope.reshape(size, size)
