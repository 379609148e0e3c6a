"""Two processes with DistributedDataParallel take the steps of one process on the whole batch."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fisherviz as fv
from fisherviz import optim
from fisherviz.operators import Kronecker
from fisherviz.optim.preconditioner import owners_of
from fisherviz.support.processes import Processes
from tests import together
from tests.oracles.steps import assert_same, data, matrices, net

N = 12
ADAPTIVE = {"damping": 0.5, "weight_decay": 1e-2, "T": 2, "T1": 2, "T2": 4}
WHOLE = ADAPTIVE | {"tau1": 1.0, "tau2": 1.0}


def plain_last_layer(m):
    return [{"params": m[:4].parameters()}, {"params": m[4:].parameters(), "approximation": "none", "lr": 0.1}]


MAKE = {
    "foof": lambda m: optim.FOOF(m, "categorical", damping=0.1),
    "kfac": lambda m: optim.KFAC(m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact", T=2),
    "kfac, owned": lambda m: optim.KFAC(
        m, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact", T=2, ownership="one"
    ),
    "foof, owned": lambda m: optim.NaturalGradient(m, "categorical", "foof", T=10, ownership="one", weight_decay=1e-2),
    "tengrad": lambda m: optim.TENGraD(m, "categorical", kind="empirical"),
    "cw-ngd": lambda m: optim.CWNGD(m, "categorical", kind="exact"),
    "ekfac": lambda m: optim.EKFAC(m, "categorical", kind="exact", T=2),
    "subsampled": lambda m: optim.SubsampledNaturalGradient(m, "categorical", kind="exact", T=2),
    "subsampled, layer": lambda m: optim.SubsampledNaturalGradient(
        m, "categorical", kind="exact", structure="layer", fisher_data="same"
    ),
    "nearest-kronecker": lambda m: optim.NaturalGradient(m, "categorical", "nearest-kronecker", kind="exact"),
    "kfra": lambda m: optim.NaturalGradient(m, "categorical", "kfra", kind="exact"),
    "kbfgs": lambda m: optim.KBFGS(m, "categorical", lr=0.1),
    "hessian-free": lambda m: optim.HessianFree(m, "categorical", weight_decay=1e-2),
    "ksd": lambda m: optim.KSD.paper(m, "categorical", weight_decay=1e-2, dimension=3, iterations=4),
    "hessian-free, preconditioned": lambda m: optim.HessianFree(m, "categorical", preconditioner="kfac", kind="exact"),
    "adaptive": lambda m: optim.KFAC(m, "categorical", kind="exact", **WHOLE),
    "adaptive, owned": lambda m: optim.KFAC(m, "categorical", kind="exact", ownership="one", **WHOLE),
    "adaptive tridiagonal": lambda m: optim.KFAC(m, "categorical", kind="exact", inverse="block-tridiagonal", **WHOLE),
    "adaptive, last layer plain": lambda m: optim.KFAC(
        m, "categorical", kind="exact", params=plain_last_layer(m), **WHOLE
    ),
    "adaptive, sampled": lambda m: optim.KFAC(m, "categorical", **WHOLE),
    "adaptive, subsets": lambda m: optim.KFAC(m, "categorical", **ADAPTIVE),
}
SCORES = {
    "tengrad": lambda m, scale: optim.TENGraD(m, "categorical", kind="empirical", loss_scale=scale),
    "kbfgs": lambda m, scale: optim.KBFGS(m, "categorical", lr=0.1, loss_scale=scale),
}
OF_VECTORS = ["foof", "kfac", "adaptive", "ekfac", "cw-ngd", "subsampled", "hessian-free, preconditioned"]
HALF = SCORES | {name: lambda m, scale, make=MAKE[name]: make(m) for name in OF_VECTORS}
"""Optimizers for labels that leave out one process's examples, from the model and the loss's scale."""
SUMMED = {
    "sum": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac", lr=0.1, damping=3.0, kind="exact", reduction="sum", T=2
    ),
    "sum, dense layers": lambda m: optim.NaturalGradient(
        m, "categorical", "kfac", lr=0.1, damping=fv.FactoredTikhonov(2.0), kind="exact", reduction="sum"
    ),
}
UNEVEN = (slice(0, 3), slice(3, N))
SAME_AS_ONE = [name for name in MAKE if name not in ("adaptive, sampled", "adaptive, subsets")]


def train(name, inner, model, part, seed=0):
    """Weights, λ, γ, what the last step did, and means of the statistics after each step."""
    torch.manual_seed(seed)  # of the optimizer's generator
    opt = MAKE[name](inner)
    found = []
    for k in range(9 if "adaptive" in name else 3):
        x, y = data(N, seed=k)

        def closure(x=x[part], y=y[part]):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
        state = (getattr(opt, "lam", 0.0), getattr(opt, "gamma", 0.0), dict(getattr(opt, "last", {})))
        means = [s.mean.clone() for named in opt.moments.average for s in named.values()]
        found.append((matrices(inner), *state, means))
    return found


def train_on_uneven_parts(name, inner, model, parts, rank):
    """Weights after each step; each part's loss counts by its examples in the mean over all."""
    opt = SUMMED[name](inner)
    found = []
    for k in range(5):
        x, y = data(N, seed=k)
        part = parts[rank]
        opt.zero_grad()
        (F.cross_entropy(model(x[part]), y[part], reduction="sum") * len(parts) / N).backward()
        opt.step()
        found.append(matrices(inner))
    return found


