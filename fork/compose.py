"""Compose an installable Kornia: the pinned release with this repository's files laid over it.

hatchling loads this file by its path and alone, so it imports nothing from its own folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
import zipimport
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LOCAL_WHEEL = "KORNIA_RELEASE_WHEEL"


def fetch_release(root: Path) -> Path:
    """Return the release's wheel, as pinned under ``[tool.fork]`` in ``root/pyproject.toml``, with its sha256 checked.

    The wheel is the file that the environment variable ``KORNIA_RELEASE_WHEEL`` names, else the one kept in
    ``root/build`` from an earlier call, else it is downloaded there.

    Raises:
        RuntimeError: there is no such wheel, or it is not the pinned one. The message is one sentence for the user.
    """
    pin = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fork"]
    local = os.environ.get(LOCAL_WHEEL)
    wheel = Path(local).absolute() if local else root / "build" / f"kornia-{pin['release']}-py3-none-any.whl"
    if not local and not wheel.exists():
        _download(pin["release"], wheel.parent)
    remedy = f"set {LOCAL_WHEEL} to the wheel of kornia {pin['release']}" if local else "delete it and build again"
    if not wheel.is_file():
        raise RuntimeError(f"There is no file {wheel}: {remedy}.")
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != pin["sha256"]:
        raise RuntimeError(
            f"{wheel} is not the pinned wheel of kornia {pin['release']}, expected sha256 {pin['sha256']}, "
            f"got {sha256}: {remedy}, or correct the pin under [tool.fork] in pyproject.toml."
        )
    if not zipfile.is_zipfile(wheel):
        raise RuntimeError(f"{wheel} is no wheel, though its sha256 is the one under [tool.fork] in pyproject.toml.")
    return wheel


def _download(release: str, folder: Path) -> None:
    # Any wheel at all beats a source archive: pip would run that one's build to learn its metadata.
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"kornia=={release}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return
    if "(from versions: none)" in result.stderr:
        reason = "pip reached no package index that has kornia"
    else:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.strip()]
        reason = f"pip said {errors[-1]!r}" if errors else f"pip ended with status {result.returncode}"
    raise RuntimeError(
        f"kornia {release} could not be downloaded, {reason}: check the network and the release under [tool.fork] in "
        f"pyproject.toml, or set {LOCAL_WHEEL} to a local copy of the wheel."
    )


def compose(wheel: Path, overlay: Path, target: Path) -> None:
    """Make ``target`` anew: the ``kornia`` package of ``wheel`` under ``overlay``, and the release's ``LICENSE``.

    Raises:
        RuntimeError: the overlay is empty or would hide the installed package. The message is one sentence.
    """
    sources = sorted(overlay.rglob("*.py"))
    if not sources:
        raise RuntimeError(f"There is no Python file below {overlay}: without one this would be the plain release.")
    if overlay / "__init__.py" in sources:
        raise RuntimeError(f"{overlay / '__init__.py'} would hide the installed kornia from this folder: delete it.")
    if target.exists():
        shutil.rmtree(target)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target, [name for name in names if name.startswith("kornia/")])
        licence = next(name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        (target / "LICENSE").write_bytes(archive.read(licence))
    for source in sources:
        place = target / "kornia" / source.relative_to(overlay)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        try:
            # A link even when a wheel is built: an editable install of the same checkout may be using this folder.
            place.symlink_to(source.resolve())
        except OSError:  # Windows grants links to developers only
            shutil.copyfile(source, place)


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


class ComposeHook(BuildHookInterface):
    """Composes the package before hatchling packs it or, for an editable install, points at it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compose the package in ``build/fork`` and send the release's licence along."""
        root = Path(self.root)
        target = root / "build" / "fork"
        try:
            compose(fetch_release(root), root / "kornia", target)
        except RuntimeError as error:
            # Exiting shows the sentence alone, where raising would bury it under hatchling's stack.
            self.app.abort(str(error))
        licences = f"{self.build_config.builder.project_id}.dist-info/licenses"
        build_data["force_include"][str(target / "LICENSE")] = f"{licences}/kornia-release/LICENSE"
