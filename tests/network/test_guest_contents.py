"""What a forward changes inside the model's attributes is put back: values, items and what is inside them."""

import argparse
import collections
import threading
import types
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.network.contents import MOST, SMALL
from fisherviz.network.guest import as_guest, refresh
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


@dataclass
class Meter:
    """A helper of the user's own."""

    n: int = 0
    log: list = field(default_factory=list)
    best: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    def update(self, x):
        self.n += 1
        self.log.append(len(x))
        self.best += 1
        self.fresh = True


@dataclass(slots=True)
class Slotted:
    n: int = 0
    log: list = field(default_factory=list)


class Refusing(collections.OrderedDict):
    """A dictionary that refuses to be changed by its methods, as outputs of transformers do."""

    def update(self, *args, **kwargs):
        raise RuntimeError("no update")

    def clear(self):
        raise RuntimeError("no clear")

    def copy(self):
        raise RuntimeError("no copy")


def circle():
    inner = {"n": 0}
    inner["self"] = inner
    return [inner]


def bump(container):
    container["n"] = container.get("n", 0) + 1
    container.move_to_end(next(iter(container)))


ATTRIBUTES = {
    "a plain tensor": (lambda: torch.zeros(3), lambda v, x: v.mul_(0.9).add_(1)),
    "NaN in a tensor": (lambda: torch.full((3,), torch.nan), lambda v, x: v.fill_(2)),
    "a tensor's data": (lambda: torch.zeros(3), lambda v, x: v.data.add_(1)),
    "a tensor's memory": (lambda: torch.zeros(3), lambda v, x: setattr(v, "data", torch.ones(4))),
    "an expanded tensor's base": (lambda: [b := torch.zeros(1), b.expand(3)], lambda v, x: v[0].add_(1)),
    "a view and its base": (lambda: [b := torch.zeros(4), b[:2]], lambda v, x: (v[1].add_(1), v[0].add_(1))),
    "an array": (lambda: np.zeros(2), lambda v, x: np.add(v, 1, out=v)),
    "an array of objects": (lambda: np.array([None, 3], dtype=object), lambda v, x: v.__setitem__(0, x)),
    "a list in a dictionary": (lambda: {"n": []}, lambda v, x: v["n"].append(len(x))),
    "four levels": (lambda: [{"a": ({"b": [1, 2]},)}], lambda v, x: v[0]["a"][0]["b"].pop()),
    "a tensor in a list": (lambda: [torch.zeros(1)], lambda v, x: v[0].add_(1)),
    "a tensor in a tuple": (lambda: (torch.zeros(1),), lambda v, x: v[0].add_(1)),
    "an item of a list": (lambda: [torch.zeros(1)], lambda v, x: v.__setitem__(0, v[0] + 1)),
    "bytes": (lambda: bytearray(b"abc"), lambda v, x: v.extend(b"d" * len(x))),
    "bytes that change": (lambda: bytearray(b"abc"), lambda v, x: v.__setitem__(0, (v[0] + 1) % 256)),
    "a deque": (lambda: collections.deque([1, 2, 3], maxlen=3), lambda v, x: v.append(len(x))),
    "a set": (lambda: {1, 2}, lambda v, x: v.add(len(x))),
    "a counter": (lambda: collections.Counter(a=1), lambda v, x: v.update("ab")),
    "the order of a dictionary": (lambda: collections.OrderedDict(a=1, n=0), lambda v, x: bump(v)),
    "a dictionary that refuses": (lambda: Refusing(a=[1]), lambda v, x: (v["a"].append(2), v.__setitem__("b", 1))),
    "a circle": (circle, lambda v, x: (v[0].__setitem__("n", v[0]["n"] + 1), v[0]["self"].__setitem__("m", 1))),
    "a namespace": (lambda: types.SimpleNamespace(n=0), lambda v, x: setattr(v, "n", v.n + 1)),
    "options": (lambda: argparse.Namespace(n=0), lambda v, x: setattr(v, "n", v.n + 1)),
    "a helper": (Meter, lambda v, x: v.update(x)),
    "a helper in a helper": (lambda: types.SimpleNamespace(meter=[Meter()]), lambda v, x: v.meter[0].update(x)),
    "a helper with slots": (Slotted, lambda v, x: (setattr(v, "n", v.n + 1), v.log.append(1))),
    "a generator in a list": (lambda: [np.random.default_rng(3)], lambda v, x: v[0].random()),
}  # fmt: skip


