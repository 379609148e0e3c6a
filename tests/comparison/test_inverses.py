"""Damped inverses, divergences and spectral errors of matrices that are never formed, against dense algebra in numpy.

Exact numbers to rounding; estimates by what their standard errors promise over many seeds of probes.
"""

from functools import partial

import numpy as np
import pytest
import torch

import fisherviz as fv
from fisherviz.comparison.damped import DampedFisher
from fisherviz.comparison.inverses import Eigenvectors, Probes
from fisherviz.operators import block_matrix
from tests.comparison.test_metrics import damped_measures, relative_measures
from tests.oracles import exact, laws, nets
from tests.oracles.zoo import CASES

DAMPED = ["inverse_frobenius", "kl"]
METRICS = [*DAMPED, "relative_spectral"]
KINDS = [
    "linear", "linear without bias", "linear on tokens", "module called twice", "convolution called on two sizes",
    "mixture of experts", "conv1d stride and padding", "conv2d", "conv2d in two groups", "conv2d depthwise",
    "conv3d everything", "layer norm", "batch norm 2d in evaluation", "group norm", "prelu", "embedding with padding",
    "attention", "transposed convolution", "tied parameters", "embedding tied to the output", "lstm",
]  # fmt: skip


@pytest.fixture
def never_formed(monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.planning.why_not_dense", lambda *given: "which are too many")


def rows(comparison, metric):
    """Method to (value, standard error) of the whole matrix."""
    values, errors = comparison.whole(metric), comparison.whole(metric, "stderr")
    return {method: (values[method], errors[method]) for method in values}


def truths(F, fisher, damping, methods):
    """Method to metric to value, by dense algebra in float64."""
    out = {}
    for method in methods:
        M = fv.approximate(fisher, method).to_dense().double().numpy()
        out[method] = damped_measures(F, M, damping)
        out[method]["relative_spectral"] = relative_measures(F, M)["relative_spectral"]
    return out


# ---- every kind of layer ---------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_every_layer_s_numbers_are_those_of_dense_algebra(name, dtype, never_formed):
    build, data = CASES[name]
    net, x = nets.randomised(build()), data()
    F = exact.fisher(net, x, laws.Categorical())
    damping = float(np.trace(F)) / len(F) / 3
    net, x = net.to(dtype), x.to(dtype) if x.is_floating_point() else x
    fisher = fv.Probe(net, "categorical").fisher(x)
    found = fv.compare(fisher, damping=damping, metrics=METRICS)
    expected = truths(F, fisher, damping, found.methods)
    assert len(expected) >= 8
    tight, measured = 1e-6 if dtype == torch.float64 else 2e-3, {metric: rows(found, metric) for metric in METRICS}
    for method, truth in expected.items():
        for metric in METRICS:
            value, error = measured[metric][method]
            slack = 1e-3 if metric == "relative_spectral" else tight
            assert abs(value - truth[metric]) <= slack * max(1.0, truth[metric]) + 6 * error, (method, metric)
    kl, inverse = (found.whole(metric, "stderr") for metric in ("kl", "inverse_frobenius"))
    assert not any(kl.values())  # few gradients: everything is exact but inverses of what couples layers
    assert not any(error for method, error in inverse.items() if method not in ("kfac-full", "kfac-tridiagonal"))


@pytest.mark.parametrize("damping", [0.05, fv.FactoredTikhonov(0.2)])
@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_the_damping_is_each_approximation_s_own(never_formed, kind, damping):
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(9, 3), torch.randint(2, (9,))
    F = exact.fisher(net, x, laws.Categorical(), targets=y if kind == "empirical" else None)
    fisher = fv.Probe(net, "categorical").fisher(x, y, kind=kind)
    strength = 0.2**2 if isinstance(damping, fv.FactoredTikhonov) else damping
    methods = ["kfac", "foof", "diagonal", "layer", "kfac-tridiagonal", "kfac-full"]
    found = fv.compare(fisher, methods, damping=damping, metrics=DAMPED)
    assert found.methods == tuple(methods)
    P, size = F + strength * np.eye(len(F)), len(F)
    inverse = np.linalg.inv(P)
    for method in found.methods:
        Q = fv.approximate(fisher, method).damped(damping).to_dense().numpy()
        error = np.linalg.norm(inverse - np.linalg.inv(Q)) / np.linalg.norm(inverse)
        kl = (np.trace(Q @ inverse) - size + np.linalg.slogdet(P)[1] - np.linalg.slogdet(Q)[1]) / 2
        value, slack = rows(found, "inverse_frobenius")[method]
        assert abs(value - error) < 1e-7 * error + 6 * slack
        assert (slack > 0) == method.startswith("kfac-")
        assert rows(found, "kl")[method] == (pytest.approx(kl, rel=1e-7), 0)


def test_an_approximation_that_is_exact_has_no_error(never_formed):
    net, x = nets.mlp(3, 4, bias=False), nets.vectors(7, 3)
    found = fv.compare(fv.Probe(net, "gaussian").fisher(x), "layer", damping=0.1, metrics=DAMPED)
    assert found.whole("inverse_frobenius")["layer"] < 1e-6  # the root of what rounding leaves of two squares
    assert found.whole("kl")["layer"] < 1e-9


# ---- standard errors -------------------------------------------------------------------------------------------------

PROBES = 32


def scores(estimate, truth, seeds=300):
    """Estimates' distances from the truth in their own standard errors, over seeds."""
    found = [estimate(seed) for seed in range(seeds)]
    return np.array([(each.value - truth) / each.error for each in found])


def assert_calibrated(z):
    """Mean 0 and the variance of Student's t with 31 degrees of freedom, within four of their own deviations."""
    assert abs(z.mean()) < 4 / len(z) ** 0.5
    assert abs(z.var() - (PROBES - 1) / (PROBES - 3)) < 4 * (2 / len(z)) ** 0.5


def setting(dtype=torch.float64, widths=(9, 12, 8, 4), N=20):
    net, x = nets.mlp(*widths), nets.vectors(N, widths[0])
    F = exact.fisher(net, x, laws.Categorical())
    damping = 0.1 * float(np.trace(F)) / len(F)
    return F, fv.Probe(net.to(dtype), "categorical").fisher(x.to(dtype)), damping


MEASURED = {"inverse_frobenius": Probes.inverse_error, "kl": Probes.divergence}
LONG = [
    pytest.param(method, dtype, marks=[] if (method, dtype) == ("kfac", torch.float64) else pytest.mark.soak)
    for method in ("diagonal", "layer", "kfac", "kfac-full", "identity")
    for dtype in (torch.float64, torch.float32)
]


@pytest.mark.parametrize("metric", ["inverse_frobenius", pytest.param("kl", marks=pytest.mark.soak)])
@pytest.mark.parametrize(("method", "dtype"), LONG, ids=str)
def test_standard_errors_are_calibrated(method, dtype, metric):
    F, fisher, damping = setting(dtype)
    damped = DampedFisher(fisher, damping)
    approximation = fv.approximate(fisher, method)
    own, truth = approximation.damped(damping), damped_measures(F, approximation.to_dense().double().numpy(), damping)
    assert_calibrated(scores(lambda s: MEASURED[metric](Probes(damped, PROBES, s), own), truth[metric]))


@pytest.mark.parametrize(
    ("metric", "seeds"),
    [("kl", 30), *(pytest.param(metric, 100, marks=pytest.mark.soak) for metric in ("kl", "inverse_frobenius"))],
)
def test_standard_errors_are_calibrated_where_nothing_is_factorised(monkeypatch, metric, seeds):
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)
    F, fisher, damping = setting(widths=(4, 5, 3), N=12)
    damping *= 10
    damped = DampedFisher(fisher, damping, factorised=0, part=9, tol=1e-5)
    approximation = fv.approximate(fisher, "kfac-full")
    own, truth = approximation.damped(damping), damped_measures(F, approximation.to_dense().numpy(), damping)
    assert not own.whole.direct
    assert not damped.direct
    assert_calibrated(scores(lambda s: MEASURED[metric](Probes(damped, PROBES, s), own), truth[metric], seeds))


