"""Write the fork as a patch series against the source of the release, with a text for each pull request.

``make patch`` writes ``dist/upstream/``: for each step of ``fork/upstream/series.toml`` a patch for ``git am`` or
``git apply``, and beside it the text of its pull request. ``make patch-test`` also runs the tests of each step on the
tree that it leaves, and writes what they said into the text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from string import Template
from typing import Any

from fork.compose import SDIST, edit_release, fetch_release, read_settings
from fork.outcomes import PASSED, read_outcomes

ROOT = Path(__file__).resolve().parents[1]
LICENCE_LINE = "# SPDX-License-Identifier: Apache-2.0\n"
# Without this variable Kornia leaves out the tests of torch.compile.
OPTIMIZER = "KORNIA_TEST_OPTIMIZER"
# Names in the results of `make bench`, where the release is "Kornia " and its version.
BASELINE, OURS = "cross-entropy", "this fork"


@dataclass
class Step:
    """A commit of the series and a pull request: a ``[[step]]`` of ``series.toml``, which explains the settings."""

    name: str
    title: str
    files: list[str]
    proof: list[str] = field(default_factory=list)
    results: str = ""
    docs: list[dict[str, Any]] = field(default_factory=list)

    # What it adds or replaces, by path; filled in by `read_series`.
    sources: dict[str, Path] = field(default_factory=dict)

    @property
    def tests(self) -> list[str]:
        """The tests that the step adds."""
        return [path for path in self.sources if path.startswith("tests/")]

    @property
    def modules(self) -> list[str]:
        """The files of the package that the step adds or replaces."""
        return [path for path in self.sources if path.startswith("kornia/")]


def read_series(root: Path) -> list[Step]:
    """Return the steps, each with its files.

    Raises:
        RuntimeError: a file belongs to no step, a step has no file or lacks a text. The message is one sentence.
    """
    texts = root / "fork" / "upstream"
    rows = tomllib.loads((texts / "series.toml").read_text(encoding="utf-8"))["step"]
    steps = [Step(**row) for row in rows]
    for folder in ("kornia", "tests"):
        for source in sorted((root / folder).rglob("*.py")):
            path = source.relative_to(root).as_posix()
            step = next((each for each in steps if any(fnmatchcase(path, pattern) for pattern in each.files)), None)
            if step is None:
                raise RuntimeError(f"{path} belongs to no step: add a pattern for it to {texts / 'series.toml'}.")
            step.sources[path] = source
    for step in steps:
        if not step.sources:
            raise RuntimeError(f"The step {step.name!r} has no file: correct its patterns in {texts / 'series.toml'}.")
        fragments = sorted(texts.glob(f"{step.name}.*.md"))
        if not fragments or not (texts / f"{step.name}.md").is_file():
            raise RuntimeError(f"The step {step.name!r} needs {step.name}.md and {step.name}.<type>.md in {texts}.")
        # Without the number of a pull request, which is not known yet, Kornia wants a leading "+".
        step.sources |= {f"changelog.d/+{fragment.name}": fragment for fragment in fragments}
    return steps


def unpack_source(root: Path, target: Path) -> None:
    """Unpack the source archive of the release into ``target``."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fetch_release(root, SDIST)) as archive:
        archive.extractall(folder, filter="data")
        (top,) = Path(folder).iterdir()
        shutil.copytree(top, target)


def add_docs(root: Path, checkout: Path, steps: list[Step], base: Path) -> None:
    """Put the pages that the steps edit into ``base``, from a checkout, where the series shall apply.

    Raises:
        RuntimeError: the series would not apply there. The message is one sentence.
    """
    replaced = [path for step in steps for path in step.modules if (base / path).is_file()]
    inits = {str(PurePosixPath(path).with_name("__init__.py")) for path in read_settings(root).get("exports", {})}
    for path in sorted({*replaced, *inits}):
        theirs = checkout / path
        if not theirs.is_file() or theirs.read_bytes() != (base / path).read_bytes():
            release = read_settings(root)["release"]
            raise RuntimeError(
                f"{theirs} is not the file of kornia {release}, so the series would not apply there: check out its tag "
                f"v{release} in {checkout}, or rebase the fork on a release that has this file."
            )
    for page in {entry["file"] for step in steps for entry in step.docs}:
        if not (checkout / page).is_file():
            raise RuntimeError(f"There is no file {checkout / page}: give a checkout of Kornia's repository.")
        (base / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkout / page, base / page)


