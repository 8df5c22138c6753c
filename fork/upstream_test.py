"""Run the tests of a Kornia checkout on the release and on the fork, and compare them test by test.

``make upstream-test KORNIA=<checkout>`` runs its tests of losses and metrics in all dtypes, and ends with status 1 if a
test that passes on the release does not pass on the fork. What has run is kept in ``build/upstream-test``, so that a
run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from fork.compose import compose, fetch_release, read_settings
from fork.outcomes import PASSED, Difference, compare, read_outcomes

ROOT = Path(__file__).resolve().parents[1]
SCOPE = ["tests/losses", "tests/metrics"]
HOW_TO_GET_ONE = (
    "Give a checkout of Kornia, whose releases come without tests: "
    "git clone --depth 1 --branch v{release} https://github.com/kornia/kornia, then "
    "make upstream-test KORNIA=<that folder>."
)
# More tests than this lost at once are no accident, and not worth a second run.
MOST_REPEATED = 200


@dataclass
class Side:
    """One of the two packages under test, in a copy of the checkout that holds no other ``kornia``."""

    name: str
    tree: Path
    logs: Path


def prepare(checkout: Path, root: Path, folder: Path, options: list[str]) -> tuple[Side, Side]:
    """Copy the checkout twice, with the release's and the fork's ``kornia`` for its own.

    Logs are kept by what they depend on, so that an edit of the overlay calls for the fork's half again only.

    Raises:
        RuntimeError: this is no checkout of Kornia. The message is one sentence.
    """
    release = read_settings(root)["release"]
    if missing := [name for name in ("tests", "testing", "conftest.py") if not (checkout / name).exists()]:
        raise RuntimeError(f"{checkout} has no {', '.join(missing)}. {HOW_TO_GET_ONE.format(release=release)}")
    wheel, composed = fetch_release(root), folder / "composed"
    compose(wheel, root / "kornia", composed, read_settings(root).get("exports", {}))
    with zipfile.ZipFile(wheel) as archive:
        package = [name for name in archive.namelist() if name.startswith("kornia/")]
        shutil.rmtree(folder / "pristine", ignore_errors=True)
        archive.extractall(folder / "pristine", package)
    ignore = shutil.ignore_patterns(".git", "__pycache__", ".venv", ".pixi")
    tests = [path for name in ("tests", "testing") for path in sorted((checkout / name).rglob("*.py"))]
    sides = []
    for name, package in (("release", folder / "pristine" / "kornia"), ("fork", composed / "kornia")):
        tree = folder / name
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(checkout, tree, ignore=ignore)
        shutil.rmtree(tree / "kornia", ignore_errors=True)
        shutil.copytree(package, tree / "kornia", ignore=ignore)
        digest = hashlib.sha256(repr((options, sys.version, os.environ.get("KORNIA_TEST_OPTIMIZER"))).encode())
        for path in [*sorted((tree / "kornia").rglob("*.py")), checkout / "conftest.py", *tests]:
            digest.update(path.read_bytes())
        sides.append(Side(name, tree, folder / "logs" / f"{name}-{digest.hexdigest()[:12]}"))
    return sides[0], sides[1]


def split(tree: Path, scope: list[str]) -> list[str]:
    """Return what to run in one go each: ``tests`` folder by folder, and anything else as it was given.

    Raises:
        RuntimeError: the checkout has no such file. The message is one sentence.
    """
    parts = []
    for entry in scope:
        if not (tree / entry.partition("::")[0]).exists():
            raise RuntimeError(f"The checkout has no {entry}: name folders or files below tests/.")
        if entry.strip("/") == "tests":
            paths = sorted((tree / "tests").iterdir())
            parts += [f"tests/{path.name}" for path in paths if path.is_dir() and any(path.rglob("test_*.py"))]
            parts += [f"tests/{path.name}" for path in paths if path.name.startswith("test_") and path.suffix == ".py"]
        else:
            parts.append(entry.rstrip("/"))
    return parts


def run(side: Side, part: str, options: list[str]) -> dict[str, str]:
    """Run a part of the tests, unless its log is kept, and return the outcomes by test."""
    log = side.logs / (part.replace("/", ".").replace(":", "-") + ".jsonl")
    if not log.exists():
        started = time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        partial = log.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        status = run_pytest(side, [part], [*options, "--report-log", str(partial)], log.with_suffix(".txt"))
        if not partial.exists():
            raise RuntimeError(f"pytest ended with status {status} and no report: see {log.with_suffix('.txt')}.")
        seconds = time.monotonic() - started
        note = "" if status in (0, 1, 5) else f", pytest ended with status {status}: see {log.with_suffix('.txt')}"
        print(f"{side.name:8}{part}: {counts(read_outcomes(partial))}, {seconds:.0f} s{note}", flush=True)
        partial.rename(log)
    return read_outcomes(log)


def run_pytest(side: Side, tests: list[str], options: list[str], output: Path) -> int:
    """Run pytest in the tree of a side, with its ``kornia`` before any installed one, and return its status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # Without this variable Kornia leaves out the tests of torch.compile.
    environment = {"KORNIA_TEST_OPTIMIZER": "inductor", **os.environ, "PYTHONPATH": str(side.tree)}
    with output.open("w", encoding="utf-8") as file:
        return subprocess.run(
            [*command, *options, *tests], cwd=side.tree, env=environment, stdout=file, stderr=file, check=False
        ).returncode


