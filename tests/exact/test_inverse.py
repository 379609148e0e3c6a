"""The exact damped inverse, dense and in example space, against torch's inverse of the damped dense matrix."""

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.operators.factorise import SingularMatrixError
from fisherviz.support.peaks import peak_bytes
from tests.oracles import nets


def fisher_of(examples, dtype=torch.float64):
    """29 parameters; example space where there are fewer than ten examples."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).to(dtype)
    return fv.Probe(model, "categorical").fisher(torch.randn(examples, 3, dtype=dtype))


def expected(fisher, damping, order="torch"):
    matrix = fisher.to_dense(order).double()
    return torch.linalg.inv(matrix + damping * torch.eye(len(matrix), dtype=torch.float64))


@pytest.mark.parametrize("examples", [4, 40])
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_it_is_the_inverse_of_the_damped_matrix(examples, damping):
    fisher = fisher_of(examples)
    found, oracle = fisher.inverse(damping), expected(fisher, damping)
    v = torch.randn(fisher.shape[0], 2, dtype=torch.float64)
    close = {"rtol": 1e-9, "atol": 1e-9 / damping}
    torch.testing.assert_close(found.to_dense(), oracle, **close)
    torch.testing.assert_close(found.to_dense("input"), expected(fisher, damping, "input"), **close)
    torch.testing.assert_close(found.block("2", "0"), oracle[16:, :16], **close)
    torch.testing.assert_close(found @ v, oracle @ v, **close)
    torch.testing.assert_close(found.diagonal(), oracle.diagonal(), **close)
    torch.testing.assert_close(found.solve(v), torch.linalg.solve(oracle, v), rtol=1e-8, atol=1e-8)
    for order, norm in (("fro", oracle.norm()), ("trace", oracle.trace()), ("spectral", 1 / damping)):
        assert found.norm(order) == pytest.approx(float(norm), rel=1e-6)


def test_it_solves_like_the_fisher_in_single_precision():
    for examples in (4, 40):
        fisher = fisher_of(examples, torch.float32)
        v = torch.randn(fisher.shape[0])
        torch.testing.assert_close(fisher.inverse(0.1) @ v, fisher.solve(v, 0.1), rtol=1e-4, atol=1e-4)


def test_factored_damping_means_its_plain_one():
    fisher = fisher_of(5)
    assert torch.equal(fisher.inverse(fv.FactoredTikhonov(0.1)).to_dense(), fisher.inverse(0.1**2).to_dense())
    assert repr(fisher.inverse(fv.Tikhonov(0.25))) == "damped inverse of exact Fisher, λ = 0.25: 28 x 28 over 2 layers"


def test_what_does_not_fit_is_refused_with_figures(monkeypatch):
    fisher = fisher_of(4)
    inverse = fisher.inverse(0.1)
    monkeypatch.setattr(fv.config, "memory_budget", 18_000)
    with pytest.raises(MemoryError, match=r"dense 28 x 28 matrix takes 18.4 KiB, but fv.config.memory_budget is"):
        inverse.to_dense()
    with pytest.raises(MemoryError, match=r"dense 28 x 28 inverse takes 18.4 KiB, but fv.config.memory_budget is"):
        inverse.block("0")
    with pytest.raises(MemoryError, match="28 x 28"):
        fisher_of(40).inverse(0.1)


def test_captures_that_do_not_fit_leave_the_dense_way(monkeypatch):
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(fisher_of(400))
    fisher, oracle = made[0], expected(made[1], 0.1)
    monkeypatch.setattr(fv.config, "memory_budget", 60_000)  # a quarter of it is for captures, which take 128 kB
    v = torch.randn(fisher.shape[0], dtype=torch.float64)
    torch.testing.assert_close(fisher.solve(v, 0.1), oracle @ v, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fisher.inverse(0.1).to_dense(), oracle, rtol=1e-9, atol=1e-9)


def test_captures_that_do_not_fit_are_refused_where_the_dense_way_is_long(monkeypatch):
    monkeypatch.setattr("fisherviz.exact.fisher.KEPT", 27)
    fisher = fisher_of(400)
    monkeypatch.setattr(fv.config, "memory_budget", 60_000)
    with pytest.raises(MemoryError, match="use fewer examples, or kind='mc'"):
        fisher.solve(torch.ones(fisher.shape[0], dtype=torch.float64), 0.1)


def test_an_inverse_that_does_not_exist_says_which_damping_would_do():
    with pytest.raises(SingularMatrixError, match="damping"):
        fisher_of(4).inverse(0.0)
    with pytest.raises(ValueError, match="at least 0"):
        fisher_of(4).inverse(-1.0)
    with pytest.raises(TypeError, match="number as Tikhonov damping, got str"):
        fisher_of(4).inverse("0.1")


def test_a_dense_inverse_takes_what_it_says_before(monkeypatch):
    """F, the factor and the inverse in float64, and the inverse: not the identity and two solutions beside them."""
    net, x = nets.mlp(20, 20, 20, 10).float(), nets.vectors(200, 20).float()
    fisher = fv.Probe(net, "gaussian").fisher(x)
    fisher.diagonal()
    planned = fisher.shape[0] ** 2 * (4 + 3 * 8)
    monkeypatch.setattr(fv.config, "memory_budget", planned - 1)
    with pytest.raises(MemoryError, match="inverse takes"):
        fisher.fresh().inverse(0.1)
    monkeypatch.setattr(fv.config, "memory_budget", planned)
    made = fisher.fresh()
    assert 0.8 * planned < peak_bytes(lambda: made.inverse(0.1)) <= planned
