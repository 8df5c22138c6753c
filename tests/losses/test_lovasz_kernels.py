# SPDX-License-Identifier: Apache-2.0
"""The fused kernels: which operations they launch, which memory they read and write, and how they compile.

Their results are checked by the other tests of the losses: by the form "fused" on a GPU, and on the CPU with
TRITON_INTERPRET=1.
"""

import contextlib
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kornia.losses import _lovasz_cuda
from kornia.losses._lovasz_bins import count_slots, slots_at, weights_of_slots
from kornia.losses._lovasz_options import Options
from kornia.losses._tuning import tuning

from testing.base import BaseTester
from testing.lovasz import HINGE, INTERPRETED, NAN, OPTIONS, SIGMOID, SOFTMAX, force_form, make_inputs, value_and_grad

triton = pytest.importorskip("triton")
tl = triton.language

PLACES = ["cpu"] if INTERPRETED else ["cuda"] if torch.cuda.is_available() else []
LOSSES = {loss.name: loss for loss in (HINGE, SIGMOID, SOFTMAX)}
EVERY = [(loss, options, bins) for loss in OPTIONS for options in OPTIONS[loss] for bins in (None, 64)]
GUARD = 1 << 12


class Guarded:
    """PyTorch, except that new tensors contain garbage and lie between guard regions that nothing may write to."""

    def __init__(self) -> None:
        self.whole = []

    def __getattr__(self, name):
        return getattr(torch, name)

    def empty(self, *shape, dtype, device):
        size = math.prod(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape)
        whole = torch.full((size + 2 * GUARD,), 77, dtype=torch.int8).to(device, dtype)
        self.whole.append(whole)
        return whole[GUARD : GUARD + size].view(*shape)

    def empty_like(self, tensor, dtype=None):
        return self.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)

    def zeros(self, shape, dtype, device):
        return self.empty(shape, dtype=dtype, device=device).zero_()

    def is_intact(self):
        return all((whole[:GUARD] == 77).all() and (whole[-GUARD:] == 77).all() for whole in self.whole)


