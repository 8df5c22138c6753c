"""Move the fork to another release of Kornia: ``make rebase VERSION=x.y.z``.

Works on a copy of the checkout in ``build/rebase``: pins the release there, says what it changed in the files that the
overlay replaces and whether it has what the overlay imports, composes, installs and runs the tests. When all pass, the
new ``pyproject.toml`` takes the place of the old one. Until then nothing changes: adapt the overlay and run it again.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import shutil
import subprocess
import symtable
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path, PurePosixPath
from typing import Any

import tomlkit
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fork.compose import (
    LOCAL_SDIST,
    LOCAL_WHEEL,
    SDIST,
    WHEEL,
    digest,
    download,
    edit_release,
    fetch_release,
    read_settings,
)

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["-m", "pytest", "-q", "tests", "fork"]


# ---------------------------------------------------------------------------------------------------------------------
# What the other release changes
# ---------------------------------------------------------------------------------------------------------------------


def read_package(wheel: Path) -> dict[str, str]:
    """Return the modules of a release by path."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("kornia/") and name.endswith(".py")]
        return {name: archive.read(name).decode() for name in names}


def changes(old: dict[str, str], new: dict[str, str], overlay: list[str], diffs: Path) -> list[str]:
    """Say for each file of the overlay how the two releases differ there, and write the differences into a folder."""
    lines = []
    for path in overlay:
        before, after = old.get(path), new.get(path)
        if before == after:
            said = "in neither release" if before is None else "the same in both releases"
        elif before is None:
            said = "NEW in the other release, and replaced by ours"
        elif after is None:
            said = "GONE from the other release"
        else:
            difference = list(
                difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"old/{path}", f"new/{path}")
            )
            added, removed = (sum(line[0] == sign and line[:3] != 3 * sign for line in difference) for sign in "+-")
            target = diffs / f"{path}.diff"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text("".join(difference), encoding="utf-8")
            said = f"CHANGED, +{added} -{removed} lines: {target}"
        lines.append(f"{path}: {said}")
    return lines


def missing_names(package: dict[str, str], overlay: dict[str, str]) -> list[str]:
    """Return what files import from ``kornia`` and neither a release nor the overlay has, as "file: name" each."""
    available = package | overlay
    missing = []
    for path, text in overlay.items():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = list(PurePosixPath(path).parts[: -node.level]) if node.level else []
            parts += (node.module or "").split(".") if node.module else []
            if parts[:1] != ["kornia"]:
                continue
            folder = "/".join(parts)
            module = next((name for name in (f"{folder}.py", f"{folder}/__init__.py") if name in available), None)
            if module is None:
                missing.append(f"{path}: {'.'.join(parts)}")
                continue
            bound = {each.get_name() for each in symtable.symtable(available[module], module, "exec").get_symbols()}
            missing += [
                f"{path}: {'.'.join(parts)}.{alias.name}"
                for alias in node.names
                if alias.name not in bound
                and f"{folder}/{alias.name}.py" not in available
                and f"{folder}/{alias.name}/__init__.py" not in available
            ]
    return missing


def read_metadata(wheel: Path) -> dict[str, Any]:
    """Return what ``[project]`` repeats of a release: the versions of Python, the dependencies and the extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = BytesParser().parsebytes(archive.read(name))
    dependencies: list[str] = []
    extras: dict[str, list[str]] = {extra: [] for extra in metadata.get_all("Provides-Extra") or []}
    for line in metadata.get_all("Requires-Dist") or []:
        requirement = Requirement(line)
        conditions = str(requirement.marker).split(" and ") if requirement.marker else []
        extra = next((each.split('"')[1] for each in conditions if each.startswith("extra == ")), None)
        rest = " and ".join(each for each in conditions if not each.startswith("extra == "))
        requirement.marker = None
        (dependencies if extra is None else extras[extra]).append(f"{requirement}{f'; {rest}' if rest else ''}")
    return {
        "requires-python": metadata["Requires-Python"],
        "dependencies": dependencies,
        "optional-dependencies": extras,
    }


def normal(value: Any) -> Any:
    """Bring requirements into a form in which equal ones are equal."""
    if isinstance(value, dict):
        return {key: normal(each) for key, each in value.items()}
    if isinstance(value, str):
        return value
    parsed = [Requirement(line) for line in value]
    return sorted((canonicalize_name(each.name), str(each.specifier), str(each.marker)) for each in parsed)


def pin(text: str, release: str, digests: dict[str, str], metadata: dict[str, Any]) -> tuple[str, list[str]]:
    """Return a ``pyproject.toml`` that pins a release, and what it changed of the project's own settings."""
    document = tomlkit.parse(text)
    settings: Any = document["tool"]["fork"]  # type: ignore[index]
    project: Any = document["project"]
    old = settings["release"]
    settings["release"] = release
    for key, value in digests.items():
        settings[key] = value
    project["version"] = f"{release}+lovasz.1"
    project["description"] = project["description"].replace(f"Kornia {old}", f"Kornia {release}")
    lines = []
    for key, value in metadata.items():
        if normal(project[key]) != normal(value):
            project[key] = value
            lines.append(f"{key} follows the release: compare the classifiers and constraints.txt")
    return tomlkit.dumps(document), lines


