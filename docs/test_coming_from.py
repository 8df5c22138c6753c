"""Every row of the page "Coming from another library": their call and ours, on the same tensors.

Theirs is the package itself, of which the file with the loss is loaded alone, or a statement of it by the definition.
"""

import functools
import importlib.util
import re
import sys
import types
from pathlib import Path

import definition
import pytest
import torch

from fork.compose import fetch_release, load_release_module
from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "source" / "coming_from.rst"
PEERS = Path(sys.prefix) / "peers"  # where make installs them


def rows() -> dict[str, list[tuple[str, str]]]:
    """Both calls of each row, by the name of its table."""
    tables = re.split(r"^   :name: (\w+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {
        name: re.findall(r"^   \* - ``(.+)``\n     - ``(.+)``$", text, re.MULTILINE)
        for name, text in zip(tables[::2], tables[1::2], strict=True)
    }


def load(package: str, module: str, stand_ins: dict[str, dict]) -> types.ModuleType:
    """A module of an installed peer, without running the __init__ of its package; and what it imports of others."""
    path = PEERS / package.replace(".", "/")
    parent = types.ModuleType(f"peer_{package.replace('.', '_')}")
    parent.__path__ = [str(path)]
    kept = {parent.__name__: parent}
    for name, members in stand_ins.items():
        kept[name] = types.ModuleType(name)
        vars(kept[name]).update(members)
    sys.modules.update(kept)
    try:
        return importlib.import_module(f"{parent.__name__}.{module}")
    finally:
        for name in kept:
            del sys.modules[name]


def kornia() -> dict:
    release = fetch_release(ROOT)
    return {
        name: getattr(load_release_module(release, f"kornia.losses.{name.removesuffix('_loss')}"), name)
        for name in ("lovasz_softmax_loss", "lovasz_hinge_loss")
    }


def smp() -> dict:
    return {"LovaszLoss": load("segmentation_models_pytorch.losses", "lovasz", {}).LovaszLoss}


def toolbelt() -> dict:
    module = load("pytorch_toolbelt.losses", "lovasz", {})
    return {"LovaszLoss": module.LovaszLoss, "BinaryLovaszLoss": module.BinaryLovaszLoss}


def mmseg() -> dict:
    registry = types.SimpleNamespace(register_module=lambda: lambda loss: loss)
    stand_ins = {
        "mmseg": {},
        "mmseg.registry": {"MODELS": registry},
        "mmengine": {},
        "mmengine.utils": {"is_list_of": lambda items, kind: all(isinstance(item, kind) for item in items)},
        "mmengine.fileio": {"load": None},
    }
    return {"LovaszLoss": load("mmseg.models.losses", "lovasz_loss", stand_ins).LovaszLoss}


def berman() -> dict:
    def lovasz_softmax(probabilities, labels, classes="present", per_image=False, ignore=None):
        if probabilities.shape[1] == 1:  # the foreground's, for classes=[1]
            probabilities = torch.cat([1 - probabilities, probabilities], 1)
        return definition.softmax(probabilities, labels, classes=classes, per_image=per_image, ignore=ignore)

    def lovasz_hinge(logits, labels, per_image=True, ignore=None):
        return definition.hinge(logits[:, None], labels, per_image=per_image, ignore=ignore)

    return {"lovasz_softmax": lovasz_softmax, "lovasz_hinge": lovasz_hinge}


def pointcept() -> dict:
    def loss(mode, ignore_index=None, loss_weight=1.0):
        assert mode == "multiclass"
        return lambda points, labels: (
            loss_weight * definition.softmax(points.softmax(1).T[None], labels[None], ignore=ignore_index)
        )

    return {"LovaszLoss": loss}


def paddleseg() -> dict:
    def softmax(ignore_index=255, classes="present"):
        return lambda logits, labels: definition.softmax(
            logits.softmax(1), labels, classes=classes, ignore=ignore_index
        )

    def hinge(ignore_index=255):
        return lambda logits, labels: definition.hinge(logits, labels, per_image=False, ignore=ignore_index)

    return {"LovaszSoftmaxLoss": softmax, "LovaszHingeLoss": hinge}


