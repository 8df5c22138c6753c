"""Settings of the documentation: ``make docs``."""

import sys
import tomllib
from pathlib import Path

SOURCE = Path(__file__).parent
ROOT = SOURCE.parents[1]
sys.path[:0] = [str(SOURCE), str(ROOT / "benchmarks"), str(ROOT / "examples")]

import evidence_table  # noqa: E402 - found through the line above
import figures  # noqa: E402 - as well
import formulas  # noqa: E402 - as well
import multilabel  # noqa: E402 - as well
import tables  # noqa: E402 - as well
import your_data  # noqa: E402 - as well

figures.draw_all(SOURCE / "_generated")
formulas.write_font(SOURCE / "_generated" / "static" / "stix-two-math.woff")
evidence_table.write_docs(SOURCE / "_generated")
tables.write_docs(SOURCE / "_generated")
for name, table in (("multilabel", multilabel.table()), ("your_data", your_data.table())):
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
html_math_renderer = "mathml"
exclude_patterns = ["_generated", "verdict.rst"]
