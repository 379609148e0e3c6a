"""A row in a process of its own, and what it was measured on; what `benchmarks.fisher` and `benchmarks.optim` share."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
_DISTRIBUTIONS = {
    "nngeometry": "nngeometry",
    "ASDL": "asdfghjkl",
    "BackPACK": "backpack-for-pytorch",
    "curvlinops": "curvlinops-for-pytorch",
    "Opacus": "opacus",
}


def in_own_process(module: str, arguments: Sequence[str], threads: int = 1, huge_pages: bool = False) -> dict[str, Any]:
    """Run a module that prints its row as JSON on its last line.

    Args:
        module: such as benchmarks.fisher.
        arguments: of its command line.
        threads: of the process.
        huge_pages: whether torch asks for huge pages (Linux).

    Returns:
        The row.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if huge_pages:
        environment["THP_MEM_ALLOC_ENABLE"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Cores, Python and the packages' versions."""
    packages = {"torch": str(torch.__version__)}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            packages[name] = version(distribution)
        except PackageNotFoundError:
            continue
    return {"packages": packages, "python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
