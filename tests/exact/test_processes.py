"""Two and three processes give what one gives, whatever their shares; what goes wrong in one is said by all."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherviz as fv
from fisherviz.statistics import gradients
from fisherviz.support.processes import Processes
from tests import together
from tests.oracles import nets
from tests.oracles.checks import FLOAT32, FLOAT64

pytestmark = pytest.mark.filterwarnings("ignore:.*single features", "ignore:.*chain", "ignore:.*no structure")

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
    "unstructured, mc": (unstructured, {"kind": "mc"}),
    "fewer examples than processes": (few, {}),
    "float32": (single, {}),
}


METHODS = {"dense": tuple(fv.approximations), "texts": tuple(fv.approximations)}
"""Methods that are fitted to some cases."""
LONG = ("dense, sum", "images, empirical")
"""Cases that others show, but for one word of their options."""
OF_TWO = ("texts, mc, sum",)
"""Cases of two processes; three take all but the long ones."""


def quantities(name, processes):
    """Everything that a Fisher can be asked for, of new Fishers and of one that has kept its captures."""
    make, options = CASES[name]
    torch.manual_seed(0)
    net, data, targets = make()
    torch.manual_seed(distributed.get_rank() if processes else 0)  # process 0's seed is everybody's
    probe = fv.Probe(net, LAW)

    def fisher():
        return probe.fisher(data, targets, **options, processes=processes)

    F = fisher()
    draws = torch.Generator().manual_seed(3)
    v = torch.randn(F.shape[0], 2, generator=draws, dtype=torch.float64)
    found = {
        "product": F @ v,
        "form": F.quadratic(v[:, 0], v[:, 1]),
        "dense": fisher().to_dense("unit"),
        "block": fisher().block(0, len(F.layers) - 1),
        "unit block": fisher().unit_block(0, 0),
        "units": fisher().units(F.layers[-1].name),
        "diagonal": fisher().diagonal(),
        "trace": fisher().norm("trace"),
        "examples": fisher().examples,
        "natural gradient": fisher().natural_gradient(0.1),
        "gradient": fisher().gradient(),
        "Gram matrix": F.example_gram(),
        "product of captures": F @ v,
        "form of captures": F.quadratic(v[:, 0]),
        "norm": F.norm(),
        "norm of a block": F.norm(block=(0, 1)),
        "largest singular value of a block": F.norm("spectral", block=(0, 1)),
        "spectrum": F.spectrum(),
        "solution": F.solve(v, 0.1),
        "determinant": F.log_determinant(0.1),
        "samples": F.sample(2.0, 3, generator=torch.Generator().manual_seed(1)),
        "dense of captures": F.to_dense(),
    }
    if name.startswith("dense"):
        found["cumulants"] = fv.cumulants(fisher(), progress=False).bound
    found |= {method: fv.approximate(fisher(), method).to_dense() for method in METHODS.get(name, ())}
    return {what: torch.as_tensor(value, dtype=torch.float64) for what, value in found.items()}


def comparison(parameters, processes):
    """A comparison by dense matrices or without, and what of it does not depend on the clock."""
    torch.manual_seed(0)
    wide = parameters == "many"
    net = nets.mlp(8, 20, 20, 4) if wide else nets.mlp(3, 4, 4)
    x, y = torch.randn(5, 8 if wide else 3).double(), torch.randint(4, (5,))
    # not those that other tests of the process have registered
    own = [name for name, method in fv.approximations.items() if method.__module__.startswith("fisherviz.")]
    methods = ("diagonal", "layer", "kfac", "ekfac") if wide else own
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
        found = fv.compare(fv.Probe(net, LAW).fisher(x, y, processes=processes), methods, progress=False)
    frame = found.frame[~found.frame["metric"].isin(["seconds", "passes"])].reset_index(drop=True)
    return frame, found.arrays, found.notes


def error_of(request):
    """The class and the sentence."""
    try:
        request()
    except Exception as error:
        return type(error).__name__, str(error)


class Failing(fv.approximations["diagonal"]):
    """A method that process 1 cannot build."""

    def operator_for(self, layer, values):
        if distributed.get_rank() == 1:
            raise ValueError("this one fails.")
        return super().operator_for(layer, values)


def troubles():
    """What all say where something goes wrong in one of them; afterwards they go on together."""
    rank = distributed.get_rank()
    torch.manual_seed(rank)
    own, x, y = dense()
    torch.manual_seed(0)
    same, x, y = dense()
    probe = fv.Probe(same, LAW)
    bad = x.clone()
    bad[-1] = float("nan")  # of the last process's share

    def fisher(data, targets=None):
        return probe.fisher(data, targets, processes=True)

    found = {
        "weights": error_of(fv.Probe(own, LAW).fisher(x, processes=True).diagonal),
        "data": error_of(fisher(x[rank : rank + 4]).diagonal),
        "one": error_of(fisher(bad).diagonal),
        "all": error_of(fisher(x).gradient),
        "compared": fv.compare(fisher(x, y), {"failing": Failing(), "kfac": "kfac"}, damping=0.1, progress=False),
        "requests": error_of(lambda: fisher(x) @ torch.ones(36) if rank else fisher(x).diagonal()),
    }
    found["after"] = fisher(x).diagonal()
    return found


def seen(data, probe, hook):
    """How many forwards a process's pass over the data takes, with what its hook does, and what it says."""
    ran = []
    handle = probe.model[0].register_forward_hook(lambda module, inputs, output: ran.append(len(output)) or hook())
    said = error_of(probe.fisher(data, processes=True).diagonal)
    handle.remove()
    return ran, said


