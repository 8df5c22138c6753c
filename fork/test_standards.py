"""The files of the patch series pass the checks of Kornia, with the settings of the release."""

import ast
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fork.patch import apply_step, read_steps, unpack_source

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = [
    name.rpartition(" ")[2]
    for name in PROJECT["classifiers"]
    if name.startswith("Programming Language :: Python :: 3.")
]
STEPS = read_steps(ROOT)
MODULES = sorted({path for step in STEPS for path in step.modules})
FILES = sorted({path for step in STEPS for path in step.texts if path.endswith(".py")})


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """The tree after each step."""
    folders, before = {}, tmp_path_factory.mktemp("standards") / "release"
    unpack_source(ROOT, before)
    # ruff sorts imports by the folders that exist, and the archive of the release has no testing/.
    shutil.copytree(ROOT / "testing", before / "testing", ignore=shutil.ignore_patterns("__pycache__", "lovasz.py"))
    for step in STEPS:
        before = folders[step.name] = shutil.copytree(before, before.with_name(step.name))
        apply_step(step, before)
    return folders


@pytest.fixture(params=[STEPS[0].name, STEPS[-1].name])
def tree(request, trees):
    return trees[request.param]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_each_step(trees, step):
    tree, files = trees[step.name], [path for path in step.texts if path.endswith(".py")]
    assert check(tree, "ruff", "check", "--no-cache", *files) == ""
    assert check(tree, "ruff", "format", "--no-cache", "--check", *files) == ""
    assert type_errors(tree, *step.modules) == []
    for path in step.modules:
        compile((tree / path).read_text(encoding="utf-8"), path, "exec")


@pytest.fixture
def files(tree):
    """The files of the series that exist in the tree."""
    return [path for path in FILES if (tree / path).is_file()]


@pytest.fixture
def modules(tree):
    return [path for path in MODULES if (tree / path).is_file()]


def check(tree, *command):
    """Run a tool in the tree, where it finds the settings of the release, and return its output if it fails."""
    result = subprocess.run([sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else result.stdout + result.stderr


def type_errors(tree, *arguments):
    """Return the errors that ty reports for files. Newer versions of ty also report renamed settings, left out here."""
    lines = check(tree, "ty", "check", "--python", sys.prefix, "--output-format", "concise", *arguments).splitlines()
    return [line for line in lines if not line.startswith("pyproject.toml:") and not line.startswith("Found ")]


@pytest.fixture
def faulty(tree):
    """A file that breaks some rules of Kornia."""
    path = tree / "kornia" / "losses" / "faulty.py"
    path.write_text(
        'import os\n\n\ndef f(x: int = "a"):\n    """Do it\n    badly"""\n    print(x)\n    return  match(x) [0]\n'
    )
    yield "kornia/losses/faulty.py"
    path.unlink()


def test_lint(tree, files):
    inits = [path.relative_to(tree).as_posix() for path in tree.glob("kornia/*/__init__.py")]
    assert check(tree, "ruff", "check", "--no-cache", *files, *inits) == ""


def test_format(tree, files):
    inits = [path.relative_to(tree).as_posix() for path in tree.glob("kornia/*/__init__.py")]
    assert check(tree, "ruff", "format", "--no-cache", "--check", *files, *inits) == ""


def test_types(tree, modules):
    assert type_errors(tree, *modules) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_version_of_python(tree, files, modules, version):
    """The tools check the syntax, and the names of the standard library."""
    target = f"py{version.replace('.', '')}"
    assert check(tree, "ruff", "check", "--no-cache", "--target-version", target, *files) == ""
    assert type_errors(tree, "--python-version", version, *modules) == []
    for path in files:
        ast.parse((tree / path).read_text(encoding="utf-8"), feature_version=tuple(map(int, version.split("."))))


def test_python_versions_equal_those_of_kornia(tree):
    theirs = tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    assert VERSIONS
    assert [name for name in theirs if name.rpartition(" ")[2] in VERSIONS and "Python :: 3" in name] == [
        f"Programming Language :: Python :: {version}" for version in VERSIONS
    ]


def test_tools_use_the_settings_of_kornia(tree, faulty):
    """The tools report errors that only the settings of the release enable."""
    found = check(tree, "ruff", "check", "--no-cache", faulty)
    for rule in ("F401", "D205", "D400", "T201"):
        assert rule in found
    assert "would be reformatted" in check(tree, "ruff", "format", "--no-cache", "--check", faulty)
    lines = type_errors(tree, faulty)
    assert len(lines) == 2
    assert all(line.startswith(f"{faulty}:") for line in lines)


@pytest.mark.parametrize("path", MODULES)
def test_imports_pytorch_triton_and_kornia_only(path):
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    allowed = {"torch", "kornia"} | sys.stdlib_module_names
    if path == "kornia/losses/_lovasz_kernels.py":  # imported only if Triton is installed
        allowed.add("triton")
    assert [name for name in imported if name.partition(".")[0] not in allowed] == []