class Holding(nn.Module):
    """Changes what it holds at every forward, and gives the plain layer's output."""

    def __init__(self, held, change):
        super().__init__()
        self.layer, self.change = nn.Linear(3, 2), change
        self.held = held

    def forward(self, x):
        self.change(self.held, x)
        self.layer.calls = getattr(self.layer, "calls", 0) + 1
        return self.layer(x)


def picture(value, seen=()):
    """What something is and holds, with the identities of what can be changed."""
    if id(value) in seen:
        return "seen"
    seen = (*seen, id(value))
    if isinstance(value, torch.Tensor):
        return id(value), value.data_ptr(), tuple(value.shape), value.tolist().__repr__()
    if isinstance(value, np.ndarray):
        return id(value), value.__repr__()
    if isinstance(value, np.random.Generator):
        return id(value), str(value.bit_generator.state)
    if isinstance(value, dict):
        return id(value), [(key, picture(item, seen)) for key, item in value.items()]
    if isinstance(value, list | tuple | collections.deque):
        return id(value), [picture(item, seen) for item in value]
    if isinstance(value, set | bytearray):
        return id(value), sorted(value)
    if isinstance(value, Slotted):
        return id(value), value.n, picture(value.log, seen)
    if hasattr(value, "__dict__"):
        return id(value), picture(vars(value), seen)
    return value


ASKED = {
    "dense": lambda f: f.to_dense(), "product": lambda f: f @ torch.ones(f.shape[0]).double(),
    "kfac": lambda f: fv.approximate(f, "kfac").to_dense(),
}  # fmt: skip


@pytest.mark.covering
@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("which", ATTRIBUTES)
def test_what_attributes_hold_is_put_back(which, ask):
    make, change = ATTRIBUTES[which]
    net = nets.randomised(Holding(make(), change))
    before, found = picture(net.held), vars(net.layer).keys()
    x, names = nets.vectors(5, 3), list(found)
    fisher = fv.Probe(net, "gaussian").fisher([x[:2], x[2:]])
    result = ASKED[ask](fisher)
    assert picture(net.held) == before
    assert list(vars(net.layer)) == names
    if ask == "dense":
        assert_matches(result, exact.fisher(net.layer, x, laws.Gaussian()))


@pytest.mark.parametrize("which", ATTRIBUTES)
def test_what_attributes_hold_is_put_back_after_an_exception(which):
    make, change = ATTRIBUTES[which]

    def fails(held, x):
        change(held, x)
        raise ZeroDivisionError

    net = nets.randomised(Holding(make(), fails))
    before = picture(net.held)
    with pytest.raises(ZeroDivisionError):
        fv.Probe(net, "gaussian").fisher(nets.vectors(5, 3)).to_dense()
    assert picture(net.held) == before


