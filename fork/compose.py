"""Compose an installable Kornia: the pinned release with this repository's files laid over it.

hatchling loads this file by its path and alone, so it imports nothing from its own folder.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shutil
import subprocess
import symtable
import sys
import tarfile
import tempfile
import tomllib
import zipfile
import zipimport
from importlib.util import module_from_spec
from operator import itemgetter
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any, Callable, Mapping, NamedTuple, Sequence

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LOCAL_WHEEL = "KORNIA_RELEASE_WHEEL"
LOCAL_SDIST = "KORNIA_RELEASE_SDIST"
LINE_LENGTH = 120


def read_settings(root: Path) -> dict[str, Any]:
    """Return ``[tool.fork]`` of ``root/pyproject.toml``: the pinned release and what the fork adds to its exports."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["fork"]


class Archive(NamedTuple):
    """One of the two files that make a release."""

    noun: str
    name: str
    pin: str
    variable: str
    download: tuple[str, ...]
    is_one: Callable[[Path], bool]


# Any wheel at all beats a source archive: pip would run that one's build to learn its metadata.
WHEEL = Archive(
    "wheel", "kornia-{}-py3-none-any.whl", "sha256", LOCAL_WHEEL, ("--only-binary=:all:",), zipfile.is_zipfile
)
# pip runs the build of a source archive, with what is installed already.
SDIST = Archive(
    "source archive",
    "kornia-{}.tar.gz",
    "sdist_sha256",
    LOCAL_SDIST,
    ("--no-binary=:all:", "--no-build-isolation"),
    tarfile.is_tarfile,
)


def fetch_release(root: Path, archive: Archive = WHEEL) -> Path:
    """Return the release's wheel, as pinned under ``[tool.fork]`` in ``root/pyproject.toml``, with its sha256 checked.

    The wheel is the file that the environment variable ``KORNIA_RELEASE_WHEEL`` names, else the one kept in
    ``root/build`` from an earlier call, else it is downloaded there. With ``SDIST`` for ``archive`` the same goes for
    the source archive, named by ``KORNIA_RELEASE_SDIST``.

    Raises:
        RuntimeError: there is no such file, or it is not the pinned one. The message is one sentence for the user.
    """
    pin = read_settings(root)
    local = os.environ.get(archive.variable)
    file = Path(local).absolute() if local else root / "build" / archive.name.format(pin["release"])
    if not local and not file.exists():
        download(pin["release"], file.parent, archive)
    noun = f"{archive.noun} of kornia {pin['release']}"
    remedy = f"set {archive.variable} to the {noun}" if local else "delete it and build again"
    if not file.is_file():
        raise RuntimeError(f"There is no file {file}: {remedy}.")
    sha256 = digest(file)
    if sha256 != pin[archive.pin]:
        raise RuntimeError(
            f"{file} is not the pinned {noun}, expected sha256 {pin[archive.pin]}, "
            f"got {sha256}: {remedy}, or correct the pin under [tool.fork] in pyproject.toml."
        )
    if not archive.is_one(file):
        raise RuntimeError(
            f"{file} is no {archive.noun}, though its sha256 is the one under [tool.fork] in pyproject.toml."
        )
    return file


