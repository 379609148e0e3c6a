"""Dense matrices of the Kronecker family, in unit order, from explicit moments.

A block is kron(G, A): W is flattened row by row, so the output index is the slow one. Damped and inverted by
dense linear algebra, never by structure: Martens & Grosse 2015, George et al. 2018, Benzing 2021.
"""

import numpy as np


def factors(moments, setting="expand"):
    """Dictionaries A[i, j], G[i, j] over all pairs of parts."""
    parts = range(len(moments[0][1]))
    A = {(i, j): 0.0 for i in parts for j in parts}
    G = dict(A)
    for weight, a, g in moments:
        for i in parts:
            for j in parts:
                if setting == "expand":
                    if len(a[i]) != len(a[j]):
                        continue
                    A[i, j] = A[i, j] + weight * a[i].T @ a[j] / len(a[i])
                    G[i, j] = G[i, j] + weight * g[i].T @ g[j]
                else:
                    A[i, j] = A[i, j] + weight * np.outer(a[i].mean(0), a[j].mean(0))
                    G[i, j] = G[i, j] + weight * np.outer(g[i].sum(0), g[j].sum(0))
    return A, G


def assemble(blocks, count):
    return np.block([[blocks[i, j] for j in range(count)] for i in range(count)])


def full(A, G):
    """The Khatri-Rao matrix: A_ij (x) G_ij in every block."""
    count = 1 + max(i for i, _ in A)
    return assemble({ij: np.kron(G[ij], A[ij]) for ij in A}, count)


def block_diagonal(blocks):
    sizes = [len(B) for B in blocks]
    dense = np.zeros((sum(sizes), sum(sizes)))
    start = 0
    for B in blocks:
        dense[start : start + len(B), start : start + len(B)] = B
        start += len(B)
    return dense


def kfac(A, G):
    return block_diagonal([np.kron(G[i, i], A[i, i]) for i, j in A if i == j])


def foof(moments):
    """A (x) I with A = E[sum_t a a^T]."""
    blocks = []
    for i in range(len(moments[0][1])):
        A = sum(weight * a[i].T @ a[i] for weight, a, _ in moments)
        blocks.append(np.kron(np.eye(moments[0][2][i].shape[1]), A))
    return block_diagonal(blocks)


def centred(moments, A, G):
    """K-FAC's moments with a diagonal G, and with the means' products in place of A's entries off the diagonal."""
    blocks = []
    for i in range(len(moments[0][1])):
        m = sum(weight * a[i].mean(0) for weight, a, _ in moments)
        off = np.outer(m, m)
        blocks.append(np.kron(np.diag(np.diag(G[i, i])), off - np.diag(np.diag(off)) + np.diag(np.diag(A[i, i]))))
    return block_diagonal(blocks)


def kfra(A, G, passed_on):
    """K-FAC with output sides B * (W^T H W) by recursion, explicitly from the last layer to the first."""
    H = {i: G[i, i] for i, j in G if i == j}
    for i in sorted(passed_on, reverse=True):
        slopes, W = passed_on[i]
        B = sum(np.outer(s, s) for s in slopes) / len(slopes)
        H[i] = B * (W.T @ H[i + 1] @ W)
    return block_diagonal([np.kron(H[i], A[i, i]) for i in sorted(H)])


def assert_basis_is_unique(M):
    """Equal eigenvalues leave the eigenbasis open, unless they are zero and nothing points there."""
    values = np.linalg.eigvalsh(M)
    distinct = np.diff(values) > 1e-6 * values[-1]
    assert (distinct | (values[1:] < 1e-10 * values[-1])).all(), "choose a setting with distinct eigenvalues"


def ekfac(moments, A, G):
    """Q diag(second moment of the per-example gradient in the eigenbases) Q^T, for distinct eigenvalues."""
    blocks = []
    for i in range(len(moments[0][1])):
        assert_basis_is_unique(A[i, i])
        assert_basis_is_unique(G[i, i])
        Q = np.kron(np.linalg.eigh(G[i, i])[1], np.linalg.eigh(A[i, i])[1])
        second = sum(weight * (Q.T @ (g[i].T @ a[i]).reshape(-1)) ** 2 for weight, a, g in moments)
        blocks.append(Q @ np.diag(second) @ Q.T)
    return block_diagonal(blocks)


