"""Compose an installable Kornia: the pinned release with this repository's files laid over it.

hatchling loads this file by its path and alone, so it imports nothing from its own folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zipimport
from email.parser import BytesParser
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # benchmarks/gpu.py composes without building
    BuildHookInterface = MetadataHookInterface = object

# The two files of a release: the name of each, and the option of pip that asks for it alone.
FILES = {
    "wheel": ("kornia-{}-py3-none-any.whl", ["--only-binary=:all:"]),
    "sdist": ("kornia-{}.tar.gz", ["--no-binary=:all:", "--no-build-isolation"]),
}


def read_series(root: Path) -> dict[str, Any]:
    """Return what ``fork/upstream/series.toml`` says, which also explains it."""
    return tomllib.loads((root / "fork" / "upstream" / "series.toml").read_text(encoding="utf-8"))


def fetch_release(root: Path, kind: str = "wheel") -> Path:
    """Return the release's wheel or sdist, as pinned under ``[tool.fork]`` in ``root/pyproject.toml``, sha256 checked.

    It is the file that ``KORNIA_RELEASE_WHEEL`` or ``KORNIA_RELEASE_SDIST`` names, else the one kept in ``root/build``
    from an earlier call, else pip downloads it there.

    Raises:
        RuntimeError: there is no such file, or it is not the pinned one. The message is one sentence for the user.
    """
    pin = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fork"]
    name, options = FILES[kind]
    name = name.format(pin["release"])
    variable = f"KORNIA_RELEASE_{kind.upper()}"
    remedy = f"set {variable} to a copy of {name}"
    given = os.environ.get(variable)
    file = Path(given).absolute() if given else root / "build" / name
    if not given and not file.exists():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", *options, "--disable-pip-version-check"]
            command += ["--dest", folder, f"kornia=={pin['release']}"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            if result.returncode:
                said = (result.stderr.strip() or f"status {result.returncode}").splitlines()[-1]
                raise RuntimeError(
                    f"{name} could not be downloaded, pip said {said!r}: check the network, or {remedy}."
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(Path(folder, name), file)
    if not file.is_file():
        raise RuntimeError(f"There is no file {file}: {remedy}.")
    with file.open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != pin[f"{kind}_sha256"]:
        raise RuntimeError(
            f"{file} is not the pinned {name}, expected sha256 {pin[f'{kind}_sha256']}, got {sha256}: "
            f"{remedy if given else 'delete it and build again'}, or correct [tool.fork] in pyproject.toml."
        )
    return file


def edit_file(file: Path, edit: dict[str, Any]) -> None:
    """Put the lines of an edit of the series into a file.

    Raises:
        RuntimeError: they have no place. The message is one sentence.
    """
    old = file.read_text(encoding="utf-8").splitlines()
    found = [index for index, line in enumerate(old) if line.startswith(edit["after"])]
    start = found[0] + 1 if len(found) == 1 else None
    end = start
    if start is not None and "until" in edit:
        end = next((index for index in range(start, len(old)) if old[index].startswith(edit["until"])), None)
    if start is None or end is None:
        raise RuntimeError(
            f"{edit['file']} cannot take {edit['lines'][0]!r}: it has {len(found)} lines that begin with "
            f"{edit['after']!r}, expected one, or none below with {edit.get('until')!r}; "
            "correct fork/upstream/series.toml."
        )
    text = "\n".join([*old[:start], *edit["lines"], *old[end:]]) + "\n"
    file.write_text(text, encoding="utf-8", newline="\n")


def compose(wheel: Path, root: Path, target: Path) -> None:
    """Make ``target`` anew: the package of the release's wheel under the overlay ``root/kornia``, and its ``LICENSE``.

    Files of the release that the overlay does not replace get the edits of the series. The old target stays until the
    new one is whole.

    Raises:
        RuntimeError: the overlay would hide the installed package, or a line has no place. The message is one sentence.
    """
    overlay = root / "kornia"
    if (overlay / "__init__.py").exists():
        raise RuntimeError(f"{overlay / '__init__.py'} would hide the installed kornia from this folder: delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="compose-", dir=target.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            # no member of a zip file can leave the folder
            archive.extractall(new, [name for name in names if name.startswith("kornia/")])
            licence = next(name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
            (new / "LICENSE").write_bytes(archive.read(licence))
        for edit in [edit for step in read_series(root)["step"] for edit in step.get("edits", [])]:
            if edit["file"] in names and not (root / edit["file"]).exists():
                edit_file(new / edit["file"], edit)
        for source in sorted(overlay.rglob("*.py")):
            place = new / "kornia" / source.relative_to(overlay)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            try:
                # A link even when a wheel is built: an editable install of the same checkout may be using this folder.
                place.symlink_to(source.resolve())
            except OSError:  # Windows grants links to developers only
                shutil.copyfile(source, place)
        new.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_release_module(wheel: Path, name: str) -> ModuleType:
    """Load one module of the release, e.g. ``"kornia.losses.dice"``, beside the fork's module of that name.

    What the module itself imports from ``kornia`` comes from the installed package.
    """
    package, _, stem = name.rpartition(".")
    importer = zipimport.zipimporter(str(wheel.joinpath(*package.split("."))))
    spec = importer.find_spec(f"kornia_release.{stem}")
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{wheel} has no module {name}.", name=name)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class ReleaseMetadata(MetadataHookInterface):
    """Takes the versions of Python, the dependencies and the extras from the release."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read them from the wheel. A requirement of the release has no other condition than its extra."""
        try:
            wheel = fetch_release(Path(self.root))
        except RuntimeError as error:
            raise SystemExit(str(error)) from None
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            theirs = BytesParser().parsebytes(archive.read(name))
        metadata["requires-python"] = theirs["Requires-Python"]
        extras: dict[str, list[str]] = {extra: [] for extra in theirs.get_all("Provides-Extra", [])}
        metadata["dependencies"], metadata["optional-dependencies"] = [], extras
        for line in theirs.get_all("Requires-Dist", []):
            requirement = Requirement(line)
            extra = str(requirement.marker).partition('extra == "')[2].rstrip('"')
            requirement.marker = None
            (extras[extra] if extra else metadata["dependencies"]).append(str(requirement))


class ComposeHook(BuildHookInterface):
    """Composes the package before hatchling packs it or, for an editable install, points at it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compose the package in ``build/fork`` and send the release's licence along."""
        root = Path(self.root)
        target = root / "build" / "fork"
        try:
            compose(fetch_release(root), root, target)
        except RuntimeError as error:
            # Exiting shows the sentence alone, where raising would bury it under hatchling's stack.
            self.app.abort(str(error))
        licences = f"{self.build_config.builder.project_id}.dist-info/licenses"
        build_data["force_include"][str(target / "LICENSE")] = f"{licences}/kornia-release/LICENSE"
