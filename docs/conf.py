"""Sphinx's settings: Markdown pages, and a reference made from the docstrings."""

import os

from sphinx.application import Sphinx

import pgkv

project = "pgkv"
author = "The pgkv authors"
copyright = "2026, The pgkv authors"
release = version = pgkv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "code"  # `get` in a docstring is code, as in Markdown
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"pgkv {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
copybutton_exclude = ".linenos, .gp, .go"  # of a session in a shell, only what one types

# GitHub Actions says where the repository is; a build elsewhere has no links to it.
if "GITHUB_REPOSITORY" in os.environ:
    repository = f"{os.environ['GITHUB_SERVER_URL']}/{os.environ['GITHUB_REPOSITORY']}/"
    html_theme_options = {
        "source_repository": repository,
        "source_branch": "main",
        "source_directory": "docs/",
        "footer_icons": [
            {
                "name": "Repository",
                "url": repository,
                "html": "Repository",
                "class": "",
            }
        ],
    }
html_show_sourcelink = False
html_copy_source = False


def keep_colons(
    _app: object, what: str, _name: str, _obj: object, _options: object, lines: list[str]
) -> None:
    """Napoleon takes "What it is: and more." above an attribute for "type: description", but on the first line only."""
    if what in {"attribute", "data", "property"}:
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # before Napoleon's 500
