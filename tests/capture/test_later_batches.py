"""Evidence of the first batches is no evidence of later ones that go another way, or order their examples otherwise."""

import functools

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook

import fisherviz as fv
from tests.oracles import exact, laws
from tests.oracles.checks import assert_matches

LAW = laws.Categorical()


def assert_right(net, batches, *, generic=None):
    """Dense matrix and solve in both orders; which layers have no structure then."""
    F = exact.fisher_of_batches(net, batches)
    v = torch.randn(len(F), dtype=torch.float64)
    for order in (batches, batches[::-1]):
        fisher = fv.Probe(net, "categorical").fisher(order)
        assert_matches(fisher.to_dense(), F)
        assert_matches(fv.Probe(net, "categorical").fisher(order) @ v, F @ v)
        assert_matches(fisher.solve(v, 0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), v))
        if generic is not None:
            assert [layer.name for layer in fisher.layers if layer.path == "generic"] == generic


# Batches that use a layer in another way


class Later(nn.Module):
    """Uses its first layer in another way where the batch says so."""

    def __init__(self, layer, way):
        super().__init__()
        self.a, self.head, self.way = layer, nn.Linear(4, 3), way

    def forward(self, x, other=None):
        return self.head((self.a(x) if other is None else self.way(self.a, x)).tanh().mean(1))


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "layer norm": lambda: nn.LayerNorm(4),
    "convolution": lambda: nn.Conv1d(3, 3, 1),
    "prelu": lambda: nn.PReLU(1),
}
WAYS = {
    "flipped": lambda a, x: a(x.flip(0)).flip(0),
    "positions first": lambda a, x: a(x.transpose(0, 1)).transpose(0, 1),
    "one by one": lambda a, x: torch.stack([a(row) for row in x]),
    "rolled": lambda a, x: a(x.roll(1, 0)).roll(-1, 0),
    "other weights": lambda a, x: functional_call(a, {name: 2 * p for name, p in a.named_parameters()}, (x,)),
    "scaled": lambda a, x: 2 * a(x),
    "twice": lambda a, x: a(a(x)),
}


# positions cannot come first where channels stand
CASES = [(layer, way) for layer in LAYERS for way in WAYS if (layer, way) != ("convolution", "positions first")]


@pytest.mark.parametrize(("layer", "way"), CASES)
def test_a_later_batch_that_uses_a_layer_otherwise(layer, way):
    torch.manual_seed(0)
    net = Later(LAYERS[layer](), WAYS[way]).double()
    for p in net.a.parameters():
        nn.init.normal_(p)
    draw = functools.partial(torch.randn, 3, 3, 4, dtype=torch.float64)
    assert_right(net, [{"x": draw()} for _ in range(6)] + [{"x": draw(), "other": torch.ones(3)}])


