"""Where numbers end: systems near singularity, sizes of one, zeros, ranges of 1e±20, both precisions side by side.

Every answer is right, or refused in one sentence, or warned of; what is left is counted as silent.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.trust.numerics_operators import norm_of, plain
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.operators.lanczos import LARGE
from fisherviz.results.metrics import METRICS

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError, MemoryError)
RAW = ("linalg", "Expected", "size mismatch", "The size of tensor", "INTERNAL ASSERT", "shape '", "mat1")
"""What torch's own errors say."""


def outcome(ask: Callable[[], Any]) -> tuple[str, Any]:
    """What becomes of a request.

    Args:
        ask: makes it.

    Returns:
        "answered", "warned", "refused" or "raw", and the answer or the error.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = ask()
        except REFUSALS as error:
            words = str(error)
            sentence = words.endswith(".") and "\n" not in words and not any(raw in words for raw in RAW)
            return ("refused" if sentence and type(error).__module__ != "torch" else "raw"), error
        except Exception as error:
            return "raw", error
    return ("warned" if said else "answered"), found


# ---- solves ----------------------------------------------------------------------------------------------------------


def _trained(seed: int, dtype: torch.dtype) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network whose Fisher has more parameters than gradients for even seeds, fewer for odd ones."""
    generator = torch.Generator().manual_seed(seed)
    widths = (8, 10, 5) if seed % 2 == 0 else (3, 4, 3)
    x = torch.randn(12 if seed % 2 == 0 else 60, widths[0], generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(2.0)
    return net.to(dtype), x.to(dtype), torch.randint(widths[-1], (len(x),), generator=generator)


def solvers(fisher: fv.Fisher, damping: float) -> Iterator[tuple[str, Callable[[Tensor], Tensor], np.ndarray]]:
    """All that solves with a damped matrix, and that matrix in float64.

    Args:
        fisher: the exact matrix.
        damping: λ.
    """
    examples = fisher.in_example_space().double()
    unit = plain(ExampleSpace(examples).to_dense())
    where = fisher.space.permutation("unit")
    F = np.empty_like(unit)
    F[np.ix_(where, where)] = unit
    if fisher.shape[0] <= fisher.columns:  # then it is written out, in the network's precision
        F = plain(fisher.fresh().to_dense())
    damped = F + damping * np.eye(len(F))
    yield "fisher.solve", lambda v: fisher.fresh().solve(v, damping), damped
    yield "fisher.natural_gradient", lambda v: fisher.fresh().natural_gradient(damping), damped
    yield "fisher.inverse", lambda v: fisher.fresh().inverse(damping) @ v, damped
    for method in fv.approximations:
        fitted = fv.approximate(fisher, method)
        M = plain(fitted.to_dense())
        yield f"{method}.solve", lambda v, fitted=fitted: fitted.solve(v, damping), M + damping * np.eye(len(M))
        rule = fv.FactoredTikhonov(damping**0.5)
        state, own = outcome(lambda fitted=fitted, rule=rule: plain(fitted.damped(rule).to_dense()))
        if state != "refused":
            yield f"{method}.solve, factored", lambda v, fitted=fitted, rule=rule: fitted.solve(v, rule), own


def solves(seeds: range, dtype: torch.dtype, powers: range) -> Iterator[tuple[str, int, str, float]]:
    """What every solve leaves of its right-hand side, from a damping as large as the matrix to one far below rounding.

    Args:
        seeds: a network each.
        dtype: of the network.
        powers: λ is the largest eigenvalue times ten to minus these.

    Yields:
        The solver, the power, the outcome ("small", "warned", "refused", "raw", "silent") and the residual.
    """
    for seed in seeds:
        net, x, y = _trained(seed, dtype)
        fisher = fv.Probe(net, "categorical").fisher(x, y)
        noise = torch.randn(fisher.shape[0], generator=torch.Generator().manual_seed(seed)).to(dtype)
        for power in powers:
            damping = fisher.norm("spectral") * 10.0**-power
            for name, solve, damped in solvers(fisher, damping):
                for v in (fisher.gradient(), noise)[: 1 if "natural" in name else 2]:
                    state, found = outcome(lambda solve=solve, v=v: solve(v))
                    if state in ("refused", "raw"):
                        yield name, power, state, math.nan
                        continue
                    left = norm_of(damped @ plain(found) - plain(v)) / norm_of(plain(v))
                    yield name, power, ("small" if left <= LARGE else "warned" if state == "warned" else "silent"), left


# ---- the ranking in both precisions ----------------------------------------------------------------------------------


def rankings(seeds: range, apart: float = 1e-3) -> Counter[str]:
    """Whether methods come in the same order in float32 and float64, with the default damping.

    Args:
        seeds: a network each.
        apart: pairs that differ by less, relative to the larger, have no order.

    Returns:
        Pairs by "same" and "changed".
    """
    counted: Counter[str] = Counter()
    for seed in seeds:
        tables = []
        for dtype in (torch.float32, torch.float64):
            net, x, y = _trained(seed, dtype)
            tables.append(fv.compare(fv.Probe(net, "categorical").fisher(x, y), progress=False).summary())
        single, double = tables
        for metric in set(single) & set(double):
            if metric not in METRICS or METRICS[metric].needs == "cost":
                continue
            mine, right = (METRICS[metric].away(t[metric]).to_dict() for t in (single, double))
            for one in right:
                for other in right:
                    gap, size = right[one] - right[other], max(abs(right[one]), abs(right[other]))
                    if one in mine and other in mine and gap < -apart * max(size, 1e-3):
                        counted["same" if mine[one] < mine[other] else "changed"] += 1
    return counted


# ---- edges -----------------------------------------------------------------------------------------------------------

Case = tuple[nn.Module, str, Tensor, Tensor]


def _mlp(*widths: int, bias: bool = True, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    modules: list[nn.Module] = []
    for k, (a, b) in enumerate(pairwise(widths)):
        modules += ([activation()] if k else []) + [nn.Linear(a, b, bias=bias)]
    return nn.Sequential(*modules)


def cases() -> dict[str, Callable[[], Case]]:
    """Networks and data at the edges, in float32."""

    def case(net: Callable[[], nn.Module], likelihood: str, x: Callable[[], Tensor]) -> Callable[[], Case]:
        def make() -> Case:
            with torch.random.fork_rng():
                torch.manual_seed(3)
                model, inputs = net(), x()
                outputs = model(inputs[:1]).shape[1] if len(inputs) else 2
                kinds = {
                    "categorical": lambda: torch.randint(outputs, (len(inputs),)),
                    "bernoulli": lambda: torch.randint(2, (len(inputs), outputs)).float(),
                    "gaussian": lambda: torch.randn(len(inputs), outputs),
                }
                return model, likelihood, inputs, kinds[likelihood]()

        return make

    def dead() -> nn.Module:
        net = _mlp(3, 4, 2, activation=nn.ReLU)
        with torch.no_grad():
            net[0].bias.fill_(-1e3)  # type: ignore[union-attr, operator]
        return net

    def partly_dead() -> nn.Module:
        net = _mlp(3, 4, 2, activation=nn.ReLU)
        with torch.no_grad():
            net[0].bias[:2] = -1e3  # type: ignore[index]
        return net

    def scaled(factor: float) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            net = _mlp(3, 4, 2)
            with torch.no_grad():
                for p in net.parameters():
                    p.mul_(factor)
            return net

        return make

    usual = lambda: _mlp(3, 4, 2)  # noqa: E731
    linear = lambda: _mlp(3, 2, bias=False)  # noqa: E731
    drawn = lambda: torch.randn(6, 3)  # noqa: E731
    return {
        "zero examples": case(usual, "categorical", lambda: torch.zeros(0, 3)),
        "one example": case(usual, "categorical", lambda: torch.randn(1, 3)),
        "one class": case(lambda: _mlp(3, 4, 1), "categorical", drawn),
        "one output": case(lambda: _mlp(3, 4, 1), "gaussian", drawn),
        "one weight": case(lambda: _mlp(1, 1, bias=False), "gaussian", lambda: torch.randn(5, 1)),
        "one unit each": case(lambda: _mlp(1, 1, 1, 1), "bernoulli", lambda: torch.randn(5, 1)),
        "dead units": case(partly_dead, "categorical", drawn),
        "a dead layer": case(dead, "categorical", drawn),
        "constant inputs": case(usual, "categorical", lambda: torch.ones(6, 3)),
        "inputs of zero": case(usual, "categorical", lambda: torch.zeros(6, 3)),
        "inputs of zero, no bias": case(lambda: _mlp(3, 4, 2, bias=False), "gaussian", lambda: torch.zeros(6, 3)),
        "duplicates": case(usual, "categorical", lambda: torch.randn(2, 3).repeat(5, 1)),
        "inputs of 1e20": case(lambda: _mlp(3, 4, 2, activation=nn.ReLU), "gaussian", lambda: 1e20 * torch.randn(6, 3)),
        "inputs of 1e20, sure": case(
            lambda: _mlp(3, 4, 2, activation=nn.ReLU), "categorical", lambda: 1e20 * torch.randn(6, 3)
        ),
        "inputs of 1e12": case(linear, "gaussian", lambda: 1e12 * torch.randn(6, 3)),
        "inputs of 1e-12": case(linear, "gaussian", lambda: 1e-12 * torch.randn(6, 3)),
        "inputs of 1e-20": case(usual, "gaussian", lambda: 1e-20 * torch.randn(6, 3)),
        "weights of 1e-20": case(scaled(1e-20), "gaussian", drawn),
        "weights of 1e20": case(scaled(1e20), "bernoulli", drawn),
        "infinite inputs": case(usual, "categorical", lambda: torch.full((6, 3), math.inf)),
        "an input that is NaN": case(usual, "gaussian", lambda: torch.full((6, 3), math.nan)),
    }


def requests(fisher: fv.Fisher, damping: float) -> Mapping[str, Callable[[], Any]]:
    """What is asked.

    Args:
        fisher: the exact matrix.
        damping: λ.
    """
    like = next(fisher.probe.model.parameters())
    v = torch.ones(fisher.shape[0], dtype=like.dtype)
    rule = fv.FactoredTikhonov(damping**0.5)
    asked: dict[str, Callable[[], Any]] = {
        "to_dense": lambda: fisher.fresh().to_dense(),
        "block": lambda: fisher.fresh().block(0),
        "units": lambda: fisher.fresh().units(0),
        "diagonal": lambda: fisher.fresh().diagonal(),
        "product": lambda: fisher.fresh() @ v,
        "quadratic": lambda: fisher.fresh().quadratic(v),
        "norm, Frobenius": lambda: fisher.fresh().norm(),
        "norm, spectral": lambda: fisher.fresh().norm("spectral"),
        "norm, trace": lambda: fisher.fresh().norm("trace"),
        "solve": lambda: fisher.fresh().solve(v, damping),
        "undamped solve": lambda: fisher.fresh().solve(v, 0.0),
        "natural_gradient": lambda: fisher.fresh().natural_gradient(damping),
        "inverse": lambda: fisher.fresh().inverse(damping).to_dense(),
        "log_determinant": lambda: fisher.fresh().log_determinant(damping),
        "spectrum": lambda: fisher.fresh().spectrum(1),
        "example_gram": lambda: torch.linalg.matrix_norm(fisher.fresh().example_gram().double()),
        "gradient": lambda: fisher.fresh().gradient(),
        "sample": lambda: _size_alone(fisher.fresh().sample(damping, 2)),
        "cumulants": lambda: fisher.fresh().norm("trace") + fv.cumulants(fisher.fresh(), progress=False).bound,
        "compare": lambda: _nothing_but_numbers(fv.compare(fisher.fresh(), progress=False)),
    }
    for method in fv.approximations:
        asked[f"{method}"] = lambda method=method: fv.approximate(fisher, method).to_dense()
        asked[f"{method}, solve"] = lambda method=method: fv.approximate(fisher, method).solve(v, damping)
        asked[f"{method}, factored"] = lambda method=method: fv.approximate(fisher, method).solve(v, rule)
    return asked


def _size_alone(samples: Tensor) -> Tensor:
    """Random: finite or not is what is asked."""
    return samples.isfinite().all().float()


def _nothing_but_numbers(comparison: fv.Comparison) -> float:
    return float(np.isfinite(comparison.frame["value"].to_numpy()).all())


TOLERANCE = 1e-3
"""Of float32 beside float64, in units of the largest entry: between them lies everything that is not rounding."""


def edges(names: list[str] | None = None) -> Iterator[tuple[str, str, str, str]]:
    """Every request in every case, float32 beside float64.

    Args:
        names: of cases; None: all.

    Yields:
        Case, request, "right", "refused", "warned" or else "raw" or "wrong", and what was said or found.
    """
    for name, make in cases().items():
        if names is not None and name not in names:
            continue
        net, likelihood, x, y = make()
        state, single = outcome(lambda net=net, x=x, y=y, law=likelihood: fv.Probe(net, law).fisher(x, y))
        if state in ("refused", "raw"):
            yield name, "probe", state, str(single)
            continue
        wide, _, _, _ = make()
        targets = y.double() if y.is_floating_point() else y
        double = fv.Probe(wide.double(), likelihood).fisher(x.double(), targets)
        state, trace = outcome(lambda single=single: single.norm("trace"))
        damping = float(trace) if state == "answered" and float(trace) > 0 else 1.0
        rights = requests(double, damping)
        for request, ask in requests(single, damping).items():
            state, found = outcome(ask)
            if state in ("refused", "raw"):
                yield name, request, state, f"{type(found).__name__}: {found}"
                continue
            there, right = outcome(rights[request])
            mine, other = (np.atleast_1d(plain_of(a)) for a in (found, right))
            near = there in ("answered", "warned") and mine.shape == other.shape
            gap = norm_of(mine - other) if near and np.isfinite(mine).all() else math.inf
            close = gap <= TOLERANCE * max(norm_of(other), float(torch.finfo(torch.float32).tiny)) if near else False
            yield name, request, "right" if close else "warned" if state == "warned" else "wrong", f"{gap:.2g}"


def plain_of(value: Any) -> np.ndarray:
    """A tensor or a number in numpy's float64."""
    return plain(value) if isinstance(value, Tensor) else np.asarray(value, dtype=np.float64)
