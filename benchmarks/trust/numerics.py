"""Worst relative errors of every operation in both precisions, and what happens where numbers end.

The bounds below were set before anything was measured: multiples of a precision's rounding times the condition of the
question, and, for operators, the length of the sums.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.markdown import table
from benchmarks.trust import numerics_edges, numerics_networks, numerics_operators
from benchmarks.trust.numerics_operators import Found

TITLE = "Numerics"
OPERATOR_BOUND = 8.0
"""Errors of operators, in units of rounding × condition × rows."""
NETWORK_BOUND = 100.0
"""Errors of quantities of networks, in units of rounding × condition: a network's own passes round too."""
DTYPES = {"float64": torch.float64, "float32": torch.float32}
SIZES = {False: {"operators": 6, "networks": 10, "solves": 1, "rankings": 1}, True: {
    "operators": 30, "networks": 16, "solves": 1, "rankings": 3}}  # fmt: skip
"""How many of each are tried, by whether the measurement is the long one."""
WORKERS = 6
"""Processes that measure."""
GROUPS = {
    "operators": "structured operators",
    "exact": "the exact Fisher",
    "approximations": "approximations",
    "metrics": "metrics of `fv.compare`",
}


class Worst:
    """The worst of some operations.

    Args:
        dtype: that they were asked in.
        by_rows: whether the size of the matrix counts among what magnifies rounding.
    """

    def __init__(self, dtype: torch.dtype, by_rows: bool) -> None:
        self.eps, self.by_rows = float(torch.finfo(dtype).eps), by_rows
        self.found: dict[str, dict[str, Any]] = {}
        self.left_out = 0

    def add(self, each: Found) -> None:
        """Count one answer; a question without an answer in this precision is counted apart."""
        if not self.eps * each.condition <= numerics_networks.ILL_POSED:
            self.left_out += 1
            return
        entry = self.found.setdefault(each.operation, {"inputs": 0, "error": 0.0, "units": 0.0})
        units = each.error / (self.eps * each.condition * (each.size if self.by_rows else 1))
        entry["inputs"] += 1
        entry["error"] = max(entry["error"], _plain(each.error))
        entry["units"] = max(entry["units"], _plain(units))


def _plain(value: float) -> float:
    return float(f"{float(value):.3g}") if math.isfinite(value) else 1e300


def worst_of_operators(seeds: range, dtype: torch.dtype) -> Worst:
    """Every operation of every class of operators."""
    worst = Worst(dtype, by_rows=True)
    for _, _, found in numerics_operators.sweep(seeds, dtype):
        worst.add(found)
    return worst