def fail():
    """Process 1 fails at once, the others are slow."""
    if distributed.get_rank() == 1:
        raise ValueError("lost.")
    time.sleep(0.02)


def die():
    """Process 1 is killed."""
    if distributed.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def measured(names):
    """Quantities of some cases in one process of several."""
    gradients._TILE_ENTRIES = 200  # several tiles to share
    return {name: quantities(name, True) for name in names}


def everything(count):
    """All that is asked in one process of several."""
    found = measured([name for name in CASES if name not in LONG] if count == 3 else OF_TWO)
    if count == 3:
        found |= {parameters: comparison(parameters, True) for parameters in ("few", "many")}
    found["troubles"] = troubles()
    torch.manual_seed(0)
    net, x, _ = dense()
    probe = fv.Probe(net, LAW)
    probe.look(x)
    found["shares"] = seen(x, probe, lambda: None)
    found["failed"] = seen([x[:2]] * 400, probe, fail)
    found["killed"] = seen(x, probe, die) if count == 3 else None
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return together.run(everything, 2, tmp_path_factory.mktemp("two") / "group", 2)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    found = together.run(everything, 3, tmp_path_factory.mktemp("three") / "group", 3)
    assert found[1] is None  # it was killed in the end
    return [found[0], found[2]]


def assert_same(found, alone, tolerance):
    assert found.keys() == alone.keys()
    for what, value in alone.items():
        gap, scale = float((found[what] - value).abs().max()), float(value.abs().max())
        assert gap <= tolerance * scale, (what, gap, scale)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return together.run(measured, 3, tmp_path_factory.mktemp("long") / "group", LONG)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_processes_give_what_one_gives(two, three, name):
    alone = quantities(name, False)
    for ranks in [two, three] if name in OF_TWO else [three]:
        for found in ranks:
            assert_same(found[name], alone, FLOAT32 if name == "float32" else FLOAT64)


@pytest.mark.soak
@pytest.mark.parametrize("name", LONG)
def test_processes_give_what_one_gives_in_sums_and_of_empirical_fishers(long, name):
    alone = quantities(name, False)
    for found in long:
        assert_same(found[name], alone, FLOAT64)


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["few", "many"])
def test_comparisons_are_the_same_cell_by_cell(three, parameters):
    frame, arrays, notes = comparison(parameters, False)
    for rank in three:
        found, drawn, said = rank[parameters]
        keys = ["method", "row", "col", "metric"]
        assert found[keys].equals(frame[keys])
        gap = (found["value"] - frame["value"]).abs()
        assert (gap <= 1e-6 * frame["value"].abs() + 1e-7).all(), frame[gap > 1e-6 * frame["value"].abs() + 1e-7]
        assert said == notes
        assert drawn.keys() == arrays.keys()
        for name, array in arrays.items():
            if name.startswith(("blocks/", "blocks_inverse/")):
                continue  # an eigenbasis has no sign, and is not unique where eigenvalues are equal
            rounded = 2**-7 if name.startswith("entries") else 1e-6  # to 2^-8, and either way where it is a close call
            assert np.allclose(drawn[name], array, rtol=rounded, atol=1e-6 * np.abs(array).max(initial=0)), name


@pytest.mark.slow
def test_each_process_runs_its_own_share_alone(two, three):
    assert [max(found["shares"][0]) for found in two] == [4, 3]  # beside some of its examples, as evidence
    assert [max(found["shares"][0]) for found in three] == [3, 2]  # of three, and one is gone


@pytest.mark.slow
def test_what_goes_wrong_in_one_process_is_said_by_all(two, three):
    for count, ranks in ((2, two), (3, three)):
        for found in (rank["troubles"] for rank in ranks):
            assert found["weights"][1].startswith("process 1 has other weights than process 0; give all processes")
            assert found["data"][1].startswith("process 1 has other data than process 0; give all processes the same")
            kind, sentence = found["one"]
            assert kind == "ValueError"
            assert sentence.startswith(f"process {count - 1} of {count}: NaN or infinite values in the input of layer")
            assert found["all"] == (
                "ValueError",
                "the gradient needs the data's labels; pass targets= or tuples (inputs, targets).",
            )
            assert found["compared"].methods == ("kfac",)
            said = f"failing is left out: process 1 of {count}: this one fails."
            assert any(note.startswith(said) for note in found["compared"].notes)
            kind, sentence = found["requests"]
            assert kind == "ProcessesParted"
            assert sentence.startswith("process 0 is at a pass over the data and process 1 at a try of forward mode;")
            assert torch.equal(found["after"], ranks[0]["troubles"]["after"])


@pytest.mark.slow
def test_a_process_that_fails_ends_the_work_of_the_others(two, three):
    for count, ranks in ((2, two), (3, three)):
        for ran, said in (found["failed"] for found in ranks):
            assert said == ("ValueError", f"process 1 of {count}: lost.")
            assert len(ran) < 400


@pytest.mark.slow
def test_a_process_that_is_killed_is_missed_by_the_others(three):
    for found in three:
        kind, sentence = found["killed"][1]
        assert kind == "ProcessesParted"
        assert sentence == "another process has ended or does not answer; look at what it says itself."


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


def test_without_a_process_group_there_is_nobody_to_share_with():
    net, x, _ = dense()
    with pytest.raises(RuntimeError, match=r"call torch\.distributed\.init_process_group\(\) in each of them first"):
        fv.Probe(net, LAW).fisher(x, processes=True)
