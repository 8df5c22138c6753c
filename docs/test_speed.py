"""The speed that the front pages claim is what was measured, worst and best."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import tables  # noqa: E402 - found through the line above


def test_readme_has_the_table():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    heading, *rows = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in tables.front_rows())
    assert "\n".join([heading, "| --- | --- | --- | --- |", *rows]) in text


def test_claim_has_the_ends_and_the_middle(monkeypatch):
    def scene(ours, release):
        return {tables.OURS: [ours, ours], tables.RELEASE: [release, release], tables.BASELINE: [1.0, 1.0]}

    def compiled(ours, release):
        return {f"{name}, compiled": times for name, times in scene(ours, release).items()}

    grid = {"a": scene(2.0, 1.0), "b": scene(4.0, 12.0), "c": scene(3.0, 30.0)}
    busy = {label: scene(1.0, ratio) for label, ratio in zip("abc", (1.5, 4.0, 20.0))}
    results = {"grid": {"idle": grid}, "machine": {"device": "X", "threads": 8}}
    monkeypatch.setattr(tables, "read", lambda _: results)
    assert tables.claim("cuda") == (
        "Over 3 shapes drawn at random, on an X, they are 0.5 to 10 times as fast as Kornia 0.9.0 (median 3.0). "
        "They take 2.0 to 4.0 times the time of cross-entropy (median 3.0)."
    )
    results["grid"]["busy"] = busy
    results["compiled"] = {"a": compiled(1.0, 2.0), "b": compiled(1.0, 6.0)}
    assert tables.claim("cpu") == (
        "Over 3 shapes drawn at random, with 8 threads, they are 0.5 to 10 times as fast as Kornia 0.9.0 (median 3.0), "
        "beside two busy processes 1.5 to 20 times (median 4.0), and compiled 2.0 to 6.0 times as fast as Kornia "
        "compiled (median 4.0). They take 2.0 to 4.0 times the time of cross-entropy (median 3.0)."
    )


def test_a_device_that_was_not_measured_has_no_tables(tmp_path, monkeypatch):
    measured = tables.read("cpu")
    monkeypatch.setattr(tables, "read", lambda device: measured if device == "cpu" else None)
    tables.write_docs(tmp_path)
    assert (tmp_path / "speed_cuda.rst").read_text() == ""
    assert "Kornia 0.9.0" in (tmp_path / "speed_cpu.rst").read_text()
