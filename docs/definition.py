"""The losses by definition, in float64: the Jaccard loss of what errs by more than a threshold, over all thresholds.

It shares nothing with the losses: no sorted weights, no closed form, no batching.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def extension(errors: Tensor, foreground: Tensor) -> Tensor:
    """Lovász extension of the Jaccard loss: errors (N,) of at least 0, foreground (N,) bool."""
    known = errors.detach()
    below, total = errors.new_zeros(()), errors.new_zeros(())
    for level in known[known > 0].unique():
        reached = errors[known == level].mean()  # the level, as a function of the errors
        wrong = known >= level
        total = total + (reached - below) * wrong.sum() / (foreground | wrong).sum()
        below = reached
    return total


def groups(scores: Tensor, labels: Tensor, ignore: int | None, per_image: bool) -> Iterable[tuple[Tensor, Tensor]]:
    """Scores (C, N) in float64 and labels (N,) of each image, or of the batch, without ignored pixels."""
    parts = [(scores[i : i + 1], labels[i : i + 1]) for i in range(len(labels))] if per_image else [(scores, labels)]
    for some, where in parts:
        flat, label = some.double().transpose(0, 1).flatten(1), where.flatten()
        valid = torch.ones_like(label, dtype=torch.bool) if ignore is None else label != ignore
        yield flat[:, valid], label[valid]


def hinge(logits: Tensor, masks: Tensor, *, ignore: int | None = None, per_image: bool = True) -> Tensor:
    """Mean over groups; logits (B, 1, ...), masks (B, ...)."""
    losses = []
    for (flat,), label in groups(logits, masks, ignore, per_image):
        losses.append(extension((1 - flat * (2 * label.double() - 1)).relu(), label == 1))
    return torch.stack(losses).mean()


def softmax_terms(probabilities: Tensor, labels: Tensor, classes: Iterable[int]) -> Tensor:
    """The loss of each of the classes of one group."""
    return torch.stack([extension(((labels == c).double() - probabilities[c]).abs(), labels == c) for c in classes])


def softmax(
    probabilities: Tensor,
    labels: Tensor,
    *,
    classes: str | Iterable[int] = "present",
    ignore: int | None = None,
    per_image: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean over groups of the mean over classes; probabilities (B, C, ...), labels (B, ...)."""
    losses = []
    for flat, label in groups(probabilities, labels, ignore, per_image):
        chosen = (
            {"all": range(len(flat)), "present": label.unique().tolist()}.get(classes)
            if isinstance(classes, str)
            else classes
        )
        terms = softmax_terms(flat, label, chosen)
        losses.append((terms if weight is None else terms * weight.double()[list(chosen)]).mean())
    return torch.stack(losses).mean()
