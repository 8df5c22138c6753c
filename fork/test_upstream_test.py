"""Tests of ``fork/upstream_test.py``, on a checkout with a few tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from fork.upstream_test import compare, make_tree, run

ROOT = Path(__file__).resolve().parents[1]
TESTS = """
import pytest
import torch
from kornia.losses import lovasz_hinge_loss


def test_loss():
    assert lovasz_hinge_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 2, 2)) == 1


@pytest.mark.parametrize("label", ["a - b"])
def test_new_option(label):
    lovasz_hinge_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 2, 2), per_image=False)


@pytest.mark.skip
def test_skipped():
    pass
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_some.py").write_text(TESTS)
    (folder / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--dtype')\n")
    (folder / "kornia").mkdir()
    (folder / "kornia" / "__init__.py").write_text("raise ImportError('the package of the checkout')\n")
    return folder


def test_each_side_imports_its_package(checkout, tmp_path):
    outcomes = {side: run(make_tree(checkout, side, tmp_path), ["tests"]) for side in ("release", "fork")}
    passed, option, skipped = (f"tests.test_some::test_{name}" for name in ("loss", "new_option[a - b]", "skipped"))
    assert outcomes["release"] == {passed: "passed", option: "failure", skipped: "skipped"}
    assert outcomes["fork"] == {passed: "passed", option: "passed", skipped: "skipped"}


@pytest.mark.parametrize(
    ("release", "fork", "status", "line"),
    [
        ({"a": "passed", "b": "failure"}, {"a": "passed", "b": "failure"}, 0, "release: 1 failure, 1 passed"),
        ({"a": "passed", "b": "failure"}, {"a": "passed", "b": "passed"}, 0, "  b: failure -> passed"),
        ({"a": "passed"}, {"a": "failure"}, 1, "  a: passed -> failure"),
        ({"a": "passed"}, {}, 1, "  a: passed -> missing"),
        ({"a": "failure"}, {"a": "failure"}, 1, "fork: 1 failure"),
        ({}, {}, 1, "release: no tests"),
    ],
)
def test_compare(capsys, release, fork, status, line):
    assert compare(release, fork) == status
    assert line in capsys.readouterr().out.splitlines()


def test_no_checkout(tmp_path):
    command = [sys.executable, "-m", "fork.upstream_test", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"{tmp_path} is not a checkout of Kornia, ")
    assert result.stderr.count("\n") == 1
