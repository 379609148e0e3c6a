"""Shrestha 2023, figure 5: time and memory of a step against depth, hidden layers of 20.

Claims are judged by counted operations, which are the same on every machine, and by tensors' bytes at the peak; CPU
times of one interleaved run stand beside them. A step's cost does not depend on what its batch shows, which is random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherviz import optim
from fisherviz.papers.ledger.claims import Claim, Outcome
from fisherviz.papers.ledger.registry import exhibit
from fisherviz.papers.pictures import draw
from fisherviz.papers.trials.curves import STYLES, logarithmic
from fisherviz.papers.trials.work import Run, kept
from fisherviz.plotting.style import tidy
from fisherviz.support.counting import counting
from fisherviz.support.peaks import peak_bytes

INPUTS, WIDTH, BATCH = 12, 20, 128
"""Of the weather table; of each hidden layer; the paper's batch."""
LR, BETA = 1e-4, 0.1
DEPTHS = {"smoke": (1, 2, 4), "desk": (1, 2, 4, 8, 16, 32), "paper": (1, 2, 4, 8, 16, 32)}
EXACT_UP_TO = {"smoke": 2, "desk": 8, "paper": 8}
"""Depth up to which the exact Fisher is taken; with 8 hidden layers it has 3,221 rows."""
EXACT, BLOCKS, TENGRAD, SGD = "natural gradient", "block-wise NGD", "TENGraD", "SGD"
EACH_BATCH: dict[str, Any] = {"kind": "empirical", "decay": 0.0, "lr": LR, "damping": BETA}
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    SGD: lambda model: torch.optim.SGD(model.parameters(), lr=LR),
    EXACT: lambda model: optim.NaturalGradient(model, "gaussian", "exact", **EACH_BATCH),
    BLOCKS: lambda model: optim.NaturalGradient(model, "gaussian", "layer", **EACH_BATCH),
    TENGRAD: lambda model: optim.TENGraD(
        model, "gaussian", kind="empirical", momentum=0.0, kl_clip=math.inf, lr=LR, damping=BETA
    ),
    "K-FAC": lambda model: optim.KFAC.paper(
        model, "gaussian", rescale=False, adapt=False, momentum=0.0, T=1, lr=LR, damping=BETA
    ),
}
"""A new Fisher with every step; factors of K-FAC, which figure 5 leaves out, are averaged."""
FEWER, MANY, SIMILAR = 4.0, 5.0, 0.1
"""Times that count as clearly and as drastically less; difference of two growths' powers that counts as similar."""
Costs = Mapping[int, Mapping[str, Mapping[str, float]]]


def network(depth: int, inputs: int = INPUTS, width: int = WIDTH) -> nn.Sequential:
    """A regression network with so many hidden layers, its weights those of seed 0.

    Args:
        depth: hidden layers.
        inputs: columns.
        width: units of each hidden layer.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        modules: list[nn.Module] = []
        for d_in, d_out in pairwise([inputs, *[width] * depth]):
            modules += [nn.Linear(d_in, d_out), nn.ReLU()]
        return nn.Sequential(*modules, nn.Linear(width, 1))


def random_batch(generator: torch.Generator, inputs: int = INPUTS, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Inputs (batch, inputs) and targets (batch, 1)."""
    return torch.randn(batch, inputs, generator=generator), torch.randn(batch, 1, generator=generator)


def half_squares(z: Tensor, y: Tensor) -> Tensor:
    """The mean nll under a Gaussian likelihood."""
    return 0.5 * F.mse_loss(z, y)


