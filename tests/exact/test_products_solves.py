"""Products, quadratic forms, damped solves, norms and spectra of the exact Fisher against dense algebra."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.operators import SingularMatrixError
from tests.oracles import exact, laws, nets
from tests.oracles.checks import FLOAT32, assert_matches


def setting(likelihood="categorical", N=5, widths=(3, 4, 2)):
    net, x = nets.mlp(*widths), nets.vectors(N, widths[0])
    return fv.Probe(net, likelihood).fisher(x), exact.fisher(net, x, laws.ALL[likelihood]), net


every_law = pytest.mark.parametrize("likelihood", laws.ALL)


@every_law
def test_product_with_a_flat_vector(likelihood):
    fisher, F, _ = setting(likelihood)
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher @ v, F @ v.numpy())


@every_law
def test_product_with_a_matrix_of_columns(likelihood):
    fisher, F, _ = setting(likelihood)
    V = nets.vectors(len(F), 3)
    assert_matches(fisher @ V, F @ V.numpy())


def test_product_with_a_dictionary_like_named_parameters():
    fisher, F, net = setting()
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    product = fisher @ v
    flat = torch.cat([t.reshape(-1) for t in v.values()]).numpy()
    assert list(product) == [name for name, _ in net.named_parameters()]
    assert all(product[name].shape == p.shape for name, p in net.named_parameters())
    assert_matches(torch.cat([t.reshape(-1) for t in product.values()]), F @ flat)


def test_dictionary_entries_may_come_in_any_order():
    fisher, F, net = setting()
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in v.values()]).numpy()
    product = fisher @ dict(reversed(v.items()))
    assert_matches(torch.cat([product[name].reshape(-1) for name in v]), F @ flat)


def test_product_with_parameters_themselves_carries_no_graph():
    fisher, _, net = setting()
    product = fisher @ dict(net.named_parameters())
    assert not any(t.requires_grad for t in product.values())


def test_dictionary_with_a_missing_or_unknown_name_is_refused():
    fisher, _, net = setting()
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=r"0\.bias"):
        fisher @ {name: t for name, t in v.items() if name != "0.bias"}
    with pytest.raises((ValueError, TypeError), match="stranger"):
        fisher @ {**v, "stranger": torch.ones(2)}
    with pytest.raises((ValueError, TypeError), match=r"0\.bias"):
        fisher @ {**v, "0.bias": torch.ones(2)}


@every_law
def test_quadratic_form(likelihood):
    fisher, F, _ = setting(likelihood)
    u, v = nets.vectors(2, len(F))
    assert float(fisher.quadratic(u)) == pytest.approx(u.numpy() @ F @ u.numpy(), rel=1e-10)
    assert float(fisher.quadratic(u, v)) == pytest.approx(u.numpy() @ F @ v.numpy(), rel=1e-8)
    assert float(fisher.quadratic(u, u)) == pytest.approx(float(fisher.quadratic(u)), rel=1e-12)


def test_quadratic_form_of_dictionaries():
    fisher, F, net = setting()
    u = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in u.values()]).numpy()
    assert float(fisher.quadratic(u)) == pytest.approx(flat @ F @ flat, rel=1e-10)


SIZES = {"more parameters than vectors": (2, (3, 4, 2)), "more vectors than parameters": (40, (2, 2, 2))}


@every_law
@pytest.mark.parametrize(("N", "widths"), SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_damped_solve(likelihood, N, widths, damping):
    fisher, F, _ = setting(likelihood, N, widths)
    V = nets.vectors(len(F), 2)
    expected = np.linalg.solve(F + damping * np.eye(len(F)), V.numpy())
    assert_matches(fisher.solve(V[:, 0], damping), expected[:, 0], 1e-8)
    assert_matches(fisher.solve(V, damping), expected, 1e-8)
    determinant = np.linalg.slogdet(F + damping * np.eye(len(F)))[1]
    assert fisher.log_determinant(damping) == pytest.approx(determinant, rel=1e-8)


def test_damped_solve_of_a_dictionary():
    fisher, F, net = setting()
    v = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([t.reshape(-1) for t in v.values()]).numpy()
    solution = fisher.solve(v, 0.2)
    assert list(solution) == list(v)
    expected = np.linalg.solve(F + 0.2 * np.eye(len(F)), flat)
    assert_matches(torch.cat([t.reshape(-1) for t in solution.values()]), expected)


@pytest.mark.parametrize(("N", "widths"), SIZES.values(), ids=SIZES.keys())
def test_solve_undoes_the_damped_product(N, widths):
    fisher, F, _ = setting("gaussian", N, widths)
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fisher.solve(fisher @ v + 0.5 * v, 0.5), v, 1e-9)


def test_tiny_damping_in_float32_keeps_the_solution_of_a_vector_in_the_range():
    """For v = U c the solution is U (damping I + U^T U)^-1 c: the subtractive form loses all digits."""
    net, x = nets.mlp(3, 4, 2), nets.vectors(3, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    v = F @ np.ones(len(F))
    expected = np.linalg.solve(F + 1e-6 * np.eye(len(F)), v)
    fisher = fv.Probe(net.float(), "gaussian").fisher(x.float())
    actual = fisher.solve(torch.from_numpy(v).float(), 1e-6).double().numpy()
    residual = F @ actual + 1e-6 * actual - v
    assert np.linalg.norm(residual) < 1e-3 * np.linalg.norm(v)
    assert expected.shape == actual.shape


@every_law
@pytest.mark.parametrize("N", [3, 40])
def test_norms_of_the_whole_matrix(likelihood, N):
    fisher, F, _ = setting(likelihood, N, (2, 3, 2))
    assert float(fisher.norm()) == pytest.approx(np.linalg.norm(F), rel=1e-10)
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-10)
    assert float(fisher.norm("spectral")) == pytest.approx(np.linalg.norm(F, 2), rel=1e-8)
    assert float(fisher.norm("trace")) == pytest.approx(np.trace(F), rel=1e-10)


@every_law
@pytest.mark.parametrize("N", [3, 40])
def test_norms_of_blocks(likelihood, N):
    fisher, F, _ = setting(likelihood, N, (2, 3, 2))
    parts = [slice(0, 9), slice(9, 17)]
    for i in range(2):
        for j in range(2):
            block = F[parts[i], parts[j]]
            assert float(fisher.norm("fro", block=(i, j))) == pytest.approx(np.linalg.norm(block), rel=1e-9)
            assert float(fisher.norm("spectral", block=(i, j))) == pytest.approx(np.linalg.norm(block, 2), rel=1e-7)
        assert float(fisher.norm("trace", block=(i, i))) == pytest.approx(np.trace(F[parts[i], parts[i]]), rel=1e-10)
    by_name = float(fisher.norm("fro", block=("0", "2")))
    assert by_name == pytest.approx(float(fisher.norm("fro", block=(0, 1))), rel=1e-12)


def test_trace_of_an_off_diagonal_block_is_refused():
    fisher, _, _ = setting()
    with pytest.raises((ValueError, TypeError), match="diagonal"):
        fisher.norm("trace", block=(0, 1))


@pytest.mark.parametrize("ord", ["nuc", 2, None])
def test_an_unknown_norm_is_refused_with_the_known_ones(ord):
    fisher, _, _ = setting()
    with pytest.raises((ValueError, TypeError), match="spectral"):
        fisher.norm(ord)


@every_law
@pytest.mark.parametrize("N", [2, 40])
def test_spectrum_is_descending_and_complete(likelihood, N):
    fisher, F, _ = setting(likelihood, N, (2, 3, 2))
    eigenvalues = np.linalg.eigvalsh(F)[::-1]
    spectrum = fisher.spectrum().numpy()
    assert (np.diff(spectrum) <= 0).all()
    assert (spectrum > 0).all()
    rank = int((eigenvalues > 1e-12 * eigenvalues[0]).sum())
    padded = np.zeros(max(len(spectrum), rank))
    padded[: len(spectrum)] = spectrum
    reference = np.zeros_like(padded)
    reference[:rank] = eigenvalues[:rank]
    assert_matches(padded, reference, 1e-10)


def test_a_wide_float32_network_keeps_the_eigenvalues_that_are_no_rounding():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(500, 800), nn.Tanh(), nn.Linear(800, 4))
    x = torch.randn(6, 500) * torch.logspace(0, -1, 6).unsqueeze(1)  # examples of very different gradients
    parameters, columns = list(net.parameters()), []
    for log_p in torch.log_softmax(net(x), 1):
        for c in range(4):
            score = torch.cat([p.reshape(-1) for p in torch.autograd.grad(log_p[c], parameters, retain_graph=True)])
            columns.append(score.double() * (log_p[c].detach().double().exp() / len(x)).sqrt())
    U = torch.stack(columns)
    reference = torch.linalg.eigvalsh(U @ U.T).flip(0)[:18]  # softmax leaves 3 directions of each example
    for k in (None, 5):
        spectrum = fv.Probe(net, "categorical").fisher(x).spectrum(k)
        assert_matches(spectrum, reference[:k].numpy(), FLOAT32)


@pytest.mark.parametrize("k", [1, 3])
def test_leading_eigenvalues(k):
    fisher, F, _ = setting("gaussian", 6)
    assert_matches(fisher.spectrum(k), np.linalg.eigvalsh(F)[::-1][:k], 1e-8)


def test_small_output_gradients_are_no_zero_matrix():
    """A confident network's Fisher is tiny but not nothing: relative accuracy holds at any scale."""
    net, x = nets.mlp(2, 3, 2), nets.vectors(3, 2)
    with torch.no_grad():
        net[2].weight.mul_(1e-7)
        net[2].bias.copy_(torch.tensor([30.0, 0.0]))
    F = exact.by_jacobian(net, x, laws.Bernoulli())
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    assert_matches(fisher.to_dense(), F)
    assert float(fisher.norm("fro")) == pytest.approx(np.linalg.norm(F), rel=1e-9)
    assert float(fisher.norm("spectral")) == pytest.approx(np.linalg.norm(F, 2), rel=1e-6)


