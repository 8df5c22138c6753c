"""Your own data: a folder of images and a folder of masks, paired by file name without its ending.

Whatever is wrong with a folder is a `DataError` whose one-line message names the file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IGNORE = 255
MIN_PAIRS = 3


class DataError(Exception):
    """The data cannot be used; the message says which file is at fault and what was expected."""


@dataclass(frozen=True)
class FolderData:
    """Images (N, 3, size, size) in [0, 1], labels (N, size, size) int64 with 255 where ignored, and the file stems."""

    images: torch.Tensor
    labels: torch.Tensor
    stems: tuple[str, ...]
    num_classes: int


def read_folder(
    image_dir: Path, mask_dir: Path, *, size: int, binary: bool, num_classes: int | None = None
) -> FolderData:
    """Read every pair and bring it to ``size`` x ``size``: images smoothly, masks by nearest neighbour.

    Binary masks hold 0 and 1, with 255 ignored; a folder whose masks never hold 1 uses 255 as foreground (0 and 255).
    Multi-class masks hold class indices, with 255 ignored; ``num_classes`` defaults to the largest label plus one.
    """
    pairs = find_pairs(image_dir, mask_dir)
    images, masks = [], []
    for image_path, mask_path in pairs:
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"{mask_path}: the mask is {_extent(mask)} pixels but its image {image_path} is {_extent(image)}"
            )
        images.append(_resize(image, size, smooth=True))
        masks.append(mask)

    if binary:
        if not any((mask == 1).any() for mask in masks):
            masks = [np.where(mask == IGNORE, 1, mask) for mask in masks]
        num_classes = 2
    elif num_classes is None:
        num_classes = 1 + max(int(mask[mask != IGNORE].max(initial=1)) for mask in masks)
    for mask, (_, mask_path) in zip(masks, pairs, strict=True):
        wrong = mask[(mask < 0) | ((mask >= num_classes) & (mask != IGNORE))]
        if wrong.size:
            expected = "0 and 1, or 0 and 255," if binary else f"0 to {num_classes - 1}, or 255 to ignore a pixel,"
            raise DataError(f"{mask_path}: the mask holds the label {wrong[0]}, but {expected} was expected")

    labels = np.stack([_resize(mask, size, smooth=False) for mask in masks])
    for label, (_, mask_path) in zip(labels, pairs, strict=True):
        # A batch of such masks would have no mean, and a nan would spoil the network for good.
        if (label == IGNORE).all():
            raise DataError(f"{mask_path}: the mask ignores every pixel, so the pair is of no use; leave it out")
    return FolderData(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels),
        stems=tuple(image_path.stem for image_path, _ in pairs),
        num_classes=num_classes,
    )


def find_pairs(image_dir: Path, mask_dir: Path) -> list[tuple[Path, Path]]:
    """Image and mask paths of equal stem, in the order of the stems; masks without an image are left aside."""
    image_paths, mask_paths = _files_by_stem(image_dir), _files_by_stem(mask_dir)
    for stem, path in image_paths.items():
        if stem not in mask_paths:
            raise DataError(f"{path}: no mask of this name in {mask_dir}")
    if len(image_paths) < MIN_PAIRS:
        raise DataError(
            f"{image_dir}: {len(image_paths)} images, but training, validation and test need at least {MIN_PAIRS}"
        )
    return [(image_paths[stem], mask_paths[stem]) for stem in sorted(image_paths)]


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in paths:
            raise DataError(f"{path}: {paths[path.stem].name} has the same name up to its ending, so pairs are unclear")
        paths[path.stem] = path
    if not paths:
        raise DataError(f"{folder}: the folder is empty")
    return paths


def read_image(path: Path) -> np.ndarray:
    """Read any image as (H, W, 3) float32 in [0, 1]."""
    image = _open(path)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits
        grey = np.asarray(image, np.float32) / np.iinfo(np.uint16).max
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"), np.float32) / 255


def read_mask(path: Path) -> np.ndarray:
    """Read a single-channel label image as (H, W) int64; a palette image gives its indices."""
    mask = _open(path)
    if len(mask.getbands()) != 1 or mask.mode == "F":
        raise DataError(
            f"{path}: the mask has the pixel type {mask.mode}, but one channel of whole numbers was expected"
        )
    return np.asarray(mask).astype(np.int64)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # Phones store the turn of a photo beside its pixels; masks are drawn on the photo as one sees it.
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image") from error


def _resize(pixels: np.ndarray, size: int, *, smooth: bool) -> np.ndarray:
    tensor = torch.from_numpy(pixels)
    if not smooth:
        # float64 holds every label exactly
        resized = torch.nn.functional.interpolate(tensor[None, None].double(), size=(size, size), mode="nearest-exact")
        return resized[0, 0].long().numpy()
    channels_first = tensor.permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels_first, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()


def _extent(pixels: np.ndarray) -> str:
    height, width = pixels.shape[:2]
    return f"{width}x{height}"
