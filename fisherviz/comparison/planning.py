"""What a comparison will take: the parts that every comparison has, what each method adds, and which way costs less.

Iterations and random probes are counted at their most; what they share (products with F, captures in float64) once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fisherviz.approximations import FAILURES, Approximation
from fisherviz.approximations.kfac_full import KFACFull
from fisherviz.comparison.budget import Budget
from fisherviz.exact.fisher import Fisher
from fisherviz.exact.planning import DOUBLE, Sizes, pass_seconds, sizes_of
from fisherviz.operators.block_matrix import DENSE_SOLVE
from fisherviz.operators.khatri_rao import PAIRS
from fisherviz.statistics import (
    Block,
    CrossInputFactor,
    CrossOutputFactor,
    InputFactor,
    Misfit,
    NextWeight,
    OutputFactor,
    SlopeMoment,
    Statistic,
    UnitBlocks,
)
from fisherviz.statistics.costs import CHOLESKY, EIGEN, LayerCosts, block_cost, symmetric_cost
from fisherviz.support.memory import available, require
from fisherviz.support.numbers import human, show_number
from fisherviz.support.plan import Plan, Step

DENSE_COPIES = 12
"""Float64 matrices of the Fisher's size that a dense comparison holds at once."""
DENSE_MULTIPLY_ADDS = 2e11
"""For each matrix that are spent on writing it out even where there is a cheaper way, which shows less: a few seconds
of a core, up to 3,000 parameters."""
_DENSE_METHOD = 7.0
"""Multiply-adds of a method's spectra, singular values and inverses over P³, dense; of the exact Fisher's likewise."""
_BLOCK_COPIES = 4
"""Float64 matrices of a dense block's size that are held at once."""
_LANCZOS = 40
"""Products that a spectral norm usually takes."""
_COUPLED = 100
"""Products that a solve of a matrix coupled across layers usually takes."""
_PROBE_COPIES = 12
"""Arrays of all probes that are held at once."""


def why_not_dense(fisher: Fisher, chosen: Mapping[str, Approximation], budget: Budget) -> str:
    """Why the matrices of a comparison are not written out; "" where they are.

    They are where they fit, and cost little or no more than the other way.

    Args:
        fisher: the exact Fisher.
        chosen: the approximations by label.
        budget: how far metrics without matrices are taken.
    """
    size, needed, free = fisher.shape[0], dense_bytes(fisher), available(fisher.network.device)
    if needed > free:
        return f"which take {human(needed)} where {human(free)} may be taken; probe fewer layers="
    if _DENSE_METHOD * size**3 <= DENSE_MULTIPLY_ADDS:
        return ""
    dense, other = (
        sum(step.multiply_adds for step in _steps(fisher, chosen, written, budget)[1]) for written in (True, False)
    )
    if dense <= other:
        return ""
    times = show_number(dense / other, 2)
    return f"which take {human(needed)} and {times} times the multiply-adds; ask for them with metrics="


def dense_bytes(fisher: Fisher) -> int:
    """Held by a comparison that writes its matrices out."""
    return DENSE_COPIES * DOUBLE * fisher.shape[0] ** 2


def require_room(fisher: Fisher, chosen: Mapping[str, Approximation], budget: Budget) -> None:
    """Refuse a comparison without matrices of which some step does not fit.

    Args:
        fisher: the exact Fisher.
        chosen: the approximations by label.
        budget: how far metrics without matrices are taken.

    Raises:
        MemoryError: with the step, the figures and the way out.
    """
    largest = max(_steps(fisher, chosen, False, budget)[1], key=lambda step: step.bytes)
    what = f"the comparison, at its step {largest.what!r},"
    way_out = "probe fewer layers=, use fewer examples or kind='mc', or leave out methods"
    require(int(largest.bytes), fisher.network.device, what, way_out)


