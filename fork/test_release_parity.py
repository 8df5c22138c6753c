"""Without the new options, the losses give the same values, gradients and exceptions as the release.

Labels of -100 and empty batches are not compared, because the release does not define their losses.
"""

from pathlib import Path

import pytest
import torch

from fork.compose import fetch_release, load_release_module
from kornia import losses

WHEEL = fetch_release(Path(__file__).resolve().parents[1])
HINGE = load_release_module(WHEEL, "kornia.losses.lovasz_hinge")
SOFTMAX = load_release_module(WHEEL, "kornia.losses.lovasz_softmax")

# In half precision, the release rounds each softmax error to the dtype, and the fork computes in float32. The loss
# changes by at most the largest change of an error, which is one eps. Rounding the result adds one eps, relative.
HALF = {
    dtype: {"rtol": torch.finfo(dtype).eps, "atol": torch.finfo(dtype).eps} for dtype in (torch.float16, torch.bfloat16)
}
TOLERANCE = HALF | {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-10, "atol": 1e-12}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def logits(*shape, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def labels(*shape, classes=2):
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same(ours, theirs):
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, equal_nan=True, **TOLERANCE[theirs.dtype])


def raised_by(function, *args):
    with pytest.raises(Exception) as caught:
        function(*args)
    return type(caught.value), str(caught.value)


def assert_alike(ours, theirs):
    """Compare types and messages. The fork's message may have another line, which says what to pass instead."""
    assert ours[0] is theirs[0]
    assert ours[1].removeprefix(theirs[1])[:1] in ("", "\n")
    assert ours[1].startswith(theirs[1])


def inputs_and_gradients(function, *args):
    leaves = [arg.clone().requires_grad_() for arg in args if arg.is_floating_point()]
    remaining = iter(leaves)
    function(*(next(remaining) if arg.is_floating_point() else arg for arg in args)).backward()
    return [leaf.grad for leaf in leaves]


HINGE_CASES = {
    "batch": lambda dtype: (logits(3, 1, 7, 5, dtype=dtype), labels(3, 7, 5)),
    "one pixel": lambda dtype: (logits(1, 1, 1, 1, dtype=dtype), labels(1, 1, 1)),
    "one row": lambda dtype: (logits(2, 1, 1, 9, dtype=dtype), labels(2, 1, 9)),
    "all foreground": lambda dtype: (logits(2, 1, 4, 6, dtype=dtype), torch.ones(2, 4, 6, dtype=torch.long)),
    "all background": lambda dtype: (logits(2, 1, 4, 6, dtype=dtype), torch.zeros(2, 4, 6, dtype=torch.long)),
    "one image of background": lambda dtype: (
        logits(2, 1, 4, 6, dtype=dtype),
        torch.stack([torch.zeros(4, 6, dtype=torch.long), labels(4, 6)]),
    ),
    "equal logits": lambda dtype: (torch.zeros(2, 1, 5, 5, dtype=dtype), labels(2, 5, 5)),
    "all right": lambda dtype: ((4.0 * labels(2, 5, 5) - 2.0)[:, None].to(dtype), labels(2, 5, 5)),
    "right infinities": lambda dtype: (
        torch.cat([logits(2, 1, 5, 4, dtype=dtype), (2.0 * labels(2, 5, 1) - 1.0)[:, None].to(dtype) * torch.inf], -1),
        torch.cat([labels(2, 5, 4), labels(2, 5, 1)], -1),
    ),
    "nan": lambda dtype: (logits(2, 1, 3, 3, dtype=dtype).index_fill(3, torch.tensor(1), torch.nan), labels(2, 3, 3)),
    "not contiguous": lambda dtype: (
        logits(2, 1, 6, 8, dtype=dtype).transpose(2, 3)[..., ::2],
        labels(2, 6, 8).transpose(1, 2)[..., ::2],
    ),
    "float labels": lambda dtype: (logits(2, 1, 5, 3, dtype=dtype), labels(2, 5, 3).float()),
    "half labels": lambda dtype: (logits(2, 1, 5, 3, dtype=dtype), labels(2, 5, 3).half()),
    "bool labels": lambda dtype: (logits(2, 1, 5, 3, dtype=dtype), labels(2, 5, 3).bool()),
    "byte labels": lambda dtype: (logits(2, 1, 5, 3, dtype=dtype), labels(2, 5, 3).byte()),
}


