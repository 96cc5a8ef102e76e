"""The documentation's settings. The version is the package's; nothing is fetched while building."""

import sys
from pathlib import Path

import freegrad_fx

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "freegrad_fx"
author = "the freegrad_fx authors"
copyright = f"2026, {author}"
version = release = freegrad_fx.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "package_tables",
    "rule_gallery",
]
exclude_patterns = ["_build", "_ext", "_tables"]

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

# Dashes alone. Quotes stay those that code needs: one in prose can be a part of a name or of a value.
smartquotes_action = "D"

# A name in single backticks is code, whether or not it names an object that has a page here.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "RuleLike": "freegrad_fx.rules.RuleLike",
    "RulesLike": "freegrad_fx.table.RulesLike",
    "Names": "freegrad_fx.table.Names",
    "Types": "freegrad_fx.table.Types",
    "Calls": "freegrad_fx.table.Calls",
}
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

# The build is nitpicky about our own names. Those of torch and Python have no pages here, and the
# inventories of other sites are not fetched: the documentation builds without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|Tensor|Module|GraphModule|nn|fx)(\..*)?"),
    ("py:.*", r"(collections|inspect|typing|types|os|pathlib)\..*"),
    ("py:.*", r"(Any|Axes|Callable|Iterable|Iterator|Mapping|Sequence|Path|PathLike)"),
]

# fg.integrations documents itself without the libraries that it is for
autodoc_mock_imports = ["lightning", "transformers"]

# The button copies the commands of a console, without the prompt and the output.
copybutton_prompt_text = "$ "
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
pygments_dark_style = "one-dark"
html_title = f"freegrad_fx {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
