"""What a run of pytest said about each test, and how two runs differ."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

PASSED = "passed"


def read_outcomes(log: Path) -> dict[str, str]:
    """Return the outcome of each test in a log of pytest-reportlog: passed, failed, error, skipped or xfailed.

    A file that could not be collected has the outcome "error". A test that the log has not seen the end of, as after a
    crash, is left out.
    """
    outcomes: dict[str, str] = {}
    if not log.exists():
        return outcomes
    for line in log.read_text(encoding="utf-8").splitlines():
        report = json.loads(line)
        kind, test = report["$report_type"], report.get("nodeid", "")
        if kind == "CollectReport" and report["outcome"] == "failed":
            outcomes[test] = "error"
        if kind != "TestReport":
            continue
        outcome = report["outcome"]
        if report["when"] == "call":
            if "wasxfail" in report:
                outcome = "xfailed" if outcome == "skipped" else outcome
            outcomes[test] = outcome
        elif outcome == "failed":  # in setting up or tearing down
            outcomes[test] = "error"
        elif outcome == "skipped":
            outcomes[test] = "xfailed" if "wasxfail" in report else "skipped"
    return outcomes


@dataclass
class Difference:
    """How the outcomes of two runs differ, by test: before and after."""

    # Passed before, and not after: failed, skipped, or missing.
    lost: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Passes after, and did not before.
    gained: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Neither outcome is "passed".
    other: dict[str, tuple[str, str]] = field(default_factory=dict)


def compare(before: dict[str, str], after: dict[str, str]) -> Difference:
    """Compare two runs test by test."""
    difference = Difference()
    for test in sorted(before.keys() | after.keys()):
        pair = before.get(test, "missing"), after.get(test, "missing")
        if pair[0] != pair[1]:
            kind = "lost" if pair[0] == PASSED else "gained" if pair[1] == PASSED else "other"
            getattr(difference, kind)[test] = pair
    return difference
