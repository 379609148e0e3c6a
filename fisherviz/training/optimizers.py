"""Optimizers by name, with options that are checked against their signatures before anything runs.

The package's presets, torch's baselines, and any class by `pkg.mod:Class`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fisherviz import optim
from fisherviz.comparison.strengths import strengths
from fisherviz.optim.options import keywords, takes_any
from fisherviz.support.choices import count, is_number, one_of, unknown
from fisherviz.support.errors import OptionError, option
from fisherviz.support.importing import imported
from fisherviz.training.baselines import Nesterov
from fisherviz.training.data import Batches

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "kfac": optim.KFAC, "foof": optim.FOOF, "cw-ngd": optim.CWNGD, "ekfac": optim.EKFAC, "tengrad": optim.TENGraD,
    "natural-gradient": optim.NaturalGradient, "subsampled": optim.SubsampledNaturalGradient, "kbfgs": optim.KBFGS,
    "hessian-free": optim.HessianFree, "ksd": optim.KSD,
    "sgd": torch.optim.SGD, "nesterov": Nesterov, "adam": torch.optim.Adam, "lbfgs": torch.optim.LBFGS,
}  # fmt: skip
"""Name to class."""
REQUIRED: dict[str, Any] = {"lr": 0.1, "damping": 0.01}
"""Defaults for options that a class requires."""
DEFAULTS: dict[str, dict[str, Any]] = {"lbfgs": {"line_search_fn": "strong_wolfe"}}
"""Defaults that differ from the class's own: without a line search L-BFGS diverges on mini-batches."""
_GIVEN = ("self", "model", "likelihood", "params", "output", "data", "loss_scale")


@option("optimizer")
def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class behind a name.

    Raises:
        ValueError: there is none.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" not in name:
        raise ValueError(unknown("optimizer", name, OPTIMIZERS))
    found = imported(name)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"{name} is no torch.optim.Optimizer.")
    return found


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an optimizer, with defaults for those that it requires.

    Args:
        name: of the optimizer.
        options: name to value.

    Raises:
        ValueError: the optimizer is unknown, or has no such option.
    """
    cls = find_optimizer(name)
    known = {key: default for key, default in keywords(cls).items() if key not in _GIVEN}
    closed = not takes_any(cls)
    for key in options:
        if key not in known and closed:
            raise OptionError(f"optimizer_options: {unknown(f'option of {name}', str(key), known)}")
    if cls.__module__.startswith("torch.optim"):  # what does not fit ends there in a comparison of types
        for key, value in options.items():
            _require_kind(key, value, known.get(key))
    needed = {key: REQUIRED[key] for key in REQUIRED if known.get(key) is inspect.Parameter.empty}
    return {**needed, **DEFAULTS.get(name, {}), **options}


def _require_kind(key: str, value: Any, default: Any) -> None:
    """Refuse a value that cannot be what an option's default is: a number, or some of them."""
    if isinstance(default, tuple):
        if not isinstance(value, Sequence) or len(value) != len(default) or not all(map(is_number, value)):
            wanted = f"{len(default)} numbers, as {list(default)}"
            raise OptionError(f"optimizer_options: {key} must be {wanted}, got {value!r}.")
    elif is_number(default) and not is_number(value):
        raise OptionError(f"optimizer_options: {key} must be a number, got {value!r}.")


def make_optimizer(
    name: str,
    options: Mapping[str, Any],
    model: nn.Module,
    likelihood: Any,
    batches: Batches,
    defaults: str = "training",
) -> torch.optim.Optimizer:
    """Make an optimizer for a model.

    Args:
        name: of the optimizer.
        options: name to value; `fisher_data` is "independent", "previous", "same", or the size of independent
            mini-batches.
        model: the model.
        likelihood: its likelihood.
        batches: the training examples, for optimizers that look at more than the mini-batch.
        defaults: "paper" for the paper's values of options that are not given, where the class itself has such.

    Raises:
        ValueError: an option is unknown or out of range.
    """
    cls, given = find_optimizer(name), check_options(name, options)
    parameters = inspect.signature(cls.__init__).parameters
    with option("optimizer_options"):
        if "model" not in parameters:
            return cls([p for p in model.parameters() if p.requires_grad], **given)
        if "fisher_data" in parameters:
            given["fisher_data"] = _fisher_data(given.get("fisher_data", "independent"), batches)
        if "data" in parameters:
            given["data"] = batches.once()
        build: Any = cls.paper if defaults == "paper" and "PAPER" in vars(cls) else cls  # type: ignore[attr-defined]
        return build(model, likelihood, **given)


def _fisher_data(wanted: Any, batches: Batches) -> Any:
    """What the option's words stand for; a number: independent mini-batches of so many examples."""
    if isinstance(wanted, int):
        return batches.independent(count("fisher_data", wanted))
    known = {"independent": batches.independent(), "previous": None, "same": "same"}
    return known[one_of("fisher_data", wanted, known)]


def dampings(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What an optimizer shows of its damping and its last step: lr, λ, γ, α, μ, ρ where it has them."""
    group = optimizer.param_groups[0]
    found: dict[str, Any] = {"lr": group.get("lr")} | strengths(optimizer)
    found |= {key: value for key, value in getattr(optimizer, "last", {}).items() if key in ("alpha", "mu", "rho")}
    return {key: float(value) for key, value in found.items() if isinstance(value, int | float)}
