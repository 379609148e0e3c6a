"""What the page's template is given of one section."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from fisherviz.report import charts, tables
from fisherviz.report.explorer import explorer
from fisherviz.report.pictures import DRAWN, Picture, closest_first
from fisherviz.report.ranked import csv_link, ranked
from fisherviz.report.section import PAPER_SETTING, Section
from fisherviz.report.templates import breakable
from fisherviz.report.words import Sentence, verdict
from fisherviz.results import metrics
from fisherviz.results.comparison import Comparison
from fisherviz.support.names import short

PAPER_SUMS = {"error": 2894.4, "bound": 4134.6}  # Martens & Grosse 2015, end of section 3.1
_GROUPS = (("front", "Quality against cost", ""), ("spectra", "Spectra", ""))
NAME = Markup("<b><bdi>{}</bdi></b>")
"""Isolated, so that a name written from right to left, or with marks of direction, turns nothing around it."""
_NAMED = 8  # layers up to which the order of the small panels is said by names


def section_context(section: Section, drawn: Sequence[Picture], number: int, room: int) -> dict[str, Any]:
    """What the template shows of a section.

    Args:
        section: the section.
        drawn: its pictures.
        number: of the section, from 0.
        room: characters that its explorer may take.

    Returns:
        Names and values.
    """
    comparison = section.comparison
    groups = []
    for group, heading, intro in _GROUPS:
        members = [picture for picture in drawn if picture.group == group]
        if members:
            groups.append({"name": group, "heading": heading, "intro": intro, "pictures": [_shown(p) for p in members]})
    stills = [_shown(picture) for picture in drawn if picture.group == "matrix"]
    found = explorer(comparison, closest_first(comparison), room)
    summary = tables.summary_table(comparison)
    slug = f"{section.slug}-" if section.slug else ""
    return {
        "id": f"section-{number + 1}",
        "title": section.title,
        "intro": section.intro,
        "verdict": [_emphasised(sentence) for sentence in verdict(comparison)],
        "ranked": summary and ranked(summary, comparison),
        "csv": csv_link(comparison),
        "csv_name": f"fisherviz-{slug}summary.csv",
        "explorer": found,
        "no_explorer": "" if found else _why_no_explorer(comparison),
        "still": stills[0] if stills else None,
        "damping": _damping(comparison),
        "groups": groups,
        "no_spectra": _why_no_spectra(comparison),
        "means": _means(comparison),
        "panels": _panels(comparison),
        "layer_words": _layer_words(comparison.layers),
        "layer_tables": tables.layer_tables(comparison),
        "probed": tables.probed_table(comparison),
        "left_out": tables.left_out_table(comparison),
        "facts": tables.facts(comparison),
        "command": comparison.meta.get("command"),
        "notes": comparison.notes,
        "cumulants": _cumulants(comparison.meta),
    }


def _shown(picture: Picture) -> dict[str, Any]:
    return {"html": Markup(picture.inline()), "caption": picture.caption}


def _why_no_explorer(comparison: Comparison) -> str:
    if not comparison.whole("relative_frobenius"):
        return "The layers were compared one by one; their matrices were not kept, so there is nothing to explore here."
    return "This comparison was saved without its matrices’ blocks, so there is nothing to explore; compare again."


def _why_no_spectra(comparison: Comparison) -> str:
    if not comparison.whole("relative_frobenius") or any(name.startswith("spectrum/") for name in comparison.arrays):
        return ""
    return (
        "Eigenvalues are not here: a matrix of this size is never written out. Fisher.spectrum(k) gives the k largest, "
        "and fisherviz.plot.spectrum draws them."
    )


def _damping(comparison: Comparison) -> str:
    return comparison.damping and f", {comparison.damping}"


def _means(comparison: Comparison) -> list[tuple[str, Markup]]:
    captions = (
        (False, "Mean |entry| of each block of F."),
        (True, f"Mean |entry| of each block of the damped inverse of F{_damping(comparison)}."),
    )
    maps = [(caption, charts.means_map(comparison, inverse)) for inverse, caption in captions]
    return [(caption, found) for caption, found in maps if found is not None]


def _panels(comparison: Comparison) -> list[tuple[str, str, list[Markup]]]:
    found = []
    for name in DRAWN:
        if members := charts.panels(comparison, name):
            damped = metrics.metric(name).needs in ("damping", "direction")
            strength = (_damping(comparison) or ", each layer with its own λ") if damped else ""
            found.append((metrics.metric(name).title + strength, name, members))
    return found


def _layer_words(layers: Sequence[str]) -> str:
    if len(layers) <= _NAMED:
        return ", ".join(short(name, 30) for name in layers)
    first, last = short(layers[0], 40), short(layers[-1], 40)
    return f"{len(layers)} layers from {first} to {last}; point at a dot for its layer"


def _emphasised(sentence: Sentence) -> Markup:
    return Markup(sentence.template).format(*(NAME.format(breakable(name)) for name in sentence.names))


def _cumulants(meta: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    sums = {"measured here": meta["cumulants"]} if meta.get("cumulants") else {}
    if sums and (meta.get("settings") or {}).get("setting") == PAPER_SETTING:
        sums["Martens & Grosse 2015, MNIST"] = PAPER_SUMS
    rows = []
    for where, found in sums.items():
        error, bound = float(found["error"]), float(found["bound"])
        ratio = f"{error / bound:.3f}" if bound else metrics.MISSING
        rows.append((where, f"{error:,.1f}", f"{bound:,.1f}", ratio))
    return rows
