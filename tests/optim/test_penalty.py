"""Elastic weight consolidation against dense quadratic forms in float64."""

import copy

import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.oracles import nets

METHODS = list(fv.approximations)


def setting(likelihood="categorical"):
    net, x = nets.mlp(3, 4, 2), nets.vectors(9, 3)
    return net, fv.Probe(net, likelihood).fisher(x)


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def gradient(net):
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def move(net, seed, scale=0.3):
    """Shift all weights; return where they stand."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return flat(net)


def value_and_gradient(spring, net):
    for p in net.parameters():
        p.grad = None
    value = spring()
    value.backward()
    return float(value.detach()), gradient(net)


def assert_quadratic(spring, net, terms):
    """Value and gradient are those of Σ ½ λ (θ − θ*)ᵀ M (θ − θ*), written out."""
    theta = flat(net)
    value, slope = value_and_gradient(spring, net)
    expected = sum(0.5 * strength * float((theta - anchor) @ M @ (theta - anchor)) for M, strength, anchor in terms)
    assert value == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(slope, sum(strength * (M @ (theta - anchor)) for M, strength, anchor in terms))


@pytest.mark.parametrize("method", METHODS)
def test_a_penalty_is_the_quadratic_form_of_the_dense_matrix(method):
    net, fisher = setting()
    matrix = fv.approximate(fisher, method)
    anchor, spring = flat(net), fv.optim.penalty(matrix, 3.0)
    assert float(spring().detach()) == 0.0
    move(net, 1)
    assert_quadratic(spring, net, [(matrix.to_dense(), 3.0, anchor)])


def test_a_damped_matrix_holds_what_it_knows_nothing_of_too():
    net, fisher = setting()
    matrix = fv.approximate(fisher, "kfac").damped(0.2)
    anchor, spring = flat(net), fv.optim.penalty(matrix, 3.0)
    move(net, 1)
    assert_quadratic(spring, net, [(matrix.to_dense(), 3.0, anchor)])


@pytest.mark.parametrize("method", METHODS)
def test_penalties_of_three_tasks_add(method):
    net, _ = setting()
    terms, total = [], None
    for task in range(3):
        matrix = fv.approximate(fv.Probe(net, "categorical").fisher(nets.vectors(9, 3)), method)
        spring = fv.optim.penalty(matrix, task + 1.0)
        total = spring if total is None else total + spring
        terms.append((matrix.to_dense(), task + 1.0, flat(net)))
        move(net, task)
    assert total.tasks == 3
    assert_quadratic(total, net, terms)


ONE = {"identity", "diagonal", "layer", "cw-ngd", "foof"}


@pytest.mark.parametrize("method", METHODS)
def test_first_factors_of_all_tasks_take_the_memory_of_one(method):
    """What Benzing (2021, appendix C) proposes in place of a pair of Kronecker factors for each task."""
    net, fisher = setting()
    matrices = [fv.approximate(fisher, method) for _ in range(3)]
    first = fv.optim.penalty(matrices[0], 2.0)
    move(net, 1)
    both = first + fv.optim.penalty(matrices[1], 3.0)
    many = both + fv.optim.penalty(matrices[2], 4.0)
    assert len(many.springs) == (1 if method in ONE else 3)
    assert (many.bytes == both.bytes) is (method in ONE)
    assert "3 tasks" in repr(many)


def test_sums_of_sums_and_other_methods_keep_their_value():
    net, fisher = setting()
    a, b = (fv.approximate(fisher, method) for method in ("foof", "kfac"))
    start = flat(net)
    left = fv.optim.penalty(a, 2.0) + fv.optim.penalty(b)
    middle = move(net, 1)
    right = fv.optim.penalty(a, 0.5) + fv.optim.penalty(a, 1.5)
    end = move(net, 2)
    third = fv.optim.penalty(a, 3.0)
    move(net, 3)
    A, B = a.to_dense(), b.to_dense()
    terms = [(A, 2.0, start), (B, 1.0, start), (A, 2.0, middle), (A, 3.0, end)]
    assert_quadratic(left + right + third, net, terms)
    assert_quadratic(third + (right + left), net, terms)


def test_gradient_descent_with_a_penalty_ends_where_both_pull_equally():
    """A linear network's squared error is quadratic too: the minimum of both is that of a linear system."""
    net, x, y = nets.mlp(3, 2, bias=False), nets.vectors(9, 3), nets.vectors(9, 2)
    matrix = fv.approximate(fv.Probe(net, "gaussian").fisher(nets.vectors(7, 3)), "layer")
    anchor, spring = flat(net), fv.optim.penalty(matrix, 0.7)
    H = torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x)
    M = 0.7 * matrix.to_dense()
    expected = torch.linalg.solve(H + M, (y.T @ x).flatten() + M @ anchor)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (net(x) - y).square().sum() + spring()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(flat(net), expected, rtol=1e-6, atol=1e-8)


