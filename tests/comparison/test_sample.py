"""Single entries of matrices that are never written out, against these matrices."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.comparison.entries import entries
from fisherviz.comparison.sample import MOST, Sample, chosen
from fisherviz.operators import Kronecker
from fisherviz.results import blocks
from fisherviz.statistics.picked import Pick
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import assert_matches
from tests.oracles.definitions import METHODS, SHARING, definition
from tests.oracles.zoo import CASES


class TiedTable(nn.Module):
    """An output layer whose weight is an embedding's, declared before it: W̄ is the weight."""

    def __init__(self):
        super().__init__()
        self.out, self.embed = nn.Linear(3, 5), nn.Embedding(5, 3)
        self.embed.weight = self.out.weight

    def forward(self, tokens):
        return self.out(torch.tanh(self.embed(tokens).mean(1)))


TOO_MANY = "fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many"
OWN = {"output tied to an embedding": (TiedTable, lambda: torch.randint(5, (4, 3)))}
NAMES = [
    "linear", "linear without bias", "linear on tokens", "conv1d stride and padding", "conv2d", "conv2d without bias",
    "conv2d in two groups", "conv2d depthwise", "conv3d everything", "layer norm", "batch norm 2d in evaluation",
    "prelu", "embedding", "embedding with padding", "embedding tied to the output", "output tied to an embedding",
    "attention", "transposed convolution", "tied parameters", "module of one's own", "pruned", "transformer layer",
]  # fmt: skip


def positions(sample):
    """The sample's parameters in the network's unit order."""
    starts = sample.fisher.space.offsets
    found = []
    for pick, start in zip(sample.picks, starts, strict=False):
        found += [start + int(o) * pick.width + int(i) for o in pick.units for i in pick.inputs]
    return np.array(found)


def fisher_of(name):
    torch.manual_seed(3)
    build, data = (OWN | CASES)[name]
    net, x = nets.randomised(build()), data()
    x = x.double() if x.is_floating_point() else x
    return net, x, fv.Probe(net, "gaussian").fisher(x)


@pytest.mark.filterwarnings("ignore:.*single features", "ignore:.*chain", "ignore:.*no structure for layers")
@pytest.mark.parametrize("name", NAMES)
def test_every_entry_of_a_sample_is_the_matrixs(name):
    net, x, fisher = fisher_of(name)
    fisher.example_space()
    sample = Sample(fisher, most=fisher.shape[0] // 2)
    where = positions(sample)
    assert len(sample.picks) <= sample.size < fisher.shape[0]
    names = [place.name for place in fisher.space.places]
    brute = exact.fisher(net, x, laws.Gaussian(), names=names)
    unit = fisher.space.permutation("unit").numpy()
    assert_matches(sample.exact, brute[np.ix_(unit, unit)][np.ix_(where, where)])
    for method in METHODS:
        approximation = fv.approximate(fisher, method)
        whole = approximation.to_dense("unit").numpy()
        found = sample.matrix_of(approximation)
        assert np.abs(found - whole[np.ix_(where, where)]).max() <= 1e-9 * np.abs(whole).max(), method


SHARED = [method for method in METHODS if method not in ("kfac-full", "kfac-tridiagonal")]


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "method"),
    [("perceptron", method) for method in METHODS]
    + [(name, method) for name in ("tokens", "convolutions", "convolution and dense") for method in SHARED],
)
def test_a_sample_of_an_approximation_is_that_of_its_definition(name, method):
    torch.manual_seed(3)
    net, x = SHARING[name]() if name in SHARING else (nets.mlp(2, 3, 3, 2), nets.vectors(12, 2))
    fisher = fv.Probe(net, "bernoulli").fisher(x)
    fisher.example_space()
    sample = Sample(fisher, most=20)
    wanted = definition(method, net, x, laws.Bernoulli())
    found, where = sample.matrix_of(fv.approximate(fisher, method)), positions(sample)
    assert np.abs(found - wanted[np.ix_(where, where)]).max() <= 1e-7 * np.abs(wanted).max()
    F = order.reorder(exact.fisher(net, x, laws.Bernoulli()), trace.layers_of(net), "unit")
    assert_matches(sample.exact, F[np.ix_(where, where)])


def test_a_sample_of_an_empirical_fisher_is_of_the_given_targets():
    law, net, x = laws.Categorical(), nets.mlp(2, 3, 2), nets.vectors(12, 2)
    y = law.draw(12, 2)
    fisher = fv.Probe(net, "categorical").fisher(x, y, kind="empirical")
    fisher.example_space()
    sample = Sample(fisher, most=8)
    where = positions(sample)
    F = order.reorder(exact.fisher(net, x, law, targets=y), trace.layers_of(net), "unit")
    assert_matches(sample.exact, F[np.ix_(where, where)])


@pytest.mark.parametrize("name", ["linear", "conv2d in two groups", "embedding", "output tied to an embedding"])
def test_entries_do_not_depend_on_how_many_examples_are_taken_at_a_time(name, monkeypatch):
    _, _, fisher = fisher_of(name)
    fisher.example_space()
    whole = Sample(fisher, most=10).exact
    monkeypatch.setattr("fisherviz.statistics.picked.PIECE_ENTRIES", 1)
    assert_matches(Sample(fisher, most=10).exact, whole, 1e-14)


