"""Faults that once passed unnoticed, or would be hard to see, each with the test that notices it.

Each is one edit of one file of the package. It is made in a copy, never in the package itself, and the named test has
to fail there; without any edit it has to pass.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PASSED, FAILED = 0, 1
"""What pytest answers."""


@dataclass(frozen=True)
class Planted:
    """A fault.

    Attributes:
        words: what it does, for a reader.
        file: of the package.
        old: the code that is replaced, once in the file.
        new: what stands there instead.
        test: node of pytest that must fail.
    """

    words: str
    file: str
    old: str
    new: str
    test: str

    @property
    def room(self) -> str:
        """The folder of the package that it is in."""
        return self.file.split("/")[0]


@contextlib.contextmanager
def copied(root: Path = ROOT) -> Iterator[Path]:
    """A copy of what the tests need, which goes with the context."""
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder)
        for name in ("fisherviz", "tests"):
            shutil.copytree(root / name, there / name)
        shutil.copy(root / "pyproject.toml", there)
        yield there


def edited(source: str, planted: Planted) -> str:
    """The file's text with the fault; RuntimeError where the code has moved on."""
    if source.count(planted.old) != 1:
        raise RuntimeError(
            f"{planted.file} has {source.count(planted.old)} places that read {planted.old!r}, not one; bring the "
            "planted fault up to date with the file."
        )
    return source.replace(planted.old, planted.new)


def outcome(folder: Path, tests: Sequence[str]) -> int:
    """What pytest answers to some tests in a copy; the process is forked, so that torch is imported once.

    Args:
        folder: as `copied` makes it.
        tests: nodes.
    """
    if any(name.split(".")[0] == "fisherviz" for name in sys.modules if name != "fisherviz.__main__"):
        raise RuntimeError("the package is imported already; a copy of it could not be tried in this process.")
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.chdir(folder)
            sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
            sys.dont_write_bytecode = True
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tried(planted: Planted, folder: Path) -> int:
    """What pytest answers to the fault's test with the fault in place; the copy is whole again afterwards."""
    path = folder / "fisherviz" / planted.file
    source = path.read_text(encoding="utf-8")
    path.write_text(edited(source, planted), encoding="utf-8")
    try:
        return outcome(folder, planted.test.split())
    finally:
        path.write_text(source, encoding="utf-8")


def measured(faults: Sequence[Planted]) -> dict[str, bool]:
    """For each fault whether its test notices it.

    Raises:
        RuntimeError: a test fails without any fault, or pytest does not come to an answer.
    """
    found = {}
    with copied() as folder:
        tests = list(dict.fromkeys(test for fault in faults for test in fault.test.split()))
        if outcome(folder, tests) != PASSED:
            raise RuntimeError("a test of the planted faults fails in a package without any; mend it first.")
        for fault in faults:
            answer = tried(fault, folder)
            if answer not in (PASSED, FAILED):
                raise RuntimeError(f"pytest came to no answer for the fault that {fault.words} (exit {answer}).")
            found[fault.words] = answer == FAILED
    return found
