"""A statistic that was merged into another stays as it was, whatever becomes of the other."""

import pytest
import torch

from fisherviz.capture.batch import Batch
from fisherviz.capture.captures import Capture, GenericCapture
from fisherviz.statistics import CrossInputFactor, Diagonal, InputFactor
from fisherviz.statistics.base import add_up


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


def test_what_has_seen_nothing_adds_nothing_and_is_no_average():
    whole = summed([2.0, 4.0], 2, False)
    whole.merge(Diagonal("0"))
    assert (whole.count, whole.mean.tolist()) == (2, [1.0, 2.0])
    nothing = Diagonal("0")
    nothing.normalise()
    nothing.merge(Diagonal("0"))
    assert (nothing.count, nothing.total) == (0, None)
    with pytest.raises(RuntimeError, match="has seen no example yet"):
        whole.blend(Diagonal("0"), 0.9)


def test_a_mean_of_a_mean_is_that_mean():
    statistic = summed([2.0, 4.0], 2, True)
    statistic.normalise()
    assert statistic.mean.tolist() == [1.0, 2.0]
    assert statistic.empty().total is None
    assert statistic.mean.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_sums_of_half_precision_numbers_are_taken_in_float32(half):
    statistic = Diagonal("0")
    for _ in range(4096):
        statistic.add(torch.ones(1, dtype=half), 1)
    assert statistic.total.dtype == torch.float32
    assert float(statistic.total) == 4096


def test_vectors_that_follow_count_no_example_and_no_input_again():
    a, g = torch.ones(2, 1, 3).double(), torch.ones(1, 2, 1, 1).double()
    inputs, squares = InputFactor("0"), Diagonal("0")
    for later in (False, True):
        for statistic in (inputs, squares):
            statistic.update(Batch({"0": Capture(a, g)}, 2, later=later))
    assert inputs.count == squares.count == 2
    assert inputs.mean.tolist() == [[1.0] * 3] * 3
    assert squares.mean.tolist() == [2.0] * 3


class Two:
    """This process, and another whose sums are known."""

    count = 2

    def __init__(self, others):
        self.others = others

    def add_up(self, totals):
        return [total if other.total is None else other.total if total is None else total + other.total
                for total, other in zip(totals, self.others, strict=True)]  # fmt: skip

    def exchange(self, counts):
        return [counts, [other.count for other in self.others]]


def test_the_sums_of_processes_are_the_merged_ones():
    mine = [summed([2.0, 4.0], 2, False), Diagonal("1"), summed([5.0, 1.0], 1, False)]
    others = [summed([9.0, 3.0], 3, False), summed([1.0, 2.0], 1, False), Diagonal("0")]
    expected = [(5, [11 / 5, 7 / 5]), (1, [1.0, 2.0]), (1, [5.0, 1.0])]
    add_up(mine, Two(others))
    assert [(s.count, s.mean.tolist()) for s in mine] == expected


@pytest.mark.parametrize(
    ("shape", "other"), [((2, 3, 4), (2, 2, 4)), ((2, 3, 2, 4), (2, 3, 4)), ((2, 3, 4), (2, 3, 2, 4))]
)
def test_positions_that_do_not_belong_together_have_no_cross_factor(shape, other):
    one, two = (Capture(torch.ones(s), torch.ones(1, *s)) for s in (shape, other))
    with pytest.raises(
        ValueError, match=r"'0' and '1' share weights over different positions \(\d and \d\) or in groups"
    ):
        CrossInputFactor("0", "1").contribution(one, two)


def test_gradients_alone_show_no_inputs():
    with pytest.raises(NotImplementedError, match="layer '0' has no inputs and pseudo-gradients"):
        InputFactor("0").contribution(GenericCapture(torch.ones(1, 2, 3)))
