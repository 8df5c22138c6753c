"""The blocks of code on the pages run as they stand: those of a page one after the other, as a reader pastes them.

Examples with prompts are doctests: ``make doctest`` runs them.
"""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = sorted(path for path in (DOCS / "source").glob("*.rst"))


def blocks(page: Path) -> list[str]:
    """The blocks of Python of a page that have no prompts."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r"^( *)\.\. code-block:: python\n\n((?:\1 +.*\n|\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


@pytest.mark.parametrize("page", [page for page in (*PAGES, ROOT / "README.md") if blocks(page)], ids=lambda p: p.stem)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    namespace = {"__name__": page.stem}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)  # noqa: S102 - the pages are ours


def test_the_processes_of_the_page_have_one_loss():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # Unbuffered, so that what a process has printed is there even if PyTorch aborts it afterwards.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [*command, str(DOCS / "snippets" / "ddp.py")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    # PyTorch 2.13 now and then aborts a process that has left its group, also without Kornia.
    assert done.returncode == 0 or "terminate called without an active exception" in done.stderr, done.stderr
    losses = re.findall(r"process (\d): loss (\d\.\d{6})", done.stdout)
    assert sorted(process for process, _ in losses) == ["0", "1"], done.stderr
    assert len({loss for _, loss in losses}) == 1
