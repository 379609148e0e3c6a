"""compare(): every approximation against the exact Fisher, per block and as a whole, with what each one costs.

Matrices that fit and cost little are compared dense in float64; others without their P x P arrays: by exact inner
products in example space, Lanczos, and random probes whose standard errors the table holds. The result is plain data
(`results.Comparison`); what could not be measured is named in its notes.
"""

from __future__ import annotations

import copy
import datetime
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, Literal, overload

import pandas as pd
import torch
from torch import Tensor

from fisherviz._version import __version__
from fisherviz.approximations import FAILURES, Approximation, resolve
from fisherviz.approximations.registry import Method
from fisherviz.capture.per_example import densified
from fisherviz.comparison import planning
from fisherviz.comparison.budget import Budget
from fisherviz.comparison.costs import Fits, fit, reads_otherwise, together
from fisherviz.comparison.dense import DenseComparison
from fisherviz.comparison.keeping import ALIKE, Measured, identity, seen
from fisherviz.comparison.measures import MEASURES, Question, as_estimate
from fisherviz.comparison.structured import StructuredComparison
from fisherviz.exact.fisher import Fisher, require_fisher
from fisherviz.network.space import ParameterSpace
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.results.comparison import COLUMNS, EXACT, Comparison, check_names, row_label
from fisherviz.results.metrics import METRICS, check_metrics, needing
from fisherviz.support.errors import sentence
from fisherviz.support.files import check_place
from fisherviz.support.memory import give_back, require
from fisherviz.support.numbers import three_digits
from fisherviz.support.pieces import Pieces
from fisherviz.support.plan import Plan
from fisherviz.support.progress import progress_bar, showing
from fisherviz.support.warning import warn

_DEFAULT_DAMPING = 1e-2
_LEAST_DAMPING = 16 * torch.finfo(torch.float32).eps
"""Of the trace, which no eigenvalue exceeds: rounding to float32 stays below it, whatever the model's precision."""


class NothingMeasuredError(ValueError):
    """Nothing of what was asked for can be measured of any method."""


@overload
def compare(
    fisher: Fisher,
    methods: Iterable[Method] | Mapping[str, Method] | Method | None = None,
    *,
    damping: float | Damping | None = None,
    metrics: Iterable[str] | None = None,
    gradient: Tensor | Mapping[str, Tensor] | None = None,
    progress: bool = True,
    plan: Literal[False] = False,
    out: str | os.PathLike[str] | None = None,
) -> Comparison: ...
@overload
def compare(
    fisher: Fisher, methods: Any = None, *, plan: Literal[True], damping: Any = None, metrics: Any = None,
    gradient: Any = None, progress: bool = True, out: Any = None,
) -> Plan: ...  # fmt: skip
def compare(
    fisher: Fisher,
    methods: Iterable[Method] | Mapping[str, Method] | Method | None = None,
    *,
    damping: float | Damping | None = None,
    metrics: Iterable[str] | None = None,
    gradient: Tensor | Mapping[str, Tensor] | None = None,
    progress: bool = True,
    plan: bool = False,
    out: str | os.PathLike[str] | None = None,
) -> Comparison | Plan:
    """Compare approximations with the exact Fisher.

    Args:
        fisher: the exact Fisher.
        methods: names, `Approximation` classes or instances, or a mapping from labels to them; None: all registered.
        damping: of inverses and directions; None: a hundredth of the Fisher's mean eigenvalue, tr F / P, or 2e-6
            tr F where that is larger (above 5,000 parameters): less drowns in float32's rounding.
            `FactoredTikhonov(γ)` damps Kronecker factors, everything else takes λ = γ².
        metrics: names out of `results.metrics`, whatever they cost; None: all that are affordable for this size, where
            what needs matrices written out takes no more than `fv.config.memory_budget`, and few multiply-adds or no
            more than the other way.
        gradient: flat torch-order vector (P,) or dictionary for directions; None: the data's, where it has targets.
        progress: show a progress bar where it takes longer than a moment, on a terminal or in a notebook; False: never.
        plan: say what it will take instead of doing it: passes, multiply-adds, bytes and time, step by step.
        out: a folder that the comparison is saved in, as by `Comparison.save`. Each method is kept there once it is
            measured: the same call after an interruption takes those, and its result is equal bit for bit but for
            what the clock says. What was kept with other weights, data, options or code is not used (a warning says
            so), nor what is damaged.

    Returns:
        A `Comparison`, whose `notes` say what was left out; or its `Plan`.

    Raises:
        ValueError: a method or a metric is unknown, nothing of what was asked for can be measured, or a fitted
            approximation is of another network.
        TypeError: a method is neither a name nor an approximation, or the gradient no tensor.
        MemoryError: a metric that was asked for needs a dense matrix that does not fit.
        RuntimeError: another process is at work on the comparison in `out`.
        OSError: nothing can be written there.
        Exception: what ended the first method, if all of them failed; otherwise those that fail are named in the notes.
    """
    require_fisher(fisher, "fv.compare")
    asked: dict[str, Any] = {"damping": damping, "metrics": metrics, "gradient": gradient, "progress": progress}
    if out is None or plan:
        return compare_in(None, fisher, methods, **asked, plan=plan)
    folder, chosen = check_place(out, directory=True), resolve(methods)
    configuration = {
        "methods": list(chosen), "damping": repr(as_damping(damping)), "gradient": seen(fisher, gradient),
        "metrics": None if metrics is None else sorted(check_metrics(metrics)),
    }  # fmt: skip
    decided = identity(fisher, chosen, configuration)
    with Pieces(Path(folder), decided, "comparison", fisher.processes, warn, ALIKE) as pieces:
        found = compare_in(pieces, fisher, chosen, **asked)
        with fisher.processes.agreeing("the files of a comparison"):
            if fisher.processes.rank == 0:
                pieces.commit(found.to_files())
        return found