def surround(tensor, garbage):
    """Copy a tensor into memory that has garbage before and after it."""
    whole = torch.full((tensor.numel() + 2 * GUARD,), garbage, dtype=tensor.dtype, device=tensor.device)
    result = whole[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    return result.copy_(tensor)


class Launches(TorchDispatchMode):
    """Record the names of what a GPU would run: kernels, and operations of PyTorch except views and allocations."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.names, launch = [], _lovasz_cuda.launch

        def counted(name, *args, **kwargs):
            self.names.append(name)
            with torch.utils._python_dispatch._disable_current_modes():
                launch(name, *args, **kwargs)

        monkeypatch.setattr(_lovasz_cuda, "launch", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in ("empty", "empty_like", "promote_types"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


if PLACES:

    @pytest.mark.parametrize("place", PLACES)
    class TestKernels(BaseTester):
        @pytest.fixture(autouse=True)
        def fused(self, monkeypatch):
            force_form(monkeypatch, "fused")

        def test_smoke(self, place):
            assert _lovasz_cuda.can_compute(*make_inputs(SOFTMAX, place, torch.float16), None, Options("softmax"))

        @pytest.mark.parametrize(("loss", "options", "bins"), EVERY)
        def test_feature_memory_bounds(self, loss, options, bins, place, monkeypatch):
            """Kernels write to no memory beyond their tensors, and do not use garbage beyond their inputs."""
            shape = (3, 7, 11)
            pred, target = make_inputs(loss, place, torch.float32, shape, ignored=options.get("ignore_index"))
            options = {**options, "num_bins": bins}
            expected = value_and_grad(loss, pred, target, **options)
            guarded = Guarded()
            monkeypatch.setattr(_lovasz_cuda, "torch", guarded)
            leaf = surround(pred, NAN).requires_grad_()
            value = loss(leaf, surround(target, 10**9), **options)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
            self.assert_close((value.detach(), grad), expected, rtol=0.0, atol=0.0)
            assert len(guarded.whole) >= 5
            assert guarded.is_intact()

        @pytest.mark.parametrize(("loss", "options", "bins"), EVERY)
        def test_feature_launches(self, loss, options, bins, place, monkeypatch):
            pred, target = make_inputs(loss, place, torch.float32, ignored=options.get("ignore_index"))
            pred.requires_grad_()
            monkeypatch.setattr(tuning, "sorted_at_once", 1 << 20)
            loss(pred, target, num_bins=bins, **options)  # the first call also checks whether kernels can run
            with Launches(monkeypatch) as launches:
                value = loss(pred, target, num_bins=bins, **options)
                one = torch.ones_like(value)
                launches.names.remove("ones_like")
                torch.autograd.backward(value, one)
            ranking = ["zeros", "range_kernel", "edges_kernel", "count_kernel", "weights_kernel"]
            if bins is None:
                ranking = ["keys_kernel", "sort", "backgrounds_kernel", "cumsum", "ranks_kernel"]
            assert launches.names == [*ranking, "apply_kernel", "sum", "apply_kernel"]

        @pytest.mark.parametrize("bins", [None, 64])
        def test_feature_memory_layout(self, bins, place):
            """Weights that are strided or expanded, and logits whose sign PyTorch stores as a flag of the tensor."""
            pred, target = make_inputs(SOFTMAX, place, torch.float32)
            spread = torch.tensor([1.0, 50.0, 2.0, 60.0, 0.5, 70.0, 3.0, 80.0], device=place)
            negated = torch.complex(torch.zeros_like(pred), -pred).conj().imag
            assert negated.is_neg()
            for weight in (spread[::2], spread[2:3].expand(4)):
                expected = value_and_grad(SOFTMAX, pred, target, weight.clone(), num_bins=bins)
                for logits in (pred, negated):
                    leaf = logits.detach().requires_grad_()
                    value = SOFTMAX(leaf, target, weight, num_bins=bins)
                    (grad,) = torch.autograd.grad(value, leaf)
                    self.assert_close((value.detach(), grad), expected, rtol=0.0, atol=0.0)

        @pytest.mark.parametrize("bins", [None, 64])
        def test_feature_second_derivative(self, bins, place, monkeypatch):
            """It comes from the dense form, with the same result."""
            pred, target = make_inputs(SOFTMAX, place, torch.float32)
            pred.requires_grad_()
            direction, seconds = torch.randn_like(pred), []
            for kernels in (True, False):
                monkeypatch.setattr(tuning, "kernels", kernels)
                (first,) = torch.autograd.grad(SOFTMAX(pred, target, num_bins=bins), pred, create_graph=True)
                seconds += torch.autograd.grad((first * direction).sum(), pred)
            assert seconds[1].any()
            self.assert_close(seconds[0], seconds[1], rtol=1e-5, atol=1e-8)

        def test_feature_many_blocks_and_slabs(self, place, monkeypatch):
            """Rows are longer than a block of sorted pixels, and are sorted in several parts."""
            pred, target = make_inputs(SOFTMAX, place, torch.float32, (2, 40, 60))
            expected = value_and_grad(SOFTMAX, pred, target)
            for slab, block in ((1, 128), (5000, 512)):
                monkeypatch.setattr(tuning, "sorted_at_once", slab)
                monkeypatch.setattr(tuning, "ranked_by_program", block)
                self.assert_close(value_and_grad(SOFTMAX, pred, target), expected, rtol=1e-6, atol=1e-9)

        @pytest.mark.parametrize("wrong", [-1, 4, 2**32, -(2**31)])
        @pytest.mark.parametrize("name", LOSSES)
        @pytest.mark.parametrize("bins", [None, 64])
        def test_feature_wrong_label_gives_nan(self, name, wrong, bins, place):
            loss, options = LOSSES[name], Options(name, num_bins=bins, classes="all" if name == "softmax" else None)
            pred, target = make_inputs(loss, place, torch.float32)
            target[1, 2, 3] = wrong
            inputs = pred, target, None, options
            value, ranking = _lovasz_cuda.loss_and_ranking(*inputs)
            gradient = _lovasz_cuda.gradient(*inputs, ranking, torch.ones_like(value), pred.dtype)
            assert value.isnan()
            assert gradient.view(pred.shape)[1, :, 2, 3].isnan().all()
            assert gradient.isnan().sum() == pred.shape[1]

        @pytest.mark.parametrize("num_bins", [1, 2, 33, 1000, 1 << 16])
        def test_feature_slots(self, num_bins, place):
            errors = torch.cat([torch.logspace(-30, 0, 500), torch.linspace(0, 1.2, 4000), torch.tensor([NAN, -NAN])])
            errors = errors.to(place)
            for low, scale in ((0.0, num_bins + 0.5), (0.25, 2.0 * num_bins), (3.4e38, 2.0**100)):
                slots = torch.empty(errors.shape, dtype=torch.int32, device=place)
                slots_kernel[(1,)](
                    errors, slots, low, scale, len(errors), **_lovasz_cuda.layout_of(num_bins), BLOCK=8192
                )  # fmt: skip
                expected = slots_at((errors - low) * scale, num_bins)
                assert torch.equal(slots, expected)

        @pytest.mark.parametrize("num_bins", [1, 33, 1024, 5000])
        def test_feature_weights_of_slots(self, num_bins, place):
            slots = count_slots(num_bins)
            counts = torch.randint(0, 3, (4, 2, slots), dtype=torch.int32).to(place)
            counts[0, 1] = 0
            counts[1] *= 1 << 17
            counts[2] = 0
            weights, totals = torch.empty(counts.shape, device=place), torch.empty(4, dtype=torch.int64, device=place)
            _lovasz_cuda.launch("weights_kernel", 4, weights.device, counts, weights, totals, SLOTS=slots, BLOCK=1024)
            expected, total = weights_of_slots(counts.long(), torch.float32)
            assert torch.equal(totals, total)
            self.assert_close(weights, expected, rtol=3e-7, atol=0.0)

    @triton.jit
    def slots_kernel(
        errors, slots, low, scale, count,
        FIRST: tl.constexpr, WITHIN: tl.constexpr, LAST: tl.constexpr,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        i = tl.arange(0, BLOCK)
        x = tl.load(errors + i, mask=i < count, other=0.0)
        tl.store(slots + i, _slots_of(x, low, scale, FIRST, WITHIN, LAST), mask=i < count)

    from kornia.losses._lovasz_kernels import _slots_of


class Card:
    """Stands for a GPU that this machine does not have, so that Triton compiles for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


def usage_of(compiled) -> tuple[int, int]:
    """Number of registers and of spilled bytes of a compiled kernel, from the assembler that Triton includes."""
    ptx = compiled.asm["ptx"]
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = next(folder / name for name in ("ptxas-blackwell", "ptxas") if (folder / name).exists())
    command = [str(assembler), "-v", f"-arch={target}", "-o", "/dev/null", "-"]
    said = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr  # noqa: S603 - Triton's
    return int(re.search(r"Used (\d+) registers", said)[1]), int(re.search(r"(\d+) bytes spill stores", said)[1])


if not INTERPRETED:
    VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
    # Triton 3.6 to 3.8 spill nothing. Other versions spill up to two registers in the kernel that applies the weights.
    MOST_SPILT = 0 if (3, 6) <= VERSION < (3, 9) else 8

    class TestCompile:
        @pytest.mark.parametrize("capability", [75, 80, 90, 120] if VERSION >= (3, 6) else [75, 80, 90])
        @pytest.mark.parametrize(("name", "shape"), [
            ("hinge", (4, 1, 512, 512)), ("sigmoid", (4, 1, 512, 512)), ("softmax", (2, 21, 512, 512)),
            ("softmax", (2, 150, 256, 256)), ("softmax", (1, 1000, 64, 64)),
        ])  # fmt: skip
        def test_feature_without_spills(self, name, shape, capability, monkeypatch):
            launched = []
            monkeypatch.setattr(_lovasz_cuda, "launch", lambda *args, **kwargs: launched.append((args, kwargs)))
            half = torch.bfloat16 if capability >= 80 else torch.float16  # older GPUs have no bfloat16
            pred = torch.empty(shape, device="meta", dtype=half if name == "sigmoid" else torch.float32)
            target = torch.empty((shape[0], *shape[2:]), device="meta", dtype=torch.int64)
            for num_bins in (
                (None, 1024, 1 << 16) if capability == 90 else (None, 1024) if capability == 75 else (1024,)
            ):
                classes = "present" if name == "softmax" else None
                inputs = pred, target, None, Options(name, num_bins=num_bins, per_image=False, classes=classes)
                loss, ranking = _lovasz_cuda.loss_and_ranking(*inputs)
                _lovasz_cuda.gradient(*inputs, ranking, loss, pred.dtype)
            from kornia.losses import _lovasz_kernels

            names = set()
            triton.runtime.driver.set_active(Card(capability))
            try:
                for (kernel, programs, _, *args), kwargs in launched:
                    compiled = getattr(_lovasz_kernels, kernel).warmup(*args, grid=(programs,), **kwargs)
                    registers, spilt = usage_of(compiled)
                    assert spilt <= MOST_SPILT, f"{kernel}: {registers} registers, {spilt} bytes spilt"
                    names.add(kernel)
            finally:
                with contextlib.suppress(RuntimeError):  # raised on a machine without a GPU
                    triton.runtime.driver.reset_active()
            assert len(names) == (8 if capability in (75, 90) else 5)
