"""The patch series: that it applies to the source of the release, and leaves the overlay and its tests there."""

import inspect
import json
import os
import re
import shutil
import statistics
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest

from fork import patch
from fork.compose import LOCAL_SDIST, SDIST, edit_release, fetch_release, load_release_module, read_settings
from fork.patch import (
    Step,
    check_proof,
    check_series,
    check_tests,
    insert_lines,
    read_series,
    unpack_source,
    write_series,
)
from kornia import losses

ROOT = Path(__file__).resolve().parents[1]
STEPS = read_series(ROOT)
IDENTITY = {f"GIT_{role}_{what}": "someone" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
NO_SETTINGS = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
NAMES = [step.name for step in STEPS]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "kornia"
    unpack_source(ROOT, folder)
    return folder


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist") / "upstream"
    out.mkdir()
    (out / "0009-dropped.patch").touch()
    patches = write_series(ROOT, out)
    texts = [path.with_suffix(".md") for path in patches]
    assert sorted(out.iterdir()) == sorted(patches + texts), "nothing is left of an older series"
    return patches


def git(folder, *arguments):
    environment = {**os.environ, **IDENTITY, **NO_SETTINGS}
    subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True)


def files(tree):
    paths = [path for path in tree.rglob("*") if path.is_file()]
    return {
        name: path.read_bytes()
        for path in paths
        if not (name := path.relative_to(tree).as_posix()).startswith(".git/") and "__pycache__" not in name
    }


def expected(pristine, steps=STEPS):
    """What the overlay, our tests and our fragments add, with the first lines of the release's files before ours."""
    header = (pristine / "kornia" / "losses" / "__init__.py").read_bytes().split(b"\n\n")[0] + b"\n"
    assert header.count(b"\n") == header.count(b"#") > 10
    result = {}
    for folder in ("kornia", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            licence, text = path.read_bytes().split(b"\n", 1)
            assert licence == b"# SPDX-License-Identifier: Apache-2.0"
            result[path.relative_to(ROOT).as_posix()] = header + b"\n" + text.lstrip(b"\n")
    for path in (ROOT / "fork" / "upstream").glob("*.*.md"):
        result[f"changelog.d/+{path.name}"] = path.read_bytes()
    exports = read_settings(ROOT).get("exports", {})
    for name, text in edit_release(fetch_release(ROOT), ROOT, exports).items():
        result[name] = text.encode()
    return result


def apply_all(series, tree, how):
    if how == "am":
        git(tree, "init", "-q")
        git(tree, "add", "-A", "-f")
        git(tree, "commit", "-q", "-m", "release")
    for file in series:
        git(tree, how, "-q" if how == "am" else "--whitespace=error", str(file))


@pytest.mark.parametrize("how", ["apply", "am"])
def test_series_applies_to_the_source_of_the_release(series, pristine, tmp_path, how):
    tree = tmp_path / "kornia"
    shutil.copytree(pristine, tree)
    apply_all(series, tree, how)
    after = files(tree)
    wanted = files(pristine) | expected(pristine)
    assert after.keys() == wanted.keys()
    assert [name for name in wanted if after[name] != wanted[name]] == []
    if how == "am":
        log = subprocess.check_output(["git", "log", "-3", "--format=%s"], cwd=tree, text=True).splitlines()
        assert log == [*reversed([step.title for step in STEPS]), "release"][:3]


def test_series_is_the_same_each_time(series, tmp_path):
    again = write_series(ROOT, tmp_path)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in series]


@pytest.mark.parametrize("index", range(len(STEPS)), ids=NAMES)
def test_step_holds_its_own_files(series, pristine, tmp_path, index):
    """Each patch applies to what the ones before it leave, and touches the files of its step and no other."""
    step = STEPS[index]
    numbers = subprocess.check_output(["git", "apply", "--numstat", str(series[index])], text=True, cwd=tmp_path)
    touched = {line.split("\t")[2] for line in numbers.splitlines()}
    exporting = [path for path in read_settings(ROOT).get("exports", {}) if path in step.sources]
    inits = {str(PurePosixPath(path).with_name("__init__.py")) for path in exporting}
    assert touched == set(step.sources) | inits
    assert step.modules
    assert step.tests
    apply_all(series[: index + 1], shutil.copytree(pristine, tmp_path / "kornia"), "apply")
    compiled = [path for path in touched if path.endswith(".py")]
    for path in compiled:
        compile((tmp_path / "kornia" / path).read_text(encoding="utf-8"), path, "exec")


