"""Every test that the page of promises names is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "source" / "promises.rst"
NAMED = re.findall(r"^     - ``(.+)``$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_every_promise_names_a_test():
    assert len(NAMED) == PAGE.read_text(encoding="utf-8").count("   * - ") - 1 > 25
    assert len(set(NAMED)) == len(NAMED)


@pytest.mark.parametrize("name", NAMED)
def test_is_there(name):
    file, *path = name.split("::")
    node = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    for part in path:
        found = [child for child in node.body if getattr(child, "name", None) == part]
        assert found, f"{file} has no {part}"
        node = found[-1]
    assert path or any("test_" in getattr(child, "name", "") or isinstance(child, ast.ClassDef) for child in node.body)