@pytest.mark.parametrize("number", [4, 5, 6])
def test_a_later_batch_that_couples_its_examples(number):
    torch.manual_seed(0)
    net = Later(nn.Linear(4, 4), lambda a, x: torch.cat([a(x[:1]), x[1:]])).double()
    draw = functools.partial(torch.randn, 3, 3, 4, dtype=torch.float64)
    batches = [{"x": draw()} for _ in range(number)] + [{"x": draw(), "other": torch.ones(3)}]
    for order in (batches, batches[::-1]):
        for ask in (lambda f: f.to_dense(), lambda f: f @ torch.ones(f.shape[0], dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="a Fisher needs independent examples"):
                ask(fv.Probe(net, "categorical").fisher(order))


# Batches whose examples stand in another order, with the same operations


class Sorted(nn.Module):
    """Sorts its examples by length, runs a layer on them and restores their order."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True, stable=True)
        there = (torch.arange(x.shape[1]) < lengths[order, None]).to(x)[..., None]
        return self.head((self.a(x[order]).tanh() * there).sum(1)[order.argsort()])


class Packed(nn.Module):
    """A mixture of experts that puts each one's examples side by side with products of ones and zeros."""

    def __init__(self):
        super().__init__()
        self.gate, self.head = nn.Linear(4, 2), nn.Linear(4, 3)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        share = self.gate(x).softmax(1)
        chosen = nn.functional.one_hot(share.argmax(1), 2).to(x)
        place = ((chosen.cumsum(0) - 1) * chosen).sum(1).long()
        sent = chosen[:, :, None] * nn.functional.one_hot(place, len(x)).to(x)[:, None, :]
        packed = torch.einsum("nec,nd->ecd", sent, x)
        found = torch.stack([expert(rows) for expert, rows in zip(self.experts, packed, strict=True)])
        return self.head(torch.einsum("nec,ecd->nd", sent * share[:, :, None], found).tanh())


@pytest.mark.parametrize("first", [5, 6, 7])
def test_a_later_batch_that_is_sorted(first):
    torch.manual_seed(0)
    net = Sorted().double()
    draw = functools.partial(torch.randn, 4, 4, 3, dtype=torch.float64)
    batches = [{"x": draw(), "lengths": torch.full((4,), 4)} for _ in range(first)]
    assert_right(net, [*batches, {"x": draw(), "lengths": torch.tensor([1, 3, 2, 4])}], generic=["a"])


def test_a_later_batch_that_needs_both_experts():
    torch.manual_seed(0)
    net, x = Packed().double(), torch.randn(200, 4, dtype=torch.float64)
    one = x[net.gate(x).argmax(1) == 0]
    batches = [{"x": rows} for rows in [*one[:24].split(4), *x[:24].split(4)]]
    assert_right(net, batches, generic=["experts.0", "experts.1"])


class Capacity(nn.Module):
    """A mixture of experts that take so many rows and drop the rest, which couples the examples."""

    def __init__(self, capacity):
        super().__init__()
        self.gate, self.head, self.capacity = nn.Linear(4, 3), nn.Linear(4, 3), capacity
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def sent(self, x):
        """Rows of each expert."""
        top = self.gate(x).argmax(1)
        return [(top == i).nonzero()[:, 0] for i in range(3)]

    def forward(self, x):
        y, share = x.clone(), self.gate(x).softmax(1)
        for i, (expert, rows) in enumerate(zip(self.experts, self.sent(x), strict=True)):
            kept = rows[: self.capacity]
            if len(kept):
                y = y.index_add(0, kept, expert(x[kept]) * share[kept, i : i + 1])
        return self.head(y.tanh())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("size", "capacity"), [(32, 14), (8, 4)])
def test_experts_that_drop_rows_are_refused(seed, size, capacity):
    torch.manual_seed(seed)
    net, x = Capacity(capacity).double(), torch.randn(32, 4, dtype=torch.float64)
    batches = [{"x": rows} for rows in x.split(size)]
    if any(len(rows) > capacity for batch in batches for rows in net.sent(batch["x"])):
        for ask in (lambda f: f.to_dense(), lambda f: f @ torch.ones(f.shape[0], dtype=torch.float64)):
            with pytest.raises(RuntimeError, match="a Fisher needs independent examples"):
                ask(fv.Probe(net, "categorical").fisher(batches))
    else:
        assert_matches(fv.Probe(net, "categorical").fisher(batches).to_dense(), exact.fisher_of_batches(net, batches))


# Forwards in the place of a layer's own


def _instance(net, monkeypatch, change):
    inner = net[0].forward
    net[0].forward = lambda x: change(inner(x))


def _class(net, monkeypatch, change):
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: change(own(self, x)) if self is net[0] else own(self, x))


def _named_class(net, monkeypatch, change):
    own = nn.Linear.forward

    @functools.wraps(own)
    def forward(self, x):
        return change(own(self, x)) if self is net[0] else own(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)


def _global_hook(net, monkeypatch, change):
    handle = register_module_forward_hook(lambda module, args, z: change(z) if module is net[0] else None)
    monkeypatch.setattr(net, "undo", handle.remove, raising=False)


def _hook(net, monkeypatch, change):
    net[0].register_forward_hook(lambda module, args, z: change(z))


CHANGES = [_instance, _class, _named_class, _global_hook, _hook]


