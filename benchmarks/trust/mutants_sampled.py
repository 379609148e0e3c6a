"""Mutants of the mathematical core by mutmut, a random sample of each room, and the branches that its tests take.

All of it happens in a copy of the project: `[tool.mutmut]` of pyproject.toml says which files are mutated and which
tests try the mutants. Needs the extra `mutation`.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.md")
ROOMS = ("operators", "network", "capture", "statistics", "matrices", "exact", "approximations")
COUNTING = {"costs.py", "planning.py", "recording.py"}
"""Files that count operations, which tests compare with what runs; no mutants of them are sampled."""
SAMPLE = {"operators": 60, "network": 30, "capture": 20, "statistics": 40, "matrices": 10, "exact": 30,
          "approximations": 30}  # fmt: skip
"""Mutants tried of each room."""
SEED = 3
SECONDS = 40
"""Of tests that each mutant meets at most, those nearest to it first."""


@contextmanager
def project(root: Path = ROOT) -> Iterator[Path]:
    """A copy of the project for mutmut to work in."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        for name in ("fisherviz", "tests", "benchmarks"):
            shutil.copytree(root / name, there / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", there)
        yield there


def made(folder: Path) -> dict[str, list[str]]:
    """Make all mutants in a copy of the project; their names, by room."""
    code = (
        "import os; from mutmut.__main__ import create_mutants; from mutmut.utils import file_utils as f; "
        "os.makedirs('mutants'); f.copy_src_dir(); f.copy_also_copy_files(); create_mutants(1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=_environment(), check=True, capture_output=True)
    return {room: list(names(folder, room)) for room in ROOMS}


def names(folder: Path, room: str) -> Iterator[str]:
    """Mutants of a room, where `made` has made them."""
    for path in sorted((folder / "mutants/fisherviz" / room).glob("*.meta")):
        if path.name.removesuffix(".meta") not in COUNTING:
            yield from json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]


def shown(folder: Path, mutants: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The line that each mutant changes, and what it becomes, as `mutmut show` tells it."""
    code = (
        "import json, sys; from mutmut.mutation.diff_apply import find_mutant, get_diff_for_mutant as diff; "
        "print(json.dumps({name: diff(name, path=find_mutant(name).path) for name in sys.argv[1:]}))"
    )
    command = [sys.executable, "-c", code, *mutants]
    done = subprocess.run(command, cwd=folder, env=_environment(), capture_output=True, text=True, check=True)
    return {name: change(diff) for name, diff in json.loads(done.stdout.splitlines()[-1]).items()}


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def sampled(names: Mapping[str, Sequence[str]], sizes: Mapping[str, int], seed: int = SEED) -> dict[str, list[str]]:
    """Some mutants of each room, each as likely as any other of it."""
    return {room: random.Random(seed).sample(sorted(names[room]), min(sizes[room], len(names[room]))) for room in sizes}


def change(shown: str) -> tuple[str, str]:
    """The line that a mutant changes, and what it becomes, from what `mutmut show` prints."""
    lines = shown.splitlines()
    was = [line[1:].strip() for line in lines if line.startswith("-") and not line.startswith("---")]
    now = [line[1:].strip() for line in lines if line.startswith("+") and not line.startswith("+++")]
    return " ".join(was), " ".join(now)


def place(name: str) -> str:
    """`operators/kronecker.py Kronecker.solve` for a mutant of that method."""
    module, _, function = name.rpartition(".")
    function = re.sub(r"__mutmut_\d+$", "", function).removeprefix("x_").removeprefix("xǁ").replace("ǁ", ".")
    return f"{'/'.join(module.split('.')[1:])}.py {function}"


def explained(text: str) -> set[tuple[str, str, str]]:
    """The survivors that a table of Markdown explains: where, what was there, and what the mutant has instead."""
    row = re.compile(r"\| `(.*?)` \| `(.*?)` \| `(.*?)` \| .+ \|")
    return {
        (found[1], found[2].strip(), found[3].strip()) for line in text.splitlines() if (found := row.fullmatch(line))
    }


def tallied(
    outcomes: Mapping[str, str],
    changes: Mapping[str, tuple[str, str]],
    known: set[Any],
    since: Container[str] = (),
) -> dict[str, Any]:
    """Counts of one room, and its survivors that nobody has explained.

    Args:
        outcomes: "killed", "timeout" or another word by mutant; one that runs on and on is noticed as well.
        changes: of those that were not noticed.
        known: as `explained` gives it.
        since: of those that were not noticed, names that tests written afterwards kill; they count as survivors.
    """
    counts = Counter(outcomes.values())
    left = [(place(name), *changes[name]) for name in sorted(changes) if name not in since]
    unexplained = [where for where in left if where not in known]
    return {
        "tried": len(outcomes), "killed": counts["killed"] + counts["timeout"],
        "since": len(changes) - len(left), "explained": len(left) - len(unexplained), "open": unexplained,
    }  # fmt: skip


def run(folder: Path, chosen: Mapping[str, Sequence[str]], tests: Sequence[str], deaf: bool = True) -> dict[str, Any]:
    """What `mutants_running` finds in a project where `made` has made the mutants."""
    asked, found = folder / "asked.json", folder / "found.json"
    # room by room in turn: a run that is ended early has tried some of every room
    wanted = [name for turn in zip_longest(*chosen.values()) for name in turn if name is not None]
    asked.write_text(json.dumps({"rooms": [*ROOMS, "probe"], "mutants": wanted, "seconds": SECONDS, "deaf": deaf}))
    environment = _environment() | {
        "PYTHONPATH": str(folder / "mutants"), "MUTANT_UNDER_TEST": "none.none", "MUTANTS_ASKED": str(asked),
        "MUTANTS_FOUND": str(found),
    }  # fmt: skip
    command = [
        sys.executable, "-m", "pytest", "-q", "--rootdir=.", "--tb=no", "-p", "no:cacheprovider",
        "-p", "benchmarks.trust.mutants_running", "-m", "not peers and not slow and (not soak or covering)", *tests,
    ]  # fmt: skip
    subprocess.run(command, cwd=folder / "mutants", env=environment, capture_output=True)
    return json.loads(found.read_text(encoding="utf-8"))


def by_room(
    folder: Path, chosen: Mapping[str, Sequence[str]], found: Mapping[str, Any], since: Container[str] = ()
) -> dict[str, Any]:
    """Counts of each room; see `tallied`."""
    known, counted = explained(SURVIVORS.read_text(encoding="utf-8")), {}
    for room, wanted in chosen.items():
        outcomes = {name: found["outcomes"][name]["status"] for name in wanted}
        left = [name for name, status in outcomes.items() if status not in ("killed", "timeout")]
        counted[room] = {"mutants": sum(1 for _ in names(folder, room))} | tallied(
            outcomes, shown(folder, left), known, since
        )
    return counted


def mutants(sizes: Mapping[str, int] = SAMPLE) -> dict[str, Any]:
    """Make all mutants, try the sampled ones, and tell what came of them; likewise of tests that hear nothing."""
    with project() as folder:
        chosen = sampled(made(folder), sizes)
        found = run(folder, chosen, _selection())
        return {"mutants": by_room(folder, chosen, found), "deaf": heard(found)}


def heard(found: Mapping[str, Any]) -> dict[str, Any]:
    """How many tests reach the core, and which of them pass while all of it raises."""
    reaching = [name for name, test in found["tests"].items() if test["passed"] and test["functions"]]
    passing = {name.split("[")[0] for name in found["deaf"] if name in set(reaching)}
    return {"tests": len(reaching), "pass": sorted(passing)}


def _selection() -> list[str]:
    """The tests that pyproject.toml names for mutmut."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mutmut"][
        "pytest_add_cli_args_test_selection"
    ]


def branches(data: Path, folder: Path = ROOT) -> dict[str, Any]:
    """Statements and branches of each room that were taken, from a file of coverage.py's.

    Args:
        data: the file.
        folder: where the project was when it was measured.
    """
    report = data.with_suffix(".json")
    command = [sys.executable, "-m", "coverage", "json", f"--data-file={data}", "-o", str(report), "-q"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    found: dict[str, Any] = {}
    for room in ROOMS:
        own = [file["summary"] for name, file in files.items() if name.startswith(f"fisherviz/{room}/")]
        found[room] = {
            what: [sum(one[f"covered_{what}"] for one in own), sum(one[f"num_{total}"] for one in own)]
            for what, total in (("lines", "statements"), ("branches", "branches"))
        }
    return found


def coverage() -> dict[str, Any]:
    """Run the tests of the rooms, and tell which branches of the rooms they took."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "coverage"
        command = [
            sys.executable, "-m", "coverage", "run", "--branch", "--source=fisherviz", f"--data-file={data}", "-m",
            "pytest", "-q", "-p", "no:cacheprovider", "-m", "not peers and not soak",
            *(f"tests/{room}" for room in ROOMS),
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return branches(data)
