"""Monitor: how good the approximations are while a network trains, in any training loop and without disturbing it.

At every look the exact Fisher of fixed data at the present weights is compared with each approximation: errors, cosines
with the exact natural gradient, condition numbers, and KFAC's similarity to FOOF (Benzing 2021, figure 4A).
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from fisherviz.approximations import Approximation, approximate, approximations
from fisherviz.comparison.compare import METRICS as COMPARED
from fisherviz.comparison.compare import compare
from fisherviz.comparison.strengths import strengths
from fisherviz.exact.fisher import Fisher
from fisherviz.network.vectors import KINDS
from fisherviz.operators import DirectSum, Kronecker, Operator
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.probe import Probe
from fisherviz.results.comparison import WHOLE, row_label

COLUMNS = ("step", "method", "layer", "metric", "value")
METRICS = ("relative_frobenius", "frobenius_cosine", "direction_cosine", "direction_error")
SIMILARITIES = ("foof_cosine_factored", "foof_cosine_eigenvalues")
EXACT, OPTIMIZER = "exact", "optimizer"
SPECTRUM_PARAMETERS = 1000
"""Up to this size the exact Fisher's smallest eigenvalue is computed. Above, it is taken as 0: an upper bound of the
condition number, exact where the Fisher is singular (more parameters than vectors; softmax over biased logits)."""

Row = tuple[str, str, str, float]


class Monitor:
    """Looks at approximations every few steps of a training loop.

    Args:
        probe: of the model that is trained.
        methods: approximations, by name; a single name will do.
        every: steps between looks; `step` counts them.
        data: what the Fisher is taken over, as for `Probe.fisher`, with targets for directions; None: given to `step`.
        optimizer: whose λ and γ are recorded and used as damping; it may be any, or None.
        damping: of directions and condition numbers, where the optimizer has none or another is wanted; None: the
            optimizer's, or else a hundredth of the Fisher's mean eigenvalue.
        kind: "exact", "mc" or "empirical".
        metrics: of `fv.compare`.
        seed: of sampled labels.

    Raises:
        TypeError: the probe is no `Probe`, or methods or metrics are no names.
        ValueError: `every` is no positive number, or a method, metric or kind is unknown.

    Example:
        >>> import torch, fisherviz as fv
        >>> model = torch.nn.Linear(3, 2)
        >>> x, y = torch.randn(20, 3), torch.randint(2, (20,))
        >>> monitor = Monitor(fv.Probe(model, "categorical"), ["kfac", "foof"], every=2, data=(x, y))
        >>> opt = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(4):
        ...     opt.zero_grad(); torch.nn.functional.cross_entropy(model(x), y).backward(); opt.step()
        ...     _ = monitor.step()
        >>> sorted(set(monitor.frame["step"]))
        [2, 4]
    """

    def __init__(
        self,
        probe: Probe,
        methods: Iterable[str] | str = ("kfac", "foof"),
        *,
        every: int = 50,
        data: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        damping: float | Damping | None = None,
        kind: str = "exact",
        metrics: Iterable[str] | str = METRICS,
        seed: int = 0,
    ) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(f"a monitor looks through a fv.Probe of the model, got {type(probe).__name__}.")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive whole number of steps, got {every!r}.")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be a whole number, got {seed!r}.")
        as_damping(damping)
        self.probe, self.every, self.seed = probe, every, seed
        self.methods = _known("methods", methods, approximations)
        self.metrics = _known("metrics", metrics, COMPARED)
        (self.kind,) = _known("kind", kind, KINDS)
        self.data, self.optimizer, self.damping = data, optimizer, damping
        self.steps = 0
        """Calls of `step` so far."""
        self._rows: list[tuple[int, *Row]] = []

    def step(self, data: Any = None) -> pd.DataFrame | None:
        """Count a training step, and look if it is time.

        Args:
            data: what the Fisher is taken over this time; None: the monitor's.

        Returns:
            What was measured, None between looks.
        """
        self.steps += 1
        return self.measure(self.steps, data) if self.steps % self.every == 0 else None

    def measure(self, step: int, data: Any = None) -> pd.DataFrame:
        """Look now.

        Args:
            step: number that the rows get.
            data: what the Fisher is taken over; None: the monitor's.

        Returns:
            What was measured: step, method, layer ("all" for the whole network; a layer of that name is
            "all (layer)"), metric, value.

        Raises:
            ValueError: there is no data, or a method is unknown.
        """
        chosen = self.data if data is None else data
        if chosen is None:
            raise ValueError("the monitor has no data; give it data=(inputs, targets), or give them to step().")
        model = self.probe.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # Dropout and BatchNorm as in use: the Fisher is that of single examples
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*exact diagonal there.*")
                rows = [(step, *row) for row in self._looked(chosen, step)]
        finally:
            for module, mode in modes:
                module.training = mode
        self._rows += rows
        return pd.DataFrame(rows, columns=list(COLUMNS))

    @property
    def frame(self) -> pd.DataFrame:
        """Everything measured so far."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def plot(self, metric: str | None = None, **options: Any) -> Any:
        """Draw it over the steps; see `fv.plot.monitor`."""
        from fisherviz.plotting.training import monitor

        return monitor(self, metric, **options)

    def _looked(self, data: Any, step: int) -> list[Row]:
        generator = torch.Generator(device=self.probe.device).manual_seed((self.seed << 20) + step)
        fisher = self.probe.fisher(data, kind=self.kind, generator=generator)
        rule = self._rule()
        rows: list[Row] = []
        if self.optimizer is not None:
            rows += [(OPTIMIZER, WHOLE, name, value) for name, value in strengths(self.optimizer).items()]
        if rule is None:
            rule = Tikhonov(1e-2 * fisher.norm("trace") / fisher.shape[0])
        strength = rule.gamma**2 if isinstance(rule, FactoredTikhonov) else rule.value
        rows.append((EXACT, WHOLE, "damping", strength))
        fitted = {name: approximate(fisher, name) for name in self.methods}
        found = compare(fisher, fitted, damping=rule, metrics=self.metrics).frame
        found = found[found["row"] == found["col"]]
        rows += list(found[["method", "row", "metric", "value"]].itertuples(index=False, name=None))
        if strength:
            rows += _conditions(fisher, fitted, rule, strength)
            if "kfac" in fitted and fisher.has_targets():
                rows += similarity(fisher, fitted["kfac"], strength)
        return rows

    def _rule(self) -> Damping | None:
        given = as_damping(self.damping)
        if given is not None or self.optimizer is None:
            return given
        found = strengths(self.optimizer)
        if "gamma" in found:
            return FactoredTikhonov(found["gamma"])
        return Tikhonov(found["lambda"]) if found.get("lambda") else None

    def __repr__(self) -> str:
        looks = len(set(self.frame["step"]))
        return f"Monitor({', '.join(self.methods)}, every {self.every} steps, {looks} looks so far)"


