"""Your own data: a folder of images and a folder of masks, paired by file name without its ending.

Whatever is wrong with a folder is a `DataError` that names the files, a line for each of the first few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IGNORE = 255
MIN_PAIRS = 3
MAX_FAULTS = 10  # lines of one message
MAX_MISSING = 8  # labels that no mask holds, below the largest
MAX_LISTED = 20  # labels in one message
ENDINGS = frozenset(Image.registered_extensions())

Palette = Sequence[tuple[int, int, int]]  # the colour of each class


class DataError(Exception):
    """The data cannot be used; the message says which file is at fault and what was expected."""


@dataclass(frozen=True)
class FolderData:
    """Images (N, 3, size, size) in [0, 1], labels (N, size, size) int64 with 255 where ignored, and the file stems.

    ``sources`` (N,) is the place of the file in ``stems``: several tiles may come from one.
    """

    images: torch.Tensor
    labels: torch.Tensor
    sources: torch.Tensor
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
    palette: Palette = (),
    tile: bool = False,
) -> FolderData:
    """Read every pair and bring it to ``size`` x ``size``: images smoothly, masks by nearest neighbour.

    Binary masks hold 0 and 1, with 255 ignored; a folder whose masks never hold 1 uses 255 as foreground (0 and 255).
    Multi-class masks hold class indices, with 255 ignored; ``num_classes`` defaults to the largest label plus one. With
    a ``palette`` the masks are pictures in its colours, one for each class. The name of a mask is that of its image and
    ``mask_suffix``. With ``tile`` nothing is scaled: every pair is cut into squares, those that are ignored left out.
    """
    pairs = find_pairs(image_dir, mask_dir, mask_suffix)
    images, masks, faults = [], [], []
    for image_path, mask_path in pairs:
        image, mask, of_pair = _read_pair(image_path, mask_path, palette)
        images.append(to_squares(image, size, tile=tile, smooth=True))
        masks.append(mask)
        faults.append(of_pair)

    if binary and not palette and not any((mask == 1).any() for mask in masks):
        masks = [np.where(mask == IGNORE, 1, mask) for mask in masks]
    found = sorted({int(label) for mask in masks for label in np.unique(mask)})
    of_folder = []
    if binary or palette:
        num_classes = 2 if binary else len(palette)
    elif num_classes is None:
        num_classes = 1 + max({1, *found} - {IGNORE})
        of_folder = _sparse_labels(found, num_classes, mask_dir)
    labels = [to_squares(mask, size, tile=tile, smooth=False) for mask in masks]
    for mask, label, of_pair, (_, mask_path) in zip(masks, labels, faults, pairs, strict=True):
        of_pair += _label_faults(mask, label, mask_path, num_classes, binary=binary)
    raise_all(of_folder + [fault for of_pair in faults for fault in of_pair])
    _check_that_labels_differ(found, mask_dir, binary=binary)

    sources = np.repeat(np.arange(len(pairs)), [len(label) for label in labels])
    joined = np.concatenate(labels)
    kept = (joined != IGNORE).any(axis=(1, 2))
    return FolderData(
        images=torch.from_numpy(np.concatenate(images)[kept]).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(joined[kept]),
        sources=torch.from_numpy(sources[kept]),
        stems=tuple(image_path.stem for image_path, _ in pairs),
        num_classes=num_classes,
    )


def _read_pair(image_path: Path, mask_path: Path, palette: Palette) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Image and mask, without pixels if they cannot be read, and what is wrong with them."""
    image, mask, faults = np.empty((0, 0, 3), np.float32), np.empty((0, 0), np.int64), []
    try:
        image = read_image(image_path)
    except DataError as fault:
        faults.append(str(fault))
    try:
        picture = _open(mask_path)
        height, width = image.shape[:2]
        if image.size and picture.size != (width, height):
            extent = "{}x{}".format(*picture.size)
            faults.append(f"{mask_path}: the mask is {extent} pixels but its image {image_path} is {width}x{height}")
        mask = _labels_of(picture, mask_path, palette)
    except DataError as fault:
        faults.append(str(fault))
    return image, mask, faults


def _label_faults(mask: np.ndarray, label: np.ndarray, path: Path, num_classes: int, *, binary: bool) -> list[str]:
    """What is wrong with the labels of a mask, before and after it was brought to size."""
    expected = "0 and 1, or 0 and 255," if binary else f"0 to {num_classes - 1}, or 255 to ignore a pixel,"
    wrong = mask[(mask < 0) | ((mask >= num_classes) & (mask != IGNORE))]
    if wrong.size:
        return [f"{path}: the mask holds the label {wrong[0]}, but {expected} was expected"]
    if label.size and (label == IGNORE).all():
        # A batch of such masks would have no mean, and a nan would spoil the network for good.
        return [f"{path}: the mask ignores every pixel, so the pair is of no use; leave it out"]
    return []


def _sparse_labels(found: list[int], num_classes: int, mask_dir: Path) -> list[str]:
    """A fault if most classes up to the largest label never occur: grey values, say, that stand for a few classes."""
    missing = num_classes - len({label for label in found if 0 <= label < num_classes})
    if missing <= max(MAX_MISSING, num_classes / 2):
        return []
    listed = ", ".join(map(str, found[:MAX_LISTED])) + (", ..." if len(found) > MAX_LISTED else "")
    fault = (
        f"{mask_dir}: the masks hold the labels {listed}, which would be {num_classes} classes: renumber them from 0, "
        f"with 255 for pixels to ignore, or give --num-classes {num_classes} if they are right"
    )
    return [fault]


