"""Saved files with a bit that is another, or without their end: refused by name, or read as what was saved."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.trust.keeping import (
    RUN,
    WORK,
    fresh,
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
from fisherviz.support.sealing import read_sealed
from fisherviz.training import load_run, train

Reader = Callable[[Path], Any]
REFUSALS = (ValueError, RuntimeError)
SLOW = 10
"""Reading that goes on with the work is tried with one of so many flips."""


def damaged(folder: Path, chance: random.Random, count: int) -> dict[str, Any]:
    """Flip so many bits of each file, and cut it at a third as many lengths.

    Args:
        folder: for the files.
        chance: where.
        count: flips of a file.
    """
    saved = fresh(folder / "saved")
    by_name = {work.name: work for work in WORK}
    for name in ("run", "report", "comparison", "approximation", "sweep", "papers"):
        by_name[name].work(saved)
    train(RUN | {"max_steps": 5}, out=saved / "half" / "run")
    _half_done(saved / "part")
    kept = next((saved / "figures" / ".runs").glob("*.json")).relative_to(saved)
    part = next((saved / "part" / "figures" / ".runs").glob("*.part")).relative_to(saved)
    few = max(8, count // SLOW)
    tried: list[tuple[str, Path, Path, Reader, int]] = [
        *((name, Path("comparison"), Path(name), _comparison, count) for name in (FACTS, TABLE, ARRAYS)),
        ("kfac.safetensors", Path(), Path("kfac.safetensors"), _approximation, count),
        ("report.json", Path("report"), Path("report.json"), _report, count),
        *((name, Path("run"), Path(name), _run, count) for name in ("config.yaml", "metrics.jsonl", "summary.json")),
        ("checkpoint.pt", Path("run"), Path("checkpoint.pt"), _checkpoint, count),
        ("claims.json", Path("figures"), Path("claims.json"), _claims, count),
        *(
            (f"{name}, going on", Path("half"), Path("run") / name, _goes_on, few)
            for name in ("metrics.jsonl", "checkpoint.pt", "config.yaml")
        ),
        ("study.db, going on", Path(), Path("sweep/study.db"), _swept, few),
        (".runs/….json, going on", Path(), kept, _measured, few),
        (".runs/….part, going on", Path("part"), part.relative_to("part"), _measured, few),
    ]
    return {
        name: _tried(folder / "damaged", saved / where, file, reader, chance, flips)
        for name, where, file, reader, flips in tried
    }


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
    if reader in (_goes_on, _swept, _measured):  # they write
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
