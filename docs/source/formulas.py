"""A Sphinx extension that writes formulas as MathML, which browsers draw themselves: no script and no other host.

Browsers need a font with mathematics in it for that. STIX Two Math comes from the package ziamath, under the SIL Open
Font License, and goes with the pages, cut to the characters that formulas use.
"""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from fontTools import subset

# Letters, Greek, punctuation, arrows, operators, and the slanted letters and pieces of brackets that layout asks for.
CHARACTERS = ((0x20, 0x17F), (0x391, 0x3C9), (0x2000, 0x206F), (0x2190, 0x22FF), (0x2308, 0x230B), (0x239B, 0x23B8))
SLANTED = (0x1D400, 0x1D7FF)
# Kornia's docstrings, and so those that go there, have a tensor's shape as a formula. It is better read as code.
SHAPE = re.compile(r":math:`(\((?:[A-Z0-9]+, ?)*[A-Z0-9]*\))`")


def write_font(path: Path) -> None:
    import ziamath

    source = Path(ziamath.__file__).parent / "fonts" / "STIXTwoMath-Regular.ttf"
    options = subset.Options(flavor="woff", layout_features=["*"])
    font = subset.load_font(str(source), options)
    cut = subset.Subsetter(options)
    cut.populate(unicodes=[code for first, last in (*CHARACTERS, SLANTED) for code in range(first, last + 1)])
    cut.subset(font)
    path.parent.mkdir(parents=True, exist_ok=True)
    subset.save_font(font, str(path), options)


def mathml(formula: str, *, block: bool) -> str:
    # Braces around a set are as high as a line, unlike the brace of a case distinction, which has an attribute.
    return re.sub(r"<mo>([{}])</mo>", r'<mo stretchy="false">\1</mo>', tex2mathml(formula, as_block=block))


def visit_math(translator, node):
    translator.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def visit_math_block(translator, node):
    translator.body.append(f'<div class="math">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def write_shapes_as_code(_app, _what, _name, _object, _options, lines):
    lines[:] = [SHAPE.sub(r"``\1``", line) for line in lines]


def refuse_other_hosts(app, error):
    """Fail if a page loads a script, a style or a picture from elsewhere: the pages are to be read offline."""
    loads = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//|<link[^>]* rel="stylesheet"[^>]* href="(?:https?:)?//'
    )
    for page in sorted(Path(app.outdir).rglob("*.html")) if error is None else ():
        if found := loads.search(page.read_text(encoding="utf-8")):
            raise RuntimeError(f"{page} needs another host: {found.group()}")


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    app.setup_extension("sphinx.ext.autodoc")
    # Before napoleon, which moves the lines about.
    app.connect("autodoc-process-docstring", write_shapes_as_code, priority=400)
    app.connect("build-finished", refuse_other_hosts)
    return {"parallel_read_safe": True}
