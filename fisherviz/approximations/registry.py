"""The registry of approximations by name; `register` adds a user's own class to everything that takes a method."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fisherviz.approximations.base import Approximation
from fisherviz.support.choices import did_you_mean, one_of
from fisherviz.support.names import unwritable
from fisherviz.support.tables import html_table, text_table

if TYPE_CHECKING:
    from fisherviz.exact.fisher import Fisher


Method = str | type[Approximation] | Approximation
EXACT = "exact"
"""What the Fisher itself is called beside its approximations."""


class Registry(Mapping[str, type[Approximation]]):
    """Registered approximations: name -> class, in order of registration; iterate for the names."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Approximation]] = {}

    def __getitem__(self, name: str) -> type[Approximation]:
        if name == EXACT and name not in self._classes:
            raise ValueError(
                "'exact' is no approximation: use the Fisher itself for the whole matrix, or the method 'layer' for "
                "its exact diagonal blocks."
            )
        return self._classes[one_of("method", name, self._classes)]

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

    def register(self, name: str, cls: type[Approximation]) -> None:
        """Add an approximation to `approximate`, `compare`, the report, the plots and the optimizers.

        Args:
            name: what it is called from now on.
            cls: a subclass of `Approximation`; a second registration of a name replaces a user's earlier class.

        Raises:
            TypeError: the class is no Approximation.
            ValueError: the name is one of the package's own.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"the name of an approximation must be a non-empty string, got {name!r}.")
        if not (isinstance(cls, type) and issubclass(cls, Approximation)):
            raise TypeError(f"an approximation must be a subclass of fv.Approximation, got {cls!r}.")
        if name == EXACT:
            raise ValueError(f"{EXACT!r} means the exact Fisher itself; register yours under another name.")
        earlier = self._classes.get(name, cls)
        if earlier is not cls and earlier.__module__.startswith("fisherviz."):
            raise ValueError(f"{name!r} is one of fisherviz's own approximations; register yours under another name.")
        _refuse_abstract(cls)
        cls.name = name
        self._classes[name] = cls

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, (cls.__doc__ or "-").strip().splitlines()[0]) for name, cls in self._classes.items()]

    def __repr__(self) -> str:
        return text_table(("method", "what it is"), self._rows(), (0, 1))

    def _repr_html_(self) -> str:
        return html_table(("method", "what it is"), self._rows(), words=(0, 1))


def _refuse_abstract(cls: type[Approximation]) -> None:
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{cls.__name__} is no complete approximation: it must define {' and '.join(missing)}.")


approximations = Registry()
"""All registered approximations."""
register = approximations.register


def make(method: Method, **options: Any) -> Approximation:
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
    signature = inspect.signature(cls)
    try:
        signature.bind(**options)
    except TypeError as error:
        others = [name for name in options if name not in signature.parameters]
        near = did_you_mean(others[0], signature.parameters) if others else "."
        raise TypeError(f"{cls.name} does not take these options ({', '.join(options)}): {error}{near}") from None
    return cls(**options)  # what its constructor raises is its own


def resolve(methods: Iterable[Method] | Mapping[str, Method] | Method | None) -> dict[str, Approximation]:
    """Approximations by their labels, from whatever names them.

    Args:
        methods: names, `Approximation` classes or instances, or a mapping from labels to them; None: all registered.

    Returns:
        Label to approximation; instances are taken as they are.

    Raises:
        TypeError: one is neither a name nor an approximation, or cannot be made without options.
        ValueError: a name is unknown, a label stands twice, for the exact Fisher or for what no file can hold, or there
            is none.
    """
    if methods is None:
        methods = tuple(approximations)
    if isinstance(methods, str | Approximation | type):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods= takes names, Approximation classes or instances, got {type(methods).__name__}.")
    chosen: dict[str, Approximation] = {}
    for label, method in methods.items() if isinstance(methods, Mapping) else ((None, each) for each in methods):
        made = make(method)
        name = str(label) if label is not None else method if isinstance(method, str) else made.name
        if name in chosen:
            raise ValueError(f"method {name!r} is given twice; give labels with a dictionary {{label: method}}.")
        if name == EXACT:
            raise ValueError(f"the label {EXACT!r} means the Fisher itself; give this method another one.")
        if why := unwritable(name):  # before the work, which could not be saved
            raise ValueError(f"the label {name!r} holds {why}; give this method another one.")
        chosen[name] = made
    if not chosen:
        raise ValueError("methods= names no method; leave it out for all of them.")
    return chosen


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
