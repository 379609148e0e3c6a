"""How the manual is built: `make docs`, offline, with every warning an error.

Code cells run in a kernel of their own for each page, in a temporary directory, and their output is what the page
shows. The reference is generated from docstrings; a public name that it misses is a warning, and so an error.
"""

import importlib
import json
import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

from fisherviz._version import __version__

HERE = Path(__file__).parent

project = "fisherviz"
author = "The fisherviz developers"
copyright = "the fisherviz developers, MIT licence"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "substitution"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]  # widgets of progress bars; the text beside them is shown

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "show"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # pages ask nothing of the network
os.environ["MATPLOTLIBRC"] = str(HERE / "_static" / "matplotlibrc")  # for the kernels
os.environ["TQDM_DISABLE"] = "1"  # progress bars are no output
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two pages are read at a time

default_role = "py:obj"
add_module_names = False
toc_object_entries_show_parents = "hide"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False

html_theme = "furo"
html_title = "fisherviz"
html_static_path = ["_static"]
html_css_files = ["manual.css"]
html_show_sphinx = False
pygments_dark_style = "github-dark"
html_copy_source = False
copybutton_exclude = ".linenos, .gp"

PUBLIC = (
    "fisherviz",
    "fisherviz.plotting",
    "fisherviz.optim",
    "fisherviz.operators",
    "fisherviz.statistics",
    "fisherviz.datasets",
    "fisherviz.models",
    "fisherviz.training",
)


def missing_names(app: Sphinx, env) -> None:
    """Warn of every public name that the reference lacks."""
    known = set(env.get_domain("py").objects)
    for module in PUBLIC:
        found = importlib.import_module(module)
        for name in found.__all__:
            described = name.startswith("_") or is_module(getattr(found, name))
            if f"{module}.{name}" not in known and not described:
                logging.getLogger(__name__).warning("the reference lacks %s.%s", module, name)


def outside_requests(app: Sphinx, error: Exception | None) -> None:
    """Warn of every page that loads something from elsewhere: the manual is read offline too."""
    for page in Path(app.outdir).rglob("*.html") if error is None else ():
        if found := re.search(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^>]*>", page.read_text()):
            logging.getLogger(__name__).warning("%s loads %s", page.relative_to(app.outdir), found[0])


def is_module(thing: object) -> bool:
    """Whether a public name is a module, which has a page of its own."""
    return type(thing).__name__ == "module"


def whole_sentence(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from reading an attribute's sentence up to its colon as a type."""
    if what in ("attribute", "data", "property"):
        lines.insert(0, "")


def plain_markup(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings say |x|, fv.Probe, .grad and plurals of `names` plainly; reStructuredText wants more of each."""

    def marked(found: re.Match[str]) -> str:
        name, after = found.groups()
        if name.startswith("."):
            return f"``{name}``{after}"
        name = re.sub(r"^fv\.(plot\.)?", lambda m: "fisherviz." + ("plotting." if m[1] else ""), name)
        return f"`{name}`" + (f"\\ {after}" if after else "")

    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(\w?)", marked, "\n".join(lines))
    lines[:] = re.sub(r"\|(?=\S)", r"\\|", text).split("\n")


def notebooks() -> str:
    """The notebooks with their titles and first paragraphs, as a table."""
    rows = ["| notebook | |", "|---|---|"]
    for path in sorted((HERE.parent / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "".join(next(cell["source"] for cell in cells if cell["cell_type"] == "markdown"))
        title, _, rest = text.strip().partition("\n")
        first = " ".join(rest.strip().split("\n\n")[0].split())
        rows.append(f"| `{path.name}` | **{title.lstrip('# ')}** {first} |")
    return "\n".join(rows)


myst_substitutions = {"notebooks": notebooks()}


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the checks."""
    app.connect("env-check-consistency", missing_names)
    app.connect("build-finished", outside_requests)
    app.connect("autodoc-process-docstring", whole_sentence, priority=400)  # before napoleon, which has 500
    app.connect("autodoc-process-docstring", plain_markup, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
