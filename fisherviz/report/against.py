"""Two reports side by side: what changed between two networks, epochs, seeds or kinds, method by method.

Sections, layers, methods and metrics are matched by name; what has no partner is named. A change counts as better or
worse by the metric's distance from its best value, and as neither where two standard errors cover it. A cosine of 0.994
is not the same as one of 0.990: it is 40 % nearer to 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherviz.report import charts, tables, templates
from fisherviz.report.page import FACTS
from fisherviz.report.pictures import DRAWN, closest_first
from fisherviz.results import metrics
from fisherviz.results.comparison import FACTS as COMPARISON
from fisherviz.results.comparison import Comparison, load_comparison
from fisherviz.support import files
from fisherviz.support.checksums import opened_json
from fisherviz.support.names import readable

SAME = 0.005
"""Relative change, of a number and of its distance from the best one, that counts as none."""
SPAN = 2.0
"""Change by this factor, up or down, that fills half a bar."""
Source = str | os.PathLike[str] | Comparison | Mapping[str, Comparison]
OCCASION = ("one forward and backward pass", "fits that seconds are taken from", "created")
"""Facts that differ every time, and say nothing about the networks."""
TITLE = "Two reports side by side"


@dataclass(frozen=True)
class Change:
    """A number in both reports.

    Args:
        before: in the first, as people read it.
        after: in the second.
        value: the change, as a share of the first; None where a number is missing or the first is zero.
        verdict: "better", "worse", "same", "changed" (a property, or as far from the best), or "" without a number.
        bar: from -50 (halved or less) to 50 (doubled or more).
        share: the change in words.
    """

    before: str
    after: str
    value: float | None
    verdict: str
    bar: float
    share: str = ""


def compare_reports(
    first: Source,
    second: Source,
    path: str | os.PathLike[str],
    *,
    names: tuple[str, str] = ("before", "after"),
) -> Path:
    """Write one page about what changed between two reports or saved comparisons.

    Args:
        first: a folder that `fisherviz report` or `Comparison.save` wrote, a comparison, or several by their titles.
        second: likewise.
        path: of the page to write.
        names: what the two are called on it.

    Returns:
        The page.

    Raises:
        ValueError: a folder holds no report, nothing can be written there, or the two have nothing in common.
    """
    files.check_place(path, directory=False)
    before, after = comparisons_of(first), comparisons_of(second)
    if len(before) == len(after) == 1:  # titles of single sections may differ
        after = {next(iter(before)): next(iter(after.values()))}
    shared = [title for title in before if title in after]
    if not shared:
        raise ValueError(
            f"the two reports have no section in common: {', '.join(map(repr, before))} and "
            f"{', '.join(map(repr, after))}; compare reports that were made with the same --layers."
        )
    alone = [(names[0], [t for t in before if t not in after]), (names[1], [t for t in after if t not in before])]
    text = templates.page(
        "against.html.j2",
        ("tables.js",),
        title=TITLE,
        names=names,
        sections=[_section(k, title, before[title], after[title], names) for k, title in enumerate(shared)],
        alone=[(name, titles) for name, titles in alone if titles],
    )
    return files.write_whole(path, text)


def comparisons_of(source: Source) -> dict[str, Comparison]:
    """The comparisons of a report by their titles.

    Args:
        source: its folder, a comparison, or what this returns.

    Raises:
        ValueError: there is none.
    """
    if isinstance(source, Comparison):
        return {"": source}
    if isinstance(source, Mapping):
        return dict(source)
    source = Path(source)
    with files.held(source, shared=True):  # one report, whoever is writing another
        whole = load_comparison(source)
        try:
            listed = opened_json(files.resolve(source, FACTS).read_text(encoding="utf-8"))["sections"]
            folders = [(str(section["title"]), str(section["folder"])) for section in listed]
            for _, folder in folders:
                files.check_inside(source, f"{folder}/{COMPARISON}")
        except OSError:
            return {"": whole}  # a saved comparison without a report around it
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{source / FACTS} is damaged ({error}); make the report again.") from error
        return {title: whole if folder == "." else load_comparison(source / folder) for title, folder in folders}


def change(name: str, before: float | None, after: float | None, noise: float = 0.0) -> Change:
    """What became of a number.

    Args:
        name: of the metric.
        before: in the first report; None where it has none.
        after: in the second.
        noise: standard error of the difference.
    """
    first, second = (metrics.MISSING if value is None else metrics.show(name, value) for value in (before, after))
    if before is None or after is None:
        return Change(first, second, None, "", 0.0)
    if before == after:
        return Change(first, second, 0.0, "same", 0.0)
    share = (after - before) / abs(before) if before else math.inf
    entry = metrics.metric(name)
    far = entry.away(after) - entry.away(before)
    level = abs(far) < SAME * abs(entry.away(before))
    same = first == second or (level and abs(share) < SAME) or abs(after - before) <= 2 * noise
    verdict = "same" if same else "changed" if level or entry.best == "none" else "better" if far < 0 else "worse"
    said = share if math.isfinite(share) else None
    return Change(first, second, said, verdict, _bar(before, after), _share(before, after))


def _share(before: float, after: float) -> str:
    """A change in words: a factor where it is large, else a part of the first."""
    factor = after / before if before else math.inf
    if not math.isfinite(before) or not math.isfinite(factor):
        return ""
    if after and (before < 0) != (after < 0):
        return "sign changed"
    return f"× {factor:,.0f}" if factor > 10.995 else f"{100 * (after - before) / abs(before):+.1f} %".replace("-", "−")


def _bar(before: float, after: float) -> float:
    if not before or not after or (before < 0) != (after < 0):
        return math.copysign(50.0, after - before)
    turns = (math.log(abs(after)) - math.log(abs(before))) / math.log(SPAN)  # their quotient may overflow
    turns *= math.copysign(1.0, after)
    return 50.0 * max(-1.0, min(1.0, turns))


def _section(number: int, title: str, before: Comparison, after: Comparison, names: tuple[str, str]) -> dict[str, Any]:
    shared = [name for name in closest_first(after) if name in before.methods]
    used = [name for name in metrics.METRICS if name in before.metrics and name in after.metrics]
    used += [name for name in after.metrics if name in before.metrics and name not in used]
    whole = [name for name in used if before.whole(name) and after.whole(name) and name != "seconds"]
    rows = []
    for method in shared:
        cells = []
        for name in whole:
            errors = [c.whole(name, "stderr").get(method, 0.0) for c in (before, after)]
            values = before.whole(name).get(method), after.whole(name).get(method)
            cells.append(change(name, *values, noise=math.hypot(*errors)))
        rows.append((method, cells))
    facts = [{key: text for key, text in tables.facts(c) if key not in OCCASION} for c in (before, after)]
    differing = [
        (key, facts[0].get(key, metrics.MISSING), facts[1].get(key, metrics.MISSING))
        for key in {**facts[0], **facts[1]}
        if facts[0].get(key) != facts[1].get(key)
    ]
    return {
        "id": f"section-{number + 1}",
        "title": title,
        "columns": [(name, metrics.metric(name).short) for name in whole],
        "rows": rows,
        "summary": _words(rows, whole, names),
        "facts": differing,
        "same_facts": len(facts[0]) - sum(key in facts[0] for key, _, _ in differing),
        "unmatched": _unmatched(before, after, names),
        "panels": [
            (metrics.metric(name).title, found) for name in DRAWN if (found := charts.panels(after, name, before))
        ],
        "definitions": [metrics.metric(name) for name in {*whole, *DRAWN} if name in used],
    }


def _words(rows: Sequence[tuple[str, list[Change]]], whole: Sequence[str], names: tuple[str, str]) -> list[str]:
    """How many methods came closer, metric by metric."""
    said = []
    for name in ("relative_frobenius", "direction_cosine"):
        if name not in whole:
            continue
        found = [cells[whole.index(name)] for _, cells in rows]
        counts = {verdict: sum(c.verdict == verdict for c in found) for verdict in ("better", "worse", "same")}
        label = metrics.metric(name).title
        said.append(
            f"{label}: from {names[0]} to {names[1]} better for {counts['better']} of {len(found)} methods, worse for "
            f"{counts['worse']}, the same for {counts['same']}."
        )
    return said


def _unmatched(before: Comparison, after: Comparison, names: tuple[str, str]) -> list[str]:
    said = []
    for what in ("layers", "methods", "metrics"):
        one, other = getattr(before, what), getattr(after, what)
        for name, mine, theirs in ((names[0], one, other), (names[1], other, one)):
            if alone := [item for item in mine if item not in theirs]:
                said.append(f"{what.capitalize()} in “{name}” alone: {', '.join(map(readable, alone))}.")
    return said
