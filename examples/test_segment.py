import subprocess
import sys
from pathlib import Path

import digit_scenes
import numpy as np
import pytest
import report
import segment
import torch
from PIL import Image

from kornia.losses import lovasz_hinge_loss

TINY = ["--size", "32", "--scenes", "8", "--steps", "2", "--lovasz-steps", "2", "--batch-size", "2", "--device", "cpu"]


def run(capsys, *args):
    segment.main([*TINY, *map(str, args)])
    return capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """Five images of a bright square each, with masks of it: labels 0 and 1."""
    for index in range(5):
        mask = np.zeros((40, 48), np.uint8)
        mask[5 + index : 20 + index, 10:30] = 1
        for kind, pixels in (("images", 60 + 150 * mask), ("masks", mask)):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{index}.png")
    return tmp_path


def table_rows(text):
    """The table's rows as {class: [before, after, without]}."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {name: values for name, *values in rows}


class TestIoU:
    def test_counts_the_data_set_as_a_whole(self):
        labels = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 0, 1]]])
        classes = torch.tensor([[[1, 1, 0, 0]], [[1, 0, 0, 1]]])
        # class 1: 3 in both, 5 in either; class 0: 3 in both, 5 in either
        assert report.iou_per_class(classes, labels, 2).tolist() == pytest.approx([3 / 5, 3 / 5])

    def test_ignored_pixels_do_not_count(self):
        labels = torch.tensor([[[1, 255, 0, 255]]])
        classes = torch.tensor([[[1, 0, 0, 1]]])
        assert report.iou_per_class(classes, labels, 2).tolist() == [1, 1]

    def test_absent_class_is_undefined_and_left_out_of_the_mean(self):
        labels = torch.tensor([[[0, 0, 1, 1]]])
        iou = report.iou_per_class(labels, labels, 3)
        assert iou[2].isnan()
        assert report.score(iou, is_binary=False) == 1

    def test_binary_score_is_the_foreground(self):
        assert report.score(torch.tensor([0.9, 0.3]), is_binary=True) == pytest.approx(0.3)


class TestColours:
    def test_classes_have_their_colours_and_ignored_pixels_are_grey(self):
        labels = torch.tensor([[[0, 2, 1, 255]]])
        outcome = report.Outcome("multiclass", ("a", "b", "c"), labels, {})
        pixels = report.colour_classes(labels, outcome)[0, 0]
        paper, first, second = report.palette(3)
        assert np.array_equal(pixels, [paper, second, first, report.to_rgb(report.IGNORED)])

    @pytest.mark.parametrize("num_classes", [2, 11, 40])
    def test_all_classes_look_different(self, num_classes):
        assert len(np.unique(report.palette(num_classes), axis=0)) == num_classes

    def test_errors_are_told_apart(self):
        labels, classes = torch.tensor([[[0, 0, 1, 1, 255]]]), torch.tensor([[[0, 1, 0, 1, 1]]])
        expected = (report.PAPER, report.WRONG, report.MISSED, report.FOUND, report.IGNORED)
        assert np.array_equal(report.colour_errors(classes, labels)[0, 0], [report.to_rgb(c) for c in expected])


class TestTasks:
    def test_binary_cross_entropy_leaves_out_ignored_pixels(self):
        logits = torch.tensor([[[[2.0, -3.0, 1.0]]]])
        labels = torch.tensor([[[1, 0, 255]]])
        expected = torch.tensor([-2.0, -3.0]).exp().log1p().mean()
        assert torch.allclose(segment.binary_cross_entropy(logits, labels), expected)

    def test_binary_lovasz_leaves_out_ignored_pixels(self):
        logits, labels = torch.tensor([[[[2.0, -3.0, 0.5]]]]), torch.tensor([[[1, 0, 0]]])
        ignored = torch.cat([labels, torch.full_like(labels, 255)], dim=2)
        doubled = torch.cat([logits, logits], dim=3)
        loss = segment.binary_task("ink").lovasz
        assert torch.allclose(loss(doubled, ignored), lovasz_hinge_loss(logits, labels))

    def test_multiclass_lovasz_scores_the_batch_on_the_classes_it_shows(self):
        # Image 0 shows class 0 alone and is right, image 1 shows class 1 alone and is wrong; class 2 never occurs.
        logits = torch.zeros(2, 3, 2, 2)
        logits[:, 0] = 100
        labels = torch.tensor([0, 1]).view(2, 1, 1).expand(2, 2, 2).contiguous()
        loss = segment.multiclass_task(("a", "b", "c")).lovasz(logits, labels)
        # 1 - IoU is 1 - 4/8 for class 0, 1 for class 1
        assert loss.item() == pytest.approx((0.5 + 1) / 2, abs=1e-5)

    def test_decisions(self):
        assert segment.binary_task("ink").decide(torch.tensor([[[[-1.0, 2.0]]]])).tolist() == [[[0, 1]]]
        logits = torch.tensor([0.0, 3.0, 1.0]).view(1, 3, 1, 1)
        assert segment.multiclass_task(("a", "b", "c")).decide(logits).tolist() == [[[1]]]


class TestTraining:
    def test_loss_falls(self):
        torch.manual_seed(0)
        images = torch.rand(8, 1, 4, 4)
        data = segment.Split(images, (images[:, 0] > 0.5).long())
        model = torch.nn.Conv2d(1, 1, 1)
        loss = segment.binary_task("ink").cross_entropy
        values = list(segment.Stage(model, data, loss, steps=200, lr=0.1, batch_size=8, seed=0).run())
        assert len(values) == 200
        assert np.mean(values[-10:]) < 0.5 * np.mean(values[:10])


class TestScenes:
    def test_table_and_picture(self, tmp_path, capsys):
        text = run(capsys, "--out", tmp_path / "new" / "folder")
        rows = table_rows(text)
        assert set(rows) == {"ink", "paper", *"0123456789", "mean"}
        assert all(len(values) == 3 for values in rows.values())
        assert "scenes of held-out digits" in text
        with Image.open(tmp_path / "new" / "folder" / "segmentation.png") as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20

    def test_same_seed_same_numbers(self, tmp_path, capsys):
        one, two, other = (
            table_rows(run(capsys, "--task", "multiclass", "--out", tmp_path, "--seed", seed)) for seed in (3, 3, 4)
        )
        assert one == two
        assert one != other

    def test_splits_share_no_scan(self, monkeypatch):
        used = []

        def spy(scans, count, size, seed):
            used.append(set(scans.row))
            return compose_scenes(scans, count, size, seed)

        compose_scenes = digit_scenes.compose_scenes
        monkeypatch.setattr(digit_scenes, "compose_scenes", spy)
        splits = segment.scene_splits(segment.parse_args(TINY))
        assert {name: len(split.images) for name, split in splits.items()} == {"train": 8, "validation": 1, "test": 2}
        assert len(used) == 3
        assert len(set.union(*used)) == sum(map(len, used))


class TestFolder:
    def test_binary(self, folder, tmp_path, capsys):
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "binary"]
        text = run(capsys, *own, "--out", tmp_path / "out")
        assert set(table_rows(text)) == {"foreground"}
        assert "1 held-out image" in text
        assert (tmp_path / "out" / "segmentation.png").exists()

    def test_multiclass(self, folder, tmp_path, capsys):
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "multiclass", "--num-classes", 4]
        rows = table_rows(run(capsys, *own, "--out", tmp_path / "out"))
        assert set(rows) == {"class 0", "class 1", "class 2", "class 3", "mean"}

    def test_splits_share_no_image(self, folder):
        args = segment.parse_args(
            [*TINY, "--images", str(folder / "images"), "--masks", str(folder / "masks"), "--task", "binary"]
        )
        splits, _ = segment.folder_splits(args)
        assert {name: len(split.images) for name, split in splits.items()} == {"train": 3, "validation": 1, "test": 1}
        together = torch.cat([split.images for split in splits.values()])
        assert len(together.unique(dim=0)) == 5


class TestErrors:
    def test_bad_data_is_one_line_without_a_traceback(self, folder, tmp_path):
        (folder / "masks" / "2.png").unlink()
        script = Path(segment.__file__)
        own = ["--images", folder / "images", "--masks", folder / "masks", "--task", "binary", "--out", tmp_path]
        done = subprocess.run([sys.executable, script, *own], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(folder / "images" / "2.png") in done.stderr

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (["--images", "a"], "--images and --masks"),
            (["--images", "a", "--masks", "b"], "--task binary or --task multiclass"),
            (["--num-classes", "3"], "--num-classes"),
            (["--size", "40"], "multiple of 16"),
            (["--size", "16"], "at least 32"),
            (["--steps", "0"], "at least 1"),
            (["--lr", "-1"], "positive"),
            (["--lr", "nan"], "positive"),
            (["--batch-size", "x"], "at least 1"),
            (["--device", "abacus"], "no device 'abacus'"),
        ],
    )
    def test_bad_options(self, args, message, capsys):
        with pytest.raises(SystemExit) as caught:
            segment.parse_args(args)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
