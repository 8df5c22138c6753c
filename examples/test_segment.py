"""Tests of segment.py: evaluation, losses, training, interruptions, several processes, and error messages."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import data
import digit_scenes
import numpy as np
import pytest
import report
import segment
import torch
from PIL import Image

from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss

TINY = ["--size", "32", "--scenes", "8", "--steps", "4", "--lovasz-steps", "3", "--batch-size", "2", "--device", "cpu"]
OWN_DATA = ["--images", "a", "--masks", "b", "--task"]
BINARY = segment.Task("binary", ("rest", "ink"))
THREE = segment.Task("multiclass", ("a", "b", "c"))


def run(capsys, *args):
    segment.main([*TINY, *map(str, args)])
    return capsys.readouterr().out


def records(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path):
    """Write five images with a bright rectangle each, and masks where the rectangle has the label 1."""
    for index in range(5):
        mask = np.zeros((40, 48), np.uint8)
        mask[5 + index : 20 + index, 10:30] = 1
        for kind, pixels in (("images", 60 + 150 * mask), ("masks", mask)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{index}.png")
    return tmp_path


class Identity(torch.nn.Module):
    """A network that returns its input as logits."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images


class TestEvaluate:
    def test_counts_pixels_over_the_whole_data_set(self):
        labels = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 0, 1]]])
        classes = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 1]]])
        logits = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
        found = segment.evaluate(Identity(), data.Split(logits, labels), THREE)
        # Classes 0 and 1 each have an intersection of 3 pixels and a union of 5. Class 2 never occurs.
        assert found.iou[:2].tolist() == pytest.approx([3 / 5, 3 / 5])
        assert found.iou[2].isnan()
        assert found.score == pytest.approx(3 / 5)

    @pytest.mark.parametrize("task", [BINARY, THREE])
    def test_ignored_pixels_are_not_counted(self, task):
        labels = torch.tensor([[[1, 255, 0, 255]]])
        classes = torch.tensor([[[1, 0, 0, 1]]])
        logits = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
        logits = 2.0 * classes[:, None] - 1 if task is BINARY else logits
        assert segment.evaluate(Identity(), data.Split(logits, labels), task).score == 1

    def test_binary_score_is_the_foreground_iou_at_the_best_threshold(self):
        generator = torch.Generator().manual_seed(0)
        labels = (torch.rand(70, 4, 4, generator=generator) < 0.2).long()
        logits = torch.randn(70, 1, 4, 4, generator=generator) + labels[:, None] - 1
        found = segment.evaluate(Identity(), data.Split(logits, labels), BINARY)
        expected = []
        for threshold in segment.PROBABILITIES.logit():
            predicted, foreground = logits[:, 0] > threshold, labels == 1
            expected.append(((predicted & foreground).sum() / (predicted | foreground).sum()).item())
        assert found.iou.tolist() == pytest.approx(expected)
        assert found.score == pytest.approx(max(expected))
        predicted = logits[:, 0] > found.threshold
        assert ((predicted & (labels == 1)).sum() / (predicted | (labels == 1)).sum()).item() == pytest.approx(
            found.score
        )


class TestColours:
    def outcome(self, task, names):
        return report.Outcome(task, names, segment.PROBABILITIES, [], [])

    def test_classes_have_the_palette_colours_and_ignored_pixels_are_grey(self):
        labels = torch.tensor([[[0, 2, 1, 255]]])
        pixels = report.colour_classes(labels, self.outcome("multiclass", ("a", "b", "c")))[0, 0]
        paper, first, second = report.palette(3)
        assert np.array_equal(pixels, [paper, second, first, report.to_rgb(report.IGNORED)])

    @pytest.mark.parametrize("num_classes", [2, 11, 40])
    def test_all_classes_have_different_colours(self, num_classes):
        assert len(np.unique(report.palette(num_classes), axis=0)) == num_classes

    def test_each_kind_of_error_has_its_colour(self):
        labels, classes = torch.tensor([[[0, 0, 1, 1, 255]]]), torch.tensor([[[0, 1, 0, 1, 1]]])
        expected = (report.PAPER, report.WRONG, report.MISSED, report.FOUND, report.IGNORED)
        assert np.array_equal(report.colour_errors(classes, labels)[0, 0], [report.to_rgb(c) for c in expected])


