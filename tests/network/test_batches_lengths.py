"""Batches of different lengths: token batches, images and series, against plain autograd on one example at a time."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from tests.covering import some
from tests.oracles import nets
from tests.oracles.checks import assert_matches


def token_net():
    return nets.randomised(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)))


def embedding_net():
    return nets.randomised(
        nn.Sequential(nn.Embedding(6, 2), nn.Linear(2, 3), nn.Tanh(), nn.LayerNorm(3), nn.Linear(3, 3))
    )


LENGTHS = {"longer first": (5, 2), "shorter first": (1, 4), "three": (2, 1, 3)}
lengths = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())


def series(lengths):
    return [torch.randn(n + 1, t, 2, dtype=torch.float64) for n, t in enumerate(lengths)]


def gradient(z, net, v):
    parts = torch.autograd.grad(z, list(net.parameters()), v, retain_graph=True)
    return torch.cat([p.reshape(-1) for p in parts])


def output_roots(z):
    """Columns S (D, K) with S Sᵀ the softmax's output Fisher at every position of one example's z (T, C)."""
    p = torch.softmax(z.detach(), -1)
    blocks = [torch.diag(q) - torch.outer(q, q) for q in p]
    values, vectors = torch.linalg.eigh(torch.block_diag(*blocks))
    return vectors * values.clamp(min=0).sqrt()


def examples(batches):
    return [x[n : n + 1] for x in batches for n in range(len(x))]


def rows(net, batches, labels=None):
    """Per example the gradients (K, P), of the columns of S or of the labels' scores."""
    found = []
    for n, x in enumerate(examples(batches)):
        z = net(x)[0]
        if labels is None:
            vectors = output_roots(z).T.reshape(-1, *z.shape)
        else:
            vectors = (torch.softmax(z, -1) - nn.functional.one_hot(labels[n], 3)).detach().unsqueeze(0)
        found.append(torch.stack([gradient(z, net, v) for v in vectors]))
    return found


def dense(found):
    return sum(r.T @ r for r in found) / len(found)


def check_exact(fisher, F):
    v = torch.randn(len(F), dtype=torch.float64)
    assert_matches(fisher @ v, F @ v)
    assert_matches(fisher.diagonal(), F.diagonal())
    assert_matches(fisher.to_dense(), F)
    fresh = fisher.fresh()
    assert_matches(fresh.solve(v, 0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), v))
    for ord_, expected in (("fro", F.norm()), ("trace", F.trace()), ("spectral", torch.linalg.matrix_norm(F, 2))):
        assert fisher.fresh().norm(ord_) == pytest.approx(float(expected), rel=1e-7)
    assert fisher.fresh().quadratic(v) == pytest.approx(float(v @ F @ v), rel=1e-9)
    assert_matches(fisher.fresh().spectrum(2), torch.linalg.eigvalsh(F).flip(0)[:2], 1e-7)
    assert fisher.fresh().sample(1.0, 2).shape == (2, len(F))


@lengths
def test_the_exact_kind(lengths):
    net, batches = token_net(), series(lengths)
    F = dense(rows(net, batches))
    fisher = fv.Probe(net, "categorical").fisher(batches)
    check_exact(fisher, F)
    assert_matches(fisher.block(0, 1), F[:9, 9:])


@pytest.mark.covering
@lengths
@pytest.mark.parametrize("bytes_", [1, 10**9])
def test_the_empirical_kind_its_gradient_and_natural_gradient(monkeypatch, lengths, bytes_):
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    net, batches = token_net(), series(lengths)
    labels = [torch.randint(3, x.shape[:2]) for x in batches]
    found = rows(net, batches, [y for part in labels for y in part])
    F, g = dense(found), sum(r[0] for r in found) / len(found)
    fisher = fv.Probe(net, "categorical").fisher(list(zip(batches, labels, strict=True)), kind="empirical")
    check_exact(fisher, F)
    assert_matches(fisher.gradient(), g)
    assert_matches(fisher.natural_gradient(0.1), torch.linalg.solve(F + 0.1 * torch.eye(len(F)).double(), g))


