"""Nesterov's momentum on Sutskever's schedule, growing batches and averages against the papers' formulas."""

import math

import pytest
import torch

from fisherviz.support.errors import OptionError
from fisherviz.training import Average, Batches, Nesterov
from fisherviz.training.baselines import sutskever_momentum
from fisherviz.training.data import Position, permutation
from fisherviz.training.optimizers import _fisher_data, make_optimizer

DOUBLE = torch.float64


def gradient(theta):
    """Of ½ θᵀHθ with a fixed ill-conditioned H."""
    return torch.tensor([1.0, 10.0, 100.0], dtype=DOUBLE) * theta


def test_momentum_follows_the_schedule_of_sutskever():
    for step in (1, 249, 250, 499, 500, 10_000):
        assert sutskever_momentum(step, 0.995) == pytest.approx(
            min(1 - 2 ** (-1 - math.log2(step // 250 + 1)), 0.995), abs=1e-15
        )


def test_nesterov_is_the_papers_iteration_seen_from_where_gradients_are_taken():
    period, lr = 2, 1e-3
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE))
    opt = Nesterov([p], lr=lr, momentum=0.8, period=period)
    theta, v = p.detach().clone(), torch.zeros(3, dtype=DOUBLE)
    for t in range(1, 9):
        p.grad = gradient(p.detach())
        opt.step()
        v = (mu := sutskever_momentum(t, 0.8, period)) * v - lr * gradient(theta + mu * v)
        theta = theta + v
        ahead = theta + sutskever_momentum(t + 1, 0.8, period) * v
        torch.testing.assert_close(p.detach(), ahead, rtol=1e-12, atol=0)


def test_nesterov_with_constant_momentum_is_torchs():
    p, q = (torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=DOUBLE)) for _ in range(2))
    mine = Nesterov([p], lr=1e-3, momentum=0.5, weight_decay=0.1)  # the schedule starts at 0.5
    theirs = torch.optim.SGD([q], lr=1e-3, momentum=0.5, nesterov=True, weight_decay=0.1)
    for _ in range(5):
        for r, opt in ((p, mine), (q, theirs)):
            r.grad = gradient(r.detach())
            opt.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=0)


def examples(n):
    return torch.arange(n).unsqueeze(1).double(), torch.arange(n)


def test_an_epoch_shows_every_example_once_in_an_order_of_its_own():
    batches = Batches(*examples(23), size=5, seed=1)
    orders, position, step = [], Position(), 0
    for epoch in range(3):
        seen = []
        while position.epoch == epoch:
            step += 1
            _, y, position = batches.take(position, step)
            seen += y.tolist()
        assert sorted(seen) == list(range(23))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    again = Batches(*examples(23), size=5, seed=1).take(Position(1, 10), 99)
    assert again[1].tolist() == orders[1][10:15]  # any position, without what was before it


def test_batches_grow_exponentially_until_they_hold_everything():
    n, first, last = 2000, 50, 20
    batches = Batches(*examples(n), size=first, full_at=last)
    b = (last - 1) / math.log(n / first)
    for k in range(1, 30):
        expected = n if k >= last else min(round(first * math.exp((k - 1) / b)), n)
        assert batches.size_at(k) == expected


def scheduled(n, first, last, k):
    """m_k by the formula, in plain floats."""
    return n if k >= last else min(round(first * math.exp((k - 1) * math.log(n / first) / (last - 1))), n)


@pytest.mark.parametrize(("n", "first", "last"), [(2000, 50, 20), (101, 7, 40), (97, 90, 6), (30, 1, 2), (12, 12, 5)])
def test_a_growing_batch_holds_exactly_as_many_different_examples_as_scheduled(n, first, last):
    batches, position = Batches(*examples(n), size=first, full_at=last, seed=3), Position()
    for k in range(1, last + 10):
        x, y, position = batches.take(position, k)
        assert len(set(y.tolist())) == len(y) == scheduled(n, first, last, k)
        assert torch.equal(x.flatten().long(), y)