def _check_that_labels_differ(found: list[int], mask_dir: Path, *, binary: bool) -> None:
    """The IoU of an only label would be 1, whatever the network says."""
    classes = [label for label in found if label != IGNORE]
    if len(classes) == 1:
        ignored = IGNORE in found and not binary
        hint = ". 255 is ignored here; if it is the foreground, use --task binary" if ignored else ""
        raise DataError(f"{mask_dir}: the masks hold the label {classes[0]} only: nothing can be learnt{hint}")


def raise_all(faults: Sequence[str]) -> None:
    """Raise one error for all faults, if there are any."""
    lines = list(faults)
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [f"and {len(lines) - MAX_FAULTS} more faults"]
    if lines:
        raise DataError("\n".join(lines))


def find_pairs(image_dir: Path, mask_dir: Path, mask_suffix: str = "") -> list[tuple[Path, Path]]:
    """Image and mask paths of equal stem, in the order of the stems; masks without an image are left aside."""
    image_paths, mask_paths = files_by_stem(image_dir), files_by_stem(mask_dir)
    missing = [stem for stem in image_paths if stem + mask_suffix not in mask_paths]
    if missing:
        hint = ""
        suffixes = {mask[len(stem) :] for mask in mask_paths for stem in missing if mask.startswith(stem)}
        for suffix in sorted(suffixes - {mask_suffix}, key=len):
            if all(stem + suffix in mask_paths for stem in image_paths):
                hint = f"; there is {mask_paths[missing[0] + suffix].name}: give --mask-suffix {suffix}"
                break
        raise_all([f"{image_paths[stem]}: no mask {stem + mask_suffix}.* in {mask_dir}{hint}" for stem in missing])
    if len(image_paths) < MIN_PAIRS:
        raise DataError(
            f"{image_dir}: {len(image_paths)} images, but training, validation and test need at least {MIN_PAIRS}"
        )
    return [(image_paths[stem], mask_paths[stem + mask_suffix]) for stem in sorted(image_paths)]


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The images of a folder, in the order of their stems."""
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
    raise_all(faults)
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


def _labels_of(mask: Image.Image, path: Path, palette: Palette) -> np.ndarray:
    """A mask as (H, W) int64: one channel of labels, of a palette image its indices, or colours of ``palette``."""
    hint = "; JPEG blurs labels, so save masks as PNG from the start" if mask.format == "JPEG" else ""
    if palette:
        labels, unlisted = _labels_of_colours(np.asarray(mask.convert("RGB")), palette)
        if unlisted:
            raise DataError(f"{path}: the mask holds the colour {unlisted}, which --palette does not list{hint}")
        return labels
    if len(mask.getbands()) != 1 or mask.mode == "F":
        colours = "" if mask.mode == "F" else "; if each colour stands for a class, list them with --palette"
        raise DataError(
            f"{path}: the mask has the pixel type {mask.mode}, but one channel of whole numbers was expected"
            f"{colours}{hint}"
        )
    labels = np.asarray(mask).astype(np.int64)
    found = np.unique(labels).tolist()
    # What blurring makes of class indices are class indices, too: only black and white show that they are as drawn.
    if hint and len(found) > 1 and found != [0, IGNORE]:
        raise DataError(f"{path}: the mask holds {len(found)} different labels{hint}")
    return labels


def _labels_of_colours(pixels: np.ndarray, palette: Palette) -> tuple[np.ndarray, str]:
    """The place of every pixel's colour in the palette, and one colour that is not in it, if there is any."""
    labels = np.full(pixels.shape[:2], -1, np.int64)
    for label, colour in enumerate(palette):
        labels[(pixels == colour).all(axis=-1)] = label
    unlisted = pixels[labels < 0][:1]
    return labels, ",".join(map(str, unlisted.ravel()))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # Phones store the turn of a photo beside its pixels; masks are drawn on the photo as one sees it.
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
            return turned
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image") from error


def to_squares(pixels: np.ndarray, size: int, *, tile: bool, smooth: bool) -> np.ndarray:
    """Pixels (H, W, ...) as (N, size, size, ...): scaled to one square, or cut into several and padded.

    What is smooth is an image, anything else are labels.
    """
    if not pixels.size:
        return pixels
    if not tile:
        return _resize(pixels, size, smooth=smooth)[None]
    height, width, *channels = pixels.shape
    beyond = [(0, -height % size), (0, -width % size)] + [(0, 0)] * len(channels)
    padded = np.pad(pixels, beyond, constant_values=0 if smooth else IGNORE)
    rows = padded.reshape(-1, size, padded.shape[1] // size, size, *channels)
    return rows.swapaxes(1, 2).reshape(-1, size, size, *channels)


def stitch(tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """The labels (H, W) whose tiles (N, size, size) these are."""
    size = tiles.shape[1]
    rows = tiles.reshape(-1, -(-width // size), size, size).swapaxes(1, 2)
    return rows.reshape(rows.shape[0] * size, -1)[:height, :width]


def _resize(pixels: np.ndarray, size: int, *, smooth: bool) -> np.ndarray:
    tensor = torch.from_numpy(pixels)
    if not smooth:
        # float64 holds every label exactly
        resized = torch.nn.functional.interpolate(tensor[None, None].double(), size=(size, size), mode="nearest-exact")
        return resized[0, 0].long().numpy()
    channels_first = tensor.permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels_first, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
