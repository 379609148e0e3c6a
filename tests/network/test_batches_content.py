"""The same examples are the same bytes in the same order; everything else is other data, or other weights."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fisherviz as fv
from fisherviz.network.guest import fingerprint_of
from tests.oracles import exact, laws, nets
from tests.oracles.checks import assert_matches

IMAGES = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0)).double() / 255


class Changing:
    """Batches that are altered from the second pass on."""

    def __init__(self, batches, change):
        self.batches, self.change, self.passes = batches, change, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches if self.passes == 1 else [self.change(b.clone()) for b in self.batches])


def image_net():
    return nets.randomised(nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 2)))


CHANGES = {
    "flipped left to right": lambda x: x.flip(-1),
    "flipped upside down": lambda x: x.flip(-2),
    "rolled": lambda x: x.roll(1, -1),
    "transposed": lambda x: x.mT,
    "examples exchanged": lambda x: x.flip(0),
    "negated": lambda x: -x,
    "one pixel": lambda x: x.index_fill(3, torch.tensor([2]), 0.5),
    "another shape": lambda x: x.reshape(len(x), 1, 2, 8),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_altered_examples_are_noticed(change):
    fisher = fv.Probe(image_net(), "categorical").fisher(Changing([IMAGES[:3], IMAGES[3:]], change))
    fisher.diagonal()
    with pytest.raises(RuntimeError, match="other examples than the first one"):
        fisher.fresh().diagonal()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("size", [2, 5, 1030])
def test_every_exchange_of_two_entries_alters_the_fingerprint(dtype, size):
    """Also of entries whose low bits are all zero, where products modulo a power of two lose most."""
    x = torch.arange(size).remainder(2).to(dtype)
    seen = {fingerprint_of([x])}
    pairs = list(itertools.combinations(range(size), 2))
    wanted = random.Random(0).sample(pairs, min(len(pairs), 300))
    for i, j in wanted:
        y = x.clone()
        y[[i, j]] = y[[j, i]]
        same = torch.equal(x, y)
        assert (fingerprint_of([y]) in seen) == same
        seen |= set() if same else {fingerprint_of([y])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_every_pair_of_signs_alters_the_fingerprint(dtype):
    x = torch.ones(48, dtype=dtype)
    found = {fingerprint_of([x])}
    for i, j in itertools.combinations(range(48), 2):
        y = x.clone()
        y[[i, j]] *= -1
        found.add(fingerprint_of([y]))
    assert len(found) == 1 + 48 * 47 // 2


def test_the_fingerprint_of_large_tensors_reads_every_row():
    x = torch.zeros(200_003)
    found = {fingerprint_of([x])}
    for i in range(0, len(x), 1999):
        y = x.clone()
        y[i] = 1
        found.add(fingerprint_of([y]))
    assert len(found) == 1 + len(range(0, len(x), 1999))


def test_content_does_not_depend_on_the_memory_it_lies_in():
    x = torch.randn(6, 5)
    assert fingerprint_of([x]) == fingerprint_of([x.T.contiguous().T]) == fingerprint_of([torch.cat([x, x])[6:]])
    x[2, 3] = torch.nan
    assert fingerprint_of([x]) == fingerprint_of([x.clone()])
    assert fingerprint_of([x, x[:0]]) != fingerprint_of([x])


@pytest.mark.parametrize("size", [7, 5001])
def test_parts_of_one_flat_buffer_have_the_content_that_they_show(size):
    """As parameters that a wrapper keeps in one tensor, which start between two words."""
    flat = torch.randn(3 * size)
    parts = flat.split(size)
    assert fingerprint_of(parts) == fingerprint_of([part.clone() for part in parts])
    before = fingerprint_of(parts)
    flat[-1] += 1
    assert fingerprint_of(parts) != before


def test_entries_that_move_to_the_next_tensor_alter_the_fingerprint():
    flat = torch.randn(12)
    assert fingerprint_of([flat[:5], flat[5:]]) != fingerprint_of([flat[:6], flat[6:]])


def exchanged_units(net):
    for p in (net[0].weight, net[0].bias):
        p[[0, 2]] = p[[2, 0]]
    net[2].weight[:, [0, 2]] = net[2].weight[:, [2, 0]]


def exchanged_columns(net):
    net[0].weight[:, [0, 1]] = net[0].weight[:, [1, 0]]


def negated(net):
    for p in net.parameters():
        p.neg_()


@pytest.mark.parametrize("change", [exchanged_units, exchanged_columns, negated])
def test_weights_that_trade_places_are_noticed(change):
    net = nets.mlp(3, 4, 2)
    fisher = fv.Probe(net, "categorical").fisher(nets.vectors(4, 3))
    with torch.no_grad():
        change(net)
    with pytest.raises(RuntimeError, match="the model changed since this Fisher was made"):
        fisher.to_dense()


# ---- the global generators ---------------------------------------------------------------------------------------


class Drawing(nn.Linear):
    """Draws from every global generator in its forward."""

    def forward(self, x):
        np.random.rand()  # noqa: NPY002
        np.random.randn()  # noqa: NPY002
        random.random()
        torch.rand(1)
        return super().forward(x)


class Flipping(Dataset):
    """Half of the images, by the toss of a coin, are flipped."""

    def __len__(self):
        return 6

    def __getitem__(self, n):
        coins = (torch.rand(()), random.random(), np.random.rand())  # noqa: NPY002
        return IMAGES[n].flip(-1) if coins[n % 3] < 0.5 else IMAGES[n]


def generators():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002


@pytest.mark.parametrize("gauss", [False, True])
@pytest.mark.parametrize("request_", ["to_dense", "diagonal", "norm", "gradient", "product", "compare"])
def test_the_global_generators_stand_as_they_stood(request_, gauss):
    np.random.seed(3)  # noqa: NPY002
    if gauss:
        np.random.randn()  # noqa: NPY002  # leaves the second normal number of a pair behind
    net = nets.randomised(nn.Sequential(Drawing(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    data = TensorDataset(nets.vectors(6, 3), laws.Categorical().draw(6, 2))
    before = generators()
    fisher = fv.Probe(net, "categorical").fisher(DataLoader(data, batch_size=4), kind="mc")
    if request_ == "compare":
        fv.compare(fisher, ["kfac"], progress=False)
    elif request_ == "product":
        fisher @ torch.ones(26, dtype=torch.float64)
    else:
        getattr(fisher, request_)()
    assert generators() == before


def test_the_global_generators_stand_as_they_stood_after_an_exception():
    class Failing(Drawing):
        def forward(self, x):
            super().forward(x)
            raise ZeroDivisionError

    class Broken(Flipping):
        def __getitem__(self, n):
            super().__getitem__(n)
            raise ZeroDivisionError

    cases = [(Failing(3, 2).double(), nets.vectors(4, 3)), (image_net(), DataLoader(Broken()))]
    before = generators()
    for net, data in cases:
        with pytest.raises(ZeroDivisionError):
            fv.Probe(net, "gaussian").fisher(data).diagonal()
        assert generators() == before


def test_a_shuffling_augmenting_loader_repeats_itself_where_it_draws_from_the_global_generators():
    """Each pass begins where the first began, so all of them see the same examples."""
    net = image_net()
    loader = DataLoader(Flipping(), batch_size=2, shuffle=True)
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    shown = torch.cat(list(loader))
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    fisher = fv.Probe(net, "categorical").fisher(loader)
    F = exact.fisher(net, shown, laws.Categorical())
    assert_matches(fisher.diagonal(), np.diag(F))
    assert_matches(fisher @ torch.ones(len(F), dtype=torch.float64), F.sum(1))
    assert_matches(fisher.to_dense(), F)


def test_a_shuffling_loader_is_noticed_once_the_generators_moved_on():
    fisher = fv.Probe(image_net(), "categorical").fisher(DataLoader(IMAGES, batch_size=2, shuffle=True))
    fisher.diagonal()
    torch.rand(1)
    with pytest.raises(RuntimeError, match="other examples than the first one"):
        fisher.fresh().diagonal()


LAYOUTS = {
    "sparse": lambda t: t.to_sparse(),
    "rows": lambda t: t.to_sparse_csr(),
    "columns": lambda t: t.to_sparse_csc(),
    "blocks of rows": lambda t: t.to_sparse_bsr((2, 2)),
    "blocks of columns": lambda t: t.to_sparse_bsc((2, 2)),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.5, 0, torch.qint8),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_buffers_of_any_layout_are_marked_by_what_they_hold(change):
    plain = torch.zeros(4, 4)
    plain[0, 1], plain[3, 2] = 1.0, 2.0
    moved, other = plain.flip(0), plain * 2
    marks = [fingerprint_of([change(t)]) for t in (plain, plain.clone(), moved, other)]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3


def test_a_tensor_without_values_is_marked_by_its_shape():
    marks = [fingerprint_of([torch.empty(*shape, device="meta")]) for shape in ((2, 3), (2, 3), (3, 2))]
    assert marks[0] == marks[1] != marks[2]