def test_an_optimizer_leaves_what_its_own_passes_change():
    """Each step's own forward counts, those of the optimizer do not."""
    net = nets.randomised(Holding({"n": [0]}, lambda v, x: v["n"].__setitem__(0, v["n"][0] + 1))).train()
    x, y = nets.vectors(5, 3), nets.vectors(5, 2)
    optimizer = fv.optim.SubsampledNaturalGradient(net, "gaussian", fisher_data=[x])
    for _ in range(2):
        optimizer.zero_grad()
        (0.5 * (net(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    assert net.held == {"n": [2]}


class Drifting(nn.Module):
    """Scales by a tensor that it doubles at each forward, wherever it holds it."""

    def __init__(self, place):
        super().__init__()
        self.layer, self.place = nn.Linear(3, 2), place
        self.scale = {"attribute": torch.ones(1), "list": [torch.ones(1)], "tuple": (torch.ones(1),),
                      "object": types.SimpleNamespace(value=torch.ones(1))}[place]  # fmt: skip

    def forward(self, x):
        scale = {"attribute": lambda: self.scale, "object": lambda: self.scale.value}.get(
            self.place, lambda: self.scale[0]
        )()
        z = self.layer(x) * (1 if self.place == "tuple" else scale.double())
        scale.mul_(2)
        return z * scale.double().detach().clone()


@pytest.mark.parametrize("ask", ["dense", "product"])
@pytest.mark.parametrize("place", ["attribute", "list", "tuple", "object"])
def test_every_forward_of_a_visit_sees_values_as_the_first_found_them(place, ask):
    net, x = nets.randomised(Drifting(place)), nets.vectors(7, 3)
    F = 4 * torch.as_tensor(exact.fisher(net.layer, x, laws.Gaussian()))
    found = ASKED[ask](fv.Probe(net, "gaussian").fisher([x[:4], x[4:]]))
    assert_matches(found, F if ask == "dense" else F.sum(1))


def large():
    return torch.zeros(SMALL // 4 + 1)


def test_large_tensors_and_arrays_that_a_forward_changes_are_put_back():
    """They are copied in the first look, and afterwards where that saw them change."""
    held = [large(), np.zeros(SMALL), large()]
    net = nets.randomised(Holding(held, lambda v, x: (v[0].add_(1), np.add(v[1], 1, out=v[1]))))
    fisher = fv.Probe(net, "gaussian").fisher(nets.vectors(5, 3))
    for ask in ASKED.values():
        ask(fisher)
    assert not any(value.any() for value in held)
    assert held[2]._version == 0


def test_a_large_tensor_that_is_changed_later_is_named_once():
    net = Holding(large(), lambda v, x: v.add_(1))
    with pytest.warns(UserWarning, match=r"changed a tensor \(16385,\) in place that the model holds as 'held'"), \
            as_guest(net):  # fmt: skip
        net(torch.zeros(4, 3))
    assert float(net.held[0]) == 1
    with as_guest(net):
        net(torch.zeros(4, 3))
    assert float(net.held[0]) == 1


def test_a_large_tensor_that_nobody_changes_is_not_copied():
    net = Holding(large(), lambda v, x: None)
    with as_guest(net):
        kept = [value for each in vars(net).values() for value in [each] if isinstance(value, torch.Tensor)]
        refresh(net)
        assert net.held is kept[0]
    assert net.held._version == 0


class Running:
    """Something that runs: it has a lock, and must not be set back."""

    def __init__(self):
        self.n, self.lock = 0, threading.Lock()


FOREIGN = {
    "a lock": Running,
    "a module": lambda: types.SimpleNamespace(n=0, model=nn.Linear(2, 2)),
    "an optimizer deep inside": lambda: types.SimpleNamespace(n=0, all=[{"o": torch.optim.SGD([torch.zeros(1)])}]),
    "an iterator": lambda: types.SimpleNamespace(n=0, stream=iter([1, 2])),
}  # fmt: skip


@pytest.mark.parametrize("which", FOREIGN)
def test_objects_that_run_something_are_left_alone(which):
    """A trainer that a module knows is not set back to where it stood before a pass."""
    net = Holding(FOREIGN[which](), lambda v, x: setattr(v, "n", v.n + 1))
    with as_guest(net):
        net(torch.zeros(4, 3))
    assert net.held.n == 1


def test_an_attribute_that_holds_too_much_is_put_back_at_its_outermost_level():
    net = Holding([[n] for n in range(MOST + 5)], lambda v, x: (v[0].append(1), v.append(2)))
    with as_guest(net):
        net(torch.zeros(4, 3))
    assert len(net.held) == MOST + 5
    assert net.held[0] == [0, 1]
