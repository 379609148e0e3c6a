"""State, hooks, chance, coupling, functions of one's own, compilers, and models that change between two requests."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from tests.oracles import laws
from tests.trust.catalogue.modules import beyond
from tests.trust.catalogue.parts import Bare, Formula, formula, linear, network
from tests.trust.catalogue.row import Row, drawn, normal

FLOAT64 = (torch.float64,)
COUPLED, CHANGED = "changes with the other examples", "another than in an earlier pass|changed since"


class Remembering(nn.Module):
    """Keeps what it saw, in every way there is."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.calls, self.last, self.history, self.table = 0, None, [], {}

    def forward(self, x):
        self.calls += 1
        self.last = torch.tanh(self.a(x))
        self.history.append(self.last)
        self.table[self.calls] = 1
        return self.head(self.last)


class Counting(nn.Module):
    """Scales by how often it ran."""

    def __init__(self):
        super().__init__()
        self.a, self.head = nn.Linear(3, 3), nn.Linear(3, 2)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        scale = self.scale.clone()
        self.scale = self.scale * 1.01
        return self.head(torch.tanh(self.a(x)) * scale)


class Clamping(nn.Module):
    """Rewrites its own weight in the forward, as the layers of EEGNet do."""

    def __init__(self, how):
        super().__init__()
        self.a, self.head, self.how = nn.Linear(3, 3), nn.Linear(3, 2), how

    def forward(self, x):
        w = self.a.weight
        if self.how == "data":
            w.data = w.data.clamp(-0.3, 0.3)
        elif self.how == "in place":
            w.data.clamp_(-0.3, 0.3)
        elif self.how == "under no_grad":
            with torch.no_grad():
                w.clamp_(-0.3, 0.3)
        else:
            self.a.weight = nn.Parameter(w.detach().clamp(-0.3, 0.3))
        return self.head(torch.tanh(self.a(x)))


class OwnGenerators(nn.Module):
    """Draws from generators of its own, without effect."""

    def __init__(self):
        super().__init__()
        self.a, self.torch, self.numpy = nn.Linear(3, 2), torch.Generator().manual_seed(0), np.random.default_rng(0)

    def forward(self, x):
        torch.rand((), generator=self.torch)
        self.numpy.random()
        return self.a(x)


