"""What an installation of this repository holds, and what a user reads when it cannot be built."""

import importlib.metadata
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from difflib import ndiff
from email.parser import BytesParser
from hashlib import sha256
from importlib import import_module
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import kornia
from fork.compose import LOCAL_WHEEL, compose, edit_release, fetch_release, insert_export, read_settings

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = PYPROJECT["project"]["version"]
PIN = PYPROJECT["tool"]["fork"]
EXPORTS = read_settings(ROOT)["exports"]
PROBE = "kornia/metrics/probe.py"
PROBE_NAMES = ["PROBE", "Probe3", "Probe10", "probe"]  # as an import and __all__ order them


@pytest.fixture(scope="module")
def release():
    return fetch_release(ROOT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what a build reads, with two more overlay files.

    One is in a folder that the release does not have; the other's names are exported by a file of the release.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("kornia", "fork"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    probe = folder / "kornia" / "probe" / "probe.py"
    probe.parent.mkdir()
    probe.write_text("LIVE = 1\n", encoding="utf-8")
    (folder / "kornia" / "metrics").mkdir(exist_ok=True)
    (folder / PROBE).write_text("".join(f"{name} = 1\n" for name in PROBE_NAMES), encoding="utf-8")
    settings = (folder / "pyproject.toml").read_text(encoding="utf-8")
    header = "[tool.fork.exports]\n"
    assert header in settings
    settings = settings.replace(header, f'{header}"{PROBE}" = ["probe", "Probe10", "PROBE", "Probe3"]\n')
    (folder / "pyproject.toml").write_text(settings, encoding="utf-8")
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


def assert_exports(release, edited):
    """``edited`` holds the release's ``__init__.py`` files with the declared lines added and no other line changed."""
    theirs = contents(release)
    exports = EXPORTS | {PROBE: PROBE_NAMES}
    inits = {str(PurePosixPath(path).with_name("__init__.py")) for path in exports}
    assert edited.keys() == inits
    for init, text in edited.items():
        imports = {
            f"from .{PurePosixPath(path).stem} import {', '.join(names)}": names
            for path, names in exports.items()
            if PurePosixPath(path).with_name("__init__.py") == PurePosixPath(init)
        }
        expected = [*imports, *(f'    "{name}",' for names in imports.values() for name in names)]
        differences = list(ndiff(theirs[init].decode().splitlines(), text.decode().splitlines()))
        assert not [line for line in differences if line.startswith("- ")]
        assert sorted(line[2:] for line in differences if line.startswith("+ ")) == sorted(expected)


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
    expected, actual = contents(release) | overlay(checkout), contents(wheel)
    assert actual.keys() == expected.keys()
    differing = {name: actual[name] for name in actual if actual[name] != expected[name]}
    assert_exports(release, differing)
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
    # What exports the names is a file of its own, whose edits cannot reach the checkout or another build.
    inits = {str(PurePosixPath(path).with_name("__init__.py")) for path in [*EXPORTS, PROBE]}
    assert_exports(release, {init: (composed / init).read_bytes() for init in inits})
    assert not any((checkout / init).exists() for init in inits)
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


def test_installed_package_exports_the_names():
    assert EXPORTS
    for path, names in EXPORTS.items():
        package = import_module(".".join(PurePosixPath(path).parent.parts))
        module = import_module(".".join(PurePosixPath(path).with_suffix("").parts))
        assert {name: getattr(package, name) for name in names} == {name: getattr(module, name) for name in names}
        assert set(names) <= set(package.__all__)


INIT = """# a comment
\"\"\"A docstring with from .aa import Aa in it.\"\"\"

from kornia.core import ops

from .bb import Bb, bb
from .dd import (
    DD,
    Dd,
)
from .dd10 import dd10

__all__ = [
    "DD",
    "Bb",  # a remark
    "Dd",
    "bb",
    "dd10",
]


def own():
    local = ops
"""


@pytest.mark.parametrize(
    ("module", "names", "line", "after"),
    [
        (".cc", ["Cc"], "from .cc import Cc", "from .bb import Bb, bb"),
        (".aa", ["Cc"], "from .aa import Cc", ""),
        (".dd9", ["Cc"], "from .dd9 import Cc", ")"),
        (".ee", ["Cc"], "from .ee import Cc", "from .dd10 import dd10"),
    ],
)
def test_insert_export(module, names, line, after):
    before = INIT.splitlines()
    lines = insert_export(INIT, module, names).splitlines()
    assert lines[lines.index(line) - 1] == after
    entry = lines.index('    "Cc",')
    assert lines[entry - 1 : entry + 2] == ['    "Bb",  # a remark', '    "Cc",', '    "Dd",']
    del lines[entry]
    lines.remove(line)
    assert lines == before


def test_insert_export_sorts_the_names():
    text = insert_export(INIT, ".cc", ["cc", "own2", "AA", "Zz", "Cc10", "C", "Cc9"])
    assert "\nfrom .cc import AA, C, Cc9, Cc10, Zz, cc, own2\n" in text
    assert [line.strip(' ",') for line in text.splitlines() if line.startswith('    "')] == [
        "AA", "DD", 'Bb",  # a remark', "C", "Cc9", "Cc10", "Dd", "Zz", "bb", "cc", "dd10", "own2",
    ]  # fmt: skip


def test_insert_export_without_all():
    text = "from .bb import bb\n"
    assert insert_export(text, ".cc", ["cc"]) == "from .bb import bb\nfrom .cc import cc\n"


def test_insert_export_below_all():
    text = '__all__ = [\n    "bb",\n]\n\nfrom .bb import bb\n'
    expected = '__all__ = [\n    "bb",\n    "cc",\n]\n\nfrom .bb import bb\nfrom .cc import cc\n'
    assert insert_export(text, ".cc", ["cc"]) == expected


@pytest.mark.parametrize("width", [120, 121])
def test_insert_export_wraps_as_ruff_does(width):
    names = ["a" * 50, "b" * (width - 50 - len("from .cc import , "))]
    text = insert_export("from .bb import bb\n", ".cc", names)
    assert text == ruff("format", text=f"from .bb import bb\nfrom .cc import {', '.join(names)}\n")


def test_insert_export_twice():
    once = insert_export(INIT, ".cc", ["cc"])
    with pytest.raises(ValueError, match="it has cc already"):
        insert_export(once, ".cc", ["cc"])


@pytest.mark.parametrize(
    ("text", "module", "names", "message"),
    [
        (INIT, ".cc", [], "none is given"),
        (INIT, ".cc", ["Cc", "Bb"], "it has Bb already"),
        (INIT, ".cc", ["own"], "it has own already"),
        (INIT, ".bb", ["cc"], r"it imports from \.bb already"),
        ("from kornia.core import ops\n", ".cc", ["cc"], "no import from a sibling module"),
        ('from .bb import bb\n\n__all__ = ["bb"]\n', ".cc", ["cc"], "not a list with one name a line"),
        ("from .bb import bb\n\n__all__ = sorted(dir())\n", ".cc", ["cc"], "not a list with one name a line"),
    ],
)
def test_insert_export_refused(text, module, names, message):
    with pytest.raises(ValueError, match=message):
        insert_export(text, module, names)


def test_insert_export_local_name_is_no_obstacle():
    assert '"local",' in insert_export(INIT, ".cc", ["local"])


def ruff(*arguments, text):
    """Run ruff with the settings of this repository on a text that stands for a file of Kornia."""
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", "kornia/probe/__init__.py", "-"]
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("seed", range(5))
def test_insert_export_formats_as_ruff_does(seed):
    """Names and modules of random spelling: where ruff sorts and wraps them is where they are."""
    generator = random.Random(seed)
    parts = ["a", "B", "ab", "Ab", "AB", "aB", "_", "1", "2", "10", "x_y", "Xy", "long_name_of_something"]

    def spell():
        name = "".join(generator.choices(parts, k=4))
        return name if name[0].isalpha() else f"n{name}"

    modules = {f".{spell().lower()}": [] for _ in range(8)}
    for name in dict.fromkeys(spell() for _ in range(60)):
        generator.choice(list(modules.values())).append(name)
    first, *rest = modules
    text = f"from {first} import {', '.join(modules[first])}\n\n__all__ = {modules[first]}\n"
    text = ruff("format", text=ruff("check", "--fix", "--select=I001,RUF022", "--quiet", text=text))
    if "__all__ = [\n" not in text:
        text = ruff("format", text=text.replace("]", ",]"))
    for module in rest:
        text = insert_export(text, module, modules[module])
    assert ruff("format", text=text) == text
    assert ruff("check", "--fix", "--select=I001,RUF022", "--quiet", text=text) == text
    assert "import (\n" in text, "no line was too long"


def test_two_exports_of_one_package(release, tmp_path):
    (tmp_path / "kornia" / "metrics").mkdir(parents=True)
    paths = [f"kornia/metrics/{name}.py" for name in ("one", "two")]
    for path in paths:
        (tmp_path / path).touch()
    ((init, text),) = edit_release(
        release, tmp_path, {path: [f"of_{PurePosixPath(path).stem}"] for path in paths}
    ).items()
    assert init == "kornia/metrics/__init__.py"
    assert "\nfrom .one import of_one\n" in text
    assert "\nfrom .two import of_two\n" in text


def test_edited_release_is_as_ruff_formats_it(release):
    for init, text in edit_release(release, ROOT, EXPORTS).items():
        assert ruff("format", text=text) == text, init
        assert ruff("check", "--fix", "--select=I001,RUF022", "--quiet", text=text) == text, init


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
        compose(release, tmp_path / "kornia", target, {})
    assert target.exists(), "a refused overlay must leave the last composed package alone"


@pytest.mark.parametrize(
    ("names", "export", "expected"),
    [
        (
            ["losses/new.py"],
            "metrics/new.py",
            r"There is no file .*new\.py: create it, or correct \[tool\.fork",
        ),
        (["metrics/__init__.py", "metrics/new.py"], "metrics/new.py", r"__init__\.py replaces the release's"),
        (["probe/new.py"], "probe/new.py", r"The release has no kornia/probe/__init__\.py"),
        (["metrics/psnr.py"], "metrics/psnr.py", r"cannot export names of \S+, it imports from \.psnr already"),
    ],
)
def test_unfit_export(release, tmp_path, names, export, expected):
    for name in names:
        (tmp_path / "kornia" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "kornia" / name).touch()
    target = tmp_path / "fork"
    target.mkdir()
    with pytest.raises(RuntimeError, match=expected) as caught:
        compose(release, tmp_path / "kornia", target, {f"kornia/{export}": ["new"]})
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    assert target.exists(), "a refused export must leave the last composed package alone"


def test_failed_build_shows_the_sentence_alone(checkout, tmp_path):
    result = run_build(checkout, tmp_path / "no.whl", tmp_path, "wheel")
    assert result.returncode == 1
    sentence = f"There is no file {tmp_path / 'no.whl'}: set {LOCAL_WHEEL} to the wheel of kornia {PIN['release']}."
    assert result.stderr.splitlines() == [sentence]
