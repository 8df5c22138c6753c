# SPDX-License-Identifier: Apache-2.0
"""Which algorithm computes a loss or a metric from which size on, and how much it does at a time: measured numbers.

The tests change them, so that small inputs take every way and are divided into many parts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass
class Tuning:
    """Sizes are numbers of elements."""

    # Sorted at a time by the dense form, unless one row is longer; they take about 40 bytes each.
    sorted_at_once: int = 1 << 22
    # Whether eager code may compute otherwise than compiled code, which cannot branch on values.
    eager_forms: bool = True
    # The form for the CPU takes over from here on. Below, handing work to another thread takes longer than it saves.
    cpu_from: int = 1 << 16
    # The least for a piece of work of a thread. In smaller pieces, threads mostly wait for Python's lock.
    piece: int = 1 << 18
    # The candidates of a group are chosen from here on, in errors times classes. Below, it is faster to rank all.
    candidates_from: int = 1 << 20
    # Images smaller than this are merged into one when they are scored as a group.
    merged_below: int = 1 << 14
    # Counted at a time, with about 40 bytes of temporaries each; more on CUDA, as each launch has a fixed cost.
    counted_at_once: int = 1 << 18
    counted_at_once_cuda: int = 1 << 22
    # The fused kernels have not run on a GPU yet, so they are off unless someone asks for them.
    kernels: bool = os.environ.get("KORNIA_LOVASZ_KERNELS") == "1"
    # Sorted pixels that one program of a fused kernel ranks.
    ranked_by_program: int = 1 << 11
    # The metric counts by cells from here on.
    cells_from: int = 1 << 16
    # The least for a piece of work of a thread in the metric.
    metric_piece: int = 1 << 18


tuning = Tuning()
