"""Every number of a comparison against dense algebra in numpy, for small matrices and those never formed."""

import numpy as np
import pytest
import torch
from torch import nn

import fisherviz as fv
from fisherviz.approximations.kfac_full import KFACFull
from tests.oracles import exact, laws, nets, order, trace
from tests.oracles.checks import FLOAT64

METHODS = [
    "identity",
    "diagonal",
    "layer",
    "cw-ngd",
    "kfac-full",
    "kfac",
    "kfac-tridiagonal",
    "ekfac",
    "foof",
    "nearest-kronecker",
]
DAMPING = 0.05


def relative_measures(F, approximation):
    """Errors of F - approximation to F's own norm, and the cosine, which a zero block does not have."""
    difference = F - approximation
    measures = {
        "relative_frobenius": np.linalg.norm(difference) / np.linalg.norm(F),
        "relative_spectral": np.linalg.norm(difference, 2) / np.linalg.norm(F, 2),
        "relative_nuclear": np.linalg.norm(difference, "nuc") / np.linalg.norm(F, "nuc"),
        "relative_max": np.abs(difference).max() / np.abs(F).max(),
    }
    if approximation.any():
        sizes = np.linalg.norm(F) * np.linalg.norm(approximation)
        measures["frobenius_cosine"] = np.sum(F * approximation) / sizes
    return measures


def damped_measures(F, approximation, damping):
    """The inverse's error, and KL from N(0, (F + damping)^-1) to N(0, (approximation + damping)^-1)."""
    P, Q = F + damping * np.eye(len(F)), approximation + damping * np.eye(len(F))
    inverse, other = np.linalg.inv(P), np.linalg.inv(Q)
    log_ratio = np.linalg.slogdet(P)[1] - np.linalg.slogdet(Q)[1]
    return {
        "inverse_frobenius": np.linalg.norm(inverse - other) / np.linalg.norm(inverse),
        "kl": (np.trace(Q @ inverse) - len(F) + log_ratio) / 2,
    }


def direction_measures(F, approximation, damping, g):
    """The approximate damped natural gradient against the exact one, and its share of the decrease."""
    P, Q = F + damping * np.eye(len(F)), approximation + damping * np.eye(len(F))
    best, step = -np.linalg.solve(P, g), -np.linalg.solve(Q, g)

    def model(delta):
        return g @ delta + delta @ P @ delta / 2

    return {
        "direction_cosine": best @ step / np.linalg.norm(best) / np.linalg.norm(step),
        "direction_error": np.linalg.norm(step - best) / np.linalg.norm(best),
        "model_decrease": model(step) / model(best),
    }


class Setting:
    """One network, its dense Fisher, its comparison and the data's gradient."""

    def __init__(self, net, x, likelihood, kind="exact", methods=METHODS, **options):
        law = laws.ALL[likelihood]
        self.y = law.draw(len(x), net(x).shape[1])
        self.F = exact.fisher(net, x, law, targets=self.y if kind == "empirical" else None)
        self.g = exact.mean_gradient(net, x, self.y, law)
        self.fisher = fv.Probe(net, likelihood).fisher(x, self.y, kind=kind)
        self.comparison = fv.compare(self.fisher, methods, damping=DAMPING, **options)
        self.parts = order.segments(trace.layers_of(net))
        self.names = [layer.name for layer in self.fisher.layers]

    def dense(self, method):
        return fv.approximate(self.fisher, method).to_dense().numpy()

    def value(self, method, metric, row="all", col="all"):
        frame = self.comparison.frame
        chosen = frame[
            (frame["method"] == method) & (frame["metric"] == metric) & (frame["row"] == row) & (frame["col"] == col)
        ]
        return chosen["value"].item()


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return Setting(nets.mlp(3, 4, 2), nets.vectors(9, 3), "categorical")


every_method = pytest.mark.parametrize("method", METHODS)


def close(value, tolerance=1e-8):
    return pytest.approx(value, rel=tolerance, abs=1e-10)


@every_method
def test_whole_matrix(small, method):
    approximation = small.dense(method)
    expected = relative_measures(small.F, approximation)
    expected |= damped_measures(small.F, approximation, DAMPING)
    expected |= direction_measures(small.F, approximation, DAMPING, small.g)
    for metric, value in expected.items():
        assert small.value(method, metric) == close(value)


@every_method
def test_every_block(small, method):
    approximation = small.dense(method)
    for i, row in enumerate(small.names):
        for j, col in enumerate(small.names):
            block, other = (M[small.parts[i], small.parts[j]] for M in (small.F, approximation))
            expected = relative_measures(block, other)
            if i == j:
                expected |= damped_measures(block, other, DAMPING)
            for metric, value in expected.items():
                assert small.value(method, metric, row, col) == close(value)


def test_off_unit_share_is_what_cw_ngd_leaves_out_of_each_layer(small):
    net_layers = [(4, 3, True), (2, 4, True)]
    F = order.reorder(small.F, net_layers, "unit")
    for part, (d_out, fan_in, _), name in zip(small.parts, net_layers, small.names, strict=True):
        block = F[part, part].reshape(d_out, fan_in + 1, d_out, fan_in + 1)
        kept = sum(np.sum(block[o, :, o, :] ** 2) for o in range(d_out))
        assert small.value("exact", "off_unit_share", name, name) == close(1 - kept / np.sum(block**2))


