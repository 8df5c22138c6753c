"""Your own data: a folder of images and a folder of masks, paired by file name without its ending.

Whatever is wrong with a folder is a `DataError` that names the files, a line for each of the first few.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IGNORE = 255
MIN_PAIRS = 3
MAX_FAULTS = 10  # files named in one message
ENDINGS = frozenset(Image.registered_extensions())


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
    image_dir: Path,
    mask_dir: Path,
    *,
    size: int,
    binary: bool,
    num_classes: int | None = None,
    mask_suffix: str = "",
) -> FolderData:
    """Read every pair and bring it to ``size`` x ``size``: images smoothly, masks by nearest neighbour.

    Binary masks hold 0 and 1, with 255 ignored; a folder whose masks never hold 1 uses 255 as foreground (0 and 255).
    Multi-class masks hold class indices, with 255 ignored; ``num_classes`` defaults to the largest label plus one. The
    name of a mask is that of its image and ``mask_suffix``.
    """
    pairs = find_pairs(image_dir, mask_dir, mask_suffix)
    images, masks, faults = [], [], []
    for image_path, mask_path in pairs:
        try:
            image, mask = read_image(image_path), read_mask(mask_path)
            if image.shape[:2] != mask.shape:
                raise DataError(
                    f"{mask_path}: the mask is {_extent(mask)} pixels but its image {image_path} is {_extent(image)}"
                )
        except DataError as fault:
            faults.append(str(fault))
            continue
        images.append(_resize(image, size, smooth=True))
        masks.append(mask)
    _raise_all(faults)

    if binary:
        if not any((mask == 1).any() for mask in masks):
            masks = [np.where(mask == IGNORE, 1, mask) for mask in masks]
        num_classes = 2
    elif num_classes is None:
        num_classes = 1 + max(int(mask[mask != IGNORE].max(initial=1)) for mask in masks)
    _check_labels(masks, [mask_path for _, mask_path in pairs], num_classes, binary=binary)

    labels = np.stack([_resize(mask, size, smooth=False) for mask in masks])
    _raise_all(
        # A batch of such masks would have no mean, and a nan would spoil the network for good.
        f"{mask_path}: the mask ignores every pixel, so the pair is of no use; leave it out"
        for label, (_, mask_path) in zip(labels, pairs, strict=True)
        if (label == IGNORE).all()
    )
    return FolderData(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(labels),
        stems=tuple(image_path.stem for image_path, _ in pairs),
        num_classes=num_classes,
    )


def _check_labels(masks: list[np.ndarray], paths: list[Path], num_classes: int, *, binary: bool) -> None:
    faults = []
    expected = "0 and 1, or 0 and 255," if binary else f"0 to {num_classes - 1}, or 255 to ignore a pixel,"
    for mask, path in zip(masks, paths, strict=True):
        wrong = mask[(mask < 0) | ((mask >= num_classes) & (mask != IGNORE))]
        if wrong.size:
            faults.append(f"{path}: the mask holds the label {wrong[0]}, but {expected} was expected")
    _raise_all(faults)
    # The IoU of the only label would be 1, whatever the network says.
    found = sorted({int(label) for mask in masks for label in np.unique(mask)} - {IGNORE})
    if len(found) == 1:
        ignored = any((mask == IGNORE).any() for mask in masks)
        hint = ". 255 is ignored here; if it is the foreground, use --task binary" if ignored and not binary else ""
        raise DataError(f"{paths[0].parent}: the masks hold the label {found[0]} only: nothing can be learnt{hint}")


def _raise_all(faults: Iterable[str]) -> None:
    """Raise one error for all faults, if there are any."""
    lines = list(faults)
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [f"and {len(lines) - MAX_FAULTS} more files"]
    if lines:
        raise DataError("\n".join(lines))


def find_pairs(image_dir: Path, mask_dir: Path, mask_suffix: str = "") -> list[tuple[Path, Path]]:
    """Image and mask paths of equal stem, in the order of the stems; masks without an image are left aside."""
    image_paths, mask_paths = _files_by_stem(image_dir), _files_by_stem(mask_dir)
    missing = [stem for stem in image_paths if stem + mask_suffix not in mask_paths]
    if missing:
        hint = ""
        suffixes = {mask[len(stem) :] for mask in mask_paths for stem in missing if mask.startswith(stem)}
        for suffix in sorted(suffixes - {mask_suffix}, key=len):
            if all(stem + suffix in mask_paths for stem in image_paths):
                hint = f"; there is {mask_paths[missing[0] + suffix].name}: give --mask-suffix {suffix}"
                break
        _raise_all(f"{image_paths[stem]}: no mask {stem + mask_suffix}.* in {mask_dir}{hint}" for stem in missing)
    if len(image_paths) < MIN_PAIRS:
        raise DataError(
            f"{image_dir}: {len(image_paths)} images, but training, validation and test need at least {MIN_PAIRS}"
        )
    return [(image_paths[stem], mask_paths[stem + mask_suffix]) for stem in sorted(image_paths)]


def _files_by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.iterdir()):
        # Other files, such as the Thumbs.db of Windows, lie beside images.
        if path.name.startswith(".") or not path.is_file() or path.suffix.lower() not in ENDINGS:
            continue
        if path.stem in paths:
            faults.append(f"{path}: {paths[path.stem].name} has the same name up to its ending, so pairs are unclear")
        paths[path.stem] = path
    _raise_all(faults)
    if not paths:
        raise DataError(f"{folder}: the folder is empty, or holds no file with the ending of an image")
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
