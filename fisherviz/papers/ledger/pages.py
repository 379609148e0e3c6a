"""The recorded exhibits as pages: the summary, one page for each paper, and the gallery of pictures."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fisherviz.papers.ledger.claims import DIFFERENT, NOT_REPRODUCED, REPRODUCED

SUMMARY, GALLERY = "claims.md", "README.md"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, DIFFERENT)
PAGES = "<!-- pages -->"
"""What follows in the summary are links to the pages of the papers."""
_HEAD = """# What the papers claim, and what was measured

Written by `fisherviz papers`; every number comes from a run, every verdict from the rule beside it:

* **different setting**: the setting departs from the paper's in something that this claim depends on (named
  in its row), so that the paper is neither confirmed nor refuted; whether the rule holds is said too;
* **reproduced** or **not reproduced**: otherwise, whether the measurement keeps the rule.

Rules put the papers' words ("very well", "similar") into numbers; the thresholds are ours. A row that gives another
reading of a claim is not counted again. Every number traces to the lines of `EXHIBIT.runs.jsonl` beside these pages:
the configuration, the seed and the commit of each measurement.
"""
_GALLERY = """# The papers' figures and tables, measured again

Written by `fisherviz papers`. Each picture leads to its claims; the command below it makes it again, at the scale that
it was made at (`--scale desk`: a desktop's minutes to an hour; `--scale paper`: the paper's own setting).
"""
Known = Mapping[str, Mapping[str, Any]]


def pages(known: Known) -> dict[str, str]:
    """All pages by file name.

    Args:
        known: the recorded exhibits by name.
    """
    found = {SUMMARY: summary(known), GALLERY: gallery(known)}
    for paper, group in _by_paper(known).items():
        found[f"{paper}.md"] = page(dict(group))
    return found


def summary(known: Known) -> str:
    """How many claims of each paper came out how, and where the rows are."""
    counts = {_paper(group): list(_counted(group.values())) for group in _by_paper(known).values()}
    counts["all"] = list(itertools.chain(*counts.values()))
    lines = [_HEAD, f"| paper | claims | {' | '.join(VERDICTS)} |", "|---|---|---|---|---|"]
    for paper, verdicts in counts.items():
        lines.append(f"| {paper} | {len(verdicts)} | {' | '.join(str(verdicts.count(kind)) for kind in VERDICTS)} |")
    lines += ["", PAGES, ""]
    lines += [f"* [{_paper(group)}]({paper}.md)" for paper, group in _by_paper(known).items()]
    return "\n".join(lines) + "\n"


def page(known: Known) -> str:
    """The exhibits of one paper with their claims."""
    parts = [f"# {_paper(known)}: claims and measurements\n"]
    for name, exhibit in known.items():
        parts.append(f"## {_title(exhibit)} (`{name}`)\n")
        if exhibit["picture"]:
            parts.append(f"![{_title(exhibit)}]({exhibit['picture']})\n")
        parts.append(f"{exhibit['caption']}\n\nSetting: {exhibit['details']}.\n\n{_made(name, exhibit['run'])}\n")
        rows = [_row(claim, exhibit["setting"]) for claim in exhibit["claims"]]
        parts.append(_table(("claim", "paper's figure", "measured", "rule", "setting", "verdict"), rows))
        if exhibit["protocol"]:
            heads = tuple(head for head, _ in exhibit["protocol"][0])
            rows = [tuple(cell for _, cell in row) for row in exhibit["protocol"]]
            parts.append(f"Protocol:\n\n{_table(heads, rows)}")
    return "\n".join(parts)


def gallery(known: Known) -> str:
    """The pictures with what the papers show there, the verdicts in a line, and the commands."""
    parts = [_GALLERY]
    for paper, group in _by_paper(known).items():
        parts.append(f"## [{_paper(group)}]({paper}.md)\n")
        for name, exhibit in group.items():
            verdicts = list(_counted([exhibit]))
            counts = [f"{verdicts.count(kind)} {kind}" for kind in VERDICTS if kind in verdicts]
            counts = counts or ["those of other exhibits, read otherwise"]
            parts.append(f"### {_title(exhibit)}\n")
            if exhibit["picture"]:
                parts.append(f"[![{_title(exhibit)}]({exhibit['picture']})]({paper}.md#{_anchor(name, exhibit)})\n")
            parts.append(
                f"The paper shows: {exhibit['shows']}.\nClaims: {', '.join(counts)}.\n\n"
                f"`{_command(name, exhibit['run'])}`\n"
            )
    return "\n".join(parts)


def _by_paper(known: Known) -> dict[str, dict[str, Any]]:
    groups = itertools.groupby(known.items(), key=lambda item: item[0].partition(".")[0])
    return {paper: dict(group) for paper, group in groups}


def _paper(group: Known) -> str:
    return next(iter(group.values()))["title"].partition(",")[0]


def _title(exhibit: Mapping[str, Any]) -> str:
    title = exhibit["title"].partition(", ")[2]
    return title[:1].upper() + title[1:]


def _counted(exhibits: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """The verdicts of all claims, each claim once."""
    return (row["verdict"] for exhibit in exhibits for row in exhibit["claims"] if not row["repeats"])


def _command(name: str, run: Mapping[str, Any]) -> str:
    seed = f" --seed {run['seed']}" if run["seed"] else ""
    return f"fisherviz papers --only {name} --scale {run['scale']}{seed}"


def _made(name: str, run: Mapping[str, Any]) -> str:
    hours = f"; {run['core_hours']:.2g} core-hours" if run["core_hours"] else ""
    return f"Made by `{_command(name, run)}` at commit {run['commit'] or 'unknown'}{hours}."


def _anchor(name: str, exhibit: Mapping[str, Any]) -> str:
    """What the heading of an exhibit is called in links to it."""
    heading = f"{_title(exhibit)} ({name})".lower()
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def _row(claim: Mapping[str, Any], setting: str) -> tuple[str, ...]:
    measured = claim["measured"] + (f" ({claim['sensitivity']})" if claim["sensitivity"] else "")
    verdict = f"**{claim['verdict']}**"
    if claim["departures"]:
        verdict += f": {'; '.join(claim['departures'])} (the rule {_holds(claim['holds'])})"
    rule = claim["rule"]
    if claim["earlier_rule"]:
        rule += f"; before: {claim['earlier_rule']}, which {_holds(claim['earlier_holds'])}"
    if claim["repeats"]:
        verdict += " (another reading of a claim above, not counted again)"
    return claim["statement"], claim["paper"], measured, rule, setting, verdict


def _holds(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    escaped = (" | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in escaped) + "\n"