@DTYPES
@pytest.mark.parametrize("case", HINGE_CASES)
def test_hinge(case, dtype):
    pred, target = HINGE_CASES[case](dtype)
    assert_same(losses.lovasz_hinge_loss(pred, target), HINGE.lovasz_hinge_loss(pred, target))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_hinge_with_integer_predictions(dtype):
    pred, target = logits(2, 1, 4, 5).abs().to(dtype), labels(2, 4, 5)
    assert_same(losses.lovasz_hinge_loss(pred, target), HINGE.lovasz_hinge_loss(pred, target))


SOFTMAX_CASES = {
    "batch": lambda dtype: (logits(2, 4, 5, 3, dtype=dtype), labels(2, 5, 3, classes=4)),
    "one pixel": lambda dtype: (logits(1, 2, 1, 1, dtype=dtype), labels(1, 1, 1)),
    "one row": lambda dtype: (logits(2, 3, 1, 9, dtype=dtype), labels(2, 1, 9, classes=3)),
    "one prediction, three targets": lambda dtype: (logits(1, 3, 4, 4, dtype=dtype), labels(3, 4, 4, classes=3)),
    "absent classes": lambda dtype: (logits(2, 9, 4, 6, dtype=dtype), labels(2, 4, 6, classes=3)),
    "one class only": lambda dtype: (logits(2, 3, 4, 6, dtype=dtype), torch.ones(2, 4, 6, dtype=torch.long)),
    "equal logits": lambda dtype: (torch.zeros(2, 3, 5, 5, dtype=dtype), labels(2, 5, 5, classes=3)),
    "saturated": lambda dtype: (logits(2, 3, 5, 5, dtype=dtype, scale=100.0), labels(2, 5, 5, classes=3)),
    "nan": lambda dtype: (
        logits(2, 3, 3, 3, dtype=dtype).index_fill(3, torch.tensor(1), torch.nan),
        labels(2, 3, 3, classes=3),
    ),
    "not contiguous": lambda dtype: (
        logits(2, 3, 6, 8, dtype=dtype).transpose(2, 3)[..., ::2],
        labels(2, 6, 8, classes=3).transpose(1, 2)[..., ::2],
    ),
    "channels last": lambda dtype: (
        logits(2, 4, 5, 3, dtype=dtype).contiguous(memory_format=torch.channels_last),
        labels(2, 5, 3, classes=4),
    ),
    "int labels": lambda dtype: (logits(2, 4, 5, 3, dtype=dtype), labels(2, 5, 3, classes=4).int()),
    "byte labels": lambda dtype: (logits(2, 4, 5, 3, dtype=dtype), labels(2, 5, 3, classes=4).byte()),
    "float labels": lambda dtype: (logits(2, 4, 5, 3, dtype=dtype), labels(2, 5, 3, classes=4).float()),
}


@DTYPES
@pytest.mark.parametrize("case", SOFTMAX_CASES)
def test_softmax(case, dtype):
    pred, target = SOFTMAX_CASES[case](dtype)
    assert_same(losses.lovasz_softmax_loss(pred, target), SOFTMAX.lovasz_softmax_loss(pred, target))


@DTYPES
@pytest.mark.parametrize("weight_dtype", [torch.int64, *TOLERANCE], ids=str)
@pytest.mark.parametrize("case", ["batch", "one prediction, three targets", "absent classes"])
def test_softmax_with_weight(case, weight_dtype, dtype):
    pred, target = SOFTMAX_CASES[case](dtype)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.5, 1.0, 0.25, 1.0, 0.75])[: pred.shape[1]].to(weight_dtype)
    theirs = SOFTMAX.lovasz_softmax_loss(pred, target, weight)
    # With a float32 or float64 weight the result has that dtype, but the release still computes the softmax of
    # half-precision logits in half precision.
    tolerance = max(TOLERANCE[dtype]["atol"], TOLERANCE[theirs.dtype]["atol"])
    ours = losses.lovasz_softmax_loss(pred, target, weight)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradients():
    hinge = HINGE_CASES["batch"](torch.float64)
    softmax = SOFTMAX_CASES["absent classes"](torch.float64)
    spread = SOFTMAX_CASES["one prediction, three targets"](torch.float64)
    weight = torch.linspace(0.5, 1.5, 9, dtype=torch.float64)
    pairs = [
        (losses.lovasz_hinge_loss, HINGE.lovasz_hinge_loss, hinge),
        (losses.lovasz_softmax_loss, SOFTMAX.lovasz_softmax_loss, softmax),
        (losses.lovasz_softmax_loss, SOFTMAX.lovasz_softmax_loss, (*softmax, weight)),
        (losses.lovasz_softmax_loss, SOFTMAX.lovasz_softmax_loss, spread),
    ]
    for ours, theirs, args in pairs:
        expected = inputs_and_gradients(theirs, *args)
        torch.testing.assert_close(inputs_and_gradients(ours, *args), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "weight", [None, torch.ones(4), torch.nn.Parameter(torch.ones(4))], ids=["none", "fixed", "learnt"]
)
def test_modules(weight):
    pred, target = SOFTMAX_CASES["batch"](torch.float32)
    ours, theirs = losses.LovaszSoftmaxLoss(weight), SOFTMAX.LovaszSoftmaxLoss(weight)
    assert_same(ours(pred, target), theirs(pred, target))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]

    pred, target = HINGE_CASES["batch"](torch.float32)
    assert_same(losses.LovaszHingeLoss()(pred, target), HINGE.LovaszHingeLoss()(pred, target))


