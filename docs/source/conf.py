"""Settings of the documentation: ``make docs``."""

import json
import re
import sys
import tomllib
from pathlib import Path

from docutils import nodes

SOURCE = Path(__file__).parent
ROOT = SOURCE.parents[1]
sys.path[:0] = [str(SOURCE), str(ROOT / "benchmarks"), str(ROOT / "examples"), str(ROOT)]

import evidence_table  # noqa: E402 - found through the line above
import figures  # noqa: E402 - as well
import formulas  # noqa: E402 - as well
import multilabel  # noqa: E402 - as well
import tables  # noqa: E402 - as well
import your_data  # noqa: E402 - as well

from fork import patch, step_sizes, step_times  # noqa: E402 - as well

figures.draw_all(SOURCE / "_generated")
formulas.write_font(SOURCE / "_generated" / "static" / "stix-two-math.woff")
evidence_table.write_docs(SOURCE / "_generated")
tables.write_docs(SOURCE / "_generated")
seconds = json.loads(step_times.FILE.read_text(encoding="utf-8"))["seconds"]
series = step_sizes.table(patch.read_steps(ROOT), seconds)
for name, table in (("multilabel", multilabel.table()), ("your_data", your_data.table()), ("series", series)):
    (SOURCE / "_generated" / f"{name}.rst").write_text(table, encoding="utf-8")

pyproject = tomllib.loads((SOURCE / "../../pyproject.toml").read_text(encoding="utf-8"))
project = "Kornia with exact Lovász losses"
author = "the maintainers of this fork"
copyright = author
release = pyproject["project"]["version"]

extensions = [
    "formulas",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
sphinx_gallery_conf = {
    "examples_dirs": "../gallery",
    "gallery_dirs": "recipe",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}
intersphinx_mapping = {}
autosummary_generate = False
nitpicky = True
# Names of the release, documented in its own documentation.
nitpick_ignore_regex = [(r"py:.*", r"torch\..*|ProcessGroup|ShapeError|BaseError|TypeCheckError")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"Kornia with exact Lovász losses {release}"
html_static_path = ["_static", "_generated/static"]
html_css_files = ["style.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
exclude_patterns = ["_generated", "verdict.rst"]


def break_cells_well(_app, doctree):
    """In tables, keep "(1.2 ± 0.3)", "(1 to 2)" and "0.1: 2" on one line, and let the names of tests break at "::"."""
    for entry in doctree.findall(nodes.entry):
        for text in list(entry.findall(nodes.Text)):
            if not isinstance(text.parent, nodes.literal):
                joined = re.sub(r" (?=[±/])|(?<=[±:]) (?=\d)|(?<=\d) (?=to \d)|(?<=\d to) (?=\d)", "\u00a0", text)
                text.parent.replace(text, nodes.Text(joined))
            elif "::" in text:
                first, *rest = text.split("::")
                pieces = [nodes.Text(first)]
                for piece in rest:
                    pieces += [nodes.raw("", "<wbr>", format="html"), nodes.Text(f"::{piece}")]
                text.parent.replace(text, pieces)


def setup(app):
    app.connect("doctree-read", break_cells_well)
