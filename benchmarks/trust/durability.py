"""Nothing lost: what is written survives kills, full and read-only disks, damage, two writers and Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import table
from benchmarks.trust import damage, interrupts, writers
from benchmarks.trust.injection import ERRORS, KILL, Ended, Faults, forked
from benchmarks.trust.keeping import WORK, Kept, fresh, result_of, warm

TITLE = "Nothing lost"
SEED = 20261129
KILLS = {"run": 70, "sweep": 16, "report": 40, "comparison": 50, "approximation": 30, "papers": 40,
         "whole report": 120}  # fmt: skip
"""Kills at random moments of each, in the long half."""
STRIDES = {"sweep": 24, "report": 3, "run": 2, "papers": 2, "whole report": 4}
"""Of many writes that are alike, the short half tries a ninth of one of so many; the long half tries all."""
SHARE = 10
"""The short half has about one of so many."""


def measure(long: bool) -> dict[str, Any]:
    """Counts of everything that was tried, and of how it ended; each part in a fork, two at a time for each core."""
    torch.set_num_threads(1)
    warm()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name,
        ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool,
    ):
        parts = _parts(Path(name), long)
        ends = dict(zip(parts, pool.map(forked, parts.values()), strict=True))
    found: dict[str, Any] = {"seed": SEED}
    for (part, what), end in ends.items():
        if end.how != "done":
            raise RuntimeError(f"{part} of {what} ended {end.how}: {end.told}")
        found.setdefault(part, {})[what] = end.found
    return found


def _parts(folder: Path, long: bool) -> dict[tuple[str, str], Callable[[], Any]]:
    """What is tried, the longest first: of which part of the page, on what, and the call."""
    found: dict[tuple[str, str], Callable[[], Any]] = {}
    count = (lambda whole: whole) if long else (lambda whole: max(2, whole // SHARE))

    def tried(part: str, what: str, function: Callable[..., Any], *given: Any) -> None:
        found[part, what] = partial(function, *given, fresh(folder / f"{part} {what}".replace(" ", "-")))

    for work in sorted(WORK, key=lambda work: work.name not in ("sweep", "report")):
        stride = 1 if long else 9 * STRIDES.get(work.name, 1)
        tried("writes", work.name, _all_failing, work, stride)
        tried("kills", work.name, killed, work, count(KILLS[work.name]))
        tried("kills at writes", work.name, killed_at_writes, work, stride)
        tried("disk", work.name, on_disks, work, long)
    for name, files in damage.FILES.items():
        tried("damage", name, damage.damaged, files, SEED, count(60))
    for name, pair in writers.PAIRS.items():
        tried("writers", name, pair, count(24))
    for name, interrupted in interrupts.TRIED.items():
        tried("interrupts", name, interrupted, SEED, count(12))
    return found


def _state(work: Kept, folder: Path) -> str:
    return json.dumps(work.state(folder), sort_keys=True)


def _references(work: Kept, folder: Path) -> tuple[str, str]:
    """The states before, "" where there is nothing, and after uninterrupted work."""
    fresh(folder)
    work.before(folder)
    old = _state(work, folder) if work.replaces else ""
    work.work(folder)
    return old, _state(work, folder)


def _readable(work: Kept, folder: Path, old: str, new: str) -> bool:
    """Whether a result that is replaced is there, the old one or the new one, with nothing of it missing."""
    if not work.replaces:
        return True
    read = _without_names(work, folder)
    return read in (result_of(old), result_of(new))


def _without_names(work: Kept, folder: Path) -> Any:
    try:
        return result_of(_state(work, folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _again(work: Kept, folder: Path, new: str) -> str:
    """What the same work makes of a folder that was left: "" where it is bit for bit what it should be."""
    try:
        work.work(folder)
        state = _state(work, folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if state == new else "another result"


# ---- kills


def killed(work: Kept, count: int, folder: Path) -> dict[str, Any]:
    """Kill it at random moments of its time, and start it again."""
    chance = random.Random(f"{SEED} {work.name}")
    place = folder / work.name
    old, new = _references(work, place)
    longest = max(_timed(work, place) for _ in range(3))
    found: Counter[str] = Counter()
    said = []
    while found["kills"] < count:
        fresh(place)
        work.before(place)
        times = 1 + (chance.random() < 0.3)  # one of three is killed once more on its way on
        ends = [forked(partial(_none, work, place), kill_after=chance.uniform(0, longest)) for _ in range(times)]
        found["kills"] += sum(end.how == "killed" for end in ends)
        found["ended before"] += sum(end.how == "done" for end in ends)
        said += _judged(work, place, old, new, found, [end for end in ends if end.how == "refused"])
    return {**found, "said": said[:5]}


def _none(work: Kept, folder: Path) -> None:
    work.work(folder)


def _timed(work: Kept, folder: Path) -> float:
    fresh(folder)
    work.before(folder)
    return forked(partial(_none, work, folder)).seconds


def _judged(
    work: Kept, place: Path, old: str, new: str, found: Counter[str], refused: list[Ended]
) -> list[str]:  # fmt: skip
    """Count how a folder that was left is found, and how work on it goes on."""
    said = [end.told for end in refused]
    if not _readable(work, place, old, new):
        found["unreadable"] += 1
        said.append(f"unreadable: {str(_without_names(work, place))[:300]}")
    if wrong := _again(work, place, new):
        found["other"] += 1
        said.append(wrong[:300])
    else:
        found["equal"] += 1
    found["refused"] += len(refused)
    return said


def killed_at_writes(work: Kept, stride: int, folder: Path) -> dict[str, Any]:
    """Kill it before each of its writes, or before one of so many, and start it again."""
    place = folder / work.name
    old, new = _references(work, place)
    total = _counted(work, place, KILL)
    found: Counter[str] = Counter()
    said = []
    for at in range(1, total + 1, stride):
        fresh(place)
        work.before(place)
        end = forked(partial(_faulty, work, place, at, KILL, False))
        found["kills"] += end.how == "killed"
        said += _judged(work, place, old, new, found, [end] if end.how == "refused" else [])
    return {**found, "writes": total, "said": said[:5]}


def _faulty(work: Kept, place: Path, at: int, error: int, once: bool) -> int:
    faults = Faults(place, at, error, once).install()
    work.work(place)
    return faults.count


def _counted(work: Kept, place: Path, error: int) -> int:
    fresh(place)
    work.before(place)
    return forked(partial(_faulty, work, place, 0, error, False)).found


# ---- writes that fail


def _all_failing(work: Kept, stride: int, folder: Path) -> dict[str, Any]:
    return {said: failing(work, error, stride, folder) for said, error in ERRORS.items()}


def failing(work: Kept, error: int, stride: int, folder: Path) -> dict[str, Any]:
    """Let each of its writes fail in turn, or one of so many: once on a broken disk, else with all that follow."""
    place = folder / work.name
    old, new = _references(work, place)
    total = _counted(work, place, error)
    found: Counter[str] = Counter()
    said = []
    for at in range(1, total + 1, stride):
        fresh(place)
        work.before(place)
        end = forked(partial(_faulty, work, place, at, error, error == errno.EIO))
        found["failed"] += 1
        found["went on"] += end.how == "done"
        told = _sentence(end, place)
        found["told" if end.how == "refused" and told == "" else "untold"] += end.how != "done"
        said += [told] if end.how != "done" and told else []
        said += _judged(work, place, old, new, found, [])
    return {**found, "writes": total, "said": said[:5]}


def _sentence(end: Ended, place: Path) -> str:
    """"" where an error is one sentence that names a path; else what it said."""  # fmt: skip
    flat = " ".join(end.told.split())
    good = not end.raw and str(place) in flat and len(flat) < 900 and "Traceback" not in flat
    return "" if good else f"{end.how}: {flat[-500:]}"


# ---- real disks


def on_disks(work: Kept, long: bool, folder: Path) -> dict[str, Any]:
    """A real disk that is full, and one that is read-only, where one can be mounted."""
    disk = folder / "disk"
    try:
        with _disk(disk, "64k"):
            pass
    except OSError as error:
        return {"skipped": f"no disk of memory can be mounted here ({error})"}
    counts: Counter[str] = Counter()
    said = []
    old, new = _references(work, folder / work.name)
    for size in ("4k", "16k", "40k", "72k", "120k", "200k", "") if long else ("16k", ""):
        said += _on_disk(work, disk, old, new, counts, size)
    return {**counts, "said": said[:5]}


def _on_disk(work: Kept, disk: Path, old: str, new: str, counts: Counter[str], size: str) -> list[str]:
    """Work on a disk that has room for `size` beside what is there before, or that is read-only where it is ""."""
    with _disk(disk, "64m"):
        place = fresh(disk / "work")
        work.before(place)
        used = shutil.disk_usage(disk).used
        _remount(disk, "ro" if not size else f"size={used + int(size[:-1]) * 1024}")
        end = forked(partial(_none, work, place))
        counts["tried"] += 1
        counts["went on"] += end.how == "done"
        told = _sentence(end, place)
        counts["told" if end.how == "refused" and told == "" else "untold"] += end.how != "done"
        said = [told] if end.how != "done" and told else []
        readable = _readable(work, place, old, new)
        _remount(disk, "rw" if not size else "size=64m")
        counts["unreadable"] += not readable
        if wrong := _again(work, place, new):
            counts["other"] += 1
            said.append(f"{size or 'read-only'}: {wrong[:300]}")
        else:
            counts["equal"] += 1
    return said


@contextmanager
def _disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    _system("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path))
    try:
        yield
    finally:
        _system("umount", str(path))


def _remount(path: Path, option: str) -> None:
    _system("mount", "-o", f"remount,{option}", str(path))


def _system(*command: str) -> None:
    if os.name != "posix" or shutil.which(command[0]) is None:
        raise OSError(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} failed")


# ---- what must hold, and its words


def broken(found: dict[str, Any]) -> list[str]:
    """A sentence for everything that was lost, or that failed without one."""
    wrong = []
    for part in ("kills", "kills at writes"):
        for name, counts in found[part].items():
            wrong += _lost(f"{name}, {part}", counts, ("unreadable", "other", "refused"))
    for name, errors in found["writes"].items():
        for said, counts in errors.items():
            wrong += _lost(f"{name}, {said}", counts, ("unreadable", "other", "untold"))
    for name, counts in found["disk"].items():
        wrong += _lost(f"{name}, a real disk", counts, ("unreadable", "other", "untold"))
    for name, counts in found["damage"].items():
        wrong += _lost(f"{name}, damaged", counts, ("silent", "raw"))
    for name, counts in found["writers"].items():
        wrong += _lost(f"{name}, two writers", counts, ("raw", "lost"))
    for name, counts in found["interrupts"].items():
        wrong += _lost(f"{name}, interrupted", counts, ("raw", "left", "other"))
    return wrong


def _lost(what: str, counts: dict[str, Any], bad: tuple[str, ...]) -> list[str]:
    return [f"{what}: {counts[key]} {key} ({'; '.join(counts['said'])})" for key in bad if counts.get(key)]


def words(found: dict[str, Any]) -> list[str]:
    """The counts in tables."""
    at_random = sum(counts["kills"] for counts in found["kills"].values())
    at_writes = sum(counts["kills"] for counts in found["kills at writes"].values())
    rows = [
        [
            name,
            str(found["kills"][name]["kills"]),
            _of([found["kills at writes"][name]], "kills", "writes"),
            _share(found["kills"][name]["equal"] + found["kills at writes"][name]["equal"], [
                found["kills"][name], found["kills at writes"][name]
            ]),
            _of(found["writes"][name].values(), "failed", "writes"),
            str(sum(counts.get("told", 0) for counts in found["writes"][name].values())),
            str(sum(counts.get("went on", 0) for counts in found["writes"][name].values())),
            _share(sum(c.get("equal", 0) for c in found["writes"][name].values()), found["writes"][name].values()),
        ]
        for name in found["kills"]
    ]  # fmt: skip
    heads = [
        "",
        "kills at random",
        "kills at a write",
        "then equal",
        "failed writes",
        "told",
        "not needed",
        "then equal",
    ]
    return [
        f"`kill -9` at {at_random} random moments (seed {found['seed']}) and before {at_writes} writes, in a fork that "
        "has everything imported; then the same work is started again. “Equal” is bit for bit what uninterrupted work "
        "gives, the clock's fields aside: metrics, weights, optimizer state, tables, arrays, pictures, claims, and no "
        "file more or fewer; until then an earlier result stays readable. Writes that Python makes (open, fill, sync, "
        "move, make, remove) fail one after the other (in the short half one of many that are alike): from one on for "
        "lack of room or of permission, or it alone with an "
        "input/output error. “Told” is one sentence that names the path; “not needed” are writes without which the "
        "result is whole, such as tidying up. A run is `fisherviz train`'s, papers are an exhibit of `fisherviz "
        "papers` with a training that is saved at every step, a report's pictures are drawn beforehand; a whole report "
        "is measured too, three methods on two layers together and one by one, and goes on from what is finished.",
        table(heads, rows),
        *([found["aside"]] if "aside" in found else []),
        *_disk_words(found["disk"]),
        "Damage: a bit of a file that was saved is flipped at a random place, or the file is cut at a random length. "
        "It is refused in a sentence that names the file, or what is read is equal to what was saved (most of a SQLite "
        "file's pages are air, a cut in the trailing newline costs nothing, and what a damaged piece of an unfinished "
        "report held is measured anew, which is said with its name).",
        table(["file", "flips", "cuts", "refused", "equal", "silent or raw"], _damage_rows(found["damage"])),
        "Two processes write into one folder at once, and a third reads it, where it can be read, meanwhile:",
        table(
            ["", "rounds", "both well", "second refused", "lost or raw", "reads"],
            [
                [name, *(str(counts.get(key, 0)) for key in ("rounds", "both", "refused")),
                 str(counts.get("lost", 0) + counts.get("raw", 0)), str(counts.get("reads", 0))]
                for name, counts in found["writers"].items()
            ],
        ),
        "Ctrl-C at a random moment; afterwards the model has no hook, gradient or mode that it did not have, no file "
        "is half-written, and the same call gives the right result:",
        table(
            ["", "interrupts", "ended before", "then right", "left something or wrong"],
            [
                [name, str(counts.get("interrupted", 0)), str(counts.get("ended before", 0)),
                 str(counts.get("right", 0)), str(sum(counts.get(key, 0) for key in ("raw", "left", "other")))]
                for name, counts in found["interrupts"].items()
            ],
        ),
    ]  # fmt: skip


def _of(counted: Iterable[dict[str, Any]], part: str, whole: str) -> str:
    """So many of so many, over all that was counted."""
    counted = list(counted)
    return f"{sum(c.get(part, 0) for c in counted)} of {sum(c[whole] for c in counted)}"


def _share(equal: int, counted: Any) -> str:
    return f"{equal} of {sum(c.get('equal', 0) + c.get('other', 0) for c in counted)}"


def _disk_words(disk: dict[str, Any]) -> list[str]:
    for counts in disk.values():
        if "skipped" in counts:
            return [f"A real full disk was not tried: {counts['skipped']}."]
    tried, told, well, equal = (
        sum(counts.get(key, 0) for counts in disk.values()) for key in ("tried", "told", "went on", "equal")
    )
    return [
        f"The same work {tried} times on a real disk with too little room, of several sizes, or mounted read-only: "
        f"{told} ended in such a sentence, {well} had room enough, and with room again {equal} ended equal."
    ]


def _damage_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [f"`{name}`", *(str(counts.get(key, 0)) for key in ("flips", "cuts", "refused", "equal")),
         str(counts.get("silent", 0) + counts.get("raw", 0))]
        for name, counts in found.items()
    ]  # fmt: skip
