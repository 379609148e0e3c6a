"""What preconditions the solves of coupled matrices: near the inverse, exact where it takes everything."""

import pytest
import torch

from fisherviz.operators import BlockMatrix, Dense, DirectSum, Kronecker, Permuted, SingularMatrixError, block_matrix
from fisherviz.operators.khatri_rao import LeadingPairs
from fisherviz.operators.permuted import NearChain
from fisherviz.operators.tridiagonal import BlockTridiagonal

WIDTHS, UNITS = (7, 9, 8), (5, 6, 4)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, rank, seed, decay=1.0):
    """A second moment of few directions of ever less variance."""
    rows = normal(rank, size, seed=seed) * decay ** torch.arange(rank, dtype=torch.float64)[:, None]
    return rows.T @ rows


def coupled(rank, decay=1.0, dtype=torch.float64):
    """Blocks A_ij ⊗ G_ij of three segments, beside a fourth that stands alone; and the dense matrix."""
    A = moment(sum(WIDTHS), rank, 0, decay).to(dtype)
    G = moment(sum(UNITS), rank, 1, decay).to(dtype)
    places = (0, 1, 3)
    blocks = {(2, 2): Dense(moment(4, 2, 2).to(dtype))}
    for i, (rows_a, rows_g) in enumerate(zip(A.split(WIDTHS), G.split(UNITS), strict=True)):
        for j, (a, g) in enumerate(zip(rows_a.split(WIDTHS, 1), rows_g.split(UNITS, 1), strict=True)):
            if i <= j:
                blocks[places[i], places[j]] = Kronecker(a, g)
    return blocks, BlockMatrix(blocks).to_dense().double()


def plus(dense, damping):
    return dense + damping * torch.eye(len(dense), dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
@pytest.mark.parametrize("rank", [1, 3])
def test_with_all_pairs_it_is_the_inverse(dtype, tol, rank):
    blocks, dense = coupled(rank, dtype=dtype)
    v = normal(len(dense), 3, seed=3)
    found = LeadingPairs(blocks)(1e-2)(v.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), torch.linalg.solve(plus(dense, 1e-2), v), rtol=tol, atol=tol * 100)


@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_what_lies_below_the_damping_is_left_out(size):
    blocks, dense = coupled(2)
    blocks = {pair: op if pair == (2, 2) else Kronecker(size * op.A, op.G) for pair, op in blocks.items()}
    v = normal(len(dense), 2, seed=3)
    expected = torch.linalg.solve(plus(BlockMatrix(blocks).to_dense(), 1.0), v)
    torch.testing.assert_close(LeadingPairs(blocks)(1.0)(v), expected, rtol=0, atol=1e-6)


def test_it_takes_the_largest_terms_of_rank_one():
    """Against all u_pq written out from the joint matrices' eigenvectors, sorted by length."""
    damping = 1e-3
    blocks, dense = coupled(6, decay=0.5)
    roots = []
    for M in (moment(sum(WIDTHS), 6, 0, 0.5), moment(sum(UNITS), 6, 1, 0.5)):
        values, vectors = torch.linalg.eigh(M)
        roots.append(vectors[:, -6:] * values[-6:].sqrt())
    squares = [root.square().split(sizes) for root, sizes in zip(roots, (WIDTHS, UNITS), strict=True)]
    lengths = sum(torch.outer(x.sum(0), y.sum(0)) for x, y in zip(*squares, strict=True))
    for count in (1, 5, 20):
        inverse = LeadingPairs(blocks, pairs=count)(damping)
        expected = torch.zeros_like(dense)
        alone = torch.arange(sum(w * u for w, u in zip(WIDTHS[:2], UNITS[:2], strict=True)), len(dense))[:4]
        expected[alone[:, None], alone] = dense[alone[:, None], alone]
        rest = [i for i in range(len(dense)) if i not in alone]
        for place in lengths.flatten().topk(count).indices:
            x, y = roots[0][:, place // 6].split(WIDTHS), roots[1][:, place % 6].split(UNITS)
            u = torch.cat([torch.outer(b, a).flatten() for a, b in zip(x, y, strict=True)])
            expected[torch.tensor(rest)[:, None], torch.tensor(rest)] += torch.outer(u, u)
        found = inverse(plus(expected, damping))
        torch.testing.assert_close(found, torch.eye(len(dense), dtype=torch.float64), rtol=0, atol=1e-6)


def test_it_reaches_a_damping_that_nothing_left_out_exceeds():
    blocks, _ = coupled(6, decay=0.5)
    largest = LeadingPairs(blocks, pairs=10)._largest[0][-1]
    few = LeadingPairs(blocks, pairs=10)
    assert few.reaches(1.01 * float(largest))
    assert not few.reaches(0.99 * float(largest))
    assert LeadingPairs(blocks, pairs=1000).reaches(1e-12)


def products_of(operator, v):
    """The solution, and the products that it took."""
    made = []
    inside = operator._matmul
    operator._matmul = lambda x: made.append(1) or inside(x)
    return operator.solve(v), len(made)


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_it_saves_conjugate_gradients_their_products(monkeypatch, factor):
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)
    blocks, dense = coupled(9, decay=0.6)
    damping = 1e-6 * float(dense.trace())
    v = normal(len(dense), 2, seed=4)
    expected = torch.linalg.solve(plus(factor * dense, damping), v)
    found, few = products_of(BlockMatrix(blocks, LeadingPairs(blocks)).scale(factor).shifted(damping), v)
    plain, many = products_of(BlockMatrix(blocks).scale(factor).shifted(damping), v)
    for solution in (found, plain):
        torch.testing.assert_close(solution, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    assert 4 * few < many


@pytest.mark.parametrize("broken", [False, True])
def test_a_chain_with_a_tridiagonal_inverse_is_such_a_product(monkeypatch, broken):
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)
    A, G = moment(sum(WIDTHS), 40, 5, 0.7), moment(sum(UNITS), 40, 6, 0.7)
    own_a, own_g = ([part.split(sizes, 1) for part in M.split(sizes)] for M, sizes in ((A, WIDTHS), (G, UNITS)))
    links = [(i, i + 1) for i in range(2)]
    chain = BlockTridiagonal(
        [own_a[i][i] for i in range(3)],
        [own_g[i][i] for i in range(3)],
        [None if broken and i == 0 else own_a[i][j] for i, j in links],
        [None if broken and i == 0 else own_g[i][j] for i, j in links],
    )
    whole = Permuted(DirectSum([chain, Dense(moment(4, 9, 7))]), [[2, 0, 3], [1]])
    dense, damping = whole.to_dense(), 1e-5 * whole.norm("trace")
    v = normal(whole.shape[0], 2, seed=8)
    pairs = {(i, j): whole.block(i, j) for i in range(4) for j in range(i, 4)}
    near = LeadingPairs(pairs)
    torch.testing.assert_close(
        near(1e-7 * damping)(plus(dense, 1e-7 * damping) @ v), v, rtol=0, atol=1e-3
    )  # all terms above λ: the inverse itself
    found, few = products_of(whole.shifted(damping), v)
    torch.testing.assert_close(found, torch.linalg.solve(plus(dense, damping), v), rtol=1e-4, atol=1e-4)
    _, many = products_of(BlockMatrix(pairs).shifted(damping), v)
    assert 2 * few < many
    monkeypatch.setattr(LeadingPairs, "reaches", lambda self, damping: False)  # the chain with damped factors instead
    found, others = products_of(whole.shifted(damping), v)
    torch.testing.assert_close(found, torch.linalg.solve(plus(dense, damping), v), rtol=1e-4, atol=1e-4)
    assert others < many


