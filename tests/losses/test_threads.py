# SPDX-License-Identifier: Apache-2.0
"""``in_pieces`` returns the right results, and has no side effects on threads, processes and modes of autograd."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kornia.losses import LovaszHingeLoss, LovaszSoftmaxLoss
from kornia.losses._threads import in_pieces


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Let PyTorch use 1, 2 or 3 threads, whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def thread_counts():
    """How many threads PyTorch may use in this thread, and in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return torch.get_num_threads(), pool.submit(torch.get_num_threads).result()


class LargeOperations(TorchDispatchMode):
    """Records the operations of this thread that PyTorch would divide among its threads, with their sizes."""

    grain = 1 << 15  # smaller operations stay in the thread
    # These return memory or a view of it, or take as long as their indices.
    small = re.compile(
        "empty|view|split|slice|select.int|expand|transpose|unbind|detach|alias|squeeze|index.Tensor|index_put_"
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        size = max((x.numel() for x in (*args, result) if isinstance(x, torch.Tensor)), default=0)
        if size >= self.grain and not self.small.search(str(func)):
            self.found.append((str(func), size))
        return result


def run(program, **variables):
    """Run a program in a new Python process and return the words that it prints. It fails after 60 seconds."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(  # noqa: S603
        command, check=False, capture_output=True, text=True, timeout=60, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.usefixtures("threads")
class TestInPieces:
    @pytest.mark.parametrize("count", [0, 1, 2, 50])
    def test_feature_results_in_order(self, count):
        assert in_pieces(lambda piece: piece**2, range(count)) == [piece**2 for piece in range(count)]

    def test_feature_one_thread_per_piece(self, threads):
        met = threading.Barrier(threads, timeout=30)

        def work(piece):
            met.wait()  # until as many pieces run at the same time as there are threads
            return threading.get_ident(), torch.get_num_threads()

        done = in_pieces(work, range(threads))
        assert len({thread for thread, _ in done}) == threads
        assert {number for _, number in done} == {1}
        assert (threading.get_ident() in {thread for thread, _ in done}) == (threads == 1)

    def test_feature_nested_calls(self):
        def work(piece):
            assert in_pieces(lambda part: threading.get_ident(), range(3)) == [threading.get_ident()] * 3
            return sum(in_pieces(lambda part: part * piece, range(4)))

        assert in_pieces(work, range(9)) == [6 * piece for piece in range(9)]

    def test_feature_thread_counts_unchanged(self, threads):
        before = thread_counts()
        assert before[0] == threads
        in_pieces(lambda piece: torch.zeros(100_000).add_(1), range(8))
        assert thread_counts() == before
        with pytest.raises(ZeroDivisionError):
            in_pieces(lambda piece: 1 // piece, [1, 0, 1])
        assert thread_counts() == before
        own = torch.get_num_threads()
        torch.set_num_threads(own + 3)  # a later change by the user is kept
        assert len(in_pieces(lambda piece: piece, range(9))) == 9
        assert thread_counts() == (own + 3, own + 3)

    def test_feature_thread_count_of_the_caller(self, threads):
        """The setting of the calling thread is used and kept, and new threads keep that of the process."""
        found = []

        def call():
            torch.get_num_threads()  # without this, PyTorch would use the setting of the process later
            torch.set_num_threads(5)  # also changes the setting for new threads
            entered.set()
            left.wait()
            in_pieces(lambda piece: piece, range(8))
            found.append(torch.get_num_threads())

        entered, left = threading.Event(), threading.Event()
        caller = threading.Thread(target=call)
        caller.start()
        entered.wait()
        torch.set_num_threads(threads)
        left.set()
        caller.join()
        assert found == [5]
        assert thread_counts() == (threads, threads)

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
    def test_exception(self, error):
        begun = []

        def work(piece):
            begun.append(piece)
            if piece == 0:
                raise error("piece 0")

        with pytest.raises(error, match="piece 0"):
            in_pieces(work, range(10_000))
        count = len(begun)
        assert in_pieces(lambda piece: piece, range(4)) == [0, 1, 2, 3]  # the workers are still usable
        assert len(begun) == count  # no worker has started another piece

    def test_feature_concurrent_calls(self):
        def call(number):
            return in_pieces(lambda piece: number * piece, range(20))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(call, range(40))) == [[n * piece for piece in range(20)] for n in range(40)]

    def test_feature_modes_of_the_caller(self):
        def modes(piece):
            return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        assert set(in_pieces(modes, range(4))) == {(False, False)}
        assert torch.is_grad_enabled()
        with torch.inference_mode():
            made_there = torch.zeros(3)
            assert set(in_pieces(modes, range(4))) == {(False, True)}
            in_pieces(lambda piece: made_there[piece].add_(1), range(3))
        assert torch.equal(made_there.clone(), torch.ones(3))


class TestProcess:
    """Tests that need a new process."""

    def test_exception_ctrl_c(self):
        """Ctrl-C interrupts the waiting main thread, but the exception is raised only when no piece is running."""
        printed = run(
            """
            import os, signal, threading, time
            import torch
            from kornia.losses._threads import in_pieces
            torch.set_num_threads(2)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
            working = []

            def work(piece):
                working.append(piece)
                time.sleep(0.2)  # until the caller waits
                if piece == 0:
                    os.kill(os.getpid(), signal.SIGINT)
                working.remove(piece)

            try:
                in_pieces(work, range(100))
            except KeyboardInterrupt:
                print(len(working), in_pieces(lambda piece: piece, range(2)), torch.get_num_threads())
            """
        )
        assert printed == ["0", "[0,", "1]", "2"]

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
    def test_feature_fork(self):
        """A forked child with one thread, such as a worker of a data loader, and one that starts its own workers."""
        printed = run(
            """
            import os
            import torch
            from kornia.losses import lovasz_hinge_loss
            from kornia.losses._threads import in_pieces
            torch.set_num_threads(2)
            pred, target = torch.linspace(-2, 2, 300_000).view(1, 1, 500, 600), torch.ones(1, 500, 600)
            expected = lovasz_hinge_loss(pred, target)
            for threads in (1, 2):
                child = os.fork()
                if child == 0:
                    torch.set_num_threads(threads)
                    works = in_pieces(lambda piece: piece, range(4)) == [0, 1, 2, 3]
                    if threads == 1:  # with more, OpenMP itself hangs in a forked child
                        works &= bool(torch.isclose(lovasz_hinge_loss(pred, target), expected))
                    os._exit(int(works))
                print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print(in_pieces(lambda piece: piece, range(1)))
            """
        )
        assert printed == ["1", "1", "[0]"]

    def test_feature_shutdown(self):
        """At interpreter shutdown, when no thread can be started, the caller does the work."""
        printed = run(
            """
            import atexit, threading
            import torch
            from kornia.losses._threads import in_pieces
            torch.set_num_threads(2)

            def work():
                print(sum(in_pieces(lambda piece: piece, range(10))))

            atexit.register(work)
            threading.Thread(target=lambda: (threading.main_thread().join(), work())).start()
            work()
            """
        )
        assert printed == ["45"] * 3

    def test_feature_shutdown_without_workers(self):
        printed = run(
            """
            import atexit
            import torch
            from kornia.losses._threads import in_pieces
            torch.set_num_threads(2)
            atexit.register(lambda: print(sum(in_pieces(lambda piece: piece, range(10)))))
            """
        )
        assert printed == ["45"]


@pytest.mark.parametrize("module", [LovaszHingeLoss(), LovaszSoftmaxLoss()], ids=["hinge", "softmax"])
@pytest.mark.usefixtures("threads")
class TestLosses:
    """The losses inside a training step."""

    def make(self, module, shape=(2, 300, 200)):
        channels = 1 if isinstance(module, LovaszHingeLoss) else 4
        generator = torch.Generator().manual_seed(0)
        pred = torch.randn(shape[0], channels, *shape[1:], generator=generator)
        return pred, torch.randint(0, max(2, channels), shape, generator=generator)

    def test_feature_same_value_with_any_thread_count(self, module, threads):
        pred, target = self.make(module, (3, 400, 500))
        torch.set_num_threads(1)
        leaf = pred.clone().requires_grad_()
        expected = module(leaf, target)
        expected.backward()
        torch.set_num_threads(threads)
        other = pred.clone().requires_grad_()
        value = module(other, target)
        value.backward()
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(other.grad, leaf.grad, rtol=1e-5, atol=1e-10)

    def test_feature_clip_gradient(self, module):
        """Clipping changes the gradient in place, which would raise for a tensor made in inference mode."""
        pred, target = self.make(module)
        module(pred.requires_grad_(), target).backward()
        torch.nn.utils.clip_grad_norm_([pred], 1e-3)
        assert pred.grad.norm() < 1.1e-3

    @pytest.mark.parametrize("pixels", [1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 20])
    @pytest.mark.parametrize("images", [1, 2, 5])
    @pytest.mark.parametrize("per_image", [True, False])
    def test_feature_no_large_operation_in_the_caller(self, module, per_image, images, pixels, threads):
        """Beside other processes, an operation that PyTorch divides among its threads can take milliseconds more."""
        module = type(module)(per_image=per_image)
        pred, target = self.make(module, (images, 8, pixels // (8 * images)))
        pred.requires_grad_()
        with LargeOperations() as operations:
            module(pred, target).backward()
        if threads == 1 and pred.numel() >= 1 << 16:
            assert operations.found != []  # there the caller does all the work, which the test must notice
        elif threads > 1:
            assert operations.found == []

    def test_exception_label(self, module, threads):
        pred, target = self.make(module)
        target[1, -1, -1] = 9
        before = thread_counts()
        with pytest.raises((ValueError, RuntimeError), match=r"target must hold 0|Class values"):
            module(pred, target)
        assert thread_counts() == before

    def test_feature_profiler(self, module):
        pred, target = self.make(module)
        with torch.profiler.profile() as profile:
            module(pred.requires_grad_(), target).backward()
        assert any("_Eager" in event.key for event in profile.key_averages())
