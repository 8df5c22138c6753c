"""Tests of the demo: it runs with a few images and steps, and prints and draws the results."""

import demo
import evidence
import numpy as np
import pytest
import report
import torch
from data import Split
from PIL import Image
from rich.console import Console


@pytest.fixture
def few_images(monkeypatch):
    """Limit the data to a few images of the usual size."""
    monkeypatch.setitem(evidence.SETTINGS, "scenes", [16, 8, 8])
    evidence.task_data.cache_clear()
    yield
    evidence.task_data.cache_clear()


@pytest.mark.usefixtures("few_images")
def test_prints_and_draws_results_of_both(tmp_path, capsys):
    demo.main(["--steps", str(demo.VALIDATIONS), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in demo.ARMS.values():
        assert name in printed
    assert f"After {demo.VALIDATIONS} steps, cross-entropy + Lovász has an IoU of" in printed
    assert "This is one seed." in printed
    for name in ("curves.png", "lakes.png"):
        with Image.open(tmp_path / name) as picture:
            assert np.asarray(picture).std() > 0


@pytest.mark.usefixtures("few_images")
def test_both_start_from_the_same_weights_and_see_the_same_batches():
    """With the same loss and learning rate, two trainings have the same results."""
    messages = []
    queue = type("Queue", (), {"put": staticmethod(messages.append)})
    for _ in range(2):
        demo.train("ce", demo.VALIDATIONS, 1, 1e-3, queue)
    first, second = (message for _, message in messages if isinstance(message, tuple))
    assert first[0] == second[0]
    assert np.array_equal(first[2], second[2])


def test_table_uses_the_best_threshold_on_validation():
    labels = torch.tensor([[[1, 1, 0, 0, 255]]])
    logits = torch.tensor([-0.5, -0.6, -2.0, -3.0, 9.0]).view(1, 1, 1, 5)  # correct at a threshold between -2 and -0.6
    outcome = demo.Outcome([(1, 0.0)], logits, logits)
    split = Split(torch.zeros(1, 3, 1, 5), labels)
    shown, best = demo.table(dict.fromkeys(demo.ARMS, outcome), {"validation": split, "test": split})
    assert best == dict.fromkeys(demo.ARMS, 1.0)
    console = Console(width=120, record=True)
    console.print(shown)
    assert console.export_text().count(report.percent(0.0)) >= len(demo.ARMS)  # the IoU at 0.5


def test_learning_rates_are_those_that_evidence_found():
    scores = evidence.scores_by_rate(evidence.read(evidence.RESULTS / "search.jsonl"))
    assert demo.RATES == {arm: evidence.best_rate(scores[demo.TASK, arm]) for arm in demo.ARMS}


def test_too_few_steps(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "3"])
    assert "--steps must be at least 15" in capsys.readouterr().err