def test_float32_products_and_solves():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    F = exact.fisher(net, x, laws.Categorical())
    fisher = fv.Probe(net.float(), "categorical").fisher(x.float())
    v = nets.vectors(len(F), 1)[:, 0].float()
    assert (fisher @ v).dtype == torch.float32
    assert_matches(fisher @ v, F @ v.double().numpy(), FLOAT32)
    expected = np.linalg.solve(F + 0.1 * np.eye(len(F)), v.double().numpy())
    assert_matches(fisher.solve(v, 0.1), expected, FLOAT32)


KEPT = {"nothing": lambda f: f, "captures": lambda f: f.with_captures(), "the matrix": lambda f: (f.to_dense(), f)[1]}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_columns_give_no_columns(kept, dtype):
    _, F, net = setting()
    fisher = kept(fv.Probe(net.to(dtype), "categorical").fisher(nets.vectors(5, 3).to(dtype)))
    none = torch.zeros(len(F), 0, dtype=dtype)
    found = [fisher @ none, fisher.solve(none, 0.1), fisher.inverse(0.1) @ none]
    assert [tuple(v.shape) for v in found] == [(len(F), 0)] * 3
    assert [v.dtype for v in found[:2]] == [dtype] * 2
    assert fisher.to_scipy().matmat(np.zeros((len(F), 0))).shape == (len(F), 0)
    with pytest.raises(ValueError, match="damping"):
        fisher.solve(none, -1.0)


