"""Comparisons that are not whole yet: what decides their numbers, and finished parts of them as states of tensors."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fisherviz.approximations import Approximation
from fisherviz.capture.witness import Witness, differs
from fisherviz.exact.fisher import Fisher
from fisherviz.network.guest import digest, fingerprint_of
from fisherviz.network.vectors import SampledVectors
from fisherviz.results.comparison import COLUMNS, Comparison
from fisherviz.support.memory import config
from fisherviz.support.processes import plain
from fisherviz.support.versions import code, versions

TEXTS = len(COLUMNS) - 2
"""Columns of a row before its two numbers."""


@dataclass
class Measured:
    """What was measured of one approximation, by whichever process it was.

    Attributes:
        rows: of the table, beginning with its label.
        error: what ended it.
        notes: what is to be said of the measures.
        arrays: what pictures need of it.
        remarks: what is to be said of the approximation.
        seconds: of its fits.
        way: how matrices were compared.
    """

    rows: list[tuple[str, str, str, str, float, float]] = field(default_factory=list)
    error: Exception | None = None
    notes: list[str] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    way: str = ""

    def __getstate__(self) -> dict[str, Any]:
        """As other processes can read it."""
        return {**self.__dict__, "error": None if self.error is None else plain(self.error)}

    def to_state(self) -> dict[str, Any]:
        """As a piece that is kept; without an error, which is met again."""
        return {
            "rows": [(*row[:TEXTS], *map(float, row[TEXTS:])) for row in self.rows], "notes": list(self.notes),
            "arrays": _tensors(self.arrays), "remarks": list(self.remarks), "seconds": list(self.seconds),
            "way": self.way,
        }  # fmt: skip

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Measured:
        """What `to_state` was made of.

        Raises:
            ValueError: it is something else.
            KeyError: a part is missing.
        """
        seconds, way = state["seconds"], state["way"]
        if not isinstance(seconds, list) or not all(isinstance(s, float) for s in seconds) or not isinstance(way, str):
            raise ValueError("its seconds are none")
        return cls(
            _rows(state["rows"]), None, _texts(state["notes"]), _arrays(state["arrays"]), _texts(state["remarks"]),
            seconds, way,
        )  # fmt: skip


def comparison_state(comparison: Comparison) -> dict[str, Any]:
    """A whole comparison as a piece that is kept.

    Args:
        comparison: the comparison.
    """
    rows = [tuple(row) for row in comparison.frame.itertuples(index=False)]
    return {"rows": rows, "arrays": _tensors(comparison.arrays), "meta": json.dumps(comparison.meta)}


def comparison_of(state: Mapping[str, Any]) -> Comparison:
    """What `comparison_state` was made of.

    Args:
        state: of a piece.

    Raises:
        ValueError: it is something else.
        KeyError: a part is missing.
    """
    meta = json.loads(state["meta"])
    if not isinstance(meta, dict):
        raise ValueError("its facts are none")
    return Comparison(pd.DataFrame(_rows(state["rows"]), columns=list(COLUMNS)), meta, _arrays(state["arrays"]))


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays in the type that a comparison holds them in."""
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in arrays.items()}


def _arrays(found: Any) -> dict[str, np.ndarray]:
    if not isinstance(found, dict) or not all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items()):
        raise ValueError("its arrays are none")
    return {name: tensor.numpy() for name, tensor in found.items()}


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ValueError("its notes are no texts")
    return found


def _rows(found: Any) -> list[Any]:
    kinds = (str,) * TEXTS + (float,) * 2
    for row in found:
        if len(row) != len(kinds) or not all(map(isinstance, row, kinds)):
            raise ValueError("its rows are not those of a comparison")
    return list(found)


# ---- what decides the numbers ----------------------------------------------------------------------------------------


def identity(fisher: Fisher, methods: Mapping[str, Approximation], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """What the numbers of a comparison hang on, and are equal bit for bit without: the data are read once for it.

    Args:
        fisher: the exact Fisher.
        methods: the approximations by label, before anything has prepared or fitted them here.
        configuration: whatever else was asked for, as JSON holds it.

    Returns:
        By field; outputs may differ by rounding (`alike_outputs`).
    """
    if not fisher.data.fingerprint:
        for _ in fisher.data:
            pass
    vectors = fisher.vectors
    configured = {
        "kind": fisher.kind, "samples": fisher.samples, "reduction": fisher.reduction,
        "likelihood": repr(fisher.probe.likelihood), "dtype": str(fisher.probe.dtype),
        "device": str(fisher.network.device), "layers": list(fisher.space.names),
        "seed of labels": vectors.seed if isinstance(vectors, SampledVectors) else None,
        "processes": fisher.processes.count, "memory budget": config.memory_budget, **configuration,
    }  # fmt: skip
    return {
        "weights": fisher.weights_fingerprint,
        "data": fisher.data.fingerprint,
        "outputs of the network": _outputs(fisher),
        "configuration": json.loads(json.dumps(configured)) | {f"method {k}": _told(m) for k, m in methods.items()},
        "version": {**versions(), "code of fisherviz": code()},
    }


def _outputs(fisher: Fisher) -> Tensor:
    """Of some examples: weights do not say which function they belong to."""
    inputs, _ = next(iter(fisher.data))
    witness = Witness()
    witness.see(fisher.network, inputs, 0)
    return next((rows.cpu() for _, rows in witness.alone.values()), torch.empty(0, device="cpu"))


def alike_outputs(one: Tensor, other: Tensor) -> bool:
    """Whether outputs differ by no more than rounding explains.

    Args:
        one: of some examples.
        other: likewise.
    """
    same = isinstance(one, Tensor) and one.shape == other.shape and one.dtype == other.dtype
    return same and (not other.numel() or not differs(one, other, other.dtype))


ALIKE = {"outputs of the network": alike_outputs}


def _told(method: Approximation) -> str:
    """An approximation with its options and, if it is a user's own, its code."""
    kind = type(method)
    parts = [f"{kind.__module__}.{kind.__qualname__}"]
    if method.fitted:
        parts.append(digest((*fingerprint_of(method.whole.tensors), method.examples, method.reduction)))
    else:
        parts += [f"{key}={value!r}" for key, value in sorted(vars(method).items()) if key != "seconds"]
    for each in kind.__mro__:
        if not each.__module__.startswith(("fisherviz.", "builtins", "abc")):
            parts.append(f"code {hashlib.sha256(_source(each).encode()).hexdigest()[:16]}")
    return ", ".join(parts)


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into an interpreter
        return ""


def seen(fisher: Fisher, gradient: Tensor | Mapping[str, Tensor] | None) -> str | None:
    """Digest of a gradient that was given.

    Args:
        fisher: whose parameters it is of.
        gradient: the gradient, or None.
    """
    if gradient is None:
        return None
    return digest(fingerprint_of(list(gradient.values()) if isinstance(gradient, Mapping) else [gradient]))
