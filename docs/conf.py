"""How the site is built: `./bash/docs.sh`. Every warning is an error, also a reference to something that has no page."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import sedd

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "sedd"
author = "the authors of sedd"
version = release = sedd.__version__

extensions = [
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_copybutton",
    "sphinx_design",
    "sedd_commands",
    "sedd_links",
]
exclude_patterns = ["_build", "README.md"]
templates_path = ["_templates"]
nitpicky = True
smartquotes = False  # they make one dash of the two of an option
default_role = "literal"  # single backticks in docstrings are code, as in Markdown

# Pages are Markdown, tutorials are notebooks in Markdown, executed anew by every build; an error in one ends the build.
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
suppress_warnings = ["myst-nb.lexer"]  # of tutorials that are not executed, whose language is not known then

# Docstrings say shapes and units where types would say `ndarray`, so types are not repeated in signatures.
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
python_maximum_signature_line_length = 80
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "sedd"
html_static_path = ["_static"]
html_css_files = ["sedd.css"]
html_js_files = ["sedd.js"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "use_issues_button": False,
    "use_repository_button": False,
    "article_header_end": ["toggle-secondary-sidebar"],
}


def _own_signature(_app: Any, what: str, _name: str, obj: Any, _options: Any, signature: str, returns: str) -> tuple[str, str] | None:
    """Show a function that takes all settings as keywords with its own parameters: the settings follow below, with their meaning."""
    if what not in ("function", "method") or not hasattr(obj, "__signature__") or not isinstance(obj, types.FunctionType):
        return None
    bare = types.FunctionType(obj.__code__, obj.__globals__, obj.__name__, obj.__defaults__, obj.__closure__)
    bare.__kwdefaults__ = obj.__kwdefaults__
    own = inspect.signature(bare)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in own.parameters.values()]
    return str(own.replace(parameters=parameters, return_annotation=inspect.Signature.empty)), ""


def setup(app: Any) -> None:
    """Connect it to Sphinx."""
    app.connect("autodoc-process-signature", _own_signature)