@pytest.mark.covering
@lengths
@pytest.mark.parametrize("bytes_", [1, 10**9])
def test_sampled_labels_are_kept_for_each_batch(monkeypatch, lengths, bytes_):
    monkeypatch.setattr("fisherviz.capture.network.CAPTURE_BYTES", bytes_)
    net, batches = token_net(), series(lengths)
    fisher = fv.Probe(net, "categorical").fisher(batches, kind="mc", samples=2)
    check_exact(fisher, fisher.to_dense().clone())


def test_generic_layers_with_different_numbers_of_vectors():
    net = embedding_net()
    batches = [torch.randint(6, (3, 5)), torch.randint(6, (2, 2))]
    check_exact(fv.Probe(net, "categorical").fisher(batches), dense(rows(net, batches)))


def test_segmentation_of_images_of_two_sizes():
    net = nets.randomised(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)))
    batches = [torch.randn(2, 1, 2, 2, dtype=torch.float64), torch.randn(1, 1, 3, 3, dtype=torch.float64)]
    classes_last = nn.Sequential(net, Last())
    check_exact(fv.Probe(net, fv.Categorical(class_axis=1)).fisher(batches), dense(rows(classes_last, batches)))


class Last(nn.Module):
    def forward(self, z):
        return z.movedim(1, -1).flatten(1, 2)


def test_regression_on_series_of_two_lengths():
    net, batches = nets.randomised(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))), series((4, 6))
    found = []
    for x in examples(batches):
        z = net(x)[0]
        unit = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
        found.append(torch.stack([gradient(z, net, v) for v in unit]))
    check_exact(fv.Probe(net, "gaussian").fisher(batches), dense(found))


def test_captures_that_would_not_fit_padded_are_not_kept(monkeypatch):
    """One long series among short ones: padding would hold many times what was captured."""
    net, batches = token_net(), series((8, 1, 1, 1))
    F = dense(rows(net, batches))
    monkeypatch.setattr("fisherviz.exact.passes.keep_limit", lambda device: 20_000)
    fisher = fv.Probe(net, "categorical").fisher(batches)
    assert_matches(fisher.diagonal(), F.diagonal())
    assert fisher._kept.held is None
    assert_matches(fisher.to_dense(), F)


# ---- approximations: averages over positions are each example's own -------------------------------------------------


def positions(net, batches):
    """Per example and layer the inputs with their 1 (T, da) and the gradients at the outputs (K, T, dg)."""
    found = []
    for x in examples(batches):
        h = x[0]
        inputs, outputs = [], []
        for module in net:
            if isinstance(module, nn.Linear):
                inputs.append(torch.cat([h.detach(), torch.ones(len(h), 1, dtype=h.dtype)], 1))
            h = module(h)
            if isinstance(module, nn.Linear):
                outputs.append(h)
        vectors = output_roots(h).T.reshape(-1, *h.shape)
        g = [torch.autograd.grad(h, outputs, v, retain_graph=True) for v in vectors]
        found.append((inputs, [torch.stack(parts) for parts in zip(*g, strict=True)]))
    return found


def mean(parts):
    parts = list(parts)
    return sum(parts) / len(parts)


def in_torch_order(blocks):
    """Dense matrix from blocks in unit order (each unit's weights with its bias), for the token net's two layers."""
    order, start = [], 0
    for d_out, d_in in ((3, 2), (3, 3)):
        unit = np.arange(d_out * (d_in + 1)).reshape(d_out, d_in + 1) + start
        order.append(np.concatenate([unit[:, :-1].reshape(-1), unit[:, -1]]))
        start += unit.size
    order = np.concatenate(order)
    return torch.cat([torch.cat(row, 1) for row in blocks])[order][:, order]


def block_diagonal(parts):
    zero = torch.zeros(len(parts[0]), len(parts[1]), dtype=torch.float64)
    return in_torch_order([[parts[0], zero], [zero.T, parts[1]]])


def kfac_factors(found, setting, i, j):
    if setting == "reduce":
        A = mean(torch.outer(a[i].mean(0), a[j].mean(0)) for a, _ in found)
        G = mean(torch.einsum("ko,kp->op", g[i].sum(1), g[j].sum(1)) for _, g in found)
    else:
        A = mean(a[i].T @ a[j] / len(a[i]) for a, _ in found)
        G = mean(torch.einsum("kto,ktp->op", g[i], g[j]) for _, g in found)
    return A, G