@pytest.mark.parametrize("after", [False, True], ids=["before the probe", "after it"])
@pytest.mark.parametrize("way", CHANGES)
def test_forwards_that_are_changed_for_few_examples(way, after, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.cat([0.2 * torch.randn(40, 4), 3 * torch.randn(8, 4)]).double()  # the last batch alone is far out
    net.undo = lambda: None
    probe = fv.Probe(net, "categorical") if after else None
    try:
        way(net, monkeypatch, lambda z: z.clamp(-1.5, 1.5))
        F = torch.as_tensor(exact.fisher(net, x, LAW))
        fisher = (probe or fv.Probe(net, "categorical")).fisher(list(x.split(8)))
        assert_matches(fisher.to_dense(), F)
        assert_matches(fisher.diagonal(), F.diagonal())
    finally:
        net.undo()


@pytest.mark.parametrize("way", CHANGES)
def test_forwards_that_are_changed_by_less_than_rounding_explains(way, monkeypatch):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 4)
    net.undo = lambda: None
    try:
        way(net, monkeypatch, lambda z: 1.003 * z)
        found = fv.Probe(net, "categorical").fisher(x).to_dense()
        expected = torch.as_tensor(exact.fisher(net.double(), x.double(), LAW))
        assert torch.linalg.norm(found.double() - expected) < 1e-5 * torch.linalg.norm(expected)
    finally:
        net.undo()


def test_other_weights_for_some_examples():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            fast = functional_call(self.a, {"weight": 2 * self.a.weight, "bias": self.a.bias}, (x,))
            return self.head(torch.where(x[:, :1] > 1, fast, self.a(x)).tanh())

    torch.manual_seed(0)
    net, x = Switched().double(), torch.cat([0.2 * torch.randn(40, 4), 2 * torch.randn(8, 4)]).double()
    assert_right(net, [{"x": rows} for rows in x.split(8)], generic=["a"])


@pytest.mark.filterwarnings("ignore:BatchNorm in training mode", "ignore:layers '1' have no structure")
def test_a_hook_of_the_user_s_does_not_move_running_moments_twice():
    moments = []
    for hooked in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
        if hooked:
            net[1].register_forward_hook(lambda module, args, z: z.clone())
        optimizer = fv.optim.NaturalGradient(net, "gaussian", "kfac", lr=0.01, damping=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.randn(6, 4, dtype=torch.float64)).square().sum(1).mean().backward()
            optimizer.step()
        moments.append({name: b.clone() for name, b in net.named_buffers()})
    for name, b in moments[0].items():
        assert torch.equal(b, moments[1][name]), name


# Forward mode


