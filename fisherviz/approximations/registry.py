"""The registry of approximations by name; `register` adds a user's own class to everything that takes a method."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fisherviz.approximations.base import Approximation

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


class Registry(Mapping[str, type[Approximation]]):
    """Registered approximations: name -> class, in order of registration; iterate for the names."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Approximation]] = {}

    def __getitem__(self, name: str) -> type[Approximation]:
        if name not in self._classes:
            near = difflib.get_close_matches(str(name), self._classes, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"method must be one of {', '.join(self._classes)}, got {name!r}{hint}.")
        return self._classes[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The class of a name, or the default."""
        return self._classes.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __call__(self) -> tuple[str, ...]:
        """Names of the registered approximations."""
        return tuple(self._classes)

    def add(self, name: str, cls: type[Approximation]) -> None:
        """Register a class; see `register`."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of an approximation must be a non-empty string, got {name!r}.")
        if not (isinstance(cls, type) and issubclass(cls, Approximation)):
            raise TypeError(f"an approximation must be a subclass of fv.Approximation, got {cls!r}.")
        if name in self._classes and self._classes[name] is not cls and _is_ours(self._classes[name]):
            raise ValueError(f"{name!r} is one of fisherviz's own approximations; register yours under another name.")
        _refuse_abstract(cls)
        cls.name = name
        self._classes[name] = cls

    def __repr__(self) -> str:
        width = max(map(len, self._classes))
        lines = [
            f"{name.ljust(width)}  {(cls.__doc__ or '').strip().splitlines()[0]}" for name, cls in self._classes.items()
        ]
        return "\n".join(lines)


def _refuse_abstract(cls: type[Approximation]) -> None:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{cls.__name__} is no complete approximation: it must define {' and '.join(missing)}.")


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("fisherviz.")


approximations = Registry()
"""All registered approximations."""


def register(name: str, cls: type[Approximation]) -> None:
    """Add an approximation to `approximate`, `compare`, the report, the plots and the optimizers.

    Args:
        name: what it is called from now on.
        cls: a subclass of `Approximation`; a second registration of a name replaces a user's earlier class.

    Raises:
        TypeError: the class is no Approximation.
        ValueError: the name is one of the package's own.
    """
    approximations.add(name, cls)


def make(method: str | type[Approximation] | Approximation, **options: Any) -> Approximation:
    """An unfitted approximation from a name or a class, with its options.

    Raises:
        ValueError: the name is unknown.
        TypeError: an option is unknown, or the method is neither a name nor a class.
    """
    if isinstance(method, Approximation):
        if options:
            raise TypeError(
                f"options ({', '.join(options)}) go with a name or a class, and this {method.name} is an instance; "
                f"pass its class, or give {type(method).__name__}(...) the options."
            )
        return method
    cls = approximations[method] if isinstance(method, str) else method
    if not (isinstance(cls, type) and issubclass(cls, Approximation)):
        raise TypeError(f"method must be a name or a subclass of fv.Approximation, got {type(method).__name__}.")
    _refuse_abstract(cls)
    try:
        return cls(**options)
    except TypeError as error:
        raise TypeError(f"{cls.name} does not take these options ({', '.join(options)}): {error}.") from None


def approximate(fisher: Fisher, method: str | type[Approximation], **options: Any) -> Approximation:
    """Build an approximation of a Fisher from its data.

    Args:
        fisher: the exact Fisher.
        method: a name out of `fv.approximations`, or an `Approximation` class.
        **options: the approximation's own options, such as `setting="reduce"` for "kfac" or `rank=2` for
            "nearest-kronecker".

    Returns:
        The fitted approximation: `to_dense`, `block`, `@`, `diagonal`, `norm`, `damped`, `solve`, `inverse`.

    Raises:
        ValueError: the method is unknown.
        TypeError: an option is unknown.
    """
    return make(method, **options).fit(fisher)
