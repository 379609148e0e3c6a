"""Each door of the package at which somebody else's file can knock, tried in a process of its own that is watched.

The process has an address space that ends, a clock, and an empty folder; what it did is told by what it left: the
sentence, the memory that it touched, the seconds, and whether the file's code ran.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.trust.hostile_files import CANARY, Case

SECONDS = 10
"""Of the processor, so that a machine that does other things besides changes nothing."""
PATIENCE = 120.0
"""Seconds on the wall after which a process that uses no processor is held to wait for ever."""
ADDRESSES = 4 * 2**30
"""Bytes by which a process's address space may grow."""
TOUCHED = 450 * 2**20
"""Bytes of memory that it may touch beyond what its modules take: twice what a file of a data set may unfold to, and
what torch and Arrow take when they are used first."""
NETWORK = "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(64, 10))\n"
BASE = ("train", "--dataset", "digits", "--limit", "20", "--batch-size", "10", "--epochs", "2", "--model",
        "net.py:build", "--optimizer", "sgd", "--quiet")  # fmt: skip
EXPECTED = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError)


@dataclass(frozen=True)
class Outcome:
    """What came of one knock.

    Args:
        ended: "refused", "taken", "raw" (an error of another class), "unclear" (a refusal that is not one sentence,
            does not name the file, or would steer a terminal), "slow", "killed" or "ran" (the file's code).
        said: the sentence.
        seconds: of the processor.
        touched: bytes of memory beyond what the process had.
    """

    ended: str
    said: str
    seconds: float
    touched: int


def command(*arguments: str) -> None:
    """The command line in this process; its error is raised as it was printed."""
    from fisherviz.cli import app

    out, said = io.StringIO(), io.StringIO()
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
            app(list(arguments))
    except SystemExit as left:
        code = left.code
    if code == 0:
        return
    text = said.getvalue()
    if code not in (1, 2) or not text.endswith("\n"):
        raise AssertionError(f"exit status {code} with {text!r}")
    raise ValueError(text.removesuffix("\n"))


def _weights(path: Path) -> None:
    Path("net.py").write_text(NETWORK)
    command(
        "report", "--model", "net.py:build", "--data", "digits", "--weights", path.name, "--quiet", "--examples", "4"
    )


def _comparison(path: Path) -> None:
    import fisherviz as fv

    found = fv.load_comparison(path)
    repr(found)


def _against(path: Path) -> None:
    command("report", "--against", str(path), "--quiet", "--model", "no.such:thing", "--data", "digits")


def _page(path: Path) -> None:
    import fisherviz as fv

    fv.load_comparison(path).to_html("page.html")


def _run(path: Path) -> None:
    from fisherviz.results.run import load_run

    repr(load_run(path if path.is_dir() else path.parent))


def _resume(path: Path) -> None:
    command(*BASE, "--out", str(path.parent))


def _approximation(path: Path) -> None:
    import fisherviz as fv

    fv.load_approximation(path)


def _data(name: str, path: Path) -> None:
    from fisherviz import datasets

    datasets.load(name, progress=False)


def _sweep(path: Path) -> None:
    Path("net.py").write_text(NETWORK)
    url = path.read_text() if path.name == "url" else f"sqlite:///{path}"
    command("sweep", *BASE[1:-1], "--over", "seed=[0]", "--storage", url, "--out", "out", "--quiet")


def _flag(flag: str, path: Path) -> None:
    command("sweep" if flag == "--over" else "train", flag, path.read_text(), "--out", "out", "--quiet")


DOORS: dict[str, Callable[[Path], None]] = {
    "weights": _weights,
    "comparison": _comparison,
    "against": _against,
    "page": _page,
    "run": _run,
    "resume": _resume,
    "resume config": _resume,
    "approximation": _approximation,
    "config": lambda path: command("train", "--config", path.name, "--out", "out"),
    "sweep config": lambda path: command("sweep", "--config", path.name, "--over", "seed=[0]", "--out", "out"),
    "storage": _sweep,
    "storage url": _sweep,
}
for _name in ("mnist", "weather", "faces", "cifar10-subset", "ecoli", "house"):
    DOORS[f"data {_name}"] = lambda path, name=_name: _data(name, path)
    DOORS[f"check {_name}"] = lambda path, name=_name: command("data", "check", name)
