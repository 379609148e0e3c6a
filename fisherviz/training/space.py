"""What a sweep varies: any fields of a configuration, each over choices or a range; grids that ship with the package.

A name is a field, `model_options.NAME` or `optimizer_options.NAME`; any other is an option of the optimizer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError
from fisherviz.support.plain import from_yaml
from fisherviz.training.config import Config, make_config

_RANGE = re.compile(r"^\s*(?P<low>\S+?)\s*\.\.\s*(?P<high>\S+)\s*$")
_OPTIONS = ("model_options", "optimizer_options")


@dataclass(frozen=True)
class Choices:
    """A list of values; what is no plain value is kept as JSON where Optuna sees it."""

    values: tuple[Any, ...]

    @property
    def labels(self) -> tuple[Any, ...]:
        """The values as Optuna stores them."""
        plain = (type(None), bool, int, float, str)
        return tuple(v if isinstance(v, plain) else json.dumps(v, sort_keys=True) for v in self.values)

    def suggest(self, trial: Any, name: str) -> Any:
        """The value of a trial."""
        return trial.suggest_categorical(name, self.labels)

    def value(self, label: Any) -> Any:
        """The value behind what Optuna stores."""
        return self.values[self.labels.index(label)]

    def plain(self) -> Any:
        """As YAML and JSON hold it."""
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, evenly in themselves or in their logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    def suggest(self, trial: Any, name: str) -> Any:
        """The value of a trial."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)

    def value(self, label: Any) -> Any:
        """The value behind what Optuna stores: itself."""
        return label

    def plain(self) -> Any:
        """As YAML and JSON hold it."""
        return {"low": self.low, "high": self.high, "log": self.log}


Space = dict[str, Choices | Range]


def make_space(over: Mapping[str, Any]) -> Space:
    """What is varied, from what a file or flags say.

    Args:
        over: name to a list of values, "LOW..HIGH" (in the logarithm where both are positive numbers with a point or an
            exponent), or a mapping with low, high and log.

    Raises:
        ValueError: nothing is varied, a name is no field, or values are neither.
    """
    if not over:
        raise OptionError("over: name what is varied, for example --over lr=[0.1,0.3].")
    space: Space = {}
    for name, given in over.items():
        whole = field_name(str(name))
        if whole in space:
            raise OptionError(f"over: {whole} is varied twice; give all its values at once.")
        space[whole] = _dimension(str(name), given)
    return space


def field_name(name: str) -> str:
    """The whole name of what is varied."""
    first, dot, _ = name.partition(".")
    if not dot:
        if name in _OPTIONS or name in ("out", "quiet"):
            raise OptionError(f"over: {name!r} cannot be varied; name one of its options, as optimizer_options.lr.")
        return name if name in Config.model_fields else f"optimizer_options.{name}"
    if first not in _OPTIONS:
        raise OptionError(f"over: {unknown('group of options', first, _OPTIONS)}")
    return name


def _dimension(name: str, given: Any) -> Choices | Range:
    if isinstance(given, str) and (found := _RANGE.match(given)):
        ends = [from_yaml(found["low"]), from_yaml(found["high"])]
        given = {"low": ends[0], "high": ends[1], "log": all(isinstance(e, float) and e > 0 for e in ends)}
    if isinstance(given, Mapping):
        if set(given) - {"low", "high", "log"} or not {"low", "high"} <= set(given):
            raise OptionError(f"over: {name} needs low and high, and may have log; got {', '.join(map(str, given))}.")
        low, high, log = given["low"], given["high"], bool(given.get("log", False))
        numbers = all(isinstance(e, int | float) and not isinstance(e, bool) for e in (low, high))
        if not numbers or not low < high or (log and low <= 0):
            raise OptionError(f"over: {name} needs numbers with low < high, above 0 for log; got {low!r} and {high!r}.")
        return Range(low, high, log, isinstance(low, int) and isinstance(high, int))
    values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if any(value != value for value in values):
        raise OptionError(f"over: {name} needs values, got {values!r}, of which NaN is none.")
    made = Choices(tuple(values))
    if not values or len(set(made.labels)) < len(values):  # 1, 1.0 and true are one value for Optuna, and for Python
        raise OptionError(f"over: {name} needs values that differ, got {values!r}.")
    return made


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination of choices, as Optuna stores them.

    Raises:
        ValueError: something is a range.
    """
    for name, dimension in space.items():
        if isinstance(dimension, Range):
            raise OptionError(f"over: {name} is a range; a grid needs lists, or take sampler random or tpe.")
    names = list(space)
    labels = [dimension.labels for dimension in space.values() if isinstance(dimension, Choices)]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*labels)]


def configure(base: Mapping[str, Any], space: Space, point: Mapping[str, Any], **more: Any) -> Config:
    """The configuration at a point.

    Args:
        base: fields that stay the same.
        space: what is varied.
        point: name to value, as Optuna stores it.
        **more: further fields.

    Raises:
        ValueError: a field can't take its value.
    """
    changed: dict[str, Any] = {}
    for name, label in point.items():
        group, dot, option = name.partition(".")
        value = space[name].value(label)
        if dot:
            changed.setdefault(group, {})[option] = value
        else:
            changed[name] = value
    return make_config(base, changed, more)


def probes(space: Space, every: bool) -> list[dict[str, Any]]:
    """Points at which a space is tried before anything runs.

    Args:
        space: what is varied.
        every: all points of a grid; otherwise every choice and both ends of every range, one after the other.
    """
    if every:
        return grid(space)
    ends = {name: d.labels if isinstance(d, Choices) else (d.low, d.high) for name, d in space.items()}
    first = {name: labels[0] for name, labels in ends.items()}
    return [first | {name: label} for name, labels in ends.items() for label in labels]


def presets() -> tuple[str, ...]:
    """Names of the grids that ship with the package."""
    folder = resources.files("fisherviz.training").joinpath("presets")
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def load_preset(name: str) -> dict[str, Any]:
    """A grid that ships with the package: `over`, `metric` and, in `base`, fields that it is for.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in presets():
        raise OptionError(f"preset: {unknown('preset', name, presets())}")
    path = resources.files("fisherviz.training").joinpath("presets", f"{name}.yaml")
    return dict(from_yaml(path.read_text(encoding="utf-8")))
