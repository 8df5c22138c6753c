"""Inputs that look like a segmentation network's: smooth logits over piecewise-constant label maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

CLASSES_PER_IMAGE = 6


def smooth_noise(generator: torch.Generator, *shape: int, cell: int) -> torch.Tensor:
    """Normal noise ``(B, C, H, W)`` that changes over about ``cell`` pixels."""
    *front, height, width = shape
    coarse = torch.randn(*front, height // cell + 2, width // cell + 2, generator=generator)
    return F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)


def softmax_scene(shape: tuple[int, int, int, int], stage: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B, C, H, W)`` and labels ``(B, H, W)``.

    Args:
        shape: of the logits.
        stage: "early", a network that has learnt little; "late", one that is right on 98 to 99 % of the pixels and
            errs, with confidence, at the borders; "random", random labels of all classes under random logits.
        seed: of the scene.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, num_classes, height, width = shape
    if stage == "random":
        return torch.randn(shape, generator=generator), torch.randint(0, num_classes, (batch, height, width))
    present = min(CLASSES_PER_IMAGE, num_classes)
    regions = smooth_noise(generator, batch, present, height, width, cell=max(4, height // 6))
    # What the network sees differs a little from what was labelled: its borders are a few pixels off.
    seen = regions + 0.012 * smooth_noise(generator, batch, present, height, width, cell=8)
    classes = torch.stack([torch.randperm(num_classes, generator=generator)[:present] for _ in range(batch)])
    target = classes.gather(1, regions.argmax(1).flatten(1)).view(batch, height, width)
    predicted = classes.gather(1, seen.argmax(1).flatten(1)).view(batch, height, width)
    margin, noise = (1.0, 1.0) if stage == "early" else (11.0, 1.5)
    logits = noise * smooth_noise(generator, *shape, cell=16) + 0.3 * torch.randn(shape, generator=generator)
    # Certain inside a region, in doubt at its borders.
    top = seen.topk(2, dim=1).values
    certainty = ((top[:, 0] - top[:, 1]) * 14).clamp(0.5, 1.0) if stage == "late" else torch.ones(batch, height, width)
    logits.scatter_add_(1, predicted.unsqueeze(1), (margin * certainty).unsqueeze(1))
    return logits, target


def hinge_scene(shape: tuple[int, int, int, int], stage: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits ``(B, 1, H, W)`` and labels ``(B, H, W)`` with about a quarter foreground; stages as above."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, height, width = shape
    if stage == "random":
        return torch.randn(shape, generator=generator), torch.randint(0, 2, (batch, height, width))
    region = smooth_noise(generator, *shape, cell=max(4, height // 6)) - 0.6
    seen = region + 0.06 * smooth_noise(generator, *shape, cell=8)
    noise = 0.5 * smooth_noise(generator, *shape, cell=16) + 0.3 * torch.randn(shape, generator=generator)
    logits = noise + 0.3 * seen.sign() if stage == "early" else noise + 6 * (8 * seen).tanh()
    return logits, (region[:, 0] > 0).long()
