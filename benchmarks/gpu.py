"""Test and benchmark the fused kernels on a GPU: ``make gpu``. Results go to ``benchmarks/results/cuda.json``.

The script uses the installed PyTorch and needs no internet access and no installation. It needs the files of this
repository, and the wheel of the Kornia release in ``build/`` or at the path in ``KORNIA_RELEASE_WHEEL``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/losses", "--device", "cuda", "-k", "Kernels or fused"]
# The sanitizer checks every memory access, which is slow, so it runs only the tests of the kernels.
SANITIZED = ["tests/losses/test_lovasz_kernels.py", "-k", "memory or weights"]


def missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU, so nothing was tested or measured. Run this on a machine with a GPU.")
    needed = missing("triton", "pytest", "rich", "matplotlib", "packaging")
    if needed:
        sys.exit(f"{sys.executable} lacks {', '.join(needed)}: install them, or set GPU_PYTHON to a Python with them.")
    folder = ROOT / "build" / "gpu"
    compose(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "KORNIA_LOVASZ_KERNELS": "1"}

    def run(*command: str) -> None:
        print("$", *command, flush=True)
        result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if result.returncode:
            sys.exit(f"the command failed with status {result.returncode}")

    pytest = [sys.executable, "-m", "pytest", "-q"]
    run(*pytest, *TESTS)
    if sanitizer := shutil.which("compute-sanitizer"):
        run(sanitizer, "--error-exitcode", "1", *pytest, *SANITIZED)
    else:
        print("compute-sanitizer is not installed, so memory accesses are checked only by the tests")
    run(sys.executable, "benchmarks/run.py", "--device", "cuda", "--draws", "16", "--rounds", "3", *sys.argv[1:])


def compose(folder: Path) -> None:
    """Build the package in a folder as an installation would have it, with a stub for kornia_rs if that is missing."""
    sys.path.insert(0, str(ROOT))
    from fork.compose import compose, fetch_release

    compose(fetch_release(ROOT), ROOT, folder)
    if missing("kornia_rs"):  # kornia imports it to read image files, which the benchmark does not do
        (folder / "kornia_rs.py").write_text("io = None\n", encoding="utf-8")


if __name__ == "__main__":
    main()
