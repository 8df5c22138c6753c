"""A move to another release: what it says, what it changes, and that a failure changes nothing."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from fork.compose import LOCAL_SDIST, LOCAL_WHEEL, digest, fetch_release
from fork.rebase import changes, missing_names, normal, pin, read_metadata, rebase

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
DIGESTS = {"sha256": "1" * 64, "sdist_sha256": "2" * 64}
METADATA = """Metadata-Version: 2.4
Name: kornia
Version: {version}
Requires-Python: >=3.11
Requires-Dist: torch>=2.5.1
Provides-Extra: image
Requires-Dist: pillow[xmp]<20,>=1; extra == 'image'
Provides-Extra: gpu
Requires-Dist: onnxruntime-gpu; (sys_platform != 'darwin') and extra == 'gpu'
"""
PROJECT = f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.fork]
release = "0.0.1"  # the newest
sha256 = "{{sha256}}"
sdist_sha256 = "{"0" * 64}"

[project]
name = "kornia"
version = "0.0.1+lovasz.7"
description = "Kornia 0.0.1 with something"
requires-python = ">=3.11"
dependencies = ["torch>=2.5.1"]

[project.optional-dependencies]
image = ["pillow[xmp]>=1,<20"]
gpu = ["onnxruntime-gpu; sys_platform != 'darwin'"]

[tool.hatch.build.targets.wheel]
packages = ["build/fork/kornia"]
ignore-vcs = true

[tool.hatch.build.targets.wheel.hooks.custom]
path = "fork/compose.py"
"""


def write_release(folder, version, modules):
    """A wheel and a source archive in a folder, the wheel under the name of an older release."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"kornia-{version}-py2.py3-none-any.whl"
    info = f"kornia-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in modules.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/METADATA", METADATA.format(version=version))
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/licenses/LICENSE", "")
        archive.writestr(f"{info}/RECORD", "")
    settings = f'[project]\nname = "kornia"\nversion = "{version}"\n[build-system]\nrequires = ["hatchling"]\n'
    settings += 'build-backend = "hatchling.build"\n[tool.hatch.build.targets.wheel]\nbypass-selection = true\n'
    with tarfile.open(folder / f"kornia-{version}.tar.gz", "w:gz") as archive:
        for name, text in {"pyproject.toml": settings, "PKG-INFO": METADATA.format(version=version)}.items():
            member = tarfile.TarInfo(f"kornia-{version}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return wheel


OLD = {"kornia/__init__.py": "VALUE = 1\n", "kornia/util.py": "def needed(): pass\n", "kornia/loss.py": "a\nb\nc\n"}


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A checkout of a fork of kornia 0.0.1, where pip finds what `write_release` puts into `index`."""
    root, index = tmp_path / "fork", tmp_path / "index"
    wheel = write_release(root / "build", "0.0.1", OLD)
    wheel = wheel.rename(wheel.with_name("kornia-0.0.1-py3-none-any.whl"))
    index.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(name, value)
    for name in (LOCAL_WHEEL, LOCAL_SDIST):
        monkeypatch.delenv(name, raising=False)
    (root / "pyproject.toml").write_text(PROJECT.format(sha256=digest(wheel)))
    for name, text in {
        "fork/compose.py": (ROOT / "fork" / "compose.py").read_text(encoding="utf-8"),
        "kornia/loss.py": "from .util import needed\n\nOURS = 1\n",
        "tests/test_loss.py": "from kornia.loss import OURS\n",
        ".gitignore": "build\n",
        "LICENSE": "",
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


# What stands for the tests: passes if the installed package is the release with the overlay.
CHECK = ["-c", "import kornia, kornia.loss as loss; assert (kornia.VALUE, loss.OURS) == (2, 1)"]


def tracked(root):
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=root, text=True).split()
    return {name: (root / name).read_bytes() for name in names}


def test_rebase(fork, capfd):
    before = tracked(fork)
    new = write_release(fork.parent / "index", "0.0.2", OLD | {"kornia/__init__.py": "VALUE = 2\n"})
    expected = PROJECT.format(sha256=digest(new)).replace("0.0.1", "0.0.2").replace("lovasz.7", "lovasz.1")
    expected = expected.replace("0" * 64, digest(new.with_name("kornia-0.0.2.tar.gz")))
    rebase(fork, "0.0.2", CHECK)
    assert tracked(fork) == before | {"pyproject.toml": expected.encode()}
    assert "kornia/loss.py: the same in both releases" in capfd.readouterr().out


