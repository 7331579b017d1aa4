"""Sphinx configuration of the documentation site: `make docs` builds it.

The source folder is the root of the repository, so that links between the README, guides, notebooks and results are the
same on the site as in the repository.
"""

import os
import sys
import warnings
from pathlib import Path

from sphinx.addnodes import pending_xref

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "docs" / "extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
warnings.filterwarnings("ignore", category=FutureWarning)

project = "llava-mini-probes"
copyright = "the authors of llava-mini-probes"
extensions = [
    "myst_nb",
    "command_help",
    "markdown_docstrings",
    "record_schema",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]

root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/reference/*",
    "notebooks/*.ipynb",
    "results/*/README.md",
    "results/*/report/tables/claims.md",
    "results/tiny/report/tables/table10_compressors.md",
    "results/tiny/report/tables/table10_equal_flops.md",
    "results/tiny/logs/sharing.md",
    "experiments/assets/*/README.md",
]
exclude_patterns = [".*", "node_modules", "docs/_build", "**/.ipynb_checkpoints"]
templates_path = ["_templates"]
nitpicky = False  # types of transformers and torch have no page here
suppress_warnings = ["misc.highlighting_failure"]  # shortened JSON and console output in guides

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
nb_execution_mode = "off"  # notebooks are committed with their outputs; tests/test_notebooks.py executes them

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
maximum_signature_line_length = 80
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "llava-mini-probes"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_additional_pages = {"index": "redirect.html"}
html_copy_source = False
html_show_sphinx = False


def add_title(app, docname, source):
    """Give a table of a report, whose file has no heading, the title that a page needs."""
    if "/report/tables/" in docname:
        study, table = docname.split("/")[1], docname.rpartition("/")[2]
        source[0] = f"# {table.capitalize()} on the records of {study}\n\n{source[0]}"


def unlink_folders(app, doctree):
    """Show links to folders of the repository as text: the site has no page for them."""
    links = [link for link in doctree.findall(pending_xref) if link.get("reftype") == "myst"]
    for link in links:
        # A link in a docstring, which is parsed on its own, names no page.
        if "refdoc" in link and (ROOT / Path(link["refdoc"]).parent / link["reftarget"]).is_dir():
            link.replace_self(link.children)


def setup(app):
    app.connect("source-read", add_title)
    app.connect("doctree-read", unlink_folders)
