"""The patch series applies to the source of the release, and the result contains the overlay and its tests."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import tables
from fork import step_times
from fork.compose import compose, fetch_release, load_release_module, read_series
from fork.patch import (
    Step,
    apply_step,
    check_proof,
    check_series,
    check_tests,
    read_steps,
    read_text,
    unpack_source,
    write_series,
)
from kornia import losses

ROOT = Path(__file__).resolve().parents[1]
STEPS = read_steps(ROOT)
NAMES = [step.name for step in STEPS]
IDENTITY = {f"GIT_{role}_{what}": "someone" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
HELPERS = ROOT / "testing" / "lovasz.py"
NO_SETTINGS = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


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
    assert sorted(out.iterdir()) == sorted(patches + texts), "files of an older series are left"
    return patches


def git(folder, *arguments):
    environment = {**os.environ, **IDENTITY, **NO_SETTINGS}
    subprocess.run(["git", *arguments], cwd=folder, env=environment, check=True, capture_output=True)


def files(tree):
    paths = [path for path in tree.rglob("*") if path.is_file()]
    names = {path.relative_to(tree).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not re.search(r"^\.git/|__pycache__", name)}


def apply_all(series, tree, how):
    if how == "am":
        git(tree, "init", "-q")
        git(tree, "add", "-A", "-f")
        git(tree, "commit", "-q", "-m", "release")
    for file in series:
        git(tree, how, "-q" if how == "am" else "--whitespace=error", str(file))


@pytest.fixture(scope="module")
def expected(pristine, tmp_path_factory):
    """The files after the last step: the release, the composed package, the tests and the changelog fragments."""
    composed = tmp_path_factory.mktemp("composed") / "fork"
    compose(fetch_release(ROOT), ROOT, composed)
    header = (pristine / "kornia" / "losses" / "__init__.py").read_bytes().split(b"\n\n")[0] + b"\n"
    assert header.count(b"\n") == header.count(b"#") > 10
    result = files(pristine) | {f"kornia/{name}": text for name, text in files(composed / "kornia").items()}
    sources = [path for folder in ("kornia", "tests") for path in (ROOT / folder).rglob("*.py")]
    left_out = [ROOT / path for path in read_series(ROOT)["left_out"]]
    for path in [*(path for path in sources if path not in left_out), HELPERS]:
        licence, text = path.read_bytes().split(b"\n", 1)
        assert licence == b"# SPDX-License-Identifier: Apache-2.0"
        result[path.relative_to(ROOT).as_posix()] = header + b"\n" + text.lstrip(b"\n")
    for path in (ROOT / "fork" / "upstream").glob("*.*.md"):
        result[f"changelog.d/+{path.name}"] = path.read_bytes()
    return result


@pytest.mark.parametrize("how", ["apply", "am"])
def test_series_applies_to_the_source_of_the_release(series, pristine, expected, tmp_path, how):
    tree = shutil.copytree(pristine, tmp_path / "kornia")
    apply_all(series, tree, how)
    after = files(tree)
    assert after.keys() == expected.keys()
    assert [name for name in expected if after[name] != expected[name]] == []
    if how == "am":
        log = subprocess.check_output(["git", "log", "--format=%s"], cwd=tree, text=True).splitlines()
        assert log == [*reversed([step.title for step in STEPS]), "release"]


def test_series_is_reproducible(series, tmp_path):
    again = write_series(ROOT, tmp_path)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in series]


@pytest.mark.parametrize("index", range(len(STEPS)), ids=NAMES)
def test_step_changes_its_own_files(series, pristine, tmp_path, index):
    """Each patch applies after the earlier ones, and changes only the files of its step."""
    step = STEPS[index]
    numbers = subprocess.check_output(["git", "apply", "--numstat", str(series[index])], text=True, cwd=tmp_path)
    touched = {line.split("\t")[2] for line in numbers.splitlines()}
    assert touched == set(step.texts) | {edit["file"] for edit in step.edits if edit["file"].startswith("kornia/")}
    assert step.modules or step.edits
    assert step.tests
    tree = shutil.copytree(pristine, tmp_path / "kornia")
    apply_all(series[: index + 1], tree, "apply")
    for path in [path for path in touched if path.endswith(".py")]:
        compile((tree / path).read_text(encoding="utf-8"), path, "exec")


def test_first_step_is_small(series, tmp_path):
    """It adds the closed form, and changes a few lines in the files of the two losses."""
    numbers = subprocess.check_output(["git", "apply", "--numstat", str(series[0])], text=True, cwd=tmp_path)
    rows = [line.split("\t") for line in numbers.splitlines()]
    changed = {path: int(added) + int(removed) for added, removed, path in rows if path.startswith("kornia/")}
    assert all(changed[f"kornia/losses/lovasz_{kind}.py"] <= 20 for kind in ("hinge", "softmax"))
    assert sum(changed.values()) <= 100


def test_source_archive_holds_the_package_of_the_wheel(pristine):
    with zipfile.ZipFile(fetch_release(ROOT)) as wheel:
        package = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("kornia/")}
    assert package.items() <= files(pristine).items()


def test_proof_of_first_step(pristine, tmp_path):
    """The tests of the first step fail without it, by their assertions and not by an import, and pass with it."""
    said = check_series(ROOT, STEPS[:1], ROOT)
    assert re.search(r"changed: \d+ passed", said[0])
    assert re.search(r"Without the change, `pytest .*` fails: \d+ failed", said[0])


def test_first_step_changes_no_value(pristine, tmp_path):
    """On small images, where the release is exact, the first step keeps values, gradients and dtypes."""
    tree = shutil.copytree(pristine, tmp_path / "kornia")
    apply_step(STEPS[0], tree)
    code = """