class Cube(torch.autograd.Function):
    """A function without a rule of forward mode."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@pytest.mark.parametrize(
    "way",
    [lambda a, x: Cube.apply(a(x)), lambda a, x: torch.cdist(a(x), a(x) + 1) @ a(x)],
    ids=["own function", "without a second derivative"],
)
def test_products_where_a_later_batch_has_no_forward_mode(way):
    torch.manual_seed(0)
    net = Later(nn.Linear(4, 4), way).double()
    draw = functools.partial(torch.randn, 3, 3, 4, dtype=torch.float64)
    batches = [{"x": draw()} for _ in range(5)] + [{"x": draw(), "other": torch.ones(3)}]
    F = exact.fisher_of_batches(net, batches)
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fv.Probe(net, "categorical").fisher(batches) @ v, F @ v)
    assert fv.Probe(net, "categorical").fisher(batches).quadratic(v) == pytest.approx(float(v @ F @ v), rel=1e-9)


# Rows that all examples share, where there are as many as examples


class Positions(nn.Module):
    """One layer on the tokens and on the positions, which are added to every example."""

    def __init__(self, layer, on_tokens):
        super().__init__()
        self.layer, self.on_tokens = layer, on_tokens
        self.table, self.head = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x):
        tokens = self.layer(x) if self.on_tokens else x
        return self.head((tokens + self.layer(self.table)).tanh().mean(1))


@pytest.mark.parametrize("sizes", [[8] * 6 + [4], [1, 5, 5, 5, 5, 4], [4, 5], [5, 4, 5], [1, 4]])
@pytest.mark.parametrize("on_tokens", [True, False])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 4), lambda: nn.LayerNorm(4)], ids=["linear", "layer norm"])
def test_positions_that_are_as_many_as_the_examples(layer, on_tokens, sizes):
    torch.manual_seed(0)
    net = Positions(layer(), on_tokens).double()
    for p in net.layer.parameters():
        nn.init.normal_(p)
    assert_right(net, [{"x": torch.randn(n, 4, 4, dtype=torch.float64)} for n in sizes])


@pytest.mark.parametrize("limit", range(1000, 14000, 1500))
def test_positions_that_are_as_many_as_the_examples_of_a_piece(limit):
    torch.manual_seed(0)
    net = Positions(nn.LayerNorm(4), True).double()
    x = torch.randn(10, 4, 4, dtype=torch.float64)
    probe = fv.Probe(net, "categorical")
    probe.network.capture_bytes = limit
    assert_matches(probe.fisher({"x": x}).to_dense(), exact.fisher_of_batches(net, [{"x": x}]))


def test_a_second_data_set_on_the_same_probe_is_looked_at():
    torch.manual_seed(0)
    net = Sorted().double()
    probe, draw = fv.Probe(net, "categorical"), functools.partial(torch.randn, 8, 4, 3, dtype=torch.float64)
    probe.fisher([{"x": draw(), "lengths": torch.full((8,), 4)} for _ in range(4)]).to_dense()
    second = {"x": draw(), "lengths": torch.tensor([4, 4, 3, 4, 4, 3, 3, 3])}
    assert_matches(probe.fisher(second).to_dense(), exact.fisher_of_batches(net, [second]))


class Trimmed(Sorted):
    """The same, on no more positions than the longest example of the batch has."""

    def forward(self, x, lengths):
        return super().forward(x[:, : int(lengths.max())], lengths)


@pytest.mark.parametrize("kind", [Sorted, Trimmed])
@pytest.mark.parametrize("seed", range(8))
def test_a_later_batch_of_random_lengths(kind, seed):
    torch.manual_seed(seed)
    net = kind().double()
    draw = functools.partial(torch.randn, 6, 4, 3, dtype=torch.float64)
    batches = [{"x": draw(), "lengths": torch.full((6,), 4)} for _ in range(5)]
    batches.append({"x": draw(), "lengths": torch.randint(1, 5, (6,))})
    assert_matches(fv.Probe(net, "categorical").fisher(batches).to_dense(), exact.fisher_of_batches(net, batches))


class NeverOne(nn.Module):
    """Takes no batch of one; owns a parameter by itself, whose gradients have no structure."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x):
        return self.layer((x.squeeze() * self.scale)[:, :])


def test_a_model_that_takes_no_batch_of_one():
    torch.manual_seed(0)
    net, x = NeverOne().double(), torch.randn(5, 4, dtype=torch.float64)
    rows = [torch.stack([row, row]) for row in x]
    F = 0
    for pair in rows:
        z = net(pair)[0]
        p, own = z.softmax(0).detach(), list(net.parameters())
        J = torch.stack([
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(v, own, retain_graph=True)]) for v in z
        ])  # fmt: skip
        F = F + J.T @ (p.diag() - torch.outer(p, p)) @ J / len(x)
    assert_matches(fv.Probe(net, "categorical").fisher(x).to_dense(), F)


def test_rounding_of_large_features_is_no_coupling():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x = 300 + torch.randn(64, 8)
    with torch.no_grad():
        net.train()(x)
        net[1].running_mean.copy_(net[0](x).mean(0))
        net[1].running_var.copy_(net[0](x).var(0))
    net.eval()
    found = fv.Probe(net, "categorical").fisher(x).diagonal()
    expected = torch.as_tensor(exact.fisher(net.double(), x.double(), LAW)).diagonal()
    assert torch.linalg.norm(found.double() - expected) < 1e-3 * torch.linalg.norm(expected)
