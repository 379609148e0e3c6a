"""Random networks in both precisions: exact quantities, approximations and metrics beside float64 linear algebra.

The right matrices are those of `tests/oracles`: brute-force autograd in float64, factors from inputs and gradients that
a walk through the network shows. Everything asked of a matrix is then numpy's answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import fisherviz as fv
from benchmarks.trust.numerics_operators import Answer, Draw, Found, off, plain
from benchmarks.trust.numerics_operators import norm_of as norm
from fisherviz.exact.posterior import Posterior
from fisherviz.results.metrics import METRICS
from tests.oracles import cumulants, exact, kronecker, laws, nets, order, trace
from tests.oracles.definitions import definition

LIKELIHOODS = {"categorical": fv.Categorical, "bernoulli": fv.Bernoulli, "gaussian": fv.Gaussian}
KINDS = ("exact", "mc", "empirical")
SCALES = {torch.float32: 20.0, torch.float64: 60.0}
"""A Gaussian's variance is between ten to these powers, up and down: everything scales with its reciprocal."""
ILL_POSED = 1e-2
"""Where rounding times the condition exceeds it, a question has no answer in that precision and is left out."""


class Setting:
    """A network with data, its Fisher, and the right matrix.

    Args:
        seed: of all that is drawn.
        dtype: of network and data.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.draw, self.dtype, self.seed = Draw(seed, dtype), dtype, seed
        random = self.draw.random
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            twin, shape = _network(random)
            self.likelihood = str(random.choice(list(LIKELIHOODS)))
            self.kind, self.reduction = str(random.choice(KINDS)), str(random.choice(["mean", "sum"]))
            N = int(random.integers(1, 9))
            self.twin = _rounded(twin, dtype)
            self.x = torch.randn(N, *shape).to(dtype)
            self.law = laws.ALL[self.likelihood]
            self.y = self.law.draw(N, self.twin(self.x.double()).shape[1])
        self.net = deepcopy(self.twin).to(dtype)
        self.power = 0.0
        if self.likelihood == "gaussian" and random.random() < 0.5:
            self.power = float(random.uniform(-SCALES[dtype], SCALES[dtype]))
        self.variance = float(torch.tensor(10**self.power, dtype=dtype))
        self.layers = trace.layers_of(self.twin)
        self.probe, self.fisher = self._made()

    def _made(self) -> tuple[Any, Any]:
        kind = LIKELIHOODS[self.likelihood]
        given = {"variance": self.variance} if self.likelihood == "gaussian" else {}

        class Recording(kind):  # type: ignore[misc, valid-type]
            """Keeps the labels that it draws."""

            drawn: Tensor | None = None

            def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
                """As its class does."""
                found = super().sample(z, generator)
                self.drawn = found.clone() if self.drawn is None else self.drawn
                return found

        self.recorder = Recording(**given)
        probe = fv.Probe(self.net, self.recorder)
        targets = self.y if self.y.dtype == torch.long else self.y.to(self.dtype)
        return probe, probe.fisher(self.x, targets, kind=self.kind, reduction=self.reduction)

    @property
    def weight(self) -> float:
        """What the mean over examples is multiplied with."""
        return len(self.x) if self.reduction == "sum" else 1.0

    @cached_property
    def labels(self) -> Tensor | None:
        """Of the empirical kinds; None where all labels count."""
        if self.kind == "exact":
            return None
        if self.kind == "empirical":
            return self.y if self.y.dtype == torch.long else self.y.to(self.dtype).double()
        self.fisher.diagonal()
        assert self.recorder.drawn is not None
        drawn = self.recorder.drawn
        return drawn if drawn.dtype == torch.long else drawn.double()

    @cached_property
    def F(self) -> np.ndarray:
        """The right matrix, in torch order; a Gaussian's scales with its variance's reciprocal."""
        x = self.x.double()
        if self.kind == "exact":
            return exact.by_jacobian(self.twin, x, self.law) * self.weight / self.variance
        if self.likelihood == "gaussian":
            law = laws.Gaussian(self.variance)
            return exact.fisher(self.twin, x, law, targets=self.labels) * self.weight
        return exact.fisher(self.twin, x, self.law, targets=self.labels) * self.weight

    @cached_property
    def gradient(self) -> np.ndarray:
        """Of the data's loss."""
        law = laws.Gaussian(self.variance) if self.likelihood == "gaussian" else self.law
        y = self.y if self.y.dtype == torch.long else self.y.to(self.dtype).double()
        return exact.mean_gradient(self.twin, self.x.double(), y, law) * self.weight

    @cached_property
    def spectral(self) -> float:
        """‖F‖₂."""
        return float(np.linalg.norm(self.F, 2))

    @cached_property
    def damping(self) -> float:
        """A λ of 1e-3 to 1 of ‖F‖₂; 1 for a zero matrix."""
        return float(torch.tensor(self.spectral * 10 ** self.draw.random.uniform(-3, 0), dtype=self.dtype)) or 1.0

    @cached_property
    def condition(self) -> float:
        """Of F + λI."""
        return 1 + self.spectral / self.damping

    @cached_property
    def damped(self) -> np.ndarray:
        """F + λI."""
        return self.F + self.damping * np.eye(len(self.F))

    def vector(self, *columns: int) -> Tensor:
        """Random entries."""
        return self.draw.matrix(len(self.F), *columns)


