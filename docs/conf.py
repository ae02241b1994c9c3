"""How ``make docs`` builds the pages: prose in Markdown, the API from its docstrings."""

import os
import sys

sys.path.insert(0, os.path.abspath(".."))

project = "ipsec_aio"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]
myst_fence_as_directive = ["mermaid"]
html_theme = "furo"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
