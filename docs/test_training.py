"""What the page "The training loop" says beside its code, which test_pages.py runs."""

import pytest
import torch
import torch.nn.functional as F
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex, MultilabelJaccardIndex

from kornia.losses import LovaszHingeLoss, LovaszSoftmaxLoss, lovasz_hinge_loss


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class TestAccumulation:
    @pytest.mark.parametrize(("per_image", "same"), [(True, True), (False, False)])
    def test_parts_are_the_batch_only_per_image(self, per_image, same):
        criterion = LovaszSoftmaxLoss(per_image=per_image)
        logits, labels = torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8))
        labels[:2] = 0  # parts that differ
        whole = criterion(logits, labels)
        parts = (criterion(logits[:2], labels[:2]) + criterion(logits[2:], labels[2:])) / 2
        assert torch.isclose(whole, parts, atol=1e-6).item() is same


class TestMixedPrecision:
    def step(self, criterion, cast):
        """One step with a scaler: whether the weights moved."""
        network = torch.nn.Conv2d(3, 4, 3, padding=1)
        before = network.weight.detach().clone()
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", dtype=torch.float16):
            logits = network(torch.rand(2, 3, 8, 8))
            assert logits.dtype == torch.float16
        labels = torch.randint(0, 4, (2, 8, 8))
        if cast:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = criterion(logits, labels)
        else:
            loss = criterion(logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        return loss.dtype, not torch.equal(before, network.weight)

    def test_under_autocast_the_first_step_counts(self):
        assert self.step(LovaszSoftmaxLoss(), cast=True) == (torch.float32, True)

    def test_a_float16_loss_overflows(self):
        assert self.step(LovaszSoftmaxLoss(), cast=False) == (torch.float16, False)


def test_weights_leave_the_mean_over_the_number_of_classes():
    logits, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    once, twice = (LovaszSoftmaxLoss(torch.full((3,), factor))(logits, labels) for factor in (1.0, 2.0))
    torch.testing.assert_close(twice, 2 * once)


class TestMetrics:
    """The rows of the table, on predictions whose hinge errors are 0 and 2, and whose softmax errors are 0 and 1."""

    def test_multiclass(self):
        labels = torch.randint(0, 4, (2, 8, 8))
        guess = torch.where(torch.rand(2, 8, 8) < 0.7, labels, labels.roll(1))
        loss = LovaszSoftmaxLoss(classes="present", per_image=False)
        expected = MulticlassJaccardIndex(4, average="macro")(guess, labels)
        torch.testing.assert_close(1 - loss(100.0 * F.one_hot(guess, 4).movedim(-1, 1), labels), expected)

    def test_binary(self):
        masks = torch.randint(0, 2, (3, 8, 8))
        guess = torch.where(torch.rand(3, 8, 8) < 0.7, masks, 1 - masks)
        logits = 2.0 * guess[:, None] - 1
        loss = LovaszHingeLoss(per_image=False)(logits, masks)
        torch.testing.assert_close(1 - loss / 2, BinaryJaccardIndex()((logits[:, 0] > 0).long(), masks))

    def test_several_labels(self):
        masks = torch.randint(0, 2, (3, 4, 8, 8))
        guess = torch.where(torch.rand(masks.shape) < 0.7, masks, 1 - masks)
        x = (2.0 * guess - 1).transpose(0, 1).flatten(2)[:, None]
        loss = lovasz_hinge_loss(x, masks.transpose(0, 1).flatten(2))
        torch.testing.assert_close(1 - loss / 2, MultilabelJaccardIndex(4, average="macro")(guess, masks))


def test_versions_of_the_page_on_installation():
    fork = Version("0.9.0+lovasz.1")
    assert Version("0.9.0") < fork < Version("0.9.1")
    assert all(fork in SpecifierSet(specifier) for specifier in (">=0.9", "==0.9.0"))
