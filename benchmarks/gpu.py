"""Test and time the fused kernels on a GPU, with the PyTorch that is there and without a network: ``make gpu``.

Writes ``benchmarks/results/cuda.json``. Of this repository it needs the files alone, and of the release its wheel, in
``build/`` or where ``KORNIA_RELEASE_WHEEL`` says.
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
# The sanitizer watches each access to memory, which takes long: the kernels' own tests alone.
SANITIZED = ["tests/losses/test_lovasz_kernels.py", "-k", "memory or weights"]


def missing(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name) is None]


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU: nothing was tested or measured. Run this on a machine with one.")
    needed = missing("triton", "pytest", "rich", "matplotlib", "packaging")
    if needed:
        sys.exit(f"{sys.executable} has no {', '.join(needed)}: install it, or set GPU_PYTHON to a Python that does.")
    folder = ROOT / "build" / "gpu"
    compose(folder)
    environment = {**os.environ, "PYTHONPATH": str(folder), "KORNIA_LOVASZ_KERNELS": "1"}

    def run(*command: str) -> None:
        print("$", *command, flush=True)
        result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
        if result.returncode:
            sys.exit(f"failed with status {result.returncode}")

    pytest = [sys.executable, "-m", "pytest", "-q"]
    run(*pytest, *TESTS)
    if sanitizer := shutil.which("compute-sanitizer"):
        run(sanitizer, "--error-exitcode", "1", *pytest, *SANITIZED)
    else:
        print("compute-sanitizer is not there: accesses to memory are checked by the tests alone")
    run(sys.executable, "benchmarks/run.py", "--device", "cuda", "--draws", "16", "--rounds", "3", *sys.argv[1:])


def compose(folder: Path) -> None:
    """The package as an installation has it, but for what is not there and not needed."""
    sys.path.insert(0, str(ROOT))
    from fork.compose import compose, fetch_release

    compose(fetch_release(ROOT), ROOT, folder)
    if missing("kornia_rs"):  # it reads image files
        (folder / "kornia_rs.py").write_text("io = None\n", encoding="utf-8")


if __name__ == "__main__":
    main()
