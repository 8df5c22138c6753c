# SPDX-License-Identifier: Apache-2.0
"""The test options and fixtures of Kornia that these tests use, under the same names."""

from __future__ import annotations

import os
from functools import partial
from itertools import product

import pytest
import torch

DEVICES = {"cpu": torch.device("cpu")}
if torch.cuda.is_available():
    DEVICES["cuda"] = torch.device("cuda:0")
if torch.backends.mps.is_available():
    DEVICES["mps"] = torch.device("mps")

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}

# Fixture, option, environment variable, default, and the values that "all" stands for.
OPTIONS = [
    ("device_name", "--device", "KORNIA_TEST_DEVICE", "all", list(DEVICES)),
    ("dtype_name", "--dtype", "KORNIA_TEST_DTYPE", "all", list(DTYPES)),
    ("optimizer_backend", "--optimizer", "KORNIA_TEST_OPTIMIZER", "inductor", ["inductor", "eager", "aot_eager"]),
]


def pytest_addoption(parser):
    for _, option, variable, default, every in OPTIONS:
        parser.addoption(
            option,
            default=os.environ.get(variable, default),
            help=f"comma-separated, or 'all' for {', '.join(every)} (default: {default}; env: {variable})",
        )


def pytest_generate_tests(metafunc):
    used = [row for row in OPTIONS if row[0] in metafunc.fixturenames]
    if used:
        values = []
        for _, option, _, _, every in used:
            given = metafunc.config.getoption(option)
            values.append(every if given == "all" else given.split(","))
        # MPS has no float64.
        combinations = [names for names in product(*values) if not {"mps", "float64"} <= set(names)]
        metafunc.parametrize([row[0] for row in used], combinations)


@pytest.fixture
def device(device_name):
    if device_name not in DEVICES:
        pytest.skip(f"no device {device_name!r} on this machine")
    return DEVICES[device_name]


@pytest.fixture
def dtype(dtype_name):
    return DTYPES[dtype_name]


@pytest.fixture
def torch_optimizer(optimizer_backend):
    torch._dynamo.reset()
    return partial(torch.compile, backend=optimizer_backend)
