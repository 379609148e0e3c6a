"""What a process may take of its machine's memory: what is free, and the limits of its container and of itself.

Each source that does not exist (another system, no container, no limit) says nothing; `free` and `whole` take the least
of those that do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_UNLIMITED = 2**60
"""Limits from here on mean none: a control group of version 1 states the largest number of pages."""
_RECLAIMED = ("inactive_file", "active_file", "total_inactive_file", "total_active_file")
"""What counts as used by a control group and is given up where memory is short: cached files."""


def free() -> int:
    """Bytes that this process may still take without swapping."""
    share = min(left for left in (_available(), *(most - used for most, used in _groups())) if left is not None)
    return max(0, min([share // _sharing(), *(most - used for most, used in _own())]))


def whole() -> int:
    """Bytes that this process could take if nothing else ran; the same as long as the limits are."""
    return min([min([_installed(), *(most for most, _ in _groups())]) // _sharing(), *(most for most, _ in _own())])


def _sharing() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available() -> int:
    found = _table(PROC / "meminfo", "MemAvailable").get("MemAvailable")
    return _installed() // 2 if found is None else found


def _installed() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _table(path: str | Path, *names: str) -> dict[str, int]:
    """Lines "name: 12 kB" or "name 12" of a file by name, in bytes; nothing where there is no such file or line.

    These are read at every request, and most files have fifty lines.
    """
    found = re.findall(rf"^({'|'.join(names)})[:\s]\s*(\d+)( kB)?$", _text(path), re.MULTILINE)
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in found}


def _text(path: str | Path) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _groups() -> Iterator[tuple[int, int]]:
    """Limits of the control groups that this process is in, of either version, with what is used and stays so."""
    for line in _text(PROC / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield from _chain(GROUPS, path, ("memory.max", "memory.high"), "memory.current")
        elif "memory" in controllers.split(","):
            yield from _chain(GROUPS / "memory", path, ("memory.limit_in_bytes",), "memory.usage_in_bytes")


def _chain(root: Path, path: str, limits: tuple[str, ...], usage: str) -> Iterator[tuple[int, int]]:
    """Limits of a group and of those that it lies in.

    A container sees its own group as the root, whatever the path says that its host knows it by.
    """
    top = str(root)
    group = os.path.join(top, path.strip("/")).rstrip("/")
    if not os.path.isdir(group):
        group = top
    while len(group) >= len(top):
        for name in limits:
            text = _text(f"{group}/{name}").strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                yield int(text), max(0, int(_text(f"{group}/{usage}") or 0) - _reclaimed(group))
        group = os.path.dirname(group)


def _reclaimed(group: str) -> int:
    found = _table(f"{group}/memory.stat", *_RECLAIMED)
    # version 1 counts this group alone under the short names, and those in it too under the long ones
    own, total = (sum(found.get(name, 0) for name in names) for names in (_RECLAIMED[:2], _RECLAIMED[2:]))
    return max(own, total)


def _own() -> Iterator[tuple[int, int]]:
    """Limits of this process (`ulimit -v`, `ulimit -d`) with what it has."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for what, name in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(what)
        if most != resource.RLIM_INFINITY and (has := _table(PROC / "self/status", name)):
            yield most, has[name]
