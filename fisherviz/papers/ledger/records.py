"""The files that keep what exhibits found: claims.json with all rows, and the pages and pictures beside it.

Exhibits never touch each other's rows.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fisherviz._version import __version__
from fisherviz.papers.ledger.claims import Outcome
from fisherviz.papers.ledger.pages import pages
from fisherviz.papers.trials.work import Run, commit
from fisherviz.support.checksums import opened_json, sealed_json
from fisherviz.support.files import commit as commit_files
from fisherviz.support.files import replacing, resolve

JSON = "claims.json"


def record(out: Path, name: str, title: str, shows: str, outcome: Outcome, run: Run) -> None:
    """Write an exhibit's picture, rows and measurements; the rows of other exhibits stay as they are.

    Args:
        out: folder of pictures and claims.
        name: of the exhibit, for example "kfac.fig2".
        title: its heading, which begins with its paper.
        shows: what the paper shows there.
        outcome: what was found.
        run: how it was run, kept with the rows.

    Raises:
        ValueError: the folder's claims.json is damaged.
    """
    rows = []
    for claim in outcome.claims:
        finite = {key: value for key, value in claim.values.items() if not math.isinf(value)}
        rows.append({**asdict(claim), "values": finite, "verdict": claim.verdict})
    how = {
        "scale": run.scale, "seed": run.seed, "device": run.device, "fisherviz": __version__, "commit": commit(),
        "core_hours": round(sum(found["made"]["cpu_seconds"] for found in run.used.values()) / 3600, 3),
    }  # fmt: skip
    exhibit = {
        "title": title, "shows": shows, "run": how, "setting": outcome.setting, "details": outcome.details,
        "caption": outcome.caption, "picture": None if outcome.picture is None else f"{name}.png",
        "protocol": [[list(pair) for pair in row.items()] for row in outcome.protocol], "claims": rows,
    }  # fmt: skip
    contents: dict[str, bytes | str] = {}
    if outcome.picture is not None:
        contents[f"{name}.png"] = outcome.picture
    if run.used:
        lines = [sealed_json(_short(found), sort_keys=True) for found in run.used.values()]
        contents[f"{name}.runs.jsonl"] = "\n".join(lines) + "\n"
    with replacing(out):  # another process may be recording another exhibit
        known = dict(sorted({**load(out), name: exhibit}.items()))
        commit_files(out, {JSON: sealed_json(known, indent=1, sort_keys=True) + "\n", **pages(known), **contents})


def _short(found: dict[str, Any]) -> dict[str, Any]:
    """A measurement without its way: of a curve the first and the last line are kept."""
    curve = found.get("curve")
    return found if curve is None else {**found, "curve": [curve[0], curve[-1]] if curve else []}


def load(out: Path) -> dict[str, Any]:
    """The recorded exhibits of a folder by name; empty where there are none.

    Raises:
        ValueError: claims.json is damaged.
    """
    path = resolve(out, JSON)
    if not path.exists():
        return {}
    try:
        known = opened_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it or choose another folder.") from error
    if not isinstance(known, dict) or not all(isinstance(e, dict) and "claims" in e for e in known.values()):
        raise ValueError(f"{path} holds no claims of papers; delete it or choose another folder.")
    return {name: _complete(exhibit) for name, exhibit in known.items()}


def _complete(exhibit: dict[str, Any]) -> dict[str, Any]:
    """An exhibit with what older releases did not record."""
    rows = [{"repeats": False, "earlier_rule": "", "earlier_holds": False, **row} for row in exhibit["claims"]]
    run = {"commit": None, "core_hours": 0.0, **exhibit["run"]}
    return {"shows": "not recorded", "protocol": [], **exhibit, "claims": rows, "run": run}
