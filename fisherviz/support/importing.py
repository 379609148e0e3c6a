"""The user's own code by its name, `pkg.mod:attribute` or `folder/file.py:attribute`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from fisherviz.support.choices import did_you_mean


def imported(name: str) -> Any:
    """The object that a module or a file has under a name; modules in the current directory are found too.

    A file is imported under a name by which other processes find it too, with its neighbours in reach, as those of a
    script are.

    Args:
        name: module or path of a file, and attribute, around a colon.

    Returns:
        The object.

    Raises:
        ValueError: the name has no colon, there is no such module, or it has no such attribute.
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
    return found


def _is_path(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _reach(folder: Path) -> None:
    """Let modules of a folder be imported, before any others."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there and lacks another
        near = did_you_mean(name, _modules(Path.cwd()))
        raise ModuleNotFoundError(f"there is no module {name!r} on Python's path or in {Path.cwd()}{near}") from None


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
        return getattr(known, "__file__", None) is not None and Path(str(known.__file__)).resolve() == file
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # a part of the name is another package, or no package
        return False
    return spec is not None and spec.origin is not None and Path(spec.origin).resolve() == file
