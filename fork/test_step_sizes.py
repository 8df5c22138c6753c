"""Tests of the line counts in the texts of the pull requests and in the documentation."""

from fork.patch import Step
from fork.step_sizes import SCENES, Size, sizes, table

BEFORE = '''"""A module."""

x = 1
'''
AFTER = '''"""A module.

With more to say.
"""

# A comment
x = 1


def double(y):
    """Two lines of code and one of documentation."""
    return 2 * y
'''


def make_steps():
    edits = [{"file": "kornia/__init__.py", "lines": ["", "import x"]}, {"file": "docs/x.rst", "lines": ["x"]}]
    first = Step("first", "feat(x): one", "nothing", [], edits=edits, texts={"kornia/x.py": BEFORE})
    texts = {"kornia/x.py": AFTER, "tests/test_x.py": "# why\n\nassert True\n", "changelog.d/+x.md": "x\n"}
    return [first, Step("second", "feat(x): two", "all", [], texts=texts)]


def test_lines_are_counted_once_each():
    # In the second step, the first line of the module's docstring changes, so it counts again.
    assert sizes(make_steps()) == [Size(code=2, prose=1, tests=0), Size(code=2, prose=5, tests=2)]


def test_table_shows_times_before_and_after():
    times = {name: dict.fromkeys(SCENES, found) for name, found in (("release", [0.1, 0.3, 0.2]), ("second", [0.004]))}
    rows = table(make_steps(), times).split("   * - ")[1:]
    cells = [[cell.strip() for cell in row.split("\n     -")] for row in rows]
    assert cells[1] == ["1", "one", "2", "1", "0", "", "", "nothing"]
    assert cells[2] == ["2", "two", "2", "5", "2", "200 → 4", "200 → 4", "all"]