def insert_lines(text: str, after: str, lines: list[str]) -> str:
    """Return ``text`` with more lines, behind the line ``after``.

    Raises:
        ValueError: that line is not there exactly once.
    """
    old = text.splitlines()
    if old.count(after) != 1:
        raise ValueError(f"it has {old.count(after)} lines {after!r}, expected one")
    place = old.index(after) + 1
    return "\n".join([*old[:place], *lines, *old[place:]]) + "\n"


def apply_step(root: Path, steps: list[Step], index: int, tree: Path) -> None:
    """Write what a step changes into a tree that has the steps before it.

    Files get the licence header of the release's own files in place of our line, for a hook of Kornia asks for it.

    Raises:
        RuntimeError: a file lacks the licence line, or the release cannot be edited. The message is one sentence.
    """
    header = licence_header((tree / "kornia" / "__init__.py").read_text(encoding="utf-8"))
    for path, source in steps[index].sources.items():
        text = source.read_text(encoding="utf-8")
        if path.endswith(".py"):
            if not text.startswith(LICENCE_LINE):
                raise RuntimeError(f"{source} must begin with the line {LICENCE_LINE.strip()!r}.")
            text = f"{header}\n{text.removeprefix(LICENCE_LINE).lstrip()}"
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text, encoding="utf-8")
    done = {path for step in steps[: index + 1] for path in step.sources}
    exports = {path: names for path, names in read_settings(root).get("exports", {}).items() if path in done}
    for path, text in edit_release(fetch_release(root), root, exports).items():
        (tree / path).write_text(text, encoding="utf-8")
    for entry in steps[index].docs:
        page = tree / entry["file"]
        if page.is_file():
            try:
                text = insert_lines(page.read_text(encoding="utf-8"), entry["after"], entry["lines"])
            except ValueError as error:
                raise RuntimeError(f"{entry['file']} cannot take {entry['lines'][0]!r}, {error}.") from None
            page.write_text(text, encoding="utf-8")


def licence_header(text: str) -> str:
    """Return the comment at the head of a file, with its line ends."""
    lines = text.splitlines(keepends=True)
    length = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "".join(lines[:length])


def write_patches(root: Path, steps: list[Step], base: Path, out: Path) -> list[Path]:
    """Write a patch for each step against ``base``, which becomes the result, and return their files."""
    identity = git(root, "log", "-1", "--format=%an%n%ae%n%aI").splitlines()
    environment = {
        key: value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in zip([f"GIT_{role}_NAME", f"GIT_{role}_EMAIL", f"GIT_{role}_DATE"], identity)
    } | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    options = ["--no-signature", "--zero-commit", "--full-index", "--no-renames", "--stdout"]

    def commit(message: str) -> None:
        git(base, "add", "--all", "--force", environment=environment)
        git(base, "commit", "--quiet", "--message", message, environment=environment)

    git(base, "init", "--quiet", environment=environment)
    commit("release")
    patches = []
    for index, step in enumerate(steps):
        apply_step(root, steps, index, base)
        commit(f"{step.title}\n\n{summary(root, step)}")
        numbers = ["--start-number", str(index + 1), "-1", "--subject-prefix", f"PATCH {index + 1}/{len(steps)}"]
        patch = out / f"{index + 1:04}-{step.name}.patch"
        patch.write_text(git(base, "format-patch", *options, *numbers, environment=environment), encoding="utf-8")
        patches.append(patch)
    return patches