def plan(fisher: Fisher, chosen: Mapping[str, Approximation], dense: bool, budget: Budget) -> Plan:
    """The steps of a comparison; see `compare`.

    Args:
        fisher: the exact Fisher.
        chosen: the approximations by label.
        dense: whether matrices are written out.
        budget: how far metrics without matrices are taken.
    """
    sizes, steps = _steps(fisher, chosen, dense, budget)
    seconds = pass_seconds(fisher, sizes.layers[0].examples)
    return Plan(steps, fisher.network.device, fisher.network.precision, seconds)


def _steps(
    fisher: Fisher, chosen: Mapping[str, Approximation], dense: bool, budget: Budget
) -> tuple[Sizes, list[Step]]:
    """The steps, and what their counts come from."""
    sizes = sizes_of(fisher)
    own, able = list[Step](), dict(chosen)
    for label, method in chosen.items():
        try:
            own += [] if method.fitted else [_fit(label, method, fisher, sizes)]
        except FAILURES:  # the comparison will say why
            able.pop(label)
            own.append(Step(label, "refuses, is left out"))
    held = sum(step.bytes for step in own) + sizes.held
    fits = [Step(s.what, s.how, s.multiply_adds, held, s.passes, s.at_most) for s in own]
    blocks = {label: _dense_blocks(method, fisher) for label, method in able.items()}
    kept = {step.what: step.bytes for step in own}
    measured = _dense(sizes, able, held) if dense else _structured(sizes, able, blocks, held, kept, budget)
    passes = Step("unit of cost", "three passes, counted and timed", passes=3.0)
    return sizes, [*sizes.capture(), passes, *fits, *measured]


def _fit(label: str, method: Approximation, fisher: Fisher, sizes: Sizes) -> Step:
    """Statistics and factorisations of a method; `bytes` are those that it keeps."""
    layers = fisher.space.layers
    by_name = {layer.name: extent for layer, extent in zip(layers, sizes.layers, strict=True)}
    method.prepare(layers, fisher.structure.positions)
    statistics = [s for layer in layers for s in method.needs(layer).values()]
    pairs = method.pairs(layers, fisher.structure.neighbours)
    statistics += [s for i, j in pairs for s in method.pair_statistics(layers[i], layers[j]).values()]
    count, entries = 0.0, 0
    for statistic in statistics:
        cost, size = _statistic(statistic, [by_name[name] for name in statistic.layers])
        count, entries = count + cost, entries + size
    if type(method).refine is not Approximation.refine:
        count += sum(layer.forming + layer.columns * layer.positions * _turned(layer) for layer in sizes.layers)
    return Step(label, "statistics and factors", count, sizes.item * entries)


def _turned(layer: LayerCosts) -> int:
    """Multiply-adds for a position in an eigenbasis; one-hot inputs stay as they are."""
    return layer.dg**2 if layer.kind == "tokens" else layer.size


def _statistic(statistic: Statistic, of: Sequence[LayerCosts]) -> tuple[float, int]:
    """Multiply-adds of a statistic with its factorisation, and its entries."""
    row, col = of[0], of[-1]
    shared = statistic.setting != "reduce"
    rows = row.examples * (row.positions if shared else 1)
    if isinstance(statistic, InputFactor):
        if row.kind == "tokens":
            return 0.0, row.da
        return row.groups * (symmetric_cost(rows, row.da) + EIGEN * row.da**3), row.groups * row.da**2
    if isinstance(statistic, OutputFactor):
        made = symmetric_cost(rows * row.vectors, row.dg)
        return row.groups * (made + EIGEN * row.dg**3), row.groups * row.dg**2
    if isinstance(statistic, CrossInputFactor):
        return rows * row.da * col.da, row.da * col.da
    if isinstance(statistic, CrossOutputFactor):
        return rows * row.vectors * row.dg * col.dg, row.dg * col.dg
    if isinstance(statistic, SlopeMoment):
        return symmetric_cost(row.examples, row.dg), row.dg**2
    if isinstance(statistic, NextWeight):  # by which the next layer's factor is multiplied from both sides
        return row.dg * col.dg * (row.dg + col.dg), row.dg * col.dg
    if isinstance(statistic, Misfit):
        return row.columns * row.dg * col.dg, 1
    if isinstance(statistic, UnitBlocks):
        units = row.groups * row.dg
        return row.units + CHOLESKY * units * row.da**3, units * row.da**2
    if isinstance(statistic, Block):
        return block_cost(row, col) + CHOLESKY * row.size**3, row.size * col.size
    return row.diagonal, row.size