def train_where_one_half_counts(name, inner, model, part, processes):
    """Weights after each step on labels that leave out the second half of the batch."""
    scale = processes / (N // 2)
    opt = HALF[name](inner, scale)
    found = []
    for k in range(3):
        x, y = data(N, seed=k)
        y[N // 2 :] = -100

        def closure(x=x[part], y=y[part]):
            opt.zero_grad()
            loss = F.cross_entropy(model(x), y, reduction="sum") * scale
            loss.backward()
            return loss

        opt.step(closure)
        found.append(matrices(inner))
    return found


def error_of_a_batch_with_nan(name, rank):
    """What a process says of a batch in which the other's half, or its own, has an example with NaN."""
    inner = net()
    model, opt = DistributedDataParallel(inner), MAKE[name](inner)
    x, y = data(N)
    x[-1] = float("nan")

    def closure():
        opt.zero_grad()
        loss = F.cross_entropy(model(x[half(rank)]), y[half(rank)])
        loss.backward()
        return loss

    try:
        opt.step(closure)
    except ValueError as error:
        return str(error)


SIZES = (9, 30, 20, 30, 5)
"""Widths of a network whose layers cost differently much."""


def owned(ownership, rank, count, fails=-1):
    """Weights after steps of processes with unevenly many examples, bytes kept and sent, or the error that ended it."""
    torch.manual_seed(0)
    pairs = [(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(SIZES)]
    inner = nn.Sequential(*[module for pair in pairs for module in pair][:-1]).double()
    opt = optim.KFAC(
        inner, "categorical", rescale=False, adapt=False, lr=0.1, damping=0.1, kind="exact", T=10, ownership=ownership
    )
    model = DistributedDataParallel(inner) if count > 1 else inner
    cuts = [0, *(N * (k + 1) // 7 for k in range(count - 1)), N]
    part, sent, kept = slice(cuts[rank], cuts[rank + 1]), 0, 0
    broadcast, draws = Processes.broadcast, torch.Generator().manual_seed(1)

    def counted(self, tensor, source):
        nonlocal sent
        sent += tensor.numel() * tensor.element_size() * (source == self.rank)
        return broadcast(self, tensor, source)

    def broken(self):
        raise RuntimeError("this layer has no inverse.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Processes, "broadcast", counted)
        if rank == fails:
            patch.setattr(Kronecker, "inverse", broken)
        for _ in range(STEPS):
            x, y = torch.randn(N, SIZES[0], generator=draws).double(), torch.randint(SIZES[-1], (N,), generator=draws)
            opt.zero_grad()
            (F.cross_entropy(model(x[part]), y[part], reduction="sum") * count / N).backward()
            try:
                opt.step()
            except RuntimeError as error:
                return str(error)
            kept = opt.directions._made[1].bytes
    return matrices(inner), kept, sent


STEPS = 4


def owners(count):
    rank = torch.distributed.get_rank()
    return owned("all", rank, count), owned("one", rank, count), owned("one", rank, count, fails=count - 1)


@pytest.mark.slow
def test_a_layers_inverse_is_one_processs_and_the_steps_are_those_of_all(ranks):
    check_owners([found["owners"] for found in ranks])


@pytest.mark.soak
def test_three_processes_own_layers_too(tmp_path):
    check_owners(together.run(owners, 3, tmp_path / "group", 3))


def check_owners(found):
    count = len(found)
    alone, whole, nothing = owned("one", 0, 1)
    assert nothing == 0
    item = 8
    assert whole == item * sum((a + 1) ** 2 + b**2 for a, b in pairwise(SIZES))
    parameters = item * sum((a + 1) * b for a, b in pairwise(SIZES))
    for all_of_it, mine, told in found:
        assert_same(mine[0], alone, 1e-9)
        assert_same(all_of_it[0], alone, 1e-9)
        assert all_of_it[1:] == (whole, 0)
        assert all(torch.equal(a, b) for a, b in zip(mine[0], found[0][1][0], strict=True))
        assert 0 < mine[1] < whole
        assert re.fullmatch(rf"process {count - 1} of {count}: layer '\d': this layer has no inverse\.", told)
    assert sum(mine[1] for _, mine, _ in found) == whole
    assert sum(mine[2] for _, mine, _ in found) == STEPS * parameters


def test_owners_have_about_as_much_to_invert():
    layers = fv.Probe(nn.Sequential(*(nn.Linear(n, n) for n in (40, 20, 39, 30))), "gaussian").network.layers
    owner = owners_of(layers, 2)
    assert owner["0"] != owner["2"]
    assert owner == owners_of(layers, 2)
    assert set(owners_of(layers, 9).values()) == {0, 1, 2, 3}


@pytest.mark.parametrize("method", ["ekfac", "kfac-tridiagonal", "exact"])
def test_owners_are_refused_where_no_layer_is_inverted_alone(method):
    with pytest.raises(ValueError, match="ownership='one' is for methods that invert each layer's matrix alone"):
        optim.NaturalGradient(net(), "categorical", method, ownership="one")
    with pytest.raises(ValueError, match=r"ownership must be one of|ownership must be 'all' or 'one'"):
        optim.NaturalGradient(net(), "categorical", "kfac", ownership="two")


def everything():
    """What one of two processes finds."""
    rank, found = torch.distributed.get_rank(), {}
    for name in MAKE:
        inner = net()
        # gradients that are views of memory which the next backward overwrites: the harder case
        model = DistributedDataParallel(inner, gradient_as_bucket_view=True)
        found[name] = train(name, inner, model, half(rank), seed=rank)
    for name in SUMMED:
        inner = net()
        found[name] = train_on_uneven_parts(name, inner, DistributedDataParallel(inner), UNEVEN, rank)
    for name in HALF:
        inner = net()
        model = DistributedDataParallel(inner)
        found["half", name] = train_where_one_half_counts(name, inner, model, half(rank), 2)
    found["nan"] = {name: error_of_a_batch_with_nan(name, rank) for name in ("foof", "adaptive, sampled")}
    found["owners"] = owners(2)
    return found


def half(rank):
    return slice(rank * N // 2, (rank + 1) * N // 2)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return together.run(everything, 2, folder / "group")


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_AS_ONE)
def test_distributed_data_parallel_steps_like_one_process(ranks, name):
    model = net()
    alone = train(name, model, model, slice(None))
    for found in ranks:
        for (W, lam, gamma, last, means), (W1, lam1, gamma1, last1, means1) in zip(found[name], alone, strict=True):
            assert_same(W, W1, 1e-9)
            assert_same(means, means1, 1e-9)
            assert (lam, gamma) == pytest.approx((lam1, gamma1), rel=1e-12)
            assert last == pytest.approx(last1, rel=1e-6)
    if "adaptive" in name:
        lams, gammas = {state[1] for state in alone}, {state[2] for state in alone}
        assert len(lams) > 1
        assert len(gammas) > 1  # λ and γ were adapted on the way


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_all_processes_take_the_same_step_to_the_bit(ranks, name):
    for (W, *state, _), (W1, *state1, _) in zip(ranks[0][name], ranks[1][name], strict=True):
        assert state == state1
        for left, right in zip(W, W1, strict=True):
            assert torch.equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUMMED)
def test_a_summed_fisher_is_the_sum_over_all_processes_however_unevenly_they_share(ranks, name):
    model = net()
    alone = train_on_uneven_parts(name, model, model, (slice(None),), 0)
    for W, first, second in zip(alone, ranks[0][name], ranks[1][name], strict=True):
        assert_same(first, W, 1e-9)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", HALF)
def test_a_process_of_whose_examples_nothing_counts_takes_the_others_step(ranks, name):
    model = net()
    alone = train_where_one_half_counts(name, model, model, slice(None), 1)
    for W, first, second in zip(alone, ranks[0]["half", name], ranks[1]["half", name], strict=True):
        assert_same(first, W, 1e-9)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_sampled_factors_are_the_mean_of_what_each_process_samples(ranks):
    """Each process draws labels by its own generator: at equal weights, as one process on that half would."""
    first = [found["adaptive, sampled"][0][-1] for found in ranks]
    halves = []
    for rank in range(2):
        model = net()
        halves.append(train("adaptive, sampled", model, model, half(rank), seed=rank)[0][-1])
    assert not torch.allclose(halves[0][1], halves[1][1])
    for found in first:
        assert_same(found, [(a + b) / 2 for a, b in zip(*halves, strict=True)], 1e-12)


@pytest.mark.slow
def test_a_batch_with_nan_in_one_process_stops_all_of_them(ranks):
    for found in ranks:
        for message in found["nan"].values():
            assert "at step 1, the model's output is NaN or infinite for 1 of 12 examples" in message


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        optim.FOOF(torch.nn.DataParallel(net()), "categorical")
