# SPDX-License-Identifier: Apache-2.0
"""Work on the CPU in independent pieces, each done from end to end by one thread.

PyTorch divides a large operation among OpenMP threads, which wait for each other at its end. Where other processes keep
the cores busy, as the workers of a data loader do, each of these waits takes milliseconds. The operations of a worker
here are single-threaded, so threads wait for each other once: when all pieces are done.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Callable, Iterable

import torch

# By process, as the threads of a process do not survive its fork, and by their number.
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_locks: dict[int, threading.Lock] = {}


def in_pieces(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
    """Do ``[work(piece) for piece in pieces]`` without autograd, by as many threads as PyTorch may use here.

    Where that is one thread, as in a worker, the caller does it all. An exception ends the work and is raised here.
    """
    todo = deque(enumerate(pieces))
    results: dict[int, Any] = {}
    inference = torch.is_inference_mode_enabled()

    def take_pieces() -> None:
        # Whether autograd records is a property of a thread.
        with torch.inference_mode(inference), torch.no_grad():
            while todo:
                try:
                    index, piece = todo.popleft()
                except IndexError:  # another worker has taken the last one
                    return
                results[index] = work(piece)

    count, threads = len(todo), torch.get_num_threads()
    started: list[Future[None]] = []
    try:  # also where a key interrupts the start
        if threads > 1:
            with suppress(RuntimeError):  # no thread can be started, as when the interpreter shuts down
                pool = _workers(threads)
                for _ in range(min(threads, count)):
                    started.append(pool.submit(take_pieces))
        if not started:
            take_pieces()
        for each in started:
            each.result()
    finally:
        todo.clear()  # after an exception, workers only finish the pieces that they have begun
        wait(started)
    return [results[index] for index in range(count)]


def _workers(count: int) -> ThreadPoolExecutor:
    """The threads of this process whose operations are single-threaded."""
    process = os.getpid()
    if (process, count) not in _pools:
        with _locks.setdefault(process, threading.Lock()):
            if (process, count) not in _pools:
                # What a thread sets as its number of OpenMP threads becomes that of all threads made later. So it is
                # read and set again, by a thread made for that: the caller may have another number of its own.
                starter = threading.Thread(target=_start, args=(process, count))
                starter.start()
                starter.join()
    if (process, count) not in _pools:
        raise RuntimeError("no thread could be started")
    return _pools[process, count]


def _start(process: int, count: int) -> None:
    number = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "lovasz", initializer=_become_single_threaded)
    all_started = threading.Barrier(count + 1)
    try:
        for _ in range(count):
            pool.submit(all_started.wait)
        all_started.wait()
        _pools[process, count] = pool
    except RuntimeError:
        all_started.abort()
    finally:
        torch.set_num_threads(number)


def _become_single_threaded() -> None:
    torch.get_num_threads()  # a thread that has never asked would later take the number of the process
    torch.set_num_threads(1)