def test_a_damping_that_is_too_small_for_it_leaves_the_diagonal_blocks(monkeypatch):
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)

    def refuses(damping):
        raise SingularMatrixError("the leading part", 3, 0.0, 1.0)

    blocks, dense = coupled(9, decay=0.6)
    v = normal(len(dense), 1, seed=9)
    found, expected = (BlockMatrix(blocks, near).shifted(1.0).solve(v) for near in (refuses, None))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_chain_whose_damped_factors_are_singular_leaves_the_diagonal_blocks(monkeypatch):
    """Behind a layer that passes no gradients on, the damping of an A is its own and drowns, the whole matrix's not."""
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)
    monkeypatch.setattr(LeadingPairs, "reaches", lambda self, damping: False)
    A, G = torch.tensor([[1e9, 0.0], [0.0, 1.0]]), moment(2, 3, 0).float()
    chain = BlockTridiagonal([A, G, G], [0 * G, G, G], [0 * G, 0.5 * G], [0 * G, 0.5 * G])
    whole, damping = Permuted(DirectSum([chain]), [[0, 1, 2]]), 0.1
    with pytest.raises(SingularMatrixError):
        NearChain(whole)(damping)
    v = normal(chain.shape[0], 1, seed=9)
    found = whole.shifted(damping).solve(v.float()).double()
    expected = torch.linalg.solve(plus(whole.to_dense().double(), damping), v)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_pairs_that_leave_a_tail_are_taken_where_they_cost_less_than_products(monkeypatch):
    A, G = moment(sum(WIDTHS), 40, 5, 0.7), moment(sum(UNITS), 40, 6, 0.7)
    own_a, own_g = ([part.split(sizes, 1) for part in M.split(sizes)] for M, sizes in ((A, WIDTHS), (G, UNITS)))
    links = [(i, i + 1) for i in range(2)]
    chain = BlockTridiagonal(
        [own_a[i][i] for i in range(3)], [own_g[i][i] for i in range(3)],
        [own_a[i][j] for i, j in links], [own_g[i][j] for i, j in links],
    )  # fmt: skip
    whole, v = Permuted(DirectSum([chain]), [[0, 1, 2]]), normal(chain.shape[0], 1, seed=8)
    for count, cheap in ((2, True), (1000, False)):
        assert LeadingPairs(whole.coupled_blocks(), pairs=count).cheap is cheap
    near = NearChain(whole)
    near._pairs = LeadingPairs(whole.coupled_blocks(), pairs=2)
    left = float(near._pairs._largest[0][-1])
    taken = []
    monkeypatch.setattr(LeadingPairs, "__call__", lambda self, damping: taken.append(damping) or (lambda v: v))
    for damping in (left, left / 10, left / 100):  # nothing, ten and a hundred times the damping is left out
        near(damping)(v)
    assert taken == [left, left / 10]
