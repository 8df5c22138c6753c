"""Compose an installable Kornia: the files of the pinned release, and this repository's files in place of some of them.

hatchling loads this file by its path, so it cannot import other files of its folder.
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
except ImportError:  # benchmarks/gpu.py does not need hatchling
    BuildHookInterface = MetadataHookInterface = object

# The two files of a release: name, and options for pip to download this file.
FILES = {
    "wheel": ("kornia-{}-py3-none-any.whl", ["--only-binary=:all:"]),
    "sdist": ("kornia-{}.tar.gz", ["--no-binary=:all:", "--no-build-isolation"]),
}


def read_series(root: Path) -> dict[str, Any]:
    """Return the content of ``fork/upstream/series.toml``. Its comments explain the format."""
    return tomllib.loads((root / "fork" / "upstream" / "series.toml").read_text(encoding="utf-8"))


def fetch_release(root: Path, kind: str = "wheel") -> Path:
    """Return the path of the wheel or sdist of the release that ``[tool.fork]`` in ``root/pyproject.toml`` pins.

    If ``KORNIA_RELEASE_WHEEL`` or ``KORNIA_RELEASE_SDIST`` is set, use that file. Otherwise use the file in
    ``root/build``, and download it with pip if it does not exist yet. The sha256 of the file is checked.

    Raises:
        RuntimeError: if the file does not exist or is not the pinned one. The message is one sentence for the user.
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
    """Apply an edit of the series to a file.

    Raises:
        RuntimeError: if the file does not have the lines that the edit refers to. The message is one sentence.
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
    """Create ``target``: the package of the wheel with the files of ``root/kornia``, and the release's ``LICENSE``.

    The edits of the series are applied to files of the release that the overlay does not replace. An old target is
    deleted only after the new one is complete.

    Raises:
        RuntimeError: if the overlay would hide the installed package, or an edit does not apply. The message is one
            sentence.
    """
    overlay = root / "kornia"
    if (overlay / "__init__.py").exists():
        raise RuntimeError(f"{overlay / '__init__.py'} would hide the installed kornia from this folder: delete it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix="compose-", dir=target.parent))
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            # extractall writes nothing outside the folder
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
                # Link even when building a wheel, because an editable install of this checkout may use the same folder.
                place.symlink_to(source.resolve())
            except OSError:  # Windows allows links only in developer mode
                shutil.copyfile(source, place)
        new.chmod(0o755)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load_release_module(wheel: Path, name: str) -> ModuleType:
    """Load a module of the release, such as ``"kornia.losses.dice"``, without replacing the fork's module of that name.

    Imports from ``kornia`` in that module come from the installed package.
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
    """Takes the Python versions, dependencies and extras from the release."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Read the metadata of the wheel. The release has no requirement with a marker other than an extra."""
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
    """Composes the package before hatchling builds a wheel or an editable install from it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compose the package in ``build/fork``, and include the licence of the release."""
        root = Path(self.root)
        target = root / "build" / "fork"
        try:
            compose(fetch_release(root), root, target)
        except RuntimeError as error:
            # Abort, because raising would print the sentence below a long stack trace.
            self.app.abort(str(error))
        licences = f"{self.build_config.builder.project_id}.dist-info/licenses"
        build_data["force_include"][str(target / "LICENSE")] = f"{licences}/kornia-release/LICENSE"