def damp(A, G, gamma):
    """Factored Tikhonov: each layer's own two factors; off-diagonal factors stay as they are."""
    A, G = dict(A), dict(G)
    for i, j in list(A):
        if i == j:
            mean_a, mean_g = np.trace(A[i, i]) / len(A[i, i]), np.trace(G[i, i]) / len(G[i, i])
            pi = np.sqrt(mean_a / mean_g) if mean_a > 0 and mean_g > 0 else 1.0
            A[i, i] = A[i, i] + pi * gamma * np.eye(len(A[i, i]))
            G[i, i] = G[i, i] + gamma / pi * np.eye(len(G[i, i]))
    return A, G


def tridiagonal(A, G):
    """The matrix with the tridiagonal blocks of `full` and a block-tridiagonal inverse (section 4.3)."""
    count = 1 + max(i for i, _ in A)
    blocks = {ij: np.kron(G[ij], A[ij]) for ij in A if abs(ij[0] - ij[1]) <= 1}
    for gap in range(2, count):
        for i in range(count - gap):
            j = i + gap
            Psi = blocks[i, i + 1] @ np.linalg.pinv(blocks[i + 1, i + 1], rcond=1e-11)
            blocks[i, j] = Psi @ blocks[i + 1, j]
            blocks[j, i] = blocks[i, j].T
    return assemble(blocks, count)


def tridiagonal_inverse(A, G):
    """Xi^T Lambda Xi from the blocks' regressions, for factors that are positive definite."""
    count = 1 + max(i for i, _ in A)
    blocks = {ij: np.kron(G[ij], A[ij]) for ij in A if abs(ij[0] - ij[1]) <= 1}
    sizes = [len(blocks[i, i]) for i in range(count)]
    edges = np.cumsum([0, *sizes])
    Xi, Lambda = np.eye(edges[-1]), np.zeros((edges[-1], edges[-1]))
    for i in range(count):
        here = slice(edges[i], edges[i + 1])
        conditional = blocks[i, i]
        if i + 1 < count:
            Psi = blocks[i, i + 1] @ np.linalg.inv(blocks[i + 1, i + 1])
            Xi[here, edges[i + 1] : edges[i + 2]] = -Psi
            conditional = conditional - Psi @ blocks[i + 1, i + 1] @ Psi.T
        Lambda[here, here] = np.linalg.inv(conditional)
    return Xi.T @ Lambda @ Xi


def rearranged(block, d_out, da):
    """Van Loan and Pitsianis: one row per pair of inputs, one column per pair of outputs."""
    return block.reshape(d_out, da, d_out, da).transpose(1, 3, 0, 2).reshape(da * da, d_out * d_out)


def nearest_kronecker(block, d_out, da, rank=1):
    """The best sum of `rank` Kronecker products to a unit-order block, by a dense SVD."""
    U, sigma, Vt = np.linalg.svd(rearranged(block, d_out, da))
    best = 0.0
    for r in range(rank):
        best = best + sigma[r] * np.kron(Vt[r].reshape(d_out, d_out), U[:, r].reshape(da, da))
    return best


def same_unit(dense, layers):
    """A unit-order matrix with everything that couples two output units set to zero (CW-NGD)."""
    unit, count = [], 0
    for d_out, fan_in, bias in layers:
        unit += [count + o for o in range(d_out) for _ in range(fan_in + bias)]
        count += d_out
    unit = np.array(unit)
    return np.where(unit[:, None] == unit[None, :], dense, 0.0)


def same_layer(dense, segments):
    """A matrix with everything that couples two layers set to zero."""
    kept = np.zeros_like(dense)
    for s in segments:
        kept[s, s] = dense[s, s]
    return kept