for _name in ("-O", "-M", "--over"):
    DOORS[f"flag {_name}"] = lambda path, name=_name: _flag(name, path)
DOORS["planted"] = lambda path: exec(path.read_text())  # what the tests of this file do wrong on purpose
MODULES = [
    "benchmarks.trust.doors", "fisherviz.cli", "fisherviz.commands.report", "fisherviz.training", "fisherviz.datasets",
    "fisherviz.report", "fisherviz.plotting.sweeps", "pyarrow.parquet", "safetensors.torch", "sklearn.datasets",
    "fisherviz.training.sweep", "optuna.storages", "matplotlib.pyplot", "scipy.ndimage", "torch._dynamo",
    "torch.utils.tensorboard",
]  # fmt: skip


def prepared(folder: Path) -> Path:
    """A folder with a good comparison and a good run, of which each case gets a copy; made once."""
    from fisherviz.training import train
    from tests.factory import make_comparison

    make_comparison(methods=("kfac", "foof")).save(folder / "comparison")
    (folder / "run").mkdir()
    (folder / "run" / "net.py").write_text(NETWORK)
    here, path = Path.cwd(), list(sys.path)
    os.chdir(folder / "run")
    try:
        fields = {"dataset": "digits", "limit": 20, "batch_size": 10, "epochs": 1, "model": "net.py:build",
                  "optimizer": "sgd", "quiet": True, "out": "."}  # fmt: skip
        train(fields)
    finally:
        os.chdir(here)
        sys.path[:] = path
        sys.modules.pop("net", None)
    return folder


def tried(case: Case, door: str, good: Path, folder: Path) -> Outcome:
    """One knock.

    Args:
        case: the file.
        door: at which.
        good: what `prepared` made.
        folder: empty.
    """
    place = _placed(case, door, good, folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(other, door, str(place), str(folder), SECONDS))
    began = time.monotonic()
    process.start()
    other.close()
    told = None
    with contextlib.suppress(EOFError):
        if mine.poll(PATIENCE):
            told = mine.recv()
    waited = time.monotonic() - began
    process.join(1 if told is None else PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    if any(folder.rglob(CANARY)):
        return Outcome("ran", "", waited, 0)
    if told is None:
        late = waited >= PATIENCE or process.exitcode == -signal.SIGXCPU
        return Outcome("slow" if late else "killed", f"exit status {process.exitcode}", waited, 0)
    ended, said, touched, seconds = told
    if ended == "refused":
        names = [case.named or place.name, place.parent.name, *(["--"] if "config" in door or "flag" in door else [])]
        ended = _clear(said, names, folder)  # a field that has a wrong value is named as its flag
    return Outcome(ended, said, seconds, touched)


def harmless(case: Case, door: str) -> bool:
    """Whether a file may be taken: as a mapping of plain values, or for what it holds beside what nobody reads."""
    return case.name.startswith("harmless: ") or (case.kind in ("YAML", "JSON") and door == "run")


def _placed(case: Case, door: str, good: Path, folder: Path) -> Path:
    """The case's files where the door looks for them."""
    if door in ("comparison", "against", "page"):
        shutil.copytree(good / "comparison", folder, dirs_exist_ok=True)
        return case.write(folder)
    if door in ("run", "resume", "resume config"):
        shutil.copytree(good / "run", folder, dirs_exist_ok=True)
        written = case.write(folder)
        return written if door != "resume" else written.replace(folder / "checkpoint.pt")
    return case.write(folder)


def _clear(said: str, names: list[str], folder: Path) -> str:
    """Whether a refusal is one sentence that names the file."""
    line = said.strip()
    steers = any(not character.isprintable() for character in line)
    clear = line and not steers and len(line) < 1500 and "Traceback" not in line
    return "refused" if clear and any(name and name in line for name in [*names, folder.name]) else "unclear"


def _child(pipe: Any, door: str, place: str, folder: str, allowed: int) -> None:
    """In the process: limits, the knock, what came of it."""
    os.chdir(folder)
    os.environ.update(FISHERVIZ_DATA=f"{folder}/data", XDG_CACHE_HOME=f"{folder}/cache", COLUMNS="100000")
    os.makedirs(f"{folder}/data", exist_ok=True)
    sys.path.insert(0, folder) if door == "resume" else None
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    before = _status()
    limit = before["VmSize"] + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + allowed + 1, int(used) + allowed + 2))
    try:
        DOORS[door](Path(place))
        ended, said = "taken", ""
    except EXPECTED as error:
        ended, said = "refused", str(error)
        if type(error).__module__ == "builtins" and type(error) not in EXPECTED and not isinstance(error, RuntimeError):
            ended, said = "raw", f"{type(error).__name__}: {error}"
        if isinstance(error, RecursionError) or type(error).__module__.split(".")[0] not in ("builtins", "fisherviz"):
            ended, said = "raw", f"{type(error).__name__}: {error}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        ended, said = "raw", f"{type(error).__name__}: {error} ({Path(where.filename).name}, line {where.lineno})"
    touched = max(0, _status()["VmHWM"] - before["VmRSS"])
    pipe.send((ended, said[:3000], touched, time.process_time() - used))
    pipe.close()
    os._exit(0)


