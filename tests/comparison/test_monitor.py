"""The monitor: what it measures against brute force, and that training does not notice it."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.comparison.monitor import SIMILARITIES
from fisherviz.comparison.strengths import damping_of, strengths
from fisherviz.results.comparison import row_label
from fisherviz.training import train
from tests.oracles import nets

SMALL = {
    "limit": 120, "epochs": 2, "batch_size": 40, "quiet": True, "model_options": {"hidden": [6]}, "tensorboard": False,
}  # fmt: skip


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def examples(n=30, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(n, 4, dtype=dtype), torch.randint(3, (n,))


def value(frame, method, metric, layer="all"):
    row = frame[(frame["method"] == method) & (frame["metric"] == metric) & (frame["layer"] == layer)]
    assert len(row) == 1
    return row["value"].iloc[0]


def test_errors_and_cosines_are_those_of_dense_matrices():
    model, (x, y) = network(), examples()
    probe = fv.Probe(model, "categorical")
    frame = fv.Monitor(probe, ["kfac", "diagonal"], data=(x, y), damping=0.1).measure(7)
    assert set(frame["step"]) == {7}
    fisher = probe.fisher((x, y))
    F, gradient = fisher.to_dense(), fisher.gradient()
    eye = torch.eye(len(F), dtype=F.dtype)
    exact = torch.linalg.solve(F + 0.1 * eye, gradient)
    for method in ("kfac", "diagonal"):
        M = fv.approximate(fisher, method).to_dense()
        assert value(frame, method, "relative_frobenius") == pytest.approx(float((F - M).norm() / F.norm()))
        step = torch.linalg.solve(M + 0.1 * eye, gradient)
        cosine = float(step @ exact / step.norm() / exact.norm())
        assert value(frame, method, "direction_cosine") == pytest.approx(cosine)
        e = torch.linalg.eigvalsh(M + 0.1 * eye)
        assert value(frame, method, "condition_number") == pytest.approx(float(e[-1] / e[0]))
    e = torch.linalg.eigvalsh(F + 0.1 * eye)
    assert value(frame, "exact", "condition_number") == pytest.approx(float(e[-1] / e[0]))


@pytest.mark.parametrize("lam", [1e-4, 1.0])
@pytest.mark.parametrize("traces", [False, True])
def test_the_similarity_to_foof_is_that_of_explicit_inverses(lam, traces):
    model, (x, y) = network(), examples()
    probe = fv.Probe(model, "categorical")
    damping = fv.FactoredTikhonov(lam**0.5, "traces") if traces else lam
    frame = fv.Monitor(probe, ["kfac"], data=(x, y), damping=damping).measure(0)
    z = model(x)
    loss = nn.functional.cross_entropy(z, y)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    weight = model[2].weight.detach()
    p = torch.softmax(z, 1).detach()
    found = {name: [] for name in SIMILARITIES}
    with torch.no_grad():
        hidden = torch.tanh(model[0](x))
    J = {"0": (x, (1 - hidden**2).unsqueeze(2) * weight.T.unsqueeze(0)), "2": (hidden, torch.eye(3).double())}
    for index, name in enumerate(("0", "2")):
        inputs, jacobian = J[name]
        a = torch.cat([inputs, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        A = a.T @ a / len(x)
        F_out = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        G = (jacobian @ F_out @ jacobian.mT).mean(0)
        V = torch.cat([grads[2 * index], grads[2 * index + 1].unsqueeze(1)], 1)
        sizes = (1, 1) if traces else (len(A), len(G))
        pi = ((A.trace() / sizes[0]) / (G.trace() / sizes[1])) ** 0.5
        Ad = A + pi * lam**0.5 * torch.eye(len(A), dtype=A.dtype)
        Gd = G + lam**0.5 / pi * torch.eye(len(G), dtype=A.dtype)
        foof = (V @ torch.linalg.inv(Ad)).flatten()
        factored = (torch.linalg.inv(Gd) @ V @ torch.linalg.inv(Ad)).flatten()
        M = torch.kron(G, A)
        eigenvalues = torch.linalg.solve(M + lam * torch.eye(len(M), dtype=A.dtype), V.flatten())
        for key, u in zip(SIMILARITIES, (factored, eigenvalues), strict=True):
            assert value(frame, "kfac", key, name) == pytest.approx(float(u @ foof / u.norm() / foof.norm()), rel=1e-6)
            found[key].append((u, foof))
    for key, pairs in found.items():
        u, w = torch.cat([u for u, _ in pairs]), torch.cat([w for _, w in pairs])
        assert value(frame, "kfac", key) == pytest.approx(float(u @ w / u.norm() / w.norm()), rel=1e-6)


def test_it_looks_every_so_many_steps():
    monitor = fv.Monitor(fv.Probe(network(), "categorical"), ["foof"], every=3, data=examples(), damping=1.0)
    looked = [monitor.step() is not None for _ in range(7)]
    assert looked == [False, False, True, False, False, True, False]
    assert sorted(set(monitor.frame["step"])) == [3, 6]
    assert repr(monitor) == "Monitor(foof; every 3 steps, exact Fisher, 2 looks so far)"


def norm_network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(), nn.Linear(6, 3))


OPTIMIZERS = {
    "kfac": lambda m: fv.optim.KFAC(m, "categorical", damping=1.0, T1=2, T2=4, T=2),
    "plain kfac": lambda m: fv.optim.KFAC(
        m, "categorical", rescale=False, adapt=False, lr=0.05, damping=0.1, momentum=0.9, T=3
    ),
    "ekfac": lambda m: fv.optim.EKFAC(m, "categorical", T=3),
    "adam": lambda m: torch.optim.Adam(m.parameters()),
}


def trained(model, make, monitored):
    x, y = examples(24, torch.float32)
    torch.manual_seed(11)
    optimizer = make(model)
    monitor = fv.Monitor(
        fv.Probe(model, "categorical"), ["kfac", "foof"], every=2, data=(x, y), optimizer=optimizer, kind="mc"
    )
    for _ in range(6):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if monitored:
            monitor.step()
    gradients = [p.grad.clone() for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), gradients, optimizer.state_dict(), torch.get_rng_state(), monitor


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize(
    ("make_model", "name"),
    [(lambda: network(dtype=torch.float32), name) for name in OPTIMIZERS]
    + [(norm_network, name) for name in ("plain kfac", "ekfac", "adam")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training_with_a_monitor_is_bit_for_bit_training_without(make_model, name):
    *with_it, monitor = trained(make_model(), OPTIMIZERS[name], True)
    *without, _ = trained(make_model(), OPTIMIZERS[name], False)
    assert len(monitor.frame) > 0
    assert same(with_it, without)


def test_modes_are_put_back_after_an_error():
    model = norm_network().train()
    model[3].eval()
    monitor = fv.Monitor(fv.Probe(model, "categorical"), ["kfac"], data=(torch.randn(5, 9), torch.zeros(5).long()))
    with pytest.raises((ValueError, RuntimeError)):
        monitor.measure(0)
    assert [m.training for m in model] == [True, True, True, False, True]


def test_strengths_are_those_of_the_optimizer():
    model = network()
    adaptive = fv.optim.KFAC(model, "categorical", damping=4.0, weight_decay=0.0)
    assert strengths(adaptive) == {"lambda": 4.0, "gamma": 2.0}
    plain = {"rescale": False, "adapt": False, "lr": 0.1, "damping": 4.0}
    assert strengths(fv.optim.KFAC(model, "categorical", **plain)) == {"lambda": 4.0, "gamma": 2.0}
    eigenvalues = fv.optim.KFAC(model, "categorical", **plain, heuristic_damping=False)
    assert strengths(eigenvalues) == {"lambda": 4.0}
    complete = fv.optim.KFAC(model, "categorical", damping=4.0, weight_decay=0.0, heuristic_damping=False)
    assert damping_of(complete) == fv.Tikhonov(4.0)
    assert damping_of(adaptive) == fv.FactoredTikhonov(2.0)
    assert strengths(torch.optim.SGD(model.parameters(), lr=0.1)) == {}


def test_a_monitor_without_data_says_so():
    monitor = fv.Monitor(fv.Probe(network(), "categorical"), every=1)
    with pytest.raises(ValueError, match="no data"):
        monitor.step()
    with pytest.raises(ValueError, match="every must be"):
        fv.Monitor(fv.Probe(network(), "categorical"), every=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ["zz"]}, ValueError, "method must be one of identity, .*got 'zz'"),
        ({"methods": ["kfca"]}, ValueError, "did you mean 'kfac'"),
        ({"methods": 3}, TypeError, "methods= takes names, .*got int"),
        ({"methods": [fv.Approximation]}, TypeError, "Approximation is no complete approximation"),
        ({"methods": []}, ValueError, "methods= names no method"),
        ({"methods": {"optimizer": "kfac"}}, ValueError, "label 'optimizer' means the optimizer itself"),
        ({"methods": {"exact": "kfac"}}, ValueError, "label 'exact' means the Fisher itself"),
        ({"methods": "exact"}, ValueError, "'exact' is no approximation: use the Fisher itself"),
        ({"metrics": ["error"]}, ValueError, "unknown metric 'error'; metrics are relative_frobenius"),
        ({"metrics": []}, ValueError, "names no metric"),
        ({"kind": "fisher"}, ValueError, "kind must be one of exact, mc, empirical, got 'fisher'"),
        ({"kind": None}, ValueError, "kind must be one of exact, mc, empirical, got None"),
        ({"seed": "a"}, TypeError, "seed must be a whole number"),
        ({"optimizer": "kfac"}, TypeError, "optimizer must be"),
        ({"probe": "x"}, TypeError, r"looks through a fv.Probe of the model, got str"),
        ({"probe": nn.Linear(2, 2)}, TypeError, "got Linear"),
    ],
)
def test_what_a_monitor_cannot_use_is_refused_at_once(options, error, message):
    probe = options.pop("probe", None) or fv.Probe(network(), "categorical")
    with pytest.raises(error, match=message):
        fv.Monitor(probe, **options)


def test_a_single_method_may_be_named_without_a_list():
    monitor = fv.Monitor(fv.Probe(network(), "categorical"), "foof", metrics="relative_frobenius")
    assert (monitor.methods, monitor.metrics) == (("foof",), ("relative_frobenius",))


def test_a_layer_called_all_is_not_the_whole_network():
    model = nn.Sequential(OrderedDict(all=nn.Linear(4, 5), act=nn.Tanh(), out=nn.Linear(5, 3))).double()
    frame = fv.Monitor(fv.Probe(model, "categorical"), ["kfac"], data=examples(), damping=0.1).measure(0)
    assert not frame.duplicated(["method", "layer", "metric"]).any()
    assert set(frame["layer"]) == {"all", "all (layer)", "out"}
    for metric in ("relative_frobenius", "condition_number", *SIMILARITIES):
        assert value(frame, "kfac", metric) != value(frame, "kfac", metric, "all (layer)")


def test_a_monitored_run_trains_as_one_that_is_not_and_keeps_what_it_saw(tmp_path):
    runs = [
        train(SMALL, optimizer="kfac", optimizer_options={"damping": 1.0}, out=tmp_path / str(on), monitor=on,
              monitor_every=2, monitor_examples=30)
        for on in (True, False)
    ]  # fmt: skip
    plain = [
        [{k: v for k, v in r.items() if k != "seconds"} for r in run.records if r["kind"] != "monitor"] for run in runs
    ]
    assert plain[0] == plain[1]
    frame = runs[0].frame("monitor")
    assert sorted(set(frame["step"])) == [0, 2, 4, 6]
    assert {"relative_frobenius", "direction_cosine", "condition_number", "lambda", "gamma", *SIMILARITIES} <= set(
        frame["metric"]
    )


def test_an_unknown_method_is_refused_before_the_run_starts(tmp_path):
    with pytest.raises(ValueError, match=r"monitor_methods: .*kfca"):
        train(SMALL, monitor=True, monitor_methods=["kfca"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_have_labels_of_their_own():
    names = ["", "all", "all (layer)", "all (layer) (layer)", "all(layer)", "rest (layer)"]
    labels = [row_label(name) for name in names]
    assert len({*labels, "all"}) == len(names) + 1


@pytest.mark.parametrize("seed", [-(2**70), -1, 2**43, 2**70])
def test_a_seed_may_be_any_whole_number(seed):
    net, x = nets.mlp(2, 3, 2), nets.vectors(4, 2)
    one, other = (
        fv.Monitor(fv.Probe(net, "categorical"), ["kfac"], every=1, kind="mc", seed=seed, data=x) for _ in range(2)
    )
    assert one.step().equals(other.step())