def _network(random: np.random.Generator) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A chain of dense layers, dense layers on tokens, or convolutions, in float64, and the shape of an example."""
    kind = random.choice(["dense", "dense", "tokens", "convolutions"])
    bias = bool(random.random() < 0.7)
    if kind == "convolutions":
        first, second = int(random.integers(1, 3)), int(random.integers(2, 4))
        return nets.conv_net(nn.Conv2d(1, first, 2, bias=bias), nn.Conv2d(first, second, 1, bias=bias)), (1, 3, 3)
    widths = [int(random.integers(1, 5)) for _ in range(int(random.integers(1, 4)))] + [int(random.integers(2, 4))]
    if kind == "tokens":
        return nets.tokens_net(widths[0], widths[-2], widths[-1], bias=bias), (2, widths[0])
    activation = (nn.Tanh, nn.ReLU, nn.SiLU)[int(random.integers(3))]
    return nets.mlp(*widths, activation=activation, bias=bias), (widths[0],)


def _rounded(net: nn.Sequential, dtype: torch.dtype) -> nn.Sequential:
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(p.to(dtype).double())
    return net


# ---- the exact matrix ------------------------------------------------------------------------------------------------


def _products(s: Setting, *columns: int) -> Answer:
    v = s.vector(*columns)
    return off(s.fisher.fresh() @ v, s.F @ plain(v), s.spectral * norm(plain(v))), 1.0


def _form(s: Setting, two: bool) -> Answer:
    u, v = s.vector(), s.vector()
    right = v if two else u
    found = s.fisher.fresh().quadratic(u, v if two else None)
    return off(found, plain(u) @ s.F @ plain(right), s.spectral * norm(plain(u)) * norm(plain(right))), 1.0


def _blocks(s: Setting) -> Answer:
    parts, worst = order.segments(s.layers), 0.0
    for i, row in enumerate(parts):
        for j, col in enumerate(parts):
            worst = max(worst, off(s.fisher.fresh().block(i, j), s.F[row, col], s.spectral))
    return worst, 1.0


def _units(s: Setting) -> Answer:
    if any(isinstance(m, nn.Conv2d) for m in s.twin):
        raise NotImplementedError
    F, worst = order.reorder(s.F, s.layers, "unit"), 0.0
    for i, (part, (d_out, fan_in, bias)) in enumerate(zip(order.segments(s.layers), s.layers, strict=True)):
        own = F[part, part].reshape(d_out, fan_in + bias, d_out, fan_in + bias)
        right = np.stack([own[o, :, o] for o in range(d_out)])
        worst = max(worst, off(s.fisher.fresh().units(i), right, s.spectral))
    return worst, 1.0


def _block_norms(s: Setting, order_: str) -> Answer:
    parts, worst = order.segments(s.layers), 0.0
    for i, row in enumerate(parts):
        for j, col in enumerate(parts):
            found = s.fisher.fresh().norm(order_, block=(i, j))
            worst = max(worst, off(found, np.linalg.norm(s.F[row, col], "fro" if order_ == "fro" else 2), s.spectral))
    return worst, 1.0


def _solves(s: Setting, dense: bool, *columns: int) -> Answer:
    fisher, v = s.fisher.fresh(), s.vector(*columns)
    if dense:
        fisher.spectrum(1), fisher.to_dense(order="unit")
    return off(fisher.solve(v, s.damping), np.linalg.solve(s.damped, plain(v))), s.condition


def _natural(s: Setting) -> Answer:
    right = np.linalg.solve(s.damped, s.gradient)
    grows = norm(np.linalg.inv(s.damped)) * norm(s.gradient) / norm(right) if right.any() else 1.0
    return off(s.fisher.fresh().natural_gradient(s.damping), right), s.condition * max(1.0, grows)


def _spectrum(s: Setting, k: int | None) -> Answer:
    right = np.linalg.eigvalsh(s.F)[::-1].clip(0)
    found = plain(s.fisher.fresh().spectrum(k))
    return off(found, right[: len(found)], norm(right)) + norm(right[len(found) : k]) / (norm(right) or 1), 1.0


def _covariance(s: Setting) -> Answer:
    """Samples are linear in the noise: unit vectors of noise show their covariance."""
    fisher, prior = s.fisher.fresh(), s.damping * len(s.x) / s.weight
    posterior, P = Posterior(fisher, prior), len(s.F)
    summed = s.F * len(s.x) / s.weight
    if fisher.columns < P:
        noise = torch.eye(P + fisher.columns, dtype=torch.float64)
        root = plain(posterior.in_example_space(noise[:P], noise[P:]))
    else:
        dense = fisher.to_dense().double() * (len(s.x) / s.weight)
        root = plain(posterior.dense(dense, torch.eye(P, dtype=torch.float64)))
    return off(root @ root.T, np.linalg.inv(summed + prior * np.eye(P))), s.condition


def _determinant(found: float, damped: np.ndarray, damping: float, condition: float) -> Answer:
    """Logarithms of either sign may cancel: beside the sum of their sizes."""
    size = len(damped) * (1 + abs(math.log(damping)))
    return abs(found - float(np.linalg.slogdet(damped)[1])) / size, condition


def _cumulants(s: Setting) -> Answer:
    if any(isinstance(m, nn.Conv2d | nets.MeanTokens) for m in s.twin) or len(s.F) > 20:
        raise NotImplementedError
    error, bound = cumulants.table(trace.moments(s.twin, s.x.double(), s.law, s.labels))
    if s.kind != "exact" and s.likelihood == "gaussian":
        return 0.0, 1.0  # its scores do not scale by one number
    found = fv.cumulants(s.fisher.fresh(), progress=False)
    scale = s.weight / s.variance
    rights = (sum(float(np.abs(part).sum()) for part in table.values()) * scale for table in (error, bound))
    size = np.abs(s.F).sum()
    return max(off(mine, right, size) for mine, right in zip((found.error, found.bound), rights, strict=True)), 1.0


EXACT: dict[str, Callable[[Setting], Answer]] = {
    "to_dense": lambda s: (off(s.fisher.fresh().to_dense(), s.F), 1.0),
    "to_dense, unit order": lambda s: (
        off(s.fisher.fresh().to_dense("unit"), order.reorder(s.F, s.layers, "unit")),
        1.0,
    ),
    "to_dense, input order": lambda s: (
        off(s.fisher.fresh().to_dense("input"), order.reorder(s.F, s.layers, "input")),
        1.0,
    ),
    "block": _blocks,
    "units": _units,
    "diagonal": lambda s: (off(s.fisher.fresh().diagonal(), np.diag(s.F), s.spectral), 1.0),
    "F @ v": _products,
    "F @ V": lambda s: _products(s, 3),
    "to_scipy": lambda s: (off(s.fisher.to_scipy() @ np.ones(len(s.F)), s.F.sum(1), s.spectral * len(s.F) ** 0.5), 1.0),
    "quadratic": lambda s: max(_form(s, False), _form(s, True)),
    "norm, Frobenius": lambda s: (off(s.fisher.fresh().norm(), norm(s.F)), 1.0),
    "norm, spectral": lambda s: (off(s.fisher.fresh().norm("spectral"), s.spectral), 1.0),
    "norm, trace": lambda s: (off(s.fisher.fresh().norm("trace"), np.trace(s.F)), 1.0),
    "norm of blocks": lambda s: max(_block_norms(s, "fro"), _block_norms(s, "spectral")),
    "gradient": lambda s: (off(s.fisher.fresh().gradient(), s.gradient, _scores(s)), 1.0),
    "solve": lambda s: _solves(s, False),
    "solve, dense": lambda s: _solves(s, True, 3),
    "natural_gradient": _natural,
    "inverse": lambda s: (off(s.fisher.fresh().inverse(s.damping).to_dense(), np.linalg.inv(s.damped)), s.condition),
    "log_determinant": lambda s: _determinant(
        s.fisher.fresh().log_determinant(s.damping), s.damped, s.damping, s.condition
    ),
    "spectrum": lambda s: max(_spectrum(s, None), _spectrum(s, 2)),
    "example_gram": lambda s: (
        off(torch.linalg.matrix_norm(s.fisher.fresh().example_gram().double()) * s.fisher.scale, norm(s.F)),
        1.0,
    ),
    "sample": _covariance,
    "cumulants": _cumulants,
}


def _scores(s: Setting) -> float:
    """The root mean square of the data's scores, which the gradient is a mean of."""
    law = laws.Gaussian(s.variance) if s.likelihood == "gaussian" else s.law
    y = s.y if s.y.dtype == torch.long else s.y.to(s.dtype).double()
    return math.sqrt(float(np.trace(exact.fisher(s.twin, s.x.double(), law, targets=y)))) * s.weight


