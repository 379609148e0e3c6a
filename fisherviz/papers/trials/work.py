"""How exhibits are run, and measurements that are kept: one JSON file for each, made once, by several processes.

A measurement is named by everything that decides it. A command that was interrupted, or that another exhibit went
before, finds it and goes on; what an exhibit used is recorded with its claims.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from fisherviz._version import __version__
from fisherviz.support.checksums import opened_json, sealed_json
from fisherviz.support.files import write_whole

SCALES = ("smoke", "desk", "paper")
FORMAT = 2
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """How exhibits are run.

    Args:
        scale: "smoke" (seconds, for tests), "desk" (a desktop's minutes) or "paper" (the full setting).
        seed: of initial weights and whatever else is random.
        device: where to compute.
        jobs: processes that measure side by side.
        progress: show progress bars.
        work: folder where measurements are kept; None: nowhere.
        used: the kept measurements that were asked for, by name.
    """

    scale: str = "desk"
    seed: int = 0
    device: str = "cpu"
    jobs: int = 1
    progress: bool = True
    work: Path | None = field(default=None, compare=False)
    used: dict[str, Any] = field(default_factory=dict, compare=False)

    def map(self, function: Callable[[Item, Run], Result], items: Iterable[Item]) -> list[Result]:
        """What a function makes of each item, in `jobs` processes where there is a folder that they share.

        Args:
            function: of an item and the run; importable by name, as are the items.
            items: what it is called with.

        Returns:
            The results in the order of the items.
        """
        items = list(items)
        if self.jobs > 1 and len(items) > 1 and self.work is not None:
            alone = replace(self, jobs=1, progress=False, used={})
            threads = max(1, torch.get_num_threads() // self.jobs)
            with ProcessPoolExecutor(
                min(self.jobs, len(items)), get_context("spawn"), torch.set_num_threads, (threads,)
            ) as pool:
                list(pool.map(partial(_call, function, alone), items))
        # what the processes measured is kept: the second call reads it, in order, and notes what was used
        return [function(item, self) for item in items]


def _call(function: Callable[[Item, Run], Any], run: Run, item: Item) -> None:
    function(item, run)


def kept(what: Mapping[str, Any], measure: Callable[[], dict[str, Any]], run: Run) -> dict[str, Any]:
    """A measurement, or what is kept of it.

    Args:
        what: everything that decides it, as JSON holds it.
        measure: makes it.
        run: where measurements are kept.

    Returns:
        It, with `what`, and "made": its CPU seconds, commit and versions.
    """
    path, text = place(what, run), _text(what)
    if path is not None and path.exists():
        found = _read(path, json.loads(text))
    else:
        began = time.process_time()
        result = measure()
        found = {"what": json.loads(text), "made": made(time.process_time() - began), **result}
        if path is not None:
            write_whole(path, sealed_json(found, indent=1) + "\n")
    run.used[text] = found
    return found


def _read(path: Path, what: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept in a file, which must be the measurement of that name."""
    try:
        found = opened_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("what") != what:
            raise ValueError("it is not the measurement of its name")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, and it is measured again.") from error
    return found


def place(what: Mapping[str, Any], run: Run, ending: str = ".json") -> Path | None:
    """The file of a measurement; None where nothing is kept."""
    name = hashlib.sha256(_text(what).encode()).hexdigest()[:20]
    return None if run.work is None else run.work / f"{name}{ending}"


def _text(what: Mapping[str, Any]) -> str:
    return json.dumps({"format": FORMAT, **what}, sort_keys=True)


def made(seconds: float) -> dict[str, Any]:
    """Where a measurement comes from."""
    return {
        "cpu_seconds": round(seconds, 2), "commit": commit(), "fisherviz": __version__,
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip


@cache
def commit() -> str | None:
    """The commit of the source that runs, with a + if its files differ from it; None outside a checkout."""
    folder = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", str(folder))
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
