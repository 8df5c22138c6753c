"""Tests of the comparison on overlapping classes: its data, its losses, and its committed results."""

import multilabel
import torch

from kornia.losses import lovasz_sigmoid_loss


def test_scenes_overlap():
    scenes = multilabel.overlapping_scenes(0, {"train": 8, "validation": 1, "test": 1}, 48)["train"]
    assert scenes.images.shape == (8, 1, 48, 48)
    assert scenes.labels.shape == (8, 10, 48, 48)
    assert set(scenes.labels.unique().tolist()) == {0.0, 1.0}
    assert (scenes.labels.sum(1) == 2).any()
    # Ink must be darker than the paper.
    ink = scenes.labels.amax(1).bool()
    assert scenes.images[:, 0][ink].mean() < scenes.images[:, 0][~ink].mean() - 0.1


def test_each_class_is_scored_over_the_whole_batch():
    logits, masks = torch.randn(4, 3, 5, 6), (torch.rand(4, 3, 5, 6) < 0.3).float()
    each = [lovasz_sigmoid_loss(logits[:, c, None], masks[:, c], per_image=False) for c in range(3)]
    actual = multilabel.class_by_class(lovasz_sigmoid_loss, logits, masks)
    torch.testing.assert_close(actual, torch.stack(each).mean())


def test_every_arm_was_trained_with_its_best_learning_rate():
    runs = {(r["arm"], r["seed"], r["budget"]): r["rate"] for r in multilabel.read() if r["seed"] in multilabel.SEEDS}
    expected = {
        (arm, seed, budget): rate
        for arm, rate in multilabel.best_rates().items()
        for seed in multilabel.SEEDS
        for budget in multilabel.BUDGETS
    }
    assert runs == expected
    assert all(title in multilabel.table() for title in multilabel.ARMS.values())