def _known(option: str, names: Iterable[str] | str, known: Iterable[str]) -> tuple[str, ...]:
    """Names as a tuple, each of them known."""
    if isinstance(names, str):
        names = (names,)
    found = tuple(names) if isinstance(names, Iterable) else (names,)
    if not found:
        raise ValueError(f"{option} is empty; name at least one of {', '.join(known)}.")
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"{option} takes names, got {type(name).__name__}; choose from {', '.join(known)}.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{option} must be among {', '.join(known)}, got {name!r}{hint}.")
    return found


def similarity(fisher: Fisher, kfac: Approximation, strength: float) -> list[Row]:
    """Cosine between KFAC's direction and that of FOOF with KFAC's own damping of A (Benzing 2021, figure 4A).

    FOOF is V (A + π√λ I)⁻¹ both times; KFAC is damped in its factors, or in the eigenvalues of their product by λ.

    Args:
        fisher: the exact Fisher, with targets for the gradient V.
        kfac: the fitted approximation.
        strength: λ.

    Returns:
        Rows (method, layer, metric, value) for each layer with two factors, and for all of them together.
    """
    gradients = fisher.space.split(fisher.gradient())
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in SIMILARITIES}
    rows: list[Row] = []
    for i, (layer, v) in enumerate(zip(fisher.space.layers, gradients, strict=True)):
        operator = kfac.operator(i, i)
        if not isinstance(operator, Kronecker):
            continue
        A, G = (factor.double() for factor in operator.tensors)
        v = v.double()
        Ad, Gd = FactoredTikhonov(strength**0.5).factors(A, G)
        foof = Kronecker.over_units(Ad, len(G)).solve(v)
        directions = (Kronecker(Ad, Gd).solve(v), Kronecker(A, G).damped(Tikhonov(strength)).solve(v))
        for name, u in zip(SIMILARITIES, directions, strict=True):
            parts = torch.stack([u @ foof, u @ u, foof @ foof]).cpu()
            sums[name] += parts
            rows += _cosine(row_label(layer.name), name, parts)
    return rows + [row for name, parts in sums.items() for row in _cosine(WHOLE, name, parts)]


def _cosine(layer: str, name: str, parts: torch.Tensor) -> list[Row]:
    """Nothing where a direction is zero."""
    product, first, second = parts.tolist()
    return [("kfac", layer, name, product / (first * second) ** 0.5)] if first > 0 and second > 0 else []


def _conditions(fisher: Fisher, fitted: dict[str, Approximation], rule: Damping, strength: float) -> list[Row]:
    """Condition numbers of the damped matrices: the exact one, and those that are block-diagonal."""
    rows: list[Row] = []
    small = fisher.shape[0] <= SPECTRUM_PARAMETERS
    values = fisher.spectrum() if small else fisher.spectrum(1)
    smallest = max(float(values[-1]), 0.0) if small and len(values) == fisher.shape[0] else 0.0
    rows.append((EXACT, WHOLE, "condition_number", (float(values[0]) + strength) / (smallest + strength)))
    for name, approximation in fitted.items():
        matrix = approximation.matrix
        if not isinstance(matrix.whole, DirectSum):
            continue
        ends = [_ends(operator, rule, strength) for operator in matrix.operators]
        whole = max(high for high, _ in ends) / min(low for _, low in ends)
        rows.append((name, WHOLE, "condition_number", whole))
        for layer, (high, low) in zip(fisher.space.layers, ends, strict=True):
            rows.append((name, row_label(layer.name), "condition_number", high / low))
    return rows


def _ends(operator: Operator, rule: Damping, strength: float) -> tuple[float, float]:
    """Largest and smallest eigenvalue of a damped operator."""
    factored = isinstance(rule, FactoredTikhonov) and isinstance(operator, Kronecker)
    damped = operator.damped(rule if factored else Tikhonov(strength))
    return damped.norm("spectral"), 1.0 / damped.inverse().norm("spectral")
