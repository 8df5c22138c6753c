"""Read your own data: a folder of images and a folder of masks, paired by file name without the extension.

If files cannot be used, the functions raise a `DataError` whose message has one line per file, up to a limit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

IGNORE = 255
MIN_PAIRS = 3
MAX_FAULTS = 10  # lines in one error message
MAX_MISSING = 8  # unused labels below the largest one that are accepted without --num-classes
MAX_LISTED = 20  # labels in one error message
EXTENSIONS = frozenset(Image.registered_extensions())

Palette = Sequence[tuple[int, int, int]]  # the colour of each class


class DataError(Exception):
    """The data cannot be used. The message names the file and says what was expected."""


@dataclass(frozen=True)
class FolderData:
    """Images (N, 3, size, size) in [0, 1] and their labels (N, size, size) int64, with 255 for ignored pixels.

    ``stems`` are the file names without extension. ``sources`` (N,) has, for each image, the index of its file in
    ``stems``. With tiles, several images come from one file.
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
    """Read all pairs and scale them to ``size`` x ``size``: images with antialiasing, masks by nearest neighbour.

    Args:
        image_dir: folder of images.
        mask_dir: folder of masks. A mask has the name of its image plus ``mask_suffix``.
        size: side of the squares, in pixels.
        binary: masks have the labels 0 and 1, with 255 for ignored pixels. If no mask has the label 1, then 255 is the
            foreground. Without ``binary``, masks have class indices, with 255 for ignored pixels.
        num_classes: number of classes, by default the largest label plus one.
        mask_suffix: what the name of a mask has in addition to the name of its image.
        palette: the colour of each class, if the masks are in colour.
        tile: cut every pair into squares instead of scaling it, and leave out squares where all pixels are ignored.
    """
    pairs = find_pairs(image_dir, mask_dir, mask_suffix)
    images, masks, faults = [], [], []
    for image_path, mask_path in pairs:
        image, mask, pair_faults = _read_pair(image_path, mask_path, palette)
        images.append(to_squares(image, size, tile=tile, smooth=True))
        masks.append(mask)
        faults.append(pair_faults)

    if binary and not palette and not any((mask == 1).any() for mask in masks):
        masks = [np.where(mask == IGNORE, 1, mask) for mask in masks]
    found = sorted({int(label) for mask in masks for label in np.unique(mask)})
    folder_faults = []
    if binary or palette:
        num_classes = 2 if binary else len(palette)
    elif num_classes is None:
        num_classes = 1 + max({1, *found} - {IGNORE})
        folder_faults = _sparse_labels(found, num_classes, mask_dir)
    labels = [to_squares(mask, size, tile=tile, smooth=False) for mask in masks]
    for mask, label, pair_faults, (_, mask_path) in zip(masks, labels, faults, pairs, strict=True):
        pair_faults += _label_faults(mask, label, mask_path, num_classes, binary=binary)
    raise_all(folder_faults + [fault for pair_faults in faults for fault in pair_faults])
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
    """Read an image and its mask, and list what is wrong with them. An unreadable file gives an empty array."""
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
    """List what is wrong with the labels of a mask. ``label`` is the mask after scaling or tiling."""
    expected = "0 and 1, or 0 and 255," if binary else f"0 to {num_classes - 1}, or 255 to ignore a pixel,"
    wrong = mask[(mask < 0) | ((mask >= num_classes) & (mask != IGNORE))]
    if wrong.size:
        return [f"{path}: the mask has the label {wrong[0]}, but {expected} was expected"]
    if label.size and (label == IGNORE).all():
        # The cross-entropy of a batch of such masks would be nan, and a nan would destroy the weights of the network.
        return [f"{path}: the mask ignores every pixel, so it is of no use; remove the image and its mask"]
    return []


def _sparse_labels(found: list[int], num_classes: int, mask_dir: Path) -> list[str]:
    """Report a fault if most labels below the largest never occur, as when grey values stand for a few classes."""
    missing = num_classes - len({label for label in found if 0 <= label < num_classes})
    if missing <= max(MAX_MISSING, num_classes / 2):
        return []
    listed = ", ".join(map(str, found[:MAX_LISTED])) + (", ..." if len(found) > MAX_LISTED else "")
    fault = (
        f"{mask_dir}: the masks have the labels {listed}, which would be {num_classes} classes: renumber them from 0, "
        f"with 255 for pixels to ignore, or give --num-classes {num_classes} if the labels are correct"
    )
    return [fault]


def _check_that_labels_differ(found: list[int], mask_dir: Path, *, binary: bool) -> None:
    """Refuse masks with a single label, because nothing can be learnt from them."""
    classes = [label for label in found if label != IGNORE]
    if len(classes) == 1:
        ignored = IGNORE in found and not binary
        hint = ". 255 is ignored here; if it is the foreground, use --task binary" if ignored else ""
        raise DataError(f"{mask_dir}: the masks have the label {classes[0]} only: nothing can be learnt{hint}")


def raise_all(faults: Sequence[str]) -> None:
    """Raise one error that lists all faults, if there are any."""
    lines = list(faults)
    if len(lines) > MAX_FAULTS:
        lines[MAX_FAULTS:] = [f"and {len(lines) - MAX_FAULTS} more faults"]
    if lines:
        raise DataError("\n".join(lines))