def test_more_probes_have_smaller_standard_errors():
    _, fisher, damping = setting()
    own = fv.approximate(fisher, "kfac").damped(damping)
    few, many = (Probes(DampedFisher(fisher, damping), m).divergence(own).error for m in (16, 16 * 64))
    assert few / many == pytest.approx(8, rel=0.4)


def test_eigenvectors_and_probes_measure_the_same():
    _, fisher, damping = setting()
    own, damped = fv.approximate(fisher, "ekfac").damped(damping), DampedFisher(fisher, damping)
    for name in ("inverse_error", "divergence"):
        certain, estimate = (getattr(way, name)(own) for way in (Eigenvectors(damped), Probes(damped, 4000)))
        assert abs(certain.value - estimate.value) < 5 * estimate.error
        assert estimate.error < 0.03 * certain.value


def test_no_global_random_number_is_used(never_formed):
    net, x = nets.mlp(20, 10, 4), nets.vectors(60, 20)
    fisher = fv.Probe(net, "categorical").fisher(x)
    before = torch.get_rng_state()
    first, second = (fv.compare(fisher, "kfac", damping=0.1).whole("kl", "stderr") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert first["kfac"] > 0


# ---- conjugate gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_conjugate_gradients_reach_their_residual(dtype):
    F, fisher, damping = setting(dtype)
    damping /= 100
    damped = DampedFisher(fisher, damping, factorised=0, part=16, tol=1e-5)
    b = torch.randn(len(F), 3, dtype=torch.float64)
    x = damped.solve(b).numpy()
    P = F + damping * np.eye(len(F))
    length, rounding = (np.linalg.norm(v, axis=0) for v in (b.numpy(), x))
    rounding *= 10 * torch.finfo(dtype).eps * np.linalg.norm(F, 2)  # of F's own entries
    assert (np.linalg.norm(b.numpy() - P @ x, axis=0) < 1.01e-5 * length + rounding).all()


class Counting(DampedFisher):
    """Counts its products."""

    count = 0

    def __matmul__(self, v):
        self.count += 1
        return super().__matmul__(v)


def test_a_part_of_the_examples_saves_products():
    F, fisher, damping = setting(N=60)
    few, most = (Counting(fisher, damping / 100, factorised=0, part=part) for part in (4, 160))
    for damped in (few, most):
        damped.solve(torch.ones(len(F), dtype=torch.float64))
    assert most.count < few.count / 2


def test_directions_and_inverses_where_nothing_is_small_enough_to_be_factorised(never_formed, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.budget._EIGENVECTORS", {True: 0, False: 0})
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(9, 3), torch.randint(2, (9,))
    fisher = fv.Probe(net, "categorical").fisher(x, y)
    names = ["direction_cosine", "model_decrease", *DAMPED]
    direct = fv.compare(fisher, ["kfac", "diagonal"], damping=0.05, metrics=names)
    monkeypatch.setattr("fisherviz.comparison.structured.DampedFisher", partial(DampedFisher, factorised=0))
    iterated = fv.compare(fisher, ["kfac", "diagonal"], damping=0.05, metrics=names)
    for name in ("direction_cosine", "model_decrease", "inverse_frobenius"):
        assert iterated.whole(name) == pytest.approx(direct.whole(name), rel=1e-3)
    for method, (value, error) in rows(iterated, "kl").items():
        assert abs(value - direct.whole("kl")[method]) < 6 * (error + direct.whole("kl", "stderr")[method])
    assert sum("conjugate gradients with a residual of 1e-04" in note for note in iterated.notes) == 1
    assert sum("from conjugate gradients, with a residual of 1e-04" in note for note in iterated.notes) == 1


# ---- what is said, and what it costs ---------------------------------------------------------------------------------


def compared(methods="kfac", **options):
    net, x, y = nets.mlp(3, 4, 2), nets.vectors(9, 3), torch.randint(2, (9,))
    return fv.compare(fv.Probe(net, "categorical").fisher(x, y), methods, **options)


def test_what_the_budget_does_not_allow_is_said_and_done_where_it_is_asked_for(never_formed, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.budget.MULTIPLY_ADDS", 0)
    found = compared(damping=0.05)
    assert not {*METRICS} & set(found.metrics)
    for name, why in (("relative_spectral is", "Lanczos takes more"), ("inverse_frobenius, kl are", "8 probes take")):
        (note,) = (note for note in found.notes if note.startswith(f"{name} left out"))
        assert why in note
        assert note.endswith("ask for it with metrics=.")
    assert {*METRICS} == set(compared(damping=0.05, metrics=METRICS).metrics)


def test_coupled_matrices_that_are_solved_by_iterations_are_left_out_unless_asked_for(never_formed, monkeypatch):
    monkeypatch.setattr(block_matrix, "DENSE_SOLVE", 0)
    found = compared(["kfac", "kfac-full"], damping=0.05)
    assert set(found.whole("kl")) == set(found.whole("inverse_frobenius")) == {"kfac"}
    assert any("inverse_frobenius, kl of kfac-full are left out" in note for note in found.notes)
    assert set(compared(["kfac-full"], damping=0.05, metrics="kl").whole("kl")) == {"kfac-full"}


def test_without_damping_there_is_no_inverse_and_the_table_is_never_empty(never_formed):
    with pytest.raises(ValueError, match=r"nothing of kl can be measured: .*without damping the Fisher has no inverse"):
        compared(damping=0.0, metrics="kl")


def test_an_indefinite_approximation_has_no_divergence_and_the_note_says_which(never_formed):
    class Indefinite(fv.approximations["diagonal"]):
        """Minus the diagonal."""

        def operator_for(self, layer, values):
            return super().operator_for(layer, values).scale(-100.0)

    found = compared({"kfac": "kfac", "bad": Indefinite}, damping=0.05)
    assert set(found.whole("kl")) == {"kfac"}
    (note,) = (note for note in found.notes if note.startswith("directions, inverse_frobenius, kl of bad"))
    assert "not positive definite" in note


def test_estimates_say_how_they_were_made_and_exact_numbers_too(never_formed, monkeypatch):
    assert any("exact, by the eigenvectors of F" in note for note in compared(damping=0.05).notes)
    monkeypatch.setattr("fisherviz.comparison.budget._EIGENVECTORS", {True: 0, False: 0})
    found = compared(damping=0.05)
    assert any("inverse_frobenius, kl: estimates from 32 random probes of seed 0" in note for note in found.notes)
    assert any("Lanczos with a residual of 1e-04" in note for note in found.notes)
    summary = found.summary()
    assert list(summary.columns).index("kl_stderr") == list(summary.columns).index("kl") + 1
    assert summary.loc["kfac", "kl_stderr"] == found.whole("kl", "stderr")["kfac"] > 0
    assert "relative_frobenius_stderr" not in summary


def test_a_monitor_records_standard_errors(never_formed, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.budget._EIGENVECTORS", {True: 0, False: 0})
    net, x = nets.mlp(3, 4, 2), nets.vectors(9, 3)
    found = fv.Monitor(fv.Probe(net, "categorical"), "kfac", data=x, damping=0.05, metrics=["kl", "bytes"]).measure(0)
    values = found[found["method"] == "kfac"].set_index("metric")["value"]
    assert values["kl_stderr"] > 0
    assert "bytes_stderr" not in values


def test_conjugate_gradients_beyond_the_budget_leave_directions_out_with_a_sentence(never_formed, monkeypatch):
    monkeypatch.setattr("fisherviz.comparison.budget.MULTIPLY_ADDS", 0)
    iterated = partial(DampedFisher, factorised=0, part=1)
    monkeypatch.setattr("fisherviz.comparison.structured.DampedFisher", iterated)
    found = compared(damping=0.05)
    assert "direction_cosine" not in found.metrics
    (note,) = (note for note in found.notes if note.startswith("directions are left out"))
    assert "did not converge" in note
    assert note.endswith("Ask for them with metrics=, or use fewer examples.")
    assert "direction_cosine" in compared(damping=0.05, metrics="direction_cosine").metrics


def test_an_exact_direction_that_does_not_fit_is_a_note_beside_the_other_metrics(never_formed, monkeypatch):
    def refuse(*_):
        raise MemoryError("solve by Woodbury takes 11.7 GiB, but 11.3 GiB are free on cpu.")

    monkeypatch.setattr("fisherviz.exact.fisher.Fisher.solve", refuse)
    found = compared(damping=0.05, metrics=["relative_frobenius", "direction_cosine"])
    assert "relative_frobenius" in found.metrics
    assert "direction_cosine" not in found.metrics
    assert any("directions are left out: solve by Woodbury takes 11.7 GiB" in note for note in found.notes)
    with pytest.raises(ValueError, match=r"takes 11\.7 GiB"):
        compared(damping=0.05, metrics=["direction_cosine"])
