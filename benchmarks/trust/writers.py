"""Two processes that write into one folder at once, and a third that reads there meanwhile."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.trust.injection import Ended, forked
from benchmarks.trust.keeping import (
    NEW,
    OLD,
    RUN,
    WORK,
    approximation,
    approximation_state,
    comparison,
    comparison_state,
    fresh,
    papers,
    report,
    report_state,
    run_state,
    sweep_state,
)
from fisherviz.papers.ledger.records import load
from fisherviz.training import train

Work = Callable[[Path], Any]


def _saved(made: Callable[[str], Any], name: str) -> list[Work]:
    """Saving the old and the new result."""
    return [lambda folder, which=which: made(which).save(folder / name) for which in (OLD, NEW)]


def _trained(folder: Path) -> None:
    train(RUN, out=folder / "run")


def _exhibits(folder: Path) -> Any:
    return sorted(load(folder / "figures"))


def _pair(folder: Path, one: Work, other: Work, reading: Work | None = None) -> tuple[list[Ended], Ended | None]:
    """Both at once in forks, beside a reader."""
    start = time.monotonic() + 0.03
    ends: list[Ended | None] = [None, None, None]

    def go(place: int, work: Work) -> None:
        ends[place] = forked(partial(_at, start, work, folder))

    works = [one, other, *([reading] if reading else [])]
    threads = [Thread(target=go, args=(k, work)) for k, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [end for end in ends[:2] if end is not None], ends[2]


def _at(start: float, work: Work, folder: Path) -> Any:
    while time.monotonic() < start:
        pass
    found = work(folder)
    return found if isinstance(found, list) else None


def _count(found: Counter[str], said: list[str], ends: list[Ended]) -> None:
    found["rounds"] += 1
    refused = [end for end in ends if end.how != "done"]
    raw = [end for end in refused if end.raw or end.how == "killed" or "at work" not in end.told]
    found["raw" if raw else "refused" if refused else "both"] += 1
    said += [f"{end.how}: {end.told[-300:]}" for end in raw]


def _either(one: Work, other: Work, state: Work, rounds: int, folder: Path) -> dict[str, Any]:
    """Writers of different results: one of them is there in the end, and at every moment."""
    states = []
    for work in (one, other):
        work(fresh(folder))
        states.append(json.dumps(state(folder)))
    found: Counter[str] = Counter()
    said: list[str] = []

    def reads(place: Path) -> list[str]:
        wrong, end = [], time.monotonic() + 0.05
        while time.monotonic() < end or not wrong:
            read = json.dumps(state(place)[:-1])
            wrong.append("" if read in [json.dumps(json.loads(s)[:-1]) for s in states] else "a mixture is read")
        return wrong

    for _ in range(rounds):
        one(fresh(folder))
        ends, reader = _pair(folder, one, other, reads)
        _count(found, said, ends)
        assert reader is not None
        if reader.how == "done":
            found["reads"] += len(reader.found)
        wrong = [text for text in (reader.found or [reader.told or reader.how]) if text]
        found["lost"] += bool(wrong) or json.dumps(state(folder)) not in states
        said += [f"read: {text[-300:]}" for text in wrong[:1]]
    return {**found, "said": said[:5]}


def _both(one: Work, other: Work, state: Work, rounds: int, folder: Path) -> dict[str, Any]:
    """Writers of one result, or of two that stand side by side: it is as if one had come after the other."""
    fresh(folder)
    one(folder)
    other(folder)
    expected = json.dumps(state(folder))
    found: Counter[str] = Counter()
    said: list[str] = []
    for _ in range(rounds):
        ends, _ = _pair(fresh(folder), one, other)
        _count(found, said, ends)
        if json.dumps(state(folder)) != expected:
            found["lost"] += 1
            said.append(f"lost: {json.dumps(state(folder))[:200]}")
    return {**found, "said": said[:5]}


def _few(work: Work, state: Work, share: int, rounds: int, folder: Path) -> dict[str, Any]:
    """One piece of work twice, in one of so many rounds, since it is slow."""
    return _both(work, work, state, max(2, rounds // share), folder)


def _swept(folder: Path) -> None:
    next(work for work in WORK if work.name == "sweep").work(folder)


PAIRS: dict[str, Callable[[int, Path], dict[str, Any]]] = {
    "comparison": partial(_either, *_saved(comparison, "comparison"), comparison_state),
    "approximation": partial(_either, *_saved(approximation, "kfac.safetensors"), approximation_state),
    "report": partial(_either, partial(report, which=OLD), partial(report, which=NEW), report_state),
    "papers": partial(_both, partial(papers, name="kfac.one"), partial(papers, name="sang.two"), _exhibits),
    "run": partial(_few, _trained, run_state, 3),
    "sweep": partial(_few, _swept, sweep_state, 8),
}
"""Pairs that write at once, called with the number of rounds and a folder."""