class TestLosses:
    def test_binary_cross_entropy_leaves_out_ignored_pixels(self):
        logits = torch.tensor([[[[2.0, -3.0, 1.0]]]])
        labels = torch.tensor([[[1, 0, 255]]])
        expected = torch.tensor([-2.0, -3.0]).exp().log1p().mean()
        assert torch.allclose(segment.cross_entropy(BINARY)(logits, labels), expected)

    @pytest.mark.parametrize(("hinge", "loss"), [(False, lovasz_sigmoid_loss), (True, lovasz_hinge_loss)])
    def test_binary_lovasz_leaves_out_ignored_pixels(self, hinge, loss):
        logits, labels = torch.tensor([[[[2.0, -3.0, 0.5]]]]), torch.tensor([[[1, 0, 0]]])
        ignored = torch.cat([labels, torch.full_like(labels, 255)], dim=2)
        doubled = torch.cat([logits, logits], dim=3)
        assert torch.allclose(segment.lovasz(BINARY, hinge=hinge)(doubled, ignored), loss(logits, labels))

    def test_lovasz_scores_the_whole_batch_and_the_classes_present(self):
        # Class 0 is predicted everywhere. Image 0 is all class 0, image 1 is all class 1, and class 2 never occurs.
        logits = torch.zeros(2, 3, 2, 2)
        logits[:, 0] = 100
        labels = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 2, 2).contiguous()
        # 1 - IoU is 1 - 4/8 for class 0, and 1 for class 1.
        assert segment.lovasz(THREE)(logits, labels).item() == pytest.approx((0.5 + 1) / 2, abs=1e-5)

    def test_options_reach_the_loss(self):
        generator = torch.Generator().manual_seed(0)
        logits, labels = torch.randn(2, 3, 4, 4, generator=generator), torch.zeros(2, 4, 4, dtype=torch.long)
        loss = segment.lovasz(THREE, per_image=True, classes="all")
        assert torch.equal(loss(logits, labels), lovasz_softmax_loss(logits, labels, classes="all"))

    def test_mixed_is_the_weighted_mean(self):
        logits, labels = torch.zeros(1, 1, 1, 2), torch.tensor([[[1, 0]]])
        value = segment.mixed(lambda *_: torch.tensor(2.0), lambda *_: torch.tensor(10.0), 0.75)(logits, labels)
        assert value.item() == pytest.approx(0.75 * 2 + 0.25 * 10)

    def test_decide_uses_threshold_or_argmax(self):
        logits = torch.tensor([[[[-1.0, 2.0, 0.5]]]])
        assert BINARY.decide(logits).tolist() == [[[0, 1, 1]]]
        assert BINARY.decide(logits, threshold=1.0).tolist() == [[[0, 1, 0]]]
        assert THREE.decide(torch.tensor([0.0, 3.0, 1.0]).view(1, 3, 1, 1)).tolist() == [[[1]]]


