"""A statistic that was merged into another stays as it was, whatever becomes of the other."""

import pytest
import torch

from fisherviz.statistics import Diagonal


def summed(total, count, normalised):
    statistic = Diagonal("0")
    statistic.add(torch.tensor(total, dtype=torch.float64), count)
    if normalised:
        statistic.normalise()
    return statistic


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("change", [lambda s: s.add(torch.ones(2).double(), 1), lambda s: s.normalise()])
def test_changing_the_sum_leaves_its_parts_alone(normalised, change):
    part, whole = summed([2.0, 4.0], 2, normalised), Diagonal("0")
    whole.merge(part)
    change(whole)
    assert part.count == 2
    assert part.mean.tolist() == [1.0, 2.0]
    assert part.state_dict()["total"].tolist() == [2.0, 4.0]


def test_a_saved_state_is_a_copy_too():
    statistic = summed([2.0, 4.0], 2, False)
    state = statistic.state_dict()
    restored = Diagonal("0")
    restored.load_state_dict(state)
    statistic.normalise()
    restored.add(torch.ones(2).double(), 1)
    assert state["total"].tolist() == [2.0, 4.0]
    assert statistic.mean.tolist() == [1.0, 2.0]
    assert restored.mean.tolist() == [1.0, 5 / 3]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_an_average_is_that_of_the_means_whether_sums_were_normalised_or_not(first, second):
    average = Diagonal("0")
    average.blend(summed([2.0, 4.0], 2, first), 0.9)
    average.blend(summed([9.0, 3.0], 3, second), 0.9)
    assert average.mean.tolist() == pytest.approx([0.9 * 1 + 0.1 * 3, 0.9 * 2 + 0.1 * 1])