def check_import(side: Side) -> None:
    """Make sure that the tests of a side import its package.

    Raises:
        RuntimeError: they import another one. The message is one sentence.
    """
    code = "import kornia; print(kornia.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(side.tree)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=side.tree, env=environment, capture_output=True, text=True, check=False
    )
    if Path(result.stdout.strip()).parent != side.tree / "kornia":
        said = (result.stdout + result.stderr).strip()
        raise RuntimeError(f"The tests on the {side.name} would not import {side.tree / 'kornia'}, got: {said}")


def repeat(sides: tuple[Side, Side], lost: list[str], options: list[str]) -> dict[str, tuple[str, str]]:
    """Run the lost tests alone, on both sides, and return their outcomes: many of Kornia's tests draw random inputs."""
    outcomes = []
    for side in sides:
        log = side.logs / "repeated.jsonl"
        log.unlink(missing_ok=True)
        run_pytest(side, lost, [*options, "--report-log", str(log)], log.with_suffix(".txt"))
        outcomes.append(read_outcomes(log))
    return {test: (outcomes[0].get(test, "missing"), outcomes[1].get(test, "missing")) for test in lost}


def counts(outcomes: dict[str, str]) -> str:
    """How many tests have which outcome, in words."""
    values = list(outcomes.values())
    return ", ".join(f"{values.count(each)} {each}" for each in sorted(set(values))) or "no test"


def report(difference: Difference, repeated: dict[str, tuple[str, str]], sides: list[dict[str, str]]) -> int:
    """Print what changed, and return the exit status: 1 if a test that passed on the release is lost."""
    unsteady = {test: pair for test, pair in repeated.items() if pair[1] == PASSED or pair[0] != PASSED}
    lost = {test: pair for test, pair in difference.lost.items() if test not in unsteady}
    print(f"\nrelease {counts(sides[0])}\nfork    {counts(sides[1])}")
    groups = {
        "passed on the release, not on the fork": lost,
        "so too at first, but not when run again": {test: difference.lost[test] for test in unsteady},
        "passes on the fork, not on the release": difference.gained,
        "passes on neither, and differs": difference.other,
    }
    for title, tests in groups.items():
        print(f"{title}: {len(tests) or 'none'}")
        for test, (before, after) in tests.items():
            print(f"  {test}: {before} -> {after}")
    if not any(outcome == PASSED for outcome in sides[0].values()):
        print("No test passed on the release, so nothing was compared.")
        return 1
    return 1 if lost else 0


def main() -> None:
    """Run and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kornia", type=Path, metavar="CHECKOUT", help="a checkout of Kornia's repository")
    parser.add_argument("--scope", nargs="+", default=SCOPE, help="folders or files (default: %(default)s)")
    parser.add_argument("--dtype", default="all", help="as in Kornia's own options (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="as in Kornia's own options (default: %(default)s)")
    parser.add_argument("--timeout", type=int, default=120, help="seconds for each test (default: %(default)s)")
    args, others = parser.parse_known_args()
    if args.kornia is None:
        sys.exit(HOW_TO_GET_ONE.format(release=read_settings(ROOT)["release"]))
    options = ["--dtype", args.dtype, "--device", args.device, "--timeout", str(args.timeout), *others]
    try:
        sides = prepare(args.kornia.absolute(), ROOT, ROOT / "build" / "upstream-test", options)
        results: list[dict[str, str]] = [{}, {}]
        for side in sides:
            check_import(side)
        for part in split(sides[0].tree, args.scope):
            for side, outcomes in zip(sides, results):
                outcomes |= run(side, part, options)
        difference = compare(*results)
        lost = list(difference.lost)
        repeated = repeat(sides, lost, options) if 0 < len(lost) <= MOST_REPEATED else {}
        sys.exit(report(difference, repeated, results))
    except RuntimeError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