def _status() -> dict[str, int]:
    """Sizes of this process in bytes."""
    with open("/proc/self/status") as lines:
        return {
            name: 1024 * int(rest.split()[0])
            for name, _, rest in (line.partition(":") for line in lines)
            if name in ("VmSize", "VmHWM", "VmRSS")
        }


def mutated(count: int, seed: int = 0) -> dict[str, int]:
    """Good files of each format with some bytes changed, cut out or doubled, opened in one watched process.

    Args:
        count: of each format.
        seed: of the changes.

    Returns:
        How many were refused by a ValueError ("refused"), read ("taken"), or something else ("raw"); and "killed", 1 if
        the process did not live to tell.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    mine, other = context.Pipe(duplex=False)
    process = context.Process(target=_mutating, args=(other, count, seed))
    process.start()
    other.close()
    found = {"refused": 0, "taken": 0, "raw": 0, "killed": 1}
    with contextlib.suppress(EOFError):
        found = mine.recv() | {"killed": 0}
    process.join()
    return found


def _mutating(pipe: Any, count: int, seed: int) -> None:
    import random

    import torch
    from safetensors.torch import load, save

    from fisherviz.results.comparison import ARRAYS, COLUMNS, FACTS, TABLE
    from fisherviz.support import opening, pickles, plain
    from fisherviz.support.errors import refusing
    from tests.factory import make_comparison

    def safetensors(content: bytes) -> None:
        with refusing():
            load(content)

    contents = make_comparison(methods=("kfac",), units=1, fan_in=1).to_files()
    state = {"0.weight": torch.arange(20.0), "0.bias": torch.arange(4)}
    streams = [io.BytesIO(), io.BytesIO()]
    torch.save(state, streams[0])
    torch.save(state, streams[1], _use_new_zipfile_serialization=False)
    text = "dataset: digits\nmodel_options: {hidden: [3, 4]}\nseed: 0x1f\nholdout: 1e-1\n"
    formats: list[tuple[bytes, Callable[[bytes], object]]] = [
        (streams[0].getvalue(), pickles.tensors),
        (streams[1].getvalue(), pickles.tensors),
        (save(state), safetensors),
        (contents[ARRAYS], opening.arrays),
        (contents[TABLE], lambda content: opening.table(content, COLUMNS[:4], COLUMNS[4:])),
        (contents[FACTS], plain.from_json),
        (text.encode(), lambda content: plain.from_yaml(content.decode("latin1"))),
    ]
    draw, found = random.Random(seed), {"refused": 0, "taken": 0, "raw": 0}
    for good, opened in formats:
        for _ in range(count):
            content = bytearray(good)
            for _ in range(draw.choice((1, 1, 2, 8, 64))):
                place = draw.randrange(max(1, len(content)))
                match draw.randrange(4):
                    case 0:
                        content[place : place + 1] = bytes([draw.randrange(256)])
                    case 1:
                        content[place : place + 1] = bytes(
                            b ^ 1 << draw.randrange(8) for b in content[place : place + 1]
                        )
                    case 2:
                        del content[place : place + draw.randrange(1, 16)]
                    case _:
                        content[place:place] = content[place : place + draw.randrange(1, 64)]
            try:
                opened(bytes(content))
                found["taken"] += 1
            except ValueError:
                found["refused"] += 1
            except Exception:
                found["raw"] += 1
    pipe.send(found)
    pipe.close()