# ---- approximations --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Approximated:
    """A fitted approximation beside its dense matrix.

    Args:
        setting: the network.
        method: the approximation's name.
    """

    setting: Setting
    method: str

    @cached_property
    def fitted(self) -> Any:
        """The approximation."""
        return fv.approximate(self.setting.fisher.fresh(), self.method)

    @cached_property
    def M(self) -> np.ndarray:
        """Its matrix as it says, in torch order."""
        return plain(self.fitted.to_dense())

    @cached_property
    def right(self) -> np.ndarray:
        """By its definition, in unit order."""
        s = self.setting
        found = definition(self.method, s.twin, s.x.double(), s.law, s.labels)
        own = self.fitted.follows_scale
        return found * (s.weight / s.variance if own else 1.0)

    @cached_property
    def damping(self) -> float:
        """A λ of 1e-3 to 1 of its norm."""
        size = float(np.linalg.norm(self.M, 2))
        return size * 10 ** -float(self.setting.draw.random.uniform(0, 3)) or 1.0

    @cached_property
    def condition(self) -> float:
        """Of the damped matrix."""
        return 1 + float(np.linalg.norm(self.M, 2)) / self.damping

    @cached_property
    def damped(self) -> np.ndarray:
        """M + λI."""
        return self.M + self.damping * np.eye(len(self.M))


