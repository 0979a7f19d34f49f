"""`make docs` builds build/docs/index.html from this, offline; a warning is an error."""

import importlib.metadata
import re

project = "async_barriers"
release = importlib.metadata.version("async-barriers")
copyright = "the async_barriers authors"
extensions = ["myst_parser", "sphinx.ext.autodoc"]

html_theme = "furo"
html_title = "async_barriers"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
# Docstrings say `commit` where they mean the method.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
autodoc_inherit_docstrings = True
# A longer one has a line for each parameter.
python_maximum_signature_line_length = 120

html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["tables.js"]


def shorten(app, what, name, obj, options, signature, returns):
    """Say what a caller may give, and not what the library has for "nothing was given"."""
    for long, short in [
        (r" \| (~?[\w.]+\.)?Configured\b", ""),
        (r"<anyio\S* object[^>]*>", "..."),
        (r"<function (\w+)[^>]*>", r"\1"),
        (r"<factory>", "{}"),
        (r"\b(StoreBarrier|CommitObserver)T\b", r"\1"),
        (r"~(\w+\.)*", ""),
    ]:
        signature = signature and re.sub(long, short, signature)
        returns = returns and re.sub(long, short, returns)
    return signature, returns


def setup(app):
    app.connect("autodoc-process-signature", shorten)