import sys, torch
from kornia.losses import lovasz_hinge_loss, lovasz_softmax_loss
torch.manual_seed(0)
results = []
for size in (1, 2, 7):
    for dtype in (torch.float16, torch.float32, torch.float64):
        for labels in (0, 1, torch.randint(2, (3, size, size)), torch.randint(4, (3, size, size))):
            target = labels if isinstance(labels, torch.Tensor) else torch.full((3, size, size), labels)
            for loss, channels in ((lovasz_hinge_loss, 1), (lovasz_softmax_loss, 4)):
                if channels == 1 and target.max() > 1:
                    continue
                pred = torch.randn(3, channels, size, size, dtype=dtype, requires_grad=True)
                value = loss(pred, target)
                value.backward()
                results += [value.detach(), pred.grad]
torch.save(results, sys.argv[1])
"""
    for name, folder in (("before", pristine), ("after", tree)):
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], env=environment, cwd=tmp_path, check=True)
    before, after = (torch.load(tmp_path / name) for name in ("before", "after"))
    assert len(before) > 100
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new, old, equal_nan=True)


@pytest.fixture
def small(tmp_path):
    """A step with one test and one doctest, and a tree that has it."""
    (tmp_path / "kornia").mkdir()
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--dtype')\n")
    package, test = tmp_path / "kornia" / "__init__.py", tmp_path / "test_value.py"
    package.write_text('"""One.\n\n>>> VALUE\n2\n"""\nVALUE = 2\n')
    test.write_text("import kornia\n\n\ndef test_value():\n    assert kornia.VALUE == 2\n")
    (tmp_path / "tests").mkdir()
    shutil.copy(test, tmp_path / "tests")
    texts = {"kornia/__init__.py": package.read_text(), "tests/test_value.py": test.read_text()}
    return Step("value", "two", "nothing", [], proof=["tests/test_value.py"], texts=texts), tmp_path


def test_tests_of_a_step(small):
    assert check_tests(*small) == (
        "`KORNIA_TEST_OPTIMIZER=inductor pytest tests/test_value.py --dtype all`, and the doctests of the files "
        "changed: 2 passed."
    )


def test_failing_tests_of_a_step(small):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text("VALUE = 3\n")
    with pytest.raises(RuntimeError, match=r"After the step 'value', its tests do not pass: 1 failed\."):
        check_tests(step, tree)


def test_proof_of_a_step(small):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text("VALUE = 1\n")
    assert check_proof(step, tree) == "Without the change, `pytest tests/test_value.py` fails: 1 failed."
    assert not (tree / "tests" / "test_value.py").exists()


@pytest.mark.parametrize(("package", "said"), [("VALUE = 2\n", "1 passed"), ("raise ImportError\n", "1 error")])
def test_exception_proof(small, package, said):
    step, tree = small
    (tree / "kornia" / "__init__.py").write_text(package)
    with pytest.raises(RuntimeError, match=rf"Without the step 'value', .* should run and fail: {said}"):
        check_proof(step, tree)


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that a series is made from, which tests may change."""
    folder = tmp_path / "copy"
    for name in ("kornia", "tests", "testing", "fork/upstream"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "build").symlink_to(ROOT / "build")
    git(folder, "init", "-q")
    git(folder, "commit", "-q", "--allow-empty", "-m", "none")
    return folder


