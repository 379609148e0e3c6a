"""Saved files with a bit that is another, or without their end: refused by name, or read as what was saved."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trust.keeping import (
    RUN,
    WORK,
    fresh,
    measured,
    measured_state,
    papers,
    papers_state,
    plain,
    run_state,
    sweep_state,
)
from fisherviz.matrices.saved import load_approximation
from fisherviz.papers.ledger.records import load
from fisherviz.papers.trials import running
from fisherviz.report.against import comparisons_of
from fisherviz.results.comparison import ARRAYS, FACTS, TABLE, load_comparison
from fisherviz.support.pieces import Pieces
from fisherviz.support.sealing import read_sealed
from fisherviz.training import load_run, train

Reader = Callable[[Path], Any]
REFUSALS = (ValueError, RuntimeError)
SLOW = 10
"""Reading that goes on with the work is tried with one of so many flips."""


@dataclass(frozen=True)
class File:
    """A file that is saved.

    Args:
        make: saves it, with what belongs to it.
        where: folder that is read, below the one where it is made.
        name: of the file there; a pattern.
        reader: what is read.
    """

    make: Callable[[Path], Any]
    where: str
    name: str
    reader: Reader


def damaged(file: File, seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Flip so many bits of a file, and cut it at a third as many lengths.

    Args:
        file: which.
        seed: of the places.
        count: flips; fewer where reading it goes on with work.
        folder: for the files.
    """
    file.make(fresh(folder / "saved"))
    place = folder / "saved" / file.where
    name = next(place.glob(file.name)).relative_to(place)
    flips = max(8, count // SLOW) if file.reader in WRITING else count
    chance = random.Random(f"{seed} {file.where} {file.name}")
    return _tried(folder / "damaged", place, name, file.reader, chance, flips)


def _tried(
    place: Path, saved: Path, file: Path, reader: Reader, chance: random.Random, flips: int
) -> dict[str, Any]:  # fmt: skip
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(saved, place)
    expected = reader(place)
    whole = (saved / file).read_bytes()
    found: Counter[str] = Counter()
    said: list[str] = []
    for _ in range(flips):
        at = chance.randrange(len(whole))
        other = whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :]
        _read(place, saved, file, other, reader, expected, found, said)
        found["flips"] += 1
    for length in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(flips // 3))]:
        _read(place, saved, file, whole[:length], reader, expected, found, said)
        found["cuts"] += 1
    return {**found, "said": said[:5]}


def _read(
    place: Path, saved: Path, file: Path, content: bytes, reader: Reader, expected: Any, found: Counter[str],
    said: list[str],
) -> None:  # fmt: skip
    if reader in WRITING:
        shutil.rmtree(place)
        shutil.copytree(saved, place)
    (place / file).write_bytes(content)
    try:
        value = reader(place)
    except REFUSALS as error:
        named = file.name in str(error)
        found["refused" if named else "raw"] += 1
        said += [] if named else [f"{type(error).__name__}: {str(error)[:300]}"]
    except Exception as error:
        found["raw"] += 1
        said.append(f"{type(error).__name__}: {str(error)[:300]}")
    else:
        found["equal" if value == expected else "silent"] += 1
        if value != expected:
            place_of = next(i for i, (a, b) in enumerate(zip(f"{value}", f"{expected}", strict=False)) if a != b)
            said.append(f"{f'{value}'[place_of - 80 : place_of + 40]}")


# ---- what is read


def _comparison(place: Path) -> Any:
    found = load_comparison(place)
    return plain([found.frame.to_dict("list"), found.arrays]), json.dumps(found.meta)


def _approximation(place: Path) -> Any:
    found = load_approximation(place / "kfac.safetensors")
    return plain([found.to_dense(), repr(found), list(found.space.names)])


def _report(place: Path) -> Any:
    return {title: json.dumps(one.meta) for title, one in comparisons_of(place).items()}


def _run(place: Path) -> Any:
    found = load_run(place)
    return json.dumps([found.config, list(found.records), found.summary])


def _checkpoint(place: Path) -> Any:
    return plain(read_sealed(place / "checkpoint.pt"))


def _claims(place: Path) -> Any:
    return json.dumps(load(place))


def _goes_on(place: Path) -> Any:
    train(RUN, out=place / "run")
    return run_state(place)


def _swept(place: Path) -> Any:
    next(work for work in WORK if work.name == "sweep").work(place)
    return sweep_state(place)[:2]


def _measured(place: Path) -> Any:
    papers(place)
    return papers_state(place)


class _Halfway(Exception):
    """A training that was left."""


def _half_done(folder: Path) -> None:
    """An exhibit whose training was left after some of its steps."""
    step = running._Training._step

    def left(training: Any, x: Any, y: Any, number: int) -> None:
        if number == 4:
            raise _Halfway
        step(training, x, y, number)

    running._Training._step = left  # type: ignore[method-assign]
    try:
        papers(folder)
    except _Halfway:
        pass
    finally:
        running._Training._step = step  # type: ignore[method-assign]


def _begun(folder: Path) -> None:
    """A report that was left when two of its methods were measured."""
    keep, kept = Pieces.keep, list[str]()

    def left(pieces: Pieces, name: str, state: Any) -> None:
        keep(pieces, name, state)
        kept.append(name)
        if len(kept) == 2:
            raise _Halfway

    Pieces.keep = left  # type: ignore[method-assign]
    try:
        measured(folder)
    except _Halfway:
        pass
    finally:
        Pieces.keep = keep  # type: ignore[method-assign]


def _reported(place: Path) -> Any:
    measured(place)
    return measured_state(place)


WRITING = (_goes_on, _swept, _measured, _reported)
"""Readers that go on with the work, of a copy for each time."""


def _made(name: str) -> Callable[[Path], Any]:
    return next(work.work for work in WORK if work.name == name)


def _half_trained(folder: Path) -> None:
    train(RUN | {"max_steps": 5}, out=folder / "run")


FILES = {
    **{name: File(_made("comparison"), "comparison", name, _comparison) for name in (FACTS, TABLE, ARRAYS)},
    "kfac.safetensors": File(_made("approximation"), "", "kfac.safetensors", _approximation),
    "report.json": File(_made("report"), "report", "report.json", _report),
    **{name: File(_made("run"), "run", name, _run) for name in ("config.yaml", "metrics.jsonl", "summary.json")},
    "checkpoint.pt": File(_made("run"), "run", "checkpoint.pt", _checkpoint),
    **{
        f"{name}, going on": File(_half_trained, "", f"run/{name}", _goes_on)
        for name in ("metrics.jsonl", "checkpoint.pt", "config.yaml")
    },
    "study.db, going on": File(_made("sweep"), "", "sweep/study.db", _swept),
    "claims.json": File(_made("papers"), "figures", "claims.json", _claims),
    ".runs/….json, going on": File(_made("papers"), "", "figures/.runs/*.json", _measured),
    ".runs/….part, going on": File(_half_done, "", "figures/.runs/*.part", _measured),
    ".unfinished/….pt, going on": File(_begun, "", "report/.unfinished/method-*.pt", _reported),
    ".unfinished/begun.pt, going on": File(_begun, "", "report/.unfinished/begun.pt", _reported),
}
"""The files by what the page calls them."""
