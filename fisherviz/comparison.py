"""compare(): every approximation against the exact Fisher, per block and as a whole, with what each one costs.

Small matrices are compared dense in float64; larger ones by exact inner products in example space, without their
P x P arrays. The result is plain data (`results.Comparison`); what could not be measured is named in its notes.
"""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fisherviz._version import __version__
from fisherviz.approximations import Approximation, approximations, make
from fisherviz.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.dense_comparison import DenseComparison
from fisherviz.fisher import Fisher, require_fisher
from fisherviz.results import WHOLE, Comparison, row_label
from fisherviz.structured_comparison import StructuredComparison

METRICS = (
    "relative_frobenius", "relative_spectral", "relative_nuclear", "relative_max", "frobenius_cosine",
    "inverse_frobenius", "direction_cosine", "direction_error", "model_decrease", "model_decrease_rescaled", "kl",
    "off_unit_share", "seconds", "passes", "bytes",
)  # fmt: skip
DENSE_PARAMETERS = 3000
"""Matrices up to this size are compared dense."""
_DEFAULT_DAMPING = 1e-2

Method = str | type[Approximation] | Approximation


def compare(
    fisher: Fisher,
    methods: Iterable[Method] | Mapping[str, Method] | Method | None = None,
    *,
    damping: float | Damping | None = None,
    metrics: Iterable[str] | None = None,
    gradient: Tensor | Mapping[str, Tensor] | None = None,
    progress: bool = False,
) -> Comparison:
    """Compare approximations with the exact Fisher.

    Args:
        fisher: the exact Fisher.
        methods: names, `Approximation` classes or instances, or a mapping from labels to them; None: all registered.
        damping: of inverses and directions; None: a hundredth of the Fisher's mean eigenvalue, tr F / P.
            `FactoredTikhonov(γ)` damps Kronecker factors, everything else takes λ = γ².
        metrics: names out of `METRICS`; None: all that are exact and affordable for the matrix's size.
        gradient: flat torch-order vector (P,) or dictionary for directions; None: the data's, where it has targets.
        progress: show a progress bar.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: a method or a metric is unknown.
        NotImplementedError: a method that was asked for by name refuses a layer.
    """
    require_fisher(fisher, "fv.compare")
    wanted = _check_metrics(metrics)
    chosen = _resolve(methods)
    notes: list[str] = []
    rule = as_damping(damping)
    if rule is None:
        mean = fisher.norm("trace") / fisher.shape[0]
        rule = Tikhonov(_DEFAULT_DAMPING * mean)
        notes.append(f"damping was not given: λ = {rule.value:.3g}, a hundredth of the Fisher's mean eigenvalue.")
    strength = rule.gamma**2 if isinstance(rule, FactoredTikhonov) else rule.value
    slope = _gradient(fisher, gradient, wanted, notes)
    unit = fisher.seconds_per_pass()
    dense = fisher.shape[0] <= DENSE_PARAMETERS
    kind = DenseComparison if dense else StructuredComparison
    measured = kind(fisher, rule, strength, slope, wanted, metrics is not None)
    rows: list[tuple[str, str, str, str, float]] = []
    bar = tqdm(chosen.items(), disable=not progress, desc="comparing", unit="method")
    for label, method in bar:
        bar.set_postfix_str(label)
        try:
            fitted = _fit(fisher, method)
        except NotImplementedError as error:
            if methods is not None:
                raise
            notes.append(f"{label} is left out: {error}")
            continue
        costs = {"seconds": fitted.seconds, "passes": fitted.seconds / unit, "bytes": float(fitted.bytes)}
        rows += [(label, WHOLE, WHOLE, name, value) for name, value in costs.items() if name in wanted]
        rows += [(label, *row) for row in measured.rows(label, fitted)]
    if "off_unit_share" in wanted and "cw-ngd" in chosen:
        rows += [("cw-ngd", row, row, "off_unit_share", value) for row, value in off_unit_share(fisher).items()]
    notes += measured.notes
    frame = pd.DataFrame(rows, columns=["method", "row", "col", "metric", "value"])
    meta = _meta(fisher, rule, strength, unit, notes)
    return Comparison(frame, meta, measured.arrays)