def _of_definition(a: Approximated) -> Answer:
    s = a.setting
    if s.likelihood == "gaussian" and s.kind != "exact" and s.power:
        raise NotImplementedError  # drawn labels do not scale with the variance
    return off(a.fitted.to_dense("unit"), a.right), _sharpness(a)


def _sharpness(a: Approximated) -> float:
    """By how much a definition magnifies rounding: eigenvectors by close eigenvalues, regressions by small ones."""
    s = a.setting
    if a.method not in ("ekfac", "nearest-kronecker", "kfac-tridiagonal"):
        return 1.0
    moments = trace.moments(s.twin, s.x.double(), s.law, s.labels)
    if a.method == "nearest-kronecker":
        F, gap = order.reorder(s.F, s.layers, "unit"), 1.0
        for part, (d_out, fan_in, bias) in zip(order.segments(s.layers), s.layers, strict=True):
            values = np.linalg.svd(kronecker.rearranged(F[part, part], d_out, fan_in + bias), compute_uv=False)
            if len(values) > 1 and values[0] > 0:
                gap = min(gap, 1 - values[1] / values[0])
        return 1 / gap if gap > 0 else math.inf
    A, G = kronecker.factors(moments)
    worst = 1.0
    for M in [M for table in (A, G) for (i, j), M in table.items() if i == j]:
        values = np.linalg.eigvalsh(M) / max(np.linalg.norm(M, 2), 1e-300)
        gaps = np.diff(values) if a.method == "ekfac" else values[values > 1e-12]
        near = values[1:] > 1e-9 if a.method == "ekfac" else slice(None)
        if len(gaps[near]):
            worst = max(worst, 1 / max(float(gaps[near].min()), 1e-300))
    return worst


