# SPDX-License-Identifier: Apache-2.0
"""The loss of a batch that is spread over several processes equals the loss of one process with the whole batch."""

from __future__ import annotations

import os
import tempfile
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from kornia.losses import lovasz_hinge_loss, lovasz_sigmoid_loss, lovasz_softmax_loss
from kornia.losses._lovasz_group import check_agreement
from kornia.losses._lovasz_options import Options
from kornia.losses._tuning import tuning

from testing.base import BaseTester
from testing.lovasz import INTERPRETED, RTOL

HEIGHT, WIDTH, CHANNELS = 9, 14, 3
# The fused kernels do not support float64.
DTYPE, ATOL = (torch.float32, 1e-7) if INTERPRETED else (torch.float64, 1e-14)
NUM_BINS = 32
# Number of images of each process.
SIZES = {"alike": (2, 2, 2), "different": (1, 3, 2), "empty": (3, 0, 1)}
CASES = [
    (loss, sizes, labels)
    for loss in ("hinge", "sigmoid", "softmax")
    for sizes in SIZES
    for labels in ("plain", "ignored", "apart", "absent")
]
SOFTMAX_OPTIONS = {"plain": {}, "ignored": {}, "apart": {"classes": "present"}, "absent": {"classes": "all"}}


def make_case(case, ranks):
    """Features and labels of each process."""
    loss, sizes, labels = case
    generator = torch.Generator().manual_seed(len(loss) + len(sizes))
    batches = []
    for rank in range(ranks):
        shape = (SIZES[sizes][rank], HEIGHT, WIDTH)
        features = torch.randn(shape[0], CHANNELS, HEIGHT, WIDTH, generator=generator).to(DTYPE)
        target = torch.randint(0, 4 if loss == "softmax" else 2, shape, generator=generator)
        if labels == "ignored" and rank == 0:
            target.fill_(-100)  # one process has no valid pixel
        elif labels == "apart":
            target.fill_(rank % 2)  # each process has one class
        elif labels == "absent":
            target.zero_()
        batches.append((features, target))
    return batches


def make_model(case):
    torch.manual_seed(7)
    return torch.nn.Conv2d(CHANNELS, 5 if case[0] == "softmax" else 1, 3, padding=1).to(DTYPE)


def make_loss(case, group):
    loss = {"hinge": lovasz_hinge_loss, "sigmoid": lovasz_sigmoid_loss, "softmax": lovasz_softmax_loss}[case[0]]
    options = SOFTMAX_OPTIONS[case[2]] if case[0] == "softmax" else {}
    return lambda *pair: loss(*pair, per_image=False, num_bins=NUM_BINS, process_group=group, **options)


def join_group(rank, ranks, folder, seconds=60):
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=seconds))