def compare_in(
    pieces: Pieces | None,
    fisher: Fisher,
    methods: Any = None,
    *,
    damping: Any = None,
    metrics: Any = None,
    gradient: Any = None,
    progress: bool = True,
    plan: bool = False,
) -> Any:
    """As `compare`, with methods taken from what is kept, and kept as they are finished.

    Args:
        pieces: of a comparison, or of what it is a part of; None: nothing is kept.
        fisher: as for `compare`.
        methods: likewise.
        damping: likewise.
        metrics: likewise.
        gradient: likewise.
        progress: likewise.
        plan: likewise.
    """
    wanted = check_metrics(metrics)
    chosen = resolve(methods)
    check_names(fisher.space.names)
    for approximation in chosen.values():
        if approximation.fitted:
            _check_fitted(fisher, approximation)
    fisher.look()
    budget = Budget(wanted, metrics is not None)
    why_not = fisher.processes.exchange(planning.why_not_dense(fisher, chosen, budget))  # memory may differ
    way = max(why_not, key=len)
    asked = sorted(wanted & needing("matrix")) if metrics is not None and way else []
    if plan:
        return planning.plan(fisher, chosen, bool(asked) or not way, budget)
    if way and not asked:  # matrices are written out where they fit, or are refused for themselves
        with fisher.processes.agreeing("the memory of a comparison"):
            planning.require_room(fisher, chosen, budget)
    with showing(progress and fisher.processes.rank == 0):
        return _compared(fisher, chosen, way, damping, wanted, asked, metrics is not None, gradient, pieces)


def _compared(
    fisher: Fisher,
    chosen: Mapping[str, Approximation],
    why_not_dense: str,
    damping: float | Damping | None,
    wanted: set[str],
    asked: Sequence[str],
    explicit: bool,
    gradient: Tensor | Mapping[str, Tensor] | None,
    pieces: Pieces | None,
) -> Comparison:
    """The comparison; matrices are not written out if it is said why, unless `asked` names metrics that need them."""
    notes: list[str] = []
    rule, strength = strength_of(fisher, damping)
    if damping is None:
        resolved = _LEAST_DAMPING * fisher.shape[0] <= _DEFAULT_DAMPING
        what = "a hundredth of the Fisher's mean eigenvalue" if resolved else "2e-6 of the Fisher's trace"
        notes.append(f"damping was not given: λ = {three_digits(strength)}, {what}.")
    slope = _gradient(fisher, gradient, wanted, notes)
    if asked:
        size, what = planning.dense_bytes(fisher), f"writing the matrices out for {', '.join(asked)}"
        with fisher.processes.agreeing("the memory for dense matrices"):
            require(size, fisher.network.device, what, "probe fewer layers=, or leave these metrics out")
    kind = StructuredComparison if why_not_dense and not asked else DenseComparison
    measured = kind(Question(fisher, rule, strength, slope, wanted, explicit, why_not_dense))
    outcomes = {} if pieces is None else _taken(pieces, chosen, kind.__name__)
    left = {label: approximation for label, approximation in chosen.items() if label not in outcomes}
    finished = [copy.copy(chosen[label]) for label in outcomes if not chosen[label].fitted]
    fits = fit(fisher, left, wanted, [each for each in finished if reads_otherwise(fisher, each)])
    errors = fits.errors
    give_back()
    measured.prepare({label: fitted for label, fitted in left.items() if label not in errors})
    give_back()
    bar = progress_bar(len(chosen), "comparing", "method")
    bar.update(len(outcomes))

    def measure(label: str) -> Measured:
        bar.set_postfix_str(label, refresh=False)  # a refresh would not wait for the moment
        notes, arrays = len(measured.notes), set(measured.arrays)
        found = Measured(remarks=fits.remarks.get(label, []), seconds=fits.seconds.get(label, []), way=kind.__name__)
        fitted = chosen[label]
        try:
            if label not in errors:
                found.rows = [(label, *row) for row in measured.rows(label, fitted, fits.cost(label, fitted))]
        except FAILURES as error:
            found.error = error
        found.notes = measured.notes[notes:]
        found.arrays = {name: array for name, array in measured.arrays.items() if name not in arrays}
        if pieces is not None and found.rows:
            pieces.keep(piece_of(label), found.to_state())
        bar.update()
        return found

    of_all, arrays = list(measured.notes), dict(measured.arrays)
    with bar:
        mine = fisher.deal(list(left), measure, "the measures of approximations")
    outcomes |= dict(zip(left, mine, strict=True))
    outcomes = {label: outcomes[label] for label in chosen}
    remarks = [*together({label: found.remarks for label, found in outcomes.items()}), *fits.notes, *of_all]
    fits.seconds = {label: found.seconds for label, found in outcomes.items() if found.seconds}
    rows = [row for found in outcomes.values() for row in found.rows]
    errors |= {label: found.error for label, found in outcomes.items() if found.error is not None}
    for found in outcomes.values():
        remarks += found.notes
        arrays |= found.arrays
    if len(errors) == len(chosen):
        raise next(iter(errors.values()))
    for i, layer in enumerate(map(row_label, fisher.space.names)):
        for name in sorted(wanted & needing("exact")):
            if (value := MEASURES[name](fisher, i)) is not None:
                rows.append((EXACT, layer, layer, name, *astuple(as_estimate(value))))
    notes += [f"{label} is left out: {sentence(error)}" for label, error in errors.items()]
    notes += remarks
    if not rows:
        why = " ".join(note for note in notes if "left out" in note)
        raise NothingMeasuredError(f"nothing of {', '.join(sorted(wanted))} can be measured: {why}")
    if explicit and (missing := [name for name in METRICS if name in wanted - {row[3] for row in rows}]):
        notes.append(f"{', '.join(missing)} could not be measured of any method or layer.")
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    meta = _meta(fisher, rule, strength, fits, notes)
    return Comparison(frame, meta, arrays)


