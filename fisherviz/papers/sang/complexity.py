"""Sang et al. 2022, section III-E: what inverting costs, counted in operations instead of seconds.

Networks are equal layers without biases, as in algorithm 1; what is counted is `support.counting`'s, a multiply-add as
two, of the inverses that this library makes. Exponents are those between the two largest sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fisherviz.approximations import approximate
from fisherviz.operators import Dense
from fisherviz.operators.damping import FactoredTikhonov
from fisherviz.optim.exact import ExactFisher
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.sang.components import GAMMA, problem
from fisherviz.papers.sang.table import SIZES
from fisherviz.papers.trials.problems import Problem, build
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import method_styles, tidy
from fisherviz.probe import Probe
from fisherviz.support.counting import counting

METHODS: Mapping[str, Any] = {"CW-NGD": "cw-ngd", "K-FAC": "kfac", "layers": "layer", "all": ExactFisher}
"""What is inverted, by what it is called here."""
STYLES = dict(zip(METHODS, method_styles(("cw-ngd", "kfac", "layer", "exact")).values(), strict=True))
SMALL, LARGE = (8, 16, 24), (8, 16, 32, 64)
SERIES: Mapping[str, tuple[str, dict[str, int], Mapping[str, tuple[int, ...]]]] = {
    "n": ("dense", {"layers": 2}, {"CW-NGD": LARGE, "K-FAC": LARGE, "layers": SMALL, "all": SMALL}),
    "L": ("dense", {"n": 8}, dict.fromkeys(METHODS, (2, 4, 8))),
    "c": ("convolution", {"layers": 2, "k": 3}, dict.fromkeys(METHODS, (2, 4, 8))),
    "k": ("convolution", {"layers": 2, "c": 4}, dict.fromkeys(METHODS, (3, 5, 7))),
}
"""What grows: kind of layers, what stays, and the sizes for each method."""
NEAR = 0.25
"""How far a measured exponent may be from the claimed one."""
BATCHES = {"smoke": (16, 64), "desk": (16, 64, 256, 1024), "paper": (16, 64, 256, 1024)}
EXAMPLES = 4
Counts = dict[str, dict[int, int]]
"""By method and size."""


@exhibit(
    "sang.complexity", "section III-E: what inverting the Fisher costs",
    shows="O(L n⁴) for dense and O(L k³ e³ c⁴) for convolutional layers, against O(L³ n⁶) and O(L³ k³ e³ c⁶) for all "
    "of F",
    desk=0.002, paper=0.002,
)  # fmt: skip
def complexity(run: Run) -> Outcome:
    """Count the operations that inverting takes against width, depth, channels, filters and the batch.

    Args:
        run: scale, seed and device.

    Returns:
        The picture and its claims.
    """
    found = {what: _series(what, run) for what in SERIES}
    of = problem(run, "cwngd-convnet")
    steps = {batch: _step(of, batch, run) for batch in BATCHES[run.scale]}
    other = (*(["digits instead of MNIST"] if of.dataset == "digits" else []), SIZES)
    slopes = {what: {name: exponent(counts) for name, counts in of_one.items()} for what, of_one in found.items()}
    claims = (
        _powers("the overall computation complexity is O(L n⁴)", "CW-NGD", slopes, {"n": 4, "L": 1}),
        _powers("... and O(L k³ e³ c⁴) for convolutional layers", "CW-NGD", slopes, {"c": 4, "k": 6}),
        _powers("O(L³ n⁶) if we invert the full FIM", "all", slopes, {"n": 6, "L": 3}),
        _powers("... and O(L³ k³ e³ c⁶) for convolutional layers", "all", slopes, {"c": 6, "k": 6}),
        _saved(found),
        _apart(found["n"]["CW-NGD"]),
        _dominant(steps, other),
    )
    details = (
        "equal layers without biases: dense of n units each, two for n, eight units each for L; convolutions of c "
        "channels each with k × k filters, two with k = 3 for c, two of four channels for k; multiply-adds of products "
        "and factorisations count as two, element-wise work not at all; exponents between the two largest sizes; "
        f"K-FAC's, in n, is {slopes['n']['K-FAC']:.2f}; the whole step is that of the network of table I, empirical "
        "Fisher, blocks over the fan-in as in algorithm 1"
    )
    caption = (
        "Operations that inverting takes against the width of dense layers and the channels of convolutional ones, "
        "with the exponents, and those of a step on the network of table I against the batch: forward and backward "
        "pass with forming the blocks, and inverting them."
    )
    return Outcome(claims, "counted operations", details, caption, draw(9.6, 3.6, lambda f: _fill(f, found, steps)))


def exponent(counts: Mapping[int, int]) -> float:
    """The power of the size with which counts grow, between the two largest.

    Args:
        counts: by size.
    """
    (small, few), (large, many) = sorted(counts.items())[-2:]
    return math.log(many / few) / math.log(large / small)


def inversion(model: nn.Module, inputs: Tensor, method: Any) -> int:
    """Operations of the damped inverse of an approximation's matrices.

    Args:
        model: the network.
        inputs: that its Fisher is over.
        method: name or class.
    """
    fitted = approximate(Probe(model, "gaussian").fisher(inputs), method() if isinstance(method, type) else method)
    damping = FactoredTikhonov(math.sqrt(GAMMA)) if method == "kfac" else GAMMA
    # blocks of several layers are otherwise inverted when they are used
    matrix = Dense(fitted.whole.to_dense()).shifted(GAMMA) if method is ExactFisher else fitted.damped(damping).whole
    with counting() as counter:
        matrix.inverse()
    return counter.operations


def equal_layers(kind: str, n: int = 8, layers: int = 2, c: int = 4, k: int = 3) -> tuple[nn.Module, Tensor]:
    """A network of equal layers without biases, with examples for it.

    Args:
        kind: "dense" or "convolution".
        n: units of a dense layer.
        layers: how many.
        c: channels of a convolution.
        k: side of its filters.
    """
    generator = torch.Generator().manual_seed(0)
    if kind == "dense":
        inputs = torch.randn(EXAMPLES, n, dtype=torch.float64, generator=generator)
        model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(layers)))
    else:
        inputs = torch.randn(EXAMPLES, c, k, k, dtype=torch.float64, generator=generator)
        convolutions = (nn.Conv2d(c, c, k, padding=k // 2, bias=False) for _ in range(layers))
        model = nn.Sequential(*convolutions, nn.Flatten())
    model.double()
    for weight in model.parameters():
        weight.data.normal_(std=1 / math.sqrt(weight[0].numel()), generator=generator)
    return model, inputs


def _series(what: str, run: Run) -> Counts:
    kind, fixed, sizes = SERIES[what]
    name = {"L": "layers"}.get(what, what)

    def measure() -> dict[str, Any]:
        return {
            "operations": {
                method: {
                    str(size): inversion(*equal_layers(kind, **fixed, **{name: size}), METHODS[method]) for size in own
                }
                for method, own in sizes.items()
            }
        }

    found = kept({"inversion": what, "kind": kind, "fixed": fixed, "sizes": sizes}, measure, run)["operations"]
    return {method: {int(size): count for size, count in own.items()} for method, own in found.items()}


def _step(of: Problem, batch: int, run: Run) -> dict[str, int]:
    """Operations of a step on a batch: passes with the blocks that they form, and their inverses."""
    data = of.data()
    inputs, targets = data.train.inputs[:batch].double(), data.train.targets[:batch]

    def measure() -> dict[str, Any]:
        model = build(of, data, run.seed).double()
        fisher = Probe(model, data.likelihood).fisher((inputs, targets), kind="empirical", reduction="sum")
        with counting() as forming:
            fitted = approximate(fisher, "cw-ngd")
        with counting() as inverting:
            fitted.inverse(GAMMA)
        return {"forming": forming.operations, "inverting": inverting.operations}

    found = kept({"step": of.dataset, "model": of.model, "batch": batch, "seed": run.seed}, measure, run)
    return {part: found[part] for part in ("forming", "inverting")}


# ---- rows ------------------------------------------------------------------------------------------------------------


def _powers(
    statement: str, method: str, slopes: Mapping[str, Mapping[str, float]], claimed: Mapping[str, int]
) -> Claim:
    measured = {what: slopes[what][method] for what in claimed}
    return Claim(
        f"{statement} (section III-E)",
        ", ".join(f"exponent of {what}: {power}" for what, power in claimed.items())
        + (" (k = e)" if "k" in claimed else ""),
        ", ".join(f"exponent of {what}: {power:.2f}" for what, power in measured.items()),
        f"each exponent is within {NEAR:g} of the claimed one",
        all(abs(measured[what] - power) <= NEAR for what, power in claimed.items()),
        values=measured,
    )


def _saved(found: Mapping[str, Counts]) -> Claim:
    """How the ratio of both costs grows."""
    claimed = {"n": 2, "L": 2, "c": 2}
    measured = {}
    for what in claimed:
        ours, full = found[what]["CW-NGD"], found[what]["all"]
        shared = sorted(ours.keys() & full.keys())[-2:]
        ratios = [full[size] / ours[size] for size in shared]
        measured[what] = math.log(ratios[1] / ratios[0]) / math.log(shared[1] / shared[0])
    return Claim(
        "the complexity is reduced O(max(L² n², L² c²)) times (section III-E)",
        ", ".join(f"exponent of {what}: {power}" for what, power in claimed.items()),
        ", ".join(f"exponent of {what}: {power:.2f}" for what, power in measured.items())
        + " of the ratio of both counts",
        f"each exponent is within {2 * NEAR:g} of the claimed one, since both counts have theirs within {NEAR:g}",
        all(abs(measured[what] - power) <= 2 * NEAR for what, power in claimed.items()),
        values=measured,
    )


def _apart(counts: Mapping[int, int]) -> Claim:
    """What one of L n processes has to do."""
    layers = SERIES["n"][1]["layers"]
    each = {size: round(count / (layers * size)) for size, count in counts.items()}
    power = exponent(each)
    return Claim(
        "components are inverted independently, each process's computation complexity being O(n³) (section III-E)",
        "exponent of n: 3",
        f"exponent of n: {power:.2f}, of the count of one component",
        f"within {NEAR:g} of the claimed one",
        abs(power - 3) <= NEAR,
        values={"exponent": power},
    )


def _dominant(steps: Mapping[int, Mapping[str, int]], departures: tuple[str, ...]) -> Claim:
    """Whether inverting is most of a step."""
    shares = {batch: parts["inverting"] / sum(parts.values()) for batch, parts in steps.items()}
    largest = max(shares)
    return Claim(
        "the computational complexity of CW-NGD is determined by the most expensive operation of inverting the FIM "
        "(section III-E)",
        "no number",
        f"share of inverting in the operations of a step: {shares[largest]:.1%} at batch {largest:,}",
        "more than half at the batch of the experiment",
        shares[largest] > 0.5,
        departures,
        "; ".join(f"at batch {batch:,}: {share:.1%}" for batch, share in shares.items() if batch != largest),
        {f"share_{batch}": share for batch, share in shares.items()},
    )


# ---- picture ---------------------------------------------------------------------------------------------------------


def _fill(figure: Figure, found: Mapping[str, Counts], steps: Mapping[int, Mapping[str, int]]) -> None:
    left, middle, right = figure.subplots(1, 3)
    for ax, what, title in ((left, "n", "width n of dense layers"), (middle, "c", "channels c of convolutions")):
        for name, counts in found[what].items():
            _line(ax, counts, STYLES[name], f"{name}: {what}^{exponent(counts):.2f}")
        ax.set_xlabel(title)
        _ticks(ax, found[what]["CW-NGD"])
    words = {"forming": "passes and blocks", "inverting": "inverses"}
    for (part, label), look in zip(words.items(), (STYLES["K-FAC"], STYLES["CW-NGD"]), strict=True):
        _line(right, {batch: parts[part] for batch, parts in steps.items()}, look, label)
    _ticks(right, steps)
    right.set_xlabel("batch P, network of table I")
    left.set_ylabel("operations")
    for ax in (left, middle, right):
        tidy(ax)
        ax.legend(fontsize=8)


def _line(ax: Axes, counts: Mapping[int, int], look: Any, label: str) -> None:
    ax.loglog(
        list(counts), list(counts.values()), color=look.color, linestyle=look.line, marker=look.marker, markersize=4,
        linewidth=1.4, label=label,
    )  # fmt: skip


def _ticks(ax: Axes, sizes: Iterable[int]) -> None:
    ax.set_xticks(list(sizes), [str(size) for size in sizes])
    ax.xaxis.minorticks_off()
