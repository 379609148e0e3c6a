"""Claims of the papers beside what was measured: rows, verdicts and the files that keep them.

A verdict is computed, never typed in: from whether the measurement keeps the claim's rule, and from where the
setting departs from the paper's in a way that matters to the claim. Exhibits never touch each other's rows.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fisherviz.support.files import resolve, write_together

REPRODUCED, NOT_REPRODUCED, DIFFERENT = "reproduced", "not reproduced", "different setting"
JSON, MARKDOWN = "claims.json", "claims.md"
_HEAD = """# What the papers claim, and what was measured

Written by `fisherviz papers`; every number comes from a run, every verdict from the rule beside it:

* **different setting**: the setting departs from the paper's in something that this claim depends on (named
  in its row), so that the paper is neither confirmed nor refuted; whether the rule holds is said too;
* **reproduced** or **not reproduced**: otherwise, whether the measurement keeps the rule.

Rules put the papers' words ("very well", "similar") into numbers; the thresholds are ours.
"""


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper beside its measurement.

    Args:
        statement: what the paper says.
        paper: the paper's own figure, or where it says so if it gives none.
        measured: the measured figure, in words.
        rule: what has to be true of the measurement for the claim to hold.
        holds: whether it is.
        departures: where the setting differs from the paper's in a way that matters to this claim.
        sensitivity: how the measurement moves with choices that the paper leaves open.
        values: the measured numbers by name; those that are infinite, of what diverged, are not kept.
    """

    statement: str
    paper: str
    measured: str
    rule: str
    holds: bool
    departures: tuple[str, ...] = ()
    sensitivity: str = ""
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """The verdict: "reproduced", "not reproduced" or "different setting"."""
        if self.departures:
            return DIFFERENT
        return REPRODUCED if self.holds else NOT_REPRODUCED


@dataclass(frozen=True)
class Outcome:
    """What an exhibit's function returns.

    Args:
        claims: rows of the table.
        setting: what was run, in a few words for each row.
        details: the same in a sentence without its full stop.
        caption: what the picture shows.
        picture: PNG, or None where the exhibit is numbers alone.
    """

    claims: tuple[Claim, ...]
    setting: str
    details: str
    caption: str
    picture: bytes | None = None


def record(out: Path, name: str, title: str, outcome: Outcome, **run: Any) -> None:
    """Write an exhibit's picture and rows; the rows of other exhibits stay as they are.

    Args:
        out: folder of pictures and claims.
        name: of the exhibit, for example "kfac.fig2".
        title: its heading.
        outcome: what was found.
        **run: how it was run (scale, seed, ...), kept with the rows.

    Raises:
        ValueError: the folder's claims.json is damaged.
    """
    known = load(out)
    rows = []
    for claim in outcome.claims:
        finite = {key: value for key, value in claim.values.items() if not math.isinf(value)}
        rows.append({**asdict(claim), "values": finite, "verdict": claim.verdict})
    known[name] = {
        "title": title, "run": run, "setting": outcome.setting, "details": outcome.details,
        "caption": outcome.caption, "picture": None if outcome.picture is None else f"{name}.png",
        "claims": rows,
    }  # fmt: skip
    known = dict(sorted(known.items()))
    text = json.dumps(known, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n"
    contents: dict[str, bytes | str] = {JSON: text, MARKDOWN: markdown(known)}
    if outcome.picture is not None:
        contents[f"{name}.png"] = outcome.picture
    write_together(out, contents)


def load(out: Path) -> dict[str, Any]:
    """The recorded exhibits of a folder by name; empty where there are none.

    Raises:
        ValueError: claims.json is damaged.
    """
    path = resolve(out, JSON)
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it or choose another folder.") from error
    if not isinstance(known, dict) or not all(isinstance(e, dict) and "claims" in e for e in known.values()):
        raise ValueError(f"{path} holds no claims of papers; delete it or choose another folder.")
    return known


def markdown(known: Mapping[str, Any]) -> str:
    """The recorded exhibits as a page."""
    parts = [_HEAD, _summary(known)]
    for name, exhibit in known.items():
        parts.append(f"## {exhibit['title']} (`{name}`)\n")
        if exhibit["picture"]:
            parts.append(f"![{exhibit['title']}]({exhibit['picture']})\n")
        parts.append(f"{exhibit['caption']}\n\nSetting: {exhibit['details']}.\n")
        parts.append("| claim | paper's figure | measured | rule | setting | verdict |")
        parts.append("|---|---|---|---|---|---|")
        parts.append("\n".join(_row(claim, exhibit["setting"]) for claim in exhibit["claims"]) + "\n")
    return "\n".join(parts)


def _summary(known: Mapping[str, Any]) -> str:
    """How many claims of each paper came out how; a title begins with its paper."""
    papers: dict[str, list[str]] = {}
    for exhibit in known.values():
        verdicts = papers.setdefault(exhibit["title"].partition(",")[0], [])
        verdicts += [claim["verdict"] for claim in exhibit["claims"]]
    papers = dict(sorted(papers.items())) | {"all": list(itertools.chain(*papers.values()))}
    kinds = (REPRODUCED, NOT_REPRODUCED, DIFFERENT)
    lines = [f"| paper | claims | {' | '.join(kinds)} |", "|---|---|---|---|---|"]
    for paper, verdicts in papers.items():
        lines.append(f"| {paper} | {len(verdicts)} | {' | '.join(str(verdicts.count(kind)) for kind in kinds)} |")
    return "\n".join(lines) + "\n"


def _row(claim: Mapping[str, Any], setting: str) -> str:
    measured = claim["measured"] + (f" ({claim['sensitivity']})" if claim["sensitivity"] else "")
    verdict = f"**{claim['verdict']}**"
    if claim["departures"]:
        holds = "holds" if claim["holds"] else "does not hold"
        verdict += f": {'; '.join(claim['departures'])} (the rule {holds})"
    cells = (claim["statement"], claim["paper"], measured, claim["rule"], setting, verdict)
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