def test_entries_without_factors_come_from_products_a_few_columns_at_a_time(monkeypatch):
    torch.manual_seed(0)
    matrix = torch.randn(12, 8, dtype=torch.float64)

    class Opaque(fv.operators.Operator):
        """Known by its products alone."""

        shape, tensors = (12, 8), (matrix,)
        T = property(lambda self: None)
        scale = shifted = inverse = diagonal = to_dense = _norm = _solve = lambda self, *given: None

        def _matmul(self, v):
            widths.append(v.shape[1])
            return matrix @ v

    row = Pick(torch.tensor([0, 3]), torch.tensor([1, 2]), 3)
    col = Pick(torch.tensor([1]), torch.tensor([0, 2, 3]), 4)
    for limit, expected in ((2**20, [3]), (24, [2, 1]), (1, [1, 1, 1])):
        widths = []
        monkeypatch.setattr("fisherviz.comparison.entries.COLUMN_ENTRIES", limit)
        found = entries(Opaque(), row, col)
        assert torch.equal(found, matrix[[1, 2, 10, 11]][:, [4, 6, 7]])
        assert widths == expected


def test_an_identity_that_is_not_written_down_stays_so(monkeypatch):
    monkeypatch.setattr(Kronecker, "G", property(lambda self: pytest.fail("the identity was written down")))
    A = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    pick = Pick(torch.tensor([0, 7]), torch.tensor([1]), 2)
    assert torch.equal(entries(Kronecker.over_units(A, 10**6), pick, pick), torch.diag(torch.tensor([3.0, 3.0])))


@pytest.mark.parametrize(
    "shapes",
    [
        [(1000, 785), (1000, 1001), (10, 1001)],
        [(6, 4)],
        [(1, 3), (1, 10**7), (64, 577)],
        [(8, 9)] * 100,
        [(512, 4609)] * 74,
    ],
)
@pytest.mark.parametrize("biased", [True, False])
def test_a_sample_has_some_of_every_layer_and_fits(shapes, biased):
    picks = chosen(shapes, [biased] * len(shapes), MOST)
    total = sum(pick.size for pick in picks)
    assert total <= MOST
    assert blocks.layout([(len(pick.units), len(pick.inputs)) for pick in picks]).within == 1
    for pick, (units, inputs) in zip(picks, shapes, strict=True):
        assert pick.width == inputs
        assert pick.size >= min(units * inputs, 8 if len(shapes) > 74 else 12)
        for places, count in ((pick.units.tolist(), units), (pick.inputs.tolist(), inputs)):
            assert places == sorted(set(places))
            assert 0 <= places[0] <= places[-1] < count
        if biased:
            assert pick.inputs[-1] == inputs - 1
        if units * inputs <= MOST // len(shapes):
            assert pick.size == units * inputs
    if len(shapes) == 3 and shapes[0][0] == 1:
        assert [pick.size for pick in picks[:2]] == [3, MOST - 3 - (MOST - 3) // 2]


def test_a_sample_is_always_the_same_and_leaves_random_numbers_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (chosen([(100, 50), (20, 101)], [True, True], 100) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.units, b.units)
        assert torch.equal(a.inputs, b.inputs)


def test_more_layers_than_entries_have_one_each():
    picks = chosen([(3, 4)] * 30, [True] * 30, 20)
    assert [pick.size for pick in picks] == [1] * 30


def test_positions_are_saved_exactly():
    numbers = np.array([0, 1, 65535, 65536, 2**24 + 1, 10**9 + 7])
    assert (blocks.of_digits(blocks.digits(numbers)) == numbers).all()


def test_a_sample_that_does_not_fit_is_left_out_and_the_note_says_why(monkeypatch):
    monkeypatch.setattr(*TOO_MANY)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    fisher = fv.Probe(net, "gaussian").fisher(torch.randn(5, 3, dtype=torch.float64))
    monkeypatch.setattr("fisherviz.comparison.sample._COPIES", 1e15)
    found = fv.compare(fisher, ["kfac"], metrics=["relative_frobenius"], progress=False)
    (note,) = [note for note in found.notes if "sample" in note]
    assert note.startswith("a sample of single entries is left out: it takes")
    assert "may be taken" in note
    assert not [name for name in found.arrays if name.startswith(("blocks", "entries", "sample"))]
    assert found.whole("relative_frobenius")


def test_a_method_without_entries_has_its_metrics_and_a_note(monkeypatch):
    monkeypatch.setattr(*TOO_MANY)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    fisher = fv.Probe(net, "gaussian").fisher(torch.randn(5, 3, dtype=torch.float64))
    kept = Sample.matrix_of

    def matrix_of(self, approximation):
        if approximation.name == "kfac":
            raise ValueError("nobody may see them.")
        return kept(self, approximation)

    monkeypatch.setattr(Sample, "matrix_of", matrix_of)
    found = fv.compare(fisher, ["kfac", "diagonal"], damping=0.1, progress=False)
    (note,) = [note for note in found.notes if "nobody may see them" in note]
    assert note.startswith("single entries of kfac are left out: ")
    assert {"blocks/exact", "blocks/diagonal"} <= set(found.arrays)
    assert "blocks/kfac" not in found.arrays
    assert set(found.whole("relative_frobenius")) == {"kfac", "diagonal"}
