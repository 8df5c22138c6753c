# SPDX-License-Identifier: Apache-2.0
"""Measured sizes: from which size of the input each algorithm is used, and how much it processes at a time.

Tests change them, so that small inputs reach every algorithm and are split into many parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Tuning:
    """Sizes as numbers of elements, and switches."""

    # Number of errors that the dense form sorts at a time (one row, if that is longer). Each takes about 40 bytes.
    sorted_at_once: int = 1 << 22
    # Whether eager code may branch on values, which compiled code cannot.
    eager_forms: bool = True
    # On the CPU, the form that uses threads computes inputs of at least this many logits. PyTorch does not divide
    # operations on fewer among its threads, except for the softmax, so handing them to a thread would save nothing.
    cpu_from: int = 1 << 14
    # One thread does all the work on an input of at most this many errors.
    one_piece: int = 1 << 16
    # Number of errors for one piece of a thread's work on larger inputs. A piece of rows or images may be smaller, so
    # that every thread gets one. In small pieces, threads mostly wait for the GIL.
    piece: int = 1 << 18
    # The softmax loss selects the pixels to rank in groups whose number of errors times the number of classes is at
    # least this. In smaller groups, ranking all pixels is faster.
    candidates_from: int = 1 << 20
    # Images with fewer logits than this are merged into one if they are scored as one group.
    merged_below: int = 1 << 14
    # Number of errors that are counted in bins at a time, with about 40 bytes of temporaries each. It is larger on
    # CUDA, where each launch has a fixed cost.
    counted_at_once: int = 1 << 18
    counted_at_once_cuda: int = 1 << 22
    # Whether to use the fused kernels. They have not run on a GPU yet, so they are off by default.
    kernels: bool = os.environ.get("KORNIA_LOVASZ_KERNELS") == "1"
    # Number of sorted pixels that one program of a fused kernel ranks.
    ranked_by_program: int = 1 << 11
    # The metric counts by cells if there are at least this many pixels.
    cells_from: int = 1 << 16
    # Number of pixels for one piece of a thread's work in the metric.
    metric_piece: int = 1 << 18


tuning = Tuning()
