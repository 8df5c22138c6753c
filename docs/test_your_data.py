"""The calls of the page "Your data" give what the definition gives, point by point, and take views where it says so."""

import definition
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def of_points(logits, labels, ignore=None, classes="present"):
    """The softmax loss of points (N, C)."""
    return definition.softmax(logits.softmax(1).T[None], labels[None], classes=classes, ignore=ignore)


def mean(terms):
    return torch.stack(list(terms)).mean()


def same(actual, expected):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=1e-6)


def is_view(tensor, of):
    return tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def test_points():
    logits, labels = torch.randn(60, 5), torch.randint(-1, 5, (60,))
    x, y = logits.T[None, :, :, None], labels[None, :, None]
    assert is_view(x, logits)
    assert is_view(y, labels)
    same(lovasz_softmax_loss(x, y, classes="present", ignore_index=-1), of_points(logits, labels, -1))


def test_tokens():
    logits, labels = torch.randn(2, 30, 5), torch.randint(0, 5, (2, 30))
    x, y = logits.transpose(1, 2)[..., None], labels[..., None]
    assert is_view(x, logits)
    expected = mean(of_points(one, where) for one, where in zip(logits, labels, strict=True))
    same(lovasz_softmax_loss(x, y, classes="present"), expected)


@pytest.mark.parametrize("per_image", [True, False])
def test_several_clouds(per_image):
    sizes = [20, 5, 35]
    logits, labels = torch.randn(60, 4), torch.randint(-1, 4, (60,))
    clouds = list(zip(logits.split(sizes), labels.split(sizes), strict=True))
    x = pad_sequence([cloud for cloud, _ in clouds], batch_first=True)
    y = pad_sequence([where for _, where in clouds], batch_first=True, padding_value=-1)
    loss = lovasz_softmax_loss(
        x.transpose(1, 2)[..., None], y[..., None], classes="present", ignore_index=-1, per_image=per_image
    )
    each = mean(of_points(cloud, where, -1) for cloud, where in clouds)
    same(loss, each if per_image else of_points(logits, labels, -1))


def test_volumes():
    logits, labels = torch.randn(2, 3, 3, 4, 5), torch.randint(0, 3, (2, 3, 4, 5))
    x, y = logits.flatten(3), labels.flatten(2)
    assert is_view(x, logits)
    assert is_view(y, labels)
    same(lovasz_softmax_loss(x, y), definition.softmax(logits.softmax(1), labels, classes="all", per_image=True))


def test_signals():
    logits, labels = torch.randn(2, 3, 20), torch.randint(0, 3, (2, 20))
    expected = definition.softmax(logits.softmax(1), labels, classes="all", per_image=True)
    same(lovasz_softmax_loss(logits[..., None], labels[..., None]), expected)


def test_the_layout_makes_no_difference():
    logits, labels = torch.randn(2, 3, 4, 6), torch.randint(0, 3, (2, 4, 6))
    loss = lovasz_softmax_loss(logits, labels)
    assert torch.equal(lovasz_softmax_loss(logits.reshape(2, 3, 8, 3), labels.reshape(2, 8, 3)), loss)


def test_zero_for_unlabelled():
    logits, labels = torch.randn(1, 4, 5, 6), torch.randint(0, 4, (1, 5, 6))
    expected = definition.softmax(logits.softmax(1), labels, classes=[1, 2, 3], ignore=0)
    same(lovasz_softmax_loss(logits, labels, classes="present", ignore_index=0), expected)
    same(lovasz_softmax_loss(logits, labels, classes=range(1, 4), ignore_index=0), expected)
    # The warning: with all classes, class 0 enters.
    assert not torch.isclose(lovasz_softmax_loss(logits, labels, ignore_index=0).double(), expected)