# ---------------------------------------------------------------------------------------------------------------------
# The attempt
# ---------------------------------------------------------------------------------------------------------------------


def copy_checkout(root: Path, target: Path) -> None:
    """Copy the files that git knows or would add, as they are now."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    shutil.rmtree(target, ignore_errors=True)
    for name in filter(None, names):
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target / name)


def python(arguments: list[str], tree: Path, log: Path | None = None, **environment: str) -> int:
    """Run Python in a tree, on the terminal or into a file, and return its exit status."""
    variables = {**os.environ, **environment}
    if log is None:
        return subprocess.run([sys.executable, *arguments], cwd=tree, env=variables, check=False).returncode
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tree, env=variables, stdout=file, stderr=file, check=False).returncode


def rebase(root: Path, release: str, tests: list[str]) -> None:
    """Move ``root`` to another release, if the tests pass there.

    Args:
        root: the checkout; only its ``pyproject.toml`` changes.
        release: the version.
        tests: the arguments of Python that run the tests.

    Raises:
        RuntimeError: it cannot, and nothing has changed. The message says why, and what to do.
    """
    old = read_settings(root)["release"]
    if release == old:
        raise RuntimeError(f"The fork is based on kornia {old} already.")
    folder = root / "build" / "rebase" / release
    tree, site = folder / "tree", folder / "site"
    copy_checkout(root, tree)
    files = {archive: download(release, tree / "build", archive) for archive in (WHEEL, SDIST)}
    digests = {archive.pin: digest(file) for archive, file in files.items()}
    settings, notes = pin(
        (root / "pyproject.toml").read_text(encoding="utf-8"), release, digests, read_metadata(files[WHEEL])
    )
    (tree / "pyproject.toml").write_text(settings, encoding="utf-8")

    ours = {
        path.relative_to(tree).as_posix(): path.read_text(encoding="utf-8")
        for name in ("kornia", "tests")
        for path in sorted((tree / name).rglob("*.py"))
    }
    package = read_package(files[WHEEL])
    overlay = [path for path in ours if path.startswith("kornia/")]
    shutil.rmtree(folder / "diff", ignore_errors=True)
    print(f"From kornia {old} to {release}:")
    for line in changes(read_package(fetch_release(root)), package, overlay, folder / "diff") + notes:
        print(f"  {line}")
    package |= edit_release(files[WHEEL], tree, read_settings(tree).get("exports", {}))
    if missing := missing_names(package, ours):
        listed = "".join(f"\n  {name}" for name in missing)
        raise RuntimeError(
            f"kornia {release} lacks what our files import, so nothing has changed here:{listed}\n"
            "Adapt these files and run this again, or stay with the release that you have."
        )

    environment = {LOCAL_WHEEL: str(files[WHEEL]), LOCAL_SDIST: str(files[SDIST])}
    shutil.rmtree(site, ignore_errors=True)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(site), "."]
    if python(install, tree, folder / "install.txt", **environment):
        raise RuntimeError(f"The fork does not build, so nothing has changed here: see {folder / 'install.txt'}.")
    if python(tests, tree, None, PYTHONPATH=str(site), **environment):
        raise RuntimeError(
            f"The tests fail on kornia {release}, so nothing has changed here. Adapt the overlay and the tests, and "
            f"run this again; the attempt is in {tree}."
        )
    (root / "pyproject.toml").write_text(settings, encoding="utf-8")


def main() -> None:
    """Rebase, and say what is left to do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", metavar="VERSION", help="the release of Kornia")
    args = parser.parse_args()
    old = read_settings(ROOT)["release"]
    try:
        rebase(ROOT, args.version, TESTS)
    except RuntimeError as error:
        sys.exit(str(error))
    print(f"pyproject.toml pins kornia {args.version} now. Left to do: make test, and these that name {old}:")
    subprocess.run(
        ["git", "grep", "--count", "--fixed-strings", old, "--", "*.md", "*.rst", "*.py"], cwd=ROOT, check=False
    )


if __name__ == "__main__":
    main()