def test_exception_file_without_a_step(copy):
    (copy / "kornia" / "color").mkdir()
    (copy / "kornia" / "color" / "new.py").touch()
    with pytest.raises(RuntimeError, match=r"^kornia/color/new.py belongs to no step: add a pattern for it to "):
        read_steps(copy)


def test_exception_step_without_a_file(copy):
    with (copy / "fork" / "upstream" / "series.toml").open("a") as file:
        file.write(
            '[[step]]\nname = "empty"\ntitle = "feat: nothing"\ncallers = "nothing"\nfiles = ["kornia/nothing/*"]\n'
        )
    with pytest.raises(RuntimeError, match=r"^The step 'empty' has no file: "):
        read_steps(copy)


def test_exception_file_without_the_licence_line(copy, pristine, tmp_path):
    path = copy / "kornia" / "losses" / "_lovasz.py"
    path.write_text(path.read_text(encoding="utf-8").partition("\n")[2], encoding="utf-8")
    step = next(step for step in read_steps(copy) if "kornia/losses/_lovasz.py" in step.texts)
    with pytest.raises(RuntimeError, match=r"must begin with the line '# SPDX-License-Identifier: Apache-2.0'"):
        apply_step(step, shutil.copytree(pristine, tmp_path / "tree"))


@pytest.fixture
def checkout(pristine, tmp_path):
    """A checkout of Kornia with two pages of its documentation, and the path of the page on metrics."""
    checkout = shutil.copytree(pristine, tmp_path / "checkout")
    page = checkout / "docs" / "source" / "metrics.rst"
    page.parent.mkdir(parents=True)
    page.write_text(".. autofunction:: confusion_matrix\nlast\n")
    losses = ".. autofunction:: lovasz_hinge_loss\n.. autoclass:: LovaszHingeLoss\n"
    page.with_name("losses.rst").write_text(losses)
    return checkout, page


def test_documentation_of_a_checkout(copy, checkout):
    checkout, page = checkout
    patches = write_series(copy, copy / "dist", checkout=checkout)
    apply_all(patches, checkout, "apply")
    lines = page.read_text().splitlines()
    assert lines[0] == ".. autofunction:: confusion_matrix"
    added = ["autofunction:: iou_at_thresholds", "autofunction:: best_iou_threshold", "autoclass:: IoUThresholdSearch"]
    assert lines[1:-1] == [f".. {each}" for each in added]
    assert lines[-1] == "last"
    assert "The patch lacks" not in "".join(path.with_suffix(".md").read_text(encoding="utf-8") for path in patches)


def test_exception_checkout_without_the_page(copy, checkout):
    checkout, page = checkout
    page.unlink()
    with pytest.raises(RuntimeError, match=r"^There is no file .*metrics.rst: give a checkout of Kornia's repo"):
        write_series(copy, copy / "dist", checkout=checkout)


def test_exception_checkout_of_another_release(copy, checkout):
    checkout, _ = checkout
    (checkout / "kornia" / "losses" / "lovasz_hinge.py").write_text("# newer\n")
    with pytest.raises(RuntimeError, match=r"lovasz_hinge.py is not the file of the release.*: check out its tag\."):
        write_series(copy, copy / "dist", checkout=checkout)


