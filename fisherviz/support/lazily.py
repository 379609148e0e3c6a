"""Packages whose names are imported when they are first asked for, so that `fisherviz --help` does not wait for torch.

Type checkers read the same names from imports under TYPE_CHECKING; a test holds the two lists equal.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any


def lazily(package: str, names: Mapping[str, Sequence[str]], modules: Mapping[str, str] | None = None) -> None:
    """Let a package offer names that it imports when they are first asked for.

    Args:
        package: its `__name__`.
        names: module to the names that are taken from it; one may be called like the module itself.
        modules: name to module, for modules that are offered as they are.
    """
    where = {name: (module, name) for module, offered in names.items() for name in offered}
    where |= {name: (module, "") for name, module in (modules or {}).items()}

    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name not in where:
                raise AttributeError(f"module {package!r} has no attribute {name!r}")
            module, attribute = where[name]
            found = importlib.import_module(module)
            self.__dict__[name] = getattr(found, attribute) if attribute else found
            return self.__dict__[name]

        def __setattr__(self, name: str, value: Any) -> None:
            # the import system binds a submodule to its name here, over the name of the same spelling that is offered
            if isinstance(value, ModuleType) and where.get(name) == (value.__name__, name):
                value = getattr(value, name)
            super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*self.__dict__, *where})

    sys.modules[package].__class__ = Lazy
