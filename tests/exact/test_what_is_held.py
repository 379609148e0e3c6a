"""What a Fisher has kept answers like what it computes, and numbers that leave the range are told with their layer."""

import math

import pytest
import torch

import fisherviz as fv
from fisherviz.capture.captures import GenericCapture
from fisherviz.exact.finite import blaming, finite_gram, require_finite_number, require_finite_statistic
from fisherviz.operators.finite import NonFiniteMatrixError
from fisherviz.statistics import CrossInputFactor, Diagonal
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches


def setting():
    net, x = nets.mlp(3, 4, 2), nets.vectors(20, 3)
    return fv.Probe(net, "gaussian").fisher(x), torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))


REQUESTS = {
    "to_dense": (lambda f: f.to_dense(), lambda F: F),
    "product": (lambda f: f @ torch.ones(26, 2).double(), lambda F: F @ torch.ones(26, 2).double()),
    "block": (lambda f: f.block(0, 1), lambda F: F[:16, 16:]),
    "diagonal block": (lambda f: f.block(1), lambda F: F[16:, 16:]),
    "spectrum": (lambda f: f.spectrum(3), lambda F: torch.linalg.eigvalsh(F).flip(0)[:3]),
    "solve": (
        lambda f: f.solve(torch.ones(26).double(), 0.1),
        lambda F: torch.linalg.solve(F + 0.1 * torch.eye(26).double(), torch.ones(26).double()),
    ),
    "frobenius": (lambda f: torch.tensor(f.norm(), dtype=torch.float64), lambda F: F.norm()),
    "spectral of a block": (
        lambda f: torch.tensor(f.norm("spectral", block=(0, 1)), dtype=torch.float64),
        lambda F: torch.linalg.matrix_norm(F[:16, 16:], 2),
    ),
}


@pytest.mark.parametrize("kept", [3000, 1], ids=["kept", "too large to be kept"])
@pytest.mark.parametrize(("ask", "expected"), REQUESTS.values(), ids=REQUESTS.keys())
def test_a_request_gives_the_same_before_and_after_the_matrix_is_there(ask, expected, kept, monkeypatch):
    monkeypatch.setattr("fisherviz.exact.parts.KEPT", kept)
    fisher, truth = setting()
    assert_matches(ask(fisher), expected(truth), 1e-9)
    fisher.to_dense("unit")
    assert (fisher._held() is not None) == (kept > 26)
    assert_matches(ask(fisher), expected(truth), 1e-9)


@pytest.mark.parametrize("kept", [3000, 1], ids=["kept", "too large to be kept"])
@pytest.mark.parametrize("held", [False, True])
def test_a_block_in_unit_order_is_the_part_of_the_matrix_in_unit_order(held, kept, monkeypatch):
    monkeypatch.setattr("fisherviz.exact.parts.KEPT", kept)
    fisher, truth = setting()
    index = fisher.space.permutation("unit")
    expected = truth[index][:, index]
    if held:
        fisher.to_dense("unit")
    assert_matches(fisher.unit_block(0, 1), expected[:16, 16:], 1e-10)
    assert_matches(fisher.unit_block(1, 1), expected[16:, 16:], 1e-10)


@pytest.mark.parametrize("k", [1, 2])
def test_few_eigenvalues_of_a_large_matrix_come_from_products(k, monkeypatch):
    monkeypatch.setattr("fisherviz.exact.spectra.FULL", 5)
    fisher, truth = setting()
    assert_matches(fisher.spectrum(k), torch.linalg.eigvalsh(truth).flip(0)[:k], 1e-7)


@pytest.mark.parametrize("prior", [torch.ones(25), torch.ones(26, 1), torch.ones(27)])
def test_a_prior_has_one_precision_for_each_parameter(prior):
    with pytest.raises(ValueError, match="must be a number or a vector of 26 entries, got shape"):
        setting()[0].sample(prior, 1)


# ---- what is not finite ----------------------------------------------------------------------------------------------


def captures(bad):
    found = {name: GenericCapture(torch.ones(1, 2, 3, dtype=torch.float64)) for name in ("0", "1", "2")}
    for name, value in bad.items():
        found[name].gradients[0, 1, 2] = value
    return lambda: found


def statistic(kind, names, value):
    made = kind(*names)
    made.add(torch.tensor([1.0, value]), 1)
    return made


def test_a_statistic_is_told_with_its_layers():
    require_finite_statistic(Diagonal("0"))
    require_finite_statistic(statistic(Diagonal, ["0"], 2.0))
    with pytest.raises(NonFiniteMatrixError, match=r"^layer '0': the diagonal holds NaN or infinite entries"):
        require_finite_statistic(statistic(Diagonal, ["0"], math.nan))
    with pytest.raises(NonFiniteMatrixError, match=r"^layer '0' and layer '1': the cross input factor holds"):
        require_finite_statistic(statistic(CrossInputFactor, ["0", "1"], math.inf))


@pytest.mark.parametrize(
    ("bad", "said"), [({"1": math.inf}, "^layer '1': "), ({"2": 1e200}, "^layer '2': "), ({}, "^the norm holds")]
)
def test_a_number_is_told_with_the_first_layer_whose_own_block_is_not_finite(bad, said):
    """The square of 1e200 is not finite either."""
    assert require_finite_number(2.0, "the norm", torch.float64, captures(bad)) == 2.0
    with pytest.raises(NonFiniteMatrixError, match=said):
        require_finite_number(math.inf, "the norm", torch.float64, captures(bad))


def test_a_gram_matrix_is_told_likewise_and_other_errors_pass():
    gram = torch.ones(2, 2)
    assert finite_gram(gram, captures({})) is gram
    with pytest.raises(NonFiniteMatrixError, match=r"^layer .0.: the Gram matrix of the gradients"):
        finite_gram(gram * math.nan, captures({"0": math.nan, "1": math.nan}))
    with pytest.raises(ZeroDivisionError), blaming(captures({"0": math.nan})):
        _ = 1 / 0


def test_cumulants_that_overflow_are_told_with_their_layers():
    net, x = nets.mlp(3, 4, 2), nets.vectors(4, 3)
    with torch.no_grad():
        net[2].weight.mul_(1e160)
    with pytest.raises(NonFiniteMatrixError, match=r"^layer '0': the cumulants"):
        fv.cumulants(fv.Probe(net, "gaussian").fisher(x), progress=False)


class OfAllKinds(torch.nn.Module):
    """A convolution, a normalisation, an embedding and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv1d(1, 2, 2), torch.nn.LayerNorm(2)
        self.table, self.last = torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2)

    def forward(self, x):
        read = self.table((x[:, 0] > 0).long())
        return self.last(torch.tanh(self.norm(self.conv(x.unsqueeze(1)).mean(2)) + read))


@pytest.mark.parametrize("entries", [2**26, 1], ids=["all examples", "one by one"])
def test_the_block_of_any_two_kinds_of_layers_is_part_of_the_matrix(entries, monkeypatch):
    monkeypatch.setattr("fisherviz.exact.blocks.GRADIENT_ENTRIES", entries)
    net, x = nets.randomised(OfAllKinds()), nets.vectors(6, 4)
    truth = torch.as_tensor(exact.fisher(net, x, laws.Gaussian()))
    probe = fv.Probe(net, "gaussian")
    ends = torch.tensor([0, 6, 10, 16, 22])
    assert_matches(probe.fisher(x).to_dense(), truth)
    for i in range(4):
        for j in range(4):
            part = truth[ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
            assert_matches(probe.fisher(x).block(i, j), part)
