"""Warnings that point at the user's line, however deep the package is in its own work."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def warn(sentence: str) -> None:
    """Warn whoever called the package, also through torch: a step, or a backward that hooks listen to.

    Args:
        sentence: what is said.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)
