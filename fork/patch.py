"""Write the fork as a patch series against the source of the release, with a text for each pull request.

For each step of ``fork/upstream/series.toml``, ``make patch`` writes a patch for ``git am`` or ``git apply``, and the
text of its pull request, to ``dist/upstream/``. ``make patch-test`` also runs the tests of each step on the tree after
the step, and writes the outcome into the text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from benchmarks import tables
from fork import step_sizes, step_times
from fork.compose import edit_file, fetch_release, read_series

ROOT = Path(__file__).resolve().parents[1]
LICENCE_LINE = "# SPDX-License-Identifier: Apache-2.0\n"
# Kornia runs its tests of torch.compile only if this variable is set.
OPTIMIZER = "KORNIA_TEST_OPTIMIZER"


@dataclass
class Step:
    """A commit of the series and a pull request: a ``[[step]]`` of ``series.toml``, which explains the settings."""

    name: str
    title: str
    callers: str
    files: list[str]
    proof: list[str] = field(default_factory=list)
    edits: list[dict[str, Any]] = field(default_factory=list)
    absent: list[dict[str, Any]] = field(default_factory=list)

    # Path and text of each file that the step adds or changes, set by `read_steps`.
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def tests(self) -> list[str]:
        """The tests that the step adds or changes."""
        return [path for path in self.texts if path.startswith("tests/")]

    @property
    def modules(self) -> list[str]:
        """The files of the package that the step adds or changes."""
        return [path for path in self.texts if path.startswith("kornia/")]


def read_steps(root: Path) -> list[Step]:
    """Return the steps, each with the files that it adds or changes.

    Raises:
        RuntimeError: if a file belongs to no step, a step has no file, or a pattern of a step matches nothing. The
            message is one sentence.
    """
    texts = root / "fork" / "upstream"
    series = read_series(root)
    steps = [Step(**row) for row in series["step"]]
    sources = [path for folder in ("kornia", "tests") for path in sorted((root / folder).rglob("*.py"))]
    unused = {(step.name, pattern) for step in steps for rule in step.absent for pattern in rule["patterns"]}
    for source in [*sources, root / "testing" / "lovasz.py"]:
        path = source.relative_to(root).as_posix()
        if path in series.get("left_out", []):
            continue
        numbers = [i for i, step in enumerate(steps) if any(fnmatchcase(path, pattern) for pattern in step.files)]
        if not numbers:
            raise RuntimeError(f"{path} belongs to no step: add a pattern for it to {texts / 'series.toml'}.")
        versions = [source.read_text(encoding="utf-8")]
        for step in reversed(steps[numbers[0] + 1 :]):
            versions.insert(0, take_away(step, path, versions[0], unused))
        for step, before, after in zip(steps[numbers[0] :], ["", *versions], versions):
            if after != before:
                step.texts[path] = after
    if unused:
        name, pattern = min(unused)
        raise RuntimeError(f"{pattern!r} of the step {name!r} matches nothing: correct {texts / 'series.toml'}.")
    for step in steps:
        if not step.texts:
            raise RuntimeError(f"The step {step.name!r} has no file: correct its patterns in {texts / 'series.toml'}.")
        # Kornia asks for a leading "+" as long as the number of the pull request is not known.
        fragments = sorted(texts.glob(f"{step.name}.*.md"))
        step.texts |= {f"changelog.d/+{path.name}": path.read_text(encoding="utf-8") for path in fragments}
    return steps


def take_away(step: Step, path: str, text: str, unused: set[tuple[str, str]]) -> str:
    """Return the text of a file before a step, and remove the patterns that match from ``unused``."""
    result = text
    for rule in step.absent:
        if any(fnmatchcase(path, pattern) for pattern in rule["files"]):
            for pattern in rule["patterns"]:
                result, count = re.subn(pattern, rule.get("instead", ""), result, flags=re.MULTILINE)
                if count:
                    unused.discard((step.name, pattern))
    return result if result == text else tidy(result, path)


@cache
def tidy(text: str, path: str) -> str:
    """Remove unused imports, and format."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "--fix-only", "--quiet", "--select", "F401,I001"], ["format"]):
        command = [*ruff, *command, "--stdin-filename", str(ROOT / path), "-"]
        result = subprocess.run(command, input=text, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
        if result.returncode:
            raise RuntimeError(f"An older version of {path} is not valid Python: {result.stderr.strip()}")
        text = result.stdout
    return text


def unpack_source(root: Path, target: Path) -> None:
    """Unpack the source archive of the release into ``target``."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fetch_release(root, "sdist")) as archive:
        archive.extractall(folder, filter="data")
        (top,) = Path(folder).iterdir()
        shutil.copytree(top, target)


def add_docs(checkout: Path, steps: list[Step], base: Path) -> None:
    """Copy the pages of the documentation that the steps edit from a checkout of Kornia to ``base``.

    Raises:
        RuntimeError: if the series would not apply to the checkout. The message is one sentence.
    """
    for path in sorted({path for step in steps for path in [*step.modules, *(each["file"] for each in step.edits)]}):
        ours, theirs = base / path, checkout / path
        if ours.exists() and (not theirs.is_file() or theirs.read_bytes() != ours.read_bytes()):
            raise RuntimeError(
                f"{theirs} is not the file of the release, so the series would not apply there: check out its tag."
            )
        if path.startswith("docs/"):
            if not theirs.is_file():
                raise RuntimeError(f"There is no file {theirs}: give a checkout of Kornia's repository.")
            ours.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(theirs, ours)


def apply_step(step: Step, tree: Path) -> None:
    """Apply a step to a tree that has all earlier steps.

    The licence line of each file is replaced by the header of the release's files, which a hook of Kornia requires.

    Raises:
        RuntimeError: if a file lacks the licence line, or an edit does not apply. The message is one sentence.
    """
    lines = (tree / "kornia" / "__init__.py").read_text(encoding="utf-8").splitlines(keepends=True)
    header = "".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])
    for path, text in step.texts.items():
        if path.endswith(".py"):
            if not text.startswith(LICENCE_LINE):
                raise RuntimeError(f"{path} must begin with the line {LICENCE_LINE.strip()!r}.")
            text = f"{header}\n{text.removeprefix(LICENCE_LINE).lstrip()}"
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(text, encoding="utf-8")
    for edit in step.edits:
        if (tree / edit["file"]).is_file():  # pages of the documentation exist only if a checkout was given
            edit_file(tree / edit["file"], edit)


def git(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run git in a folder and return what it prints.

    Raises:
        RuntimeError: if git fails. The message contains its error output.
    """
    command = ["git", "-c", "core.autocrlf=false", *arguments]
    variables = {**os.environ, **(environment or {})}
    result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, encoding="utf-8", check=False)
    if result.returncode:
        raise RuntimeError(f"git {arguments[0]} failed in {folder}: {result.stderr.strip()}")
    return result.stdout