def test_there_and_back_again(fork):
    before = (fork / "pyproject.toml").read_text()
    old = fork / "build" / "kornia-0.0.1-py3-none-any.whl"
    shutil.copy(old, fork.parent / "index")
    shutil.copy(fork / "build" / "kornia-0.0.1.tar.gz", fork.parent / "index")
    write_release(fork.parent / "index", "0.0.2", OLD)
    rebase(fork, "0.0.2", ["-c", ""])
    rebase(fork, "0.0.1", ["-c", ""])
    sdist = digest(fork / "build" / "kornia-0.0.1.tar.gz")
    assert (fork / "pyproject.toml").read_text() == before.replace("lovasz.7", "lovasz.1").replace("0" * 64, sdist)


def refused(root, *arguments):
    before = tracked(root)
    with pytest.raises(RuntimeError) as caught:
        rebase(root, *arguments)
    assert tracked(root) == before
    return str(caught.value)


def test_the_tests_fail(fork):
    write_release(fork.parent / "index", "0.0.2", OLD | {"kornia/__init__.py": "VALUE = 3\n"})
    assert refused(fork, "0.0.2", CHECK).startswith(
        "The tests fail on kornia 0.0.2, so nothing has changed here. Adapt "
    )


def test_release_lacks_what_the_overlay_imports(fork):
    write_release(fork.parent / "index", "0.0.2", OLD | {"kornia/util.py": ""})
    message = refused(fork, "0.0.2", CHECK)
    assert message.startswith("kornia 0.0.2 lacks what our files import, so nothing has changed here:\n")
    assert message.splitlines()[1] == "  kornia/loss.py: kornia.util.needed"


def test_tests_import_what_the_fork_exports(fork):
    package = {"kornia/__init__.py": "from .util import needed\n\nVALUE = 2\n"}
    write_release(fork.parent / "index", "0.0.2", OLD | package)
    with (fork / "pyproject.toml").open("a") as file:
        file.write('[tool.fork.exports]\n"kornia/loss.py" = ["OURS"]\n')
    (fork / "tests" / "test_loss.py").write_text("from kornia import OURS\n")
    rebase(fork, "0.0.2", ["-c", "from kornia import OURS"])
    assert tomllib.loads((fork / "pyproject.toml").read_text())["tool"]["fork"]["release"] == "0.0.2"


def test_release_cannot_export(fork):
    write_release(fork.parent / "index", "0.0.2", OLD)
    with (fork / "pyproject.toml").open("a") as file:
        file.write('[tool.fork.exports]\n"kornia/loss.py" = ["OURS", "VALUE"]\n')
    assert "it has VALUE already" in refused(fork, "0.0.2", CHECK)


def test_fork_does_not_build(fork):
    write_release(fork.parent / "index", "0.0.2", OLD)
    (fork / "kornia" / "__init__.py").touch()
    message = refused(fork, "0.0.2", CHECK)
    assert message.startswith("The fork does not build, so nothing has changed here: see ")
    assert "would hide the installed kornia" in Path(message.split("see ")[1][:-1]).read_text()


def test_no_such_release(fork):
    assert refused(fork, "0.0.2", CHECK).startswith("kornia 0.0.2 could not be downloaded")


def test_the_same_release(fork):
    assert refused(fork, "0.0.1", CHECK) == "The fork is based on kornia 0.0.1 already."


