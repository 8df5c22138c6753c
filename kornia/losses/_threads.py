# SPDX-License-Identifier: Apache-2.0
"""Runs CPU work in independent pieces, each processed from start to end by one worker thread.

PyTorch splits a large operation among OpenMP threads, which wait for each other at its end. If other processes keep the
cores busy, such as the workers of a data loader, each of these waits takes milliseconds. Worker threads here run
single-threaded operations, so threads wait for each other only once: when all pieces are done.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, Callable, Iterable

import torch

# Keyed by process, because threads do not survive a fork, and by the number of threads.
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_locks: dict[int, threading.Lock] = {}


def in_pieces(work: Callable[[Any], Any], pieces: Iterable[Any]) -> list[Any]:
    """Compute ``[work(piece) for piece in pieces]`` without autograd, with as many threads as PyTorch may use here.

    If PyTorch may use only one, as in a worker thread, the caller does all the work. If a piece raises an exception,
    no further piece is started, and the exception is raised here.
    """
    todo = deque(enumerate(pieces))
    results: dict[int, Any] = {}
    inference = torch.is_inference_mode_enabled()

    def take_pieces() -> None:
        # Grad mode and inference mode are properties of a thread.
        with torch.inference_mode(inference), torch.no_grad():
            while todo:
                try:
                    index, piece = todo.popleft()
                except IndexError:  # another thread has taken the last piece
                    return
                results[index] = work(piece)

    count, threads = len(todo), torch.get_num_threads()
    started: list[Future[None]] = []
    try:  # Ctrl-C may interrupt the start, too
        if threads > 1:
            with suppress(RuntimeError):  # no thread can be started, for example at shutdown
                pool = _workers(threads)
                for _ in range(min(threads, count)):
                    started.append(pool.submit(take_pieces))
        if not started:
            take_pieces()
        for each in started:
            each.result()
    finally:
        todo.clear()  # after an exception, threads finish only the pieces that they have begun
        wait(started)
    return [results[index] for index in range(count)]


def _workers(count: int) -> ThreadPoolExecutor:
    """Return the worker threads of this process. Their operations are single-threaded."""
    process = os.getpid()
    if (process, count) not in _pools:
        with _locks.setdefault(process, threading.Lock()):
            if (process, count) not in _pools:
                # When a worker thread sets its number of OpenMP threads, that becomes the default of all new threads.
                # A temporary thread reads the default before and restores it; the caller may have another number.
                starter = threading.Thread(target=_start, args=(process, count))
                starter.start()
                starter.join()
    if (process, count) not in _pools:
        raise RuntimeError("no thread could be started")
    return _pools[process, count]


def _start(process: int, count: int) -> None:
    default = torch.get_num_threads()
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
        torch.set_num_threads(default)


def _become_single_threaded() -> None:
    torch.get_num_threads()  # without this call, a later one would reset the thread to the default
    torch.set_num_threads(1)
