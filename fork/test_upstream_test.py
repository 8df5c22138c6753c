"""The comparison of two runs of Kornia's tests: what it reads, runs and concludes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fork.compose import LOCAL_WHEEL, digest
from fork.outcomes import compare, read_outcomes
from fork.upstream_test import Side, check_import, prepare, repeat, report, run, split

ROOT = Path(__file__).resolve().parents[1]

EVERY_OUTCOME = """
import pytest

@pytest.fixture
def broken():
    raise OSError

@pytest.fixture
def broken_later():
    yield
    raise OSError

def test_passes(): pass
def test_fails(): assert False
def test_error(broken): pass
def test_error_later(broken_later): pass
@pytest.mark.skip
def test_skip(): pass
def test_skips(): pytest.skip()
@pytest.mark.xfail
def test_xfails(): assert False
@pytest.mark.xfail
def test_xpasses(): pass
@pytest.mark.xfail(run=False)
def test_does_not_run(): pass
@pytest.mark.xfail(strict=True)
def test_xpasses_strictly(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_each(x): assert x == 1
class TestClass:
    def test_method(self): pass
"""


def test_read_outcomes(tmp_path):
    (tmp_path / "test_every.py").write_text(EVERY_OUTCOME)
    (tmp_path / "test_import.py").write_text("import nothing_of_that_name\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    subprocess.run([*command, "--report-log", "log"], cwd=tmp_path, check=False, capture_output=True)
    assert read_outcomes(tmp_path / "log") == {
        "test_import.py": "error",
        **{
            f"test_every.py::{test}": outcome
            for test, outcome in {
                "test_passes": "passed",
                "test_fails": "failed",
                "test_error": "error",
                "test_error_later": "error",
                "test_skip": "skipped",
                "test_skips": "skipped",
                "test_xfails": "xfailed",
                "test_xpasses": "passed",
                "test_does_not_run": "xfailed",
                "test_xpasses_strictly": "failed",
                "test_each[1]": "passed",
                "test_each[2]": "failed",
                "TestClass::test_method": "passed",
            }.items()
        },
    }
    assert read_outcomes(tmp_path / "no log") == {}


def test_outcomes_of_a_run_that_crashed(tmp_path):
    (tmp_path / "test_crash.py").write_text(
        "import os\ndef test_before(): pass\ndef test_crash(): os._exit(3)\ndef test_after(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--report-log", "log"]
    assert subprocess.run(command, cwd=tmp_path, check=False, capture_output=True).returncode == 3
    assert read_outcomes(tmp_path / "log") == {"test_crash.py::test_before": "passed"}


def test_compare():
    outcomes = ["passed", "failed", "error", "skipped", "xfailed", None]
    pairs = {f"{a}, {b}": (a, b) for a in outcomes for b in outcomes}
    before, after = ({test: pair[i] for test, pair in pairs.items() if pair[i]} for i in (0, 1))
    difference = compare(before, after)
    others = [outcome or "missing" for outcome in outcomes[1:]]
    assert set(difference.lost.values()) == {("passed", other) for other in others}
    assert set(difference.gained.values()) == {(other, "passed") for other in others}
    assert len(difference.other) == len(others) * (len(others) - 1)
    assert compare(before, before) == compare({}, {})


@pytest.fixture
def checkout(tmp_path):
    """A checkout of a Kornia with another package in it, whose tests say which one they got."""
    folder = tmp_path / "checkout"
    for name in ("tests/losses", "tests/geometry/camera", "testing", "kornia", "tests/data"):
        (folder / name).mkdir(parents=True)
    (folder / "kornia" / "__init__.py").write_text("raise ImportError('the kornia of the checkout')\n")
    (folder / "conftest.py").write_text(
        "import kornia\n\ndef pytest_addoption(parser):\n    parser.addoption('--side')\n"
    )
    (folder / "testing" / "__init__.py").touch()
    (folder / "tests" / "losses" / "test_place.py").write_text(
        "from pathlib import Path\n"
        "import kornia\n"
        "def test_place():\n"
        "    assert Path(kornia.__file__).parents[1] == Path(__file__).parents[2]\n"
        "def test_only_in_the_release():\n"
        "    assert not Path(kornia.__file__).with_name('losses').joinpath('_lovasz.py').exists()\n"
    )
    (folder / "tests" / "geometry" / "camera" / "test_camera.py").write_text("def test_camera(): pass\n")
    (folder / "tests" / "test_import.py").write_text("def test_import(): pass\n")
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A fork of a release that holds next to nothing, to which it adds a file."""
    monkeypatch.delenv(LOCAL_WHEEL, raising=False)
    folder = tmp_path / "root"
    wheel = folder / "build" / "kornia-0.0.1-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("kornia/__init__.py", "kornia/losses/__init__.py", "kornia-0.0.1.dist-info/licenses/LICENSE"):
            archive.writestr(name, "")
    (folder / "kornia" / "losses").mkdir(parents=True)
    (folder / "kornia" / "losses" / "_lovasz.py").touch()
    text = f'[tool.fork]\nrelease = "0.0.1"\nsha256 = "{digest(wheel)}"\n'
    (folder / "pyproject.toml").write_text(text)
    return folder


@pytest.fixture
def sides(checkout, root, tmp_path):
    return prepare(checkout, root, tmp_path / "work", [])


def test_each_side_tests_its_own_package(sides, capsys):
    release, fork = (run(side, "tests/losses", []) for side in sides)
    place, other = (f"tests/losses/test_place.py::test_{name}" for name in ("place", "only_in_the_release"))
    assert release == {place: "passed", other: "passed"}
    assert fork == {place: "passed", other: "failed"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [
        "release tests/losses: 2 passed",
        "fork    tests/losses: 1 failed, 1 passed",
    ]


def test_a_part_that_has_run_is_kept(sides, checkout, root, tmp_path, capsys):
    side = sides[0]
    outcomes = run(side, "tests/losses", [])
    capsys.readouterr()
    (side.tree / "tests" / "losses" / "test_place.py").unlink()
    assert run(side, "tests/losses", []) == outcomes
    assert capsys.readouterr().out == ""

    again = prepare(checkout, root, tmp_path / "work", [])
    assert [each.logs for each in again] == [each.logs for each in sides]
    with_option = prepare(checkout, root, tmp_path / "work", ["--side", "1"])
    (checkout / "tests" / "test_import.py").write_text("def test_other(): pass\n")
    edited = prepare(checkout, root, tmp_path / "work", [])
    assert len({each.logs for pair in (sides, with_option, edited) for each in pair}) == 6


def test_an_edit_of_the_overlay_leaves_the_half_of_the_release(sides, checkout, root, tmp_path):
    (root / "kornia" / "losses" / "_lovasz.py").write_text("# edited\n")
    release, fork = prepare(checkout, root, tmp_path / "work", [])
    assert release.logs == sides[0].logs
    assert fork.logs != sides[1].logs


def test_check_import(sides):
    for side in sides:
        check_import(side)
    other = Side("fork", sides[1].tree.parent, sides[1].logs)
    (other.tree / "kornia").mkdir()
    (other.tree / "kornia" / "__init__.py").write_text("__file__ = 'elsewhere'\n")
    with pytest.raises(RuntimeError, match=r"^The tests on the fork would not import .*, got: elsewhere"):
        check_import(other)


def test_split(sides):
    tree = sides[0].tree
    assert split(tree, ["tests/"]) == ["tests/geometry", "tests/losses", "tests/test_import.py"]
    assert split(tree, ["tests/losses/", "tests/test_import.py::test_import"]) == [
        "tests/losses",
        "tests/test_import.py::test_import",
    ]
    with pytest.raises(RuntimeError, match=r"^The checkout has no tests/colour: "):
        split(tree, ["tests/colour"])


def test_no_checkout(tmp_path):
    (tmp_path / "tests").mkdir()
    with pytest.raises(RuntimeError, match=r"has no testing, conftest.py\. Give a checkout .*git clone "):
        prepare(tmp_path, ROOT, tmp_path / "work", [])


def test_pytest_without_a_report(sides):
    with pytest.raises(RuntimeError, match=r"^pytest ended with status 4 and no report: see .*tests\.losses\.txt\.$"):
        run(sides[0], "tests/losses", ["--no-such-option"])


def test_lost_tests_run_again(sides):
    side = sides[0]
    counter = side.tree / "count"
    (side.tree / "tests" / "test_unsteady.py").write_text(
        f"from pathlib import Path\ndef test_unsteady():\n    Path({str(counter)!r}).touch(exist_ok=False)\n"
        "def test_steady(): pass\n"
    )
    names = [f"tests/test_unsteady.py::test_{name}" for name in ("unsteady", "steady")]
    side.logs.mkdir(parents=True)
    assert repeat((side, side), names, []) == {names[0]: ("passed", "failed"), names[1]: ("passed", "passed")}


STEADY = {"a": "passed"}


@pytest.mark.parametrize(
    ("before", "after", "repeated", "status"),
    [
        (STEADY, STEADY, {}, 0),
        (STEADY | {"b": "failed"}, STEADY | {"b": "failed"}, {}, 0),
        (STEADY | {"b": "failed"}, STEADY | {"b": "passed"}, {}, 0),
        (STEADY | {"b": "passed"}, STEADY | {"b": "failed"}, {}, 1),
        (STEADY | {"b": "passed"}, STEADY | {"b": "skipped"}, {}, 1),
        (STEADY | {"b": "passed"}, STEADY, {}, 1),
        (STEADY | {"b": "passed"}, STEADY | {"b": "failed"}, {"b": ("passed", "failed")}, 1),
        (STEADY | {"b": "passed"}, STEADY | {"b": "failed"}, {"b": ("passed", "passed")}, 0),
        (STEADY | {"b": "passed"}, STEADY | {"b": "failed"}, {"b": ("failed", "failed")}, 0),
        ({}, {}, {}, 1),
        ({"b": "failed"}, {"b": "failed"}, {}, 1),
    ],
)
def test_exit_status(before, after, repeated, status, capsys):
    assert report(compare(before, after), repeated, [before, after]) == status
    printed = capsys.readouterr().out
    assert ("  b: " in printed) == (before.get("b") != after.get("b"))


def test_command_without_a_checkout():
    result = subprocess.run(
        [sys.executable, "-m", "fork.upstream_test"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Give a checkout of Kornia, whose releases come without tests: git clone ")
