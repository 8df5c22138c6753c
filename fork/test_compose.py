"""What an installation of this repository holds, and what a user reads when it cannot be built."""

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
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kornia
from fork.compose import LOCAL_WHEEL, compose, fetch_release

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
PIN = PYPROJECT["tool"]["fork"]


@pytest.fixture(scope="module")
def release():
    return fetch_release(ROOT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, with one more overlay file in a folder that the release does not have."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("kornia", "fork"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    probe = folder / "kornia" / "probe" / "probe.py"
    probe.parent.mkdir()
    probe.write_text("LIVE = 1\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, release, tmp_path_factory):
    """The wheel of the copy, built where an older build has left things behind."""
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
    expected = contents(release) | overlay(checkout)
    assert contents(wheel).keys() == expected.keys()
    assert contents(wheel) == expected
    with zipfile.ZipFile(wheel) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {"kornia", f"kornia-{VERSION}.dist-info"}


def test_wheel_again_is_the_same_file(checkout, release, wheel, tmp_path):
    assert build(checkout, release, tmp_path, "wheel").read_bytes() == wheel.read_bytes()


def test_metadata_follows_release(release, wheel):
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
    # A wheel built from the same checkout must not cut the links that the editable install lives on.
    build(checkout, release, tmp_path / "wheel", "wheel")

    links = {path.relative_to(composed).as_posix() for path in composed.rglob("*") if path.is_symlink()}
    assert links == overlay(checkout).keys()
    probe = checkout / "kornia" / "probe" / "probe.py"
    before = probe.read_text(encoding="utf-8")
    probe.write_text("LIVE = 2\n", encoding="utf-8")
    assert (composed / "kornia" / "probe" / "probe.py").read_text(encoding="utf-8") == "LIVE = 2\n"
    probe.write_text(before, encoding="utf-8")


def test_installed_package_is_this_checkout():
    """Fails too when an overlay file is new: an editable install learns of it by being installed again."""
    assert importlib.metadata.version("kornia") == VERSION
    assert kornia.__version__ == PIN["release"]
    site = Path(kornia.__file__).parents[1]
    missing = [name for name in overlay(ROOT) if not (site / name).is_file()]
    assert not missing, "install again"
    assert {name: (site / name).read_bytes() for name in overlay(ROOT)} == overlay(ROOT)


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """A function that pins a release in a project of its own, where pip finds only what lies in ``index``."""
    for name in ("project", "index"):
        (tmp_path / name).mkdir()
    monkeypatch.delenv(LOCAL_WHEEL, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))

    def pin(release, digest):
        text = f'[tool.fork]\nrelease = "{release}"\nsha256 = "{digest}"\n'
        (tmp_path / "project" / "pyproject.toml").write_text(text, encoding="utf-8")
        return tmp_path / "project"

    return pin


def message_of_fetch(project):
    with pytest.raises(RuntimeError) as caught:
        fetch_release(project)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_release_is_downloaded_once(pinned, release, tmp_path):
    project = pinned(PIN["release"], PIN["sha256"])
    shutil.copy(release, tmp_path / "index")
    kept = fetch_release(project)
    assert kept.parent == project / "build"
    assert kept.read_bytes() == release.read_bytes()
    shutil.rmtree(tmp_path / "index")
    assert fetch_release(project) == kept


def test_downloaded_wheel_of_other_content(pinned, release):
    project = pinned(PIN["release"], PIN["sha256"])
    kept = project / "build" / release.name
    kept.parent.mkdir()
    kept.write_bytes(b"other content")
    assert message_of_fetch(project) == (
        f"{kept} is not the pinned wheel of kornia {PIN['release']}, expected sha256 {PIN['sha256']}, "
        f"got {sha256(b'other content').hexdigest()}: delete it and build again, "
        "or correct the pin under [tool.fork] in pyproject.toml."
    )


def test_local_wheel_of_other_content(pinned, tmp_path, monkeypatch):
    project = pinned("0.9.0", "0" * 64)
    local = tmp_path / "local.whl"
    local.write_bytes(b"other content")
    monkeypatch.setenv(LOCAL_WHEEL, str(local))
    message = message_of_fetch(project)
    assert message.startswith(f"{local} is not the pinned wheel of kornia 0.9.0, expected sha256 {'0' * 64}, got ")
    assert f": set {LOCAL_WHEEL} to the wheel of kornia 0.9.0, or " in message


def test_local_wheel_missing(pinned, tmp_path, monkeypatch):
    monkeypatch.setenv(LOCAL_WHEEL, str(tmp_path / "no.whl"))
    message = message_of_fetch(pinned("0.9.0", "0" * 64))
    assert message == f"There is no file {tmp_path / 'no.whl'}: set {LOCAL_WHEEL} to the wheel of kornia 0.9.0."


def test_pinned_file_is_no_wheel(pinned, tmp_path, monkeypatch):
    local = tmp_path / "kornia-0.9.0.tar.gz"
    local.write_bytes(b"no archive")
    monkeypatch.setenv(LOCAL_WHEEL, str(local))
    message = message_of_fetch(pinned("0.9.0", sha256(b"no archive").hexdigest()))
    assert message.startswith(f"{local} is no wheel, ")


def test_no_network(pinned):
    message = message_of_fetch(pinned("0.9.0", "0" * 64))
    assert message.startswith("kornia 0.9.0 could not be downloaded, pip reached no package index that has kornia: ")
    assert f"set {LOCAL_WHEEL} to a local copy" in message


def test_unknown_release(pinned, tmp_path):
    (tmp_path / "index" / "kornia-0.9.0-py3-none-any.whl").touch()
    message = message_of_fetch(pinned("9.9.9", "0" * 64))
    assert "pip said 'No matching distribution found for kornia==9.9.9'" in message
    assert "the release under [tool.fork]" in message


def test_pip_that_does_not_start(pinned, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    assert "pip ended with status 1" in message_of_fetch(pinned("0.9.0", "0" * 64))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["note.txt"], "There is no Python file below "),
        (["__init__.py", "losses/new.py"], "would hide the installed kornia"),
    ],
)
def test_unfit_overlay(release, tmp_path, names, expected):
    for name in names:
        (tmp_path / "kornia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kornia" / name).touch()
    target = tmp_path / "fork"
    target.mkdir()
    with pytest.raises(RuntimeError, match=expected):
        compose(release, tmp_path / "kornia", target)
    assert target.exists(), "a refused overlay must leave the last composed package alone"


def test_failed_build_shows_the_sentence_alone(checkout, tmp_path):
    result = run_build(checkout, tmp_path / "no.whl", tmp_path, "wheel")
    assert result.returncode == 1
    sentence = f"There is no file {tmp_path / 'no.whl'}: set {LOCAL_WHEEL} to the wheel of kornia {PIN['release']}."
    assert result.stderr.splitlines() == [sentence]
