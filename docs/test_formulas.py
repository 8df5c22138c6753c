"""The pages need no other host: formulas are MathML, and a page that loads something from elsewhere fails the build."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent / "source"))

import formulas


class TestMathML:
    def test_braces_of_a_set_stay_as_high_as_a_line(self):
        assert formulas.mathml(r"\{i : e_i > t\}", block=False).count('<mo stretchy="false">') == 2

    def test_the_brace_of_a_case_distinction_grows(self):
        cases = formulas.mathml(r"w = \begin{cases} 1 & a \\ 2 & b \end{cases}", block=True)
        assert "{</mo>" in cases
        assert 'stretchy="false">{' not in cases


def test_shapes_are_code_and_other_formulas_are_not():
    lines = ["logits :math:`(B, C, H, W)`, :math:`C > 1`, or :math:`(1,)`, in :math:`[0, C)` or :math:`(x + y)`"]
    formulas.write_shapes_as_code(None, None, None, None, None, lines)
    assert lines == ["logits ``(B, C, H, W)``, :math:`C > 1`, or ``(1,)``, in :math:`[0, C)` or :math:`(x + y)`"]


def test_the_font_has_what_formulas_need(tmp_path):
    from fontTools.ttLib import TTFont

    path = tmp_path / "new" / "font.woff"
    formulas.write_font(path)
    font = TTFont(path)
    assert "MATH" in font  # the table of sizes that browsers lay formulas out by
    # Digits, Delta, sum, integral, union, infinity, at least, a slanted x, brackets.
    assert {0x30, 0x394, 0x2211, 0x222B, 0x222A, 0x221E, 0x2265, 0x1D465, 0x7B, 0x7C} <= set(font.getBestCmap())
    assert path.stat().st_size < 500_000


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://example.org/a.js">',
        '<script defer="defer" src="//example.org/a.js">',
        '<img alt="" src="http://example.org/a.png">',
        '<link rel="stylesheet" type="text/css" href="https://example.org/a.css">',
    ],
)
def test_what_lies_elsewhere_is_refused(tag, tmp_path):
    (tmp_path / "page.html").write_text(f"<html><head>{tag}</head></html>")
    with pytest.raises(RuntimeError, match=r"page\.html needs another host"):
        formulas.refuse_other_hosts(SimpleNamespace(outdir=tmp_path), None)


def test_links_and_own_files_are_not_refused(tmp_path):
    text = '<script src="_static/a.js"></script><img src="a.png"><a href="https://example.org">there</a>'
    (tmp_path / "page.html").write_text(text)
    formulas.refuse_other_hosts(SimpleNamespace(outdir=tmp_path), None)
