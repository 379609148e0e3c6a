"""What one training run is: every field with its default, from Python, a YAML file or flags.

Unknown keys are refused with the nearest name. Fields in `FREE` may change when a run is continued; all
others make it another run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fisherviz.support.choices import unknown
from fisherviz.support.errors import OptionError
from fisherviz.support.plain import from_yaml

FREE = ("epochs", "max_steps", "checkpoint_every", "timings", "tensorboard", "quiet", "out")
"""Fields that a run may be continued with other values of."""
BEFORE = {"defaults": "paper"}
"""What runs were that were begun before these fields were there."""


class Config(BaseModel):
    """One training run.

    Raises:
        ValueError: a field is unknown or has a value that it can't take.

    Example:
        >>> Config(optimizer="foof", optimizer_options={"lr": 0.1}).epochs
        10
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    dataset: str = Field("digits", description="Data set (digits, mnist, ...) or pkg.mod:loader of a Dataset.")
    size: int | None = Field(None, ge=1, description="Side that images are scaled to.")
    task: str | None = Field(None, description="classification, regression or autoencoder.")
    standardise: bool | None = Field(None, description="Whether inputs are standardised on the training examples.")
    limit: int | None = Field(None, ge=1, description="Keep only the first training examples.")
    data_seed: int = Field(0, ge=0, description="Of splits and drawn curves.")
    holdout: float = Field(
        0.0, ge=0.0, lt=1.0,
        description="Share of the training examples kept for validation; 0: the test part validates.",
    )  # fmt: skip

    model: str = Field("kfac-mlp", description="Network (kfac-mlp, foof-mlp, ...) or pkg.mod:factory.")
    model_options: dict[str, Any] = Field(default_factory=dict, description="Options of the network.")
    likelihood: str | None = Field(None, description="categorical, bernoulli or gaussian.")
    dtype: Literal["float32", "float64"] = Field("float32", description="Floating-point type.")

    optimizer: str = Field("kfac", description="Optimizer (kfac, foof, adam, ...) or pkg.mod:Class.")
    optimizer_options: dict[str, Any] = Field(default_factory=dict, description="Options of the optimizer.")
    defaults: Literal["training", "paper"] = Field(
        "training", description="Of the optimizer's options: those that train, or its paper's."
    )
    averaging: float | None = Field(
        None, ge=0.0, lt=1.0, description="ξ of the averaged iterate that is evaluated too (K-FAC paper: 0.99)."
    )

    epochs: int = Field(10, ge=1, description="Passes over the training examples.")
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps.")
    batch_size: int = Field(100, ge=0, description="Examples per step; 0: all.")
    batch_full_at: int | None = Field(
        None, ge=2, description="Step at which exponentially growing batches hold all examples (K-FAC paper: 500)."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of weights, batches and everything else that is random.")
    device: str = Field("cpu", description="Where to compute: cpu, cuda, cuda:1, ...")

    evaluate_every: int = Field(1, ge=1, description="Epochs between evaluations; the last is evaluated in any case.")
    evaluate_limit: int | None = Field(None, ge=1, description="Training examples that are evaluated.")
    log_every: int = Field(1, ge=1, description="Steps between lines of metrics.")
    timings: bool = Field(True, description="Whether each step's time is split into its parts.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    tensorboard: bool | None = Field(None, description="Whether TensorBoard is written too; unset: if installed.")

    monitor: bool = Field(False, description="Whether approximations are compared with the exact Fisher on the way.")
    monitor_every: int = Field(50, ge=1, description="Steps between comparisons.")
    monitor_methods: list[str] = Field(
        default_factory=lambda: ["kfac", "foof"], description="Approximations that are monitored."
    )
    monitor_examples: int = Field(256, ge=1, description="Training examples that the monitored Fisher is taken over.")

    out: Path | None = Field(None, description="Folder of the run; unset: runs/DATASET-MODEL-OPTIMIZER-SEED.")
    quiet: bool = Field(False, description="No progress bar.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        for key in given if isinstance(given, Mapping) else ():
            if key not in cls.model_fields:
                raise ValueError(unknown("field", str(key), cls.model_fields))
        return given

    @property
    def directory(self) -> Path:
        """Where the run is written."""
        if self.out is not None:
            return self.out
        parts = [self.dataset, self.model, self.optimizer, str(self.seed)]
        return Path("runs") / "-".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)

    def identity(self) -> dict[str, Any]:
        """The fields that make this run another than a run with other values, as plain values."""
        return {key: value for key, value in self.plain().items() if key not in FREE}

    def plain(self) -> dict[str, Any]:
        """All fields as values that YAML and JSON hold."""
        return self.model_dump(mode="json")


def make_config(*sources: Mapping[str, Any]) -> Config:
    """A configuration from mappings, the later ones before the earlier ones; option mappings are joined.

    Args:
        *sources: fields and values, for example a file's and then the flags'.

    Raises:
        ValueError: in one sentence, the field and what is wrong with it.
    """
    fields: dict[str, Any] = {}
    for source in sources:
        for key, value in source.items():
            joined = key in ("model_options", "optimizer_options") and isinstance(value, Mapping)
            fields[key] = {**(fields.get(key) or {}), **value} if joined else value
    try:
        return Config(**fields)
    except ValidationError as error:
        raise OptionError(_told(error)) from None


def read_config(path: str | Path) -> dict[str, Any]:
    """The fields that a YAML file gives.

    Args:
        path: the file.

    Raises:
        ValueError: there is none, or it is no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"config: {path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    try:
        found = from_yaml(text)
    except ValueError as error:
        raise OptionError(f"config: {path} is no YAML of fields: {error}.") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise OptionError(f"config: {path} holds {type(found).__name__}, not fields with values.")
    return found


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    where = ".".join(str(part) for part in first["loc"])
    given = "" if not where or isinstance(first["input"], dict) else f", not {first['input']!r}"
    return f"{where}: {message[0].lower()}{message[1:]}{given}" if where else message
