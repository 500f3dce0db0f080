"""How the pages are built: ``python -m sphinx -W docs docs/_build``."""

import gradbal

project = "gradbal"
release = gradbal.__version__
copyright = "the authors of gradbal"  # the name is Sphinx's
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = f"gradbal {release}"
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_inherit_docstrings = False  # a method that fulfils a contract is described there
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_use_ivar = True  # attributes are described once, by their class
napoleon_custom_sections = ["Source"]
