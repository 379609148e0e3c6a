"""Rare options of an optimizer: keywords that its constructor passes on, checked by a frozen dataclass.

A class names its dataclass as `Options`; the `TypedDict` beside it is for type checkers and completion alone. Others
rely on `keywords` knowing every option of a class.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from fisherviz.approximations import Approximation
from fisherviz.approximations.registry import approximations, make
from fisherviz.optim.exact import ExactFisher
from fisherviz.optim.settings import check_loss_scale
from fisherviz.support import choices

OWN: dict[str, type[Approximation]] = {"exact": ExactFisher}
"""Methods that only optimizers have."""


class QuadraticKeywords(TypedDict, total=False):
    """Of the quadratic model."""

    T1: int
    T2: int
    tau1: float
    tau2: float
    omega1: float | None
    omega2: float | None


@dataclass(frozen=True)
class QuadraticOptions:
    """Of the quadratic model, whose meaning `NaturalGradient` documents."""

    rescale: bool = False
    adapt: bool = False
    T1: int = 5
    T2: int = 20
    tau1: float = 1 / 8
    tau2: float = 1 / 4
    omega1: float | None = None
    omega2: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("rescale", "adapt"):
            choices.flag(name, getattr(self, name))
        for name in ("T1", "T2"):
            choices.count(name, getattr(self, name))
        for name in ("tau1", "tau2", "omega1", "omega2"):
            value = getattr(self, name)
            if value is not None or name.startswith("tau"):
                choices.share(name, value)
        if self.adapt and not self.rescale:
            raise ValueError("λ and γ are adapted by the re-scaled quadratic model; pass rescale=True or adapt=False.")


@dataclass(frozen=True)
class NaturalGradientOptions(QuadraticOptions):
    """Of `NaturalGradient`."""

    ramp: bool = False
    samples: int = 1
    reduction: str = "mean"
    loss_scale: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        choices.flag("ramp", self.ramp)
        choices.count("samples", self.samples)
        choices.one_of("reduction", self.reduction, ("mean", "sum"))
        check_loss_scale(self.loss_scale)


def keywords(cls: type) -> dict[str, Any]:
    """Every option that a class's constructor takes by name, with its default.

    Args:
        cls: an optimizer, the package's or another.

    Returns:
        Name to default; `inspect.Parameter.empty` where one must be given.
    """
    named = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {key: p.default for key, p in named.items() if key != "self" and p.kind not in several}
    passes_on = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in named.values())
    rare = fields(cls.Options) if passes_on and hasattr(cls, "Options") else ()
    return found | {field.name: field.default for field in rare if field.name not in found}


Parsed = TypeVar("Parsed")


def parse(cls: type, kind: type[Parsed], given: Mapping[str, Any]) -> Parsed:
    """A class's rare options from the keywords that it was given.

    Args:
        cls: the optimizer's class, for the message.
        kind: its dataclass of options.
        given: name to value.

    Returns:
        The options, checked.

    Raises:
        TypeError: there is no such option.
    """
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    for name in given:
        if name not in known:
            raise TypeError(f"{cls.__name__} has no option {name!r}{choices.did_you_mean(name, keywords(cls))}")
    return kind(**given)


def takes_any(cls: type) -> bool:
    """Whether a class's constructor takes keywords of any name, none of them declared by a `TypedDict`."""
    named = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    return any(p.kind == inspect.Parameter.VAR_KEYWORD and "Unpack[" not in str(p.annotation) for p in named)


def split_options(
    cls: type, method: str | type[Approximation] | Approximation, options: Mapping[str, Any]
) -> tuple[NaturalGradientOptions, Approximation]:
    """The optimizer's rare options, and the approximation with the others.

    Args:
        cls: the optimizer's class, for the message.
        method: name, class or instance of the approximation.
        options: name to value.

    Raises:
        TypeError: neither the optimizer nor the approximation has such an option.
    """
    own = {field.name for field in fields(NaturalGradientOptions)}
    others = {name: value for name, value in options.items() if name not in own}
    if isinstance(method, str):
        method = OWN[method] if method in OWN else approximations[method]
    if isinstance(method, type) and not takes_any(method):
        known = keywords(method)
        if unknown := [name for name in others if name not in known]:
            near = choices.did_you_mean(unknown[0], [*keywords(cls), *known])
            raise TypeError(f"{cls.__name__} and its method have no option {unknown[0]!r}{near}")
    mine = {name: value for name, value in options.items() if name in own}
    return NaturalGradientOptions(**mine), make(method, **others)
