"""Parts of the work announce themselves to whoever listens, and cost nothing otherwise."""

import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from fisherviz.support.timing import listening, part
from fisherviz.training.clock import Clock
from fisherviz.training.data import Batches
from fisherviz.training.optimizers import OPTIMIZERS, make_optimizer

PRECONDITIONED = ("kfac", "foof", "cw-ngd", "ekfac", "tengrad", "natural-gradient", "subsampled")


@contextmanager
def noted(heard, name):
    heard.append(name)
    yield
    heard.append(f"/{name}")


@part("inner")
def inner():
    return 3


def test_nobody_listening_changes_nothing():
    assert inner() == 3
    with part("block"):
        assert inner() == 3


def test_a_listener_hears_blocks_and_decorated_functions_in_order():
    heard = []
    with listening(lambda name: noted(heard, name)), part("outer"):
        inner()
    inner()
    assert heard == ["outer", "inner", "/inner", "/outer"]


def test_the_inner_listener_hears_alone_and_none_is_left_after_an_error():
    first, second = [], []

    @part("failing")
    def failing():
        raise KeyError

    with listening(lambda name: noted(first, name)), listening(lambda name: noted(second, name)):
        inner()
    with pytest.raises(KeyError), listening(lambda name: noted([], name)):
        failing()
    inner()
    assert (first, second) == ([], ["inner", "/inner"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [(name, {"statistics", "inversion"}) for name in PRECONDITIONED]
    + [("kbfgs", {"statistics"}), ("hessian-free", {"statistics", "inversion"}), ("ksd", {"statistics", "inversion"})]
    + [(name, set()) for name in ("sgd", "adam", "nesterov", "lbfgs")],
)
def test_every_optimizer_announces_its_parts(name, parts):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(12, 3), torch.randint(2, (12,))
    optimizer = make_optimizer(name, {}, model, "categorical", Batches(x, y, 6))

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    heard = []
    with listening(lambda part: noted(heard, part)):
        optimizer.step(closure)
        optimizer.step(closure)
    assert {part for part in heard if not part.startswith("/")} == parts


def test_every_optimizer_is_covered():
    names = {*PRECONDITIONED, "kbfgs", "hessian-free", "ksd", "sgd", "adam", "nesterov", "lbfgs"}
    assert set(OPTIMIZERS) == names


def test_the_clock_takes_inner_parts_off_outer_ones():
    clock = Clock(torch.device("cpu"))
    with clock.step():
        time.sleep(0.02)
        with part("inversion"):
            time.sleep(0.05)
    with part("inversion"):  # outside a step: somebody else's
        time.sleep(0.05)
    seconds = clock.lap()
    assert set(seconds) == {"step", "inversion"}
    assert seconds["step"] >= 0.02
    assert 0.05 <= seconds["inversion"] < 0.1
    assert clock.lap() == {}