def test_source_archive_holds_the_package_of_the_wheel(pristine):
    with zipfile.ZipFile(fetch_release(ROOT)) as wheel:
        package = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("kornia/")}
    assert package.items() <= files(pristine).items()


def test_local_source_archive(tmp_path, monkeypatch):
    monkeypatch.setenv(LOCAL_SDIST, str(tmp_path / "no.tar.gz"))
    with pytest.raises(RuntimeError, match=rf"There is no file .*no\.tar\.gz: set {LOCAL_SDIST} to the source archive"):
        fetch_release(ROOT, SDIST)
    (tmp_path / "no.tar.gz").write_bytes(b"other content")
    with pytest.raises(RuntimeError, match=r"is not the pinned source archive of kornia .*, expected sha256"):
        fetch_release(ROOT, SDIST)


def test_tests_that_prove_the_need_fail_without_the_step():
    """They fail by their assertions, not for want of a name to import."""
    said = check_series(ROOT, STEPS, ROOT, proof_only=True)
    assert {step.name for step in STEPS if step.proof} >= {"lovasz-hinge", "lovasz-softmax"}
    for step, sentence in zip(STEPS, said):
        assert ("Without the change" in sentence) == bool(step.proof)


@pytest.fixture
def small(tmp_path):
    """A step with one test and one doctest, and its tree."""
    (tmp_path / "kornia").mkdir()
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--dtype')\n")
    package, test = tmp_path / "kornia" / "__init__.py", tmp_path / "test_value.py"
    package.write_text('"""One.\n\n>>> VALUE\n2\n"""\nVALUE = 2\n')
    test.write_text("import kornia\n\n\ndef test_value():\n    assert kornia.VALUE == 2\n")
    (tmp_path / "tests").mkdir()
    shutil.copy(test, tmp_path / "tests")
    sources = {"kornia/__init__.py": package, "tests/test_value.py": test}
    return Step("value", "two", [], proof=["tests/test_value.py"], sources=sources), tmp_path


def test_tests_of_a_step(small):
    assert check_tests(*small) == (
        "`KORNIA_TEST_OPTIMIZER=inductor pytest tests/test_value.py --dtype all`, and the doctests of the files "
        "changed: 2 passed, 0 skipped, none failed."
    )


def test_tests_of_a_step_that_fail(small):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text("VALUE = 3\n")
    with pytest.raises(RuntimeError, match=r"After the step 'value', 1 tests fail: tests/test_value.py::test_value\."):
        check_tests(step, tree)


def test_proof_of_a_step(small):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text("VALUE = 1\n")
    assert check_proof(step, tree) == "Without the change, `pytest tests/test_value.py` fails: 1 of 1 tests."
    assert not (tree / "tests" / "test_value.py").exists()


@pytest.mark.parametrize("package", ["VALUE = 2\n", "raise ImportError\n"])
def test_proof_that_passes_or_does_not_run(small, package):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text(package)
    with pytest.raises(RuntimeError, match=r"Without the step 'value', .* should run and fail|ended with status 2"):
        check_proof(step, tree)


