"""⟨F, A ⊗ G⟩ from the captures of two layers in each way that there is, against gradients written out."""

import pytest
import torch

import fisherviz as fv
from fisherviz.capture.captures import Capture
from fisherviz.capture.formed import formed
from fisherviz.comparison.inner import _Piece, _Sum, inner_with_exact
from fisherviz.operators import Kronecker, KroneckerEigen, UnitBlocks
from tests.captures import normal, written_out

K, N = 6, 5
# Of both layers: whether gradients are formed, positions T, widths da and dg; then the way that costs least.
CASES = {
    "the right side through A": ((True, 9, 5, 4), (True, 9, 6, 2), "right"),
    "the left side through A": ((True, 9, 6, 2), (True, 9, 5, 4), "left"),
    "the right side at its positions": ((True, 40, 7, 6), (False, 2, 9, 8), "right positions"),
    "the left side at its positions": ((False, 2, 9, 8), (True, 40, 7, 6), "left positions"),
    "both at their positions": ((False, 2, 9, 8), (False, 2, 11, 7), "both positions"),
}


def layer(positions, da, dg, seed):
    return Capture(normal(N, positions, da, seed=seed), normal(K, N, positions, dg, seed=seed + 1))


def piece(sides):
    shown = [layer(*sizes, 10 * place) for place, (_, *sizes) in enumerate(sides)]
    kept = {place: formed(one) if side[0] else one for place, (one, side) in enumerate(zip(shown, sides, strict=True))}
    return shown, _Piece(kept)


@pytest.fixture
def ways(monkeypatch):
    """What was asked of a piece."""
    asked = []
    for name in ("_by_unit", "_at_positions", "_of_positions"):
        own = getattr(_Piece, name)

        def noted(self, *given, _own=own, _name=name):
            asked.append((_name, given[0]))
            return _own(self, *given)

        monkeypatch.setattr(_Piece, name, noted)
    return asked


EXPECTED = {
    "right": [("_by_unit", 1), ("_by_unit", 0)],
    "left": [("_by_unit", 0), ("_by_unit", 1)],
    "right positions": [("_at_positions", 0)],
    "left positions": [("_at_positions", 1)],
    "both positions": [("_of_positions", 0)],
}


@pytest.mark.parametrize(("left", "right", "way"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("narrowed", [False, True])
def test_every_way_gives_the_product(left, right, way, narrowed, ways):
    shown, made = piece((left, right))
    (p, m), (q, n) = left[2:], right[2:]
    A, G = normal(p, q, seed=3), normal(m, n, seed=4)
    whole = torch.einsum("rx,xy,ry->", written_out(shown[0]), torch.kron(G, A), written_out(shown[1]))
    bases = None
    if narrowed:  # an A whose rows and columns lie in few directions
        bases = tuple(torch.linalg.qr(normal(d, d - 1, seed=5))[0] for d in (p, q))
        inner = bases[0].mT @ A @ bases[1]
        A = bases[0] @ inner @ bases[1].mT
        whole = torch.einsum("rx,xy,ry->", written_out(shown[0]), torch.kron(G, A), written_out(shown[1]))
        A = inner
    found = made.product(_Sum((0, 1), Kronecker(A, G), bases))
    assert found == pytest.approx(float(whole), rel=1e-11)
    assert ways == EXPECTED[way]


@pytest.mark.parametrize("side", [(True, 9, 5, 4), (False, 9, 5, 4), (False, 1, 9, 8)], ids=str)
def test_squares_in_an_eigenbasis(side):
    shown, made = piece([side])
    da, dg = side[2:]
    QA, QG = (torch.linalg.qr(normal(d, d, seed=d))[0] for d in (da, dg))
    S = normal(dg, da, seed=7).square()
    rows = written_out(shown[0]) @ torch.kron(QG, QA)
    assert made.product(_Sum((0, 0), KroneckerEigen(QA, QG, S))) == pytest.approx(
        float((rows.square().sum(0) * S.reshape(-1)).sum()), rel=1e-11
    )


def test_what_methods_have_in_common_is_summed_once_and_each_gets_its_own(monkeypatch):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(48, 2)).double()
    fisher = fv.Probe(net, "categorical").fisher(normal(4, 2, 6, 6))
    (da, dg), size = (19, 3), 57
    A, B, G = normal(da, da, seed=1), normal(da, da, seed=2), normal(dg, dg, seed=3)
    blocks, small = normal(dg, da, da, seed=4), normal(3, 3, seed=5)
    matrices = {
        "one": Kronecker(A, G), "same": Kronecker(A, G), "other A": Kronecker(B, G),
        "no G": Kronecker.over_units(A, dg), "turned": Kronecker(A.mT, G),
        "units": UnitBlocks(blocks), "units again": UnitBlocks(blocks),
        "damped units": UnitBlocks(blocks, 0.5), "fails": Kronecker(small, G), "fails too": Kronecker(small, G),
    }  # fmt: skip
    asked = []
    own = _Piece.product
    monkeypatch.setattr(_Piece, "product", lambda self, each: asked.append(each.operator) or own(self, each))
    found = inner_with_exact(fisher, {label: {(0, 0): operator} for label, operator in matrices.items()})
    exact = fisher.unit_block(0, 0)
    assert exact.shape == (size, size)
    for label, operator in matrices.items():
        if label.startswith("fails"):
            assert isinstance(found[label], Exception)
        else:
            assert found[label][0, 0] == pytest.approx(float((exact * operator.to_dense()).sum()), rel=1e-10)
    for label in ("same", "units again", "fails too"):
        assert not any(operator is matrices[label] for operator in asked)
