"""The user's own code by its name, `pkg.mod:attribute` or `folder/file.py:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fisherviz.support.choices import did_you_mean

_reached: set[str] = set()
"""Folders of the user's that were put on Python's path here."""


def imported(name: str) -> Any:
    """The object that a module or a file has under a name; modules in the current directory are found too.

    A file is imported under a name by which other processes find it too, with its neighbours in reach. Neighbours come
    after all that Python and its libraries have: a file that lies there takes the place of none of them.

    Args:
        name: module or path of a file, and attribute, around a colon.

    Returns:
        The object.

    Raises:
        ValueError: the name has no colon, there is no such module, it has no such attribute, or that is Python's own.
        ImportError: the module cannot be imported.
    """
    where, colon, attribute = name.rpartition(":")
    if not colon or not where or not attribute:
        raise ValueError(f"{name!r} names nothing; write package.module:attribute or folder/file.py:attribute.")
    importlib.invalidate_caches()  # the file may be younger than the last look at its folder
    _reach(Path.cwd())
    module = _from_file(Path(where)) if _is_path(where) else _by_name(where)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [each for each in vars(module) if not each.startswith("_")]
            raise ValueError(f"{where} has no {attribute!r}{did_you_mean(attribute, names)}")
        found = getattr(found, part)
    home = found.__module__ if inspect.isroutine(found) or inspect.isclass(found) else module.__name__
    if {str(home).partition(".")[0], module.__name__.partition(".")[0]} & sys.stdlib_module_names:
        raise ValueError(f"{name!r} is Python's own, and neither a network nor data; name a function of yours.")
    return found


def _is_path(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _reach(folder: Path) -> None:
    """Let modules of a folder be imported, after those of Python and its libraries, before those of earlier folders."""
    if str(folder) not in sys.path:
        first = next((place for place, each in enumerate(sys.path) if each in _reached), len(sys.path))
        sys.path.insert(first, str(folder))
        _reached.add(str(folder))


def _by_name(name: str) -> ModuleType:
    try:
        found = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks another
        near = did_you_mean(name, _modules(Path.cwd()))
        raise ModuleNotFoundError(f"there is no module {name!r} on Python's path or in {Path.cwd()}{near}") from None
    here = Path.cwd().joinpath(*name.split("."))
    for file in (here.with_suffix(".py"), here / "__init__.py"):
        if file.is_file() and not _is(found, file.resolve()):
            raise ValueError(f"{name!r} is the name of {file} and of another module; rename the file.")
    return found


def _modules(folder: Path) -> list[str]:
    """What can be imported from a folder and the folders in it."""
    paths = [path.relative_to(folder) for path in (*folder.glob("*.py"), *folder.glob("*/*.py"))]
    return [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]


def _from_file(path: Path) -> ModuleType:
    if path.suffix != ".py":
        raise ValueError(f"{path} is no Python file; write folder/file.py:attribute.")
    if not path.is_file():
        near = did_you_mean(path.name, [each.name for each in path.parent.glob("*.py")])
        raise ValueError(f"there is no file {path}{near}")
    file = path.resolve()
    _reach(file.parent)  # its neighbours
    package = file.parent
    while (package / "__init__.py").is_file() and package != package.parent:
        package = package.parent
    for root in (Path.cwd().resolve(), package, file.parent):
        if root in file.parents:
            _reach(root)
            name = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            if _finds(name, file):
                return importlib.import_module(name)
    raise ValueError(f"{path} cannot be imported as {file.stem!r}, which is the name of another module; rename it.")


def _finds(name: str, file: Path) -> bool:
    """Whether importing a name imports a file, and not another module of that name."""
    known = sys.modules.get(name)
    if known is not None:
        return _is(known, file)
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a part of the name is another package, or no package
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file


def _is(module: ModuleType, file: Path) -> bool:
    """Whether a module was read from a file."""
    return getattr(module, "__file__", None) is not None and Path(str(module.__file__)).resolve() == file