def test_exact_methods_have_no_error(small):
    assert small.value("layer", "relative_frobenius", "0", "0") < 1e-12
    assert small.value("kfac-full", "relative_frobenius", "0", "0") > 1e-3


def test_there_is_never_a_nan_and_costs_are_positive(small):
    frame = small.comparison.frame
    assert list(frame.columns) == ["method", "row", "col", "metric", "value", "stderr"]
    assert np.isfinite(frame["value"]).all()
    assert not frame[frame["metric"] != "seconds"]["stderr"].any()
    assert (frame[frame["metric"] == "seconds"]["value"] > 0).all()
    passes = small.comparison.whole("passes")
    assert passes.pop("identity") == 0
    assert len(passes) == len(METHODS) - 1
    assert min(passes.values()) > 0
    assert not frame.duplicated(["method", "row", "col", "metric"]).any()


def test_summary_has_one_row_per_method_sorted_by_error(small):
    summary = small.comparison.summary()
    assert set(summary.index) == set(METHODS)
    assert summary["relative_frobenius"].is_monotonic_increasing
    assert summary.loc["kfac", "relative_frobenius"] == close(small.value("kfac", "relative_frobenius"))


def test_spectrum_and_block_means_for_pictures(small):
    arrays = small.comparison.arrays
    eigenvalues = np.linalg.eigvalsh(small.F)[::-1]
    assert np.abs(arrays["spectrum/exact"] - eigenvalues).max() < 1e-6 * eigenvalues[0]
    means = [[np.abs(small.F[a, b]).mean() for b in small.parts] for a in small.parts]
    assert arrays["block_means/exact"] == pytest.approx(np.array(means), rel=1e-6)


