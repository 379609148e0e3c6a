"""How modules are put together: tied, shared, frozen, parametrised, pruned, adapted, looped, in other orders inside."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.trust.catalogue.parts import Bare, Formula, formula, linear
from tests.trust.catalogue.row import Row, drawn, normal


class Adapter(nn.Module):
    """LoRA beside a frozen layer, as bare parameters or as modules."""

    def __init__(self, base, modules):
        super().__init__()
        self.base = base.requires_grad_(False)
        wide, high = base.in_features, base.out_features
        self.down = nn.Linear(wide, 2, bias=False) if modules else nn.Parameter(torch.randn(2, wide))
        self.up = nn.Linear(2, high, bias=False) if modules else nn.Parameter(torch.randn(high, 2))

    def forward(self, x):
        added = self.up(self.down(x)) if isinstance(self.up, nn.Module) else x @ self.down.T @ self.up.T
        return self.base(x) + 0.5 * added


class AddedProduct(nn.Module):
    """LoRA as a parametrisation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))

    def forward(self, w):
        return w + self.a @ self.b


class Checkpointed(nn.Module):
    """Layers whose forward runs again in the backward."""

    def __init__(self, reentrant, *parts):
        super().__init__()
        self.parts, self.head, self.reentrant = nn.Sequential(*parts), nn.Linear(4, 2), reentrant

    def forward(self, x):
        return self.head(checkpoint(self.parts, x, use_reentrant=self.reentrant))


class Transposed(nn.Module):
    """An autoencoder's weight, used as it is and transposed."""

    def __init__(self):
        super().__init__()
        self.code, self.b, self.head = nn.Linear(3, 4), nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(functional.linear(torch.tanh(self.code(x)), self.code.weight.T, self.b)))


class SideDoor(nn.Module):
    """A parameter that also acts from a plain list, for inputs beyond 2.9 alone."""

    def __init__(self, scaling):
        super().__init__()
        self.a, self.n, self.head = nn.Linear(3, 3), nn.LayerNorm(3) if scaling else Bare(), nn.Linear(3, 2)
        self.kept = [self.n.weight if scaling else self.n.b]

    def forward(self, x):
        h = self.n(torch.tanh(self.a(x)))
        return self.head(h + torch.where(x[:, :1] > 2.9, self.kept[0], torch.zeros_like(self.kept[0])))


class InAPlainList(nn.Module):
    """A layer that no module registers: none of the model's parameters."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = [nn.Linear(3, 3).double()], nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.hidden[0](x)))


class Lists(nn.Module):
    """Parameters in a list and a dictionary."""

    def __init__(self):
        super().__init__()
        self.w, self.b = (
            nn.ParameterList([torch.randn(3, 3) for _ in range(2)]),
            nn.ParameterDict({"b": torch.randn(3)}),
        )
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        for w in self.w:
            x = torch.tanh(x @ w + self.b["b"])
        return self.head(x)


class Packed(nn.Module):
    """A layer on the rows of a packed sequence, which are sorted by length."""

    def __init__(self):
        super().__init__()
        self.e, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=torch.tanh(self.e(packed.data)))
        return self.head(nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0].sum(1))


def chain(change=lambda net: None):
    """A builder of three linear layers of which something is changed."""

    def make():
        net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        change(net)
        return net

    return make


def _tie(net, freeze=False):
    net[2].weight = net[0].weight
    net[0].weight.requires_grad_(not freeze)


def _tie_biases(net):
    net[2].bias = net[4].bias = net[0].bias


def _share_original(net):
    parametrizations.orthogonal(net[0])
    net[2].weight = net[0].parametrizations.weight.original


def _adapt(net):
    parametrize.register_parametrization(net[0], "weight", AddedProduct3())
    net[0].parametrizations.weight.original.requires_grad_(False)


class AddedProduct3(AddedProduct):
    """Of a square weight."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(3, 2))


def _prune(net):
    prune.random_unstructured(net[0], "weight", 0.4)
    prune.ln_structured(net[2], "weight", 0.5, 2, 1)


def _twice(net):
    parametrizations.weight_norm(net[0])
    net[2] = net[0]


def by_mask(m, x):
    """Experts that see the rows that are chosen for them."""
    out, chosen = x.new_zeros(len(x), 3), x[:, 0] > 0
    out[chosen], out[~chosen] = m[0](x[chosen]), m[1](x[~chosen])
    return m[2](torch.tanh(out))


def one_by_one(m, x):
    """A branch of Python for each example."""
    return torch.stack([m[2](torch.tanh((m[0] if row[0] > 0 else m[1])(row))) for row in x])


def in_order(m, x):
    """The examples sorted by a feature while a layer sees them."""
    order = x[:, 0].argsort()
    return m[1](torch.tanh(m[0](x[order]))[order.argsort()])


def both_signs(m, x):
    """Each example beside its negative."""
    h = m[1](torch.tanh(m[0](torch.cat([x, -x]))))
    return h[: len(x)] + h[len(x) :]


def interleaved(m, x):
    """The same, one after the other."""
    signs = torch.tensor([1.0, -1.0]).to(x).repeat(len(x))[:, None]
    return m[1](torch.tanh(m[0](x.repeat_interleave(2, 0) * signs))).reshape(len(x), 2, -1).sum(1)


def tokens_outside(m, x):
    """Rows of all examples' first tokens, then of their second ones."""
    h = m[1](torch.tanh(m[0](x.transpose(0, 1).reshape(-1, 3))))
    return h.reshape(x.shape[1], len(x), -1).mean(0)


