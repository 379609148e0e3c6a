"""Two and three processes give what one gives, whatever their shares; what goes wrong in one is said by all."""

import os
import signal

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from fisherviz.support.processes import Processes
from tests import together
from tests.oracles import nets
from tests.oracles.checks import FLOAT32, FLOAT64

LAW = fv.Categorical(ignore_index=-100)


class Pooled(nn.Module):
    """Tokens (N, T) to the classes of an example."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x))).mean(1)


def dense():
    return nets.mlp(3, 4, 4), torch.randn(7, 3).double(), torch.randint(4, (7,))


def images():
    net = nets.randomised(nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4)))
    x, y = torch.randn(8, 1, 3, 3).double(), torch.randint(4, (8,))
    return net, [(x[:5], y[:5]), (x[5:6], y[5:6]), (x[6:], y[6:])], None


def texts():
    """Batches of different lengths, and one of whose examples nothing counts."""
    lengths, targets = (5, 4, 1, 3), [[0, 1, 2, 3, 0], [2, 1], [3], [-100, 0, -100]]
    batches = [(torch.randint(6, (len(y), T)), torch.tensor(y)) for T, y in zip(lengths, targets, strict=True)]
    return nets.randomised(Pooled()), batches, None


def unstructured():
    net = nn.Sequential(nn.EmbeddingBag(6, 3, mode="max"), nn.Tanh(), nn.Linear(3, 4))
    data = TensorDataset(torch.randint(6, (7, 4)), torch.randint(4, (7,)))
    return nets.randomised(net), DataLoader(data, batch_size=3), None


def few():
    return nets.mlp(3, 4, 4), torch.randn(2, 3).double(), torch.randint(4, (2,))


def single():
    net, x, y = dense()
    return net.float(), x.float(), y


CASES = {
    "dense": (dense, {}),
    "dense, sum": (dense, {"reduction": "sum"}),
    "images, mc": (images, {"kind": "mc", "samples": 2}),
    "images, empirical": (images, {"kind": "empirical"}),
    "texts": (texts, {}),
    "texts, mc, sum": (texts, {"kind": "mc", "reduction": "sum"}),
    "unstructured": (unstructured, {}),
    "unstructured, mc": (unstructured, {"kind": "mc"}),
    "fewer examples than processes": (few, {}),
    "float32": (single, {}),
}


def quantities(name, processes):
    """Everything that a Fisher can be asked for, of new Fishers and of one that has kept its captures."""
    make, options = CASES[name]
    torch.manual_seed(0)
    net, data, targets = make()
    torch.manual_seed(distributed.get_rank() if processes else 0)
    probe = fv.Probe(net, LAW)

    def fisher():
        return probe.fisher(data, targets, **options, processes=processes)

    F = fisher()
    draws = torch.Generator().manual_seed(3)
    v = torch.randn(F.shape[0], 2, generator=draws, dtype=torch.float64)
    found = {
        "product": F @ v,
        "quadratic": F.quadratic(v[:, 0], v[:, 1]),
        "dense": fisher().to_dense("unit"),
        "block": fisher().block(0, -1 + len(F.layers)),
        "unit block": fisher().unit_block(0, 0),
        "diagonal": fisher().diagonal(),
        "trace": fisher().norm("trace"),
        "examples": float(fisher().examples),
        "natural gradient": fisher().natural_gradient(0.1),
        "gradient": fisher().gradient(),
        "cumulants": cumulants(fisher()),
        "gram": F.example_gram(),
        "product of captures": F @ v,
        "form of captures": F.quadratic(v[:, 0]),
        "norm": F.norm(),
        "norm of a block": F.norm(block=(0, 1)),
        "largest singular value of a block": F.norm("spectral", block=(0, 1)),
        "spectrum": F.spectrum(),
        "solve": F.solve(v, 0.1),
        "determinant": F.log_determinant(0.1),
        "sample": F.sample(2.0, 3, generator=torch.Generator().manual_seed(1)),
        "dense of captures": F.to_dense(),
    }
    if F.space.layers[-1].structured:
        found["units"] = F.units(F.layers[-1].name)
    found |= {method: fv.approximate(fisher(), method).to_dense() for method in fv.approximations}
    return {what: torch.as_tensor(value, dtype=torch.float64) for what, value in found.items()}


def cumulants(fisher):
    try:
        return fv.cumulants(fisher, progress=False).bound
    except NotImplementedError:
        return 0.0


def error_of(request):
    try:
        request()
    except Exception as error:
        return type(error), str(error)


def troubles():
    """What all say where something goes wrong in one of them; afterwards they go on together."""
    rank = distributed.get_rank()
    net, x, y = dense()
    found = {"seeds": error_of(lambda: fv.Probe(net, LAW).fisher(x, processes=True).diagonal())}
    torch.manual_seed(0)
    net, x, y = dense()
    probe = fv.Probe(net, LAW)
    probe.look(x)
    shard = x[rank : rank + 4]
    found["data"] = error_of(lambda: probe.fisher(shard, processes=True).diagonal())
    bad = x.clone()
    bad[-1] = float("nan")  # the last process's
    found["nan"] = error_of(lambda: probe.fisher(bad, processes=True).diagonal())
    found["all"] = error_of(lambda: probe.fisher(x, processes=True).gradient())

    class Failing(fv.approximations["diagonal"]):
        def operator_for(self, layer, values):
            if rank == 1:
                raise ValueError("this one fails.")
            return super().operator_for(layer, values)

    chosen = {"failing": Failing(), "kfac": "kfac"}
    compared = fv.compare(probe.fisher(x, y, processes=True), chosen, damping=0.1, progress=False)
    found["method"] = compared.methods, compared.meta["notes"]
    fisher = probe.fisher(x, processes=True)
    found["requests"] = error_of(lambda: fisher.diagonal() if rank else fisher @ torch.ones(fisher.shape[0]))
    return found


def compared(processes):
    torch.manual_seed(0)
    net, x, y = dense()
    small = fv.compare(fv.Probe(net, LAW).fisher(x, y, processes=processes), progress=False)
    wide = nets.mlp(10, 60, 50, 4)
    x, y = torch.randn(5, 10).double(), torch.randint(4, (5,))
    large = fv.compare(fv.Probe(wide, LAW).fisher(x, y, processes=processes), progress=False)
    return [(found.frame, found.arrays, found.meta["notes"]) for found in (small, large)]


def everything(count):
    found = {name: quantities(name, True) for name in CASES}
    seen = []
    net, x, _ = dense()
    torch.manual_seed(0)
    net, x, _ = dense()
    probe = fv.Probe(net, LAW)
    probe.look(x)
    net[0].register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    probe.fisher(x, processes=True).diagonal()
    found["seen"] = sum(seen)
    found["compared"] = compared(True)
    found["troubles"] = troubles()
    if count == 3:
        probe = fv.Probe(net, LAW)
        if distributed.get_rank() == 1:
            net[0].register_forward_hook(lambda module, inputs, output: os.kill(os.getpid(), signal.SIGKILL))
        found["killed"] = error_of(lambda: probe.fisher(x, processes=True).diagonal())
    return found


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, tmp_path_factory):
    return together.run(everything, request.param, tmp_path_factory.mktemp("ranks") / "group", request.param)


@pytest.fixture(scope="module")
def alone():
    found = {}

    def of(name):
        if name not in found:
            found[name] = quantities(name, False)
        return found[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_processes_give_what_one_gives(ranks, alone, name):
    tolerance = FLOAT32 if name == "float32" else FLOAT64
    for found in ranks:
        if found is None:
            continue  # it was killed in the end
        assert found[name].keys() == alone(name).keys()
        for what, value in alone(name).items():
            gap, scale = (found[name][what] - value).abs().max(), value.abs().max()
            assert gap <= tolerance * scale, (what, gap, scale)


def test_shares_are_all_examples_once_and_even():
    for count in (1, 2, 3, 5):
        group = [Processes(rank, count) for rank in range(count)]
        had, first = [0] * count, 0
        for size in (1, 1, 7, 2, 3, 1, 1, 1, 20):
            ranges = [each.share(size, first) for each in group]
            assert [k for start, stop in ranges for k in range(start, stop)] == list(range(size))
            had = [h + stop - start for h, (start, stop) in zip(had, ranges, strict=True)]
            first += size
            assert max(had) - min(had) <= 1