OURS = (lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss)
THEIRS = {f.__name__: functools.cache(f) for f in (kornia, smp, toolbelt, mmseg, berman, pointcept, paddleseg)}
ROWS = [(peer, theirs, ours) for peer, calls in rows().items() for theirs, ours in calls]


def inputs() -> dict[str, torch.Tensor]:
    """What the page names. One class occurs nowhere, one in one image only, and some pixels are ignored."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, requires_grad=True)

    def integers(high, *shape):
        return torch.randint(0, high, shape, generator=generator)

    classes_only = integers(2, 2, 6, 7)
    classes_only[0, :3] = 2
    unlabelled = integers(6, 2, 6, 7) == 0
    zeros_and_ones = integers(2, 2, 6, 7)
    return {
        "logits": normal(2, 4, 6, 7),
        "classes_only": classes_only,
        "labels": classes_only.masked_fill(unlabelled, 255),
        "weight": torch.tensor([1.0, 0.5, 2.0, 1.0]),
        "mask_logits": normal(2, 1, 6, 7),
        "zeros_and_ones": zeros_and_ones,
        "masks": zeros_and_ones.masked_fill(unlabelled, 255),
        "many_logits": normal(2, 3, 6, 7),
        "many_masks": integers(2, 2, 3, 6, 7),
        "points": normal(50, 5),
        "point_labels": integers(5, 50) - 1,
    }


def value_and_gradients(call: str, names: dict) -> list[torch.Tensor]:
    """The loss, and its gradient with respect to each of the inputs that has one."""
    given = inputs()
    value = eval(call, {"torch": torch, **names, **given})  # noqa: S307 - the page is ours
    leaves = [tensor for tensor in given.values() if tensor.requires_grad]
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    return [value, *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def test_all_tables_are_found():
    assert set(rows()) == set(THEIRS)
    # No row is lost because it is written another way: the others are five names and a heading.
    assert len(ROWS) == PAGE.read_text(encoding="utf-8").count("   * - ``") - 6


@pytest.mark.parametrize(("peer", "theirs", "ours"), ROWS, ids=[f"{peer}-{theirs}" for peer, theirs, _ in ROWS])
def test_row(peer, theirs, ours):
    expected = value_and_gradients(theirs, THEIRS[peer]())
    actual = value_and_gradients(ours, {loss.__name__: loss for loss in OURS})
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=1e-6)


def test_probabilities_have_their_logarithm_for_logits():
    given = inputs()
    probabilities = given["logits"].softmax(1)
    expected = lovasz_softmax_loss(given["logits"], given["classes_only"])
    torch.testing.assert_close(lovasz_softmax_loss(probabilities.log(), given["classes_only"]), expected)


def test_all_and_present_differ():
    given = inputs()
    every, present = (
        lovasz_softmax_loss(given["logits"], given["classes_only"], classes=classes) for classes in ("all", "present")
    )
    assert abs(every - present) > 0.01


def test_kornia_up_to_0_8_3():
    """The numbers of the warning: class numbers in the place of the foreground."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
    terms = []
    for image, label in zip(logits.double().flatten(2).softmax(1), labels.flatten(1).double(), strict=True):
        for c, probabilities in enumerate(image):
            errors, order = ((label == c).double() - probabilities).abs().sort(descending=True)
            intersection = label.sum() - label[order].cumsum(0)
            curve = 1 - intersection / (label.sum() + (1 - label[order]).cumsum(0))
            terms.append((errors * torch.diff(curve, prepend=curve.new_zeros(1))).sum())
    assert f"{torch.stack(terms).mean():.2f}" == "0.33"
    assert f"{lovasz_softmax_loss(logits, labels):.2f}" == "0.77"