HINGE_ERRORS = {
    "pred of rank 3": lambda: (logits(1, 2, 2), labels(1, 2, 2)),
    "target of rank 4": lambda: (logits(1, 1, 2, 2), labels(1, 1, 2, 2)),
    "two channels": lambda: (logits(1, 2, 2, 2), labels(1, 2, 2)),
    "other batch": lambda: (logits(1, 1, 2, 2), labels(3, 2, 2)),
    "other height": lambda: (logits(1, 1, 3, 2), labels(1, 2, 2)),
    "other width": lambda: (logits(1, 1, 2, 3), labels(1, 2, 2)),
    "other device": lambda: (logits(1, 1, 2, 2), labels(1, 2, 2).to("meta")),
}


@pytest.mark.parametrize("case", HINGE_ERRORS)
def test_hinge_error(case):
    args = HINGE_ERRORS[case]()
    assert_alike(raised_by(losses.lovasz_hinge_loss, *args), raised_by(HINGE.lovasz_hinge_loss, *args))


SOFTMAX_ERRORS = {
    "pred of rank 3": lambda: (logits(1, 2, 2), labels(1, 2, 2)),
    "target of rank 4": lambda: (logits(1, 3, 2, 2), labels(1, 1, 2, 2)),
    "one channel": lambda: (logits(1, 1, 2, 2), labels(1, 2, 2)),
    "more predictions than targets": lambda: (logits(3, 3, 2, 2), labels(1, 2, 2)),
    "other height": lambda: (logits(1, 3, 3, 2), labels(1, 2, 2)),
    "other width": lambda: (logits(1, 3, 2, 3), labels(1, 2, 2)),
    "other device": lambda: (logits(1, 3, 2, 2), labels(1, 2, 2).to("meta")),
    "label too large": lambda: (logits(1, 3, 2, 2), torch.full((1, 2, 2), 3)),
    "label negative": lambda: (logits(1, 3, 2, 2), torch.full((1, 2, 2), -1)),
    "list for weight": lambda: (logits(1, 3, 2, 2), labels(1, 2, 2), [1.0, 1.0, 1.0]),
    "short weight": lambda: (logits(1, 3, 2, 2), labels(1, 2, 2), torch.ones(2)),
    "weight of rank 2": lambda: (logits(1, 3, 2, 2), labels(1, 2, 2), torch.ones(3, 2)),
    "weight on another device": lambda: (logits(1, 3, 2, 2), labels(1, 2, 2), torch.ones(3, device="meta")),
}


@pytest.mark.parametrize("case", SOFTMAX_ERRORS)
def test_softmax_error(case):
    args = SOFTMAX_ERRORS[case]()
    assert_alike(raised_by(losses.lovasz_softmax_loss, *args), raised_by(SOFTMAX.lovasz_softmax_loss, *args))


@pytest.mark.parametrize(("name", "release", "channels"), [("hinge", HINGE, 1), ("softmax", SOFTMAX, 3)])
def test_exception_not_a_tensor(name, release, channels):
    """The release raises an AttributeError where it first needs a tensor. The fork says which argument is wrong."""
    name = f"lovasz_{name}_loss"
    for wrong, pair in [("pred", ([[1.0]], labels(1, 2, 2))), ("target", (logits(1, channels, 2, 2), [[1]]))]:
        assert raised_by(getattr(release, name), *pair)[0] is AttributeError
        error, message = raised_by(getattr(losses, name), *pair)
        assert issubclass(error, TypeError)
        assert f"{wrong} must be Tensor." in message


def test_release_is_not_the_fork():
    """The functions compared above are not the same ones."""
    assert HINGE.lovasz_hinge_loss is not losses.lovasz_hinge_loss
    assert HINGE.__file__.startswith(str(WHEEL))
    with pytest.raises(ModuleNotFoundError, match=r"has no module kornia\.losses\.nothing"):
        load_release_module(WHEEL, "kornia.losses.nothing")
