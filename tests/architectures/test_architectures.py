"""Small trained networks of each architecture: every exact quantity, every method and every optimizer."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch

import fisherviz as fv
from tests.architectures import definitions
from tests.architectures.networks import CASES, IGNORED, in_double, loss_of, parts, trained
from tests.covering import some
from tests.oracles import positions
from tests.oracles.checks import FLOAT32, assert_matches

N = 4
LAMBDA = 0.1
architectures = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def made(name):
    """A trained network and examples of its data."""
    torch.manual_seed(0)
    return trained(CASES[name]), *in_double(CASES[name].data(N))


def one_by_one(inputs):
    return [tuple(part[n : n + 1] for part in parts(inputs)) for n in range(N)]


def brute_force(name, labels=None):
    """The Fisher by autograd, one column of one example at a time."""
    net, inputs, targets = made(name)
    found = positions.rows(net, one_by_one(inputs), targets != IGNORED, labels, CASES[name].class_axis)
    return positions.mean(found)


exact = functools.cache(brute_force)


def fisher_of(name, **options):
    net, inputs, targets = made(name)
    return fv.Probe(net, CASES[name].likelihood).fisher(inputs, targets, **options)


@architectures
def test_which_layers_have_structure(name):
    fisher = fisher_of(name)
    fisher.look()
    found = {layer.name: layer.path for layer in fisher.layers}
    assert tuple(name for name, path in found.items() if path == "generic") == CASES[name].generic
    assert all(layer.note for layer in fisher.layers if layer.path == "generic")


@architectures
def test_exact_quantities(name):
    F, net = exact(name), made(name)[0]
    fisher = fisher_of(name)
    v = torch.randn(len(F), 2, dtype=torch.float64)
    assert_matches(fisher @ v, F @ v)
    assert fisher.quadratic(v[:, 0]) == pytest.approx(float(v[:, 0] @ F @ v[:, 0]), rel=1e-9)
    assert_matches(fisher.diagonal(), F.diagonal())
    damped = F + LAMBDA * torch.eye(len(F), dtype=torch.float64)
    assert_matches(fisher.solve(v, LAMBDA), torch.linalg.solve(damped, v))
    for order, expected in (("fro", F.norm()), ("trace", F.trace()), ("spectral", torch.linalg.matrix_norm(F, 2))):
        assert fisher.norm(order) == pytest.approx(float(expected), rel=1e-7)
    assert_matches(fisher.spectrum(5), torch.linalg.eigvalsh(F).flip(0)[:5], 1e-8)
    assert_matches(fisher.fresh().to_dense(), F)
    where = {layer.name: definitions.places(net, layer.parameters) for layer in fisher.layers}
    first, *_, last = where
    assert_matches(fisher.fresh().block(first, last), F[where[first]][:, where[last]])
    for layer in fisher.layers:
        if layer.path == "structured":
            unit, own = definitions.units(net, layer), F[where[layer.name]][:, where[layer.name]].numpy()
            blocks = torch.linalg.matrix_norm(fisher.units(layer.name)).square()
            assert_matches(blocks, [(own[unit == u][:, unit == u] ** 2).sum() for u in range(unit.max() + 1)], 1e-8)


@architectures
def test_the_gradient_is_that_of_the_loss(name):
    net, inputs, targets = made(name)
    gradients = torch.autograd.grad(loss_of(CASES[name], net, inputs, targets), list(net.parameters()))
    assert_matches(fisher_of(name).gradient(), torch.cat([g.reshape(-1) for g in gradients]))


@pytest.mark.covering
@architectures
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_labels_drawn_and_given(name, kind):
    net, inputs, targets = made(name)
    fisher = fisher_of(name, kind=kind)
    dense = fisher.to_dense()
    labels = targets if kind == "empirical" else fisher.vectors.labels(net(*parts(inputs)).detach(), 0)[0]
    assert_matches(dense, brute_force(name, labels))


@architectures
def test_single_precision(name):
    net, inputs, targets = made(name)
    single = inputs.float() if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() else inputs
    fisher = fv.Probe(copy.deepcopy(net).float(), CASES[name].likelihood).fisher(single, targets)
    F = exact(name)
    assert_matches(fisher.to_dense(), F, FLOAT32)
    v = torch.randn(len(F))
    assert_matches(fisher.fresh() @ v, F @ v.double(), FLOAT32)


@pytest.mark.covering
@architectures
@pytest.mark.parametrize("method", list(fv.approximations))
def test_methods_by_definition_and_as_matrices(name, method):
    net, inputs, targets = made(name)
    fisher, F = fisher_of(name), exact(name)
    approximation = fv.approximate(fisher, method)
    dense = approximation.to_dense()
    of, setting = method, "expand"
    if method in ("kfac-full", "kfac-tridiagonal"):
        of, setting = "kfac", "expand" if CASES[name].aligned else "reduce"
    checked = 0
    for layer in fisher.layers:
        where = definitions.places(net, layer.parameters)
        given = one_by_one(inputs), targets != IGNORED, CASES[name].class_axis
        expected = definitions.block(of, setting, F[where][:, where].numpy(), net, layer, *given)
        if expected is not None:
            checked += 1
            assert_matches(dense[where][:, where], expected, 1e-8)
    assert checked >= len(fisher.layers) / 2
    v, eye = torch.randn(len(F), 2, dtype=torch.float64), torch.eye(len(F), dtype=torch.float64)
    assert_matches(approximation @ v, dense @ v, 1e-8)
    assert_matches(approximation.diagonal(), dense.diagonal())
    assert_matches(approximation.solve(v, LAMBDA), torch.linalg.solve(dense + LAMBDA * eye, v), 1e-7)
    assert approximation.norm("fro") == pytest.approx(float(dense.norm()), rel=1e-8)
    assert approximation.norm("trace") == pytest.approx(float(dense.trace()), rel=1e-8)
    largest = float(torch.linalg.eigvalsh(dense).abs().max())
    assert approximation.norm("spectral") == pytest.approx(largest, rel=1e-5)


# one network, which has layers of every path; the others in the long run
@pytest.mark.parametrize("name", some(CASES, "GPT"))
def test_comparisons_leave_no_method_out(name, monkeypatch):
    F, fisher = exact(name), fisher_of(name)
    dense = fv.compare(fisher, progress=False)
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    structured = fv.compare(fisher_of(name), progress=False)
    for comparison in (dense, structured):
        assert set(comparison.methods) == set(fv.approximations)
        assert not [note for note in comparison.notes if "left out" in note and note.split()[0] in fv.approximations]
    keys = ["method", "row", "col", "metric"]
    both = dense.frame.merge(structured.frame, on=keys, suffixes=("", "_structured"))
    shared = both[both["metric"].isin(["relative_frobenius", "frobenius_cosine", "direction_cosine", "model_decrease"])]
    assert set(shared["method"]) == set(fv.approximations)
    # a difference of squares: what is below the square root of the rounding is only small
    assert_matches(shared["value_structured"], shared["value"], 1e-6)
    whole = dense.frame.query("row == 'all' and metric == 'relative_frobenius'").set_index("method")["value"]
    for method in fv.approximations:
        expected = float((fv.approximate(fisher, method).to_dense() - F).norm() / F.norm())
        assert whole[method] == pytest.approx(expected, rel=1e-6)


# ---- optimizers --------------------------------------------------------------------------------------------------

PRESETS: dict[str, Callable] = {
    "FOOF": lambda net, of: fv.optim.FOOF(net, of, lr=0.05),
    "EKFAC": lambda net, of: fv.optim.EKFAC(net, of, lr=0.01),
    "KFAC": lambda net, of: fv.optim.KFAC(net, of),
    "KFAC, plain": lambda net, of: fv.optim.KFAC(net, of, rescale=False, adapt=False, lr=0.01, damping=0.1),
    "CWNGD": lambda net, of: fv.optim.CWNGD(net, of, lr=0.05, damping=1.0),
    "TENGraD": lambda net, of: fv.optim.TENGraD(net, of),
    "HessianFree": lambda net, of: fv.optim.HessianFree(net, of),
    "NaturalGradient": lambda net, of: fv.optim.NaturalGradient(net, of, "exact", lr=0.1, damping=0.1),
}


def steps(case, net, optimizer):
    """Five steps on one batch lower its loss."""
    inputs, targets = in_double(case.data(96))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(case, net, inputs, targets)
        loss.backward()
        return loss

    losses = [closure().item()]
    for _ in range(5):
        optimizer.step(closure)
        losses.append(loss_of(case, net, inputs, targets).item())
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert min(losses[1:]) < losses[0], losses


@pytest.mark.covering
@architectures
@pytest.mark.parametrize("preset", PRESETS)
def test_optimizers_lower_the_loss(name, preset):
    net = copy.deepcopy(made(name)[0]).train()
    steps(CASES[name], net, PRESETS[preset](net, CASES[name].likelihood))


@pytest.mark.parametrize("name", ["ResNet", "MobileNet", "ViT", "Mixture of Experts"])
def test_kbfgs_takes_layers_that_see_one_vector_and_says_what_to_do_with_the_others(name):
    net, case = copy.deepcopy(made(name)[0]).train(), CASES[name]
    with pytest.raises(NotImplementedError, match="put it in a group with approximation='none'"):
        steps(case, net, fv.optim.KBFGS(net, case.likelihood))
    *others, weight, bias = net.parameters()
    groups = [{"params": [weight, bias]}, {"params": others, "approximation": "none", "lr": 0.01}]
    steps(case, net, fv.optim.KBFGS(net, case.likelihood, params=groups))
