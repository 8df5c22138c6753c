"""Predict masks for new images with a network that segment.py has trained.

Each mask is a PNG with the name and the size of its image. Its pixels are class indices, displayed in the colours of
--palette if the network was trained with that option. Run it with
``python examples/predict.py --model demo-output/binary/model.pt --images photos/ --out masks/``.
"""

import argparse
import pickle
import sys
from pathlib import Path

try:
    import numpy as np
    import report
    import torch
    from folder_data import DataError, files_by_stem, raise_all, read_image, stitch, to_squares
    from options import device
    from PIL import Image
    from rich.progress import track
    from segment import INTERRUPTED, Task, build_network, predict
except ModuleNotFoundError as error:
    sys.exit(f"{error.name} is missing; the examples need more than Kornia: pip install --group examples")


class Predictor:
    """A trained network from a model.pt, with the settings needed to apply it to an image."""

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            saved = torch.load(path, map_location="cpu")
            self.task = Task(saved["task"], tuple(saved["class_names"]))
            self.channels, self.size, self.tile = saved["channels"], saved["size"], saved["tile"]
            self.threshold, self.palette = saved["threshold"], saved["palette"]
            self.model = build_network(self.task, self.channels)
            self.model.load_state_dict(saved["weights"])
        except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: not a model.pt written by this version of segment.py") from error
        self.model.to(device)

    def classes(self, image: np.ndarray) -> np.ndarray:
        """Predict the class of every pixel (H, W) of an image (H, W, 3)."""
        height, width = image.shape[:2]
        if self.channels == 1:
            image = image.mean(axis=-1, keepdims=True)
        squares = to_squares(image, self.size, tile=self.tile, smooth=True)
        logits = predict(self.model, torch.from_numpy(squares).permute(0, 3, 1, 2))
        if self.tile:
            return stitch(self.task.decide(logits, self.threshold).numpy(), height, width)
        logits = torch.nn.functional.interpolate(logits, size=(height, width), mode="bilinear")
        return self.task.decide(logits, self.threshold)[0].numpy()

    def mask(self, image: np.ndarray) -> Image.Image:
        """Predict the mask of an image (H, W, 3) as a Pillow image."""
        classes = self.classes(image)
        if len(self.task.class_names) > 256:  # a palette has at most 256 colours
            return Image.fromarray(classes.astype(np.uint16))
        mask = Image.fromarray(classes.astype(np.uint8))
        mask.putpalette(np.asarray(self.palette or self.default_palette(), np.uint8).tobytes())
        return mask

    def default_palette(self) -> np.ndarray:
        """Black and white for a binary task, otherwise the colours of report.py with black for class 0."""
        colours = 255 * report.palette(len(self.task.class_names))
        colours[0] = 0
        return np.array([[0] * 3, [255] * 3]) if self.task.is_binary else colours


def main(argv: list[str] | None = None) -> None:
    """Write a mask for each image of a folder."""
    summary, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=summary, epilog=details)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the model.pt that segment.py wrote")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="folder of images in any format Pillow reads"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the masks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", type=device, default=default, metavar="NAME", help=f"such as cuda:0 (default: {default})"
    )
    args = parser.parse_args(argv)
    if args.out.resolve() == args.images.resolve():
        parser.error("--out must not be the folder of --images: the masks would replace images of the same name")
    try:
        write_masks(Predictor(args.model, args.device), files_by_stem(args.images), args.out)
    except (DataError, OSError) as error:
        sys.exit("\n".join(f"predict.py: {line}" for line in str(error).splitlines()))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def write_masks(predictor: Predictor, paths: dict[str, Path], out: Path) -> None:
    """Write a mask for each image, then raise one error that lists the images that could not be read."""
    out.mkdir(parents=True, exist_ok=True)
    faults = []
    for stem, path in track(paths.items(), "predicting"):
        try:
            image = read_image(path)
        except DataError as fault:
            faults.append(str(fault))
            continue
        predictor.mask(image).save(out / f"{stem}.png")
    raise_all(faults)
    print(f"Masks: {out}")


if __name__ == "__main__":
    main()