def test_changes(tmp_path):
    old = {"same": "a\n", "changed": "a\nb\n-- c\n", "gone": "a\n", "elsewhere": "a\n"}
    new = {"same": "a\n", "changed": "a\nB\nd\n-- c\n", "new": "a\n", "elsewhere": "b\n"}
    assert changes(old, new, ["same", "changed", "gone", "new", "added"], tmp_path) == [
        "same: the same in both releases",
        f"changed: CHANGED, +2 -1 lines: {tmp_path / 'changed.diff'}",
        "gone: GONE from the other release",
        "new: NEW in the other release, and replaced by ours",
        "added: in neither release",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["changed.diff"]
    assert "-b\n+B\n+d\n" in (tmp_path / "changed.diff").read_text()


def test_missing_names():
    package = {
        "kornia/__init__.py": "from . import core\nfrom .core import check as check2\n",
        "kornia/core/__init__.py": "",
        "kornia/core/check.py": "import os\nA: int\nB = C = 1\ndef f(): pass\nclass D: inner = 1\nif B:\n    E = 1\n",
        "kornia/losses/__init__.py": "",
    }
    present = (
        "import torch\nfrom torch import nothing\nfrom kornia import core, losses\nfrom kornia.core import check\n"
        "from kornia.core.check import A, B, C, D, E, f, os\nfrom ..core import check as renamed\nfrom . import ours\n"
        "from .ours import mine\nfrom ..core.check import f as g\nfrom kornia import check2\n"
    )
    ours = {"kornia/losses/ours.py": "mine = 1\n", "kornia/losses/loss.py": present}
    assert missing_names(package, ours) == []
    absent = (
        "from kornia.core.check import inner, A\nfrom ..core import nothing\nfrom .theirs import x\n"
        "def later():\n    from kornia.colour import y\nfrom kornia import tests\n"
    )
    assert sorted(missing_names(package, {"kornia/losses/loss.py": absent})) == [
        "kornia/losses/loss.py: kornia.colour",
        "kornia/losses/loss.py: kornia.core.check.inner",
        "kornia/losses/loss.py: kornia.core.nothing",
        "kornia/losses/loss.py: kornia.losses.theirs",
        "kornia/losses/loss.py: kornia.tests",
    ]


def test_metadata(tmp_path):
    assert read_metadata(write_release(tmp_path, "0.0.1", OLD)) == {
        "requires-python": ">=3.11",
        "dependencies": ["torch>=2.5.1"],
        "optional-dependencies": {
            "image": ["pillow[xmp]<20,>=1"],
            "gpu": ['onnxruntime-gpu; sys_platform != "darwin"'],
        },
    }


def test_pin_repeats_the_metadata_of_its_release():
    metadata = read_metadata(fetch_release(ROOT))
    project = tomllib.loads(PYPROJECT)["project"]
    assert {key: normal(project[key]) for key in metadata} == {key: normal(value) for key, value in metadata.items()}


def test_pin_changes_what_it_must_and_no_more():
    old = tomllib.loads(PYPROJECT)["tool"]["fork"]["release"]
    metadata = read_metadata(fetch_release(ROOT))
    there, notes = pin(PYPROJECT, "9.9.9", DIGESTS, metadata)
    assert notes == []
    changed = [(a, b) for a, b in zip(PYPROJECT.splitlines(), there.splitlines(), strict=True) if a != b]
    assert [b.partition(" = ")[0] for _, b in changed] == [
        *("release", "sha256", "sdist_sha256", "version", "description")
    ]
    settings = tomllib.loads(there)
    assert settings["tool"]["fork"]["release"] == "9.9.9"
    assert {key: settings["tool"]["fork"][key] for key in DIGESTS} == DIGESTS
    assert settings["project"]["version"] == "9.9.9+lovasz.1"
    back, _ = pin(there, old, {key: tomllib.loads(PYPROJECT)["tool"]["fork"][key] for key in DIGESTS}, metadata)
    assert tomllib.loads(back)["project"]["description"] == tomllib.loads(PYPROJECT)["project"]["description"]


def test_pin_follows_the_metadata():
    metadata = {
        "requires-python": ">=3.12",
        "dependencies": ["torch>=3"],
        "optional-dependencies": {"x": ["numpy; sys_platform != 'darwin'"]},
    }
    text, notes = pin(PYPROJECT, "9.9.9", DIGESTS, metadata)
    project = tomllib.loads(text)["project"]
    assert {key: project[key] for key in metadata} == metadata
    assert [note.split()[0] for note in notes] == list(metadata)


def test_command_without_a_version():
    result = subprocess.run(
        [sys.executable, "-m", "fork.rebase"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "required: VERSION" in result.stderr