class TestSeveralLabels:
    @pytest.fixture
    def data(self):
        masks = (torch.rand(4, 3, 5, 6) < torch.tensor([0.05, 0.2, 0.6]).view(3, 1, 1)).float()
        return torch.randn(4, 3, 5, 6), masks

    def test_each_class_over_the_batch(self, data):
        logits, masks = data
        x, y = logits.transpose(0, 1).flatten(2)[:, None], masks.transpose(0, 1).flatten(2)
        assert is_view(x, logits)
        assert is_view(y, masks)
        same(lovasz_sigmoid_loss(x, y), mean(self.one(logits[:, c], masks[:, c]) for c in range(3)))

    def test_each_mask(self, data):
        logits, masks = data
        x, y = logits.flatten(0, 1)[:, None], masks.flatten(0, 1)
        assert is_view(x, logits)
        same(lovasz_sigmoid_loss(x, y), mean(self.one(logits[i, c], masks[i, c]) for i in range(4) for c in range(3)))

    def test_all_together(self, data):
        logits, masks = data
        loss = lovasz_sigmoid_loss(logits.flatten(0, 1)[:, None], masks.flatten(0, 1), per_image=False)
        same(loss, self.one(logits, masks))

    def one(self, logits, masks):
        probability = logits.reshape(1, 1, -1).sigmoid()
        return definition.softmax(torch.cat([1 - probability, probability], 1), masks.reshape(1, -1), classes=[1])


class TestOneClass:
    def test_one_output_with_bounded_errors(self):
        logits, masks = torch.randn(2, 1, 5, 6), torch.randint(0, 2, (2, 5, 6))
        probabilities = torch.cat([1 - logits.sigmoid(), logits.sigmoid()], dim=1)
        expected = definition.softmax(probabilities, masks, classes=[1], per_image=True)
        same(lovasz_sigmoid_loss(logits, masks), expected)

    def test_two_outputs(self):
        logits, masks = torch.randn(2, 2, 5, 6), torch.randint(0, 2, (2, 5, 6))
        difference = logits[:, 1:] - logits[:, :1]
        torch.testing.assert_close(difference.sigmoid(), logits.softmax(1)[:, 1:])
        same(lovasz_hinge_loss(difference, masks), definition.hinge(difference, masks))
        same(lovasz_sigmoid_loss(difference, masks), lovasz_softmax_loss(logits, masks, classes=[1]))


def test_one_hot_targets():
    labels = torch.randint(0, 4, (2, 5, 6))
    one_hot = F.one_hot(labels, 4).movedim(-1, 1)
    unlabelled = torch.rand(2, 5, 6) < 0.2
    one_hot = one_hot.masked_fill(unlabelled[:, None], 0)
    y = one_hot.argmax(1).masked_fill(one_hot.sum(1) == 0, 255)
    assert torch.equal(y, labels.masked_fill(unlabelled, 255))


def test_classes_last():
    logits, labels = torch.randn(2, 5, 6, 4), torch.randint(0, 4, (2, 5, 6))
    x = logits.movedim(-1, 1)
    assert is_view(x, logits)
    same(lovasz_softmax_loss(x, labels), definition.softmax(x.softmax(1), labels, classes="all", per_image=True))


def test_coarse_outputs_take_the_label_of_the_middle():
    labels = torch.arange(64).view(1, 8, 8)
    for n in (1, 2, 4):
        coarse = labels[:, n // 2 :: n, n // 2 :: n]
        assert is_view(coarse, labels)
        expected = F.interpolate(labels[:, None].double(), scale_factor=1 / n, mode="nearest-exact")[:, 0].long()
        assert torch.equal(coarse, expected)


def test_soft_labels_raise():
    with pytest.raises(ValueError, match="target must hold 0"):
        lovasz_hinge_loss(torch.randn(1, 1, 2, 2), torch.full((1, 2, 2), 0.3))
    with pytest.raises(ValueError):
        lovasz_softmax_loss(torch.randn(1, 3, 2, 2), torch.full((1, 2, 2), 0.3))


def test_doubtful_pixels_are_left_out():
    soft = torch.tensor([[[0.0, 0.2, 0.45, 0.6, 0.9]]])
    labels = (soft >= 0.5).long().masked_fill((soft > 0.3) & (soft < 0.7), 255)
    assert labels.tolist() == [[[0, 0, 255, 255, 1]]]