def find_pairs(image_dir: Path, mask_dir: Path, mask_suffix: str = "") -> list[tuple[Path, Path]]:
    """Find the paths of images and their masks, sorted by stem. Masks without an image are left out."""
    image_paths, mask_paths = files_by_stem(image_dir), files_by_stem(mask_dir)
    missing = [stem for stem in image_paths if stem + mask_suffix not in mask_paths]
    if missing:
        hint = ""
        suffixes = {mask[len(stem) :] for mask in mask_paths for stem in missing if mask.startswith(stem)}
        for suffix in sorted(suffixes - {mask_suffix}, key=len):
            if all(stem + suffix in mask_paths for stem in image_paths):
                hint = f"; but there is {mask_paths[missing[0] + suffix].name}: give --mask-suffix {suffix}"
                break
        raise_all([f"{image_paths[stem]}: no mask {stem + mask_suffix}.* in {mask_dir}{hint}" for stem in missing])
    if len(image_paths) < MIN_PAIRS:
        raise DataError(
            f"{image_dir}: {len(image_paths)} images, but training, validation and test need at least {MIN_PAIRS}"
        )
    return [(image_paths[stem], mask_paths[stem + mask_suffix]) for stem in sorted(image_paths)]


def files_by_stem(folder: Path) -> dict[str, Path]:
    """The paths of the image files in a folder, by stem."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.iterdir()):
        # Skip files that are not images, such as Thumbs.db on Windows.
        if path.name.startswith(".") or not path.is_file() or path.suffix.lower() not in EXTENSIONS:
            continue
        if path.stem in paths:
            faults.append(
                f"{path}: {paths[path.stem].name} has the same name except for the extension, so pairs are ambiguous"
            )
        paths[path.stem] = path
    raise_all(faults)
    if not paths:
        raise DataError(f"{folder}: the folder is empty, or none of its files has the extension of an image")
    return paths


def read_image(path: Path) -> np.ndarray:
    """Read an image as (H, W, 3) float32 in [0, 1]."""
    image = _open(path)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip to 8 bits in convert("RGB")
        grey = np.asarray(image, np.float32) / np.iinfo(np.uint16).max
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"), np.float32) / 255


def _labels_of(mask: Image.Image, path: Path, palette: Palette) -> np.ndarray:
    """The labels (H, W) int64 of a mask: from its only channel, or from its colours if a ``palette`` is given."""
    hint = "; JPEG blurs labels, so save masks as PNG from the start" if mask.format == "JPEG" else ""
    if palette:
        labels, unlisted = _labels_of_colours(np.asarray(mask.convert("RGB")), palette)
        if unlisted:
            raise DataError(f"{path}: the mask has the colour {unlisted}, which is not in --palette{hint}")
        return labels
    if len(mask.getbands()) != 1 or mask.mode == "F":
        colours = "" if mask.mode == "F" else "; if each colour stands for a class, list them with --palette"
        raise DataError(
            f"{path}: the mask has the pixel type {mask.mode}, but one channel of whole numbers was expected"
            f"{colours}{hint}"
        )
    labels = np.asarray(mask).astype(np.int64)
    found = np.unique(labels).tolist()
    # Blurred class indices look like other class indices. Only a mask of pure black and white is certainly not blurred.
    if hint and len(found) > 1 and found != [0, IGNORE]:
        raise DataError(f"{path}: the mask has {len(found)} different labels{hint}")
    return labels


def _labels_of_colours(pixels: np.ndarray, palette: Palette) -> tuple[np.ndarray, str]:
    """The index in the palette of each pixel's colour, and one colour that is not in the palette, or an empty text."""
    labels = np.full(pixels.shape[:2], -1, np.int64)
    for label, colour in enumerate(palette):
        labels[(pixels == colour).all(axis=-1)] = label
    unlisted = pixels[labels < 0][:1]
    return labels, ",".join(map(str, unlisted.ravel()))


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            # Phones store the orientation of a photo as metadata, but masks are drawn on the upright photo.
            turned = ImageOps.exif_transpose(image)
            turned.format = image.format
            return turned
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image") from error


def to_squares(pixels: np.ndarray, size: int, *, tile: bool, smooth: bool) -> np.ndarray:
    """Turn pixels (H, W, ...) into squares (N, size, size, ...), by scaling to one square or cutting into tiles.

    Tiles are padded at the right and the bottom. ``smooth`` is for images: scaling is antialiased and the padding is 0.
    Otherwise the pixels are labels: scaling takes the nearest neighbour and the padding is ignored.
    """
    if not pixels.size:
        return pixels
    if not tile:
        return _resize(pixels, size, smooth=smooth)[None]
    height, width, *channels = pixels.shape
    padding = [(0, -height % size), (0, -width % size)] + [(0, 0)] * len(channels)
    padded = np.pad(pixels, padding, constant_values=0 if smooth else IGNORE)
    rows = padded.reshape(-1, size, padded.shape[1] // size, size, *channels)
    return rows.swapaxes(1, 2).reshape(-1, size, size, *channels)


def stitch(tiles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Join tiles (N, size, size) from ``to_squares`` into labels (height, width), without the padding."""
    size = tiles.shape[1]
    rows = tiles.reshape(-1, -(-width // size), size, size).swapaxes(1, 2)
    return rows.reshape(rows.shape[0] * size, -1)[:height, :width]


def _resize(pixels: np.ndarray, size: int, *, smooth: bool) -> np.ndarray:
    tensor = torch.from_numpy(pixels)
    if not smooth:
        # float64 can represent every label exactly
        resized = torch.nn.functional.interpolate(tensor[None, None].double(), size=(size, size), mode="nearest-exact")
        return resized[0, 0].long().numpy()
    channels_first = tensor.permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(channels_first, size=(size, size), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
