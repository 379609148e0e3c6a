"""Rare options of an optimizer: keywords that its constructor passes on, under names that its class declares.

A class names as `Options` the `TypedDict` of its rare keywords, `NaturalGradient` the frozen dataclass that checks what
all pass on to it. Others rely on `keywords` knowing every option of a class.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fisherviz.approximations import Approximation
from fisherviz.approximations.registry import approximations, make
from fisherviz.optim.exact import ExactFisher
from fisherviz.optim.settings import check_loss_scale
from fisherviz.support import choices

OWN: dict[str, type[Approximation]] = {"exact": ExactFisher}
"""Methods that only optimizers have."""


DIRECTION = {"lr": 0.1, "damping": 1.0, "momentum": 0.9, "kl_clip": 1e-3, "min_damping": 0.0}
"""What trains, for steps along directions: lr, momentum and κ as in kfac-pytorch; where F does not reach, lr/λ is SGD's
usual 0.1. Factors averaged over steps take λ = 0.1."""
MODEL = {"lr": 1.0, "damping": 1.0, "momentum": 1.0, "kl_clip": 0.1, "min_damping": 1.0}
"""What trains, for steps of the quadratic model, which is that of one mini-batch and of low rank: λ stays at 1 or more,
as wherever F is that of one mini-batch. κ is 1e-3/(1 − 0.9)², what momentum makes of the κ of `DIRECTION` at most."""
GIVEN = {"damping": None, "momentum": 0.0, "kl_clip": math.inf, "min_damping": 0.0}
"""What goes with a learning rate of one's own in `NaturalGradient`: nothing that one has not asked for."""


@dataclass(frozen=True)
class NaturalGradientOptions:
    """Rare options of `NaturalGradient`, which documents them."""

    ramp: bool = False
    samples: int = 1
    reduction: str = "mean"
    loss_scale: float | None = None
    kl_clip: float | None = None
    min_damping: float | None = None
    rescale: bool = False
    adapt: bool = False
    T1: int = 5
    T2: int = 20
    tau1: float = 1 / 8
    tau2: float = 1 / 4
    omega1: float | None = None
    omega2: float | None = None
    gamma_by: str = "model"
    ownership: str = "all"

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("ramp", "rescale", "adapt"):
            choices.flag(name, getattr(self, name))
        for name in ("samples", "T1", "T2"):
            choices.count(name, getattr(self, name))
        if self.kl_clip is not None and not (choices.is_number(self.kl_clip) and self.kl_clip > 0):
            raise ValueError(f"kl_clip must be a positive number, math.inf for no bound, got {self.kl_clip!r}.")
        if self.min_damping is not None:
            choices.number("min_damping", self.min_damping, 0.0)
        for name in ("tau1", "tau2", "omega1", "omega2"):
            if name.startswith("tau") or getattr(self, name) is not None:
                choices.share(name, getattr(self, name))
        choices.one_of("gamma_by", self.gamma_by, ("model", "objective"))
        choices.one_of("ownership", self.ownership, ("all", "one"))
        choices.one_of("reduction", self.reduction, ("mean", "sum"))
        check_loss_scale(self.loss_scale)
        if self.adapt and not self.rescale:
            raise ValueError("λ and γ are adapted by the re-scaled quadratic model; pass rescale=True or adapt=False.")


def check_ownership(method: Approximation) -> None:
    """Refuse owners of layers where a method has no inverses of single layers.

    Args:
        method: the approximation.

    Raises:
        ValueError: it couples layers, or keeps their bases among its statistics.
    """
    kind = type(method)
    coupled = kind.pairs is not Approximation.pairs or kind.assemble is not Approximation.assemble
    if coupled or kind.refine is not Approximation.refine:
        why = "couples layers" if coupled else "keeps the layers' bases among its statistics, which all processes have"
        raise ValueError(
            f"ownership='one' is for methods that invert each layer's matrix alone, and {method.name} {why}; "
            "leave ownership='all'."
        )


def filled(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, with a default for what is None."""
    return {name: defaults[name] if value is None else value for name, value in given.items()}


def keywords(cls: type) -> dict[str, Any]:
    """Every option that a class's constructor takes by name, with its default.

    Args:
        cls: an optimizer, the package's or another.

    Returns:
        Name to default; `inspect.Parameter.empty` where one must be given, None for rare ones.
    """
    named = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    found = {key: p.default for key, p in named.items() if key != "self" and p.kind not in several}
    passes_on = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in named.values())
    rare = cls.Options.__annotations__ if passes_on and hasattr(cls, "Options") else ()
    return dict.fromkeys(rare) | found


def require_known(cls: type, given: Mapping[str, Any]) -> None:
    """Refuse keywords that a class does not declare, with the nearest that it does.

    Raises:
        TypeError: there is no such option.
    """
    for name in given:
        if name not in cls.Options.__annotations__:  # type: ignore[attr-defined]
            raise TypeError(f"{cls.__name__} has no option {name!r}{choices.did_you_mean(name, keywords(cls))}")


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
    own = NaturalGradientOptions.__annotations__
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
