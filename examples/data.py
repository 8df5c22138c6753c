"""Load the training, validation and test images: generated scenes of handwritten digits, or your own image folders."""

from dataclasses import dataclass
from pathlib import Path

import digit_scenes
import torch
from folder_data import Palette, read_folder

# The digits with a loop are the foreground of the binary task. Their ink covers 4 % of the pixels.
LOOPED = (0, 6, 8, 9)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, H, W) in [0, 1] and their labels (N, H, W) int64, with 255 for ignored pixels.

    ``files`` is the number of files that the images were read from, or None for generated scenes. With tiles, one file
    gives several images.
    """

    images: torch.Tensor
    labels: torch.Tensor
    files: int | None = None


def scene_splits(counts: tuple[int, int, int], size: int, seed: int) -> dict[str, Split]:
    """Compose training, validation and test scenes. No scan of a digit is used in more than one split."""
    scans = digit_scenes.split_scans(seed)
    return {
        name: Split(*digit_scenes.compose_scenes(scans[name], count, size, (seed, index)))
        for index, (name, count) in enumerate(zip(scans, counts, strict=True))
    }


def looped_digits(split: Split) -> Split:
    """Turn the labels into those of the binary task: 1 on the ink of digits with a loop, 0 elsewhere."""
    foreground = torch.tensor([1 + digit for digit in LOOPED])
    return Split(split.images, torch.isin(split.labels, foreground).long())


def folder_splits(
    images: Path,
    masks: Path,
    *,
    size: int,
    binary: bool,
    num_classes: int | None,
    mask_suffix: str,
    seed: int,
    palette: Palette = (),
    tile: bool = False,
) -> tuple[dict[str, Split], int]:
    """Read image and mask pairs, and divide them at random into training, validation and test (70 : 10 : 20).

    Validation and test get at least one pair each. The second result is the number of classes.
    """
    data = read_folder(
        images,
        masks,
        size=size,
        binary=binary,
        num_classes=num_classes,
        mask_suffix=mask_suffix,
        palette=palette,
        tile=tile,
    )
    # Shuffle files rather than tiles, so that all tiles of a file are in the same split.
    order = torch.randperm(len(data.stems), generator=torch.Generator().manual_seed(seed))
    validation, test = max(1, len(order) // 10), max(1, len(order) // 5)
    parts = order.split([len(order) - validation - test, validation, test])
    splits = {}
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        chosen = torch.cat([(data.sources == file).nonzero()[:, 0] for file in part])
        splits[name] = Split(data.images[chosen], data.labels[chosen], len(part))
    return splits, data.num_classes