def train_in_group(rank, ranks, folder):
    join_group(rank, ranks, folder)
    # A limit below the size of one table. Rows shared by processes must be counted together all the same.
    tuning.counted_at_once = 10
    results = []
    for case in CASES:
        model = torch.nn.parallel.DistributedDataParallel(make_model(case))
        features, target = make_case(case, ranks)[rank]
        value = make_loss(case, dist.group.WORLD)(model(features), target)
        value.backward()
        results.append((value.detach(), [p.grad for p in model.parameters()]))
    # Without a graph, as in validation.
    with torch.no_grad():
        results.append((make_loss(CASES[0], dist.group.WORLD)(make_model(CASES[0])(features), target.clamp(max=1)), []))
    # One process runs backward twice. The second time needs no communication, so the others need not take part.
    for dtype in (torch.float64, torch.float32):
        leaf = make_model(CASES[0])(features).detach().to(dtype).requires_grad_()
        value = make_loss(CASES[0], dist.group.WORLD)(leaf, target.clamp(max=1))
        assert abs(value - results[-1][0]) < 1e-5 * value
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        if rank == 0:
            (second,) = torch.autograd.grad(2 * value, leaf)
            assert torch.equal(second, 2 * first)
    alone = dist.new_group([0])
    messages = []
    pair = make_model(CASES[0])(features), target.clamp(max=1)
    wrong = [{"num_bins": 8}, {"per_image": False}, {"per_image": False, "num_bins": 8, "process_group": alone}]
    for options in wrong[: 2 if rank == 0 else 3]:
        try:
            lovasz_hinge_loss(*pair, **{"process_group": dist.group.WORLD, **options})
        except ValueError as error:
            messages.append(str(error))
    torch.save((results, messages), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def disagree(rank, ranks, folder):
    """The last process passes other arguments than the rest."""
    join_group(rank, ranks, folder)
    torch.manual_seed(0)
    target = torch.zeros(2, 4, 5, dtype=torch.long)
    logits = {classes: torch.randn(2, classes, 4, 5) for classes in (1, 3, 4)}

    def hinge(num_bins=8, dtype=torch.float32, images=2):
        pred, labels = logits[1][:images].to(dtype), target[:images]
        return lovasz_hinge_loss(pred, labels, per_image=False, num_bins=num_bins, process_group=dist.group.WORLD)

    def softmax(count, classes="all"):
        options = {"per_image": False, "num_bins": 8, "process_group": dist.group.WORLD}
        return lovasz_softmax_loss(logits[count], target, classes=classes, **options)

    pairs = [
        (hinge, partial(hinge, 16)),
        (partial(softmax, 3), partial(softmax, 4)),
        (partial(softmax, 3), partial(softmax, 3, "present")),
        (partial(softmax, 3, [0, 1]), partial(softmax, 3, [0, 2])),
        (hinge, partial(softmax, 3)),
        (hinge, partial(hinge, dtype=torch.float64)),
        (hinge, partial(hinge, dtype=torch.float64, images=0)),
    ]
    messages = []
    for pair in pairs:
        try:
            pair[rank == ranks - 1]()
        except ValueError as error:
            messages.append(str(error))
    torch.save((messages, len(pairs), hinge()), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


def lose_a_process(how, rank, ranks, folder):
    """The last process does not compute the second loss."""
    join_group(rank, ranks, folder, seconds=5 if how == "hangs" else 20)
    features, target = make_case(CASES[0], ranks)[rank]
    loss, model = make_loss(CASES[0], dist.group.WORLD), make_model(CASES[0])
    loss(model(features), target)
    if rank == ranks - 1:
        if how == "raises":
            raise ArithmeticError
        if how == "hangs":
            time.sleep(10)
        os._exit(1)
    try:
        loss(model(features), target)
    except RuntimeError as error:
        torch.save(str(error), Path(folder) / f"error{rank}.pt")
    os._exit(0)


def run_processes(function, ranks, folder):
    processes = [mp.get_context("spawn").Process(target=function, args=(rank, ranks, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} of {ranks} processes hang"
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module", params=(2, 3))
def trained(request):
    with tempfile.TemporaryDirectory() as folder:
        assert not any(run_processes(train_in_group, request.param, folder))
        yield [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(request.param)]


class TestGroup(BaseTester):
    @pytest.mark.parametrize("case", CASES, ids="-".join)
    def test_feature_equals_single_process(self, case, trained):
        batches = make_case(case, len(trained))
        model = make_model(case)
        pred = model(torch.cat([features for features, _ in batches]))
        expected = make_loss(case, None)(pred, torch.cat([target for _, target in batches]))
        expected.backward()
        for results, _ in trained:
            value, grads = results[CASES.index(case)]
            self.assert_close(value, expected.detach(), rtol=4 * RTOL[DTYPE], atol=1e-14)
            assert torch.equal(value, trained[0][0][CASES.index(case)][0])
            for grad, parameter in zip(grads, model.parameters()):
                self.assert_close(grad, parameter.grad, rtol=100 * RTOL[DTYPE], atol=ATOL)

    def test_feature_no_grad(self, trained):
        values = [results[-1][0] for results, _ in trained]
        assert all(torch.equal(value, values[0]) for value in values)

    def test_exception(self, trained):
        for rank, (_, messages) in enumerate(trained):
            for message, part in zip(messages, ("pass per_image=False", "pass num_bins", "must include this process")):
                assert message.startswith("process_group ")
                assert part in message
            assert len(messages) == (2 if rank == 0 else 3)

    def test_exception_different_arguments(self):
        """All processes raise, and the group stays usable."""
        with tempfile.TemporaryDirectory() as folder:
            assert run_processes(disagree, 3, folder) == [0, 0, 0]
            results = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(3)]
        for messages, count, value in results:
            assert len(messages) == count
            assert all(
                message.startswith("all processes of process_group must call the same loss") for message in messages
            )
            assert torch.equal(value, results[0][2])
        assert "num_bins=8" in results[0][0][0]
        assert "num_bins=16" in results[2][0][0]

    @pytest.mark.parametrize("how", ["exits", "raises", "hangs"])
    def test_exception_lost_process(self, how):
        """The other processes raise, at the latest after the timeout of the group."""
        with tempfile.TemporaryDirectory() as folder:
            *others, lost = run_processes(partial(lose_a_process, how), 3, folder)
            assert others == [0, 0]
            assert lost != 0  # its own status, or that of a signal
            for rank in range(2):
                assert torch.load(Path(folder) / f"error{rank}.pt")


def test_feature_no_agreement_check_on_cuda():
    """Reading the result of the check would wait for the device. No group exists here, so any communication raises."""
    check_agreement(torch.zeros(1, 8, device="meta"), Options("hinge", num_bins=8))