@exhibit(
    "shrestha.fig5", "figure 5: time and memory against depth, hidden layers of 20",
    shows="time and memory of exact, block-wise and TENGraD's natural gradient (a), and their time beside SGD's (b)",
    desk=0.02, paper=0.02,
)  # fmt: skip
def fig5(run: Run) -> Outcome:
    """Count the operations of a step, measure its peak memory and its CPU time for each depth and method.

    Args:
        run: scale and where measurements are kept; always on the CPU, in float32.

    Returns:
        The picture and its claims.
    """
    depths, most = DEPTHS[run.scale], EXACT_UP_TO[run.scale]
    costs = {depth: _kept(depth, depth <= most, run) for depth in depths}
    other = (f"up to {depths[-1]} hidden layers",) if run.scale == "smoke" else ()
    details = (
        f"{INPUTS} inputs, as in the weather table, {', '.join(map(str, depths))} hidden layers of {WIDTH}, one "
        f"output, batch {BATCH}, ReLU, float32, one thread; the exact natural gradient up to {most} hidden layers; "
        "each method with a new Fisher in every step. Counted are products and factorisations (a multiply-add is two "
        "operations); memory is that of all tensors at the peak of three steps, network and optimizer included, data "
        "not; CPU times are the fastest of interleaved rounds. The paper names neither depths nor machine"
    )
    caption = (
        "Operations of one step, its peak memory, and its CPU time, against the number of hidden layers; all axes "
        "logarithmic."
    )
    picture = draw(9.6, 3.5, lambda figure: _fill(figure, costs))
    setting = f"up to {depths[-1]} hidden layers of {WIDTH}, batch {BATCH}"
    return Outcome(_claims(costs, other), setting, details, caption, picture)


def _kept(depth: int, exact: bool, run: Run) -> Mapping[str, Mapping[str, float]]:
    names = [name for name in OPTIMIZERS if exact or name != EXACT]
    rounds = 2 if run.scale == "smoke" else 10
    what = {"costs at depth": depth, "width": WIDTH, "batch": BATCH, "methods": names, "rounds": rounds}
    return kept(what, lambda: {"costs": step_costs(depth, names, rounds)}, run)["costs"]


class Steps:
    """A network in training, step by step.

    Args:
        method: one of `OPTIMIZERS`.
        depth: hidden layers.
    """

    def __init__(self, method: str, depth: int) -> None:
        self.model, self.generator = network(depth), torch.Generator().manual_seed(1)
        self.opt = OPTIMIZERS[method](self.model)

    def __call__(self) -> None:
        """Take one step."""
        x, y = random_batch(self.generator)
        self.opt.zero_grad()
        half_squares(self.model(x), y).backward()
        self.opt.step()


