"""Sphinx's settings: Markdown pages, and a reference made from the docstrings."""

import pgkv

project = "pgkv"
author = "The pgkv authors"
copyright = "2026, The pgkv authors"
release = version = pgkv.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

default_role = "code"  # `get` in a docstring is code, as in Markdown
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "pgkv"
html_show_sourcelink = False
html_copy_source = False