class TestTraining:
    def test_loss_falls(self):
        torch.manual_seed(0)
        images = torch.rand(8, 1, 4, 4)
        split = data.Split(images, (images[:, 0] > 0.5).long())
        loss = segment.cross_entropy(BINARY)
        stage = segment.Stage(torch.nn.Conv2d(1, 1, 1), split, loss, steps=200, lr=0.1, batch_size=8, seed=0)
        values = [stage.step().item() for _ in range(200)]
        assert np.mean(values[-10:]) < 0.5 * np.mean(values[:10])

    def test_amp_is_used_in_the_network_but_not_in_the_loss(self):
        dtypes = []
        model = torch.nn.Conv2d(1, 1, 1)
        model.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))

        def loss(logits, _labels):
            dtypes.append(logits.dtype)
            return logits.mean()

        split = data.Split(torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.long))
        segment.Stage(model, split, loss, steps=2, lr=0.1, batch_size=1, seed=0, amp=True).step()
        assert dtypes == [torch.bfloat16, torch.float32]

    @pytest.mark.parametrize("steps", [*range(1, 12), 40])
    def test_learning_rate_rises_and_falls_for_any_number_of_steps(self, steps):
        split = data.Split(torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.long))
        model, loss = torch.nn.Conv2d(1, 1, 1), segment.cross_entropy(BINARY)
        stage = segment.Stage(model, split, loss, steps=steps, lr=0.1, batch_size=1, seed=0)
        rates = []
        for _ in range(steps):
            rates.append(stage.optimizer.param_groups[0]["lr"])
            stage.step()
        assert max(rates) <= 0.1 + 1e-9
        assert rates[-1] < 0.01
        if steps >= 5:
            assert 0 < rates.index(max(rates)) <= steps / 2
            assert max(rates) > 0.05

    def test_each_stage_ends_with_its_best_weights(self, monkeypatch):
        """The validation score is best at step 2 of stage 1, and at step 1 of stages 2 and 3."""
        scores = iter([0.1, 0.4, 0.2, 0.6, 0.5, 0.3, 0.9, 0.8, 0.7])
        weights = []

        def evaluate(model, *_):
            weights.append(model.weight.item())
            return segment.Evaluation(torch.zeros(()), next(scores), 0.0)

        monkeypatch.setattr(segment, "evaluate", evaluate)
        split = data.Split(torch.rand(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.long))
        model, loss = torch.nn.Conv2d(1, 1, 1), segment.cross_entropy(BINARY)
        stages = [segment.Stage(model, split, loss, steps=3, lr=0.1, batch_size=1, seed=0) for _ in range(3)]
        in_training = segment.Run(model, stages, {"validation": split}, BINARY)
        after = [model.weight.item() for _ in in_training.advance(validate_every=1)]
        assert [best["score"] for best in in_training.best] == [0.4, 0.6, 0.9]
        assert [best["weights"]["weight"].item() for best in in_training.best] == [weights[1], weights[3], weights[6]]
        assert (after[2], after[5], after[8]) == (weights[1], weights[3], weights[6])
        # Stages 2 and 3 start from the best weights of stage 1 and see the same batches, so their weights are equal.
        assert len(set(weights)) == 6
        assert weights[6:] == weights[3:6]
        assert [record["step"] for record in in_training.history] == [1, 2, 3, 4, 5, 6, 4, 5, 6]

    def test_a_nan_loss_stops_the_program(self, monkeypatch, tmp_path):
        monkeypatch.setattr(segment, "cross_entropy", lambda _: lambda logits, _: logits.sum() * float("nan"))
        with pytest.raises(SystemExit, match="stage 1, step 1: the loss is nan; a smaller learning rate"):
            segment.main([*TINY, "--out", str(tmp_path)])


