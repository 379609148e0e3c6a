"""Targets as users have them: labels of any integer type, arrays of any library and byte order, values missing."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.network.batches import Batches, split_batch
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

CLASSES = 200
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 156, 200, 255, 300])
def test_labels_mean_the_same_in_every_integer_type(dtype, ignore_index):
    """torch compares a uint8 with -100 modulo 256: class 156 was left out."""
    likelihood, info = fv.Categorical(ignore_index=ignore_index), torch.iinfo(dtype)
    known = [label for label in (*range(CLASSES), ignore_index) if info.min <= label <= info.max]
    labels = torch.tensor(known)
    narrow, z = labels.to(dtype), torch.zeros(len(known), CLASSES)
    there = likelihood.counted(labels)
    found = likelihood.counted(narrow)
    assert (found is None) == (there is None)
    assert there is None or torch.equal(found, there)
    assert torch.equal(likelihood.check_targets(z, narrow), likelihood.check_targets(z, labels))


def test_small_labels_give_the_fisher_of_the_same_labels():
    net, x, labels = nets.mlp(2, 3, CLASSES), nets.vectors(5, 2), torch.tensor([0, 156, 199, 156, 7])
    one, other = (fv.Probe(net, "categorical").fisher((x, y), kind="empirical") for y in (labels, labels.byte()))
    assert one.examples == other.examples == 5
    assert_matches(other @ torch.ones(len(other.diagonal())).double(), one @ torch.ones(len(one.diagonal())).double())


FORMS = {
    "list": lambda v: v.tolist(),
    "numpy": lambda v: v,
    "other byte order": lambda v: v.astype(v.dtype.newbyteorder("S")),
    "negative stride": lambda v: v[::-1].copy()[::-1],
    "read only": lambda v: np.frombuffer(v.tobytes(), v.dtype),
    "masked nowhere": lambda v: np.ma.array(v, mask=np.zeros(len(v), bool)),
    "series": lambda v: pd.Series(v),
    "series of a shuffled table": lambda v: pd.Series(v, index=np.random.default_rng(0).permutation(len(v))),
    "series of rows of a table": lambda v: pd.Series(v, index=np.arange(len(v)) * 3 + 1),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["int64", "int32", "float32", "float64", "bool"])
def test_targets_of_any_library_are_taken_by_position(form, dtype):
    values = np.array([3, 0, 2, 1, 1, 0, 4]).astype(dtype)
    _, targets = split_batch((torch.zeros(7, 2), FORMS[form](values)))
    assert torch.equal(targets, torch.from_numpy(values).to(targets.dtype))
    assert targets.is_floating_point() == values.dtype.name.startswith("float")


@pytest.mark.parametrize(
    "targets",
    [["a", "b"], np.array(["a", "b"]), np.array([1, None]), np.array(["2020-01-01", "NaT"], "datetime64[s]"),
     pd.Series(["a", "b"]), pd.Categorical(["x", "y"])],
    ids=lambda given: type(given).__name__,
)  # fmt: skip
def test_what_is_no_number_is_refused_as_a_target(targets):
    with pytest.raises(TypeError, match=r"targets must be a tensor, or numbers .* class indices \(N,\) or values"):
        split_batch((torch.zeros(2, 2), targets))


UNREAL = {
    "complex": lambda y: y + 1j * y, "complex array": lambda y: (y + 1j).numpy(), "sparse": lambda y: y.to_sparse(),
    "nested": lambda y: torch.nested.nested_tensor(list(y)), "meta": lambda y: y.to("meta"),
    "quantised": lambda y: torch.quantize_per_tensor(y.float(), 0.1, 0, torch.qint8),
}  # fmt: skip


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("form", UNREAL)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning", "ignore::DeprecationWarning")
def test_targets_are_dense_real_numbers(form, likelihood):
    """Of complex targets the real parts were taken."""
    net, x, y = nets.mlp(2, 3, 2), nets.vectors(5, 2), torch.rand(5, 2).double()
    with pytest.raises(TypeError, match=r"targets must be dense and real tensors|targets are on the meta device"):
        fv.Probe(net, likelihood).fisher((x, UNREAL[form](y)), kind="empirical").to_dense()


def test_masked_targets_are_no_labels():
    with pytest.raises(ValueError, match="1 targets are masked"):
        list(Batches((torch.zeros(3, 2), np.ma.array([0, 1, 2], mask=[0, 1, 0]))))


@pytest.mark.parametrize("missing", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("ask", ["empirical", "gradient"])
def test_missing_targets_are_named(likelihood, missing, ask):
    net, x, y = nets.mlp(2, 3, 2), nets.vectors(4, 2), torch.rand(4, 2).double()
    y[2, 1] = missing
    fisher = fv.Probe(net, likelihood).fisher((x, y), kind="empirical" if ask == "empirical" else "exact")
    with pytest.raises(ValueError, match=r"targets (contain NaN or infinity|out of range)"):
        fisher.to_dense() if ask == "empirical" else fisher.gradient()


@pytest.mark.parametrize(
    ("likelihood", "shape", "way"),
    [("categorical", (4, 3), "argmax"), ("categorical", (4, 1), "drop the dimensions of size 1"),
     ("gaussian", (4,), "a number for each output"), ("bernoulli", (4,), "a number for each output")],
)  # fmt: skip
def test_targets_of_another_shape_are_told_what_to_become(likelihood, shape, way):
    y = torch.zeros(shape)
    y = y.long() if likelihood == "categorical" else y
    with pytest.raises(ValueError, match=way):
        fv.Probe(nets.mlp(2, 3, 3), likelihood).fisher((nets.vectors(4, 2), y), kind="empirical").to_dense()


class Reader(nn.Module):
    """Means of embedded tokens, of those that a mask keeps."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens, mask):
        kept = mask.unsqueeze(-1).double()
        return self.head((self.embed(tokens) * kept).sum(1) / kept.sum(1))


