"""Nesterov's momentum on Sutskever's schedule, growing batches and averages against the papers' formulas."""

import math

import pytest
import torch

from fisherviz.support.errors import OptionError
from fisherviz.training import Nesterov
from fisherviz.training.baselines import sutskever_momentum
from fisherviz.training.data import Batches, Position
from fisherviz.training.evaluation import Average
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
    position, taken = Position(), []
    for k in range(1, 30):
        _, y, position = batches.take(position, k)
        taken.append(len(y))
    assert taken[-1] == n
    assert all(len_ >= 0.5 * batches.size_at(k) for k, len_ in enumerate(taken, 1))


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