def worst_of_networks(seeds: range, dtype: torch.dtype) -> dict[str, Worst]:
    """Every quantity of the exact Fisher, of every approximation, and every metric."""
    worst = {group: Worst(dtype, by_rows=False) for group in GROUPS if group != "operators"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for group, _, found in numerics_networks.sweep(seeds, dtype):
            worst[group].add(found)
    return worst


def measure(long: bool) -> dict[str, Any]:
    """The sweep, solves near singularity, rankings in both precisions, and the edges; in a few processes."""
    size = SIZES[long]
    names = list(numerics_edges.cases())[:: 1 if long else 4]
    parts: dict[tuple[str, ...], tuple[Callable[..., Any], Any]] = {
        (what, dtype): (function, size[what])
        for dtype in DTYPES
        for what, function in (("networks", _networks), ("solves", _solves), ("operators", _operators))
    }
    parts |= {("rankings", ""): (_rankings, size["rankings"])}
    parts |= {("edges", name): (_edges, name) for name in names}
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        going = {key: pool.submit(function, key[1], given) for key, (function, given) in parts.items()}
        done = {key: future.result() for key, future in going.items()}
    every = [row for key, rows in done.items() if key[0] == "edges" for row in rows]
    not_right = [f"{case}, {request}: {said}" for case, request, state, said in every if state in ("raw", "wrong")]
    errors = {dtype: done["operators", dtype][0] | done["networks", dtype][0] for dtype in DTYPES}
    return {
        "errors": errors,
        "left out": {dtype: done["operators", dtype][1] + done["networks", dtype][1] for dtype in DTYPES},
        "classes": len(numerics_operators.POSITIVE) + len(numerics_operators.BLOCKS),
        "networks": size["networks"],
        "solves": {dtype: done["solves", dtype] for dtype in DTYPES},
        "rankings": done["rankings", ""],
        "edges": {"cases": len(names), "outcomes": _counted(every, 2), "not right": not_right},
    }


def _operators(dtype: str, seeds: int) -> tuple[dict[str, Any], int]:
    worst = worst_of_operators(range(seeds), DTYPES[dtype])
    return {"operators": dict(sorted(worst.found.items()))}, worst.left_out


def _networks(dtype: str, seeds: int) -> tuple[dict[str, Any], int]:
    groups = worst_of_networks(range(seeds), DTYPES[dtype])
    found = {group: dict(sorted(worst.found.items())) for group, worst in groups.items()}
    return found, sum(worst.left_out for worst in groups.values())


def _solves(dtype: str, seeds: int) -> dict[str, int]:
    return _counted(numerics_edges.solves(range(seeds), DTYPES[dtype], range(13)), 2)


def _rankings(_: str, seeds: int) -> dict[str, int]:
    return dict(numerics_edges.rankings(range(seeds)))


def _edges(name: str, _: str) -> list[tuple[str, str, str, str]]:
    return list(numerics_edges.edges([name]))


def _counted(rows: Iterable[tuple[Any, ...]], column: int) -> dict[str, int]:
    return dict(Counter(row[column] for row in rows))


def broken(found: dict[str, Any]) -> list[str]:
    """Errors above their bounds, silent solves, changed rankings, edges that are neither right nor refused."""
    out = []
    for dtype, groups in found["errors"].items():
        for group, operations in groups.items():
            bound = OPERATOR_BOUND if group == "operators" else NETWORK_BOUND
            out += [
                f"{GROUPS[group]}, {name}, {dtype}: {entry['units']:g} units of rounding x condition, above {bound:g}"
                for name, entry in operations.items()
                if entry["units"] > bound
            ]
    for dtype, outcomes in found["solves"].items():
        out += [f"{outcomes[state]} {state} solves in {dtype}" for state in ("silent", "raw") if outcomes.get(state)]
    if found["rankings"].get("changed"):
        out.append(f"{found['rankings']['changed']} pairs of methods change places between float32 and float64")
    return out + [f"at the edges: {said}" for said in found["edges"]["not right"]]


def words(found: dict[str, Any]) -> list[str]:
    """What a user may count on."""
    errors = found["errors"]
    total = sum(entry["inputs"] for groups in errors.values() for ops in groups.values() for entry in ops.values())
    rows = []
    for group, title in GROUPS.items():
        for name in errors["float64"][group]:
            single, double = (errors[dtype][group].get(name) for dtype in ("float32", "float64"))
            inputs = sum(entry["inputs"] for entry in (single, double) if entry)
            cells = [f"{entry['error']:.0e} ({entry['units']:.2g})" if entry else "–" for entry in (double, single)]
            rows.append([title, name, f"{inputs:,}", *cells])
    solves, edges, rankings = found["solves"], found["edges"], found["rankings"]
    said = "; ".join(
        f"in {dtype} {sum(by.values()):,}: {by.get('small', 0):,} leave less than a hundredth of the right-hand side, "
        f"{by.get('warned', 0):,} say what they leave, {by.get('refused', 0):,} are refused with a damping that would "
        "do, "
        f"{by.get('silent', 0) + by.get('raw', 0):,} are silent"
        for dtype, by in solves.items()
    )
    by = edges["outcomes"]
    return [
        f"{total:,} answers were compared with dense linear algebra and brute-force autograd in float64: every "
        f"operation of {found['classes']} kinds of operators, sizes of one among them, with entries from 1e-30 to 1e30 "
        "in float32; every quantity of the exact Fisher, every approximation and every metric on "
        f"{found['networks']} random networks in each precision, dense, convolutional and on tokens, by likelihood, "
        "kind and reduction, Gaussian variances from 1e-20 to 1e20. The table has the worst relative error and, in "
        "brackets, the worst in units of rounding "
        f"(2e-16, 1e-7) times the condition of the question. It may not pass {NETWORK_BOUND:g}, for operators "
        f"{OPERATOR_BOUND:g} for each row of the matrix. {sum(found['left out'].values()):,} questions whose condition "
        "leaves less than two digits in their precision are not counted.",
        table(["of", "operation", "inputs", "float64", "float32"], rows),
        f"Solves with every method and damping from the largest eigenvalue down to 1e-12 of it: {said}.",
        f"With the default damping {rankings.get('same', 0):,} pairs of methods stand in the same order in float32 and "
        f"float64, {rankings.get('changed', 0):,} do not.",
        f"At the edges ({edges['cases']} cases: no example or one, one class, output or weight, dead units and layers, "
        "constant and repeated examples, zeros, inputs and weights of 1e±20, NaN), "
        f"{sum(by.values()):,} requests in float32: {by.get('right', 0):,} agree with float64, "
        f"{by.get('refused', 0):,} are refused in a sentence, which names the layer where one overflows, "
        f"{by.get('warned', 0):,} are warned of, {by.get('raw', 0) + by.get('wrong', 0):,} are neither.",
    ]