def _dense_blocks(method: Approximation, fisher: Fisher) -> list[int]:
    """Sizes of the layers whose blocks a method writes out."""
    layers = fisher.space.layers
    return [layer.size for layer in layers if any(isinstance(s, Block) for s in method.needs(layer).values())]


def _dense(sizes: Sizes, chosen: Mapping[str, Approximation], held: float) -> list[Step]:
    size = held + DENSE_COPIES * DOUBLE * sizes.size**2
    cube = _DENSE_METHOD * sizes.size**3
    return [
        Step("exact Fisher", "dense in float64", sizes.dense + cube, size),
        *(Step(f"{label}: metrics", "dense in float64", cube, size) for label in chosen),
    ]


def _structured(
    sizes: Sizes,
    chosen: Mapping[str, Approximation],
    blocks: Mapping[str, Sequence[int]],
    held: float,
    kept: Mapping[str, float],
    budget: Budget,
) -> list[Step]:
    columns, size, probes = sizes.columns, sizes.size, budget.probes(sizes)
    asked = 2 * (columns if columns <= budget.eigenvectors else probes) if probes else 0  # for inverses and divergences
    others = 2 + min(_LANCZOS, budget.lanczos(sizes))
    images = max(layer.examples * layer.positions * layer.dg * layer.groups for layer in sizes.layers)
    vectors = _PROBE_COPIES * probes * sizes.item * size + 3 * DOUBLE * min(sizes.layers[0].most, images * probes)
    direct = min(size, columns)
    converted = DOUBLE * max(layer.captured for layer in sizes.layers)
    solver = max((sizes.item + DOUBLE) * direct**2, converted + DOUBLE // sizes.item * sizes.gram_bytes)
    # inner products of the others have closed forms
    formed = [layer for layer in sizes.layers if layer.tied or layer.kind not in ("outer", "tokens")]
    gradients = 2 * sizes.item * min(columns * sum(layer.size for layer in formed), sizes.layers[0].most // 2)
    norms = sum(layer.strips(sizes.tile) for layer in sizes.layers)
    solves = sizes.gram + CHOLESKY * direct**3 + (2 * probes + others) * sizes.product
    steps = [
        Step("exact Fisher", "norms by Gram matrices", norms, held + sizes.tile_bytes),
        Step("exact Fisher", "directions and probes", solves, held + solver + vectors, at_most=True),
        Step("inner products", "gradients formed once", sum(layer.forming for layer in formed), held + gradients),
    ]
    among = sum(
        layer.size * ((1 if layer.kind == "tokens" else layer.da) + layer.dg)
        for layer in sizes.layers
        if layer.kind != "gradients"
    )
    for label, method in chosen.items():
        coupled = isinstance(method, KFACFull) and len(sizes.layers) > 1
        written_out = coupled and size <= DENSE_SOLVE
        terms = min(PAIRS, size) if coupled and not written_out else 0
        own_probes = asked if not coupled or written_out or budget.explicit else 0
        products = (own_probes + others) * (sizes.product + among)
        products += _COUPLED * (among + 2 * terms**2) if coupled else 0
        products += CHOLESKY * (terms**3 + (size**3 if written_out else 0))
        written = _BLOCK_COPIES * DOUBLE * max((n**2 for n in [*blocks[label], size * written_out]), default=0)
        factors = kept.get(label, 0.0)  # of what it keeps, damped
        own = held + factors + max(vectors, written, 6 * DOUBLE * terms**2)
        steps.append(Step(f"{label}: metrics", "products and solves", products, own, at_most=True))
    return steps