def write_patches(root: Path, steps: list[Step], base: Path, out: Path) -> list[Path]:
    """Apply the steps to ``base``, write a patch for each, and return the paths of the patches."""
    identity = git(root, "log", "-1", "--format=%an%n%ae%n%aI").splitlines()
    environment = {
        f"GIT_{role}_{what}": value
        for role in ("AUTHOR", "COMMITTER")
        for what, value in zip(("NAME", "EMAIL", "DATE"), identity)
    } | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    options = ["--no-signature", "--zero-commit", "--full-index", "--no-renames", "--stdout", "-1"]

    def commit(message: str) -> None:
        git(base, "add", "--all", "--force", environment=environment)
        git(base, "commit", "--quiet", "--message", message, environment=environment)

    git(base, "init", "--quiet", environment=environment)
    commit("release")
    patches = []
    for number, step in enumerate(steps, 1):
        apply_step(step, base)
        paragraphs = read_text(root, step).partition("\n## ")[0].strip().split("\n\n")
        commit("\n\n".join([step.title, *(textwrap.fill(paragraph, 72) for paragraph in paragraphs)]))
        prefix = ["--start-number", str(number), "--subject-prefix", f"PATCH {number}/{len(steps)}"]
        patches.append(out / f"{number:04}-{step.name}.patch")
        patches[-1].write_text(git(base, "format-patch", *options, *prefix, environment=environment), encoding="utf-8")
    return patches


# ---------------------------------------------------------------------------------------------------------------------
# The text of the pull request
# ---------------------------------------------------------------------------------------------------------------------


def read_text(root: Path, step: Step) -> str:
    """Return the text of a step, with placeholders."""
    return (root / "fork" / "upstream" / f"{step.name}.md").read_text(encoding="utf-8")


def write_text(root: Path, step: Step, facts: dict[str, Any], out: Path) -> None:
    """Write the text of the pull request of a step, with measured numbers and results of tests."""
    body = Template(read_text(root, step)).substitute(facts)
    # GitHub shows each line break of a pull request text, so the lines of a paragraph or list item are joined.
    body = re.sub(r"(?<=[^\n|])\n *(?=[^\n #|-])", " ", body).strip()
    fragments = ", ".join(f"`{path}`" for path in step.texts if path.startswith("changelog.d/"))
    left = (
        "open an issue early, which Kornia asks for if a change adds to its API or changes behaviour",
        "say which tests you have run on your machine",
        "say briefly how AI was used, if it was",
        f"replace the `+` in the names of {fragments} by the number of the pull request",
    )
    boxes = "".join(f"- [ ] {row}\n" for row in left)
    size = f"Size: {facts['size']}."
    out.write_text(f"# {step.title}\n\n{body}\n\n{size}\n\n## Before you open it\n\n{boxes}", encoding="utf-8")