def git(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run git in a folder and return what it prints.

    Raises:
        RuntimeError: git failed. The message holds what it said.
    """
    command = ["git", "-c", "core.autocrlf=false", *arguments]
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"git {arguments[0]} failed in {folder}: {result.stderr.strip()}")
    return result.stdout


def summary(root: Path, step: Step) -> str:
    """The text of a pull request up to its first heading: the message of the commit."""
    text = (root / "fork" / "upstream" / f"{step.name}.md").read_text(encoding="utf-8")
    paragraphs = text.partition("\n## ")[0].strip().split("\n\n")
    return "\n\n".join(textwrap.fill(paragraph, 72) for paragraph in paragraphs) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# The text of the pull request
# ---------------------------------------------------------------------------------------------------------------------


def write_text(root: Path, step: Step, tested: str, out: Path) -> None:
    """Write the text of the pull request of a step."""
    template = Template((root / "fork" / "upstream" / f"{step.name}.md").read_text(encoding="utf-8"))
    body = unwrap(template.substitute(evidence=evidence(root, step), tests=tested))
    out.write_text(f"# {step.title}\n\n{body.strip()}\n\n{left_to_submitter(step)}", encoding="utf-8")


def unwrap(text: str) -> str:
    """Join the lines of each paragraph and list item: in a pull request a line break is shown as one."""
    return re.sub(r"(?<=[^\n|])\n *(?=[^\n #|-])", " ", text)


def left_to_submitter(step: Step) -> str:
    """What a generator of texts cannot know."""
    fragments = [path for path in step.sources if path.startswith("changelog.d/")]
    rows = [
        "an issue, opened early: Kornia asks for one where a change adds to its API or changes behaviour",
        "which tests were run on your machine",
        "a short word on how AI helped, if it did",
        f"the number of the pull request in the names of {', '.join(f'`{path}`' for path in fragments)}, for the `+`",
    ]
    return "## Before it is opened\n\n" + "".join(f"- [ ] {row}\n" for row in rows)


def evidence(root: Path, step: Step) -> str:
    """The measurements of `make bench` that belong to a step, as tables."""
    parts = []
    for path in sorted(
        (root / "benchmarks" / "results").glob("c[pu]*.json")
    ):  # cpu and cuda, as `make bench` names them
        results = json.loads(path.read_text(encoding="utf-8"))
        if tables := result_tables(results, step.results):
            machine = results["machine"]
            where = f"{machine['device']}, {machine['threads']} threads, PyTorch {machine['torch']}, {machine['date']}"
            parts.append(f"Measured on {where}.\n\n{tables}")
    return "\n\n".join(parts) or "There is no measurement of this step."


def result_tables(results: dict, prefix: str) -> str:
    """Tables of the time, memory and accuracy for the labels with a prefix; empty if there is none."""
    times, memory, batch = (
        {label: row for label, row in results.get(key, {}).items() if prefix and label.startswith(prefix)}
        for key in ("times", "memory", "batch errors")
    )
    if not times:
        return ""
    release = next(name for name in next(iter(times.values())) if name.startswith("Kornia "))
    names = (BASELINE, release, OURS)
    tables = [
        table(
            ["forward + backward, medians", BASELINE, release, "this change", "ratio of these two, quartiles"],
            [
                [
                    label,
                    *(milliseconds(row[name]) for name in (BASELINE, release, OURS)),
                    ratio(row[release], row[OURS]),
                ]
                for label, row in times.items()
            ],
        ),
        table(
            ["extra memory at the peak, in multiples of the logits", BASELINE, release, "this change"],
            [[label, *(f"{row[name]:.1f}" for name in names)] for label, row in memory.items()],
        ),
        table(
            ["relative error of loss and gradient of a batch, float32, this change", "loss", "gradient"],
            [[label, f"{row['loss']:.0e}", f"{row['gradient']:.0e}"] for label, row in batch.items()],
        ),
    ]
    if prefix == "hinge":
        rows = [
            [f"{side}x{side}", *(f"{row[name]['gradient']:.0e}" for name in (release, OURS))]
            for side, row in results["errors"].items()
        ]
        tables.append(table(["relative gradient error on random logits, float32", release, "this change"], rows))
    return "\n\n".join(filter(None, tables))


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; empty without rows."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def milliseconds(seconds: list[float]) -> str:
    """The median."""
    value = 1000 * statistics.median(seconds)
    return f"{value:.0f} ms" if value >= 10 else f"{value:.2g} ms"


def ratio(before: list[float], after: list[float]) -> str:
    """Ratio of the times in the same round: the median, and the quartiles in brackets."""
    ratios = [old / new for old, new in zip(before, after)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


# ---------------------------------------------------------------------------------------------------------------------
# The tests of a step
# ---------------------------------------------------------------------------------------------------------------------


def write_helpers(tree: Path, helpers: Path) -> None:
    """Put the test helpers of a Kornia checkout, or ours under the same names, into a tree."""
    shutil.copytree(helpers / "testing", tree / "testing", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(helpers / "conftest.py", tree)


def run_tests(tree: Path, arguments: list[str]) -> dict[str, str]:
    """Run pytest in a tree, whose own ``kornia`` it imports, and return the outcomes by test.

    Raises:
        RuntimeError: pytest did not come to its end. The message holds what it said.
    """
    log = tree / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--report-log", str(log), *arguments]
    environment = {OPTIMIZER: "inductor", **os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {result.returncode} in {tree}:\n{result.stdout[-3000:]}")
    return read_outcomes(log)


def check_tests(step: Step, after: Path) -> str:
    """Run the tests of a step and the doctests of its files on the tree that it leaves, and return what they said.

    Raises:
        RuntimeError: one fails.
    """
    outcomes = run_tests(after, [*step.tests, "--dtype", "all", "--doctest-modules", *step.modules])
    if failed := [test for test, outcome in outcomes.items() if outcome not in (PASSED, "skipped")]:
        raise RuntimeError(f"After the step {step.name!r}, {len(failed)} tests fail: {', '.join(failed[:5])}.")
    passed = list(outcomes.values()).count(PASSED)
    return (
        f"`{OPTIMIZER}=inductor pytest {' '.join(step.tests)} --dtype all`, and the doctests of the files changed: "
        f"{passed} passed, {len(outcomes) - passed} skipped, none failed."
    )


def check_proof(step: Step, before: Path) -> str:
    """Run the tests that prove the need of a step on the tree before it, and return what they said.

    Raises:
        RuntimeError: none fails, or one does for another reason than its assertions.
    """
    for path in step.proof:
        (before / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(step.sources[path], before / path)
    outcomes = run_tests(before, step.proof)
    for path in step.proof:
        (before / path).unlink()
    failed = [test for test, outcome in outcomes.items() if outcome == "failed"]
    if not failed or "error" in outcomes.values():
        raise RuntimeError(f"Without the step {step.name!r}, {', '.join(step.proof)} should run and fail.")
    return f"Without the change, `pytest {' '.join(step.proof)}` fails: {len(failed)} of {len(outcomes)} tests."


def check_series(root: Path, steps: list[Step], helpers: Path, *, proof_only: bool = False) -> list[str]:
    """Check each step on trees of its own, and return what its tests said."""
    said = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "kornia")
        unpack_source(root, tree)
        write_helpers(tree, helpers)
        for index, step in enumerate(steps):
            sentences = [check_proof(step, tree)] if step.proof else []
            apply_step(root, steps, index, tree)
            if not proof_only:
                sentences.insert(0, check_tests(step, tree))
            said.append("\n\n".join(sentences))
    return said


def write_series(root: Path, out: Path, *, checkout: Path | None = None, test: bool = False) -> list[Path]:
    """Write the patches and the texts of the pull requests into ``out``, which is made anew."""
    steps = read_series(root)
    if test:
        said = check_series(root, steps, checkout or root)
    else:
        said = ["`make patch-test` runs these tests and says here what came out."] * len(steps)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "kornia")
        unpack_source(root, base)
        if checkout:
            add_docs(root, checkout, steps, base)
        patches = write_patches(root, steps, base, out)
    for step, patch, tested in zip(steps, patches, said):
        for entry in [] if checkout else step.docs:
            lines = ", ".join(f"`{line}`" for line in entry["lines"])
            tested += f"\n\nThe patch lacks {lines} in `{entry['file']}`: `make patch KORNIA=<checkout>` adds that."
        write_text(root, step, tested, patch.with_suffix(".md"))
    return patches


def main() -> None:
    """Write the series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kornia", type=Path, metavar="CHECKOUT", help="a checkout of Kornia, for its documentation")
    parser.add_argument("--test", action="store_true", help="run the tests of each step")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "upstream", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        patches = write_series(ROOT, args.out.absolute(), checkout=args.kornia, test=args.test)
    except RuntimeError as error:
        sys.exit(str(error))
    for patch in patches:
        print(f"{patch}, and its text in {patch.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
