"""The page and the folder around it: one HTML file that needs nothing else, and the files it was made from.

`write_page` makes the file alone, `write_report` the folder that `fisherviz report` leaves. Both are drawn
from saved comparisons only; every name in them is escaped by the template engine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fisherviz._version import __version__
from fisherviz.report import tables
from fisherviz.report.pictures import Picture, pictures
from fisherviz.report.words import Sentence, paragraph, verdict
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support import files

TITLE = "How good is each approximation of the Fisher information?"
PAPER_SETTING = "kfac-figure-2"  # meta["settings"]["setting"] of the K-FAC paper's example network
PAPER_SUMS = {"error": 2894.4, "bound": 4134.6}  # Martens & Grosse 2015, end of section 3.1
_GROUPS = (
    ("front", "Quality against cost", ""),
    ("matrix", "The matrices",
     "Each row: the exact Fisher, the approximation, |difference|; closest method first. Bright is large, "
     "up to a maximum that is the same in all three; dashes separate layers, inside them the weights of one "
     "output unit stand together."),
    ("inverse", "Their damped inverses",
     "What an optimizer applies to the gradient. The error of the natural gradient is at most the gradient's "
     "length times the spectral norm of the difference."),
    ("means", "Which layers interact",
     "If the inverse is close to block-tridiagonal, a layer matters to its neighbours only."),
    ("spectra", "Spectra", ""),
    ("layers", "Layer by layer", ""),
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One comparison of the page under a heading of its own.

    Args:
        title: the heading.
        comparison: what it shows.
        intro: a sentence below the heading.
        slug: folder of its files inside the report, "" for the report's own.
    """

    title: str
    comparison: Comparison
    intro: str = ""
    slug: str = ""


def write_page(path: str | os.PathLike[str], source: Comparison | Sequence[Section], *, title: str = TITLE) -> Path:
    """Write one self-contained HTML file.

    Args:
        path: the file.
        source: a comparison, or several under headings.
        title: of the page.

    Returns:
        The file.

    Raises:
        ValueError: nothing can be written there; said before anything is drawn.
    """
    files.check_place(path, directory=False)
    text, _ = _render(_sections(source), title, alone=True)
    return files.write_whole(path, text)


def write_report(
    directory: str | os.PathLike[str],
    source: Comparison | Sequence[Section],
    *,
    title: str = TITLE,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the page, the data behind it, report.json and the pictures into one folder.

    Args:
        directory: made if needed; an earlier report in it is replaced, other files are left alone.
        source: a comparison, or several; the first lies in the directory itself, for `load_comparison`.
        title: of the page.
        progress: called with a word for each picture drawn.

    Returns:
        The directory. After an interruption all the old files are there.
    """
    files.check_place(directory, directory=True)
    sections = _sections(source)
    text, drawn = _render(sections, title, progress)
    contents: dict[str, bytes | str] = {"index.html": text}
    for section in sections:
        folder = f"{section.slug}/" if section.slug else ""
        contents.update({folder + name: data for name, data in section.comparison.to_files().items()})
    for picture in drawn:
        contents.update({f"pictures/{name}": data for name, data in picture.files().items()})
    facts = {
        "title": title,
        "fisherviz": __version__,
        "sections": [_facts(section) for section in sections],
        "files": sorted([*contents, "report.json"]),
    }
    contents["report.json"] = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    directory = Path(directory)
    stale = _earlier_files(directory) - set(contents)
    files.write_together(directory, contents)
    for name in sorted(stale):
        (directory / name).unlink(missing_ok=True)
    return directory


def _sections(source: Comparison | Sequence[Section]) -> list[Section]:
    return [Section("", source)] if isinstance(source, Comparison) else list(source)


def _facts(section: Section) -> dict[str, Any]:
    comparison = section.comparison
    summary: dict[str, dict[str, float | str]] = {method: {} for method in comparison.methods}
    for metric in comparison.metrics:
        for method, value in comparison.whole(metric).items():
            if method in summary:  # JSON has no infinity: it becomes a word
                summary[method][metric] = value if np.isfinite(value) else str(value)
        for method, error in comparison.whole(metric, "stderr").items():
            if method in summary and error:
                summary[method][f"{metric}_stderr"] = error
    return {
        "title": section.title,
        "folder": section.slug or ".",
        "verdict": paragraph(verdict(comparison)),
        "summary": summary,
        "meta": comparison.meta,
    }


def _earlier_files(directory: Path) -> set[str]:
    """Files of the report that stood here before, by its own list."""
    try:
        listed = json.loads(files.resolve(directory, "report.json").read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    paths = [Path(str(name)) for name in listed]
    return {str(path) for path in paths if ".." not in path.parts and not path.is_absolute()}


def _render(
    sections: Sequence[Section], title: str, progress: Callable[[str], None] | None = None, alone: bool = False
) -> tuple[str, list[Picture]]:
    drawn: list[Picture] = []
    context = []
    for number, section in enumerate(sections):
        mine = []
        for picture in pictures(section.comparison, f"{section.slug}-" if section.slug else ""):
            mine.append(picture)
            if progress:
                progress(picture.name)
        drawn += mine
        context.append(_section_context(section, mine, number))
    environment = Environment(
        loader=PackageLoader("fisherviz.report", "."), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["subscripts"] = _subscripts
    environment.filters["breakable"] = _breakable
    used = {name for section in sections for name in section.comparison.metrics}
    text = environment.get_template("page.html.j2").render(
        title=title,
        sections=context,
        definitions=[entry for name, entry in metrics.METRICS.items() if name in used],
        version=__version__,
        alone=alone,
    )
    return text, drawn


def _section_context(section: Section, drawn: Sequence[Picture], number: int) -> dict[str, Any]:
    comparison = section.comparison
    groups = []
    for group, heading, intro in _GROUPS:
        members = [picture for picture in drawn if picture.group == group]
        shown = [{"html": Markup(picture.inline()), "caption": picture.caption} for picture in members]
        if shown:
            groups.append({"name": group, "heading": heading, "intro": intro, "pictures": shown})
    return {
        "id": f"section-{number + 1}",
        "title": section.title,
        "intro": section.intro,
        "verdict": [_emphasised(sentence) for sentence in verdict(comparison)],
        "summary": tables.summary_table(comparison),
        "groups": groups,
        "layer_tables": tables.layer_tables(comparison),
        "probed": tables.probed_table(comparison),
        "left_out": tables.left_out_table(comparison),
        "facts": tables.facts(comparison),
        "notes": comparison.notes,
        "cumulants": _cumulants(comparison.meta),
    }


def _emphasised(sentence: Sentence) -> Markup:
    return Markup(sentence.template).format(*(Markup("<b>{}</b>").format(name) for name in sentence.names))


def _subscripts(formula: str) -> Markup:
    return Markup(re.sub(r"_(\w+|\*)", r"<sub>\1</sub>", str(escape(formula))))


def _breakable(name: str) -> Markup:
    return Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", str(escape(name))))


def _cumulants(meta: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    sums = {"measured here": meta["cumulants"]} if meta.get("cumulants") else {}
    if sums and (meta.get("settings") or {}).get("setting") == PAPER_SETTING:
        sums["Martens & Grosse 2015, MNIST"] = PAPER_SUMS
    rows = []
    for where, found in sums.items():
        error, bound = float(found["error"]), float(found["bound"])
        ratio = f"{error / bound:.3f}" if bound else tables.MISSING
        rows.append((where, f"{error:,.1f}", f"{bound:,.1f}", ratio))
    return rows
