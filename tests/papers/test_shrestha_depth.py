"""Shrestha 2023, figure 5: what is counted, and the rules."""

import pytest
import torch

from fisherviz.papers.shrestha import depth
from fisherviz.papers.shrestha.depth import BLOCKS, EXACT, SGD, TENGRAD


def test_an_sgd_step_counts_its_three_products_for_each_layer_but_the_first_one_s_inputs():
    rows, hidden = depth.BATCH, depth.WIDTH * depth.WIDTH
    first, last = depth.INPUTS * depth.WIDTH, depth.WIDTH
    products = 2 * rows * (2 * first + 3 * hidden + 3 * last)
    found = depth.step_costs(2, [SGD], 1)[SGD]
    assert found["operations"] == products
    assert found["parameters"] == first + hidden + last + 2 * depth.WIDTH + 1
    # the network and its gradients, beside activations
    assert found["bytes"] > 2 * 4 * found["parameters"]


def test_each_method_holds_at_least_the_matrices_that_name_it():
    found = depth.step_costs(2, [SGD, EXACT, BLOCKS, TENGRAD], 1)
    sizes = [depth.WIDTH * (depth.INPUTS + 1), depth.WIDTH * (depth.WIDTH + 1), depth.WIDTH + 1]
    assert found[EXACT]["bytes"] > 4 * sum(sizes) ** 2
    assert found[BLOCKS]["bytes"] > 4 * sum(size**2 for size in sizes)
    assert found[SGD]["bytes"] < found[TENGRAD]["bytes"] < found[EXACT]["bytes"]
    factorised = {EXACT: sum(sizes) ** 3 / 3, BLOCKS: sum(size**3 for size in sizes) / 3, TENGRAD: depth.BATCH**3}
    for name, operations in factorised.items():
        assert found[name]["operations"] > operations


def test_random_states_stay_as_they_were():
    before = torch.get_rng_state()
    depth.Steps(SGD, 1)()
    assert torch.equal(before, torch.get_rng_state())


def costs(exact=(3.0, 2.0), saved=10.0, tengrad=1.0):
    """Costs that grow by given powers: the exact ones of n = 100 depth, the others' of the depth."""

    def row(operations, size, n):
        return {"operations": operations, "bytes": size, "ms": operations, "parameters": n}

    found = {}
    for d in (1, 2, 4, 8, 16, 32):
        found[d] = {
            SGD: row(10.0 * d, 10.0 * d, 100 * d),
            TENGRAD: row(100.0 * d**tengrad, 100.0 * d, 100 * d),
            BLOCKS: row(100.0 * saved * d**tengrad, 1000.0 * d, 100 * d),
        }
        if d <= 8:
            found[d][EXACT] = row(1e3 * d ** exact[0], 1e3 * d ** exact[1], 100 * d)
    return found


def test_all_four_hold_where_costs_grow_as_the_paper_says():
    assert [claim.holds for claim in depth._claims(costs(), ())] == [True] * 4


@pytest.mark.parametrize(
    ("options", "failing"),
    [
        ({"exact": (2.4, 2.0)}, [0]),
        ({"exact": (3.0, 1.6)}, [0, 1]),
        ({"saved": 4.9}, [2]),
        ({"tengrad": 1.11}, [3]),
    ],
)
def test_each_of_them_can_fail(options, failing):
    holds = [claim.holds for claim in depth._claims(costs(**options), ())]
    assert [place for place, one in enumerate(holds) if not one] == failing
