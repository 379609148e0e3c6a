"""The block-tridiagonal inverse (Martens & Grosse 2015, section 4.3, appendix B) on a small network.

The oracle for F̃ is the Khatri-Rao product of the moments written with `numpy.kron`; F̂ is
held to the two properties that define it.
"""

import itertools

import numpy as np
import pytest
import torch

from fisherviz.operators import BlockTridiagonal, KroneckerDifferenceInverse, SingularMatrixError
from fisherviz.operators.damping import FactoredTikhonov, Tikhonov

WIDTHS = (4, 3, 5, 2, 3)
N = 200


def moments(widths=WIDTHS, dtype=torch.float64, outputs="gaussian"):
    """A_ij and G_ij of a tanh network for the exact Fisher, by hand-written backpropagation."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    weights = [rand(n, m + 1) / m**0.5 for m, n in itertools.pairwise(widths)]
    ones = torch.ones(N, 1, dtype=torch.float64)
    a = [torch.cat([rand(N, widths[0]), ones], 1)]
    for W in weights[:-1]:
        a.append(torch.cat([torch.tanh(a[-1] @ W.T), ones], 1))
    if outputs == "gaussian":
        back = torch.eye(widths[-1], dtype=torch.float64).expand(N, -1, -1)
    else:
        p = torch.softmax(a[-1] @ weights[-1].T, 1)
        back = torch.diag_embed(p.sqrt()) - p.sqrt()[:, :, None] * p[:, None, :]
    pseudo = [back]
    for i in range(len(weights) - 1, 0, -1):
        pseudo.insert(0, (pseudo[0] @ weights[i][:, :-1]) * (1 - a[i][:, None, :-1] ** 2))
    A = [[(x.T @ y / N).to(dtype) for y in a] for x in a]
    G = [[(torch.einsum("nki,nkj->ij", x, y) / N).to(dtype) for y in pseudo] for x in pseudo]
    return A, G


def chain(A, G):
    n = len(A)
    return BlockTridiagonal(
        [A[i][i] for i in range(n)],
        [G[i][i] for i in range(n)],
        [A[i][i + 1] for i in range(n - 1)],
        [G[i][i + 1] for i in range(n - 1)],
    )


def damp(A, G, gamma):
    """Factored damping of the diagonal moments, equation 7, in the open."""
    n = len(A)
    A, G = [list(row) for row in A], [list(row) for row in G]
    for i in range(n):
        pi = ((A[i][i].trace() / len(A[i][i])) / (G[i][i].trace() / len(G[i][i]))) ** 0.5
        A[i][i] = A[i][i] + pi * gamma * torch.eye(len(A[i][i]), dtype=A[i][i].dtype)
        G[i][i] = G[i][i] + gamma / pi * torch.eye(len(G[i][i]), dtype=G[i][i].dtype)
    return A, G


def khatri_rao(A, G):
    return [[torch.from_numpy(np.kron(G[i][j], A[i][j])) for j in range(len(A))] for i in range(len(A))]


GAMMA = 0.1
A, G = moments()
DAMPED_A, DAMPED_G = damp(A, G, GAMMA)
TILDE = khatri_rao(DAMPED_A, DAMPED_G)
HAT = chain(DAMPED_A, DAMPED_G)
SIZES = [len(TILDE[i][i]) for i in range(4)]
STARTS = np.cumsum([0, *SIZES])


def part(M, i, j):
    return M[STARTS[i] : STARTS[i + 1], STARTS[j] : STARTS[j + 1]]


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("j", range(4))
def test_f_hat_agrees_with_f_tilde_on_the_tridiagonal_blocks_only(i, j):
    expected = TILDE[i][j]
    torch.testing.assert_close(HAT.block(i, j).to_dense(), part(HAT.to_dense(), i, j))
    if abs(i - j) <= 1:
        torch.testing.assert_close(HAT.block(i, j).to_dense(), expected)
    else:
        assert (HAT.block(i, j).to_dense() - expected).norm() > 1e-6 * expected.norm()


def test_f_hat_is_symmetric_and_positive_definite():
    dense = HAT.to_dense()
    torch.testing.assert_close(dense, dense.T)
    assert torch.linalg.eigvalsh(dense)[0] > 0


def test_the_dense_inverse_of_f_hat_is_block_tridiagonal():
    inverse = torch.linalg.inv(HAT.to_dense())
    scale = inverse.abs().max()
    for i in range(4):
        for j in range(4):
            if abs(i - j) > 1:
                assert part(inverse, i, j).abs().max() < 1e-10 * scale
            else:
                assert part(inverse, i, j).abs().max() > 1e-6 * scale


def test_the_inverse_from_its_blocks_is_the_dense_inverse():
    torch.testing.assert_close(HAT.inverse_dense(), torch.linalg.inv(HAT.to_dense()), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(HAT.inverse().to_dense(), HAT.inverse_dense())
    assert torch.equal(part(HAT.inverse_dense(), 0, 2), torch.zeros(SIZES[0], SIZES[2], dtype=torch.float64))


@pytest.mark.parametrize("columns", [None, 3])
def test_solve_is_the_dense_solve(columns):
    v = torch.randn(
        STARTS[-1], *([] if columns is None else [columns]), generator=torch.Generator().manual_seed(1)
    ).double()
    expected = torch.linalg.solve(HAT.to_dense(), v)
    torch.testing.assert_close(HAT.solve(v), expected, rtol=1e-8, atol=1e-8)
    layers = HAT.solve_layers(v.split(SIZES))
    for found, wanted in zip(layers, expected.split(SIZES), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_products_and_norms_are_the_dense_ones():
    dense = HAT.to_dense()
    v = torch.randn(STARTS[-1], 2, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(HAT @ v, dense @ v)
    torch.testing.assert_close(HAT.T @ v[:, 0], dense @ v[:, 0])
    torch.testing.assert_close(HAT.diagonal(), dense.diagonal())
    torch.testing.assert_close(HAT.scale(3.0).to_dense(), 3 * dense)
    assert HAT.norm("fro") == pytest.approx(float(dense.norm()))
    assert HAT.norm("trace") == pytest.approx(float(dense.trace()))
    assert HAT.norm("spectral") == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]))
    assert HAT.bytes == sum(t.numel() * 8 for t in HAT.tensors)


def test_two_layers_are_exact():
    A, G = damp(*moments((4, 3, 2)), GAMMA)
    tilde = khatri_rao(A, G)
    expected = torch.cat([torch.cat(row, 1) for row in tilde])
    hat = chain(A, G)
    torch.testing.assert_close(hat.to_dense(), expected)
    torch.testing.assert_close(hat.inverse_dense(), torch.linalg.inv(expected), rtol=1e-8, atol=1e-8)


def test_one_layer_is_kfac():
    A, G = damp(*moments((4, 3)), GAMMA)
    torch.testing.assert_close(chain(A, G).to_dense(), khatri_rao(A, G)[0][0])


def test_damping_touches_only_each_layer_s_own_factors():
    damped = chain(A, G).damped(FactoredTikhonov(GAMMA))
    torch.testing.assert_close(damped.to_dense(), HAT.to_dense())
    for i in range(3):
        torch.testing.assert_close(damped.A_next[i], A[i][i + 1])
    assert HAT.damped(None) is HAT


def test_plain_tikhonov_is_refused_with_the_way_out():
    for damping in (0.01, Tikhonov(0.01)):
        with pytest.raises(NotImplementedError, match=r"use FactoredTikhonov\(0.1\)"):
            HAT.damped(damping)


@pytest.mark.parametrize("outputs", ["gaussian", "softmax"])
def test_float32_moments_work_at_gamma_1e_3(outputs):
    A32, G32 = moments(dtype=torch.float32, outputs=outputs)
    hat = chain(A32, G32).damped(FactoredTikhonov(1e-3))
    exact = chain(*moments(outputs=outputs)).damped(FactoredTikhonov(1e-3))
    v = torch.randn(STARTS[-1], generator=torch.Generator().manual_seed(3))
    found, expected = hat.solve(v), torch.linalg.solve(exact.to_dense(), v.double())
    assert found.dtype == torch.float32
    # Rounding of the moments, 6e-8, times the condition of the damped factors, about 1e3 each.
    assert (found.double() - expected).norm() < 5e-3 * expected.norm()


def test_undamped_softmax_network_has_no_inverse_and_says_why():
    A, G = moments(outputs="softmax")  # the outputs' pseudo-gradients sum to zero: the last G is singular
    v = torch.ones(STARTS[-1], dtype=torch.float64)
    with pytest.raises(SingularMatrixError, match=r"not positive definite.*smallest eigenvalue.*damping"):
        chain(A, G).solve(v)


def test_undamped_products_of_a_softmax_network_go_by_pseudo_inverse():
    A, G = moments(outputs="softmax")
    hat, tilde = chain(A, G), khatri_rao(A, G)
    dense = hat.to_dense()
    for i in range(4):
        for j in range(max(0, i - 1), min(4, i + 2)):
            torch.testing.assert_close(part(dense, i, j), tilde[i][j])
    tail = torch.linalg.pinv(tilde[2][2], rtol=1e-11, hermitian=True) @ tilde[2][3]
    torch.testing.assert_close(part(dense, 1, 3), tilde[1][2] @ tail, rtol=1e-7, atol=1e-9)
    v = torch.randn(STARTS[-1], generator=torch.Generator().manual_seed(6)).double()
    torch.testing.assert_close(hat @ v, dense @ v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_undamped_linear_network_has_no_inverse_and_says_why(dtype):
    """In a linear square network everything is linear in the next layer, as the bias always is."""
    I3 = torch.eye(3, dtype=dtype)
    A0 = torch.tensor([[2.0, 0.0, 0.1], [0.0, 1.0, 0.2], [0.1, 0.2, 1.0]], dtype=dtype)
    hat = BlockTridiagonal([A0, A0], [I3, I3], [A0], [I3])
    with pytest.raises(SingularMatrixError, match=r"bias coordinate.*without factored Tikhonov damping"):
        hat.solve(torch.ones(18, dtype=dtype))
    damped = hat.damped(FactoredTikhonov(1e-2))
    expected = torch.linalg.solve(damped.to_dense().double(), torch.ones(18, dtype=torch.float64))
    torch.testing.assert_close(damped.solve(torch.ones(18, dtype=dtype)).double(), expected, rtol=1e-3, atol=1e-3)


def test_moments_of_other_examples_are_refused():
    with pytest.raises(ValueError, match="same examples"):
        BlockTridiagonal(HAT.A, HAT.G, [2 * x for x in HAT.A_next], HAT.G_next).solve(torch.ones(STARTS[-1]).double())


def test_a_broken_chain_uncouples_both_sides():
    hat = BlockTridiagonal(HAT.A, HAT.G, [HAT.A_next[0], None, HAT.A_next[2]], [HAT.G_next[0], None, HAT.G_next[2]])
    left = BlockTridiagonal(HAT.A[:2], HAT.G[:2], HAT.A_next[:1], HAT.G_next[:1])
    right = BlockTridiagonal(HAT.A[2:], HAT.G[2:], HAT.A_next[2:], HAT.G_next[2:])
    expected = torch.block_diag(left.to_dense(), right.to_dense())
    v = torch.randn(STARTS[-1], generator=torch.Generator().manual_seed(4)).double()
    torch.testing.assert_close(hat.to_dense(), expected)
    torch.testing.assert_close(hat @ v, expected @ v)
    torch.testing.assert_close(hat.solve(v), torch.linalg.solve(expected, v), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(hat.inverse_dense(), torch.linalg.inv(expected), rtol=1e-8, atol=1e-8)
    assert hat.norm("fro") == pytest.approx(float(expected.norm()))


def difference():
    A, G = DAMPED_A[0][0], DAMPED_G[0][0]
    C = A[:, :2] @ A[:, :2].T / 20
    D = 0.3 * G
    dense = torch.from_numpy(np.kron(G, A) - np.kron(D, C))
    return KroneckerDifferenceInverse.from_difference(A, G, C, D), dense


def test_kronecker_difference_inverse_is_the_dense_inverse():
    operator, dense = difference()
    inverse = torch.linalg.inv(dense)
    v = torch.randn(len(dense), 2, generator=torch.Generator().manual_seed(5)).double()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(operator.to_dense(), inverse, **close)
    torch.testing.assert_close(operator @ v, inverse @ v, **close)
    torch.testing.assert_close(operator.T @ v[:, 0], inverse @ v[:, 0], **close)
    torch.testing.assert_close(operator.diagonal(), inverse.diagonal(), **close)
    torch.testing.assert_close(operator.inverse().to_dense(), dense, **close)
    torch.testing.assert_close(operator.solve(v), dense @ v, **close)
    torch.testing.assert_close(operator.scale(-2.0).to_dense(), -2 * inverse, **close)
    torch.testing.assert_close(operator.scale(-2.0).inverse().to_dense(), -dense / 2, **close)
    torch.testing.assert_close(
        operator.damped(0.5).to_dense(), inverse + 0.5 * torch.eye(len(dense), dtype=torch.float64), **close
    )
    assert operator.norm("fro") == pytest.approx(float(inverse.norm()))
    assert operator.norm("trace") == pytest.approx(float(inverse.trace()))
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.eigvalsh(inverse)[-1]))


def test_from_cross_is_from_difference_of_the_projected_moments():
    A, G, A1, G1 = DAMPED_A[0][0], DAMPED_G[0][0], DAMPED_A[0][1], DAMPED_G[0][1]
    C = A1 @ torch.linalg.solve(DAMPED_A[1][1], A1.T)
    D = G1 @ torch.linalg.solve(DAMPED_G[1][1], G1.T)
    first = KroneckerDifferenceInverse.from_difference(A, G, (C + C.T) / 2, (D + D.T) / 2)
    second = KroneckerDifferenceInverse.from_cross(A, G, A1, G1, DAMPED_A[1][1], DAMPED_G[1][1])
    torch.testing.assert_close(first.to_dense(), second.to_dense(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        second.to_dense(),
        torch.linalg.inv(torch.from_numpy(np.kron(G, A) - np.kron(D, C))),
        rtol=1e-8,
        atol=1e-8,
    )


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: BlockTridiagonal(HAT.A, HAT.G, HAT.A_next[:1], HAT.G_next), "n - 1 cross moments"),
        (lambda: BlockTridiagonal(HAT.A, HAT.G, HAT.A_next[::-1], HAT.G_next), r"A_next\[0\]"),
        (lambda: BlockTridiagonal(HAT.A, HAT.G, [None, *HAT.A_next[1:]], HAT.G_next), r"A_next\[0\]"),
        (lambda: HAT.block(0, 4), "0 to 3"),
        (lambda: HAT.scale(-1.0), "positive"),
        (lambda: HAT @ torch.ones(3).double(), "takes"),
        (
            lambda: KroneckerDifferenceInverse(torch.eye(2), torch.ones(3), torch.eye(2), torch.ones(2)),
            "KA",
        ),
    ],
)
def test_bad_input_gets_one_sentence(action, message):
    with pytest.raises(ValueError, match=message):
        action()
