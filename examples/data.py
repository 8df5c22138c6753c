"""Training, validation and test images: scenes of handwritten digits, or pairs from your own folders."""

from dataclasses import dataclass
from pathlib import Path

import digit_scenes
import torch
from folder_data import Palette, read_folder

# The digits with a loop: the foreground of the binary task, 4 % of the pixels.
LOOPED = (0, 6, 8, 9)


@dataclass(frozen=True)
class Split:
    """Images (N, channels, H, W) in [0, 1] and labels (N, H, W) int64, 255 where ignored.

    ``files`` says how many files they come from, if they are tiles.
    """

    images: torch.Tensor
    labels: torch.Tensor
    files: int | None = None


def scene_splits(counts: tuple[int, int, int], size: int, seed: int) -> dict[str, Split]:
    """Training, validation and test scenes, each from scans that the other two do not see."""
    scans = digit_scenes.split_scans(seed)
    return {
        name: Split(*digit_scenes.compose_scenes(scans[name], count, size, (seed, index)))
        for index, (name, count) in enumerate(zip(scans, counts, strict=True))
    }


def looped_digits(split: Split) -> Split:
    """The binary task: 1 on the ink of the looped digits, 0 elsewhere."""
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
    """The user's pairs, shuffled and divided 70 : 10 : 20 with at least one in each part, and the number of classes."""
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
    # Files are shuffled, not tiles: those of one file stay together.
    order = torch.randperm(len(data.stems), generator=torch.Generator().manual_seed(seed))
    validation, test = max(1, len(order) // 10), max(1, len(order) // 5)
    parts = order.split([len(order) - validation - test, validation, test])
    splits = {}
    for name, part in zip(("train", "validation", "test"), parts, strict=True):
        chosen = torch.cat([(data.sources == file).nonzero()[:, 0] for file in part])
        splits[name] = Split(data.images[chosen], data.labels[chosen], len(part))
    return splits, data.num_classes
