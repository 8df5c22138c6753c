"""Tests of reading your own images and masks: pairing, labels, colours, tiles and error messages."""

import numpy as np
import pytest
import torch
from folder_data import DataError, read_folder, stitch, to_squares
from PIL import Image


def save(path, pixels, **options):
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.asarray(pixels)).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Write three RGB images of 6 x 4 pixels, and masks with label 0 in the left half and 1 in the right half."""
    mask = np.zeros((4, 6), np.uint8)
    mask[:, 3:] = 1
    for index, stem in enumerate("abc"):
        save(tmp_path / "images" / f"{stem}.png", np.full((4, 6, 3), 51 * index, np.uint8))
        save(tmp_path / "masks" / f"{stem}.png", mask)
    return tmp_path


def read(folder, **options):
    options = {"size": 4, "binary": True} | options
    return read_folder(folder / "images", folder / "masks", **options)


def write_masks(folder, *values):
    """Replace the masks by one for each value, with zeros in the first row and the value in the others."""
    for stem, value in zip("abc", values, strict=True):
        mask = np.full((4, 6), value, np.uint8)
        mask[0] = 0
        save(folder / "masks" / f"{stem}.png", mask)


class TestReading:
    def test_pairs_sizes_and_values(self, folder):
        data = read(folder)
        assert data.stems == ("a", "b", "c")
        assert data.images.shape == (3, 3, 4, 4)
        assert data.images.dtype == torch.float32
        assert torch.allclose(data.images, torch.tensor([0, 0.2, 0.4]).view(3, 1, 1, 1).expand_as(data.images))
        assert data.labels.dtype == torch.int64
        assert torch.equal(data.labels, torch.tensor([0, 0, 1, 1]).expand(3, 4, 4))

    def test_scaling_adds_no_labels(self, folder):
        write_masks(folder, 4, 4, 4)
        assert set(read(folder, binary=False, size=32).labels.unique().tolist()) == {0, 4}

    def test_extensions_may_differ(self, folder):
        (folder / "images" / "a.png").unlink()
        save(folder / "images" / "a.jpg", np.full((4, 6), 255, np.uint8))
        assert read(folder).images[0].min() > 0.98

    def test_sixteen_bit_grey_keeps_its_range(self, folder):
        save(folder / "images" / "a.png", np.full((4, 6), 32768, np.uint16))
        assert torch.allclose(read(folder).images[0], torch.tensor(0.5), atol=1e-3)

    def test_palette_mask_gives_indices(self, folder):
        mask = Image.fromarray(np.full((4, 6), 2, np.uint8)).convert("P")
        mask.putpalette([0, 0, 0, 255, 255, 255, 200, 10, 10])
        mask.putdata([2] * 24)
        mask.save(folder / "masks" / "a.png")
        assert read(folder, binary=False).labels[0].unique().tolist() == [2]

    def test_masks_without_an_image_are_skipped(self, folder):
        save(folder / "masks" / "unused.png", np.zeros((1, 1), np.uint8))
        assert read(folder).stems == ("a", "b", "c")

    @pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", ".DS_Store", "notes.txt"])
    def test_other_files_are_skipped(self, name, folder):
        for place in ("images", "masks"):
            (folder / place / name).write_text("not an image")
        assert read(folder).stems == ("a", "b", "c")

    def test_mask_suffix(self, folder):
        for path in list((folder / "masks").iterdir()):
            path.rename(path.with_stem(path.stem + "_mask"))
        assert read(folder, mask_suffix="_mask").stems == ("a", "b", "c")


class TestColours:
    PALETTE = ((0, 0, 0), (255, 0, 0), (0, 0, 255))

    @pytest.mark.parametrize("channels", [3, 4])
    def test_colours_become_the_classes_of_the_palette(self, folder, channels):
        pixels = np.zeros((4, 6, channels), np.uint8)
        pixels[:2, :, 2] = 255
        for stem in "abc":
            save(folder / "masks" / f"{stem}.png", pixels)
        data = read(folder, binary=False, palette=self.PALETTE)
        assert data.num_classes == 3
        assert torch.equal(data.labels[0], torch.tensor([2, 2, 0, 0]).view(4, 1).expand(4, 4))

    def test_with_a_palette_the_colours_of_a_palette_image_count(self, folder):
        for stem in "abc":
            mask = Image.fromarray(np.tile(np.uint8([[0, 0, 0, 1, 1, 1]]), (4, 1)))
            mask.putpalette([255, 0, 0, 0, 0, 0])
            mask.save(folder / "masks" / f"{stem}.png")
        assert read(folder, palette=self.PALETTE[:2]).labels[0, 0].tolist() == [1, 1, 0, 0]


class TestTiles:
    def test_a_pair_is_cut_and_padded(self, folder):
        data = read(folder, tile=True)
        assert data.sources.tolist() == [0, 0, 1, 1, 2, 2]
        assert data.labels[0].unique(dim=0).tolist() == [[0, 0, 0, 1]]
        assert data.labels[1].unique(dim=0).tolist() == [[1, 1, 255, 255]]
        assert torch.allclose(data.images[5, :, :, :2], torch.tensor(0.4))
        assert not data.images[5, :, :, 2:].any()

    def test_tiles_with_only_ignored_pixels_are_left_out(self, folder):
        mask = np.full((4, 6), 255, np.uint8)
        mask[:, 5] = 1
        save(folder / "masks" / "b.png", mask)
        data = read(folder, tile=True)
        assert data.sources.tolist() == [0, 0, 1, 2, 2]
        assert data.labels[2, 0].tolist() == [255, 1, 255, 255]
        assert data.images[2, 0, 0].tolist() == pytest.approx([0.2, 0.2, 0, 0])

    @pytest.mark.parametrize("shape", [(7, 9), (8, 4), (3, 2)])
    def test_stitch_undoes_tiling(self, shape):
        pixels = np.arange(shape[0] * shape[1]).reshape(shape)
        assert np.array_equal(stitch(to_squares(pixels, 4, tile=True, smooth=False), *shape), pixels)


class TestLabels:
    def test_255_is_foreground_if_no_mask_has_1(self, folder):
        write_masks(folder, 0, 255, 255)
        assert read(folder).labels.unique().tolist() == [0, 1]

    def test_255_is_ignored_if_a_mask_has_1(self, folder):
        write_masks(folder, 1, 255, 0)
        labels = read(folder).labels
        assert [label.unique().tolist() for label in labels] == [[0, 1], [0, 255], [0]]

    def test_number_of_classes_is_inferred(self, folder):
        write_masks(folder, 3, 255, 5)
        data = read(folder, binary=False)
        assert data.num_classes == 6
        assert data.labels.unique().tolist() == [0, 3, 5, 255]

    def test_number_of_classes_can_be_given(self, folder):
        assert read(folder, binary=False, num_classes=9).num_classes == 9

    def test_many_unused_classes_are_accepted_if_the_number_is_given(self, folder):
        write_masks(folder, 100, 200, 200)
        assert read(folder, binary=False, num_classes=201).num_classes == 201

    def test_a_jpeg_of_pure_black_and_white_is_accepted(self, folder):
        (folder / "masks" / "a.png").unlink()
        save(folder / "masks" / "a.jpg", np.full((4, 6), 255, np.uint8))
        other_mask = np.repeat(np.uint8([[0] * 6, [255] * 6]), 2, axis=0)
        for stem in "bc":
            save(folder / "masks" / f"{stem}.png", other_mask)
        assert read(folder).labels[0].unique().tolist() == [1]


class TestErrors:
    """Every error message has one line for each unusable file, which names the file."""

    def fails(self, folder, *expected, lines=1, **options):
        with pytest.raises(DataError) as caught:
            read(folder, **options)
        message = str(caught.value)
        assert len(message.splitlines()) == lines
        for text in expected:
            assert str(text) in message

    def test_no_folder(self, tmp_path):
        self.fails(tmp_path, tmp_path / "images", "no such folder")

    def test_empty_folder(self, folder):
        for path in (folder / "images").iterdir():
            path.unlink()
        self.fails(folder, folder / "images", "empty")

    def test_too_few_pairs(self, folder):
        (folder / "images" / "a.png").unlink()
        self.fails(folder, folder / "images", "2 images", "at least 3")

    def test_missing_mask(self, folder):
        (folder / "masks" / "b.png").unlink()
        self.fails(folder, folder / "images" / "b.png", "no mask", folder / "masks")

    def test_two_files_of_one_name(self, folder):
        save(folder / "images" / "b.jpg", np.zeros((4, 6), np.uint8))
        self.fails(folder, folder / "images" / "b.png", "b.jpg")

    def test_sizes_differ(self, folder):
        save(folder / "masks" / "b.png", np.zeros((6, 4), np.uint8))
        self.fails(folder, folder / "masks" / "b.png", "4x6", folder / "images" / "b.png", "6x4")

    @pytest.mark.parametrize("place", ["images", "masks"])
    def test_not_an_image(self, folder, place):
        (folder / place / "b.png").write_text("not an image")
        self.fails(folder, folder / place / "b.png", "cannot be read")

    def test_truncated_image(self, folder):
        path = folder / "images" / "b.png"
        save(path, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
        path.write_bytes(path.read_bytes()[:2000])
        self.fails(folder, path, "cannot be read")

    def test_colour_mask(self, folder):
        save(folder / "masks" / "b.png", np.zeros((4, 6, 3), np.uint8))
        self.fails(folder, folder / "masks" / "b.png", "RGB", "one channel", "--palette")

    def test_colour_missing_from_the_palette(self, folder):
        pixels = np.zeros((4, 6, 3), np.uint8)
        save(folder / "masks" / "a.png", pixels)
        save(folder / "masks" / "b.png", pixels + np.uint8([0, 7, 9]))
        palette = ((0, 0, 0), (1, 1, 1))
        self.fails(folder, folder / "masks" / "b.png", "colour 0,7,9", "--palette", palette=palette)

    @pytest.mark.parametrize("options", [{}, {"binary": False}, {"palette": ((0, 0, 0), (255, 0, 0))}])
    def test_a_jpeg_with_blurred_labels(self, folder, options):
        mask = np.zeros((4, 6), np.uint8)
        mask[1:3, 2:5] = 255 if options == {} else 9
        (folder / "masks" / "b.png").unlink()
        for stem in "ac" if "palette" in options else "":
            save(folder / "masks" / f"{stem}.png", np.zeros((4, 6, 3), np.uint8))
        save(folder / "masks" / "b.jpg", mask)
        self.fails(folder, folder / "masks" / "b.jpg", "JPEG blurs labels", "save masks as PNG", **options)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_grey_values_instead_of_classes(self, folder, dtype):
        for stem, value in zip("abc", (100, 200, 100)):
            save(folder / "masks" / f"{stem}.png", np.repeat(np.array([[0] * 6, [value] * 6], dtype), 2, axis=0))
        self.fails(
            folder, folder / "masks", "labels 0, 100, 200", "201 classes", "renumber", "--num-classes 201", binary=False
        )

    def test_wrong_labels_and_wrong_sizes_are_reported_together(self, folder):
        write_masks(folder, 1, 7, 100)
        save(folder / "masks" / "a.png", np.ones((6, 4), np.uint8))
        self.fails(folder, "a.png: the mask is 4x6", "b.png: the mask has the label 7", "c.png: ", lines=3)
        self.fails(folder, "labels 0, 1, 7, 100", "a.png: the mask is 4x6", lines=2, binary=False)

    def test_wrong_size_and_type_of_a_mask_are_both_reported(self, folder):
        save(folder / "masks" / "b.png", np.zeros((6, 4, 3), np.uint8))
        self.fails(folder, "b.png: the mask is 4x6", "b.png: the mask has the pixel type RGB", lines=2)

    def test_binary_label_out_of_range(self, folder):
        write_masks(folder, 1, 2, 1)
        self.fails(folder, folder / "masks" / "b.png", "label 2", "0 and 1")

    def test_class_out_of_range(self, folder):
        write_masks(folder, 1, 7, 1)
        self.fails(folder, folder / "masks" / "b.png", "label 7", "0 to 4", binary=False, num_classes=5)

    def test_a_mask_that_ignores_every_pixel(self, folder):
        save(folder / "masks" / "b.png", np.full((4, 6), 255, np.uint8))
        self.fails(folder, folder / "masks" / "b.png", "ignores every pixel")

    def test_a_suffix_that_would_work_is_suggested(self, folder):
        for path in list((folder / "masks").iterdir()):
            path.rename(path.with_stem(path.stem + "_mask"))
        self.fails(folder, "no mask a.*", "--mask-suffix _mask", lines=3)

    def test_every_broken_file_is_named(self, folder):
        broken = [folder / "images" / "a.png", folder / "masks" / "b.png"]
        for path in broken:
            path.write_text("not an image")
        self.fails(folder, *broken, lines=2)

    def test_with_many_broken_files_the_first_are_named(self, folder):
        for index in range(30):
            save(folder / "images" / f"{index:02}.png", np.zeros((4, 6, 3), np.uint8))
        self.fails(folder, folder / "images" / "09.png", "and 20 more faults", lines=11)

    def test_masks_of_0_and_255_in_a_multiclass_task(self, folder):
        write_masks(folder, 255, 255, 255)
        self.fails(folder, folder / "masks", "label 0 only", "--task binary", binary=False)

    def test_masks_of_background_only(self, folder):
        write_masks(folder, 0, 0, 0)
        self.fails(folder, folder / "masks", "label 0 only")