def looped(m, x):
    """A layer three times."""
    for _ in range(3):
        x = torch.tanh(m[0](x))
    return m[1](x)


def cached(m, x):
    """A parametrised weight that is computed once for two calls."""
    with parametrize.cached():
        return m[1](m[0](torch.tanh(m[0](x))))


def hiding():
    """The two examples that are looked at one by one are in order, and small; a later one is beyond 2.9."""
    x = normal(8, 3, seed=5)
    x[2], x[5] = torch.tensor([-9.0, 1.0, 2.0]).to(x), torch.tensor([9.0, 9.0, 9.0]).to(x)
    return x


def beyond():
    """The most varied example and the least varied one are small; another is beyond 2.9."""
    x = normal(6, 3)
    x[2], x[3] = 0.0, 3.0
    return x


def rows():
    """The rows of this kind."""
    two, three = (linear(3, 4), linear(4, 2)), (linear(3, 3), linear(3, 3), linear(3, 2))
    x = lambda: normal(6, 3)  # noqa: E731
    lengths = torch.tensor([4, 2, 3, 1, 4])
    networks = {
        "tied": chain(_tie), "tied and frozen": chain(lambda net: _tie(net, True)), "tied biases": chain(_tie_biases),
        "tied by its transpose": Transposed, "parametrised and shared": chain(_share_original),
        "parametrised, called twice": chain(_twice), "LoRA as a parametrisation": chain(_adapt),
        "weight norm as a hook": chain(lambda net: nn.utils.weight_norm(net[0])), "pruned": chain(_prune),
        "frozen bias": chain(lambda net: net[2].bias.requires_grad_(False)),
        "parametrisations cached inside": formula(
            cached, lambda: parametrizations.weight_norm(nn.Linear(3, 3)), linear(3, 2)),
        "LoRA": lambda: nn.Sequential(Adapter(nn.Linear(3, 4), False), nn.Tanh(), nn.Linear(4, 2)),
        "LoRA of modules": lambda: nn.Sequential(Adapter(nn.Linear(3, 4), True), nn.Tanh(), nn.Linear(4, 2)),
        "checkpoint": lambda: Checkpointed(False, nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh()),
        "checkpoint and LoRA": lambda: Checkpointed(False, Adapter(nn.Linear(3, 4), False), nn.Tanh()),
        "checkpoint and LoRA of modules": lambda: Checkpointed(False, Adapter(nn.Linear(3, 4), True), nn.Tanh()),
        "parameters in lists": Lists, "a layer in a loop": formula(looped, *three[::2]),
        "lazy, after a first run": lambda: (net := nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2)),
                                            net(torch.zeros(1, 3)))[0],
        "DataParallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))),
        "experts by mask": formula(by_mask, *three), "a branch for each example": formula(one_by_one, *three),
        "examples sorted inside": formula(in_order, *three[::2]),
        "examples flipped inside": formula(
            lambda m, x: m[1](torch.tanh(m[0](x.flip(0))).flip(0)), *two),
        "both signs in one batch": formula(both_signs, *two), "both signs, interleaved": formula(interleaved, *two),
        "skipped by a condition": formula(
            lambda m, x: m[2](torch.where(x[:, :1] > 0, torch.tanh(m[0](x)), torch.tanh(m[1](x)))), *three),
        "a constant input": formula(lambda m, x: m[1](torch.tanh(m[0](torch.ones_like(x)) + x)), *three[::2]),
    }  # fmt: skip
    found = [Row(name, drawn(make), x) for name, make in networks.items()]
    found += [
        Row("sorted inside, the two examples in order", drawn(formula(in_order, *three[::2])), hiding),
        Row("norm's weight by a side door, for later examples", drawn(lambda: SideDoor(True)), beyond),
        Row("bare parameter by a side door, for later examples", drawn(lambda: SideDoor(False)), beyond),
        Row("rows of all tokens, then examples", drawn(formula(tokens_outside, *two)), lambda: normal(5, 4, 3)),
        Row("rows of packed sequences", drawn(Packed), lambda: [((normal(5, 4, 3), lengths), torch.zeros(5).long())],
            examples=lambda data: [((data[0][0][0][n : n + 1], lengths[n : n + 1]), {}) for n in range(5)]),
        Row("a layer in a plain list", drawn(InAPlainList), x, dtypes=(torch.float64,)),
        Row("checkpoint, reentrant, of a layer's output", drawn(lambda: nn.Sequential(
            nn.Linear(3, 4), Checkpointed(True, nn.Linear(4, 4), nn.Tanh()))), x, "use_reentrant=False"),
        Row("checkpoint, reentrant, of the data: no gradient passes", drawn(
            lambda: Checkpointed(True, nn.Linear(3, 4), nn.Tanh())), x),
        Row("lazy, never run", lambda: nn.Sequential(nn.LazyLinear(4), nn.Tanh()), x, "run the model once",
            dtypes=(None,)),
        Row("scripted module", drawn(lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 4)), nn.Tanh())), x,
            "takes no hooks"),
        Row("scripted and frozen", drawn(lambda: Formula(lambda m, x: m[1](torch.tanh(m[0](x))), _frozen_script(),
                                                         nn.Linear(4, 2))), x),
        Row("a choice of layers", drawn(chain()), x, layers=["2", "4"]),
    ]  # fmt: skip
    return found


def _frozen_script():
    layer = torch.jit.script(nn.Linear(3, 4))
    for p in layer.parameters():
        p.requires_grad_(False)
    return layer
