"""Tests of the comparison of exact gradients with those of the release: the script, and its committed results."""

import json
import sys

import blue_marble
import exactness
import numpy as np
import pytest
import torch


def test_mirror_image_doubles_what_is_learned_from(monkeypatch):
    image = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    labels = np.where(image[..., 0] > 128, 1, blue_marble.IGNORE).astype(np.uint8)
    monkeypatch.setattr(blue_marble, "earth", lambda: (image, labels))
    learn, known, test, test_labels = exactness.earth(5)
    assert learn.shape == (1, 9, 12, 5)
    assert torch.equal(learn[:, :3, :6], learn[:, :3, 6:].flip(-1))
    assert torch.equal(known[:, :6], known[:, 6:].flip(-1))
    assert test.shape == (1, 9, 6, 3)
    assert test_labels.tolist() == [(labels[:, 5:] == 1).astype(int).tolist()]


def test_gradients_are_compared():
    exact = torch.tensor([2.0, -1.0, 0.0, 1.0, 4.0])
    release = torch.tensor([2.0, 1.0, 3.0, 0.0, 4.0])
    losses = {
        "fork": lambda logits, labels: (exact * logits).sum(),
        "release": lambda logits, labels: (release * logits).sum(),
    }
    found = exactness.compare_gradients(losses, torch.zeros(5, requires_grad=True), torch.zeros(5))
    assert found == {
        "pixels with a gradient": 4,
        "zero in the release": 0.25,
        "wrong sign in the release": 0.25,
        "difference": pytest.approx((2 + 3 + 1) / 8),
    }


def test_runs_from_the_command_line(monkeypatch, tmp_path):
    image = np.random.default_rng(1).integers(0, 255, (10, 20, 3), dtype=np.uint8)
    monkeypatch.setattr(blue_marble, "earth", lambda: (image, (image[..., 2] > 200).astype(np.uint8)))
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--steps=2", "--width=12", f"--out={tmp_path / 'x.json'}"])
    exactness.main()
    results = json.loads((tmp_path / "x.json").read_text())
    assert results["pixels"] == 2 * 10 * 12
    of_release, of_fork = (results["runs"][name][-1] for name in ("release", "fork"))
    assert of_release["step"] == of_fork["step"] == 2
    # So few pixels are counted exactly by both, up to the order of equal errors.
    assert of_fork["loss"] == pytest.approx(of_release["loss"], rel=1e-4)
    assert of_fork["difference"] < 1e-4


def test_committed_results():
    results = json.loads(exactness.RESULTS.read_text())
    assert results["pixels"] > 4096**2
    assert set(results["runs"]) == {"release", "fork"}
    for run in results["runs"].values():
        assert run[-1]["step"] == exactness.STEPS
        assert run[-1]["zero in the release"] > 0.1, "the release must be wrong here, or the trial says nothing"