def same_results(one, two):
    for name in ("results.csv", "history.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    models = [torch.load(folder / "model.pt") for folder in (one, two)]
    assert models[0]["threshold"] == models[1]["threshold"]
    for name, weight in models[0]["weights"].items():
        assert torch.equal(weight, models[1]["weights"][name]), name


class TestInterruption:
    """A run that is stopped by a signal and continued has the results of a run that was never stopped."""

    def interrupt_at(self, monkeypatch, step):
        steps = 0
        original = segment.Stage.step

        def stepping(stage):
            nonlocal steps
            steps += 1
            value = original(stage)
            if steps == step:
                os.kill(os.getpid(), signal.SIGINT)
            return value

        monkeypatch.setattr(segment.Stage, "step", stepping)

    # Step 1 is in the first stage between validations, step 6 is in the second stage at a validation.
    @pytest.mark.parametrize("step", [1, 6])
    def test_a_continued_run_has_the_same_results(self, step, tmp_path, monkeypatch, capsys):
        options = ("--task", "binary", "--validate-every", 2)
        run(capsys, *options, "--out", tmp_path / "uninterrupted")
        before = signal.getsignal(signal.SIGINT)
        with monkeypatch.context() as patch:
            self.interrupt_at(patch, step)
            with pytest.raises(SystemExit) as caught:
                run(capsys, *options, "--out", tmp_path / "interrupted")
        assert caught.value.code == 130
        assert signal.getsignal(signal.SIGINT) == before
        run(capsys, *options, "--out", tmp_path / "interrupted")
        same_results(tmp_path / "uninterrupted" / "binary", tmp_path / "interrupted" / "binary")
        assert not (tmp_path / "interrupted" / "binary" / "checkpoint.pt").exists()

    def test_a_finished_task_is_not_trained_again(self, tmp_path, monkeypatch, capsys):
        run(capsys, "--out", tmp_path / "uninterrupted")
        with monkeypatch.context() as patch:
            self.interrupt_at(patch, 13)
            with pytest.raises(SystemExit):
                run(capsys, "--out", tmp_path / "interrupted")
        steps = []
        original = segment.Stage.step
        monkeypatch.setattr(segment.Stage, "step", lambda stage: steps.append(1) or original(stage))
        run(capsys, "--out", tmp_path / "interrupted")
        assert len(steps) == 7
        for task in ("binary", "multiclass"):
            same_results(tmp_path / "uninterrupted" / task, tmp_path / "interrupted" / task)

    def test_other_options_are_refused_without_restart(self, tmp_path, monkeypatch, capsys):
        with monkeypatch.context() as patch:
            self.interrupt_at(patch, 2)
            with pytest.raises(SystemExit):
                run(capsys, "--task", "binary", "--out", tmp_path)
        other = ("--task", "binary", "--out", tmp_path, "--lr", 0.5, "--seed", 2)
        with pytest.raises(SystemExit) as caught:
            run(capsys, *other)
        assert "interrupted run with another lr and seed" in caught.value.code
        run(capsys, *other, "--restart")
        assert len(records(tmp_path / "binary" / "history.csv")) == 3


def torchrun(script, *args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(segment.__file__).parent)}
    return subprocess.run(
        [*map(str, command), *TINY, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """Run both tasks under torchrun with two processes. Returns the printed text and the folder of results."""
    folder = tmp_path_factory.mktemp("torchrun")
    done = torchrun(segment.__file__, "--out", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


class TestProcesses:
    def test_only_one_process_reports(self, shared_run):
        text, _ = shared_run
        assert text.count("IoU on 2 test images") == 2

    @pytest.mark.parametrize("task", ["binary", "multiclass"])
    def test_pixels_of_all_processes_are_counted(self, task, shared_run):
        _, folder = shared_run
        results = same_model_in_one_process(folder / task, task)
        for record in records(folder / task / "results.csv")[-1:]:
            for split, expected in results.items():
                assert float(record[f"{split}_iou"]) == pytest.approx(expected)


def same_model_in_one_process(folder, task):
    """Evaluate the saved model in this process: the IoU values that the last row of results.csv must have."""
    ((_, splits),) = segment.jobs(segment.parse_args(segment.__doc__, [*TINY, "--task", task]))
    job = BINARY if task == "binary" else segment.Task(task, digit_scenes.CLASS_NAMES)
    model, saved = segment.build_network(job, 1), torch.load(folder / "model.pt")
    model.load_state_dict(saved["weights"])
    place = int((segment.PROBABILITIES.logit() - saved["threshold"]).abs().argmin())
    found = {split: segment.evaluate(model, splits[split], job) for split in ("validation", "test")}
    return {split: float(e.iou[place]) if task == "binary" else e.score for split, e in found.items()}


class TestScenes:
    def test_results(self, tmp_path, capsys):
        text = run(capsys, "--out", tmp_path / "new" / "folder")
        assert text.count("IoU on 2 test images") == 2
        assert text.count("Only 2 test images") == 2
        binary, multiclass = (tmp_path / "new" / "folder" / task for task in ("binary", "multiclass"))
        results = records(binary / "results.csv")
        assert [record["after"] for record in results] == ["cross-entropy"] * 2 + ["more cross-entropy"] * 2 + [
            "Lovász"
        ] * 2
        assert results[0]["threshold"] == results[2]["threshold"] == "0.50"
        classes = ["paper", *"0123456789", "mean"]
        assert [record["class"] for record in records(multiclass / "results.csv")] == classes * 3
        for path, rates in ((binary, ["0.003", "0.001"]), (multiclass, ["0.01", "0.003"])):
            settings = json.loads((path / "settings.json").read_text())
            assert [settings["lr"], settings["lovasz_lr"]] == rates
            assert [record["step"] for record in records(path / "history.csv")] == ["4", "7", "7"]
            names = ["curves", "predictions"] + ["thresholds"] * (path is binary)
            for name in names:
                with Image.open(path / f"{name}.png") as picture:
                    pixels = np.asarray(picture.convert("RGB"))
                assert min(pixels.shape[:2]) > 300
                assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20

    @pytest.mark.parametrize("task", ["binary", "multiclass"])
    def test_headings_and_legends_name_the_mixture(self, task, tmp_path, monkeypatch, capsys):
        labels = []
        draw = report.finish

        def spy(figure, path):
            axes = figure.axes
            labels.extend(text for axis in axes for text in axis.get_legend_handles_labels()[1])
            labels.extend(axis.get_ylabel() for axis in axes if "IoU" in axis.get_ylabel())
            draw(figure, path)

        monkeypatch.setattr(report, "finish", spy)
        monkeypatch.setenv("COLUMNS", "120")
        printed = run(capsys, "--task", task, "--out", tmp_path, "--mix", 0.5)
        after = {record["after"] for record in records(tmp_path / task / "results.csv")}
        mixture = "cross-entropy + Lovász"
        assert after == {"cross-entropy", "more cross-entropy", mixture}
        texts = [*labels, *printed.splitlines()]
        assert sum(mixture in text for text in texts) >= 3
        assert not [text for text in texts if "Lovász" in text.replace(mixture, "")]

    @pytest.mark.parametrize(
        ("mix", "last"), [(0, "Lovász"), (0.3, "cross-entropy + Lovász"), (1, "more cross-entropy")]
    )
    def test_names_of_stages(self, mix, last):
        assert report.stage_names(mix) == ("cross-entropy", "more cross-entropy", last)

    def test_no_warnings_about_thresholds_between_the_progress_bars(self, tmp_path, monkeypatch, recwarn, capsys):
        monkeypatch.setattr(segment, "PROBABILITIES", torch.tensor([0.998, 0.999], dtype=torch.float64))
        run(capsys, "--task", "binary", "--out", tmp_path)
        assert not [warning for warning in recwarn if "thresholds" in str(warning.message)]

    def test_results_depend_only_on_the_seed(self, tmp_path, capsys):
        found = []
        for place, seed in enumerate((3, 3, 4)):
            run(capsys, "--task", "multiclass", "--out", tmp_path / str(place), "--seed", seed)
            found.append((tmp_path / str(place) / "multiclass" / "history.csv").read_text())
        assert found[0] == found[1]
        assert found[0] != found[2]

    def test_splits_share_no_scan(self, monkeypatch):
        used = []

        def spy(scans, count, size, seed):
            used.append(set(scans.row))
            return compose_scenes(scans, count, size, seed)

        compose_scenes = digit_scenes.compose_scenes
        monkeypatch.setattr(digit_scenes, "compose_scenes", spy)
        splits = data.scene_splits((8, 1, 2), 32, 0)
        assert {name: len(split.images) for name, split in splits.items()} == {"train": 8, "validation": 1, "test": 2}
        assert len(used) == 3
        assert len(set.union(*used)) == sum(map(len, used))


class TestFolder:
    def test_binary(self, folder, tmp_path, capsys):
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "binary"]
        text = run(capsys, *own, "--out", tmp_path / "out")
        assert "1 test image" in text
        assert {record["class"] for record in records(tmp_path / "out" / "binary" / "results.csv")} == {"foreground"}

    def test_multiclass(self, folder, tmp_path, capsys):
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "multiclass", "--num-classes", 4]
        run(capsys, *own, "--out", tmp_path / "out")
        results = records(tmp_path / "out" / "multiclass" / "results.csv")
        assert [record["class"] for record in results] == ["class 0", "class 1", "class 2", "class 3", "mean"] * 3

    def test_tiles(self, folder, tmp_path, capsys):
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "binary", "--tile"]
        assert "IoU on 1 test images" in run(capsys, *own, "--out", tmp_path / "out")
        saved = torch.load(tmp_path / "out" / "binary" / "model.pt")
        assert (saved["tile"], saved["size"]) == (True, 32)

    def test_tiles_of_one_image_are_in_one_split(self, folder):
        for index in range(5):
            Image.fromarray(np.full((40, 48), 50 * index, np.uint8)).save(folder / "images" / f"{index}.png")
        splits, _ = data.folder_splits(
            folder / "images",
            folder / "masks",
            size=16,
            binary=True,
            num_classes=None,
            mask_suffix="",
            seed=0,
            tile=True,
        )
        shades = {name: set(split.images.amax((1, 2, 3)).tolist()) for name, split in splits.items()}
        assert [len(split_shades) for split_shades in shades.values()] == [3, 1, 1]
        assert len(set.union(*shades.values())) == 5
        assert [len(split.images) for split in splits.values()] == [27, 9, 9]
        assert [split.files for split in splits.values()] == [3, 1, 1]

    def test_colour_masks(self, folder, tmp_path, capsys):
        for path in (folder / "masks").iterdir():
            Image.fromarray(np.asarray(Image.open(path))[..., None] * np.uint8([9, 0, 200])).save(path)
        colours = tmp_path / "colours.json"
        colours.write_text("[[0, 0, 0], [9, 0, 200]]")
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "multiclass"]
        run(capsys, *own, "--palette", colours, "--out", tmp_path / "out")
        results = records(tmp_path / "out" / "multiclass" / "results.csv")
        assert [record["class"] for record in results] == ["class 0", "class 1", "mean"] * 3

    def test_splits_share_no_image(self, folder):
        splits, _ = data.folder_splits(
            folder / "images", folder / "masks", size=32, binary=True, num_classes=None, mask_suffix="", seed=0
        )
        assert {name: len(split.images) for name, split in splits.items()} == {"train": 3, "validation": 1, "test": 1}
        together = torch.cat([split.images for split in splits.values()])
        assert len(together.unique(dim=0)) == 5


