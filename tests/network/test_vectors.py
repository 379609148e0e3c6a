"""Labels that are drawn from the model: once for each example, whatever interrupts or cuts the passes."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import nets
from tests.oracles.checks import assert_matches


class Interrupting(nn.Tanh):
    """Stops one forward pass; the class counts them, since a visit puts back what forwards do to a module."""

    countdown = -1

    def forward(self, x):
        Interrupting.countdown -= 1
        if Interrupting.countdown == 0:
            raise KeyboardInterrupt
        return super().forward(x)


def setting(likelihood, samples, batches=((0, 40),)):
    generator = torch.Generator().manual_seed(0)
    net = nets.randomised(nn.Sequential(nn.Linear(4, 5), Interrupting(), nn.Linear(5, 3)))
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    data = [x[low:high] for low, high in batches]

    def fisher():
        seeded = torch.Generator().manual_seed(1)
        return fv.Probe(net, likelihood).fisher(data, kind="mc", samples=samples, generator=seeded)

    return net, fisher


LIKELIHOODS = ["categorical", "bernoulli", "gaussian"]


@pytest.mark.covering(2)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("bytes_", [1, 2000])
def test_labels_do_not_depend_on_the_pieces_of_a_batch(monkeypatch, likelihood, samples, bytes_):
    _, fisher = setting(likelihood, samples, [(0, 17), (17, 40)])
    whole = fisher().to_dense()
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    assert_matches(fisher().to_dense(), whole, 1e-12)


@pytest.mark.covering
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("at", [1, 2, 5, 6, 9])
def test_an_interrupted_first_pass_leaves_no_trace_in_the_labels(monkeypatch, likelihood, at):
    _, fisher = setting(likelihood, 2, [(0, 17), (17, 40)])
    expected = fisher().to_dense()
    v = torch.ones(len(expected), dtype=torch.float64)
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", 1500)
    f = fisher()
    f.look()
    monkeypatch.setattr(Interrupting, "countdown", at)
    with pytest.raises(KeyboardInterrupt):
        f.diagonal()
    assert float(f.quadratic(v)) == pytest.approx(float(v @ expected @ v), rel=1e-9)
    assert_matches(f @ v, expected @ v)
    assert_matches(f.to_dense(), expected)


def test_an_interruption_while_labels_are_drawn_leaves_no_trace(monkeypatch):
    _, fisher = setting("categorical", 3, [(0, 17), (17, 40)])
    expected, f = fisher().to_dense(), fisher()
    search, calls = torch.searchsorted, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return search(*args, **kwargs)

    monkeypatch.setattr(torch, "searchsorted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        f.diagonal()
    assert_matches(f.diagonal(), expected.diagonal())
    assert_matches(f.to_dense(), expected)


def test_labels_are_those_of_one_draw_per_batch_from_the_seed():
    """The labels of an uncut pass, by hand."""
    net, fisher = setting("gaussian", 2)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(1)))
    generator = torch.Generator().manual_seed(seed)
    found = []
    f = fisher()
    inputs = next(iter(f.data))[0]
    z = net(inputs)
    labels = [z.detach() + torch.randn(z.shape, generator=generator, dtype=z.dtype) for _ in range(2)]
    for n in range(len(z)):
        for y in labels:
            loss = (y[n] - z[n]).square().sum() / 2
            parts = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
            found.append(torch.cat([p.reshape(-1) for p in parts]))
    rows = torch.stack(found)
    assert_matches(f.to_dense(), rows.T @ rows / len(rows))