def measured() -> dict[str, str]:
    """Return the sentences on speed, with the numbers that `make bench` measured."""
    return {"speed": "\n\n".join(tables.claim(device) for device in tables.DEVICES if tables.read(device))}


# ---------------------------------------------------------------------------------------------------------------------
# The tests of a step
# ---------------------------------------------------------------------------------------------------------------------


def run_tests(tree: Path, arguments: list[str]) -> tuple[int, str]:
    """Run pytest with the ``kornia`` of a tree, and return the exit status and the summary, such as "2 passed"."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", *arguments]
    environment = {OPTIMIZER: "inductor", **os.environ, "PYTHONPATH": str(tree)}
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    said = (result.stdout.strip() or result.stderr.strip() or "nothing").splitlines()[-1]
    return result.returncode, said.partition(" in ")[0]


def check_tests(step: Step, tree: Path) -> str:
    """Run the tests of a step and the doctests of its files on the tree after the step, and return the summary.

    Raises:
        RuntimeError: if a test fails.
    """
    status, said = run_tests(tree, [*step.tests, "--dtype", "all", "--doctest-modules", *step.modules])
    if status:
        raise RuntimeError(f"After the step {step.name!r}, its tests do not pass: {said}.")
    command = f"{OPTIMIZER}=inductor pytest {' '.join(step.tests)} --dtype all"
    return f"`{command}`, and the doctests of the files changed: {said}."


def check_proof(step: Step, tree: Path) -> str:
    """Run the tests that must fail without a step on the tree before it, and return the summary.

    Raises:
        RuntimeError: if no test fails, or if the tests cannot run.
    """
    for path in step.proof:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(step.texts[path], encoding="utf-8")
    status, said = run_tests(tree, step.proof)
    for path in step.proof:
        (tree / path).unlink()
    if status != 1 or "error" in said:
        raise RuntimeError(f"Without the step {step.name!r}, {', '.join(step.proof)} should run and fail: {said}.")
    return f"Without the change, `pytest {' '.join(step.proof)}` fails: {said}."


def check_series(root: Path, steps: list[Step], helpers: Path, *, proof_only: bool = False) -> list[str]:
    """Run the tests of each step, and return the summaries.

    Args:
        root: this repository.
        steps: the steps.
        helpers: the folder of ``testing/`` and ``conftest.py``: a checkout of Kornia, or this repository.
        proof_only: run only the tests that must fail without a step.
    """
    said = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "kornia")
        unpack_source(root, tree)
        shutil.copytree(helpers / "testing", tree / "testing", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(helpers / "conftest.py", tree)
        for step in steps:
            sentences = [check_proof(step, tree)] if step.proof else []
            apply_step(step, tree)
            if not proof_only:
                sentences.insert(0, check_tests(step, tree))
            said.append("\n\n".join(sentences))
    return said


def write_series(root: Path, out: Path, *, checkout: Path | None = None, test: bool = False) -> list[Path]:
    """Write the patches and the texts of the pull requests to ``out``, after deleting its old content."""
    steps = read_steps(root)
    said = ["`make patch-test` runs these tests and writes the result here."] * len(steps)
    if test:
        said = check_series(root, steps, checkout or root)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "kornia")
        unpack_source(root, base)
        if checkout:
            add_docs(checkout, steps, base)
        patches = write_patches(root, steps, base, out)
    numbers, results = measured(), json.loads(step_times.FILE.read_text(encoding="utf-8"))
    numbers["errors"] = step_times.table_of_errors(results)
    for step, size, patch, tested in zip(steps, step_sizes.sizes(steps), patches, said):
        for edit in step.edits:
            if edit["file"].startswith("docs/") and not checkout:
                lines = ", ".join(f"`{line}`" for line in edit["lines"])
                tested += f"\n\nThe patch lacks {lines} in `{edit['file']}`: `make patch KORNIA=<checkout>` adds it."
        facts = {"size": size, "tests": tested, "times": step_times.table_of_times(results, step.name), **numbers}
        write_text(root, step, facts, patch.with_suffix(".md"))
    return patches


def main() -> None:
    """Write the series."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kornia", type=Path, metavar="CHECKOUT", help="a checkout of Kornia, to patch its pages")
    parser.add_argument("--test", action="store_true", help="run the tests of each step")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "upstream", help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        patches = write_series(ROOT, args.out.absolute(), checkout=args.kornia, test=args.test)
    except RuntimeError as error:
        sys.exit(str(error))
    for patch in patches:
        print(f"{patch}, with the text of the pull request in {patch.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
