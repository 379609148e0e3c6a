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

from fisherviz._version import __version__
from fisherviz.approximations import Approximation, approximations, make
from fisherviz.comparison.dense import DenseComparison
from fisherviz.comparison.structured import StructuredComparison
from fisherviz.exact.fisher import Fisher, require_fisher
from fisherviz.network.space import ParameterSpace
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.results.comparison import WHOLE, Comparison, row_label
from fisherviz.support.progress import progress_bar

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
    progress: bool = True,
) -> Comparison:
    """Compare approximations with the exact Fisher.

    Args:
        fisher: the exact Fisher.
        methods: names, `Approximation` classes or instances, or a mapping from labels to them; None: all registered.
        damping: of inverses and directions; None: a hundredth of the Fisher's mean eigenvalue, tr F / P.
            `FactoredTikhonov(γ)` damps Kronecker factors, everything else takes λ = γ².
        metrics: names out of `METRICS`; None: all that are exact and affordable for the matrix's size.
        gradient: flat torch-order vector (P,) or dictionary for directions; None: the data's, where it has targets.
        progress: show a progress bar where it takes longer than a moment, on a terminal or in a notebook; False: never.

    Returns:
        A `Comparison`; its `notes` say what was left out.

    Raises:
        ValueError: a method or a metric is unknown or none is left, or a fitted approximation is of another network.
        TypeError: a method is neither a name nor an approximation, or the gradient no tensor.
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
    bar = progress_bar(chosen.items(), "comparing", "method", progress)
    for label, method in bar:
        bar.set_postfix_str(label, refresh=False)  # a refresh would not wait for the moment
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
        _check_fitted(fisher, unfitted)
        return unfitted
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact diagonal there.*")
        return unfitted.fit(fisher.fresh())


def _check_fitted(fisher: Fisher, fitted: Approximation) -> None:
    """A fitted approximation may be of other data or another kind, but not of other parameters or another scale."""
    own, other = _shapes(fisher.space), _shapes(fitted.space)
    if own != other:
        raise ValueError(
            f"the fitted {fitted.name} is of other parameters ({fitted.space.size:,} in layers "
            f"{', '.join(map(repr, fitted.space.names))}) than the Fisher ({fisher.space.size:,} in layers "
            f"{', '.join(map(repr, fisher.space.names))}); fit it on a Fisher of the same probe, or pass its name."
        )
    if fitted.follows_scale and fitted.reduction != fisher.reduction:
        raise ValueError(
            f"the fitted {fitted.name} has reduction {fitted.reduction!r} and the Fisher {fisher.reduction!r}; "
            "fit both with the same reduction=."
        )


def _shapes(space: ParameterSpace) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for layer in space.layers for name, p in layer.parameters.items()}


def _check_metrics(metrics: Iterable[str] | None) -> set[str]:
    if metrics is None:
        return set(METRICS)
    wanted = {metrics} if isinstance(metrics, str) else metrics
    if not isinstance(wanted, Iterable):
        raise TypeError(f"metrics= takes names of metrics, got {type(metrics).__name__}.")
    found = list(wanted)
    if not found:
        raise ValueError("metrics= names no metric; leave it out for all of them.")
    for name in found:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}; metrics are {', '.join(METRICS)}.")
    return set(found)


def _resolve(methods: Iterable[Method] | Mapping[str, Method] | Method | None) -> dict[str, Method]:
    if methods is None:
        return {name: name for name in approximations}
    if isinstance(methods, str | Approximation | type):
        methods = [methods]
    if not isinstance(methods, Iterable):
        raise TypeError(f"methods= takes names, Approximation classes or instances, got {type(methods).__name__}.")
    if isinstance(methods, Mapping):
        labelled = {str(label): method for label, method in methods.items()}
        for method in labelled.values():
            make(method)  # what is no method is refused before anything is computed
    else:
        labelled = _labelled(methods)
    if not labelled:
        raise ValueError("methods= names no method; leave it out for all of them.")
    return labelled


def _labelled(methods: Iterable[Method]) -> dict[str, Method]:
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
        if not isinstance(flat, Tensor) or flat.is_complex():
            what = "a complex tensor" if isinstance(flat, Tensor) else type(flat).__name__
            raise TypeError(f"gradient is a real tensor or a dictionary name -> tensor, got {what}.")
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
