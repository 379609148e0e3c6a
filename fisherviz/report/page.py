"""The page and the folder around it: one HTML file that needs nothing else, and the files it was made from.

`write_page` makes the file alone, `write_report` the folder that `fisherviz report` leaves. Both are drawn
from saved comparisons only; every name in them is escaped by the template engine.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fisherviz._version import __version__
from fisherviz.report import templates
from fisherviz.report.context import section_context
from fisherviz.report.explorer import ROOM, color_maps, has_blocks
from fisherviz.report.pictures import Picture, pictures
from fisherviz.report.section import Section
from fisherviz.report.words import paragraph, verdict
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support import files
from fisherviz.support.checksums import opened_json, sealed_json

FACTS = "report.json"
TITLE = "How good is each approximation of the Fisher information?"


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
    remove: Iterable[str] = (),
) -> Path:
    """Write the page, the data behind it, report.json and the pictures into one folder.

    Args:
        directory: made if needed; an earlier report in it is replaced, other files are left alone.
        source: a comparison, or several; the first lies in the directory itself, for `load_comparison`.
        title: of the page.
        progress: called with a word for each picture drawn.
        remove: names of files in the folder that the report takes the place of.

    Returns:
        The directory. After an interruption all the old files are there, or all the new ones.
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
        "files": sorted([*contents, FACTS]),
        "sha256": {name: _digest(content) for name, content in sorted(contents.items())},
    }
    contents[FACTS] = sealed_json(facts, indent=1) + "\n"
    with files.replacing(directory):
        return files.commit(directory, contents, remove={*_earlier_files(Path(directory)), *remove})


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
    """Files of the report that stood here before, by its own list, as long as they are what it wrote."""
    files.finish(directory)
    try:
        facts = opened_json((directory / FACTS).read_text(encoding="utf-8"))
        listed = dict(facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
    return {str(name) for name, digest in listed.items() if _is_still(directory, str(name), digest)}


def _is_still(directory: Path, name: str, digest: Any) -> bool:
    """Whether a file of this directory, no link's, has a checksum."""
    try:
        path = files.check_inside(directory, name)
        return not path.is_symlink() and _digest(path.read_bytes()) == digest
    except (OSError, ValueError):
        return False


def _digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def _render(
    sections: Sequence[Section], title: str, progress: Callable[[str], None] | None = None, alone: bool = False
) -> tuple[str, list[Picture]]:
    drawn: list[Picture] = []
    context = []
    room = ROOM // max(1, sum(has_blocks(section.comparison) for section in sections))
    for number, section in enumerate(sections):
        mine = []
        prefix = f"{section.slug}-" if section.slug else ""
        for picture in pictures(section.comparison, prefix, alone=alone):
            mine.append(picture)
            if progress:
                progress(picture.name)
        drawn += mine
        context.append(section_context(section, mine, number, room))
    used = {name for section in sections for name in section.comparison.metrics}
    listed = [*metrics.METRICS, *(name for name in sorted(used) if name not in metrics.METRICS)]
    text = templates.page(
        "page.html.j2",
        ("blocks.js", "paint.js", "explorer.js", "hands.js", "tables.js"),
        title=title,
        sections=context,
        definitions=[metrics.metric(name) for name in listed if name in used],
        colors=color_maps() if any(found["explorer"] for found in context) else None,
        alone=alone,
    )
    return text, drawn
