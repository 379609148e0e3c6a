"""The command line that does a job again: every option that has a value, quoted for a shell."""

from __future__ import annotations

import re
import shlex

from fisherviz.commands.job import Job

_HOW = {"plan", "quiet", "compare_only"}  # what is said or written of it, not what is computed


def command_of(job: Job) -> str:
    """The command of a report.

    Args:
        job: what was reported on.

    Returns:
        One line; what the job left to defaults that depend on the network is left to them again.
    """
    words = ["fisherviz", "report"]
    for name, value in job:
        if value is None or name in _HOW:
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        words += [f"--{name}", text]
    return " ".join(map(_quoted, words))


def _quoted(word: str) -> str:
    r"""A word for a shell; a path's bytes that are no text, which Python holds as halves of pairs, as $'\xe9'."""
    if not any("\udc80" <= letter <= "\udcff" for letter in word):
        return shlex.quote(word)
    escaped = word.replace("\\", r"\\").replace("'", r"\'")
    return "$'" + re.sub("[\udc80-\udcff]", lambda half: f"\\x{ord(half[0]) - 0xDC00:02x}", escaped) + "'"