def piece_of(label: str) -> str:
    """What the piece of a method is called among those of a comparison."""
    return f"method {label}"


def _taken(pieces: Pieces, chosen: Iterable[str], way: str) -> dict[str, Measured]:
    """The methods that an interrupted process has measured in the same way."""
    taken, others = {}, []
    for label in chosen:
        found = pieces.found(piece_of(label), Measured.of_state)
        if found is not None and found.way != way:
            others.append(label)
        elif found is not None:
            taken[label] = found
    if others:
        why = "memory allows another way of comparing matrices now"
        pieces.say(f"{', '.join(others)}: what is finished is not used and measured anew, since {why}.")
    pieces.tell(len(taken), len(list(chosen)), "method")
    return taken


def strength_of(fisher: Fisher, damping: float | Damping | None) -> tuple[Damping, float]:
    """The damping and its λ; without one, a hundredth of the Fisher's mean eigenvalue, or what float32 resolves."""
    share = max(_DEFAULT_DAMPING / fisher.shape[0], _LEAST_DAMPING)
    rule = as_damping(damping) or Tikhonov(share * fisher.norm("trace"))
    return rule, rule.gamma**2 if isinstance(rule, FactoredTikhonov) else rule.value


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


def _gradient(
    fisher: Fisher, gradient: Tensor | Mapping[str, Tensor] | None, wanted: set[str], notes: list[str]
) -> Tensor | None:
    if gradient is not None:
        flat = fisher.space.flatten(gradient) if isinstance(gradient, Mapping) else gradient
        flat = densified(flat) if isinstance(flat, Tensor) else flat
        if not isinstance(flat, Tensor) or flat.is_complex():
            what = "a complex tensor" if isinstance(flat, Tensor) else type(flat).__name__
            raise TypeError(f"gradient is a real tensor or a dictionary name -> tensor, got {what}.")
        if not bool(torch.isfinite(flat).all()):
            raise ValueError("gradient contains NaN or infinity; recompute it.")
        if not bool(flat.any()):
            notes.append("directions are left out: the gradient is zero.")
        if flat.shape != (fisher.shape[0],):
            raise ValueError(f"gradient must have {fisher.shape[0]} entries, got shape {tuple(flat.shape)}.")
        return flat.detach().to(fisher.network.device)
    if not wanted & needing("direction"):
        return None
    if not fisher.data.certainly_without_targets and fisher.has_targets():
        return fisher.gradient()
    notes.append("directions are left out: the data has no targets; pass them, or gradient=.")
    return None


def _meta(fisher: Fisher, rule: Damping, strength: float, fits: Fits, notes: list[str]) -> dict[str, Any]:
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
        "forward_backward_seconds": fits.unit.seconds,
        "forward_backward_multiply_adds": fits.unit.operations / 2,
        "fits_timed": fits.timed,
        "notes": notes,
    }  # fmt: skip
