"""Run the tests of a Kornia checkout on the release and on the fork, and compare the outcome of each test.

``make upstream-test KORNIA=<checkout>`` runs the tests of losses and metrics in all dtypes. It exits with status 1 if a
test passes on the release but not on the fork. Many of Kornia's tests draw random inputs, so run such a test again
before you look for a cause. The logs are in ``build/upstream-test``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree as ET

from fork.compose import compose, fetch_release

ROOT = Path(__file__).resolve().parents[1]
SCOPE = ["tests/losses", "tests/metrics"]


def make_tree(checkout: Path, side: str, folder: Path) -> Path:
    """Copy the checkout, and replace its ``kornia`` by that of the release or of the fork.

    Raises:
        RuntimeError: if ``checkout`` is not a checkout of Kornia. The message is one sentence.
    """
    if not (checkout / "tests").is_dir() or not (checkout / "conftest.py").is_file():
        raise RuntimeError(
            f"{checkout} is not a checkout of Kornia, and a release contains no tests: "
            "git clone https://github.com/kornia/kornia, then make upstream-test KORNIA=<that folder>."
        )
    tree = folder / side
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(checkout, tree, ignore=shutil.ignore_patterns("kornia", ".git", "__pycache__", ".venv", ".pixi"))
    wheel = fetch_release(ROOT)
    if side == "fork":
        compose(wheel, ROOT, folder / "composed")
        shutil.copytree(folder / "composed" / "kornia", tree / "kornia")
    else:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tree, [name for name in archive.namelist() if name.startswith("kornia/")])
    return tree


def run(tree: Path, arguments: list[str]) -> dict[str, str]:
    """Run pytest with the ``kornia`` of a tree, and return the outcome of each test."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # Kornia runs its tests of torch.compile only if this variable is set.
    environment = {"KORNIA_TEST_OPTIMIZER": "inductor", **os.environ, "PYTHONPATH": str(tree)}
    report = tree.with_suffix(".xml")
    with tree.with_suffix(".txt").open("w", encoding="utf-8") as log:
        arguments = [f"--junitxml={report}", *arguments]
        subprocess.run([*command, *arguments], cwd=tree, env=environment, stdout=log, stderr=log, check=False)
    return {
        f"{case.get('classname')}::{case.get('name')}": next(
            (child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed"
        )
        for case in ET.parse(report).iter("testcase")  # noqa: S314 - pytest wrote it
    }


def compare(release: dict[str, str], fork: dict[str, str]) -> int:
    """Print the number of tests by outcome and each test whose outcome differs, and return the exit status.

    The status is 1 if no test passes on the release, or if one that passes there does not pass on the fork.
    """
    for side, outcomes in (("release", release), ("fork", fork)):
        counts = {kind: list(outcomes.values()).count(kind) for kind in sorted(set(outcomes.values()))}
        print(f"{side}: {', '.join(f'{count} {kind}' for kind, count in counts.items()) or 'no tests'}")
    differ = {test for test in release.keys() | fork.keys() if release.get(test) != fork.get(test)}
    for test in sorted(differ):
        print(f"  {test}: {release.get(test, 'missing')} -> {fork.get(test, 'missing')}")
    passed = [test for test, outcome in release.items() if outcome == "passed"]
    return int(not passed or any(test in differ for test in passed))


def main() -> None:
    """Run the tests, and compare the outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kornia", type=Path, help="a checkout of Kornia's repository")
    parser.add_argument("--scope", nargs="+", default=SCOPE, help="folders or files (default: %(default)s)")
    parser.add_argument("--dtype", default="all", help="passed to Kornia's tests (default: %(default)s)")
    args, others = parser.parse_known_args()
    folder = ROOT / "build" / "upstream-test"
    arguments = [*args.scope, "--dtype", args.dtype, "--timeout", "120", *others]
    try:
        trees = [make_tree(args.kornia.absolute(), side, folder) for side in ("release", "fork")]
    except RuntimeError as error:
        sys.exit(str(error))
    sys.exit(compare(*(run(tree, arguments) for tree in trees)))


if __name__ == "__main__":
    main()
