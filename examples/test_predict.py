"""Tests of predict.py: names, sizes and colours of the masks, and error messages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import predict
import pytest
import torch
from PIL import Image
from segment import Task, build_network

NAMES = {"binary": ("background", "foreground"), "multiclass": ("a", "b", "c")}


def save_model(path, task="binary", **about):
    """Write a model.pt with random weights."""
    torch.manual_seed(0)
    about = {"task": task, "class_names": NAMES.get(task), "channels": 3, "size": 32, "threshold": 0.0} | about
    about = {"tile": False, "palette": None} | about
    network = build_network(Task(about["task"], about["class_names"]), about["channels"])
    torch.save({"weights": network.state_dict()} | about, path)
    return path


class Brightness(torch.nn.Module):
    """A network that predicts foreground where the first channel is bright."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(100.0))

    def forward(self, images):
        return self.scale * (images[:, :1] - 0.5)


def save_images(folder, *shapes):
    """Write images of dark noise with a bright lower right quarter."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index, (height, width) in enumerate(shapes):
        pixels = generator.integers(0, 60, (height, width, 3), np.uint8)
        pixels[height // 2 :, width // 2 :] += 190
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


def run(model, images, out):
    predict.main(["--model", str(model), "--images", str(images), "--out", str(out), "--device", "cpu"])


@pytest.mark.parametrize("task", NAMES)
@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_have_the_names_and_sizes_of_the_images(task, tile, channels, tmp_path):
    images = save_images(tmp_path / "images", (40, 70), (20, 32))
    run(save_model(tmp_path / "model.pt", task, tile=tile, channels=channels), images, tmp_path / "new" / "out")
    masks = {path.name: Image.open(path) for path in (tmp_path / "new" / "out").iterdir()}
    assert {name: mask.size for name, mask in masks.items()} == {"0.png": (70, 40), "1.png": (32, 20)}
    for mask in masks.values():
        assert set(np.unique(np.asarray(mask))) <= set(range(len(NAMES[task])))


@pytest.mark.parametrize("tile", [False, True])
def test_predicted_pixels_are_in_the_right_place(tile, tmp_path, monkeypatch):
    images = save_images(tmp_path / "images", (40, 70))
    monkeypatch.setattr(predict, "build_network", lambda *_: Brightness())
    model = tmp_path / "model.pt"
    about = {"task": "binary", "class_names": NAMES["binary"], "channels": 3, "size": 16, "palette": None}
    torch.save(about | {"weights": Brightness().state_dict(), "threshold": 0.0, "tile": tile}, model)
    run(model, images, tmp_path / "out")
    expected = np.zeros((40, 70))
    expected[20:, 35:] = 1
    wrong = np.asarray(Image.open(tmp_path / "out" / "0.png")) != expected
    # Only scaling to 16 x 16 may change pixels, at the edges of the bright quarter. Tiling may not.
    assert wrong.mean() < 0.05
    assert not (tile and wrong.any())


def test_the_threshold_of_the_model_is_used(tmp_path):
    images = save_images(tmp_path / "images", (32, 32))
    for threshold, expected in ((-1e9, 1), (1e9, 0)):
        run(save_model(tmp_path / "model.pt", threshold=threshold), images, tmp_path / "out")
        assert set(np.asarray(Image.open(tmp_path / "out" / "0.png")).flat) == {expected}


@pytest.mark.parametrize(("palette", "expected"), [(None, (255, 255, 255)), (((1, 2, 3), (40, 50, 60)), (40, 50, 60))])
def test_masks_have_the_colours_of_the_palette(palette, expected, tmp_path):
    images = save_images(tmp_path / "images", (32, 32))
    run(save_model(tmp_path / "model.pt", threshold=-1e9, palette=palette), images, tmp_path / "out")
    assert Image.open(tmp_path / "out" / "0.png").convert("RGB").getpixel((0, 0)) == expected


def test_more_classes_than_a_palette_has(tmp_path, monkeypatch):
    images = save_images(tmp_path / "images", (32, 32))
    model = save_model(tmp_path / "model.pt", "multiclass", class_names=tuple(map(str, range(301))))
    monkeypatch.setattr(predict.Predictor, "classes", lambda *_: np.full((32, 32), 300))
    run(model, images, tmp_path / "out")
    assert set(np.asarray(Image.open(tmp_path / "out" / "0.png")).flat) == {300}


def test_applies_a_model_that_segment_wrote(tmp_path):
    images = save_images(tmp_path / "images", (40, 48), (40, 48), (40, 48))
    (tmp_path / "masks").mkdir()
    for index in range(3):
        Image.fromarray(np.tri(40, 48, dtype=np.uint8)).save(tmp_path / "masks" / f"{index}.png")
    folder = Path(predict.__file__).parent
    training = ["--masks", tmp_path / "masks", "--task", "binary", "--size", 32, "--steps", 2, "--lovasz-steps", 1]
    training = [folder / "segment.py", *training, "--images", images, "--out", tmp_path, "--palette", "0,0,0;1,1,1"]
    applying = [folder / "predict.py", "--model", tmp_path / "binary" / "model.pt"]
    for command in (training, [*applying, "--images", images, "--out", tmp_path / "found"]):
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["0.png", "1.png", "2.png"]


class TestErrors:
    def fails(self, tmp_path, *expected, model=None, images=None):
        with pytest.raises(SystemExit) as caught:
            run(model or save_model(tmp_path / "model.pt"), images or tmp_path / "images", tmp_path / "out")
        for text in expected:
            assert str(text) in caught.value.code
        assert all(line.startswith("predict.py: ") for line in caught.value.code.splitlines())
        assert len(caught.value.code.splitlines()) == 1

    def test_no_model(self, tmp_path):
        self.fails(tmp_path, "No such file", tmp_path / "none.pt", model=tmp_path / "none.pt")

    @pytest.mark.parametrize("content", [{"weights": {}, "threshold": 0.0}, [1], None])
    def test_not_a_model(self, content, tmp_path):
        path = tmp_path / "model.pt"
        torch.save(content, path) if content else path.write_text("not a model")
        self.fails(tmp_path, path, "not a model.pt written by this version", model=path)

    def test_no_images(self, tmp_path):
        self.fails(tmp_path, tmp_path / "images", "no such folder")

    def test_a_broken_image_is_named_and_the_others_are_predicted(self, tmp_path):
        images = save_images(tmp_path / "images", (32, 32), (32, 32))
        (images / "0.png").write_text("not an image")
        self.fails(tmp_path, images / "0.png", "cannot be read")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["1.png"]

    def test_images_are_not_overwritten(self, tmp_path, capsys):
        images = save_images(tmp_path / "images", (32, 32))
        before = (images / "0.png").read_bytes()
        with pytest.raises(SystemExit):
            run(save_model(tmp_path / "model.pt"), images, images)
        assert "--out must not be" in capsys.readouterr().err
        assert (images / "0.png").read_bytes() == before
