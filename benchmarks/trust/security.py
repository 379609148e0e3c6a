"""Nobody let in: hostile files at every door, hostile names wherever one is shown, pages, imports, dependencies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.markdown import table
from benchmarks.trust import doors, hostile_names
from benchmarks.trust.hostile_files import CANARY, cases

TITLE = "Nobody let in"
ROOT = Path(__file__).parents[2]
HIJACKED = (
    "torch", "numpy", "pandas", "json", "random", "types", "typing", "tqdm", "yaml", "sklearn", "scipy", "matplotlib",
    "safetensors", "pyarrow", "subprocess", "statistics", "secrets", "lzma", "sympy", "mailbox",
)  # fmt: skip
"""Names of Python's and of libraries, which files beside a user's network bear."""


def measure(long: bool) -> dict[str, Any]:
    """Every case at each of its doors, or an eighth of them at one; a part of the names likewise."""
    with tempfile.TemporaryDirectory(prefix="fisherviz-trust-") as folder:
        here = Path.cwd()
        try:
            return {
                "files": _files(Path(folder), long),
                "mutated": doors.mutated(2000 if long else 150),
                "names": _names(Path(folder), long),
                "imports": _imports(Path(folder)),
                "dependencies": _dependencies(),
            }
        finally:
            os.chdir(here)


def _files(folder: Path, long: bool) -> dict[str, Any]:
    (folder / "good").mkdir()
    good = doors.prepared(folder / "good")
    kinds: dict[str, Counter[str]] = {}
    wrong, touched, seconds = [], 0, 0.0
    for number, case in enumerate(cases()):
        if not long and number % 8:
            continue
        for door in case.entries if long else case.entries[:1]:
            place = folder / f"case-{number}-{door.replace(' ', '-')}"
            place.mkdir()
            outcome = doors.tried(case, door, good, place)
            shutil.rmtree(place, ignore_errors=True)
            count = kinds.setdefault(case.kind, Counter())
            count[outcome.ended] += 1
            touched, seconds = max(touched, outcome.touched), max(seconds, outcome.seconds)
            right = outcome.ended == "refused" or (outcome.ended == "taken" and doors.harmless(case, door))
            if not right or outcome.touched > doors.TOUCHED:
                wrong.append(f"{case.kind}, {case.name}, at {door}: {outcome.ended} {outcome.said[:200]}".strip())
    return {
        "kinds": {kind: dict(count) for kind, count in kinds.items()},
        "wrong": wrong, "mib": touched >> 20, "seconds": round(seconds, 1),
    }  # fmt: skip


def _names(folder: Path, long: bool) -> dict[str, Any]:
    names = hostile_names.NAMES
    os.chdir(folder)
    pages, wrong_pages, written = hostile_names.pages(folder, None if long else 2)
    browser = hostile_names.browsed(written)
    commands, wrong_commands = hostile_names.terminals(names, every=3 if long else 30)
    objects, wrong_objects = hostile_names.shown(names if long else names[::9])
    return {
        "names": len(names), "on pages": pages, "browser": browser, "commands": commands, "objects": objects,
        "wrong": [*wrong_pages, *wrong_commands, *wrong_objects],
    }  # fmt: skip


def _imports(folder: Path) -> dict[str, Any]:
    """`--model` from a folder of files with other modules' names, by file and by module, and by `python -m`."""
    place = folder / "hijack"
    place.mkdir()
    for name in HIJACKED:
        (place / f"{name}.py").write_text(f"open({str(place / CANARY)!r}, 'a').write({name!r} + ' ')\n")
    (place / "net.py").write_text("import neighbour\n" + doors.NETWORK)
    (place / "neighbour.py").write_text("")
    wrong, tried = [], 0
    for name in ("net.py:build", "net:build"):
        command = [sys.executable, "-m", "fisherviz", "report", "--model", name, "--data", "digits", "--plan"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
        tried += len(HIJACKED)
        if done.returncode:
            wrong.append(f"{name}: {done.stderr[-300:]}")
        if (place / CANARY).exists():
            wrong.append(f"{name} imported {(place / CANARY).read_text()}from the current folder")
            (place / CANARY).unlink()
    return {"tried": tried, "wrong": wrong}


def _dependencies() -> dict[str, Any]:
    """What the lock holds."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pinned = [line.split("==")[0] for line in text.splitlines() if "==" in line]
    bare = [part.split("==")[0].strip() for part in text.split("\n\n") if "==" in part and "--hash=" not in part]
    return {
        "pinned": len(pinned),
        "hashes": text.count("--hash=sha256:"),
        "without": bare,
        "addresses": text.count("://"),
    }


def broken(found: dict[str, Any]) -> list[str]:
    """Whatever was not refused, not shown as text, or asked for."""
    files, names, browser = found["files"], found["names"], found["names"]["browser"]
    said = [*files["wrong"], *names["wrong"], *found["imports"]["wrong"]]
    said += [f"{found['mutated'][how]} changed files were {how}" for how in ("raw", "killed") if found["mutated"][how]]
    if files["seconds"] > doors.SECONDS:
        said.append(f"a file took {files['seconds']} seconds")
    if browser:
        said += [f"a page: {each}" for each in browser["heard"]]
        said += [f"{browser['reached']} attempts of a page reached a server"] if browser["reached"] else []
        said += [] if browser["reached without a policy"] else ["no attempt would reach a server without a policy"]
    lock = found["dependencies"]
    said += [f"the lock has no hash of {name}" for name in lock["without"]]
    said += ["the lock names an address"] if lock["addresses"] else []
    return said


def words(found: dict[str, Any]) -> list[str]:
    """What was tried, how often, and what came out."""
    files, names, browser, lock = found["files"], found["names"], found["names"]["browser"], found["dependencies"]
    rows = []
    for kind, count in files["kinds"].items():
        taken, refused = count.get("taken", 0), count.get("refused", 0)
        rows.append([kind, f"{sum(count.values()):,}", f"{refused:,}", f"{taken:,}", f"{count.get('ran', 0)}",
                     f"{sum(count.values()) - taken - refused - count.get('ran', 0)}"])  # fmt: skip
    total = sum(sum(count.values()) for count in files["kinds"].values())
    changed = found["mutated"]
    out = [
        "Files that somebody else made are opened without trusting them: weights, checkpoints, saved matrices and "
        "comparisons, configurations, data sets. Nothing in them is run, what they say of their sizes is held against "
        "the bytes that they have, and what is wrong is one sentence that names the file. "
        f"{total:,} times a hostile one was handed to a command or function that reads its kind, in a process whose "
        "memory, time and folder were watched.",
        table(["kind of file", "tried", "refused", "read as plain values", "ran code", "anything else"], rows),
        f"None touched more than {files['mib']} MiB of memory beyond what the modules take, "
        f"or took more than {files['seconds']} s. Read as plain values are files whose harm lies in what nobody reads, "
        "such as pickles in the metadata of a Parquet file. Of "
        f"{changed['refused'] + changed['taken'] + changed['raw']:,} good files with random bytes changed, "
        f"{changed['refused']:,} were refused and {changed['taken']:,} could still be read; "
        f"{changed['raw'] + changed['killed']} did anything else.",
        f"Names are text: {names['names']} of them want to be markup, scripts, formulas, paths, options, styles or "
        f"escape sequences. {names['on pages']} stood as methods, layers, settings and notes in whole reports, "
        "or were refused where no file can hold them, "
        f"{names['objects']} in what objects, tables and pictures show, and {names['commands']:,} calls of all "
        "subcommands failed by one. "
        f"{len(names['wrong'])} became anything else.",
    ]
    if browser:
        out.append(
            f"{browser['pages']} of these pages were opened in Chromium: {len(browser['heard'])} dialogs, complaints "
            f"and requests. From inside a page {browser['attempts']} ways to reach a server were tried (pictures, "
            "scripts, frames, fetch, beacons, sockets, forms, styles): "
            f"{browser['reached']} arrived, and {browser['reached without a policy']} from a page without a policy."
        )
    out += [
        f"`--model` imports what it names: of {found['imports']['tried']} files beside the network with names of "
        f"Python's or libraries' modules, {len(found['imports']['wrong'])} were imported in their place.",
        f"The development environment installs {lock['pinned']} packages by {lock['hashes']:,} hashes in "
        "`requirements.lock`; torch, whose builds differ, by its version. `make lowest` runs the tests with the oldest "
        "versions that `pyproject.toml` admits. A configuration or `--model` names code that is run, as a script is: "
        "take none from people whose code you would not run.",
    ]
    return out