class Modal(nn.Module):
    """Does something else in training mode, and with another attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.head, self.scale = nn.Linear(3, 3), nn.Linear(3, 2), 1.0

    def forward(self, x):
        return self.head(torch.tanh(self.a(x)) * (2 if self.training else 1) * self.scale)


class Doubling(torch.autograd.Function):
    """Doubles what is beyond 1.5, with a rule for vmap that does not."""

    @staticmethod
    def forward(x):
        return torch.where(x > 1.5, 2 * x, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, g):
        return torch.where(ctx.saved_tensors[0] > 1.5, 2 * g, g)

    @staticmethod
    def vmap(info, in_dims, x):
        return Doubling.apply(x.clamp(max=1.5)) + (x - x.clamp(max=1.5)), in_dims[0]


class Exponential(torch.autograd.Function):
    """A function that vmap knows nothing of."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class StraightThrough(torch.autograd.Function):
    """A sign that is differentiated as the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, g):
        return g


def training(make):
    """In training mode."""
    return lambda: drawn(make)().train()


def hooked(register):
    """The network with a hook."""

    def build():
        model = drawn(network)()
        register(model)
        return model

    return build


def compiled(backend):
    """The network, compiled; the oracle knows the same parameters by the same order."""

    def build():
        torch._dynamo.reset()
        return torch.compile(drawn(network)(), backend=backend)

    return build


def _double_gradients(model):
    for p in model.parameters():
        p.register_hook(lambda g: 2 * g)


def _scale_output(model):
    model[0].register_forward_hook(lambda module, args, out: out * 1.002)


def _scale_input(model):
    model[3].register_forward_pre_hook(lambda module, args: (args[0] * 1.002,))


def _backward_hook(model):
    model[3].register_full_backward_hook(lambda module, inner, outer: tuple(2 * g for g in inner))


def _backward_pre_hook(model):
    model[2].register_full_backward_pre_hook(lambda module, outer: tuple(2 * g for g in outer))


def hidden(change):
    """A formula of two layers with something between them."""
    return formula(lambda m, x: m[1](change(torch.tanh(m[0](x)), x)), linear(3, 3), linear(3, 2))


def _rarely(draw):
    return lambda h, x: h * (1.0 if draw() > 0.2 else 0.0)


def _drawing(h, x):
    torch.rand(()), np.random.rand(), random.random()  # noqa: NPY002
    return h


def _energy(m, x):
    return torch.autograd.grad(m[1](torch.tanh(m[0](x.requires_grad_()))).sum(), x, create_graph=True)[0]


def _twice_called(m, x):
    return torch.func.functional_call(m[0], {name: 2 * p for name, p in m[0].named_parameters()}, (x,))


def rows():
    """The rows of this kind."""
    x = lambda: normal(6, 3)  # noqa: E731
    one, late = linear(3, 4), lambda: [normal(1, 3), normal(5, 3, seed=3)]
    vmap, grad = torch.func.vmap, torch.func.grad
    coupled = {
        "centred by the batch": (lambda h, x: h - h.mean(0), x),
        "centred from three examples on": (lambda h, x: h - (h.mean(0) if len(h) > 2 else 0), x),
        "centred, a first batch of one": (lambda h, x: h - h.mean(0) if len(h) > 1 else h, late),
        "the first example taken off, a little": (lambda h, x: h - 1e-3 * h[:1], x),
        "a branch on the largest of the batch": (lambda h, x: -h if x[:, 0].max() > 2.9 else h, beyond),
        "a gate that any example closes": (lambda h, x: h / (1 + (x[:, 0] > 2.9).any().to(x)), beyond),
        "statistics of the batch": (lambda h, x: functional.batch_norm(h, None, None, training=True), x),
    }
    found = [Row(name, drawn(hidden(change)), data, COUPLED) for name, (change, data) in coupled.items()]
    chance = {
        "dropout in evaluation mode": lambda h, x: functional.dropout(h, 0.5, training=True),
        "now and then by torch's generator": _rarely(lambda: float(torch.rand(()))),
        "now and then by Python's generator": _rarely(random.random),
        "now and then by numpy's generator": _rarely(np.random.random),
    }
    found += [Row(f"chance, {name}", drawn(hidden(change)), x, COUPLED) for name, change in chance.items()]
    found += [
        Row("chance, without effect", drawn(hidden(_drawing)), x),
        Row("chance, generators of its own", drawn(OwnGenerators), x),
        Row("a model that remembers", drawn(Remembering), x),
        Row("a buffer that moves in every forward", drawn(Counting), x),
        *[Row(f"a weight that is clamped, {how}", drawn(lambda h=how: Clamping(h)), x)
          for how in ("data", "in place", "under no_grad", "replaced")],
        Row("spectral norm in training mode", training(lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))), x),
        Row("spectral norm as a hook, in training mode", training(lambda: nn.Sequential(
            nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))), x),
        Row("hook on every gradient", hooked(_double_gradients), x, oracle=drawn(network)),
        Row("hook on a layer's backward", hooked(_backward_hook), x, oracle=drawn(network)),
        Row("hook before a layer's backward", hooked(_backward_pre_hook), x, oracle=drawn(network)),
        Row("hook on an output", hooked(_scale_output), x), Row("hook on an input", hooked(_scale_input), x),
        Row("function, no rule for vmap", drawn(lambda: Formula(
            lambda m, x: m[1](Exponential.apply(m[0](x))), Bare(), nn.Linear(3, 2))), x),
        Row("function, a wrong rule that later examples show", drawn(lambda: Formula(
            lambda m, x: m[1](m[0](Doubling.apply(x)) + Doubling.apply(m[0](x) * 2)), Bare(), nn.Linear(3, 2))),
            beyond),
        Row("function, straight through", drawn(formula(
            lambda m, x: m[1](StraightThrough.apply(m[0](x))), linear(3, 3), linear(3, 2))), x),
        Row("the input changed in place", drawn(formula(
            lambda m, x: m[1](torch.tanh(m[0](x.mul_(2)))), one, linear(4, 2))), x),
        Row("functorch inside, vmap", drawn(formula(
            lambda m, x: vmap(lambda row: m[1](torch.tanh(m[0](row))))(x), one, linear(4, 2))), x),
        Row("functorch inside, grad", drawn(formula(
            lambda m, x: vmap(grad(lambda row: m[1](torch.tanh(m[0](row))).sum()))(x), one, linear(4, 1))), x,
            law=laws.Gaussian()),
        Row("functorch inside, jvp", drawn(formula(
            lambda m, x: m[1](torch.func.jvp(lambda r: torch.tanh(m[0](r)), (x,), (torch.ones_like(x),))[1]),
            one, linear(4, 2))), x),
        Row("functorch inside, functional_call", drawn(formula(
            lambda m, x: m[1](_twice_called(m, x)), one, linear(4, 2))), x),
        Row("autograd inside", drawn(formula(_energy, one, linear(4, 1))), x, law=laws.Gaussian()),
        Row("a Fourier transform inside", drawn(formula(
            lambda m, x: m[1](torch.fft.rfft(m[0](x)).abs()), one, linear(3, 2))), x),
        Row("features sorted inside", drawn(formula(
            lambda m, x: m[1](m[0](x).sort(1).values), one, linear(4, 2))), x),
        *[Row(f"torch.compile, {backend}", compiled(backend), x, oracle=drawn(network), dtypes=FLOAT64)
          for backend in ("eager", "aot_eager")],
    ]  # fmt: skip
    changes = {
        "a weight": lambda model: model[0].weight.data.add_(1),
        "a hook": _scale_output,
        "a module": lambda model: model.__setitem__(1, nn.ReLU()),
        "a forward": lambda model: setattr(model[1], "forward", lambda x: x),
        "the type": lambda model: model.half(),
    }
    found += [Row(f"changed between, {name}", drawn(network), x, CHANGED, between=to) for name, to in changes.items()]
    found += [
        Row("changed between, the mode", drawn(Modal), x, CHANGED, between=lambda model: model.train()),
        Row("changed between, an attribute", drawn(Modal), x, CHANGED, between=lambda m: setattr(m, "scale", 3.0)),
        Row("changed between, a weight is frozen", drawn(network), x, "was frozen .* since the Probe was made",
            between=lambda model: model[0].weight.requires_grad_(False)),
    ]  # fmt: skip
    return found
