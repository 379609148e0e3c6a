"""Blocks that are never formed, of one layer and of several, against the dense matrix of per-example gradients."""

import pytest
import torch

from fisherviz.capture.captures import GenericCapture
from fisherviz.matrices.example_operator import ExampleSpace
from fisherviz.operators import SingularMatrixError
from fisherviz.statistics.examples import Examples, Woodbury
from tests.captures import capture, normal, tied, tokens, written_out
from tests.oracles.checks import assert_matches

F64 = torch.float64
LAYERS = {
    "one layer": lambda: [capture(examples=6)],
    "one layer with positions": lambda: [capture(examples=6, positions=3)],
    "a layer without structure": lambda: [GenericCapture(normal(2, 6, 5))],
    "several layers": lambda: [
        capture(examples=6, vectors=3), tokens(examples=6), tied(False, examples=6), GenericCapture(normal(3, 6, 5)),
    ],
}  # fmt: skip
every = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


def dense(layers, scale, shift):
    J = torch.cat([written_out(layer.to(F64)) for layer in layers], 1)
    return scale * J.T @ J + shift * torch.eye(J.shape[1], dtype=F64)


@every
@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_products_and_norms_are_those_of_the_dense_matrix(make, shift):
    layers = make()
    operator, expected = ExampleSpace(Examples(layers, 0.3), shift), dense(layers, 0.3, shift)
    v = normal(len(expected), 3)
    assert_matches(operator @ v, expected @ v, 1e-12)
    assert_matches(operator.to_dense(), expected, 1e-12)
    assert_matches(operator.diagonal(), expected.diagonal(), 1e-12)
    assert operator.norm("trace") == pytest.approx(float(expected.trace()), rel=1e-12)
    assert operator.norm("fro") == pytest.approx(float(expected.norm()), rel=1e-12)
    assert operator.norm("spectral") == pytest.approx(float(torch.linalg.matrix_norm(expected, 2)), rel=1e-9)
    assert_matches(operator.scale(2.0).to_dense(), 2 * expected, 1e-12)
    assert_matches(operator.damped(0.1).to_dense(), dense(layers, 0.3, shift + 0.1), 1e-12)


@every
@pytest.mark.parametrize("known", [False, True], ids=["its own factor", "a factor that is known"])
def test_solves_roots_and_determinants_are_those_of_the_dense_matrix(make, known):
    layers = make()
    examples, expected = Examples(layers, 0.3), dense(layers, 0.3, 0.05)
    operator = ExampleSpace(examples, 0.05, Woodbury(examples, 0.05) if known else None)
    v = normal(len(expected), 2)
    assert_matches(operator.solve(v), torch.linalg.solve(expected, v), 1e-10)
    assert_matches(operator.inverse().to_dense(), torch.linalg.inv(expected), 1e-10)
    assert operator.log_determinant() == pytest.approx(float(torch.linalg.slogdet(expected).logabsdet), rel=1e-10)
    S = operator.inverse_root(torch.eye(len(expected), dtype=F64))
    assert_matches(S @ S.T, torch.linalg.inv(expected), 1e-10)


@every
def test_a_small_damping_in_single_precision_keeps_the_digits_of_the_vector_in_the_range(make):
    layers = [layer.to(torch.float32) for layer in make()]
    expected = dense(layers, 0.3, 1e-4)
    operator = ExampleSpace(Examples(layers, 0.3), 1e-4)
    v = (dense(layers, 0.3, 0.0) @ normal(len(expected))).float()
    right = torch.linalg.solve(expected, v.double())
    assert float((operator.solve(v).double() - right).norm() / right.norm()) < 1e-2
    assert operator.log_determinant() == pytest.approx(float(torch.linalg.slogdet(expected).logabsdet), rel=1e-4)


@every
def test_without_damping_it_is_singular_and_the_advised_damping_solves_it(make):
    operator = ExampleSpace(Examples(make(), 0.3))
    v = torch.ones(operator.shape[0], dtype=F64)
    with pytest.raises(SingularMatrixError, match="its rank is at most the number of gradients") as error:
        operator.solve(v)
    damped = operator.damped(error.value.damping)
    assert float((damped @ damped.solve(v) - v).norm()) < 1e-4 * float(v.norm())
