"""The user's own code by its name, `pkg.mod:attribute`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def imported(name: str) -> Any:
    """The object that `pkg.mod:attribute` names; modules in the current directory are found too.

    Args:
        name: module and attribute around a colon.

    Returns:
        The object.

    Raises:
        ValueError: the name has no colon, or the module has no such attribute.
        ImportError: the module cannot be imported.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError(f"{name!r} names nothing; write package.module:attribute.")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    found = importlib.import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"the module {module_name!r} has no {attribute!r}.")
        found = getattr(found, part)
    return found