class TestErrors:
    def test_bad_data_gives_one_line_without_a_traceback(self, folder, tmp_path):
        (folder / "masks" / "2.png").unlink()
        script = Path(segment.__file__)
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "binary", "--out", tmp_path]
        done = subprocess.run([sys.executable, script, *own], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(folder / "images" / "2.png") in done.stderr

    def test_a_missing_package_is_named_with_the_install_command(self, tmp_path):
        script = shutil.copy(segment.__file__, tmp_path)
        (tmp_path / "digit_scenes.py").write_text("import a_package_that_is_missing\n")
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1
        assert "a_package_that_is_missing is missing" in done.stderr
        assert "pip install --group examples" in done.stderr

    def test_ctrl_c_during_the_imports_shows_no_traceback(self, tmp_path):
        script = shutil.copy(segment.__file__, tmp_path)
        (tmp_path / "digit_scenes.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
        done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--images", "a"], "--images and --masks"),
            (["--images", "a", "--masks", "b"], "--task binary or --task multiclass"),
            (["--num-classes", "3"], "--num-classes"),
            (["--tile"], "your own data"),
            (["--palette", "0,0,0;1,1,1"], "your own data"),
            ([*OWN_DATA, "multiclass", "--palette", "0,0,0;1,1,1", "--num-classes", "2"], "leave out --num-classes"),
            ([*OWN_DATA, "binary", "--palette", "0,0,0;1,1,1;2,2,2"], "3 colours, but --task binary has two"),
            (["--palette", "no.json"], "no.json cannot be read"),
            (["--palette", "0,0,0"], "2 to 255 different colours"),
            (["--palette", "0,0,0;0,0,0"], "2 to 255 different colours"),
            (["--palette", "0,0,0;0,0,256"], "from 0 to 255"),
            (["--palette", "0,0,0;1,1"], "three numbers"),
            (["--palette", "red;blue"], "such as '0,0,0;255,0,0'"),
            (["--size", "40"], "multiple of 16"),
            (["--size", "16"], "at least 32"),
            (["--steps", "0"], "at least 1"),
            (["--lr", "-1"], "positive"),
            (["--lr", "nan"], "positive"),
            (["--mix", "1.5"], "from 0 to 1"),
            (["--batch-size", "x"], "at least 1"),
            (["--device", "abacus"], "no device 'abacus'"),
        ],
    )
    def test_bad_options(self, args, message, capsys):
        with pytest.raises(SystemExit) as caught:
            segment.parse_args(segment.__doc__, args)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err

    def test_batch_size_must_be_divisible_by_the_number_of_processes(self, monkeypatch, capsys):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit):
            segment.parse_args(segment.__doc__, ["--batch-size", "3"])
        assert "--batch-size 3 cannot be shared equally by 2 processes" in capsys.readouterr().err