def _approximate_norms(a: Approximated) -> Answer:
    M, found = a.M, a.fitted.norm
    sizes = ((found("fro"), norm(M)), (found("spectral"), np.linalg.norm(M, 2)), (found("trace"), np.trace(M)))
    return max(off(mine, right) for mine, right in sizes), 1.0


def _approximate_product(a: Approximated) -> Answer:
    v = a.setting.vector()
    grows = _sharpness(a) if a.method == "kfac-tridiagonal" else 1.0  # products go through its regressions
    return off(a.fitted @ v, a.M @ plain(v), norm(a.M) * norm(plain(v))), grows


def _approximate_solve(a: Approximated) -> Answer:
    v = a.setting.vector(2)
    return off(a.fitted.solve(v, a.damping), np.linalg.solve(a.damped, plain(v))), a.condition


def _approximate_root(a: Approximated) -> Answer:
    eye = torch.eye(len(a.M), dtype=a.setting.dtype)
    root = plain(a.fitted.inverse_root(eye, a.damping))
    return off(root @ root.T, np.linalg.inv(a.damped)), a.condition


APPROXIMATIONS: dict[str, Callable[[Approximated], Answer]] = {
    "dense, by definition": _of_definition,
    "product": _approximate_product,
    "diagonal": lambda a: (off(a.fitted.diagonal(), np.diag(a.M), norm(a.M)), 1.0),
    "norms": _approximate_norms,
    "damped": lambda a: (off(a.fitted.damped(a.damping).to_dense(), a.damped), 1.0),
    "solve": _approximate_solve,
    "inverse": lambda a: (off(a.fitted.inverse(a.damping).to_dense(), np.linalg.inv(a.damped)), a.condition),
    "inverse_root": _approximate_root,
    "log determinant": lambda a: _determinant(
        a.fitted.damped(a.damping).whole.log_determinant(), a.damped, a.damping, a.condition
    ),
}


# ---- metrics ---------------------------------------------------------------------------------------------------------


