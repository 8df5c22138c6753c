"""Generate inputs for the benchmarks that resemble real ones: smooth logits, and labels in connected regions."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

CLASSES_PER_IMAGE = 6


class Scene(NamedTuple):
    """An input to time: the shape of the logits, the stage of training they resemble, and the options of the loss."""

    kind: str  # "softmax", "hinge" or "sigmoid"
    shape: tuple[int, int, int, int]
    stage: str  # see softmax_scene
    present: int = CLASSES_PER_IMAGE  # number of classes in an image
    options: dict[str, Any] = {}
    channels_last: bool = False
    half: bool = False  # logits in bfloat16

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the logits and labels."""
        if self.kind == "softmax":
            pred, target = softmax_scene(self.shape, self.stage, self.present)
        else:
            pred, target = binary_scene(self.shape, self.stage)
        pred = pred.bfloat16() if self.half else pred
        return (pred.contiguous(memory_format=torch.channels_last) if self.channels_last else pred), target

    def __str__(self) -> str:
        words = [self.kind, "x".join(map(str, self.shape)), self.stage]
        if self.kind == "softmax" and self.present != CLASSES_PER_IMAGE:
            words.append(f"{self.present} classes an image")
        words += [f"{name}={value}" for name, value in self.options.items()]
        return " ".join(words + ["channels-last"] * self.channels_last + ["bfloat16"] * self.half)


# Shapes that every run of the benchmark measures.
SHAPES = {
    "softmax": [(2, 21, 512, 512), (1, 19, 512, 1024), (2, 150, 256, 256)],
    "hinge": [(4, 1, 512, 512), (1, 1, 2048, 2048)],
    "sigmoid": [(4, 1, 512, 512)],
}
SMALL = [Scene("softmax", (2, 21, 32, 32), "early"), Scene("hinge", (2, 1, 32, 32), "early")]


def draw_scenes(seed: int, min_logits: int = 1 << 13, max_logits: int = 1 << 24) -> Iterator[Scene]:
    """Draw scenes of random shapes, so that the losses cannot be tuned to a fixed list.

    The number of logits is drawn between ``min_logits`` and ``max_logits``, uniformly by its logarithm. If the width
    does not fit, everything is drawn again. There are only softmax and hinge scenes, because the release has no sigmoid
    loss.
    """
    generator = random.Random(seed)

    def log_uniform(low: float, high: float) -> int:
        return round(math.exp(generator.uniform(math.log(low), math.log(high))))

    while True:
        kind = generator.choice(["softmax", "softmax", "hinge"])
        classes = log_uniform(2, 150) if kind == "softmax" else 1
        front = (log_uniform(1, 32), classes, log_uniform(32, 2048))
        width = log_uniform(min_logits, max_logits) // math.prod(front)
        if not 32 <= width <= 2048:
            continue
        options: dict[str, Any] = {"per_image": generator.random() < 0.5}
        if kind == "softmax":
            options["classes"] = generator.choice(["all", "present"])
        yield Scene(
            kind,
            (*front, width),
            generator.choice(["early", "late"]),
            classes if generator.random() < 0.5 else min(classes, CLASSES_PER_IMAGE),
            options,
            generator.random() < 0.25,
        )


def smooth_noise(generator: torch.Generator, *shape: int, cell: int) -> torch.Tensor:
    """Normal noise ``(B, C, H, W)`` that is smooth on a scale of about ``cell`` pixels."""
    *front, height, width = shape
    coarse = torch.randn(*front, height // cell + 2, width // cell + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)


def softmax_scene(
    shape: tuple[int, int, int, int], stage: str, present: int = CLASSES_PER_IMAGE, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Make logits ``(B, C, H, W)`` and labels ``(B, H, W)``.

    Args:
        shape: shape of the logits.
        stage: "early" resembles a network that has learnt little. "late" is right on 98 to 99 % of the pixels, and
            confidently wrong at the borders of regions. "random" has random logits and random labels of all classes.
        present: largest number of classes in an image.
        seed: seed of the random generator.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, num_classes, height, width = shape
    if stage == "random":
        return torch.randn(shape, generator=generator), torch.randint(0, num_classes, (batch, height, width))
    present = min(present, num_classes)
    regions = smooth_noise(generator, batch, present, height, width, cell=max(4, height // 6))
    # The borders of the predicted regions are a few pixels away from those of the labels.
    seen = regions + 0.012 * smooth_noise(generator, batch, present, height, width, cell=8)
    classes = torch.stack([torch.randperm(num_classes, generator=generator)[:present] for _ in range(batch)])
    target = classes.gather(1, regions.argmax(1).flatten(1)).view(batch, height, width)
    predicted = classes.gather(1, seen.argmax(1).flatten(1)).view(batch, height, width)
    margin, noise = (1.0, 1.0) if stage == "early" else (11.0, 1.5)
    logits = noise * smooth_noise(generator, *shape, cell=16) + 0.3 * torch.randn(shape, generator=generator)
    # A late network is less certain near the borders of regions.
    top = seen.topk(2, dim=1).values
    certainty = ((top[:, 0] - top[:, 1]) * 14).clamp(0.5, 1.0) if stage == "late" else torch.ones(batch, height, width)
    logits.scatter_add_(1, predicted.unsqueeze(1), (margin * certainty).unsqueeze(1))
    return logits, target


def binary_scene(shape: tuple[int, int, int, int], stage: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Make logits ``(B, 1, H, W)`` and labels ``(B, H, W)`` with about 25 % foreground. Stages as in softmax_scene."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    if stage == "random":
        return torch.randn(shape, generator=generator), torch.randint(0, 2, (batch, height, width))
    region = smooth_noise(generator, *shape, cell=max(4, height // 6)) - 0.6
    seen = region + 0.06 * smooth_noise(generator, *shape, cell=8)
    noise = 0.5 * smooth_noise(generator, *shape, cell=16) + 0.3 * torch.randn(shape, generator=generator)
    logits = noise + 0.3 * seen.sign() if stage == "early" else noise + 6 * (8 * seen).tanh()
    return logits, (region[:, 0] > 0).long()
