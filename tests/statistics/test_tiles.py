"""Products of per-example gradients that are taken tile by tile are those of the gradients written out.

Tiles are made so small that every loop over them runs several times, the last one shorter.
"""

from dataclasses import replace

import pytest
import torch

from fisherviz.capture.captures import GenericCapture
from fisherviz.capture.formed import formed
from fisherviz.statistics import gradients, picked, products
from tests.captures import capture, normal, tied, tokens, written_out
from tests.oracles.checks import assert_matches

MADE = {
    "one position": lambda seed=0: capture(seed=seed),
    "one position and vector": lambda seed=0: capture(vectors=1, seed=seed),
    "positions": lambda seed=0: capture(examples=30, positions=3, seed=seed),
    "many positions": lambda seed=0: capture(examples=12, positions=9, da=2, dg=2, seed=seed),
    "wide layers with few positions": lambda seed=0: capture(examples=12, positions=2, da=30, dg=30, seed=seed),
    "groups": lambda seed=0: capture(examples=30, positions=3, groups=2, seed=seed),
    "tokens": tokens,
    "a table that is a weight too": lambda seed=0: tied(False, seed),
    "a weight that is a table too": lambda seed=0: tied(True, seed),
    "gradients": lambda seed=0: GenericCapture(normal(3, 30, 11, seed=seed)),
    "gradients that were formed": lambda seed=0: formed(capture(examples=30, positions=3, seed=seed)),
    "those of groups": lambda seed=0: formed(capture(examples=30, positions=3, groups=2, seed=seed)),
    "wide units": lambda seed=0: capture(examples=30, positions=2, da=90, dg=3, seed=seed),
}
every_capture = pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    for module in (products, gradients, picked):
        for name in ("GRADIENT_ENTRIES", "ROW_ENTRIES", "OUTER_ENTRIES", "TILE_ENTRIES", "PIECE_ENTRIES"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, 2**9)


@every_capture
def test_diagonal_blocks(make):
    made = make()
    J = written_out(made)
    assert_matches(products.block(made, made), J.T @ J, 1e-12)


@every_capture
def test_blocks_between_two_layers(make):
    row, col = make(0), make(1)
    assert_matches(products.block(row, col), written_out(row).T @ written_out(col), 1e-12)


@pytest.mark.parametrize("expanded", [2**22, 1], ids=["whole", "row by row"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_half_block_holds_pairs_of_outputs_and_inputs_once(expanded, scale, monkeypatch):
    monkeypatch.setattr(products, "WHOLE_ENTRIES", expanded)
    made = capture()
    J = written_out(made)
    whole, part = torch.empty(3, 4, 3, 4, dtype=torch.float64), torch.empty(3, 2, 3, 3, dtype=torch.float64)
    every, some, others = slice(None), slice(1, 3), slice(0, 3)
    products.write_half(products.half_block(made), [(whole, every, every), (part, some, others)], 3, 4, scale)
    assert_matches(whole.view(12, 12), scale * J.T @ J, 1e-12)
    assert_matches(part, (scale * J.T @ J).view(3, 4, 3, 4)[:, some][..., others], 1e-12)


@every_capture
def test_moments_of_picked_entries(make):
    """Two units and two inputs of each layer; of one without a matrix, entries of a matrix of one row."""
    made = [make(0), make(1)]
    picks, entries = [], []
    for one in made:
        J = written_out(one)
        width = J.shape[1] if isinstance(one, GenericCapture) else one.width
        units = torch.tensor([0]) if isinstance(one, GenericCapture) else torch.tensor([0, J.shape[1] // width - 1])
        picks.append(picked.Pick(units, torch.tensor([1, width - 1]), width))
        entries.append(J.unflatten(1, (-1, width))[:, units][..., picks[-1].inputs].flatten(1))
    J = torch.cat(entries, 1)
    assert_matches(picked.picked_moments(made, picks), J.T @ J, 1e-12)


@pytest.mark.parametrize("into", [False, True], ids=["new", "added"])
@pytest.mark.parametrize("shape", [(300, 700), (2, 300, 300), (700, 900)])
def test_gram_matrices_of_many_columns(shape, into):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.eye(shape[-1], dtype=torch.float64).expand(*shape[:-2], -1, -1).clone()
    expected = x.mT @ x
    found = products.gram(x, start.clone() if into else None)
    assert_matches(found, expected + start if into else expected, 1e-12)


@every_capture
def test_example_grams_whole_and_by_rows(make):
    made = make()
    J, k, n = written_out(made), made.vectors, made.examples
    H = J @ J.T
    assert_matches(gradients.example_gram(made), H, 1e-12)
    low, high = n // 3, n // 2 + 1
    strip = H.view(k, n, k * n)[:, low:high].flatten(0, 1)
    assert_matches(gradients.example_gram(made, low, high), strip, 1e-12)
    total = torch.ones_like(H)
    gradients.add_example_gram(total, made)
    assert_matches(total, H + 1, 1e-12)


@every_capture
def test_products_with_columns_and_rows(make):
    made = make()
    J = written_out(made)
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(len(J), 3, generator=generator, dtype=torch.float64)
    v = torch.randn(J.shape[1], 3, generator=generator, dtype=torch.float64)
    assert_matches(gradients.columns_product(made, w), J.T @ w, 1e-12)
    assert_matches(gradients.rows_product(made, v), J @ v, 1e-12)


@every_capture
def test_square_norms_of_blocks(make):
    row, col = make(0), make(1)
    J, other = written_out(row), written_out(col)
    own, cross = float((J.T @ J).square().sum()), float((J.T @ other).square().sum())
    assert gradients.block_square_norm(row, row) == pytest.approx(own, rel=1e-12)
    assert gradients.block_square_norm(row, col) == pytest.approx(cross, rel=1e-12)
    all_pairs = gradients.block_square_norms([row, col])
    assert all_pairs[0, 0] == pytest.approx(own, rel=1e-12)
    assert all_pairs[0, 1] == pytest.approx(cross, rel=1e-12)


@every_capture
@pytest.mark.parametrize("k", [1, 2])
def test_grams_with_the_vectors_that_follow(make, k):
    made = make()
    if k >= made.vectors:
        more = "gradients" if isinstance(made, GenericCapture) else "g"
        own = getattr(made, more)
        made = replace(made, **{more: torch.cat([own, 2 * own + 1, own.flip(1)])[: k + 2]})
    n = made.examples
    J = written_out(made)
    H = J @ J.T
    own, cross = gradients.gram_and_cross(made, k)
    assert_matches(own, H[: k * n, : k * n], 1e-12)
    assert_matches(cross, H[: k * n, k * n :], 1e-12)


def test_weighted_moments():
    made = capture(vectors=1, da=7)
    a, weights = made.a[:, 0], made.g[0, :, 0].square()
    expected = torch.einsum("no,ni,nj->oij", weights, a, a)
    assert_matches(products.weighted_moments(a, weights), expected, 1e-12)
    norm = products.weighted_moments_square_norm(a, weights)
    assert norm == pytest.approx(float(expected.square().sum()), rel=1e-12)
