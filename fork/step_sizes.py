"""Count the lines that each step of the series adds: for the texts of the pull requests and the documentation."""

from __future__ import annotations

import ast
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, NamedTuple

from fork.step_times import milliseconds

if TYPE_CHECKING:
    from fork.patch import Step

# Scenes whose times the documentation shows.
SCENES = ("hinge 4x1x512x512 late", "softmax 2x21x512x512 late")


class Size(NamedTuple):
    """Lines that a step adds or changes."""

    code: int = 0  # in the package, without docstrings, comments and blank lines
    prose: int = 0  # docstrings and comments in the package
    tests: int = 0  # in tests and test helpers, without blank lines

    def __str__(self) -> str:
        return f"{self.code:,} lines of code, {self.prose:,} of docstrings and comments, {self.tests:,} of tests"


def sizes(steps: list[Step]) -> list[Size]:
    """Return the size of each step. Lines that it adds to files of the release count as code."""
    found, before = [], dict[str, str]()
    for step in steps:
        edits = [edit for edit in step.edits if edit["file"].endswith(".py")]
        total = Size(code=sum(bool(line) for edit in edits for line in edit["lines"]))
        for path, text in step.texts.items():
            if path.endswith(".py"):
                added, is_code = added_lines(before.get(path, ""), text), code_lines(text)
                code = len(added & is_code)
                if path.startswith("kornia/"):
                    total = total._replace(code=total.code + code, prose=total.prose + len(added) - code)
                else:
                    total = total._replace(tests=total.tests + len(added))
                before[path] = text
        found.append(total)
    return found


def added_lines(before: str, after: str) -> set[int]:
    """Return the numbers, from 1, of the lines of a text that are not in an older one. Blank lines do not count."""
    lines = after.splitlines()
    matcher = SequenceMatcher(None, before.splitlines(), lines, autojunk=False)
    ranges = [(start, end) for tag, *_, start, end in matcher.get_opcodes() if tag in ("insert", "replace")]
    return {i + 1 for start, end in ranges for i in range(start, end) if lines[i].strip()}


def code_lines(text: str) -> set[int]:
    """Return the numbers, from 1, of the lines that are not blank and not in a comment or a docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(text.splitlines(), 1)
    return {i for i, line in lines if line.strip() and not line.lstrip().startswith("#")} - docstrings


def table(steps: list[Step], times: dict[str, dict[str, list[float]]]) -> str:
    """Return the steps, their sizes, the times before and after, and what changes for callers, for the documentation.

    Args:
        steps: the steps of the series.
        times: seconds of each scene, for the release and after each step that was timed, in order.
    """
    rows = [("Step", "What it does", "Code", "Doc", "Tests", "Hinge, ms", "Softmax, ms", "What changes for callers")]
    names = list(times)
    for number, (step, size) in enumerate(zip(steps, sizes(steps)), 1):
        title = step.title.partition(": ")[2]
        cells = ["", ""]
        if step.name in times:
            before, after = times[names[names.index(step.name) - 1]], times[step.name]
            cells = [f"{milliseconds(before[scene])} → {milliseconds(after[scene])}" for scene in SCENES]
        rows.append((str(number), title, *(f"{count:,}" for count in size), *cells, step.callers))
    head = ".. list-table::\n   :header-rows: 1\n   :widths: 5 27 7 7 7 11 11 25\n\n"
    return head + "".join("   * - " + "\n     - ".join(row).rstrip() + "\n" for row in rows)
