"""Do exact gradients teach more where those of Kornia 0.9.0 are wrong? ``python examples/exactness.py``.

A small network finds lakes in the west of the Blue Marble and in its mirror image: 17 million pixels, scored as one
image. It is trained twice from the same weights, once with the hinge loss of the release and once with that of the
fork, and tested on the east. Every ten steps the script compares the two gradients of the same logits.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

import blue_marble
import torch
import torch.nn.functional as F
from evidence import circumstances
from rich.progress import track
from torch import nn

from kornia.losses import lovasz_hinge_loss
from kornia.metrics import best_iou_threshold, iou_at_thresholds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fork.compose import fetch_release, load_release_module  # noqa: E402 - found through the line above

RESULTS = ROOT / "examples" / "results" / "exactness.json"
STEPS, MEASURE_EVERY, RATE = 50, 10, 1e-2
TRAINING_WIDTH = 3200


def earth(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels of the western part, with its mirror image, to learn from, and of the rest to test."""
    image, labels = blue_marble.earth()
    image = torch.tensor(image).movedim(-1, 0)[None] / 255
    lakes = torch.from_numpy(labels == 1).long()[None]
    image = (image - image.mean((2, 3), keepdim=True)) / image.std((2, 3), keepdim=True)
    learn, known = (torch.cat([part, part.flip(-1)], -2) for part in (image[..., :width], lakes[..., :width]))
    return features(learn), known, features(image[..., width:]), lakes[..., width:]


def features(image: torch.Tensor) -> torch.Tensor:
    """The colours of each pixel, and their means over 5 x 5 and 15 x 15 pixels: ``(1, 9, H, W)``."""
    means = [F.avg_pool2d(image, size, 1, size // 2, count_include_pad=False) for size in (5, 15)]
    return torch.cat([image, *means], 1)


def build_network() -> nn.Module:
    """One hidden layer, applied to the features of each pixel."""
    return nn.Sequential(nn.Conv2d(9, 16, 1), nn.ReLU(), nn.Conv2d(16, 1, 1))


def compare_gradients(losses: dict, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Count the pixels with an exact gradient, and the shares of them where the release has zero or the wrong sign."""
    exact, release = (
        torch.autograd.grad(loss(logits, labels), logits)[0] for loss in (losses["fork"], losses["release"])
    )
    counted = exact != 0
    return {
        "pixels with a gradient": counted.sum().item(),
        "zero in the release": ((release == 0) & counted).sum().item() / counted.sum().item(),
        "wrong sign in the release": (release * exact < 0).sum().item() / counted.sum().item(),
        "difference": ((release - exact).abs().sum() / exact.abs().sum()).item(),
    }


def train(name: str, losses: dict, model: nn.Module, data: tuple[torch.Tensor, ...], steps: int, every: int) -> list:
    """Train with one of the losses, and return the measurements of every ``every`` steps."""
    image, labels, test_image, test_labels = data
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    measured = []
    for step in track(range(1, steps + 1), name):
        logits = model(image)
        loss = losses[name](logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % every == 0:
            record = {"step": step, "loss": loss.item()}
            record |= compare_gradients(losses, logits.detach().requires_grad_(), labels)
            with torch.no_grad():
                logits = model(test_image)
            _, best = best_iou_threshold(logits, test_labels)
            record["test at zero"] = iou_at_thresholds(logits, test_labels, torch.zeros(1)).item()
            record["test at its best"] = best.item()
            measured.append(record)
    return measured


def main() -> None:
    """Train with both losses and keep what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (default: %(default)s)")
    parser.add_argument("--width", type=int, default=TRAINING_WIDTH, help="of the image, pixels (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file of the results (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    release = load_release_module(fetch_release(ROOT), "kornia.losses.lovasz_hinge").lovasz_hinge_loss
    losses = {"release": release, "fork": lovasz_hinge_loss}
    data, initial = earth(args.width), build_network()
    results = {
        "pixels": data[1].numel(),
        "lake": data[1].float().mean().item(),
        **circumstances(),
        "runs": {
            name: train(name, losses, copy.deepcopy(initial), data, args.steps, min(args.steps, MEASURE_EVERY))
            for name in losses
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
