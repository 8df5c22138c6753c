"""What an installation of this repository contains, and which messages users see if the build fails."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kornia
from fork.compose import FILES, compose, edit_file, fetch_release, read_series

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
PIN = PYPROJECT["tool"]["fork"]
WHEEL, SDIST = (name.format(PIN["release"]) for name, _ in FILES.values())
LOCAL_WHEEL = "KORNIA_RELEASE_WHEEL"
EXPORTS = ["IoUThresholdSearch", "best_iou_threshold", "iou_at_thresholds"]


@pytest.fixture(scope="module")
def release():
    return fetch_release(ROOT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the files that a build needs, with an additional overlay file in a folder that the release lacks."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("kornia", "fork"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "kornia" / "probe").mkdir()
    (folder / "kornia" / "probe" / "probe.py").write_text("LIVE = 1\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, release, tmp_path_factory):
    """The wheel of the copy, built in a folder with files from an older build."""
    leftovers = checkout / "build" / "fork" / "kornia" / "losses"
    leftovers.mkdir(parents=True)
    (leftovers / "dropped.py").write_text("# from an older overlay\n", encoding="utf-8")
    (leftovers / "dice.py").write_text("# edited by hand\n", encoding="utf-8")
    return build(checkout, release, tmp_path_factory.mktemp("wheel"), "wheel")


def run_build(folder, release, target, kind):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(target), "-t", kind]
    environment = {**os.environ, LOCAL_WHEEL: str(release)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def build(folder, release, target, kind):
    result = run_build(folder, release, target, kind)
    assert result.returncode == 0, result.stderr
    (built,) = target.iterdir()
    return built


def contents(wheel, prefix="kornia/"):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name.startswith(prefix)}


def overlay(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in (root / "kornia").rglob("*.py")}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return BytesParser().parsebytes(archive.read(name))


def requirements(wheel):
    parsed = [Requirement(line) for line in metadata(wheel).get_all("Requires-Dist")]
    return sorted((canonicalize_name(each.name), str(each.specifier), str(each.marker)) for each in parsed)


def test_overlay_has_no_init():
    assert overlay(ROOT)
    assert not (ROOT / "kornia" / "__init__.py").exists()


def test_wheel_is_release_and_overlay(checkout, release, wheel):
    """All files are identical, except that some ``__init__.py`` export the names of the overlay."""
    expected, actual = contents(release) | overlay(checkout), contents(wheel)
    assert actual.keys() == expected.keys()
    inits = ["kornia/losses/__init__.py", "kornia/metrics/__init__.py"]
    assert sorted(name for name in actual if actual[name] != expected[name]) == inits
    for init in inits:
        lines = actual[init].decode().splitlines()
        edits = [edit for step in read_series(ROOT)["step"] for edit in step.get("edits", []) if edit["file"] == init]
        for number, edit in enumerate(edits):
            # A later step replaces the lines that an earlier step has added below the same line.
            if any(later["after"] == edit["after"] and "until" in later for later in edits[number + 1 :]):
                continue
            for line in edit["lines"]:
                lines.remove(line)
        assert lines == expected[init].decode().splitlines()
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"kornia", f"kornia-{VERSION}.dist-info"}


def test_wheel_is_reproducible(checkout, release, wheel, tmp_path):
    assert build(checkout, release, tmp_path, "wheel").read_bytes() == wheel.read_bytes()


def test_metadata_equals_the_release(release, wheel):
    ours, theirs = metadata(wheel), metadata(release)
    assert (ours["Name"], ours["Version"]) == ("kornia", VERSION)
    assert VERSION.startswith(f"{PIN['release']}+lovasz.")
    assert theirs["Version"] == PIN["release"]
    assert ours["Requires-Python"] == theirs["Requires-Python"]
    assert sorted(ours.get_all("Provides-Extra")) == sorted(theirs.get_all("Provides-Extra"))
    assert requirements(wheel) == requirements(release)


def assert_both_licences(wheel, release):
    (theirs,) = [text for name, text in contents(release, "").items() if name.endswith("/licenses/LICENSE")]
    folder = f"kornia-{VERSION}.dist-info/licenses/"
    assert contents(wheel, folder) == {
        f"{folder}LICENSE": (ROOT / "LICENSE").read_bytes(),
        f"{folder}kornia-release/LICENSE": theirs,
    }


def test_wheel_has_both_licences(release, wheel):
    assert_both_licences(wheel, release)


def test_sdist_builds_the_same_wheel(checkout, release, wheel, tmp_path):
    sdist = build(checkout, release, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    assert folder.name == f"kornia-{VERSION}"
    assert overlay(folder) == overlay(checkout)
    assert not (folder / "build").exists()
    assert contents(build(folder, release, tmp_path / "wheel", "wheel"), "") == contents(wheel, "")


def test_editable_install_is_live(checkout, release, tmp_path):
    editable = build(checkout, release, tmp_path / "editable", "wheel:editable")
    composed = checkout / "build" / "fork"
    assert contents(editable, "_kornia.pth") == {"_kornia.pth": str(composed).encode()}
    assert_both_licences(editable, release)
    # Building a wheel from the same checkout must keep the links that the editable install uses.
    build(checkout, release, tmp_path / "wheel", "wheel")
    links = {path.relative_to(composed).as_posix() for path in composed.rglob("*") if path.is_symlink()}
    assert links == overlay(checkout).keys()
    probe = checkout / "kornia" / "probe" / "probe.py"
    before = probe.read_text(encoding="utf-8")
    probe.write_text("LIVE = 2\n", encoding="utf-8")
    assert (composed / "kornia" / "probe" / "probe.py").read_text(encoding="utf-8") == "LIVE = 2\n"
    probe.write_text(before, encoding="utf-8")


def test_installed_package_is_this_checkout():
    """Also fails if an overlay file is new, because an editable install includes it only after a new installation."""
    assert importlib.metadata.version("kornia") == VERSION
    assert kornia.__version__ == PIN["release"]
    site = Path(kornia.__file__).parents[1]
    missing = [name for name in overlay(ROOT) if not (site / name).is_file()]
    assert not missing, "install again"
    assert {name: (site / name).read_bytes() for name in overlay(ROOT)} == overlay(ROOT)


def test_installed_package_exports_the_names():
    package, module = import_module("kornia.metrics"), import_module("kornia.metrics.iou_threshold")
    assert [getattr(package, name) for name in EXPORTS] == [getattr(module, name) for name in EXPORTS]
    assert set(EXPORTS) <= set(package.__all__)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ({"after": "b"}, "a\nb = 1\nnew\n  c\nd\n"),
        ({"after": "  c", "until": "d"}, "a\nb = 1\n  c\nnew\nd\n"),
        ({"after": "a", "until": "d"}, "a\nnew\nd\n"),
    ],
)
def test_edit(tmp_path, edit, expected):
    file = tmp_path / "file.py"
    file.write_text("a\nb = 1\n  c\nd\n", encoding="utf-8")
    edit_file(file, {"file": "file.py", "lines": ["new"], **edit})
    assert file.read_text(encoding="utf-8") == expected


@pytest.mark.parametrize("edit", [{"after": "c"}, {"after": "b"}, {"after": "d", "until": "a"}])
def test_exception_edit(tmp_path, edit):
    file = tmp_path / "file.py"
    file.write_text("a\nb = 1\nb = 2\nd\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"^file.py cannot take 'new': it has [012] lines that begin with .*\.$"):
        edit_file(file, {"file": "file.py", "lines": ["new"], **edit})
    assert file.read_text(encoding="utf-8") == "a\nb = 1\nb = 2\nd\n"


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A function that creates a project with a pinned release. pip finds only files in the folder ``index``."""
    for name in ("project", "index"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv(LOCAL_WHEEL, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def pin(release="0.9.0", digest="0" * 64):
        text = f'[tool.fork]\nrelease = "{release}"\nwheel_sha256 = "{digest}"\nsdist_sha256 = "{digest}"\n'
        (tmp_path / "project" / "pyproject.toml").write_text(text, encoding="utf-8")
        return tmp_path / "project"

    return pin


def message_of_fetch(project, kind="wheel"):
    with pytest.raises(RuntimeError) as caught:
        fetch_release(project, kind)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_release_is_downloaded_once(pinned, release, tmp_path):
    project = pinned(PIN["release"], PIN["wheel_sha256"])
    shutil.copy(release, tmp_path / "index" / WHEEL)
    kept = fetch_release(project)
    assert kept == project / "build" / WHEEL
    assert kept.read_bytes() == release.read_bytes()
    shutil.rmtree(tmp_path / "index")
    assert fetch_release(project) == kept


@pytest.mark.parametrize("damage", [lambda data: b"other content", lambda data: data[:-1]], ids=["other", "truncated"])
def test_exception_changed_download(pinned, release, damage):
    project = pinned(PIN["release"], PIN["wheel_sha256"])
    kept = project / "build" / WHEEL
    kept.parent.mkdir()
    data = damage(release.read_bytes())
    kept.write_bytes(data)
    assert message_of_fetch(project) == (
        f"{kept} is not the pinned {WHEEL}, expected sha256 {PIN['wheel_sha256']}, got {sha256(data).hexdigest()}: "
        "delete it and build again, or correct [tool.fork] in pyproject.toml."
    )


@pytest.mark.parametrize(("kind", "name"), [("wheel", WHEEL), ("sdist", SDIST)])
def test_local_file(pinned, tmp_path, monkeypatch, kind, name):
    variable, file = f"KORNIA_RELEASE_{kind.upper()}", tmp_path / "local"
    monkeypatch.setenv(variable, str(file))
    assert message_of_fetch(pinned(), kind) == f"There is no file {file}: set {variable} to a copy of {name}."
    file.write_bytes(b"other content")
    message = message_of_fetch(pinned(), kind)
    assert message.startswith(f"{file} is not the pinned {name}, expected sha256 {'0' * 64}, got ")
    assert f": set {variable} to a copy of {name}, or correct " in message
    assert fetch_release(pinned(digest=sha256(b"other content").hexdigest()), kind) == file


def test_no_network(pinned, monkeypatch):
    message = message_of_fetch(pinned())
    assert message.startswith(f"{WHEEL} could not be downloaded, pip said 'ERROR: No matching distribution found for ")
    assert message.endswith(f": check the network, or set {LOCAL_WHEEL} to a copy of {WHEEL}.")
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert "pip said 'status 1'" in message_of_fetch(pinned())


def small_release(folder, *names):
    """Create a release of a few files, and a checkout with one overlay file and an empty series."""
    with zipfile.ZipFile(folder / "small.whl", "w") as archive:
        for name in ("kornia/__init__.py", "kornia-1.dist-info/licenses/LICENSE", *names):
            archive.writestr(name, "# release\n")
    for path, text in {"kornia/losses/new.py": "# ours\n", "fork/upstream/series.toml": "step = []\n"}.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder / "small.whl"


def test_failure_keeps_the_last_package(tmp_path):
    wheel, target = small_release(tmp_path), tmp_path / "build" / "fork"
    compose(wheel, tmp_path, target)
    before = sorted(target.rglob("*"))
    assert target / "kornia" / "losses" / "new.py" in before
    series = 'step = [{ edits = [{ file = "kornia/__init__.py", after = "none", lines = ["x"] }] }]'
    (tmp_path / "fork" / "upstream" / "series.toml").write_text(series, encoding="utf-8")
    with pytest.raises(RuntimeError, match=r"^kornia/__init__\.py cannot take 'x'"):
        compose(wheel, tmp_path, target)
    assert sorted(target.rglob("*")) == before
    assert list(target.parent.iterdir()) == [target]


def test_no_file_outside_the_folder(tmp_path):
    target = tmp_path / "build" / "fork"
    compose(small_release(tmp_path, "kornia/../../../escaped.py"), tmp_path, target)
    assert [path.relative_to(target).as_posix() for path in tmp_path.rglob("escaped.py")] == ["kornia/escaped.py"]


def test_exception_overlay_with_init(tmp_path):
    wheel = small_release(tmp_path)
    (tmp_path / "kornia" / "__init__.py").touch()
    with pytest.raises(RuntimeError, match=r"would hide the installed kornia from this folder: delete it\.$"):
        compose(wheel, tmp_path, tmp_path / "build" / "fork")


def test_failed_build_shows_one_sentence(checkout, tmp_path):
    result = run_build(checkout, tmp_path / "no.whl", tmp_path, "wheel")
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"There is no file {tmp_path / 'no.whl'}: set {LOCAL_WHEEL} to a copy of {WHEEL}."
    ]