def test_an_exact_fisher_holds_a_copy_of_its_model():
    net, fisher = setting()
    M, anchor, learner = fisher.to_dense(), flat(net), copy.deepcopy(net)
    spring = fv.optim.penalty(fisher, 2.0, model=learner)
    move(learner, 1)
    assert_quadratic(spring, learner, [(M, 2.0, anchor)])


def test_a_matrix_from_a_file_holds_the_model_that_it_is_given(tmp_path):
    net, fisher = setting()
    matrix = fv.approximate(fisher, "kfac")
    loaded = fv.load_approximation(matrix.save(tmp_path / "kfac.safetensors"))
    anchor, spring = flat(net), fv.optim.penalty(loaded, 2.0, model=net)
    move(net, 1)
    assert_quadratic(spring, net, [(matrix.to_dense(), 2.0, anchor)])


@pytest.mark.parametrize("make", [fv.optim.FOOF, fv.optim.TENGraD, fv.optim.CWNGD], ids=lambda cls: cls.__name__)
def test_optimizers_that_step_by_rows_see_the_penalty(make):
    """Few examples of a wide layer are stepped by rows; a gradient that they do not explain is taken as it is."""
    finals = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        net, x, y = nets.mlp(40, 30, 2), nets.vectors(3, 40), torch.tensor([0, 1, 0])
        spring = fv.optim.penalty(fv.approximate(fv.Probe(net, "categorical").fisher(x), "diagonal"), 5.0)
        move(net, 1)
        optimizer = make(net.train(), "categorical")
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            if by_hand:
                loss.backward()
                pulls = torch.autograd.grad(spring(), list(net.parameters()))
                for p, pull in zip(net.parameters(), pulls, strict=True):
                    p.grad = p.grad + pull
            else:
                (loss + spring()).backward()
            optimizer.step()
        finals.append(flat(net))
    torch.testing.assert_close(*finals)


def test_float32_stays_float32():
    net = nn.Linear(3, 2)
    spring = fv.optim.penalty(fv.approximate(fv.Probe(net, "gaussian").fisher(torch.randn(5, 3)), "kfac"))
    value = spring()
    value.backward()
    assert value.dtype == net.weight.grad.dtype == torch.float32


def test_second_derivatives_are_the_matrix():
    net, fisher = setting()
    matrix = fv.approximate(fisher, "kfac")
    spring = fv.optim.penalty(matrix, 2.0)
    move(net, 1)
    slopes = torch.autograd.grad(spring(), list(net.parameters()), create_graph=True)
    v = torch.randn(matrix.shape[0], dtype=torch.float64)
    second = torch.autograd.grad(torch.cat([s.flatten() for s in slopes]) @ v, list(net.parameters()))
    torch.testing.assert_close(torch.cat([h.flatten() for h in second]), 2.0 * matrix.to_dense() @ v)


def test_what_cannot_be_a_penalty_is_refused_in_one_sentence(tmp_path):
    net, fisher = setting()
    kfac = fv.approximate(fisher, "kfac")
    loaded = fv.load_approximation(kfac.save(tmp_path / "kfac.safetensors"))
    other, _ = setting()
    for action, kind, message in [
        (lambda: fv.optim.penalty(torch.eye(3)), TypeError, "made of an approximation or a Fisher"),
        (lambda: fv.optim.penalty(kfac, -1.0), ValueError, "strength must be a number of at least 0"),
        (lambda: fv.optim.penalty(kfac, model=nn.Linear(3, 2)), ValueError, "no parameter '0.weight'"),
        (lambda: fv.optim.penalty(kfac, model=nn.Sequential(nn.Linear(2, 2))), ValueError, r"its own is \(2, 2\)"),
        (lambda: fv.optim.penalty(loaded), TypeError, "pass model="),
        (lambda: fv.optim.penalty(fisher), ValueError, "train a copy of the model"),
        (lambda: fv.optim.penalty(fisher, model=net), ValueError, "train a copy of the model"),
        (lambda: fv.optim.penalty(fv.approximations["kfac"]()), RuntimeError, "has not been fitted"),
        (lambda: fv.optim.penalty(kfac) + 1.0, TypeError, "call it for its value"),
        (lambda: fv.optim.penalty(kfac) + fv.optim.penalty(kfac, model=other), ValueError, "different parameters"),
    ]:
        with pytest.raises(kind, match=message):
            action()