@lengths
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_kronecker_factors(lengths, setting):
    net, batches = token_net(), series(lengths)
    found = positions(net, batches)
    fisher = fv.Probe(net, "categorical").fisher(batches)
    fisher.norm()  # the captures are kept by now, padded to one length
    blocks = [[torch.kron(*reversed(kfac_factors(found, setting, i, j))) for j in (0, 1)] for i in (0, 1)]
    assert_matches(fv.approximate(fisher, "kfac-full", setting=setting).to_dense(), in_torch_order(blocks))
    kfac = fv.approximate(fisher, "kfac", setting=setting)
    assert_matches(kfac.to_dense(), block_diagonal([blocks[0][0], blocks[1][1]]))
    moments = []
    for i in (0, 1):
        A, G = kfac_factors(found, setting, i, i)
        Q = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        exact = mean(torch.einsum("kp,kq->pq", r, r) for r in unit_rows(found, i))
        moments.append(Q @ torch.diag((Q.T @ exact @ Q).diagonal()) @ Q.T)
    assert_matches(fv.approximate(fisher, "ekfac", setting=setting).to_dense(), block_diagonal(moments))


def unit_rows(found, i):
    return [torch.einsum("kto,ti->koi", g[i], a[i]).flatten(1) for a, g in found]


@lengths
def test_foof_layer_diagonal_units_and_nearest(lengths):
    net, batches = token_net(), series(lengths)
    found = positions(net, batches)
    fisher = fv.Probe(net, "categorical").fisher(batches)
    fisher.norm()
    exact = [mean(torch.einsum("kp,kq->pq", r, r) for r in unit_rows(found, i)) for i in (0, 1)]
    A = [mean(a[i].T @ a[i] for a, _ in found) for i in (0, 1)]
    foof = block_diagonal([torch.kron(torch.eye(3).double(), part) for part in A])
    assert_matches(fv.approximate(fisher, "foof").to_dense(), foof)
    assert_matches(fv.approximate(fisher, "layer").to_dense(), block_diagonal(exact))
    assert_matches(fv.approximate(fisher, "diagonal").to_dense(), block_diagonal([e.diagonal().diag() for e in exact]))
    units = [
        torch.block_diag(*(e[o : o + d, o : o + d] for o in range(0, 3 * d, d)))
        for e, d in zip(exact, (3, 4), strict=True)
    ]
    assert_matches(fv.approximate(fisher, "cw-ngd").to_dense(), block_diagonal(units))
    nearest = fv.approximate(fisher, "nearest-kronecker")
    for i, d in ((0, 3), (1, 4)):
        rearranged = exact[i].reshape(3, d, 3, d).permute(0, 2, 1, 3).reshape(9, d * d)
        least = torch.linalg.svdvals(rearranged)[1:].square().sum().sqrt()
        reached = (nearest.operator(i, i).to_dense() - exact[i]).norm()
        assert float(reached) == pytest.approx(float(least), rel=1e-3)


def test_a_comparison_measures_against_the_dense_matrices():
    net, batches = token_net(), series((4, 2))
    F = dense(rows(net, batches))
    fisher = fv.Probe(net, "categorical").fisher(batches)
    methods = ["kfac", "ekfac", "diagonal", "layer", "kfac-full"]
    found = fv.compare(fisher, methods, progress=False).summary()
    for method in methods:
        matrix = fv.approximate(fisher, method).to_dense()
        assert found.loc[method, "relative_frobenius"] == pytest.approx(float((F - matrix).norm() / F.norm()), rel=1e-6)


@pytest.mark.parametrize("order", some(itertools.permutations(range(3)), (1, 2, 0), (2, 1, 0)))
def test_the_order_of_the_batches_does_not_matter(order):
    torch.manual_seed(0)
    net, batches = token_net(), series((3, 1, 2))
    reference = fv.Probe(net, "categorical").fisher(batches)
    fisher = fv.Probe(net, "categorical").fisher([batches[i] for i in order])
    assert_matches(fisher.to_dense(), reference.to_dense())
    assert_matches(fv.approximate(fisher, "kfac").to_dense(), fv.approximate(reference, "kfac").to_dense())
