"""Monitor: how good the approximations are while a network trains, in any training loop and without disturbing it.

At every look the exact Fisher of fixed data at the present weights is compared with each approximation: errors, cosines
with the exact natural gradient, condition numbers, and KFAC's similarity to FOOF (Benzing 2021, figure 4A).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import pandas as pd
import torch

from fisherviz.approximations import FAILURES, KFAC, Approximation, fit_all, resolve
from fisherviz.approximations.registry import Method
from fisherviz.comparison.compare import NothingMeasuredError, compare, strength_of
from fisherviz.comparison.strengths import damping_of, strengths
from fisherviz.exact.fisher import Fisher
from fisherviz.network.vectors import KINDS
from fisherviz.operators import DirectSum, Kronecker, Operator
from fisherviz.operators.damping import Damping, FactoredTikhonov, Tikhonov, as_damping
from fisherviz.probe import Probe
from fisherviz.results.comparison import EXACT, WHOLE, row_label
from fisherviz.results.metrics import METRICS, check_metrics, metric, show
from fisherviz.results.outputs import output
from fisherviz.support.choices import count, one_of, whole
from fisherviz.support.counting import counting
from fisherviz.support.errors import sentence
from fisherviz.support.names import readable
from fisherviz.support.tables import counted, html_table, paragraph

COLUMNS = ("step", "method", "layer", "metric", "value")
DEFAULT_METRICS = ("relative_frobenius", "frobenius_cosine", "direction_cosine", "direction_error")
SIMILARITIES = ("foof_cosine_factored", "foof_cosine_eigenvalues")
OPTIMIZER = "optimizer"
SPECTRUM_PARAMETERS = 1000
"""Up to this size the exact Fisher's smallest eigenvalue is computed. Above, it is taken as 0: an upper bound of the
condition number, exact where the Fisher is singular (more parameters than vectors; softmax over biased logits)."""

Row = tuple[str, str, str, float]


class Monitor:
    """Looks at approximations every few steps of a training loop.

    Args:
        probe: of the model that is trained.
        methods: as for `fv.compare`: names, `Approximation` classes or instances, or a mapping from labels to them.
            An instance that is fitted already stays as it is; all others are fitted anew at every look.
        every: steps between looks; `step` counts them.
        data: what the Fisher is taken over, as for `Probe.fisher`, with targets for directions; None: given to `step`.
        optimizer: whose λ and γ are recorded and used as damping; it may be any, or None.
        damping: of directions and condition numbers, where the optimizer has none or another is wanted; None: the
            optimizer's, or else as for `fv.compare`.
        kind: "exact", "mc" or "empirical".
        metrics: of `fv.compare`.
        seed: of sampled labels.

    Raises:
        TypeError: the probe is no `Probe`, or a method or metric is of no such type.
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
        methods: Iterable[Method] | Mapping[str, Method] | Method = ("kfac", "foof"),
        *,
        every: int = 50,
        data: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        damping: float | Damping | None = None,
        kind: str = "exact",
        metrics: Iterable[str] | str = DEFAULT_METRICS,
        seed: int = 0,
    ) -> None:
        if not isinstance(probe, Probe):
            raise TypeError(f"a monitor looks through a fv.Probe of the model, got {type(probe).__name__}.")
        count("every", every)
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}.")
        seed = whole("seed", seed)
        as_damping(damping)
        self.probe, self.every, self.seed = probe, every, seed
        self._methods = resolve(methods)
        if OPTIMIZER in self._methods:
            raise ValueError(f"the label {OPTIMIZER!r} means the optimizer itself; give this method another one.")
        self._refit = {label: made for label, made in self._methods.items() if not made.fitted}
        self.methods = tuple(self._methods)
        self.metrics = tuple(name for name in METRICS if name in check_metrics(metrics))
        self.kind = one_of("kind", kind, KINDS)
        self.notes: list[str] = []
        """What was left out at which step, and why."""
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
            step: whole number that the rows get.
            data: what the Fisher is taken over; None: the monitor's.

        Returns:
            What was measured: step, method, layer ("all" for the whole network; a layer of that name is
            "all (layer)"), metric, value; an estimate's standard error is the metric "<metric>_stderr".

        Raises:
            ValueError: there is no data, or a method is unknown.
            TypeError: the step is no whole number.
        """
        step = whole("step", step)
        chosen = self.data if data is None else data
        if chosen is None:
            raise ValueError("the monitor has no data; give it data=(inputs, targets), or give them to step().")
        model = self.probe.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()  # Dropout and BatchNorm as in use: the Fisher is that of single examples
        try:
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
        return output("plot of a monitor")(self, metric, **options)

    def _looked(self, data: Any, step: int) -> list[Row]:
        generator = torch.Generator(device=self.probe.device).manual_seed(((self.seed << 20) + step) % 2**63)
        fisher = self.probe.fisher(data, kind=self.kind, generator=generator)
        rule, strength = strength_of(fisher, self._rule())
        rows: list[Row] = []
        if self.optimizer is not None:
            rows += [(OPTIMIZER, WHOLE, name, value) for name, value in strengths(self.optimizer).items()]
        rows.append((EXACT, WHOLE, "damping", strength))
        with counting() if "passes" in self.metrics else nullcontext():
            found = fit_all(fisher, list(self._refit.values()))
        errors = {label: error for label, error in zip(self._refit, found, strict=True) if error is not None}
        if len(errors) == len(self._methods):
            raise next(iter(errors.values()))
        fitted = {label: made for label, made in self._methods.items() if label not in errors}
        self.notes += [f"step {step}: {label} is left out: {sentence(error)}" for label, error in errors.items()]
        try:
            compared = compare(fisher, fitted, damping=rule, metrics=self.metrics, progress=False)
        except NothingMeasuredError as error:  # a Fisher of zeros, where all outputs are certain, is no end of training
            self.notes.append(f"step {step}: {sentence(error)}")
            return rows
        self.notes += [f"step {step}: {note}" for note in compared.notes]
        frame = compared.frame[compared.frame["row"] == compared.frame["col"]]
        rows += list(frame[["method", "row", "metric", "value"]].itertuples(index=False, name=None))
        guessed = frame[frame["stderr"] > 0]
        guessed = guessed.assign(metric=guessed["metric"] + "_stderr")
        rows += list(guessed[["method", "row", "metric", "stderr"]].itertuples(index=False, name=None))
        if strength:
            rows += self._extras(fisher, fitted, rule, strength, step)
        return rows

    def _extras(
        self, fisher: Fisher, fitted: dict[str, Approximation], rule: Damping, strength: float, step: int
    ) -> list[Row]:
        """Condition numbers, and the similarity of KFAC to FOOF."""
        rows = [(EXACT, WHOLE, "condition_number", _exact_condition(fisher, strength))]
        for label, approximation in fitted.items():
            try:
                rows += _conditions(label, approximation, rule, strength)
                if isinstance(approximation, KFAC) and fisher.has_targets():
                    rows += similarity(fisher, approximation, rule, label)
            except FAILURES as error:
                self.notes.append(
                    f"step {step}: condition numbers and similarity of {label} are left out: {sentence(error)}"
                )
        return rows

    def _rule(self) -> Damping | None:
        given = as_damping(self.damping)
        if given is not None or self.optimizer is None:
            return given
        return damping_of(self.optimizer)

    def __repr__(self) -> str:
        looks = len(set(self.frame["step"]))
        every = f"every {counted(self.every, 'step')}"
        names = ", ".join(map(readable, self.methods))
        return f"Monitor({names}; {every}, {self.kind} Fisher, {counted(looks, 'look')} so far)"

    def _repr_html_(self) -> str:
        """What the last look saw of the whole network."""
        frame = self.frame[self.frame["layer"] == WHOLE]
        if frame.empty:
            return paragraph(repr(self))
        last = frame[frame["step"] == frame["step"].max()]
        names = list(dict.fromkeys(last["metric"]))
        seen = {(m, n): v for m, n, v in last[["method", "metric", "value"]].itertuples(index=False)}
        rows = [
            [method, *(show(name, seen[method, name]) if (method, name) in seen else "–" for name in names)]
            for method in dict.fromkeys(last["method"])
        ]
        head = ["method", *(metric(name).short for name in names)]
        caption = f"{self!r}; the look after step {last['step'].iloc[0]}"
        return html_table(head, rows, caption=caption, notes=self.notes)


def similarity(fisher: Fisher, kfac: Approximation, damping: Damping, label: str = "kfac") -> list[Row]:
    """Cosine between KFAC's direction and that of FOOF with KFAC's own damping of A (Benzing 2021, figure 4A).

    FOOF is V (A + π√λ I)⁻¹ both times; KFAC is damped in its factors, or in the eigenvalues of their product by λ.

    Args:
        fisher: the exact Fisher, with targets for the gradient V.
        kfac: the fitted approximation.
        damping: λ, and where it is factored what π is; λ alone takes the K-FAC paper's.
        label: of the method in the rows.

    Returns:
        Rows (method, layer, metric, value) for each layer with two factors, and for all of them together.
    """
    strength = damping.strength
    factored = damping if isinstance(damping, FactoredTikhonov) else FactoredTikhonov(strength**0.5)
    gradients = fisher.space.split(fisher.gradient())
    sums = {name: torch.zeros(3, dtype=torch.float64, device="cpu") for name in SIMILARITIES}
    rows: list[Row] = []
    for i, (layer, v) in enumerate(zip(fisher.space.layers, gradients, strict=True)):
        operator = kfac.operator(i, i)
        if not isinstance(operator, Kronecker):
            continue
        A, G = (factor.double() for factor in operator.tensors)
        v = v.double()
        Ad, Gd = factored.factors(A, G)
        foof = Kronecker.over_units(Ad, len(G)).solve(v)
        product = operator if operator.dtype == torch.float64 else Kronecker(A, G)  # the first keeps its eigenbasis
        directions = (Kronecker(Ad, Gd).solve(v), product.damped(Tikhonov(strength)).solve(v))
        for name, u in zip(SIMILARITIES, directions, strict=True):
            parts = torch.stack([u @ foof, u @ u, foof @ foof]).cpu()
            sums[name] += parts
            rows += _cosine(label, row_label(layer.name), name, parts)
    return rows + [row for name, parts in sums.items() for row in _cosine(label, WHOLE, name, parts)]


def _cosine(method: str, layer: str, name: str, parts: torch.Tensor) -> list[Row]:
    """Nothing where a direction is zero."""
    product, first, second = parts.tolist()
    return [(method, layer, name, product / (first * second) ** 0.5)] if first > 0 and second > 0 else []


def _exact_condition(fisher: Fisher, strength: float) -> float:
    """Condition number of the damped Fisher."""
    small = fisher.shape[0] <= SPECTRUM_PARAMETERS
    values = fisher.spectrum() if small else fisher.spectrum(1)
    smallest = max(float(values[-1]), 0.0) if small and len(values) == fisher.shape[0] else 0.0
    return ((float(values[0]) if len(values) else 0.0) + strength) / (smallest + strength)


def _conditions(label: str, approximation: Approximation, rule: Damping, strength: float) -> list[Row]:
    """Condition numbers of a damped block-diagonal matrix and its blocks; nothing of others."""
    matrix = approximation.matrix
    if not isinstance(matrix.whole, DirectSum):
        return []
    ends = [_ends(operator, rule, strength) for operator in matrix.operators]
    rows = [(label, WHOLE, "condition_number", max(high for high, _ in ends) / min(low for _, low in ends))]
    for layer, (high, low) in zip(matrix.space.layers, ends, strict=True):
        rows.append((label, row_label(layer.name), "condition_number", high / low))
    return rows


def _ends(operator: Operator, rule: Damping, strength: float) -> tuple[float, float]:
    """Largest and smallest eigenvalue of a damped operator."""
    factored = isinstance(rule, FactoredTikhonov) and isinstance(operator, Kronecker)
    damped = operator.damped(rule if factored else Tikhonov(strength))
    return damped.norm("spectral"), 1.0 / damped.inverse().norm("spectral")