class Packed(nn.Module):
    """A reader of tokens and mask in one tensor, for an oracle of one input."""

    def __init__(self, reader):
        super().__init__()
        self.reader = reader

    def forward(self, both):
        return self.reader(*both.unbind(1))


ASKED = {"dense": lambda f: f.to_dense(), "product": lambda f: f @ torch.ones(f.shape[0]).double()}
no_labels = pytest.mark.parametrize("kind", ["exact", "mc"])


@no_labels
@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_a_mask_in_the_place_of_targets_is_refused_by_kinds_without_labels(ask, kind, dtype):
    """The model ran without its mask, and the Fisher was half off without a word."""
    net, tokens = nets.randomised(nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(20, 3))), torch.ones(6, 5)
    fisher = fv.Probe(net, "categorical").fisher((tokens.long(), tokens.to(dtype)), kind=kind)
    with pytest.raises(ValueError, match=r"must have shape \(6,\), got \(6, 5\).*\(\(a, b\), targets or None\)"):
        ASKED[ask](fisher)


@pytest.mark.parametrize("form", [lambda t, m: ((t, m), None), lambda t, m: {"tokens": t, "mask": m}])
def test_several_inputs_as_the_refusal_says_them(form):
    reader, tokens, mask = nets.randomised(Reader()), torch.randint(9, (6, 5)), torch.rand(6, 5) > 0.5
    mask[:, 0] = True
    expected = exact.fisher(Packed(reader), torch.stack([tokens, mask.long()], 1), laws.Categorical())
    assert_matches(fv.Probe(reader, "categorical").fisher(form(tokens, mask)).to_dense(), expected)


IMPOSSIBLE = {
    "other classes": ("categorical", torch.tensor([5, 6, 7, 5]), r"0\.\.2, but the targets span 5\.\.7"),
    "lengths": ("categorical", torch.tensor([1, 5, 2, 3]), "out of range.*second part of a batch is its targets"),
    "truth values": ("categorical", torch.tensor([True, False, True, True]), "got torch.bool.*second part"),
    "a column": ("categorical", torch.tensor([[0], [1], [2], [0]]), "drop the dimensions of size 1"),
    "other widths of logits": ("bernoulli", torch.ones(4, 5), "outputs' shape.*second part"),
    "other numbers of logits": ("bernoulli", torch.full((4, 3), 7.0), r"lie in \[0, 1\].*second part"),
    "other widths of means": ("gaussian", torch.ones(4, 5), "outputs' shape.*second part"),
}


@no_labels
@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("which", IMPOSSIBLE)
def test_targets_that_can_be_none_are_refused_by_kinds_without_labels(which, ask, kind):
    likelihood, y, said = IMPOSSIBLE[which]
    fisher = fv.Probe(nets.mlp(2, 3, 3), likelihood).fisher((nets.vectors(4, 2), y), kind=kind)
    with pytest.raises((ValueError, TypeError), match=said):
        ASKED[ask](fisher)


SOFT = {
    "one-hot": torch.eye(3, dtype=torch.long)[[0, 2, 1, 1]],
    "smoothed": torch.full((4, 3), 0.1).scatter_(1, torch.tensor([[0], [2], [1], [1]]), 0.8),
}


@no_labels
@pytest.mark.parametrize("form", SOFT)
def test_distributions_over_classes_are_targets_of_kinds_without_labels(form, kind):
    net, x = nets.mlp(2, 3, 3), nets.vectors(4, 2)
    found, alone = (fv.Probe(net, "categorical").fisher(data, kind=kind).to_dense() for data in ((x, SOFT[form]), x))
    assert torch.equal(found, alone)


@no_labels
def test_missing_values_of_a_regression_do_not_matter_to_kinds_without_labels(kind):
    net, x, y = nets.mlp(2, 3, 3), nets.vectors(4, 2), torch.full((4, 3), torch.nan)
    for likelihood in ("gaussian", "bernoulli"):
        found, alone = (fv.Probe(net, likelihood).fisher(data, kind=kind).to_dense() for data in ((x, y), x))
        assert torch.equal(found, alone)


@pytest.mark.parametrize(
    "optimizer",
    [lambda net, data: fv.optim.SubsampledNaturalGradient(net, "categorical", fisher_data=data),
     lambda net, data: fv.optim.KBFGS(net, "categorical", data=data)],
    ids=["SubsampledNaturalGradient", "KBFGS"],
)  # fmt: skip
def test_optimizers_refuse_targets_that_can_be_none(optimizer):
    net, x, y = nets.mlp(2, 3, 3), nets.vectors(4, 2), torch.tensor([0, 1, 2, 0])
    made = optimizer(net.train(), [(x, torch.tensor([5, 6, 7, 5]))])

    def closure():
        made.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="targets out of range"):
        made.step(closure)


@pytest.mark.parametrize(("variance", "dtype"), [(1e-80, torch.float32), (5e-324, torch.float16)])
def test_a_variance_beyond_the_type_is_refused(variance, dtype):
    with pytest.raises(ValueError, match=r"too small for outputs of torch\.float"):
        fv.Probe(nn.Linear(2, 2).to(dtype), fv.Gaussian(variance)).fisher(torch.ones(3, 2, dtype=dtype)).to_dense()


def test_inputs_that_are_no_tensors_are_told_by_what_they_hold():
    with pytest.raises(TypeError, match="must be tensors, got tuple of ndarray; convert"):
        fv.Probe(nets.mlp(2, 3, 2), "gaussian").fisher([((np.zeros((3, 2)),), None)]).to_dense()