@pytest.fixture
def copy(tmp_path):
    """What `read_series` reads, to be spoilt."""
    folder = tmp_path / "copy"
    for name in ("kornia", "tests", "fork/upstream"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_file_without_a_step(copy):
    (copy / "kornia" / "color").mkdir()
    (copy / "kornia" / "color" / "new.py").touch()
    with pytest.raises(RuntimeError, match=r"^kornia/color/new.py belongs to no step: add a pattern for it to "):
        read_series(copy)


def test_step_without_a_file(copy):
    with (copy / "fork" / "upstream" / "series.toml").open("a") as file:
        file.write('[[step]]\nname = "empty"\ntitle = "feat: nothing"\nfiles = ["kornia/nothing/*"]\n')
    with pytest.raises(RuntimeError, match=r"^The step 'empty' has no file: "):
        read_series(copy)


@pytest.mark.parametrize("pattern", ["{}.md", "{}.*.md"])
def test_step_without_a_text(copy, pattern):
    for path in (copy / "fork" / "upstream").glob(pattern.format(NAMES[0])):
        path.unlink()
    with pytest.raises(RuntimeError, match=rf"^The step '{NAMES[0]}' needs {NAMES[0]}.md and {NAMES[0]}.<type>.md"):
        read_series(copy)


def test_file_without_the_licence_line(copy, pristine, tmp_path):
    path = copy / STEPS[0].modules[0]
    path.write_text("import torch\n")
    with pytest.raises(RuntimeError, match=r"must begin with the line '# SPDX-License-Identifier: Apache-2.0'"):
        patch.apply_step(copy, read_series(copy), 0, shutil.copytree(pristine, tmp_path / "tree"))


@pytest.mark.parametrize("name", NAMES)
def test_changelog_fragments(pristine, name):
    """Kornia's form: one of its types, no heading, no bullet."""
    kinds = tomllib.loads((pristine / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]["type"]
    for path in (ROOT / "fork" / "upstream").glob(f"{name}.*.md"):
        assert path.suffixes[-2][1:] in [kind["directory"] for kind in kinds]
        text = path.read_text(encoding="utf-8")
        assert text[0] not in "#-*\n "
        assert text.count("\n") == 1
        assert text.endswith(".\n")


@pytest.mark.parametrize("loss", ["hinge", "softmax"])
def test_changelog_names_every_new_option(loss):
    name = f"lovasz_{loss}_loss"
    theirs = load_release_module(fetch_release(ROOT), f"kornia.losses.lovasz_{loss}")
    before, after = (set(inspect.signature(getattr(each, name)).parameters) for each in (theirs, losses))
    text = (ROOT / "fork" / "upstream" / f"lovasz-{loss}.added.md").read_text(encoding="utf-8")
    assert after > before
    assert [option for option in after - before if f"`{option}`" not in text] == []


def test_changelog_names_every_export():
    for path, names in read_settings(ROOT).get("exports", {}).items():
        (step,) = [step for step in STEPS if path in step.sources]
        text = (ROOT / "fork" / "upstream" / f"{step.name}.added.md").read_text(encoding="utf-8")
        assert [name for name in names if f"`{name}`" not in text] == []


@pytest.mark.parametrize("index", range(len(STEPS)), ids=NAMES)
def test_text_of_the_pull_request(series, index):
    step, text = STEPS[index], series[index].with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith(f"# {step.title}\n\n")
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Evidence", "## Tests", "## What to look at", "## Before it is opened"]
    assert "$" not in text
    for path in step.sources:
        assert not path.startswith("changelog.d/") or f"`{path}`" in text
    for entry in step.docs:
        assert f"The patch lacks `{entry['lines'][0]}`" in text
        assert f"`{entry['lines'][-1]}` in `{entry['file']}`: `make patch KORNIA" in text


def test_texts_name_what_is_there():
    """The private names that a reviewer is sent to have not been renamed since."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kornia").rglob("*.py"))
    texts = [(ROOT / "fork" / "upstream" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES]
    named = {name for text in texts for name in re.findall(r"`(_\w+)(?:\.(?!py)\w+)?`", text)}
    assert "_evaluate" in named
    assert [name for name in named if not re.search(rf"(def|class) {name}\b", code)] == []


def test_evidence_is_what_was_measured(series):
    """Of every loss and machine: the median of the ratios of a round, and the measured gradient errors."""
    texts = {step.results: file.with_suffix(".md").read_text(encoding="utf-8") for step, file in zip(STEPS, series)}
    for path in (ROOT / "benchmarks" / "results").glob("c[pu]*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        for label, row in results["times"].items():
            (release,) = [name for name in row if name.startswith("Kornia ")]
            ratios = sorted(old / new for old, new in zip(row[release], row["this fork"]))
            _, _, rest = texts[label.split()[0]].partition(f"Measured on {results['machine']['device']}")
            of_machine, _, _ = rest.partition("Measured on ")
            (line,) = [line for line in of_machine.splitlines() if line.startswith(f"| {label} ") and " ms " in line]
            assert f"| {statistics.median(ratios):.1f} (" in line
        for side, row in results["errors"].items():
            after = row["this fork"]["gradient"]
            assert f"| {side}x{side} | {row[release]['gradient']:.0e} | {after:.0e} |" in texts["hinge"]


def test_results_without_the_step_make_no_table():
    assert patch.result_tables({"times": {}, "memory": {}, "errors": {}}, "hinge") == ""
    assert patch.result_tables({"times": {"hinge": {}}}, "") == ""


@pytest.fixture
def documented(copy, pristine, tmp_path):
    """A series whose first step has a line for a page, a checkout that has the pages, and that page."""
    settings = copy / "fork" / "upstream" / "series.toml"
    docs = 'docs = [{ file = "docs/source/page.rst", after = "first", lines = ["second", "third"] }]'
    text = settings.read_text(encoding="utf-8").replace("[[step]]", f"[[step]]\n{docs}", 1)
    settings.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copytree(ROOT / "benchmarks" / "results", copy / "benchmarks" / "results")
    (copy / "build").symlink_to(ROOT / "build")
    git(copy, "init", "-q")
    git(copy, "commit", "-q", "--allow-empty", "-m", "none")
    checkout = shutil.copytree(pristine, tmp_path / "checkout")
    for step in read_series(copy):
        for entry in step.docs:
            page = checkout / entry["file"]
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(f"{entry['after']}\n\nlast\n")
    return copy, checkout, checkout / "docs" / "source" / "page.rst"


def test_documentation_of_a_checkout(documented):
    copy, checkout, page = documented
    apply_all(write_series(copy, copy / "dist", checkout=checkout), checkout, "apply")
    assert page.read_text() == "first\nsecond\nthird\n\nlast\n"
    text = (copy / "dist" / f"0001-{NAMES[0]}.md").read_text(encoding="utf-8")
    assert "The patch lacks" not in text


def test_checkout_of_another_release(documented):
    copy, checkout, _ = documented
    (checkout / "kornia" / "losses" / "lovasz_hinge.py").write_text("# newer\n")
    with pytest.raises(RuntimeError, match=r"lovasz_hinge.py is not the file of kornia .*: check out its tag v"):
        write_series(copy, copy / "dist", checkout=checkout)


def test_page_without_the_line(documented):
    copy, checkout, page = documented
    page.write_text("first\nfirst\n")
    with pytest.raises(RuntimeError, match=r"^docs/source/page.rst cannot take 'second', it has 2 lines 'first'"):
        write_series(copy, copy / "dist", checkout=checkout)
    page.unlink()
    with pytest.raises(RuntimeError, match=r"^There is no file .*page.rst: give a checkout of Kornia's repository\."):
        write_series(copy, copy / "dist", checkout=checkout)


def test_insert_lines():
    assert insert_lines("a\nb\nc\n", "b", ["new", "newer"]) == "a\nb\nnew\nnewer\nc\n"
    assert insert_lines("a\n  b", "  b", ["new"]) == "a\n  b\nnew\n"
    with pytest.raises(ValueError, match="it has 0 lines 'b', expected one"):
        insert_lines("a\nbb\n", "b", ["new"])


def test_unwrap():
    text = "# Title\n\none\ntwo\n\n| a |\n| --- |\n| b |\n\n- item\n  more\n- next\n\n## Last\n\n- [ ] box\n"
    joined = text.replace("one\ntwo", "one two").replace("item\n  more", "item more")
    assert patch.unwrap(text) == joined


def test_archive_unpacks_to_its_top_folder(pristine):
    with tarfile.open(fetch_release(ROOT, SDIST)) as archive:
        assert {name.split("/")[0] for name in archive.getnames()} == {f"kornia-{read_settings(ROOT)['release']}"}
    assert (pristine / "pyproject.toml").is_file()
