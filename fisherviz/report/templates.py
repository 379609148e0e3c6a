"""Pages from templates: what is inlined, how names are escaped, and the policy that forbids every request.

The policy names the hashes of the page's own styles and scripts, so that nothing else runs whatever a name contains.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fisherviz._version import __version__
from fisherviz.results import metrics

WHOLE = 20
"""Characters of a name that is never broken."""


def page(template: str, scripts: Sequence[str], **context: Any) -> str:
    """A page's text.

    Args:
        template: name of the template, beside this file.
        scripts: names of the scripts, in order; they become one.
        context: what the template shows.

    Returns:
        HTML that needs no other file.
    """
    environment = Environment(
        loader=PackageLoader("fisherviz.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"subscripts": _subscripts, "breakable": breakable}
    css = _own("page.css")
    script = "\n".join(_own(name).removeprefix('"use strict";\n') for name in scripts)
    script = f'"use strict";\n{script}'
    text = environment.get_template(template).render(
        css=Markup(css), script=Markup(script), policy=_policy(css, script), metric=metrics.metric,
        version=__version__, **context,
    )  # fmt: skip
    return text.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs are no text


def _own(name: str) -> str:
    return (files("fisherviz.report") / name).read_text(encoding="utf-8")


def _policy(css: str, script: str) -> str:
    return (
        f"default-src 'none'; img-src data:; style-src {_hash(css)}; script-src {_hash(script)}; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _subscripts(formula: str) -> Markup:
    return Markup(re.sub(r"_(\w+|\*)", r"<sub>\1</sub>", str(escape(formula))))


def breakable(name: str) -> Markup:
    """A word that stays whole where it is short; text that breaks at spaces, and at the dots of long names."""
    if len(name) <= WHOLE and " " not in name:
        return Markup('<span class="whole">{}</span>').format(name)
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(name))))