def digest(file: Path) -> str:
    """Return the sha256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def download(release: str, folder: Path, archive: Archive) -> Path:
    """Let pip put a file of a release into ``folder``, under the name that :func:`fetch_release` looks for.

    Raises:
        RuntimeError: pip could not. The message is one sentence for the user.
    """
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--no-deps", *archive.download, "--disable-pip-version-check", "--dest", temporary]
        command = [sys.executable, "-m", "pip", "download", *options, f"kornia=={release}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            (file,) = Path(temporary).iterdir()
            folder.mkdir(parents=True, exist_ok=True)
            # Wheels of older releases have another name: they ran with Python 2 too.
            return Path(shutil.move(file, folder / archive.name.format(release)))
    if "(from versions: none)" in result.stderr:
        reason = "pip reached no package index that has kornia"
    else:
        errors = [line.removeprefix("ERROR: ") for line in result.stderr.splitlines() if line.strip()]
        reason = f"pip said {errors[-1]!r}" if errors else f"pip ended with status {result.returncode}"
    raise RuntimeError(
        f"kornia {release} could not be downloaded, {reason}: check the network and the release under [tool.fork] in "
        f"pyproject.toml, or set {archive.variable} to a local copy of the {archive.noun}."
    )


def insert_export(text: str, module: str, names: Sequence[str]) -> str:
    """Return the text of an ``__init__.py`` that also exports ``names`` of ``module``, e.g. ``".iou_threshold"``.

    The import goes where isort puts it, among those of the sibling modules; the names go into ``__all__``, if there is
    one, where ruff's RUF022 puts them. No other line changes.

    Raises:
        ValueError: there is no name, the file binds one of them already, imports from the module already, imports from
            no sibling module, or has an ``__all__`` that is no list with one name a line. The message is one clause.
    """
    bound = {symbol.get_name() for symbol in symtable.symtable(text, "", "exec").get_symbols() if symbol.is_local()}
    body = ast.parse(text).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    if not names:
        raise ValueError("none is given")
    if present := bound.intersection(names):
        raise ValueError(f"it has {', '.join(sorted(present))} already")
    if any(node.module == module[1:] for node in imports):
        raise ValueError(f"it imports from {module} already")
    if not imports:
        raise ValueError("it has no import from a sibling module to put the new one beside")

    def place(items: list[Any], key: Callable[[Any], Any], new: Any) -> int:
        """How many lines come before the new one: it follows the last item that sorts before it."""
        before = [item.end_lineno for item in items if key(item) < new]
        return before[-1] if before else items[0].lineno - 1

    ordered = sorted(names, key=lambda name: (_kind(name), _natural(name.lower()), name))
    line = f"from {module} import {', '.join(ordered)}\n"
    if len(line.rstrip()) > LINE_LENGTH:
        line = f"from {module} import (\n" + "".join(f"    {name},\n" for name in ordered) + ")\n"
    added = [(place(imports, lambda node: _natural(node.module.lower()), _natural(module[1:].lower())), line)]

    if "__all__" in bound:
        entries = _entries_of_all(body)
        for name in sorted(names, key=_rank):
            added.append((place(entries, lambda entry: _rank(entry.value), _rank(name)), f'    "{name}",\n'))

    lines = text.splitlines(keepends=True)
    for index, line in sorted(added, key=itemgetter(0))[::-1]:
        lines.insert(index, line)
    return "".join(lines)


def _entries_of_all(body: list[ast.stmt]) -> list[Any]:
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            entries = node.value.elts if isinstance(node.value, ast.List) else []
            rows = [node.lineno, *(entry.lineno for entry in entries), node.end_lineno]
            if entries and len(set(rows)) == len(rows):
                return entries
    raise ValueError("its __all__ is not a list with one name a line")


def _kind(name: str) -> int:
    """Constants first, then classes, then the rest, as isort and RUF022 tell them apart."""
    return 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2


def _natural(name: str) -> list[Any]:
    """Key that sorts the numbers in a name by value."""
    return [int(part) if part.isdigit() else part for part in re.split("([0-9]+)", name)]


def _rank(name: str) -> tuple[int, list[Any]]:
    return _kind(name), _natural(name)


def edit_release(wheel: Path, root: Path, exports: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the files of the release that change so that the overlay's names can be imported, by their path.

    Args:
        wheel: the release.
        root: the folder that holds the overlay.
        exports: ``[tool.fork.exports]``: for an overlay file the names that the ``__init__.py`` beside it exports.

    Raises:
        RuntimeError: a file is missing or cannot be edited. The message is one sentence for the user.
    """
    edited: dict[str, str] = {}
    where = "[tool.fork.exports] in pyproject.toml"
    with zipfile.ZipFile(wheel) as archive:
        for path, names in exports.items():
            init = str(PurePosixPath(path).with_name("__init__.py"))
            if not (root / path).is_file():
                raise RuntimeError(f"There is no file {root / path}: create it, or correct {where}.")
            if (root / init).exists():
                raise RuntimeError(
                    f"{root / init} replaces the release's: write the import of {path} there, not {where}."
                )
            if init not in archive.namelist():
                raise RuntimeError(f"The release has no {init} that could export names of {path}: correct {where}.")
            text = edited.get(init) or archive.read(init).decode()
            try:
                edited[init] = insert_export(text, f".{PurePosixPath(path).stem}", names)
            except ValueError as error:
                raise RuntimeError(
                    f"{init} of the release cannot export names of {path}, {error}: correct {where}."
                ) from None
    return edited


def compose(wheel: Path, overlay: Path, target: Path, exports: Mapping[str, Sequence[str]]) -> None:
    """Make ``target`` anew: the ``kornia`` package of ``wheel`` under ``overlay``, and the release's ``LICENSE``.

    Raises:
        RuntimeError: the overlay is empty or would hide the installed package, or the ``exports`` cannot be added, see
            :func:`edit_release`. The message is one sentence.
    """
    sources = sorted(overlay.rglob("*.py"))
    if not sources:
        raise RuntimeError(f"There is no Python file below {overlay}: without one this would be the plain release.")
    if overlay / "__init__.py" in sources:
        raise RuntimeError(f"{overlay / '__init__.py'} would hide the installed kornia from this folder: delete it.")
    edited = edit_release(wheel, overlay.parent, exports)
    if target.exists():
        shutil.rmtree(target)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        package = [name for name in names if name.startswith("kornia/")]
        archive.extractall(target, package)  # noqa: S202 - no member of a zip file can leave the folder
        licence = next(name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        (target / "LICENSE").write_bytes(archive.read(licence))
    for name, text in edited.items():
        (target / name).write_bytes(text.encode())
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
            compose(fetch_release(root), root / "kornia", target, read_settings(root).get("exports", {}))
        except RuntimeError as error:
            # Exiting shows the sentence alone, where raising would bury it under hatchling's stack.
            self.app.abort(str(error))
        licences = f"{self.build_config.builder.project_id}.dist-info/licenses"
        build_data["force_include"][str(target / "LICENSE")] = f"{licences}/kornia-release/LICENSE"