@pytest.mark.parametrize("name", NAMES)
def test_changelog_fragments(pristine, name):
    """Each fragment has the form that Kornia asks for: a known type, no heading and no bullet."""
    kinds = tomllib.loads((pristine / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["towncrier"]["type"]
    fragments = list((ROOT / "fork" / "upstream").glob(f"{name}.*.md"))
    assert fragments
    for path in fragments:
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
    texts = (ROOT / "fork" / "upstream" / f"lovasz-{step}.added.md" for step in (loss, "bins", "processes"))
    text = "".join(path.read_text(encoding="utf-8") for path in texts)
    assert after > before
    assert [option for option in after - before if f"`{option}`" not in text] == []


@pytest.mark.parametrize(
    "step", [step for step in STEPS if step.edits and step.name != "lovasz-gradients"], ids=lambda step: step.name
)
def test_changelog_names_every_export(step):
    text = (ROOT / "fork" / "upstream" / f"{step.name}.added.md").read_text(encoding="utf-8")
    exported = re.findall(r'"(\w+)",', "".join(line for edit in step.edits for line in edit["lines"]))
    assert exported
    assert [name for name in exported if f"`{name}`" not in text] == []


def test_steps_are_small(series, tmp_path):
    """No step adds more than 800 lines to the package, docstrings and comments included."""
    for path in series:
        numbers = subprocess.check_output(["git", "apply", "--numstat", str(path)], text=True, cwd=tmp_path)
        rows = [line.split("\t") for line in numbers.splitlines()]
        assert sum(int(added) for added, _, name in rows if name.startswith("kornia/")) <= 800, path


def test_exception_unused_pattern(copy):
    with (copy / "fork" / "upstream" / "series.toml").open("a") as file:
        file.write('[[step.absent]]\nfiles = ["kornia/*"]\npatterns = ["nowhere"]\n')
    with pytest.raises(RuntimeError, match=r"^'nowhere' of the step 'iou-threshold-search' matches nothing: correct "):
        read_steps(copy)


@pytest.mark.parametrize("index", range(len(STEPS)), ids=NAMES)
def test_text_of_the_pull_request(series, index):
    step, text = STEPS[index], series[index].with_suffix(".md").read_text(encoding="utf-8")
    assert text.startswith(f"# {step.title}\n\n")
    headings = [line for line in text.splitlines() if line.startswith("## ") and line != "## Evidence"]
    assert headings == ["## What changes for callers", "## Tests", "## What to look at", "## Before you open it"]
    assert "$" not in text
    assert [path for path in step.texts if path.startswith("changelog.d/") and f"`{path}`" not in text] == []
    assert ("The patch lacks" in text) == any(edit["file"].startswith("docs/") for edit in step.edits)
    paragraphs = text.split("## ")[1:-1]
    assert not [line for part in paragraphs for line in part.splitlines() if re.match(r"  \S", line)], "lines joined"


def test_texts_contain_the_measurements(series):
    texts = [path.with_suffix(".md").read_text(encoding="utf-8") for path in series]
    results = json.loads(step_times.FILE.read_text(encoding="utf-8"))
    assert step_times.table_of_errors(results) in texts[0]
    for step, text in zip(STEPS, texts):
        assert ("| release | before | after |" in text) == ("$times" in read_text(ROOT, step))
        assert step_times.table_of_times(results, step.name) in text or "$times" not in read_text(ROOT, step)
    for device in ("cpu", "cuda"):
        assert [step.name for step, text in zip(STEPS, texts) if tables.claim(device) in text] == ["lovasz-cpu-softmax"]


def test_texts_name_existing_functions():
    """The private functions and classes that the texts mention exist."""
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kornia").rglob("*.py"))
    texts = [(ROOT / "fork" / "upstream" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES]
    named = {name for text in texts for name in re.findall(r"`(_\w+)(?:\.(?!py)\w+)?`", text)}
    assert "_single_class" in named
    assert [name for name in named if not re.search(rf"(def|class) {name}\b", code)] == []
