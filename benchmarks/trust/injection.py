"""Faults for a process of one's own: killed, interrupted, or refused by the disk, at a moment that is chosen.

Work runs in a fork of this process, which has imported everything already, so that hundreds of tries take minutes.
Writes are those that Python makes below a folder: opening, filling, syncing, moving, making and removing files.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KILL = -1
"""In place of an error: the process is killed before the operation."""
ERRORS = {"full disk": errno.ENOSPC, "no permission": errno.EACCES, "broken disk": errno.EIO}
MAKING = {"open", "write", "sync", "mkdir"}
"""What a full disk refuses: it takes no room to move or to remove."""


@dataclass(frozen=True)
class Ended:
    """How a fork ended.

    Args:
        how: "done", "refused" (an error), "killed" or "interrupted".
        found: what its function returned.
        told: the error, or what a command printed about it.
        raw: whether a traceback was printed, or the error's type is none that the package raises on purpose.
        seconds: from fork to end.
    """

    how: str
    found: Any
    told: str
    raw: bool
    seconds: float


PLANNED = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError, OSError)


def forked(function: Callable[[], Any], kill_after: float | None = None, interrupt_after: float | None = None) -> Ended:
    """Call a function in a fork of this process.

    Args:
        function: returns what JSON holds; commands leave by `SystemExit`.
        kill_after: seconds after which it is killed.
        interrupt_after: seconds after which Ctrl-C reaches it.
    """
    reading, writing = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(function, writing, interrupt_after)
    os.close(writing)
    status = _waited(child, None if kill_after is None else began + kill_after)
    with os.fdopen(reading, "rb") as stream:
        text = stream.read()
    seconds = time.monotonic() - began
    if os.WIFSIGNALED(status) or not text:
        return Ended("killed", None, "", False, seconds)
    found = json.loads(text)
    return Ended(found["how"], found["found"], found["told"], found["raw"], seconds)


def _waited(child: int, end: float | None) -> int:
    while end is not None:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        left = end - time.monotonic()
        if left <= 0:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(min(left, 0.002))
    return os.waitpid(child, 0)[1]


def _child(function: Callable[[], Any], pipe: int, interrupt_after: float | None) -> None:
    torch.set_num_threads(1)  # OpenMP's other threads are not in a fork, which would wait for them
    said = io.StringIO()
    sys.stdout = sys.stderr = said
    how, found, told, raw = "done", None, "", False
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        if interrupt_after is not None:
            signal.setitimer(signal.ITIMER_REAL, interrupt_after)
        found = function()
    except KeyboardInterrupt:
        how = "interrupted"
    except SystemExit as error:
        how = "done" if not error.code else "interrupted" if error.code == 130 else "refused"
        told = said.getvalue()
    except BaseException as error:
        how, told, raw = "refused", f"{error}", not isinstance(error, PLANNED)
        if raw:
            told = traceback.format_exc()
    signal.setitimer(signal.ITIMER_REAL, 0)
    raw = raw or "Traceback" in said.getvalue()
    text = json.dumps({"how": how, "found": found, "told": told, "raw": raw}).encode()
    while text:
        text = text[os.write(pipe, text) :]
    os._exit(0)


class Faults:
    """Writes below a folder, counted; from the one that is chosen on they fail, or the process is killed.

    Args:
        root: the folder.
        at: number of the operation, from 1; 0: none, they are counted only.
        error: an errno of `ERRORS`, or `KILL`.
        once: whether later operations work again.
    """

    def __init__(self, root: Path, at: int = 0, error: int = KILL, once: bool = False) -> None:
        self.root, self.at, self.error, self.once = os.path.realpath(root), at, error, once
        self.count = 0

    def check(self, kind: str, path: Any) -> None:
        """One operation.

        Raises:
            OSError: it is to fail.
        """
        if self.error == errno.ENOSPC and kind not in MAKING:
            return
        self.count += 1
        if not self.at or self.count < self.at or (self.once and self.count > self.at):
            return
        if self.error == KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(self.error, os.strerror(self.error), str(path))

    def install(self) -> Faults:
        """Replace the functions by which Python writes, in this process for good."""
        real_open, real_os_open = builtins.open, os.open

        def opened(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+") or not self.below(file):
                return real_open(file, mode, *rest, **options)
            self.check("open", file)
            return _Stream(real_open(file, mode, *rest, **options), self)

        def os_opened(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.below(path):
                self.check("open", path)
            return real_os_open(path, flags, *rest, **options)

        builtins.open = io.open = opened  # type: ignore[assignment]
        os.open = os_opened  # type: ignore[assignment]
        for name, kind in (
            ("replace", "move"), ("rename", "move"), ("mkdir", "mkdir"), ("unlink", "remove"), ("remove", "remove"),
            ("rmdir", "remove"), ("truncate", "write"),
        ):  # fmt: skip
            setattr(os, name, self._guarded(getattr(os, name), kind))
        os.fsync = self._synced(os.fsync)  # type: ignore[assignment]
        return self

    def below(self, path: Any) -> bool:
        """Whether a path is below the folder."""
        try:
            return os.path.realpath(os.fspath(path)).startswith(self.root)
        except TypeError:
            return False

    def _guarded(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if options.get("dir_fd") is not None or self.below(path):
                self.check(kind, path)
            return function(path, *rest, **options)

        return call

    def _synced(self, function: Callable[[int], None]) -> Callable[[int], None]:
        def call(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}") if os.path.exists("/proc/self/fd") else self.root
            if path.startswith(self.root):
                self.check("sync", path)
            function(descriptor)

        return call


class _Stream:
    """An open file whose writes are operations."""

    def __init__(self, stream: Any, faults: Faults) -> None:
        self._stream, self._faults = stream, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, content: Any) -> int:
        self._faults.check("write", self._stream.name)
        return self._stream.write(content)

    def truncate(self, *size: int) -> int:
        self._faults.check("write", self._stream.name)
        return self._stream.truncate(*size)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stream.close()