def step_costs(depth: int, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """What a step costs.

    Args:
        depth: hidden layers.
        names: of `OPTIMIZERS`.
        rounds: of timing, in each of which every method takes one step.

    Returns:
        By method "operations", "bytes", "ms" (fastest CPU time) and "parameters".
    """
    steps = {name: Steps(name, depth) for name in names}
    found: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        step()
        step()
        with counting() as counter:
            step()
        size = sum(p.numel() for p in step.model.parameters())
        peak = peak_bytes(partial(_three, name, depth))
        found[name] = {"operations": counter.operations, "bytes": peak, "parameters": size}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(time.process_time() - began)
    return {name: {**one, "ms": 1e3 * min(times[name])} for name, one in found.items()}


def _three(name: str, depth: int) -> None:
    step = Steps(name, depth)
    for _ in range(3):
        step()


def _claims(costs: Costs, other: tuple[str, ...]) -> tuple[Claim, ...]:
    with_exact = [depth for depth, row in costs.items() if EXACT in row]
    before, last = with_exact[-2:]
    powers = {key: _power(costs, EXACT, key, before, last, "parameters") for key in ("operations", "bytes", "ms")}
    size = costs[last][EXACT]["parameters"]
    less = {
        name: {key: costs[last][EXACT][key] / costs[last][name][key] for key in ("operations", "bytes", "ms")}
        for name in (BLOCKS, TENGRAD)
    }
    deep = [depth for depth in costs if depth > 1]
    saved = {depth: costs[depth][BLOCKS]["operations"] / costs[depth][TENGRAD]["operations"] for depth in deep}
    saved_time = {depth: costs[depth][BLOCKS]["ms"] / costs[depth][TENGRAD]["ms"] for depth in deep}
    first, end = deep[len(deep) // 3], deep[-1]
    growth = {
        key: {name: _power(costs, name, key, first, end) for name in (SGD, TENGRAD, BLOCKS)}
        for key in ("operations", "ms", "bytes")
    }
    ratios = {depth: row[TENGRAD]["ms"] / row[SGD]["ms"] for depth, row in costs.items()}
    return (
        Claim(
            "the natural gradient in its original form takes O(n²) space and O(n³) time for n parameters (section 4.4)",
            "figure 5a (no number)",
            f"from {before} to {last} hidden layers operations grow as n^{powers['operations']:.2f} and peak memory as "
            f"n^{powers['bytes']:.2f}; the peak is {costs[last][EXACT]['bytes'] / (4 * size**2):.1f} times the 4 n² "
            "bytes of F",
            "powers of at least 2.5 and 1.75",
            powers["operations"] >= 2.5 and powers["bytes"] >= 1.75,
            other,
            f"CPU time grows as n^{powers['ms']:.2f}",
            values={f"{key} power": value for key, value in powers.items()},
        ),
        Claim(
            "the efficiency of the approximations in time and space is clearly seen beside the original (section 4.4)",
            "figure 5a (no number)",
            f"with {last} hidden layers the exact natural gradient takes "
            + "; ".join(
                f"{row['operations']:.3g} times the operations and {row['bytes']:.3g} times the memory of {name}"
                for name, row in less.items()
            ),
            f"at least {FEWER:g} times each",
            all(row[key] >= FEWER for row in less.values() for key in ("operations", "bytes")),
            other,
            "CPU time: " + ", ".join(f"{row['ms']:.3g} times that of {name}" for name, row in less.items()),
            values={f"{name} {key}": value for name, row in less.items() for key, value in row.items()},
        ),
        Claim(
            "the computation in TENGraD is drastically reduced from block-wise natural gradient (section 4.4)",
            "figure 5a and b (no number)",
            f"block-wise takes {_range(saved)} times the operations, over {deep[0]} to {deep[-1]} hidden layers",
            f"at least {MANY:g} times at each depth above 1",
            min(saved.values()) >= MANY,
            other,
            f"CPU time: {_range(saved_time)} times",
            values={f"depth {depth}": value for depth, value in saved.items()},
        ),
        Claim(
            "TENGraD scales in a similar fashion to SGD (section 4.4)",
            "figure 5b (no number)",
            f"from {first} to {end} hidden layers operations grow as depth^{growth['operations'][TENGRAD]:.2f}, SGD's "
            f"as depth^{growth['operations'][SGD]:.2f}",
            f"the powers differ by at most {SIMILAR:g}",
            abs(growth["operations"][TENGRAD] - growth["operations"][SGD]) <= SIMILAR,
            other,
            f"CPU time: depth^{growth['ms'][TENGRAD]:.2f} and depth^{growth['ms'][SGD]:.2f}, a step of TENGraD taking "
            f"{_range(ratios)} times SGD's; peak memory: depth^{growth['bytes'][TENGRAD]:.2f} and "
            f"depth^{growth['bytes'][SGD]:.2f}",
            values={f"{name} {key} power": value for key, row in growth.items() for name, value in row.items()},
        ),
    )


def _power(costs: Costs, name: str, key: str, before: int, last: int, over: str = "") -> float:
    """Power of the depth, or of another column, with which a cost grows."""
    first, end = costs[before][name], costs[last][name]
    return math.log(end[key] / first[key]) / math.log(end[over] / first[over] if over else last / before)


def _range(values: Mapping[Any, float]) -> str:
    numbers = list(values.values())
    return f"{median(numbers):.3g} ({min(numbers):.3g} to {max(numbers):.3g})"


def _fill(figure: Figure, costs: Costs) -> None:
    panels = (
        ("operations", 1e-6, "10⁶ operations"),
        ("bytes", 2**-20, "MiB at the peak"),
        ("ms", 1.0, "ms of CPU time"),
    )
    axes = figure.subplots(1, len(panels))
    for ax, (key, factor, title) in zip(axes, panels, strict=True):
        _panel(ax, costs, key, factor)
        ax.set_title(f"{title} in one step" if key == "operations" else title, fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=len(OPTIMIZERS))


def _panel(ax: Axes, costs: Costs, key: str, factor: float) -> None:
    for name in OPTIMIZERS:
        points = {depth: factor * row[name][key] for depth, row in costs.items() if name in row}
        look = STYLES[name]
        ax.plot(
            list(points), list(points.values()), color=look.color, linestyle=look.line, marker=look.marker,
            markersize=4, linewidth=1.4, label=name,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    logarithmic(ax)
    ax.set_xticks(list(costs), [str(depth) for depth in costs])
    ax.set_xlabel("hidden layers")
    tidy(ax)
