"""Which cases of a product of parameters the quick suite runs, so that every value, or every two, still occur.

A test over methods × networks × types has hundreds of cases, of which most repeat what others show. Marked
`@pytest.mark.covering`, it gives `make test` a part of them in which every value of every parameter occurs, and marked
`@pytest.mark.covering(2)` one in which every two values of two parameters meet wherever they met in the product; the
other cases are marked `soak`. Which these are hangs on the order of the parameters alone, and no case is ever chosen
by how it ends. Of a single parameter `some` names the values that are run.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(rows: Sequence[tuple[int, ...]], strength: int = 1) -> list[int]:
    """Positions of rows that hold every combination of `strength` columns' values that occurs in `rows`, in order.

    Greedy: the row with most combinations that are still missing comes next. Of several it is the one in which most
    larger combinations, of one column more, come for the first time, then the one whose combinations have been taken
    least often, then the first.
    """
    holds, wider = ([_combinations(row, size) for row in rows] for size in (strength, strength + 1))
    missing, met, taken, chosen = set().union(*holds), set(), Counter(), []
    left = list(range(len(rows)))
    while missing:
        best = max(
            left, key=lambda at: (len(holds[at] & missing), len(wider[at] - met), -sum(taken[one] for one in holds[at]))
        )
        missing -= holds[best]
        met |= wider[best]
        taken.update(holds[best])
        chosen.append(best)
        left = [at for at in left if holds[at] & missing]
    return sorted(chosen)


def _combinations(row: tuple[int, ...], size: int) -> set:
    """The columns and values of all choices of `size` columns."""
    return {(columns, tuple(row[c] for c in columns)) for columns in combinations(range(len(row)), min(size, len(row)))}


def some(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Values of the parameter of a test, of which the quick suite runs those that are named: one of each kind."""
    values = list(values)
    assert set(quick) <= set(values), set(quick) - set(values)
    return [pytest.param(value, marks=() if value in quick else pytest.mark.soak) for value in values]


def mark_what_is_left(items: Sequence[pytest.Item]) -> None:
    """Mark the cases of tests with `covering` that the design leaves out as `soak`."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering") and not item.get_closest_marker("soak"):
            tests[item.nodeid.split("[")[0]].append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("covering")
        # the cases of one value share the object itself, whatever its type
        kept = set(covering([tuple(map(id, case.callspec.params.values())) for case in cases], *mark.args))
        for at, case in enumerate(cases):
            if at not in kept:
                case.add_marker(pytest.mark.soak)
