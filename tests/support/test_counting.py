"""Operations are counted by shapes: against formulas, in every mode, on both ways of attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherviz.statistics.products import gram, weighted_moments
from fisherviz.support.counting import counted, counted_as, counting, is_counting

N, D, E = 5, 7, 3


def operations(work):
    with counting() as counter:
        work()
    return counter.operations


X, SQUARE, TALL = torch.randn(N, D), torch.eye(D) * 3, torch.randn(2 * D, D)
WORK = {
    "product": (lambda: X @ X.T, 2 * N * D * N),
    "vector": (lambda: X @ torch.ones(D), 2 * N * D),
    "linear": (lambda: functional.linear(X, torch.ones(E, D), torch.ones(E)), 2 * N * D * E),
    "einsum": (lambda: torch.einsum("bij,bjk->bik", X.expand(4, N, D), X.T.expand(4, D, N)), 4 * 2 * N * D * N),
    "convolution": (lambda: functional.conv1d(torch.ones(2, 3, 8), torch.ones(4, 3, 3)), 2 * 2 * 4 * 6 * 3 * 3),
    "cholesky": (lambda: torch.linalg.cholesky(SQUARE), D**3 // 3),
    "inverse": (lambda: torch.linalg.inv(SQUARE), 2 * D**3),
    "eigenvectors": (lambda: torch.linalg.eigh(SQUARE), 9 * D**3),
    "singular vectors": (lambda: torch.linalg.svd(TALL), 6 * 2 * D**3 + 20 * D**3),
    "wide singular vectors": (lambda: torch.linalg.svd(TALL.T), 6 * 2 * D**3 + 20 * D**3),
    "qr": (lambda: torch.linalg.qr(TALL), int(4 * 2 * D**3 - 4 / 3 * D**3)),
    "triangular solve": (lambda: torch.linalg.solve_triangular(SQUARE, TALL.T, upper=True), D * D * 2 * D),
    "element-wise work": (lambda: (X * X).exp().sum(), 0),
    "a look-up": (lambda: functional.embedding(torch.zeros(9, dtype=torch.long), X), 0),
}


@pytest.mark.parametrize("name", WORK)
def test_work_counts_by_its_shapes(name):
    work, expected = WORK[name]
    assert operations(work) == expected
    with torch.no_grad():
        assert operations(work) == expected
    with torch.inference_mode():
        assert operations(work) == expected


def test_backward_of_a_linear_layer_counts_twice_its_forward():
    x, layer = torch.randn(N, D, requires_grad=True), nn.Linear(D, E)
    assert operations(lambda: layer(x).sum().backward()) == 3 * 2 * N * D * E


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_counts_alike_whatever_computes_it(backend):
    q, k, v = (torch.randn(2, 4, t, 8, requires_grad=True) for t in (6, 5, 5))
    forward = 2 * 2 * 4 * 6 * 5 * (8 + 8)
    with sdpa_kernel(backend):
        assert operations(lambda: functional.scaled_dot_product_attention(q, k, v)) == forward
        assert operations(lambda: functional.scaled_dot_product_attention(q, k, v).sum().backward()) == 3 * forward


def test_a_recurrent_layer_counts_its_matrices_at_every_step():
    layer, x = nn.LSTM(3, 4), torch.randn(6, 2, 3)
    assert operations(lambda: layer(x)) == 2 * 6 * 2 * 4 * 4 * (3 + 4)


@pytest.mark.parametrize("make", [lambda x: gram(x), lambda x: weighted_moments(x, torch.ones(len(x), 2))])
def test_symmetric_products_count_in_full_however_many_rows_come_together(make):
    x = torch.randn(4000, 300)
    whole = operations(lambda: make(x))
    assert whole >= 2 * 4000 * 300**2
    assert sum(operations(lambda part=part: make(part)) for part in x.split(13)) == whole
    assert operations(lambda: make(x.T.contiguous().T)) == whole


def test_what_runs_inside_counts_as_it_is_told():
    with counting() as counter:
        with counted_as(11):
            X @ X.T
        assert counter.operations == counted() == 11
        with counting() as inner:
            X @ X.T
        assert inner.operations == 2 * N * D * N
    assert counter.operations == 11 + inner.operations


def test_nobody_counts_after_an_error():
    with pytest.raises(KeyError), counting():
        raise KeyError
    assert not is_counting()
    assert counted() == 0