def test_an_epoch_of_growing_batches_passes_over_only_what_its_first_batch_already_had():
    n, position = 101, Position()
    batches, epochs = Batches(*examples(n), size=7, full_at=60, seed=3), [[]]
    tails = [[]]
    for k in range(1, 60):
        _, y, after = batches.take(position, k)
        labels = y.tolist()
        cut = len(labels) if after.epoch == position.epoch or after.offset == 0 else n - position.offset
        epochs[position.epoch] += labels[:cut]
        if after.epoch > position.epoch:
            epochs.append(labels[cut:])
            tails.append(labels[:cut] if labels[cut:] else [])
        position = after
    assert len(epochs) > 10
    for shown, tail in zip(epochs[:-1], tails, strict=False):
        assert len(set(shown)) == len(shown)
        assert set(range(n)) - set(shown) <= set(tail)


def test_any_growing_batch_is_taken_without_those_before_it():
    batches, position, places = Batches(*examples(101), size=7, full_at=20, seed=3), Position(), []
    for k in range(1, 25):
        places.append(position)
        _, y, position = batches.take(position, k)
        again = Batches(*examples(101), size=7, full_at=20, seed=3).take(places[-1], k)
        assert again[1].tolist() == y.tolist()
        assert again[2] == position


def test_batches_of_fixed_size_stay_those_of_earlier_releases():
    batches, taken, position = Batches(*examples(23), size=5, seed=1), [], Position()
    order = [permutation(23, 1, epoch).tolist() for epoch in range(2)]
    for k in range(1, 11):
        _, y, position = batches.take(position, k)
        taken.append(y.tolist())
    assert taken == [one[i : i + 5] for one in order for i in range(0, 23, 5)]
    assert [y.tolist() for _, y in Batches(*examples(23), size=5, seed=1).steps(10)] == taken


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": -1}, "size must not be negative"), ({"size": 2, "full_at": 1}, "full_at at least 2"),
        ({"size": 2, "targets": torch.zeros(3)}, "5 inputs and 3 targets"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Batches(**{"inputs": torch.zeros(5), "targets": torch.zeros(5), **given})


def test_an_independent_order_is_another_order_of_the_same_examples():
    batches = Batches(*examples(40), size=10)
    labels = torch.cat([y for _, y in batches.independent()])
    assert sorted(labels.tolist()) == list(range(40))
    assert labels[:10].tolist() != batches.take(Position(), 1)[1].tolist()


@pytest.mark.parametrize(("wanted", "sizes"), [(30, [30, 10]), (100, [40]), ("independent", [10] * 4)])
def test_the_fishers_mini_batches_may_have_a_size_of_their_own(wanted, sizes):
    batches = Batches(*examples(40), size=10)
    given = _fisher_data(wanted, batches)
    assert [len(y) for _, y in given] == sizes
    assert torch.equal(torch.cat([y for _, y in given]), torch.cat([y for _, y in batches.independent()]))


def test_a_size_of_the_fishers_mini_batches_is_checked():
    x, y = examples(40)
    with pytest.raises(OptionError, match="fisher_data must be a positive whole number, got 0"):
        make_optimizer("subsampled", {"fisher_data": 0}, torch.nn.Linear(2, 1), "gaussian", Batches(x, y, size=10))


def test_the_averaged_iterate_is_the_papers():
    model = torch.nn.Linear(2, 1)
    start = model.weight.detach().clone()
    average, expected = Average(model, 0.9), start
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update()
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    present = model.weight.detach().clone()
    with average.inside():
        torch.testing.assert_close(model.weight.detach(), expected)
    assert torch.equal(model.weight, present)
    iterate, averaged = average.measured(lambda: model.weight.detach().clone())
    torch.testing.assert_close(averaged, expected)
    assert torch.equal(iterate, present)
    assert torch.equal(model.weight, present)


@pytest.mark.parametrize("xi", [1.0, -0.1])
def test_an_average_that_never_moves_is_refused(xi):
    with pytest.raises(ValueError, match="must be in"):
        Average(torch.nn.Linear(2, 1), xi)