# ---- matrices that are never formed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large():
    """The same kind of network, by the way that large matrices take."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
        return Setting(nets.mlp(3, 4, 2), nets.vectors(9, 3), "categorical")


@every_method
def test_errors_cosines_and_directions_without_the_matrix(large, method):
    approximation = large.dense(method)
    errors = relative_measures(large.F, approximation)
    expected = {name: errors[name] for name in ("relative_frobenius", "frobenius_cosine")}
    expected |= direction_measures(large.F, approximation, DAMPING, large.g)
    expected["kl"] = damped_measures(large.F, approximation, DAMPING)["kl"]
    for metric, value in expected.items():
        assert large.value(method, metric) == close(value, 1e-6)
    assert large.value(method, "relative_spectral") == close(errors["relative_spectral"], 1e-3)


@every_method
def test_errors_of_blocks_without_the_matrix(large, method):
    approximation = large.dense(method)
    for i, row in enumerate(large.names):
        for j, col in enumerate(large.names):
            block, other = (
                large.F[large.parts[i], large.parts[j]],
                approximation[large.parts[i], large.parts[j]],
            )
            error = np.linalg.norm(block - other) / np.linalg.norm(block)
            assert large.value(method, "relative_frobenius", row, col) == pytest.approx(error, rel=1e-6, abs=1e-7)


def test_metrics_that_need_the_matrix_are_left_out_and_the_notes_say_so(large):
    assert not {"relative_nuclear", "relative_max"} & set(large.comparison.frame["metric"])
    assert any("relative_max, relative_nuclear are left out" in note for note in large.comparison.notes)


SHARING = {
    "tokens": lambda: (nets.tokens_net(), torch.randn(6, 4, 3, dtype=torch.float64)),
    "convolutions": lambda: (
        nets.conv_net(nn.Conv2d(1, 3, 2), nn.Conv2d(3, 2, 2, padding=1)),
        torch.randn(4, 1, 4, 3, dtype=torch.float64),
    ),
    "groups": lambda: (
        nets.conv_net(nn.Conv2d(2, 4, 2, groups=2), nn.Conv2d(4, 2, 1)),
        torch.randn(4, 2, 4, 3, dtype=torch.float64),
    ),
}


@pytest.mark.covering(2)
@pytest.mark.filterwarnings("ignore:.*grouped")
@pytest.mark.parametrize("build", SHARING.values(), ids=SHARING.keys())
@pytest.mark.parametrize("why_not", ["which are too many", ""], ids=["never formed", "dense"])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_errors_of_layers_that_share_weights(monkeypatch, build, why_not, kind):
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: why_not)
    net, x = build()
    metrics = ["relative_frobenius", "frobenius_cosine"]
    setting = Setting(net, x, "bernoulli", kind=kind, methods=METHODS, metrics=metrics)
    for method in METHODS:
        expected = relative_measures(setting.F, setting.dense(method))
        for metric in ("relative_frobenius", "frobenius_cosine"):
            assert setting.value(method, metric) == close(expected[metric], 1e-6)


def test_layers_that_are_given_nothing_but_zeros(monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Threshold(1.0, 0.0), nn.Linear(4, 3, bias=False), nn.Linear(3, 2)
    net, x = nets.randomised(nn.Sequential(*layers, nets.MeanTokens())), torch.randn(6, 4, 3, dtype=torch.float64)
    methods = ["kfac", "kfac-full", "kfac-tridiagonal"]
    setting = Setting(net, x, "bernoulli", methods=methods, metrics=["relative_frobenius"])
    for method in methods:
        error = relative_measures(setting.F, setting.dense(method))["relative_frobenius"]
        assert setting.value(method, "relative_frobenius") == close(error, 1e-6)


def test_a_method_that_refuses_a_network_is_left_out_with_a_note_unless_it_was_asked_for_alone():
    net = nets.conv_net(nn.Conv1d(1, 2, 2), nn.Conv1d(2, 2, 2))
    fisher = fv.Probe(net, "bernoulli").fisher(torch.randn(4, 1, 4, dtype=torch.float64))
    refusing = KFACFull(setting="expand")
    comparison = fv.compare(fisher, {"kfac": "kfac", "expanded": refusing}, metrics="relative_frobenius")
    assert set(comparison.frame["method"]) == {"kfac"}
    assert any("expanded" in note and "equally many positions" in note for note in comparison.meta["notes"])
    with pytest.raises(ValueError, match="equally many positions"):
        fv.compare(fisher, refusing, metrics="relative_frobenius")


def test_a_given_gradient_is_used_flat_or_by_name():
    net, x = nets.mlp(3, 4, 2), nets.vectors(9, 3)
    F = exact.fisher(net, x, laws.Gaussian())
    fisher = fv.Probe(net, "gaussian").fisher(x)
    gradient = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    flat = torch.cat([g.reshape(-1) for g in gradient.values()])
    kfac = fv.approximate(fisher, "kfac").to_dense().numpy()
    expected = direction_measures(F, kfac, DAMPING, flat.numpy())["direction_cosine"]
    for given in (gradient, flat):
        frame = fv.compare(fisher, "kfac", damping=DAMPING, gradient=given).frame
        cosine = frame[(frame["metric"] == "direction_cosine") & (frame["row"] == "all")]["value"].item()
        assert cosine == pytest.approx(expected, rel=FLOAT64)


def test_without_targets_directions_are_left_out_and_the_notes_say_so():
    net, x = nets.mlp(3, 4, 2), nets.vectors(9, 3)
    comparison = fv.compare(fv.Probe(net, "gaussian").fisher(x), "kfac", damping=DAMPING)
    assert "direction_cosine" not in set(comparison.frame["metric"])
    assert any("direction" in note for note in comparison.meta["notes"])


def test_a_zero_block_has_no_relative_error_instead_of_a_nan():
    net, x = nets.mlp(3, 4, 2), nets.vectors(5, 3)
    with torch.no_grad():
        net[2].weight.zero_()
    frame = fv.compare(fv.Probe(net, "gaussian").fisher(x), ["kfac", "diagonal"], damping=DAMPING).frame
    assert np.isfinite(frame["value"]).all()
    assert frame[(frame["row"] == "0") & (frame["metric"] == "relative_frobenius")].empty


WRONG = {
    "metric": (lambda f: fv.compare(f, "kfac", metrics=["relative_error"]), "relative_frobenius"),
    "method": (lambda f: fv.compare(f, ["kfca"]), "kfac"),
    "gradient": (lambda f: fv.compare(f, "kfac", gradient=torch.ones(3)), "26"),
    "damping": (lambda f: fv.compare(f, "kfac", damping=-1.0), "damping"),
    "the same method twice": (lambda f: fv.compare(f, ["kfac", "kfac"]), "twice"),
}


@pytest.mark.parametrize(("call", "word"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_request_is_refused(call, word):
    fisher = fv.Probe(nets.mlp(3, 4, 2), "gaussian").fisher(nets.vectors(5, 3))
    with pytest.raises((ValueError, TypeError), match=word):
        call(fisher)


@pytest.mark.filterwarnings("ignore:.*single features", "ignore:.*chain")
@pytest.mark.parametrize("pieces", [2**26, 500])
def test_errors_without_matrices_are_those_with_them(pieces, monkeypatch):
    """Few examples and wide patches, so that factors have small ranges; all blocks of all methods in one sweep."""
    torch.manual_seed(0)
    net = nets.randomised(
        nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2), nn.PReLU(4), nets.MeanPixels(),
            nn.Linear(4, 3),
        )
    )  # fmt: skip
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    fisher = fv.Probe(net, "categorical").fisher(x)
    names = ["relative_frobenius", "frobenius_cosine"]
    dense = fv.compare(fisher, metrics=names, progress=False).frame
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")
    monkeypatch.setattr("fisherviz.comparison.inner.GRADIENT_ENTRIES", pieces)
    free = fv.compare(fisher, metrics=names, progress=False).frame
    keys = ["method", "row", "col", "metric"]
    both = dense.merge(free, on=keys, suffixes=("", "_free"))
    assert len(both) >= len(free) > 100
    np.testing.assert_allclose(both["value_free"], both["value"], rtol=1e-9, atol=3e-7)
