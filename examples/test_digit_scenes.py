"""Tests of the generated scenes: splits of the scans, and images that agree with their labels."""

import digit_scenes
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def scans():
    return digit_scenes.split_scans(seed=0)


def single_scan(scan, digit):
    return digit_scenes.Scans(scan[None], np.array([digit]), np.array([0]))


class TestSplit:
    def test_every_scan_is_in_exactly_one_split(self, scans):
        rows = np.concatenate([scans[name].row for name in SPLITS])
        assert sorted(rows) == list(range(len(load_digits().target)))

    def test_no_split_shows_the_ink_of_another(self, scans):
        # Compare the pixels too, because row numbers would not show that images were mixed up.
        original = load_digits().images / 16
        for name in SPLITS:
            assert np.array_equal(scans[name].ink, original[scans[name].row])
            assert np.array_equal(scans[name].digit, load_digits().target[scans[name].row])

    def test_shares_and_digits_are_balanced(self, scans):
        sizes = np.array([len(scans[name].row) for name in SPLITS])
        assert sizes / sizes.sum() == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
        for name in SPLITS:
            counts = np.bincount(scans[name].digit, minlength=10)
            assert counts.min() > 0.85 * counts.mean()

    def test_split_depends_on_the_seed(self, scans):
        assert np.array_equal(digit_scenes.split_scans(0)["test"].row, scans["test"].row)
        assert not np.array_equal(digit_scenes.split_scans(1)["test"].row, scans["test"].row)


class TestScenes:
    def test_shapes_ranges_and_types(self, scans):
        images, labels = digit_scenes.compose_scenes(scans["train"], 20, 64, 0)
        assert images.shape == (20, 1, 64, 64)
        assert images.dtype == torch.float32
        assert labels.shape == (20, 64, 64)
        assert labels.dtype == torch.int64
        assert 0 <= images.min() < 0.2
        assert 0.8 < images.max() <= 1
        assert labels.unique().tolist() == list(range(digit_scenes.NUM_CLASSES))
        ink = (labels > 0).float().mean(dim=(1, 2))
        assert ink.min() > 0.02
        assert ink.max() < 0.5

    def test_only_the_given_digits_appear(self, scans):
        threes = scans["test"].digit == 3
        only = digit_scenes.Scans(*(getattr(scans["test"], field)[threes] for field in ("ink", "digit", "row")))
        _, labels = digit_scenes.compose_scenes(only, 10, 64, 0)
        assert labels.unique().tolist() == [0, 1 + 3]

    def test_same_seed_same_scenes(self, scans):
        one, two, other = (digit_scenes.compose_scenes(scans["train"], 3, 64, seed) for seed in (5, 5, 6))
        assert all(map(torch.equal, one, two))
        assert not torch.equal(one[0], other[0])
        assert not torch.equal(one[0][0], one[0][1])

    def test_a_scene_does_not_depend_on_the_number_of_scenes(self, scans):
        few, many = (digit_scenes.compose_scenes(scans["train"], count, 32, (0, 1)) for count in (2, 4))
        assert torch.equal(few[0], many[0][:2])
        assert torch.equal(few[1], many[1][:2])

    def test_small_scenes_still_show_a_digit(self, scans):
        _, labels = digit_scenes.compose_scenes(scans["train"], 10, 32, 0)
        assert (labels > 0).flatten(1).any(dim=1).all()


class TestInk:
    def test_label_is_where_the_pen_covers_half_the_pixel(self):
        # A scene this small has one digit. Here it is a block of ink, dark on the left and faint on the right, so the
        # contrast of the digit is its darkest pixel.
        rng = np.random.default_rng(0)
        for _ in range(20):
            darkness, label = digit_scenes.write_digits(
                rng, single_scan(np.repeat([[1.0, 0.4]], 4, axis=1).repeat(8, axis=0), 7), 23
            )
            assert set(np.unique(label)) == {0, 8}
            contrast = darkness.max()
            assert darkness[label > 0].min() >= 0.5 * contrast - 1e-6
            assert darkness[label == 0].max() <= 0.5 * contrast + 1e-6

    def test_labelled_pixels_are_darker_than_the_paper_around_them(self, scans):
        images, labels = digit_scenes.compose_scenes(scans["train"], 50, 64, 0)
        images = images[:, 0]
        for image, label in zip(images, labels, strict=True):
            assert image[label > 0].mean() < image[label == 0].mean()

    def test_digits_stay_mostly_visible(self, scans):
        # All digits are full blocks of ink, so a block loses visible pixels only to blocks that cover it.
        blocks = digit_scenes.Scans(np.ones((10, 8, 8)), np.arange(10), np.arange(10))
        rng = np.random.default_rng(0)
        for _ in range(20):
            _, label = digit_scenes.write_digits(rng, blocks, 64)
            visible = np.bincount(label[label > 0])
            assert visible[visible > 0].min() > 0.5 * 12**2

    def test_scribble_lies_under_the_ink(self, scans, monkeypatch):
        def scene(scribble):
            monkeypatch.setattr(digit_scenes, "scribble", scribble)
            monkeypatch.setattr(digit_scenes, "paper", lambda rng, size: np.ones((size, size)))
            return digit_scenes.compose_scene(np.random.default_rng(0), scans["train"], 64)

        clean, label = scene(lambda rng, size: np.zeros((size, size)))
        scribbled, label_too = scene(lambda rng, size: np.full((size, size), 0.9))
        assert np.array_equal(label, label_too)
        assert np.array_equal(clean[label > 0], scribbled[label > 0])
        assert scribbled[label == 0].mean() < clean[label == 0].mean() - 0.5

    def test_enlarged_scan_is_smooth_and_in_range(self, scans):
        for scan in scans["train"].ink[:20]:
            ink = digit_scenes.enlarge(scan, 16, 10)
            assert ink.min() >= 0
            assert ink.max() <= 1
            assert np.unique(ink).size > np.unique(scan).size
            assert ink.sum() == pytest.approx(scan.sum() * (16 / 8) ** 2, rel=0.1)