def metrics_of(F: np.ndarray, M: np.ndarray, damping: float, g: np.ndarray) -> dict[str, float]:
    """The whole matrix's metrics by dense algebra."""
    P, Q = F + damping * np.eye(len(F)), M + damping * np.eye(len(F))
    inverse, other, gap = np.linalg.inv(P), np.linalg.inv(Q), F - M
    best, step = -inverse @ g, -other @ g
    ratio = np.linalg.slogdet(P)[1] - np.linalg.slogdet(Q)[1]

    def model(delta: np.ndarray) -> float:
        return float(g @ delta + delta @ P @ delta / 2)

    return {
        "relative_frobenius": norm(gap) / norm(F),
        "relative_spectral": np.linalg.norm(gap, 2) / np.linalg.norm(F, 2),
        "relative_nuclear": np.linalg.norm(gap, "nuc") / np.linalg.norm(F, "nuc"),
        "relative_max": np.abs(gap).max() / np.abs(F).max(),
        "frobenius_cosine": np.sum(F / norm(F) * M / norm(M)),
        "inverse_frobenius": norm(inverse - other) / norm(inverse),
        "direction_cosine": best @ step / norm(best) / norm(step),
        "direction_error": norm(step - best) / norm(best),
        "model_decrease": model(step) / model(best),
        "model_decrease_rescaled": (g @ step) ** 2 / ((step @ P @ step) * (-g @ best)),
        "kl": (np.trace(Q @ inverse) - len(F) + ratio) / 2,
    }


def metrics(s: Setting, structured: bool) -> Iterator[Found]:
    """Every metric of every approximation, by written-out matrices or without them."""
    if not s.F.any() or not s.gradient.any():
        return
    no = "fisherviz.comparison.planning.why_not_dense"
    way = mock.patch(no, return_value="which are too many") if structured else nullcontext()
    with way:
        fisher = s.fisher.fresh()
        table = fv.compare(fisher, damping=s.damping, progress=False).frame
    F, g = plain(s.fisher.to_dense()), plain(s.fisher.gradient())
    whole = table[(table["row"] == "all") & (table["col"] == "all")]
    for method, rows in whole.groupby("method"):
        if method not in fv.approximations:
            continue
        M = plain(fv.approximate(s.fisher, method).to_dense())
        right = metrics_of(F, M, s.damping, g)
        condition = max(s.condition, 1 + float(np.linalg.norm(M, 2)) / s.damping)
        near = max(1.0, 1 / max(right["relative_frobenius"], torch.finfo(s.dtype).eps ** 0.5))
        for metric, value, stderr in rows[["metric", "value", "stderr"]].itertuples(index=False):
            if metric not in right or stderr > 0:
                continue
            grows = near if METRICS[metric].needs in ("", "matrix") else condition**2
            if structured:  # Lanczos and conjugate gradients keep their stated tolerances
                grows = max(grows, (1e-3 if metric == "relative_spectral" else 1e-4) / torch.finfo(s.dtype).eps)
            yield Found(metric, abs(value - right[metric]) / max(1.0, abs(right[metric])), grows, len(F))


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep(seeds: range, dtype: torch.dtype, compared: int = 4) -> Iterator[tuple[str, str, Found]]:
    """All quantities of random networks.

    Args:
        seeds: what is drawn, a network each.
        dtype: of network and data.
        compared: of how many networks one is compared by all metrics.

    Yields:
        The group ("exact", "approximations", "metrics"), what it was, and what was found.
    """
    for seed in seeds:
        s = Setting(seed, dtype)
        if not s.F.any():
            continue
        for name, question in EXACT.items():
            yield from _asked("exact", name, len(s.F), lambda question=question, s=s: question(s))
        for method in fv.approximations:
            a = Approximated(s, method)
            for name, question in APPROXIMATIONS.items():
                if name == "dense, by definition" and _undefined(a):
                    continue
                for group, _, found in _asked(
                    "approximations", name, len(s.F), lambda question=question, a=a: question(a)
                ):
                    yield group, method, found
        if seed % compared == 0:
            for structured in (False, True):
                for found in metrics(s, structured):
                    yield "metrics", "without matrices" if structured else "written out", found


def _undefined(a: Approximated) -> bool:
    """Whether the oracle refuses: equal eigenvalues leave EKFAC's basis open."""
    try:
        a.right  # noqa: B018
    except AssertionError:
        return True
    return False


def _asked(group: str, name: str, size: int, ask: Callable[[], Answer]) -> Iterator[tuple[str, str, Found]]:
    try:
        error, condition = ask()
    except NotImplementedError:  # refused by its documentation
        return
    yield group, name, Found(name, error, condition, size)
