"""Models compiled after the optimizer was created train as uncompiled ones; what hooks cannot follow is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from fisherviz import optim
from tests.oracles.steps import assert_same, data, matrices, net

MAKE = {
    "foof": lambda m: optim.FOOF(m, "categorical", damping=0.1),
    "cw-ngd": lambda m: optim.CWNGD(m, "categorical", lr=0.05, damping=0.1),
    "plain kfac": lambda m: optim.KFAC(m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1),
    "adaptive kfac": lambda m: optim.KFAC(m, "categorical", damping=0.5, T=2, T1=2, T2=2),
}


def train(model, opt, run, steps=3):
    for k in range(steps):
        x, y = data(12, seed=k)

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = F.cross_entropy(run(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    return matrices(model)


@pytest.fixture(autouse=True)
def forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# the least and the most that an optimizer does; the others in the long run
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["foof", "adaptive kfac", *(pytest.param(name, marks=pytest.mark.soak) for name in ("cw-ngd", "plain kfac"))],
)
def test_steps_of_a_compiled_model_are_those_of_the_model(name):
    weights = []
    backend = CompileCounterWithBackend("aot_eager")
    for compiled in (False, True):
        torch.manual_seed(0)  # of the sampled labels
        model = net()
        opt = MAKE[name](model)
        weights.append(train(model, opt, torch.compile(model, backend=backend) if compiled else model))
    assert backend.frame_count > 0
    assert_same(weights[1], weights[0], 1e-12)


class Attending(torch.nn.Module):
    """Attention, whose projections are functions."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = torch.nn.MultiheadAttention(4, 2, batch_first=True), torch.nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.attention(x, x, x)[0])).mean(1)


@pytest.mark.slow
def test_attention_has_its_structure_in_compiled_models_too():
    weights, x, y = [], torch.randn(4, 3, 4, dtype=torch.float64), torch.arange(4) % 2
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Attending().double()
        opt = MAKE["plain kfac"](model)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(run(x), y).backward()
            opt.step()
        assert all(layer.structured for layer in opt.layers)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert_same(weights[1], weights[0], 1e-12)


def test_a_whole_graph_is_refused_with_the_way_out():
    model, (x, _) = net(), data()
    _opt = MAKE["foof"](model)
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    if torch.__version__ >= (2, 7):
        assert "compile it without fullgraph=True" in str(error.value)


def test_an_optimizer_that_came_after_the_first_compiled_run_says_so():
    model, (x, y) = net(), data()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    opt = MAKE["foof"](model)
    F.cross_entropy(compiled(x), y).backward()
    with pytest.raises(RuntimeError, match="create the optimizer before a compiled model first runs"):
        opt.step()


class Calling(torch.nn.Module):
    """A function between two layers, which is compiled by itself."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = torch.nn.Linear(4, 4), torch.nn.Linear(4, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def twice(h):
    return 2 * h.tanh()


@pytest.mark.parametrize("method", ["kfac", "kfra"])
def test_a_compiled_function_that_gives_its_buffers_away_says_so_and_the_way_out_works(method):
    """It has been trained before the optimizer was made; with the way out batches of all sizes train as uncompiled."""
    config = pytest.importorskip("torch._functorch.config")
    if not hasattr(config, "donated_buffer"):
        pytest.skip("this torch gives no buffers away")
    weights = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Calling(torch.compile(twice, backend="aot_eager") if compiled else twice).double()
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
        F.cross_entropy(model(x), y).backward()
        opt = optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=0.1)
        opt.zero_grad()
        if compiled:
            with pytest.raises(RuntimeError, match=r"donated_buffer = False, then call torch\.compiler\.reset"):
                F.cross_entropy(model(x), y).backward()
            opt = optim.NaturalGradient(model, "categorical", method, lr=0.1, damping=0.1)
        with config.patch(donated_buffer=False):
            torch.compiler.reset()
            for n in (6, 4, 2):
                opt.zero_grad()
                F.cross_entropy(model(x[:n]), y[:n]).backward()
                opt.step()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert_same(weights[1], weights[0], 1e-12)