WRONG = [torch.ones(3), torch.ones(1, 26), torch.ones(26, 2, 2), torch.tensor(1.0), torch.ones(0)]


@pytest.mark.parametrize("v", WRONG, ids=lambda v: str(tuple(v.shape)))
def test_a_vector_of_the_wrong_shape_is_refused_with_the_right_one(v):
    fisher, F, _ = setting()
    assert len(F) == 26
    v = v.double()
    for call in (lambda: fisher @ v, lambda: fisher.solve(v, 0.1), lambda: fisher.quadratic(v)):
        with pytest.raises((ValueError, TypeError), match="26"):
            call()
    approximation = fv.approximate(fisher, "kfac")
    for call in (lambda: approximation @ v, lambda: approximation.solve(v, 0.1)):
        with pytest.raises((ValueError, TypeError), match="26"):
            call()


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_damping_that_is_not_positive_and_finite_is_refused(damping):
    fisher, F, _ = setting()
    v = nets.vectors(len(F), 1)[:, 0]
    with pytest.raises((ValueError, TypeError), match="damping"):
        fisher.solve(v, damping)
    with pytest.raises((ValueError, TypeError), match="damping"):
        fv.approximate(fisher, "kfac").solve(v, damping)


def test_undamped_solve_of_a_singular_fisher_raises_and_names_a_damping():
    fisher, F, _ = setting("categorical", 2)
    with pytest.raises((ValueError, RuntimeError), match="damping"):
        fisher.solve(nets.vectors(len(F), 1)[:, 0], 0.0)


def test_undamped_solve_of_a_regular_fisher():
    net, x = nets.mlp(2, 2), nets.vectors(9, 2)
    F = exact.fisher(net, x, laws.Gaussian())
    v = nets.vectors(len(F), 1)[:, 0]
    assert_matches(fv.Probe(net, "gaussian").fisher(x).solve(v, 0.0), np.linalg.solve(F, v), 1e-8)


def test_a_huge_layer_is_never_formed():
    """A block with 10^10 entries: its norms, products and diagonal come from the examples alone."""
    net, x = nn.Linear(1000, 100), torch.randn(4, 1000)
    fisher = fv.Probe(net, "gaussian").fisher(x)
    a = torch.cat([x, torch.ones(4, 1)], 1).double()
    gram = a @ a.T
    assert float(fisher.norm("fro")) == pytest.approx(float((100 * gram.square().sum()).sqrt() / 4), rel=1e-5)
    assert float(fisher.norm("trace")) == pytest.approx(float(100 * gram.trace() / 4), rel=1e-5)
    assert float(fisher.norm("spectral")) == pytest.approx(float(torch.linalg.eigvalsh(gram)[-1] / 4), rel=1e-4)
    assert (fisher @ torch.ones(100100)).shape == (100100,)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_damping_that_a_failed_solve_advises_is_one_of_the_fisher(reduction):
    """Equal examples make a singular Gram matrix; what is advised is in F's units, at its rounding, and solves."""
    net, x = nets.mlp(60, 40, 3).float(), nets.vectors(1, 60).float().repeat(200, 1)
    fisher = fv.Probe(net, "categorical").fisher(x, reduction=reduction)
    v = torch.ones(fisher.shape[0])
    with pytest.raises(SingularMatrixError, match="solve with a damping of at least") as caught:
        fisher.solve(v, 1e-30)
    advised = float(str(caught.value).rstrip(".").split()[-1])
    largest = float(fisher.spectrum(1)[0])
    assert 1e-18 * largest < advised < 1e-5 * largest
    assert torch.isfinite(fisher.solve(v, advised)).all()
