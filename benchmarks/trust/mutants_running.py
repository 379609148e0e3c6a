"""A pytest plugin that tries mutmut's mutants with tests that are collected once, each mutant in a forked child.

mutmut's own runner collects the tests anew for every mutant, which with this project takes longer than the tests do.
What it reads, `MUTANTS_ASKED`, is a JSON file: `rooms` to import, `mutants` to try, `seconds` of tests that each gets
at most, `deaf` whether tests are run while everything raises. It writes `MUTANTS_FOUND`.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import resource
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate, groupby, zip_longest
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from mutmut.mutation.trampoline import set_mutant_under_test
from mutmut.state import state
from mutmut.utils.format_utils import mangled_name_from_mutant_name

import fisherviz

SLOW = 1.0
"""Seconds above which a test is tried after all others."""
TIMES, BESIDE, WALL_SECONDS = 4, 10, 1800
"""A mutant runs on and on that takes so many times its tests' CPU time and so many seconds, or that long in all."""


def pytest_configure() -> None:
    """Modules and parameters of tests are made with the functions as they are."""
    set_mutant_under_test("none.none")


def pytest_runtestloop(session: pytest.Session) -> bool:
    """In the place of one run of all tests."""
    asked = json.loads(Path(os.environ["MUTANTS_ASKED"]).read_text(encoding="utf-8"))
    path = Path(os.environ["MUTANTS_FOUND"])
    for module in pkgutil.walk_packages(fisherviz.__path__, "fisherviz."):
        if module.name.split(".")[1] in asked["rooms"] and not module.ispkg:
            importlib.import_module(module.name)  # here, not in every child
    found: dict[str, Any] = {"tests": {}, "outcomes": {}, "deaf": []}
    seen = [one for _, items in by_file(session.items) for one in forked(watched, items)[1] or []]
    found["tests"] = {name: {"passed": ok, "seconds": s, "functions": len(of)} for name, ok, s, of in seen}
    named = {item.nodeid: item for item in session.items}
    right = {name: (seconds, of) for name, ok, seconds, of in seen if ok}
    nearest = chosen(right, asked["seconds"])
    for mutant in asked["mutants"]:
        tests = nearest.get(mangled_name_from_mutant_name(mutant), [])
        start = time.monotonic()
        limit = int(TIMES * sum(right[test][0] for test in tests)) + BESIDE
        status, by = forked(first_failure, [named[test] for test in tests], mutant, limit=limit)
        verdict = "no test" if not tests else "timeout" if status else "killed" if by else "survived"
        found["outcomes"][mutant] = {
            "status": verdict, "by": by, "tests": len(tests), "seconds": round(time.monotonic() - start, 1),
        }  # fmt: skip
        path.write_text(json.dumps(found), encoding="utf-8")
    if asked["deaf"]:
        for _, items in by_file(session.items):
            found["deaf"] += forked(deaf, items)[1] or []
    path.write_text(json.dumps(found), encoding="utf-8")
    return True


def by_file(items: Sequence[pytest.Item]) -> Iterator[tuple[str, list[pytest.Item]]]:
    """The tests of each file."""
    for name, own in groupby(items, key=lambda item: item.nodeid.split("::")[0]):
        yield name, list(own)


def passes(item: pytest.Item, mutant: str) -> bool:
    """Whether a test, which has not run in this process yet, passes under a mutant."""
    set_mutant_under_test(mutant)
    reports = runtestprotocol(item, nextitem=None, log=False)
    return all(report.passed or report.skipped for report in reports)


def watched(items: Sequence[pytest.Item]) -> list[tuple[str, bool, float, list[str]]]:
    """Each test with whether it passes, its seconds of CPU, and the functions that it reaches."""
    found = []
    for item in items:
        state()._stats.clear()
        start = time.process_time()
        ok = passes(item, "stats")
        found.append((item.nodeid, ok, time.process_time() - start, sorted(state()._stats)))
    return found


def deaf(items: Sequence[pytest.Item]) -> list[str]:
    """Those that pass while every function raises."""
    return [item.nodeid for item in items if passes(item, "fail")]


def chosen(tests: Mapping[str, tuple[float, Sequence[str]]], seconds: float) -> dict[str, list[str]]:
    """For each function the tests that reach it: quick ones of its room first, and those that reach the fewest others.

    As many are taken as end within `seconds` of CPU, and the first in any case.

    Of one test with many parameters at most three are taken before the others have had their turn, and files of tests
    take turns: tests of one file often reach a function in the same way.
    """
    reaching = defaultdict(list)
    for name, (_, functions) in tests.items():
        for function in functions:
            reaching[function].append(name)
    found = {}
    for function, names in reaching.items():
        room = function.split(".")[1]
        names.sort(
            key=lambda name: (tests[name][0] > SLOW, not name.startswith(f"tests/{room}/"), len(tests[name][1]), name)
        )
        turns: Counter[str] = Counter()
        early, late = [], []
        for name in names:
            turns[name.split("[")[0]] += 1
            (early if turns[name.split("[")[0]] <= 3 else late).append(name)
        ordered = in_turn(early) + late
        within = sum(end <= seconds for end in accumulate(tests[name][0] for name in ordered))
        found[function] = ordered[: max(1, within)]
    return found


def in_turn(names: Sequence[str]) -> list[str]:
    """One test of each file, then a second of each, and so on, in their order."""
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.split("::")[0], []).append(name)
    return [name for turn in zip_longest(*files.values()) for name in turn if name is not None]


def first_failure(items: Sequence[pytest.Item], mutant: str) -> str:
    """The first test that fails under a mutant; "" where none does."""
    return next((item.nodeid for item in items if not passes(item, mutant)), "")


def forked(work: Callable[..., Any], *arguments: Any, limit: int = 0) -> tuple[int, Any]:
    """A child's exit status and what it gives back, as JSON holds it; the tests run there, never in this process."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            if limit:
                resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
                signal.alarm(WALL_SECONDS)
            answer = json.dumps(work(*arguments))
            with os.fdopen(write, "w", encoding="utf-8") as pipe:
                pipe.write(answer)
            os._exit(0)
        finally:
            os._exit(70)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, json.loads(said) if said else None