def off_unit_share(fisher: Fisher) -> dict[str, float]:
    """Share of each structured layer's ‖F_l‖² that lies off its unit blocks (Sang et al. 2022, eqs. 5-7).

    Args:
        fisher: the exact Fisher.

    Returns:
        Layer name to share; zero layers are absent.
    """
    shares: dict[str, float] = {}
    for i, layer in enumerate(fisher.space.layers):
        if layer.structured:
            total = fisher.norm("fro", block=(i, i)) ** 2
            if total > 0:
                shares[row_label(layer.name)] = max(0.0, 1.0 - fisher.units_square_norm(i) / total)
    return shares


def _fit(fisher: Fisher, method: Method) -> Approximation:
    """Fit on a Fisher without memory, so that the seconds pay for the passes."""
    unfitted = make(method)
    if "matrix" in unfitted.__dict__:
        return unfitted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact diagonal there.*")
        return unfitted.fit(fisher.fresh())


def _check_metrics(metrics: Iterable[str] | None) -> set[str]:
    if metrics is None:
        return set(METRICS)
    wanted = {metrics} if isinstance(metrics, str) else set(metrics)
    unknown = sorted(wanted - set(METRICS))
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; metrics are {', '.join(METRICS)}.")
    return wanted


def _resolve(methods: Iterable[Method] | Mapping[str, Method] | Method | None) -> dict[str, Method]:
    if methods is None:
        return {name: name for name in approximations}
    if isinstance(methods, Mapping):
        return dict(methods)
    if isinstance(methods, str | Approximation | type):
        methods = [methods]
    chosen: dict[str, Method] = {}
    for method in methods:
        label = method if isinstance(method, str) else make(method).name
        if label in chosen:
            raise ValueError(f"method {label!r} is given twice; give labels with a dictionary {{label: method}}.")
        if isinstance(method, str):
            approximations[method]
        chosen[label] = method
    return chosen


def _gradient(
    fisher: Fisher, gradient: Tensor | Mapping[str, Tensor] | None, wanted: set[str], notes: list[str]
) -> Tensor | None:
    if gradient is not None:
        flat = fisher.space.flatten(gradient) if isinstance(gradient, Mapping) else gradient
        if not isinstance(flat, Tensor):
            raise TypeError(f"gradient is a tensor or a dictionary name -> tensor, got {type(flat).__name__}.")
        if not bool(torch.isfinite(flat).all()):
            raise ValueError("gradient contains NaN or infinity; recompute it.")
        if not bool(flat.any()):
            notes.append("directions are left out: the gradient is zero.")
        if flat.shape != (fisher.shape[0],):
            raise ValueError(f"gradient must have {fisher.shape[0]} entries, got shape {tuple(flat.shape)}.")
        return flat.detach().to(fisher.probe.device)
    directions = {"direction_cosine", "direction_error", "model_decrease", "model_decrease_rescaled"}
    if not wanted & directions:
        return None
    if not fisher.data.certainly_without_targets and fisher.has_targets():
        return fisher.gradient()
    notes.append("directions are left out: the data has no targets; pass them, or gradient=.")
    return None


def _meta(fisher: Fisher, rule: Damping, strength: float, unit: float, notes: list[str]) -> dict[str, Any]:
    probe = fisher.probe
    return {
        "fisherviz": __version__,
        "torch": torch.__version__,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "kind": fisher.kind,
        "samples": fisher.samples,
        "reduction": fisher.reduction,
        "likelihood": repr(probe.likelihood),
        "damping": strength,
        "examples": fisher.examples,
        "parameters": fisher.shape[0],
        "layers": [
            {
                "name": row_label(info.name), "kind": info.kind, "path": info.path, "parameters": list(info.parameters),
                "num_parameters": info.num_parameters, "in_features": info.in_features,
                "out_features": info.out_features, "bias": info.bias, "skipped_reason": info.note,
            }
            for info in probe.layers
        ],
        "left_out": [{"name": name, "why": why} for name, why in probe.left_out],
        "fingerprints": {"data": fisher.data.fingerprint, "weights": fisher.weights_fingerprint},
        "settings": {"damping": repr(rule), "dtype": str(probe.dtype).removeprefix("torch.")},
        "forward_backward_seconds": unit,
        "notes": notes,
    }  # fmt: skip
